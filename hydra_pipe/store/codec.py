"""Chunks and shards to bytes and back: Blosc LZ4 and a CRC-32C, as `docs/format.md` says.

The array data of a run go through here and not through zarr: with either of zarr's codec pipelines a shard costs three to eight
times the processor time to write, and one and a half to two times to read (benchmarks/RESULTS.md). Of every chunk that is read the
checksum is verified, and that it holds as many bytes as a chunk has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

COMPRESSOR, LEVEL = "lz4", 5
_ABSENT = 2**64 - 1
_CHECKSUM_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_BLOSC_FORMAT_LZ4 = 1
# What Blosc can hold in one chunk, and how many bytes LZ4 can make of one.
MOST_CHUNK_BYTES = 2**31 - 1 - _BLOSC_HEADER_BYTES
MOST_RATIO = 255


class RottenError(ValueError):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class ChunkCodec:
    """One chunk to bytes and back.

    Args:
        shape: of a chunk; chunks at the array's edges are filled up to it.
        dtype: little-endian.
        fill: what they are filled up with.
        shuffle: group the bytes of numbers by their place.
    """

    shape: Shape
    dtype: np.dtype[Any]
    fill: Any
    shuffle: bool

    @property
    def n_bytes(self) -> int:
        """Of a decoded chunk."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def most_bytes(self) -> int:
        """Of an encoded chunk with its checksum: Blosc keeps as it is what does not compress."""
        return self.n_bytes + _BLOSC_HEADER_BYTES + _CHECKSUM_BYTES

    def encode(self, window: NDArray[Any]) -> list[bytes]:
        """A chunk, filled up at the array's edges, and its checksum."""
        if window.shape != self.shape:
            whole = np.full(self.shape, self.fill, self.dtype)
            whole[tuple(map(slice, window.shape))] = window
            window = whole
        values = np.ascontiguousarray(window, self.dtype)
        mode = blosc.SHUFFLE if self.shuffle else blosc.NOSHUFFLE
        encoded: bytes = blosc.compress(values, COMPRESSOR.encode(), LEVEL, mode, 0)
        return [encoded, checksum(encoded)]

    def decode(self, data: Bytes, out: NDArray[Any]) -> None:
        """Decode one chunk with its checksum into `out`, contiguous, of a chunk's shape. Raises: RottenError."""
        body = verified(data)
        sizes = np.frombuffer(body[4:_BLOSC_HEADER_BYTES].tobytes(), "<u4") if len(body) >= _BLOSC_HEADER_BYTES else (0, 0, 0)
        if int(sizes[0]) != self.n_bytes or int(sizes[2]) != len(body):
            raise RottenError(f"a chunk of {self.n_bytes} bytes says it has {int(sizes[0])}")
        if int(body[2]) >> 5 != _BLOSC_FORMAT_LZ4:
            raise RottenError("a chunk is compressed by something else than LZ4")
        try:
            blosc.decompress(body, out)
        except (RuntimeError, ValueError) as error:
            raise RottenError(str(error)) from error


@dataclass(frozen=True)
class ShardCodec:
    """A file of several chunks, and where in it each of them is: Zarr's `sharding_indexed`, index at the end.

    Args:
        chunk: of the chunks in it.
        grid: chunks along each dimension.
    """

    chunk: ChunkCodec
    grid: Shape

    @property
    def most_bytes(self) -> int:
        """Of a file."""
        return prod(self.grid) * (self.chunk.most_bytes + 16) + _CHECKSUM_BYTES

    def encode(self, values: NDArray[Any]) -> list[bytes]:
        """The file's content in pieces. Chunks past the end of `values` are left out."""
        index = np.full((*self.grid, 2), _ABSENT, "<u8")
        pieces: list[bytes] = []
        end = 0
        for at in np.ndindex(*self.grid):
            window = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, self.chunk.shape, strict=True))]
            if window.size:
                encoded = self.chunk.encode(window)
                size = sum(map(len, encoded))
                index[at] = end, size
                end += size
                pieces += encoded
        table = index.tobytes()
        return [*pieces, table, checksum(table)]

    def index(self, content: Bytes, file_bytes: int | None = None) -> NDArray[np.uint64]:
        """Offset and size of each chunk, shape (*grid, 2).

        Args:
            content: of the file, or its end.
            file_bytes: of the file, where `content` is its end.

        Raises:
            RottenError: it is damaged.
        """
        file_bytes = len(content) if file_bytes is None else file_bytes
        n_bytes = prod(self.grid) * 16
        if len(content) < n_bytes + _CHECKSUM_BYTES:
            raise RottenError(f"a shard of {len(content)} bytes is too short")
        table = verified(content[-n_bytes - _CHECKSUM_BYTES :])
        index = np.frombuffer(table.tobytes(), "<u8").reshape(*self.grid, 2)
        sizes = index[index[..., 0] != _ABSENT, 1]
        # chunks that share their bytes would decode to any amount
        if sizes.size and max(int(sizes.max()), int(sizes.sum())) > file_bytes:
            raise RottenError(f"the chunks of a shard of {file_bytes} bytes overlap")
        return index


class StoredFile:
    """The bytes of one file of an array, of which any window can be decoded.

    Args:
        content: of the file, read-only.
        codec: of the array.

    Raises:
        RottenError: the shard's index is damaged.
    """

    def __init__(self, content: Bytes, codec: "ChunkCodec | ShardCodec") -> None:
        self._content = content
        if isinstance(codec, ShardCodec):
            self._chunk, self._index = codec.chunk, codec.index(content)
        else:
            self._chunk = codec
            self._index = np.array([0, len(content)], np.uint64).reshape(*(1 for _ in codec.shape), 2)

    def read(self, window: tuple[slice, ...], out: NDArray[Any], scratch: list[NDArray[Any]] | None = None) -> None:
        """Decode a window into `out`.

        Args:
            window: start and stop in each dimension, from the file's first element.
            out: of the window's shape.
            scratch: an empty list at first, where a chunk's memory is kept for later calls.

        Raises:
            RottenError: a chunk of it is missing or damaged.
        """
        shape = self._chunk.shape
        for at in _chunks_of(window, shape):
            inside, place = [], []
            for i, n, wanted in zip(at, shape, window, strict=True):
                low, high = max(wanted.start, i * n), min(wanted.stop, (i + 1) * n)
                inside.append(slice(low - i * n, high - i * n))
                place.append(slice(low - wanted.start, high - wanted.start))
            target = out[tuple(place)]
            if target.shape == shape and target.flags.c_contiguous:
                self._chunk.decode(self._bytes(at), target)
                continue
            content = self._bytes(at)
            scratch = [] if scratch is None else scratch
            if not scratch:
                scratch.append(np.empty(shape, self._chunk.dtype))
            self._chunk.decode(content, scratch[0])
            target[...] = scratch[0][tuple(inside)]

    def _bytes(self, at: Shape) -> Bytes:
        offset, size = map(int, self._index[at])
        if offset == _ABSENT:
            raise RottenError(f"chunk {at} was never written")
        if offset + size > len(self._content):
            raise RottenError(f"chunk {at} is not within its file")
        if self._chunk.n_bytes > MOST_RATIO * size:
            raise RottenError(f"chunk {at} of {self._chunk.n_bytes} bytes cannot come of {size}")
        return self._content[offset : offset + size]


def _chunks_of(window: tuple[slice, ...], shape: Shape) -> Iterator[Shape]:
    """Grid places of the chunks that have something of `window`."""
    return product(*(range(w.start // n, -(-w.stop // n)) for w, n in zip(window, shape, strict=True)))


def checksum(data: bytes) -> bytes:
    """CRC-32C of `data` as it is stored after them."""
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")


def verified(data: Bytes) -> Bytes:
    """`data` without the checksum at its end. Raises: RottenError: it does not fit."""
    body, stored = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:].tobytes()
    if len(data) < _CHECKSUM_BYTES or checksum(body) != stored:  # type: ignore[arg-type] # any read-only buffer is welcome
        raise RottenError("the checksum is wrong")
    return body
