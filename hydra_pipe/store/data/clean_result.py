"""`cleaning/method=RESULT`: names, schema and form of a proposal of samples to keep and to drop."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hydra_pipe.store import names
from hydra_pipe.store.data.rankings import KEY, key_fields, opened_table
from hydra_pipe.store.files import files_below, is_partial, read_file
from hydra_pipe.store.json_parsing import read_json

KEEP_FILE: Final = "keep.txt"
DROP_FILE: Final = "drop.parquet"
RELABEL_FILE: Final = "relabel.parquet"
JUDGED_FILE: Final = "judged.parquet"
RETRAINING_FILE: Final = "retraining.parquet"
# Actions of the tables: the sample stays, gets another label, or goes.
KEEP, RELABEL, DROP = "keep", "relabel", "drop"
# Key of the summary: the result of training without the proposed samples.
RETRAINING: Final = "retraining"
# Column of the tables, and key of the summary: the tests that a sample hurts most.
HURTS: Final = "hurts"
# Type of that column. Parquet calls the values "element": a table that is read and written again
# then has the same bytes.
TESTS: Final = pa.list_(pa.field("element", pa.int64()))
# Key of the summary: the decisions of a person.
DECISIONS: Final = "decisions"
# Key of the summary: reasons not to trust the proposal, one sentence each.
WARNINGS: Final = "warnings"
# The most bytes of a line: 18 digits of an id, and the line's end.
_LINE_BYTES = 19
_ID = re.compile(r"[0-9]{1,18}")


def relevance_schema(labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    """Return the schema of `drop.parquet` and `judged.parquet` of a proposal by relevance.

    Args:
        labels: type of the labels.
        meta: metadata of the schema, from `store.rankings.metadata`.
    """
    own = [
        pa.field("relevance_sum", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
    return pa.schema(_first(labels) + own + _suggested(labels) + _LAST, metadata=meta)


def dynamics_schema(labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    """Return the schema of the same tables of a proposal by dynamics.

    Arguments: as of `relevance_schema`.
    """
    own = [
        pa.field("score", pa.float64(), nullable=False),
        pa.field("chance", pa.float64(), nullable=False),
    ]
    seen = [
        pa.field("suggested_chance", pa.float64()),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("suggested_confidence", pa.float64()),
        pa.field("mean_loss", pa.float64(), nullable=False),
    ]
    return pa.schema(_first(labels) + own + _suggested(labels) + seen + _LAST, metadata=meta)


def _first(labels: pa.DataType) -> list[pa.Field]:
    return [
        pa.field("train_id", pa.int64(), nullable=False),
        pa.field("label", labels),
        pa.field("given_class", pa.int64()),
    ]


def _suggested(labels: pa.DataType) -> list[pa.Field]:
    return [pa.field("suggested_label", labels), pa.field("suggested_class", pa.int64())]


_LAST = [
    pa.field("action", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("decided", pa.bool_(), nullable=False),
    pa.field(HURTS, TESTS),
]


def relabel_table(drop: pa.Table) -> pa.Table:
    """Return `relabel.parquet`: the samples of `drop.parquet` that get another label."""
    chosen = drop.filter(pc.equal(drop.column("action"), RELABEL))
    probability = (
        chosen.column("chance")
        if "chance" in chosen.column_names
        else pa.nulls(len(chosen), pa.float64())
    )
    wanted = {
        "train_id": chosen.column("train_id"),
        "given": chosen.column("label"),
        "suggested": chosen.column("suggested_label"),
        "suggested_class": chosen.column("suggested_class"),
        "probability": probability,
        "score": chosen.column("score"),
        "evidence": chosen.column("reason"),
    }
    if KEY in chosen.column_names:
        wanted[KEY] = chosen.column(KEY)
    return pa.table(wanted).replace_schema_metadata(chosen.schema.metadata)


def write_proposal(
    directory: Path,
    keep: NDArray[np.int64],
    drop: pa.Table,
    judged: pa.Table,
    summary: dict[str, Any],
) -> None:
    """Write the files into a new directory."""
    np.savetxt(directory / KEEP_FILE, keep, fmt="%d")
    _write_table(directory / DROP_FILE, drop)
    _write_table(directory / JUDGED_FILE, judged)
    _write_table(directory / RELABEL_FILE, relabel_table(drop))
    (directory / names.SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def write_retraining(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the table of retrainings into a new directory."""
    _write_table(directory / RETRAINING_FILE, pa.Table.from_pylist(list(rows)))


def _write_table(path: Path, table: pa.Table) -> None:
    with open(path, "wb") as file:  # pyarrow would take some names for URLs
        pq.write_table(table, file)


def read_proposal(
    directory: Path, n_samples: int
) -> tuple[NDArray[np.int64], pa.Table, pa.Table, list[dict[str, Any]], dict[str, Any]]:
    """Read a proposal.

    Args:
        directory: directory of the proposal.
        n_samples: number of training samples. Each must be either kept or dropped.

    Returns:
        Ids to keep, the table of samples to relabel or drop, the table of all judged samples as
        proposed, the rows of retrainings, if there are any, and the summary.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: a file is missing or damaged.
    """
    lines = read_file(directory / KEEP_FILE, n_samples * _LINE_BYTES).decode("ascii").splitlines()
    if not all(_ID.fullmatch(line) for line in lines):
        raise ValueError(f"{KEEP_FILE} has lines that are no ids")
    keep = np.array([int(line) for line in lines], np.int64)
    drop, ids = _with_ids(directory / DROP_FILE)
    judged, judged_ids = _with_ids(directory / JUDGED_FILE)
    if not np.isin(ids, judged_ids).all():
        raise ValueError(f"{JUDGED_FILE} does not have the samples of {DROP_FILE}")
    # A manifest may claim any number of samples. It is compared with the files before memory
    # is asked for.
    there = np.sort(np.concatenate([keep, ids]))
    if (
        len(there) != n_samples
        or (there != np.arange(len(there))).any()
        or (np.diff(keep) < 0).any()
    ):
        raise ValueError(
            f"{KEEP_FILE} and {DROP_FILE} do not hold each of {n_samples} training samples once, "
            "in order"
        )
    summary = read_json(directory / names.SUMMARY)
    parts = [] if not isinstance(summary, dict) else [summary.get(name) for name in _PARTS]
    if not _says(summary) or not all(part is None or _says(part) for part in parts):
        raise ValueError(f"{names.SUMMARY} is no summary of a proposal")
    _check_classes(summary.get("classes"), drop, judged)
    rows = []
    if RETRAINING in summary:  # else the table may be an earlier proposal's, left by a copy
        rows = opened_table(directory / RETRAINING_FILE).read().to_pylist()
    return keep, drop, judged, rows, summary


# Parts of the summary that have lines for a person of their own.
_PARTS = (RETRAINING, DECISIONS, HURTS)


def _says(found: Any) -> bool:
    """Tell whether a part of a summary is an object with lines for a person."""
    says = found.get("says") if isinstance(found, dict) else None
    return isinstance(says, list) and all(isinstance(line, str) for line in says)


def _check_classes(labels: Any, *tables: pa.Table) -> None:
    """Refuse classes that have no label. Raises: ValueError."""
    if labels is None:
        labels = []
    elif not isinstance(labels, list) or not all(type(label) in (int, str) for label in labels):
        raise ValueError(f"{names.SUMMARY} has no labels of classes")
    for table in tables:
        for name in ("given_class", "suggested_class"):
            numbers = table.column(name).drop_null().to_numpy()
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(labels):
                raise ValueError(f"{name} has classes beside those of {names.SUMMARY}")


def _with_ids(path: Path) -> tuple[pa.Table, NDArray[np.int64]]:
    """Return a table of samples, and their ids.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: the table is missing or damaged.
    """
    table = opened_table(path).read()
    known = [
        pa.schema([*schema(labels, {}), *key_fields(key=has_keys)])
        for schema in (dynamics_schema, relevance_schema)
        for labels in (pa.int64(), pa.string())
        for has_keys in (False, True)
    ]
    if not any(table.schema.equals(schema) for schema in known):
        raise ValueError(f"{path.name} has other columns")
    return table, table.column("train_id").to_numpy()


def carry_retrained(directory: Path, target: Path) -> None:
    """Copy the pieces of retrainings from `directory` to a new one that is to replace it."""
    for name in files_below(directory / names.RETRAINED):
        if is_partial(name):
            continue
        (target / names.RETRAINED).mkdir(exist_ok=True)
        (target / names.RETRAINED / name).write_bytes(read_file(directory / names.RETRAINED / name))
