"""Names, schemas and metadata of the Parquet tables."""

import re
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

PARTS: Final = "part-{:05d}.parquet"
SAMPLES: Final = "samples.parquet"
CLASSES: Final = "classes.parquet"
MATRIX: Final = "matrix"
SCHEMA_VERSION: Final = "1"
_TABLE: Final = re.compile(r"(matrix/)?(part-[0-9]{5,9}|samples|classes)\.parquet")


def is_table(name: str) -> bool:
    """Whether an export writes a file called so, relative to its directory."""
    return _TABLE.fullmatch(name) is not None


def metadata(method: str, sign: str, unit: str, run_id: str) -> dict[str, str]:
    """What stands in every table's schema: which method, sign and unit, of which run."""
    return {
        "hydra_pipe.schema_version": SCHEMA_VERSION,
        "hydra_pipe.method": method,
        "hydra_pipe.sign": sign,
        "hydra_pipe.unit": unit,
        "hydra_pipe.run_id": run_id,
    }


def label_type(labels: NDArray[Any] | None) -> pa.DataType:
    """Integers stay int64, names are strings; unknown labels are nulls of int64."""
    return pa.string() if labels is not None and labels.dtype.kind in "UO" else pa.int64()


def ranking_schema(test_labels: pa.DataType, train_labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("test_id", pa.int64(), nullable=False),
            pa.field("side", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("relevance", pa.float32(), nullable=False),
            pa.field("test_label", test_labels),
            pa.field("train_label", train_labels),
        ],
        metadata=meta,
    )


def samples_schema(train_labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("label", train_labels),
            pa.field("relevance_sum", pa.float64(), nullable=False),
            pa.field("relevance_mean", pa.float64(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("self_relevance", pa.float32()),
            pa.field("visits", pa.int64(), nullable=False),
        ],
        metadata=meta,
    )


def classes_schema(train_labels: pa.DataType, test_labels: pa.DataType, meta: dict[str, str]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("train_label", train_labels),
            pa.field("test_label", test_labels),
            pa.field("relevance_mean", pa.float64(), nullable=False),
            pa.field("pairs", pa.int64(), nullable=False),
        ],
        metadata=meta,
    )


def matrix_schema(meta: dict[str, str]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("test_id", pa.int64(), nullable=False),
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("relevance", pa.float32(), nullable=False),
        ],
        metadata=meta,
    )


def label_column(labels: NDArray[Any] | None, ids: NDArray[np.int64], kind: pa.DataType) -> pa.Array:
    """Labels of the samples `ids`, nulls where labels are unknown."""
    return pa.nulls(len(ids), kind) if labels is None else pa.array(labels[ids], kind)
