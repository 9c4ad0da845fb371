"""Zarr v3 groups and arrays, as far as this project writes them: metadata, files, windows, errors in our words.

Paths are `pathlib`'s, or of anything that behaves like them. An array has one dimension or two, and a file of it is
either one chunk or one shard; `store/codec.py` has their bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.store.codec import COMPRESSOR, LEVEL, Bytes, ChunkCodec, RottenError, Shape, ShardCodec, StoredFile
from hydra_pipe.store.files import files_below, read_file, replace_file

METADATA = "zarr.json"
CHUNKS = "c"
# What reading damaged bytes raises: a wrong checksum, a file that is gone or cannot be read.
ROTTEN = (RottenError, OSError)
# What taking metadata apart raises that are not what this project writes.
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError)


class Group:
    """A Zarr group, for reading and for making things in.

    Args:
        path: its directory.
        attributes: of it, as JSON has them.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes

    @classmethod
    def create(cls, path: Path, attributes: Mapping[str, Any] | None = None) -> Self:
        """A new group, or new attributes for the one that is there."""
        group = cls(path, dict(attributes or {}))
        write_metadata(path, {"attributes": group.attributes, "zarr_format": 3, "node_type": "group"})
        return group

    @classmethod
    def open(cls, path: Path, consequence: str) -> Self:
        """The group at `path`.

        Raises:
            StoreError: there is none, or its metadata is damaged; the message adds `consequence`.
        """
        if not path.is_dir():
            raise StoreError(f"{path} is missing: {consequence}")
        try:
            metadata = read_metadata(path)
            if metadata["node_type"] != "group":
                raise ValueError(f"a {metadata['node_type']}, not a group")
            return cls(path, dict(metadata["attributes"]))
        except (*_MALFORMED, FileNotFoundError) as error:
            raise StoreError(f"the metadata of {path} is damaged ({error}): {consequence}") from error

    def group(self, name: str) -> "Group | None":
        """Sub-group `name`, or None. Raises: StoreError: its metadata is damaged."""
        if not (self.path / name / METADATA).is_file():
            return None
        return Group.open(self.path / name, "the store is not readable")

    def require_group(self, name: str) -> "Group":
        """Sub-group `name`, made if it is not there."""
        found = self.group(name)
        return Group.create(self.path / name) if found is None else found

    def group_names(self) -> list[str]:
        """Of the groups directly in this one."""
        return [path.name for path, metadata in self._members() if metadata["node_type"] == "group"]

    def array(self, name: str) -> "Array":
        """Array `name`, which may be some groups further down. Raises: StoreError: it is not there, or damaged."""
        return Array.open(self.path / name)

    def array_names(self) -> list[str]:
        """Of the arrays in this group and in those below it, sorted. Raises: StoreError: metadata are damaged."""
        found = []
        for path, metadata in self._members():
            if metadata["node_type"] == "array":
                found.append(path.name)
            else:
                found += [f"{path.name}/{name}" for name in Group(path, {}).array_names()]
        return sorted(found)

    def _members(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(self.path.iterdir(), key=lambda path: path.name):
            if (path / METADATA).is_file():
                try:
                    metadata = read_metadata(path)
                    yield path, {"node_type": metadata["node_type"]}
                except _MALFORMED as error:
                    raise StoreError(f"the metadata of {path} is damaged ({error})") from error


class Array:
    """A Zarr array of one dimension or two.

    Args:
        path: its directory.
        metadata: as `zarr.json` has them.

    Raises:
        KeyError, ValueError and the like: they are not what this project writes.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.shape = _sizes(metadata["shape"], smallest=0)
        self.dtype = np.dtype(str(metadata["data_type"])).newbyteorder("<")
        self._file_shape = _sizes(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        codecs, self.chunks, self.shards = metadata["codecs"], self._file_shape, None
        if codecs[0]["name"] == "sharding_indexed":
            if len(codecs) != 1 or codecs[0]["configuration"]["index_location"] != "end":
                raise ValueError("a shard with its index elsewhere than at its end")
            self.shards = self._file_shape
            self.chunks = _sizes(codecs[0]["configuration"]["chunk_shape"])
            codecs = codecs[0]["configuration"]["codecs"]
        if [codec["name"] for codec in codecs] != ["bytes", "blosc", "crc32c"]:
            raise ValueError(f"codecs {', '.join(codec['name'] for codec in codecs)}, not bytes, blosc, crc32c")
        if not len(self.shape) == len(self._file_shape) == len(self.chunks) or len(self.shape) not in (1, 2):
            raise ValueError(f"{len(self.shape)} dimensions in chunks of {len(self.chunks)}")
        if any(n % chunk for n, chunk in zip(self._file_shape, self.chunks, strict=True)):
            raise ValueError(f"chunks of {self.chunks} do not fill shards of {self._file_shape}")
        chunk = ChunkCodec(self.chunks, self.dtype, unwritten(self.dtype), codecs[1]["configuration"]["shuffle"] == "shuffle")
        self.codec: ChunkCodec | ShardCodec = chunk
        if self.shards is not None:
            self.codec = ShardCodec(chunk, tuple(n // c for n, c in zip(self.shards, self.chunks, strict=True)))

    @classmethod
    def open(cls, path: Path) -> Self:
        """The array at `path`. Raises: StoreError: it is not there, damaged, or not as this project writes them."""
        try:
            metadata = read_metadata(path)
            if metadata["node_type"] != "array":
                raise ValueError(f"a {metadata['node_type']}, not an array")
            return cls(path, metadata)
        except (*_MALFORMED, OSError) as error:
            raise StoreError(f"{path} is missing or damaged ({error})") from error

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
        """A new array without data. Its fill value is one that data do not have, where the dtype has such a value.

        Args:
            path: its directory; an array that is there must have been removed.
            shape: at first; the first dimension may grow.
            dtype: of the elements.
            dimensions: names, one for each dimension.
            chunks: what is decoded at once.
            shards: what is one file; none: each chunk is one.
            shuffle: group the bytes of numbers by their place, which most values compress better for.
            attributes: of the array.
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
        codecs: list[dict[str, Any]] = [{"name": "bytes"} | endian, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
        if shards is not None:
            sharding = {
                "chunk_shape": list(chunks),
                "codecs": codecs,
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        fill = unwritten(kind)
        metadata = {
            "shape": list(shape),
            "data_type": kind.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shards or chunks)}},
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
    def attributes(self) -> dict[str, Any]:
        """As JSON has them."""
        return dict(self.metadata["attributes"])

    @property
    def n_bytes(self) -> int:
        """Of the decoded values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def file_rows(self) -> int:
        """Rows of a file."""
        return self._file_shape[0]

    def file_path(self, at: Shape) -> Path:
        """Where the file at a place of the grid is."""
        return self.path.joinpath(CHUNKS, *map(str, at))

    def fetch(self, at: Shape) -> Bytes:
        """The bytes of a file, read-only. Raises: OSError."""
        return np.frombuffer(read_file(self.file_path(at)), np.uint8)

    def read(self, *window: slice) -> NDArray[Any]:
        """Values of a window, every checksum checked.

        Args:
            window: a slice for each dimension, in steps of 1; everything in those left out.

        Raises:
            RottenError, OSError: see `ROTTEN`.
        """
        whole = [
            w.indices(n)[:2] for w, n in zip((*window, *(slice(None),) * (len(self.shape) - len(window))), self.shape, strict=True)
        ]
        out = np.empty([max(0, high - low) for low, high in whole], self.dtype)
        if not out.size:
            return out
        scratch: list[NDArray[Any]] = []
        for at in product(*(range(low // n, -(-high // n)) for (low, high), n in zip(whole, self._file_shape, strict=True))):
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
            at: its place in the grid.
            values: of it, shorter at the array's edges.
            safely: return when it is safe on the disk.

        Raises:
            OSError: the disk is full or gone.
        """
        replace_file(self.file_path(at), self.codec.encode(values), safely=safely)

    def missing_files(self) -> int:
        """Files that the array's shape calls for and that are not there."""
        places = product(*(range(-(-n // size)) for n, size in zip(self.shape, self._file_shape, strict=True)))
        present = files_below(self.path / CHUNKS)
        return sum("/".join(map(str, at)) not in present for at in places)


@contextmanager
def damage_named(what: object, consequence: str) -> Iterator[None]:
    """Turn what rotten or missing bytes raise into an error of ours."""
    try:
        yield
    except ROTTEN as error:
        message = str(error).strip().split("\n")[-1]
        raise StoreError(f"{what} cannot be read ({message}): {consequence}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """`zarr.json` of the group or array at `path`. Raises: ValueError, KeyError, OSError."""
    metadata = json.loads(read_file(path / METADATA))
    if not isinstance(metadata, dict) or metadata["zarr_format"] != 3:
        raise ValueError("not Zarr v3")
    return metadata


def write_metadata(path: Path, metadata: Mapping[str, Any], *, safely: bool = False) -> None:
    """Put `metadata` into `zarr.json` of the group or array at `path`, in one step."""
    replace_file(path / METADATA, [json.dumps(metadata, indent=2).encode()], safely=safely)


def unwritten(dtype: np.dtype[Any]) -> Any:
    """A value that data of `dtype` do not have, where there is one."""
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return dtype.type(0)


def _sizes(values: Any, smallest: int = 1) -> Shape:
    sizes = tuple(values)
    if not all(isinstance(n, int) and n >= smallest for n in sizes):
        raise ValueError(f"sizes of {list(sizes)}")
    return sizes
