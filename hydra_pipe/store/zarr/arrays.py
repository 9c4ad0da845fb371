"""Zarr v3 groups and arrays, as far as this project writes them.

The module has the metadata, the files and the windows. It raises errors in this project's
words. Paths are `pathlib` paths, or objects that behave like them. An array has one
dimension or two. A file of an array is one chunk or one shard; `store/zarr/codec.py` reads and
writes the bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.store.files import files_below, is_partial, is_remote, read_file, replace_file
from hydra_pipe.store.json_parsing import is_count, read_json
from hydra_pipe.store.json_writing import json_bytes
from hydra_pipe.store.zarr.codec import (
    COMPRESSOR,
    LEVEL,
    MOST_CHUNK_BYTES,
    MOST_RATIO,
    ChunkCodec,
    RottenError,
    Shape,
    ShardCodec,
    StoredFile,
)
from hydra_pipe.types import U8

METADATA = "zarr.json"
CHUNKS = "c"
# Errors that damaged bytes raise: the checksum is wrong, or the file is gone or unreadable.
ROTTEN = (RottenError, OSError)
# Errors that parsing raises on metadata which this project does not write.
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError)
# Other dtypes may be pointers (object), or have elements of any number of bytes.
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int8", "int32", "int64", "uint8")
}
# Room for a window up to this size is made without a check. For a larger one the array's
# files are looked at first: can they hold so much?
_FREE_BYTES, _FREE_FILES = 32 * 2**20, 1024
# The deepest nesting of groups in a store, and the most values in a row.
_MOST_LEVELS = 8
_MOST_WIDTH = 2**40
# Metadata and listings that were read in a block of `read_once`, by kind and path.
_known: ContextVar[dict[tuple[str, str], Any] | None] = ContextVar("known", default=None)


class Group:
    """A Zarr group, to read members from and to create members in.

    Args:
        path: directory of the group.
        attributes: attributes of the group, as in JSON.
        listed: function that tells whether a member belongs to the group. Its argument is
            the member's name in this group, with slashes for members further down. None:
            every member that exists belongs.
    """

    def __init__(
        self, path: Path, attributes: dict[str, Any], listed: Callable[[str], bool] | None = None
    ) -> None:
        self.path = path
        self.attributes = attributes
        self._listed = listed

    @classmethod
    def create(cls, path: Path, attributes: Mapping[str, Any] | None = None) -> Self:
        """Create a group, or give an existing group new attributes."""
        group = cls(path, dict(attributes or {}))
        write_metadata(
            path, {"attributes": group.attributes, "zarr_format": 3, "node_type": "group"}
        )
        return group

    @classmethod
    def open(
        cls, path: Path, consequence: str, listed: Callable[[str], bool] | None = None
    ) -> Self:
        """Open the group at `path`.

        Args:
            path: directory of the group.
            consequence: meaning of a fault, for the message.
            listed: function that tells whether a member belongs to the group, as in `Group`.

        Raises:
            StoreError: the group is missing, or its metadata is damaged. The message adds
                `consequence`.
        """
        try:
            return cls._of(path, read_metadata(path), listed)
        except (*_MALFORMED, OSError) as error:
            if isinstance(error, OSError) and not path.is_dir():
                raise StoreError(f"{path} is missing: {consequence}") from error
            raise StoreError(
                f"the metadata of {path} is damaged ({shown(error)}): {consequence}"
            ) from error

    def group(self, name: str) -> "Group | None":
        """Return sub-group `name`, or None. Raises: StoreError: its metadata is damaged."""
        path = self.path / name
        try:
            metadata = _metadata_or_none(path) if self._counts(name) else None
            return None if metadata is None else Group._of(path, metadata, self._below(name))
        except (*_MALFORMED, OSError) as error:
            raise StoreError(
                f"the metadata of {path} is damaged ({shown(error)}): the store is not readable"
            ) from error

    @classmethod
    def _of(
        cls, path: Path, metadata: dict[str, Any], listed: Callable[[str], bool] | None
    ) -> Self:
        """Return the group at `path`. Raises: one of `_MALFORMED`: it is no group."""
        if metadata["node_type"] != "group":
            raise ValueError(f"a {shown(metadata['node_type'])}, not a group")
        return cls(path, _attributes(metadata), listed)

    def has(self, name: str) -> bool:
        """Tell whether a member called `name` exists, whole or damaged."""
        return self._counts(name) and (self.path / name).exists()

    def _counts(self, name: str) -> bool:
        return self._listed is None or self._listed(name)

    def _below(self, name: str) -> Callable[[str], bool] | None:
        listed = self._listed
        return None if listed is None else lambda member: listed(f"{name}/{member}")

    def require_group(self, name: str) -> "Group":
        """Return sub-group `name`, and create it if it is missing."""
        found = self.group(name)
        return Group.create(self.path / name) if found is None else found

    def group_names(self) -> list[str]:
        """Return the names of the groups directly in this one."""
        return [path.name for path, metadata in self._members() if metadata["node_type"] == "group"]

    def array(self, name: str) -> "Array":
        """Return array `name`, which may lie some groups further down.

        Raises:
            StoreError: the array is missing or damaged.
        """
        if not self._counts(name):
            raise StoreError(
                f"{self.path / name} belongs to another run: the manifest does not list it"
            )
        return Array.open(self.path / name)

    def array_names(self) -> list[str]:
        """Return the sorted names of the arrays in this group and in the groups below it.

        Raises:
            StoreError: metadata are damaged.
        """
        return sorted(self._array_names(_MOST_LEVELS))

    def _array_names(self, levels: int) -> Iterator[str]:
        for path, metadata in self._members():
            if metadata["node_type"] == "array":
                yield path.name
            # A link may lead back here, and the walk would never end.
            elif path.is_symlink() or not levels:
                raise StoreError(
                    f"{path} is a link to a group, or more than {_MOST_LEVELS} groups deep"
                )
            else:
                below = Group(path, {}, self._below(path.name))
                yield from (f"{path.name}/{name}" for name in below._array_names(levels - 1))

    def _members(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in _once("entries", self.path, _entries):
            if path.name == METADATA or is_partial(path.name) or not self._counts(path.name):
                continue
            try:
                metadata = _metadata_or_none(path)
                if metadata is not None:
                    yield path, {"node_type": metadata["node_type"]}
            except (*_MALFORMED, OSError) as error:
                raise StoreError(f"the metadata of {path} is damaged ({shown(error)})") from error


class Array:
    """A Zarr array of one dimension or two.

    Args:
        path: directory of the array.
        metadata: content of `zarr.json`.

    Raises:
        KeyError, ValueError and the like: this project does not write such metadata.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        # Only the first dimension grows, and it begins at 0.
        self.shape = (*_sizes(metadata["shape"][:1], smallest=0), *_sizes(metadata["shape"][1:]))
        self.attributes = _attributes(metadata)
        self.dtype = _DTYPES[metadata["data_type"]]
        self._file_shape = _sizes(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        codecs, self.chunks, self.shards = metadata["codecs"], self._file_shape, None
        if codecs[0]["name"] == "sharding_indexed":
            if len(codecs) != 1 or codecs[0]["configuration"]["index_location"] != "end":
                raise ValueError("a shard with its index elsewhere than at its end")
            self.shards = self._file_shape
            self.chunks = _sizes(codecs[0]["configuration"]["chunk_shape"])
            codecs = codecs[0]["configuration"]["codecs"]
        if [codec["name"] for codec in codecs] != ["bytes", "blosc", "crc32c"]:
            raise ValueError(
                f"codecs {', '.join(codec['name'] for codec in codecs)}, not bytes, blosc, crc32c"
            )
        if not len(self.shape) == len(self._file_shape) == len(self.chunks) or len(
            self.shape
        ) not in (1, 2):
            raise ValueError(f"{len(self.shape)} dimensions in chunks of {len(self.chunks)}")
        if any(n > _MOST_WIDTH for n in self.shape[1:]):
            raise ValueError(f"rows of {self.shape[1:]} values")
        if prod(self.chunks) * self.dtype.itemsize > MOST_CHUNK_BYTES:
            raise ValueError(f"chunks of {self.chunks} are larger than {MOST_CHUNK_BYTES} bytes")
        if any(n % chunk for n, chunk in zip(self._file_shape, self.chunks, strict=True)):
            raise ValueError(f"chunks of {self.chunks} do not fill shards of {self._file_shape}")
        chunk = ChunkCodec(
            self.chunks,
            self.dtype,
            unwritten(self.dtype),
            codecs[1]["configuration"]["shuffle"] == "shuffle",
        )
        self.codec: ChunkCodec | ShardCodec = chunk
        if self.shards is not None:
            self.codec = ShardCodec(
                chunk, tuple(n // c for n, c in zip(self.shards, self.chunks, strict=True))
            )
        self._held_against_files = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the array at `path`.

        Raises:
            StoreError: the array is missing or damaged, or this project does not write such arrays.
        """
        try:
            metadata = read_metadata(path)
            if metadata["node_type"] != "array":
                raise ValueError(f"a {shown(metadata['node_type'])}, not an array")
            return cls(path, metadata)
        except (*_MALFORMED, OSError) as error:
            raise StoreError(f"{path} is missing or damaged ({shown(error)})") from error

    @classmethod
    def create(
        cls,
        path: Path,
        shape: Shape,
        dtype: DTypeLike,
        dimensions: tuple[str, ...],
        chunks: Shape,
        shards: Shape | None = None,
        *,
        shuffle: bool = True,
        attributes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Create an array without data.

        The fill value is a value that data do not have, where the dtype has such a value.

        Args:
            path: directory of the array. An array that was there must have been removed.
            shape: shape at first. The first dimension may grow.
            dtype: dtype of the elements.
            dimensions: names of the dimensions, one for each.
            chunks: shape of a chunk, the unit of decoding.
            shards: shape of a file. None: each chunk is a file.
            shuffle: True if Blosc groups the bytes of numbers by their place in the number. Most
                values compress better so.
            attributes: attributes of the array.
        """
        kind = np.dtype(dtype)
        endian = {"configuration": {"endian": "little"}} if kind.itemsize > 1 else {}
        blosc = {
            "typesize": kind.itemsize,
            "cname": COMPRESSOR,
            "clevel": LEVEL,
            "shuffle": "shuffle" if shuffle else "noshuffle",
            "blocksize": 0,
        }
        codecs: list[dict[str, Any]] = [
            {"name": "bytes"} | endian,
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ]
        if shards is not None:
            sharding = {
                "chunk_shape": list(chunks),
                "codecs": codecs,
                "index_codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        fill = unwritten(kind)
        metadata = {
            "shape": list(shape),
            "data_type": kind.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(shards or chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if kind.kind == "f" else int(fill),
            "codecs": codecs,
            "attributes": dict(attributes or {}),
            "dimension_names": list(dimensions),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        write_metadata(path, metadata)
        return cls(path, metadata)

    @property
    def n_bytes(self) -> int:
        """Number of bytes of the decoded values."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def file_rows(self) -> int:
        """Number of rows in a file."""
        return self._file_shape[0]

    @property
    def files_hold_rows(self) -> bool:
        """True if a file holds whole rows."""
        return len(self.shape) == 1 or self._file_shape[1] >= self.shape[1]

    def stored_like(self, other: "Array") -> bool:
        """Tell whether the files of the two arrays have the same shape, chunks and dtype."""
        return (self._file_shape, self.chunks, self.dtype) == (
            other._file_shape,
            other.chunks,
            other.dtype,
        )

    def file_path(self, at: Shape) -> Path:
        """Return the path of the file at place `at` of the grid."""
        return self.path.joinpath(CHUNKS, *map(str, at))

    def fetch(self, at: Shape) -> U8:
        """Return the bytes of a file, read-only. Raises: OSError."""
        return np.frombuffer(read_file(self.file_path(at), self.codec.most_bytes), np.uint8)

    def read(self, *window: slice, transposed: bool = False) -> NDArray[Any]:
        """Read the values of a window, and verify every checksum.

        Args:
            window: one slice for each dimension, in steps of 1. A dimension without a slice is
                read whole.
            transposed: True for Fortran's order in memory, in which the values of a column are
                together.

        Raises:
            RottenError, OSError: the bytes are damaged or missing, as in `ROTTEN`.
        """
        whole = [
            w.indices(n)[:2]
            for w, n in zip(
                (*window, *(slice(None),) * (len(self.shape) - len(window))),
                self.shape,
                strict=True,
            )
        ]
        sizes = [max(0, high - low) for low, high in whole]
        places = [
            range(low // n, -(-high // n))
            for (low, high), n in zip(whole, self._file_shape, strict=True)
        ]
        if 0 not in sizes:
            self._check_room(prod(sizes) * self.dtype.itemsize, prod(map(len, places)))
        out = np.empty(sizes, self.dtype, order="F" if transposed else "C")
        if not out.size:
            return out
        scratch: list[NDArray[Any]] = []
        for at in product(*places):
            inside, place = [], []
            for i, n, (low, high) in zip(at, self._file_shape, whole, strict=True):
                first, last = max(low, i * n), min(high, (i + 1) * n)
                inside.append(slice(first - i * n, last - i * n))
                place.append(slice(first - low, last - low))
            StoredFile(self.fetch(at), self.codec).read(tuple(inside), out[tuple(place)], scratch)
        return out

    def write_file(self, at: Shape, values: NDArray[Any], *, safely: bool = False) -> None:
        """Write one file, which appears whole or not at all.

        Args:
            at: place of the file in the grid.
            values: values of the file, fewer at the array's edges.
            safely: True to return only when the file is safe on the disk.

        Raises:
            OSError: the disk is full or gone.
        """
        replace_file(self.file_path(at), self.codec.encode(values), safely=safely)

    def missing_files(self) -> int:
        """Return how many files the array's shape calls for that do not exist."""
        return self._n_files - len(self._present())

    def shortfall(self) -> str | None:
        """Describe data that the shape calls for and the files cannot hold: "lacks 3 chunk files".

        None where all data may be there. The metadata of an array can claim any shape. Compare the
        shape with the files here before anything is made as large as the shape says. Reads no file.
        """
        present = self._present()
        if len(present) < self._n_files:
            return f"lacks {self._n_files - len(present)} chunk files"
        n_bytes = sum(present.values())
        if self.n_bytes > MOST_RATIO * n_bytes:
            return f"says it has {self.n_bytes} bytes, which cannot come from files of {n_bytes}"
        return None

    @property
    def _n_files(self) -> int:
        return prod(-(-n // size) for n, size in zip(self.shape, self._file_shape, strict=True))

    def _present(self) -> dict[Shape, int]:
        """Return the bytes of each existing file that the shape calls for, by place in the grid."""
        found = {}
        for name, n_bytes in files_below(self.path / CHUNKS).items():
            at = tuple(int(part) for part in name.split("/") if part.isdecimal())
            inside = len(at) == len(self.shape) and all(
                i * n < s for i, n, s in zip(at, self._file_shape, self.shape, strict=True)
            )
            if inside and "/".join(map(str, at)) == name:
                found[at] = n_bytes
        return found

    def _check_room(self, n_bytes: int, n_files: int) -> None:
        """Check the array's files before room is made for `n_bytes` from `n_files` files.

        Raises:
            RottenError: the files cannot hold as much as the array's shape says.
        """
        if (n_bytes <= _FREE_BYTES and n_files <= _FREE_FILES) or self._held_against_files:
            return
        if fault := self.shortfall():
            raise RottenError(f"it {fault}")
        self._held_against_files = True


@contextmanager
def damage_named(what: object, consequence: str) -> Iterator[None]:
    """Turn an error of damaged or missing bytes into a StoreError."""
    try:
        yield
    except ROTTEN as error:
        raise StoreError(f"{what} cannot be read ({shown(error)}): {consequence}") from error


@contextmanager
def read_once() -> Iterator[None]:
    """Read each `zarr.json`, and list each group, at most once in the block.

    Nobody may change a store in the block. In an object store each reading is a request.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _once(kind: str, path: Path, read: Callable[[Path], Any]) -> Any:
    """Return `read(path)`, within `read_once` the result that is known."""
    known = _known.get()
    if known is None:
        return read(path)
    key = (kind, str(path))
    if key not in known:
        known[key] = read(path)
    return known[key]


def _entries(path: Path) -> list[Path]:
    """Return everything in the directory `path`, by name."""
    return sorted(path.iterdir(), key=lambda entry: entry.name)


def _metadata_or_none(path: Path) -> dict[str, Any] | None:
    """Return the `zarr.json` at `path`. None if there is none.

    An object store is asked once: it answers whether the file is there with the file.

    Raises:
        ValueError, KeyError, OSError: the errors of `read_metadata`.
    """
    if not is_remote(path) and not (path / METADATA).is_file():
        return None
    try:
        return read_metadata(path)
    except FileNotFoundError:
        return None


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the `zarr.json` of the group or array at `path`.

    Raises:
        ValueError, KeyError, OSError: the file is missing, or not Zarr v3.
    """
    return cast(dict[str, Any], _once("metadata", path, _read_metadata))


def _read_metadata(path: Path) -> dict[str, Any]:
    metadata = read_json(path / METADATA)
    if not isinstance(metadata, dict) or metadata["zarr_format"] != 3:
        raise ValueError("not Zarr v3")
    return metadata


def write_metadata(path: Path, metadata: Mapping[str, Any], *, safely: bool = False) -> None:
    """Write `metadata` to the `zarr.json` of the group or array at `path`, in one step."""
    replace_file(path / METADATA, [json_bytes(metadata)], safely=safely)


def unwritten(dtype: np.dtype[Any]) -> Any:
    """Return a value that data of `dtype` do not have, where such a value exists, else 0."""
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return dtype.type(0)


def _attributes(metadata: dict[str, Any]) -> dict[str, Any]:
    attributes = metadata["attributes"]
    if not isinstance(attributes, dict):
        raise TypeError(f"attributes of {shown(attributes)}")
    return attributes


def _sizes(values: Any, smallest: int = 1) -> Shape:
    if not isinstance(values, list | tuple) or not all(is_count(n, smallest) for n in values):
        raise ValueError(f"sizes of {shown(values)}")
    return tuple(values)
