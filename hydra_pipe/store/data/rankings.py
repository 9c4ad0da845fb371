"""Names, schemas, metadata and encodings of the Parquet tables."""

import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hydra_pipe.store.data.combined import Combined
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.files import read_file
from hydra_pipe.types import I64

PARTS: Final = "part-{:05d}.parquet"
SAMPLES: Final = "samples.parquet"
CLASSES: Final = "classes.parquet"
MATRIX: Final = "matrix"
SCHEMA_VERSION: Final = "1"
# Columns of keys. They come after all other columns, where samples have keys.
KEY: Final = "key"
TEST_KEY, TRAIN_KEY = "test_key", "train_key"
# Orders of rows. A table is sorted by the first order whose columns it has: by test sample,
# and helpful samples before harmful ones.
_ASCENDING, _DESCENDING = "ascending", "descending"
_ORDERS: Final = (
    (("test_id", _ASCENDING), ("side", _DESCENDING), ("rank", _ASCENDING)),
    (("test_id", _ASCENDING), ("train_id", _ASCENDING)),
    (("train_label", _ASCENDING), ("test_label", _ASCENDING)),
    (("train_id", _ASCENDING),),
)
# Columns of few values that repeat, and columns of integers that are near each other. All
# other columns are written plainly.
_DICTIONARIES: Final = (
    "test_id",
    "side",
    "test_label",
    "train_label",
    "label",
    "visits",
    TEST_KEY,
    TRAIN_KEY,
)
_DELTAS: Final = ("train_id", "rank")
_TABLE: Final = re.compile(r"(matrix/)?(part-[0-9]{5,9}|samples|classes)\.parquet")


def is_table(name: str) -> bool:
    """Tell whether an export writes a file of this name, relative to its directory."""
    return _TABLE.fullmatch(name) is not None


def metadata(method: str, sign: str, unit: str, run_id: str) -> dict[str, str]:
    """Return the metadata of every table's schema: method, sign, unit and run."""
    return {
        "hydra_pipe.schema_version": SCHEMA_VERSION,
        "hydra_pipe.method": method,
        "hydra_pipe.sign": sign,
        "hydra_pipe.unit": unit,
        "hydra_pipe.run_id": run_id,
    }


def label_type(labels: NDArray[Any] | None) -> pa.DataType:
    """Return the Arrow type of labels: int64, or strings for names.

    The type of unknown labels is int64, and every value is null.
    """
    return pa.string() if labels is not None and labels.dtype.kind in "UO" else pa.int64()


def key_fields(**has_keys: bool) -> list[pa.Field]:
    """Return the columns of keys of a table: those names whose samples have keys."""
    return [pa.field(name, pa.string(), nullable=False) for name, has in has_keys.items() if has]


# Columns of a result that combines runs: of each pair the standard error of the mean (null of one
# run), the number of runs whose relevance has the sign of the mean, and the number of runs.
SPREAD_FIELDS: Final = [
    pa.field("standard_error", pa.float32()),
    pa.field("agreeing_runs", pa.int32(), nullable=False),
    pa.field("runs", pa.int32(), nullable=False),
]


def ranking_schema(
    test_labels: pa.DataType,
    train_labels: pa.DataType,
    meta: dict[str, str],
    *,
    test_keys: bool,
    train_keys: bool,
    combined: bool,
) -> pa.Schema:
    return pa.schema(
        [
            pa.field("test_id", pa.int64(), nullable=False),
            pa.field("side", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("relevance", pa.float32(), nullable=False),
            pa.field("test_label", test_labels),
            pa.field("train_label", train_labels),
            *key_fields(test_key=test_keys, train_key=train_keys),
            *(SPREAD_FIELDS if combined else []),
        ],
        metadata=meta,
    )


def samples_schema(train_labels: pa.DataType, meta: dict[str, str], *, has_keys: bool) -> pa.Schema:
    return pa.schema(
        [
            pa.field("train_id", pa.int64(), nullable=False),
            pa.field("label", train_labels),
            pa.field("relevance_sum", pa.float64(), nullable=False),
            pa.field("relevance_mean", pa.float64(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("self_relevance", pa.float32()),
            pa.field("visits", pa.int64(), nullable=False),
            pa.field("mean_loss", pa.float32()),
            pa.field("last_loss", pa.float32()),
            pa.field("mean_margin", pa.float32()),
            pa.field("mean_el2n", pa.float32()),
            pa.field("variability", pa.float32()),
            pa.field("visits_wrong", pa.int32()),
            pa.field("first_learnt", pa.int32()),
            *key_fields(key=has_keys),
        ],
        metadata=meta,
    )


def classes_schema(
    train_labels: pa.DataType, test_labels: pa.DataType, meta: dict[str, str]
) -> pa.Schema:
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


def label_column(
    labels: NDArray[Any] | None, ids: NDArray[np.int64] | slice, kind: pa.DataType
) -> pa.Array:
    """Return the labels of the samples `ids`, nulls where labels are unknown."""
    n = ids.stop - ids.start if isinstance(ids, slice) else len(ids)
    return pa.nulls(n, kind) if labels is None else pa.array(labels[ids], kind)


def key_columns(*of_samples: tuple[Keys | None, I64]) -> list[pa.Array]:
    """Return columns of keys, one for each pair of keys and ids whose samples have keys."""
    return [pa.array(keys.take(ids), pa.string()) for keys, ids in of_samples if keys is not None]


def with_keys(table: pa.Table, keys: Keys | None, ids: I64) -> pa.Table:
    """Return a table with the column `key` after all others. As it is if samples have no keys.

    Args:
        table: table with a row for each sample.
        keys: keys of all samples. None: they have none.
        ids: ids of the rows' samples.
    """
    for column in key_columns((keys, ids)):
        table = table.append_column(*key_fields(key=True), column)
    return table


def spread_columns(combined: Combined | None, samples: I64, columns: I64) -> list[pa.Array]:
    """Return the columns of `SPREAD_FIELDS` for some pairs. None if no runs are combined.

    Args:
        combined: the combination. None: the result is of one run.
        samples, columns: sample and column of each pair, shape (pair,).

    Raises:
        StoreError: damaged.
    """
    if combined is None:
        return []
    found = combined.spread_of(samples, columns)
    return [
        pa.array(found.standard_error, from_pandas=True),
        pa.array(found.agreeing.astype(np.int32)),
        pa.array(found.runs.astype(np.int32)),
    ]


def opened_table(file: Path) -> pq.ParquetFile:
    """Read a whole Parquet file.

    `pq.read_table` would make a data set of the file. A thread of Arrow may drop the data set
    when Python is about to end, which aborts Python (pyarrow 26).

    Raises:
        OSError: the file is missing.
        pyarrow.ArrowException: the file is damaged.
    """
    return pq.ParquetFile(pa.BufferReader(read_file(file)))


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a new table. The caller decides the row groups, and closes the table.

    Every reader in docs/parquet.md reads these encodings. benchmarks/RESULTS.md has the
    measurements behind them, and behind columns without compression. Labels are plain integers
    and strings to Arrow, because some tools turn Arrow's own dictionaries into other types.
    """
    order = next(order for order in _ORDERS if all(name in schema.names for name, _ in order))
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    # pyarrow takes a name such as "exp:1" for a URL, and "~" for a home directory. So it gets
    # an open file.
    file = pa.OSFile(os.path.abspath(path), "wb")
    writer = pq.ParquetWriter(
        file,
        schema,
        compression={name: "none" if name in floats else "snappy" for name in schema.names},
        use_dictionary=[name for name in _DICTIONARIES if name in schema.names],
        column_encoding={name: "DELTA_BINARY_PACKED" for name in _DELTAS if name in schema.names}
        | dict.fromkeys(floats, "PLAIN"),
        write_page_index=True,
        sorting_columns=pq.SortingColumn.from_ordering(schema, order),
    )
    writer.file_handle = file  # the writer closes the file with itself
    return writer


def n_rows_of(path: Path) -> int:
    """Return the number of rows of a table on a local disk. Reads only its metadata.

    Raises:
        OSError, pyarrow.ArrowException: as for `opened_table`.
    """
    with pa.OSFile(os.path.abspath(path)) as file:
        return int(pq.read_metadata(file).num_rows)
