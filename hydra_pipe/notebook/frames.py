"""Rankings as pandas data frames."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.exporting.ranking import top_samples
from hydra_pipe.exporting.source import ExportSource
from hydra_pipe.notebook.extras import imported
from hydra_pipe.notebook.results import Results
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.predictions import read_predictions
from hydra_pipe.store.data.rankings import spread_columns, with_keys

if TYPE_CHECKING:
    import pandas

SIDES = {"helpful": 1, "harmful": -1}
BOTH = "both"


def top_frame(
    results: Results, method: str, test_id: int | str, k: int, side: str
) -> "pandas.DataFrame":
    """Return the data frame of `Run.top`."""
    imported("pandas", "a data frame")
    if side not in (*SIDES, BOTH):
        raise UsageError(f"side {side!r}: give helpful, harmful or both")
    if k < 1:
        raise UsageError(f"k = {k}: give 1 or more")
    source, number = results.source(method), results.test_id(method, test_id)
    column = results.column(method, number)
    chosen = [name for name in SIDES if side in (name, BOTH)]
    place = int(np.searchsorted(source.test_ids, number))
    tables = [_side_table(source, place, column, name, k) for name in chosen]
    table = pa.concat_tables(tables if side == BOTH else [tables[0].drop_columns("side")])
    return _framed(table, source, test_id=number)


def _side_table(
    source: ExportSource, place: int, column: NDArray[np.float32], side: str, k: int
) -> pa.Table:
    """Return the ranking of a side of the column at `place`, whose values are `column`."""
    ids = top_samples(column * SIDES[side], k)
    table = pa.table(
        {
            "side": pa.array([side] * len(ids), pa.string()),
            "rank": pa.array(np.arange(1, len(ids) + 1, dtype=np.int32)),
            "train_id": pa.array(ids),
            "label": rankings.label_column(source.train_labels, ids, source.train_type),
            "relevance": pa.array(column[ids]),
        }
    )
    table = with_keys(table, source.train_keys, ids)
    spread = spread_columns(source.combined, ids, np.full(len(ids), place))
    for field, values in zip(rankings.SPREAD_FIELDS, spread, strict=False):
        table = table.append_column(field, values)
    return table


def samples_frame(results: Results, method: str, progress: Progress) -> "pandas.DataFrame":
    """Return the data frame of `Run.samples`."""
    imported("pandas", "a data frame")
    source = results.source(method)
    return _framed(results.totals(method, progress).samples, source)


def dynamics_frame(gradients: Gradients) -> "pandas.DataFrame":
    """Return the data frame of `Run.dynamics`."""
    pandas = imported("pandas", "a data frame")
    rows = slice(0, gradients.rows.n_rows)
    columns: dict[str, NDArray[Any]] = {
        "train_id": gradients.samples(rows),
        "step": gradients.step_of_rows(rows),
        "loss": gradients.row_dynamics(names.LOSS, rows),
        "target": gradients.row_dynamics(names.TARGET, rows),
    }
    predicted = read_predictions(gradients, rows)
    if predicted is not None:
        columns |= {
            "predicted": predicted.classes,
            "confidence": predicted.confidence,
            "label_confidence": predicted.label_confidence,
        }
    return pandas.DataFrame(columns)


def attributes_of(source: ExportSource) -> dict[str, str]:
    """Return method, sign, unit and run, as attributes for anything that shows relevance."""
    return {
        name: source.meta[f"hydra_pipe.{name}"]
        for name in (names.METHOD, names.SIGN, names.UNIT, names.RUN_ID)
    }


def _framed(table: pa.Table, source: ExportSource, **more: Any) -> "pandas.DataFrame":
    frame = table.replace_schema_metadata().to_pandas()
    frame.attrs = attributes_of(source) | more
    return frame
