"""Rankings as pandas data frames."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.exporting.source import TableSource, TopSource
from hydra_pipe.maths.ranking import top_samples
from hydra_pipe.notebook.extras import imported
from hydra_pipe.notebook.results import Results, place_of
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.predictions import read_predictions
from hydra_pipe.store.data.rankings import spread_columns, with_keys
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.types import F32, I64

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
    chosen = [name for name in SIDES if side in (name, BOTH)]
    source: TableSource
    if ResultName.parse(method).is_top:
        source = results.top_source(method)
        number = results.test_id(source, test_id)
        place = place_of(source, number)
        found = _kept_sides(source, place, k)
    else:
        source = results.source(method)
        number = results.test_id(source, test_id)
        place, column = place_of(source, number), results.column(method, number)
        ids = {name: top_samples(column * SIDES[name], k) for name in chosen}
        found = {name: (own, column[own]) for name, own in ids.items()}
    tables = [_side_table(source, place, name, *found[name]) for name in chosen]
    table = pa.concat_tables(tables if side == BOTH else [tables[0].drop_columns("side")])
    return _framed(table, source, test_id=number)


def _kept_sides(source: TopSource, place: int, k: int) -> dict[str, tuple[I64, F32]]:
    """Return the samples of each side of the column at `place`, and their relevance.

    Raises:
        UsageError: the result has fewer than `k` samples of a side.
        StoreError: damaged.
    """
    most = source.tops.count
    if k > most < source.n_samples:
        raise UsageError(
            f"k = {k}: {source.method} has the top {most} on each side: give {most} or less, or "
            f"run hydra-pipe reduce with --top {k} --overwrite"
        )
    tops = source.tops.read((place, place + 1), k, source.n_samples)
    samples, relevance = tops.samples[0], tops.relevance[0]
    known = samples >= 0
    return {
        name: (samples[side][known[side]], relevance[side][known[side]])
        for side, name in enumerate(SIDES)
    }


def _side_table(source: TableSource, place: int, side: str, ids: I64, relevance: F32) -> pa.Table:
    """Return the ranking of a side of the column at `place`."""
    table = pa.table(
        {
            "side": pa.array([side] * len(ids), pa.string()),
            "rank": pa.array(np.arange(1, len(ids) + 1, dtype=np.int32)),
            "train_id": pa.array(ids),
            "label": rankings.label_column(source.train_labels, ids, source.train_type),
            "relevance": pa.array(relevance),
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


def attributes_of(source: TableSource) -> dict[str, str]:
    """Return method, sign, unit and run, as attributes for anything that shows relevance."""
    return {
        name: source.meta[f"hydra_pipe.{name}"]
        for name in (names.METHOD, names.SIGN, names.UNIT, names.RUN_ID)
    }


def _framed(table: pa.Table, source: TableSource, **more: Any) -> "pandas.DataFrame":
    frame = table.replace_schema_metadata().to_pandas()
    frame.attrs = attributes_of(source) | more
    return frame
