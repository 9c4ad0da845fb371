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
from hydra_pipe.store.data.rankings import opened_table
from hydra_pipe.store.files import files_below, is_partial, read_file
from hydra_pipe.store.json_parsing import read_json

KEEP_FILE: Final = "keep.txt"
DROP_FILE: Final = "drop.parquet"
RELABEL_FILE: Final = "relabel.parquet"
RETRAINING_FILE: Final = "retraining.parquet"
RELABEL, DROP = "relabel", "drop"
# Key of the summary: the result of training without the proposed samples.
RETRAINING: Final = "retraining"
# Key of the summary: reasons not to trust the proposal, one sentence each.
WARNINGS: Final = "warnings"
# The most bytes of a line: 18 digits of an id, and the line's end.
_LINE_BYTES = 19
_ID = re.compile(r"[0-9]{1,18}")


def drop_schema(labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    """Return the schema of `drop.parquet`.

    Args:
        labels: type of the labels.
        meta: metadata of the schema, from `store.rankings.metadata`.
    """
    return pa.schema(
        [
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("label", labels),
            pa.field("relevance_sum", pa.float64(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("suggested_label", labels),
            pa.field("action", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
        ],
        metadata=meta,
    )


def dynamics_schema(labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    """Return the schema of `drop.parquet` of a proposal by dynamics.

    Arguments: as of `drop_schema`.
    """
    return pa.schema(
        [
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("label", labels),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("chance", pa.float64(), nullable=False),
            pa.field("suggested_label", labels),
            pa.field("confidence", pa.float64(), nullable=False),
            pa.field("suggested_confidence", pa.float64(), nullable=False),
            pa.field("mean_loss", pa.float64(), nullable=False),
            pa.field("action", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
        ],
        metadata=meta,
    )


def relabel_table(drop: pa.Table) -> pa.Table:
    """Return `relabel.parquet`: the samples of `drop.parquet` that have a suggested label."""
    chosen = drop.filter(pc.equal(drop.column("action"), RELABEL))
    wanted = ["train_id", "label", "suggested_label", "score", "reason"]
    return chosen.select(wanted).rename_columns(
        ["train_id", "given", "suggested", "score", "evidence"]
    )


def write_proposal(
    directory: Path, keep: NDArray[np.int64], drop: pa.Table, summary: dict[str, Any]
) -> None:
    """Write the files into a new directory."""
    np.savetxt(directory / KEEP_FILE, keep, fmt="%d")
    _write_table(directory / DROP_FILE, drop)
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
) -> tuple[NDArray[np.int64], pa.Table, list[dict[str, Any]], dict[str, Any]]:
    """Read a proposal.

    Args:
        directory: directory of the proposal.
        n_samples: number of training samples. Each must be either kept or dropped.

    Returns:
        Ids to keep, the table of samples to drop, the rows of retrainings, if there are any,
        and the summary.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: a file is missing or damaged.
    """
    lines = read_file(directory / KEEP_FILE, n_samples * _LINE_BYTES).decode("ascii").splitlines()
    if not all(_ID.fullmatch(line) for line in lines):
        raise ValueError(f"{KEEP_FILE} has lines that are no ids")
    keep = np.array([int(line) for line in lines], np.int64)
    drop = opened_table(directory / DROP_FILE).read()
    ids = drop.schema.get_field_index("train_id")
    if ids < 0 or drop.schema.field(ids).type != pa.int64() or drop.column(ids).null_count:
        raise ValueError(f"{DROP_FILE} has no ids")
    # A manifest may claim any number of samples. It is compared with the files before memory
    # is asked for.
    there = np.sort(np.concatenate([keep, drop.column(ids).to_numpy()]))
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
    says = summary.get("says") if isinstance(summary, dict) else None
    if not isinstance(says, list) or not all(isinstance(line, str) for line in says):
        raise ValueError(f"{names.SUMMARY} is no summary of a proposal")
    rows = []
    if RETRAINING in summary:  # else the table may be an earlier proposal's, left by a copy
        rows = opened_table(directory / RETRAINING_FILE).read().to_pylist()
    return keep, drop, rows, summary


def carry_retrained(directory: Path, target: Path) -> None:
    """Copy the pieces of retrainings from `directory` to a new one that is to replace it."""
    for name in files_below(directory / names.RETRAINED):
        if is_partial(name):
            continue
        (target / names.RETRAINED).mkdir(exist_ok=True)
        (target / names.RETRAINED / name).write_bytes(read_file(directory / names.RETRAINED / name))
