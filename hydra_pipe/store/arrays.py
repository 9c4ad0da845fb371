"""Zarr arrays as this project makes and opens them: codecs, fill values, the fast codec pipeline, errors in our words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from hydra_pipe.errors import StoreError

# Set around the making and opening of arrays only, which is when zarr chooses the pipeline: the user's own zarr is left alone.
# zarrs 0.2.3 decodes a part of a file (of a shard, or of a chunk where there is no shard) without looking at any checksum,
# found by flipping every bit of one, and leaves out chunks that equal the fill value whatever the array's configuration says.
# So it reads whole files only, writes only relevance, which cannot equal the fill value, and zarr's own pipeline does the rest.
_FAST = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
_CAREFUL = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
BLOSC: dict[str, Any] = {"cname": "lz4", "clevel": 5}


def create_group(path: Path) -> zarr.Group:
    """A new Zarr v3 group at `path`, in place of what is there."""
    return zarr.create_group(LocalStore(path), overwrite=True, zarr_format=3)


def open_group(path: Path, consequence: str) -> zarr.Group:
    """The Zarr group at `path`, for reading.

    Raises:
        StoreError: there is none, or its metadata is damaged; the message adds `consequence`.
    """
    if not path.is_dir():
        raise StoreError(f"{path} is missing: {consequence}")
    try:
        return zarr.open_group(LocalStore(path, read_only=True), mode="r", zarr_format=3)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise StoreError(f"the metadata of {path} is damaged ({error}): {consequence}") from error


def reopen_group(path: Path) -> zarr.Group:
    """The Zarr group at `path`, for writing more into it. Raises: ValueError and the like: see `open_group`."""
    return zarr.open_group(LocalStore(path), mode="r+", zarr_format=3)


def get_array(group: zarr.Group, name: str, *, fast: bool = False) -> zarr.Array[Any]:
    """Array `name` of `group`.

    Args:
        group: where.
        name: of the array.
        fast: decode with zarrs, which checks whole files only: see `read_checked`.

    Raises:
        StoreError: it is not there, or damaged.
    """
    try:
        with zarr.config.set(_FAST if fast else _CAREFUL):
            array = group[name]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise StoreError(f"{group.store_path}/{name} is missing or damaged ({error})") from error
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{group.store_path}/{name} is a group where an array is expected")
    return array


def get_group(group: zarr.Group, name: str) -> zarr.Group | None:
    """Sub-group `name` of `group`, or None."""
    found = group.get(name)
    return found if isinstance(found, zarr.Group) else None


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    dimensions: tuple[str, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None = None,
    *,
    shuffle: bool = True,
) -> zarr.Array[Any]:
    """A checksummed array. Its fill value is one that data do not have, where the dtype has such a value.

    Args:
        group: where.
        name: of the array.
        shape: at first; rows are appended by `resize`.
        dtype: of the elements.
        dimensions: names, one for each dimension.
        chunks: what is decoded at once.
        shards: what is one file; none: each chunk is one.
        shuffle: group the bytes of numbers by their place, which most values compress better for.
    """
    codecs = [BloscCodec(**BLOSC, shuffle="shuffle" if shuffle else "noshuffle"), Crc32cCodec()]
    with zarr.config.set(_CAREFUL):
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            compressors=codecs,
            filters=None,
            fill_value=_unwritten(np.dtype(dtype)),
            dimension_names=dimensions,
            # zarr leaves out chunks that equal the fill value, and such a chunk cannot be told from one never written
            config={"write_empty_chunks": True},
            overwrite=True,
        )


def read_checked(fast: zarr.Array[Any], careful: zarr.Array[Any], rows: slice, columns: slice) -> NDArray[Any]:
    """`array[rows, columns]` with every checksum checked: whole files through `fast`, everything else through `careful`.

    Args:
        fast, careful: two handles of one array, see `get_array`.
        rows, columns: with both ends given.
    """
    file_rows, file_columns = careful.shards or careful.chunks
    whole = rows.start
    if rows.start % file_rows == 0 and (columns.start, columns.stop) == (0, file_columns):
        whole = rows.stop // file_rows * file_rows
    if whole == rows.stop:
        return np.asarray(fast[rows, columns])
    if whole <= rows.start:
        return np.asarray(careful[rows, columns])
    result = np.empty((rows.stop - rows.start, columns.stop - columns.start), careful.dtype)
    result[: whole - rows.start] = fast[rows.start : whole, columns]
    result[whole - rows.start :] = careful[whole : rows.stop, columns]
    return result


# What zarr and its codecs raise on rotten bytes: a wrong checksum, an offset that points nowhere, a size that cannot be.
ROTTEN = (RuntimeError, ValueError, OSError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


@contextmanager
def damage_named(what: object, consequence: str) -> Iterator[None]:
    """Turn what zarr and its codecs raise on rotten or missing bytes into an error of ours."""
    try:
        yield
    except ROTTEN as error:
        message = str(error).strip().split("\n")[-1]
        raise StoreError(f"{what} cannot be read ({message}): {consequence}") from error


def missing_chunks(array: zarr.Array[Any]) -> int:
    """Files that the array's shape calls for and that are not there."""
    grid = array.shards or array.chunks
    expected = int(np.prod([-(-n // chunk) for n, chunk in zip(array.shape, grid, strict=True)]))
    present = array.nchunks_initialized
    if array.shards is not None:
        inner = int(np.prod([s // c for s, c in zip(array.shards, array.chunks, strict=True)]))
        present //= inner
    return expected - present


def _unwritten(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return dtype.type(0)
