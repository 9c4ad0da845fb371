"""Encoding of chunks and shards to bytes, and back: Blosc LZ4 and a CRC-32C.

`docs/format.md` specifies the bytes. The array data of a run go through this module and not
through zarr. Either of zarr's codec pipelines takes three to eight times the processor time
to write a shard, and one and a half to two times to read one (benchmarks/RESULTS.md). Every
chunk that is read has its checksum verified, and its number of decoded bytes checked.
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

from hydra_pipe.types import U8

Shape = tuple[int, ...]

# Level 5 takes a fifth longer for bytes that are 2 % fewer (benchmarks/RESULTS.md).
COMPRESSOR, LEVEL = "lz4", 1
_ABSENT = 2**64 - 1
_CHECKSUM_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_BLOSC_FORMAT_LZ4 = 1
# The most bytes that Blosc holds in one chunk, and the most that LZ4 decodes from one byte.
MOST_CHUNK_BYTES = 2**31 - 1 - _BLOSC_HEADER_BYTES
MOST_RATIO = 255


class RottenError(ValueError):
    """U8 that differ from the bytes that were written."""


@dataclass(frozen=True)
class ChunkCodec:
    """Encoding of one chunk to bytes, and back.

    Args:
        shape: shape of a chunk. A chunk at the array's edge is padded to it.
        dtype: dtype of the values, little-endian.
        fill: value of the padding.
        shuffle: True if Blosc groups the bytes of numbers by their place in the number.
    """

    shape: Shape
    dtype: np.dtype[Any]
    fill: Any
    shuffle: bool

    @property
    def n_bytes(self) -> int:
        """Number of bytes of a decoded chunk."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def most_bytes(self) -> int:
        """The most bytes of an encoded chunk with its checksum.

        Blosc stores incompressible data as they are, behind a header.
        """
        return self.n_bytes + _BLOSC_HEADER_BYTES + _CHECKSUM_BYTES

    def encode(self, window: NDArray[Any]) -> list[bytes]:
        """Return an encoded chunk, padded at the array's edges, and its checksum."""
        if window.shape != self.shape:
            whole = np.full(self.shape, self.fill, self.dtype)
            whole[tuple(map(slice, window.shape))] = window
            window = whole
        values = np.ascontiguousarray(window, self.dtype)
        mode = blosc.SHUFFLE if self.shuffle else blosc.NOSHUFFLE
        encoded: bytes = blosc.compress(values, COMPRESSOR.encode(), LEVEL, mode, 0)
        return [encoded, checksum(encoded)]

    def decode(self, data: U8, out: NDArray[Any]) -> None:
        """Decode one chunk with its checksum into `out`, contiguous, of a chunk's shape.

        Raises:
            RottenError: the chunk is damaged.
        """
        body = verified(data)
        sizes = (
            np.frombuffer(body[4:_BLOSC_HEADER_BYTES].tobytes(), "<u4")
            if len(body) >= _BLOSC_HEADER_BYTES
            else (0, 0, 0)
        )
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
    """Encoding of a file of several chunks, with an index of where each of them is.

    Zarr calls it `sharding_indexed`. The index is at the end.

    Args:
        chunk: codec of the chunks in the file.
        grid: number of chunks along each dimension.
    """

    chunk: ChunkCodec
    grid: Shape

    @property
    def most_bytes(self) -> int:
        """The most bytes of a file."""
        return prod(self.grid) * (self.chunk.most_bytes + 16) + _CHECKSUM_BYTES

    def encode(self, values: NDArray[Any]) -> list[bytes]:
        """Return the file's content in pieces. Chunks past the end of `values` are left out."""
        index = np.full((*self.grid, 2), _ABSENT, "<u8")
        pieces: list[bytes] = []
        end = 0
        for at in np.ndindex(*self.grid):
            window = values[
                tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, self.chunk.shape, strict=True))
            ]
            if window.size:
                encoded = self.chunk.encode(window)
                size = sum(map(len, encoded))
                index[at] = end, size
                end += size
                pieces += encoded
        table = index.tobytes()
        return [*pieces, table, checksum(table)]

    def index(self, content: U8, file_bytes: int | None = None) -> NDArray[np.uint64]:
        """Return the offset and the size of each chunk, shape (*grid, 2).

        Args:
            content: bytes of the file, or of its end.
            file_bytes: size of the file, where `content` is only its end.

        Raises:
            RottenError: the index is damaged.
        """
        file_bytes = len(content) if file_bytes is None else file_bytes
        n_bytes = prod(self.grid) * 16
        if len(content) < n_bytes + _CHECKSUM_BYTES:
            raise RottenError(f"a shard of {len(content)} bytes is too short")
        table = verified(content[-n_bytes - _CHECKSUM_BYTES :])
        index = np.frombuffer(table.tobytes(), "<u8").reshape(*self.grid, 2)
        sizes = index[index[..., 0] != _ABSENT, 1]
        # Chunks that share their bytes would decode to any amount.
        if sizes.size and max(int(sizes.max()), int(sizes.sum())) > file_bytes:
            raise RottenError(f"the chunks of a shard of {file_bytes} bytes overlap")
        return index


class StoredFile:
    """The bytes of one file of an array. Any window of them can be decoded.

    Args:
        content: bytes of the file, read-only.
        codec: codec of the array.

    Raises:
        RottenError: the shard's index is damaged.
    """

    def __init__(self, content: U8, codec: "ChunkCodec | ShardCodec") -> None:
        self._content = content
        if isinstance(codec, ShardCodec):
            self._chunk, self._index = codec.chunk, codec.index(content)
        else:
            self._chunk = codec
            self._index = np.array([0, len(content)], np.uint64).reshape(
                *(1 for _ in codec.shape), 2
            )

    def read(
        self,
        window: tuple[slice, ...],
        out: NDArray[Any],
        scratch: list[NDArray[Any]] | None = None,
    ) -> None:
        """Decode a window into `out`.

        Args:
            window: start and stop in each dimension, counted from the file's first element.
            out: array of the window's shape.
            scratch: list, empty at first, that keeps a chunk's memory for later calls.

        Raises:
            RottenError: a chunk of the window is missing or damaged.
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

    def _bytes(self, at: Shape) -> U8:
        offset, size = map(int, self._index[at])
        if offset == _ABSENT:
            raise RottenError(f"chunk {at} was never written")
        if offset + size > len(self._content):
            raise RottenError(f"chunk {at} is not within its file")
        if self._chunk.n_bytes > MOST_RATIO * size:
            raise RottenError(f"chunk {at} of {self._chunk.n_bytes} bytes cannot come from {size}")
        return self._content[offset : offset + size]


def _chunks_of(window: tuple[slice, ...], shape: Shape) -> Iterator[Shape]:
    """Return the grid places of the chunks that overlap `window`."""
    return product(
        *(range(w.start // n, -(-w.stop // n)) for w, n in zip(window, shape, strict=True))
    )


def checksum(data: bytes) -> bytes:
    """Return the CRC-32C of `data`, in the bytes that are stored after them."""
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")


def verified(data: U8) -> U8:
    """Return `data` without the checksum at its end. Raises: RottenError: it does not fit."""
    body, stored = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:].tobytes()
    if len(data) < _CHECKSUM_BYTES or checksum(body) != stored:  # type: ignore[arg-type] # any read-only buffer is welcome
        raise RottenError("the checksum is wrong")
    return body
