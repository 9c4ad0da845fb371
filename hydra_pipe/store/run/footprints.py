"""Footprints of the files of a stage.

A valid file may still be another file than the stage wrote. Footprints tell such a file. A
file of an array has one checksum for each chunk, and its footprint is the checksum of
these. So a footprint costs a few bytes read from each chunk, and nothing is decoded.
docs/format.md has the form.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Self

import google_crc32c
import numpy as np

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.store.files import (
    files_below,
    is_remote,
    read_file,
    remove_partials_of,
    replace_file,
    sync,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import Holds, StageId
from hydra_pipe.store.zarr.arrays import CHUNKS, METADATA, Array, read_metadata
from hydra_pipe.store.zarr.codec import RottenError, Shape, ShardCodec

_CRC_DIGITS, _DIGITS = 8, 20
# In place of the checksum, for an array's file in an object store: there each small read
# is a request.
_NOT_TAKEN = "-" * _CRC_DIGITS
_FORM = re.compile(r"([0-9a-f]{8}|-{8})[0-9a-f]{12}")
_CHECKSUM_BYTES = 4
_ABSENT = 2**64 - 1
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Footprints:
    """Footprints of every file that a stage has written. Names are relative to the run.

    Args:
        arrays: name of an array -> footprints of its files, in the order of the grid.
        files: name of any other file -> its footprint.
    """

    arrays: dict[str, list[str]]
    files: dict[str, str]

    def content(self) -> bytes:
        """Return the content of the footprints' file. Equal footprints give equal bytes."""
        joined = {name: "".join(found) for name, found in self.arrays.items()}
        return (
            json.dumps({"arrays": joined, "files": self.files}, indent=1, sort_keys=True).encode()
            + b"\n"
        )

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parse the result of `content`. Raises: ValueError: the bytes are something else."""
        try:
            data = json.loads(content)
            return cls(
                {name: _taken_apart(found) for name, found in data["arrays"].items()},
                dict(data["files"]),
            )._checked()
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(shown(error)) from error

    def _checked(self) -> Self:
        for found in (
            *self.files.values(),
            *(one for of_array in self.arrays.values() for one in of_array),
        ):
            if not isinstance(found, str) or not _FORM.fullmatch(found):
                raise ValueError(f"a footprint {shown(found)}")
        return self


def _taken_apart(joined: str) -> list[str]:
    return [joined[i : i + _DIGITS] for i in range(0, len(joined), _DIGITS)]


def files_of(root: Path, stage: StageId) -> dict[str, int]:
    """Return every file in the area of `stage`: name relative to the run -> bytes."""
    area = stage.area
    if stage.kind.holds is Holds.FILE:
        return {area: (root / area).stat().st_size} if (root / area).is_file() else {}
    return {f"{area}/{name}": n_bytes for name, n_bytes in files_below(root / area).items()}


def seal(run: RunDirectory, stage: StageId, written: Path | None = None) -> str:
    """Write down the footprints of everything that `stage` has written.

    Args:
        run: run of the stage.
        stage: the stage, which is about to be complete.
        written: directory that holds the files before they take their place in the run. None:
            they are in their place.

    Returns:
        SHA-256 of the footprints' file. The manifest keeps it, so that nobody can exchange
        the file alone.

    Raises:
        StoreError, OSError: a file of the stage is missing or damaged.
    """
    return write_footprints(run, stage, footprints(run.path, stage, written))


def write_footprints(run: RunDirectory, stage: StageId, found: Footprints) -> str:
    """Write `found` to its file, safe on the disk. Returns: SHA-256 of the file."""
    path, content = run.path / stage.checksums_file, found.content()
    remove_partials_of(path)
    replace_file(path, [content])
    sync(path.parent)
    return digest(content)


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content`, in the form that the manifest keeps."""
    return hashlib.sha256(content).hexdigest()


def footprints(root: Path, stage: StageId, written: Path | None = None) -> Footprints:
    """Return the footprints of everything in the area of `stage`.

    Args:
        root: directory of the run.
        stage: the stage.
        written: directory that holds the files before they take their place, as for `seal`.

    Raises:
        StoreError, OSError: a file of the stage is missing or damaged.
    """
    area = stage.area
    directory = root / area if written is None else written
    if written is None and not stage.kind.has_arrays:
        return Footprints(
            {}, {name: of_file(root / name) for name in sorted(files_of(root, stage))}
        )
    there = files_below(directory)
    if not stage.kind.has_arrays:
        return Footprints(
            {}, {f"{area}/{name}": of_file(directory / name) for name in sorted(there)}
        )
    arrays, files = {}, {}
    for name in sorted(there):
        below, _, last = name.rpartition("/")
        if last != METADATA:
            continue
        parent, path = f"{area}/{below}".rstrip("/"), (directory / below if below else directory)
        files[f"{parent}/{METADATA}"] = of_file(path / METADATA)
        if read_metadata(path)["node_type"] == "array":
            array = Array.open(path)
            sizes = {at: there.get(f"{below}/{name_of(at)}".lstrip("/")) for at in places(array)}
            arrays[parent] = [_required(array, at, size) for at, size in sizes.items()]
    return Footprints(arrays, files)


def _required(array: Array, at: Shape, n_bytes: int | None) -> str:
    try:
        if n_bytes is None:
            raise FileNotFoundError("it is not there")
        return of_array_file(array, at, n_bytes)
    except (OSError, RottenError) as error:
        raise StoreError(
            f"{array.file_path(at)} is missing or damaged ({shown(error)}): run the same command "
            "again"
        ) from error


def places(array: Array) -> Iterator[Shape]:
    """Return the places in the grid of all files that the array's shape calls for, in order."""
    return product(
        *(range(-(-n // size)) for n, size in zip(array.shape, file_shape(array), strict=True))
    )


def n_places(array: Array) -> int:
    """Return the number of `places` without listing them: a damaged array may claim any shape."""
    return prod(-(-n // size) for n, size in zip(array.shape, file_shape(array), strict=True))


def file_shape(array: Array) -> Shape:
    """Return the shape of the values in one file."""
    return array.shards or array.chunks


def name_of(at: Shape) -> str:
    """Return the name of the file at a place of the grid, relative to the array."""
    return "/".join((CHUNKS, *map(str, at)))


def of_array_file(array: Array, at: Shape, n_bytes: int) -> str:
    """Return the footprint of a file of an array.

    Args:
        array: array of the file.
        at: place of the file in the grid.
        n_bytes: size of the file, from the listing of its directory.

    Raises:
        RottenError, OSError: the file is damaged, or cannot be read.
    """
    path = array.file_path(at)
    if is_remote(path):
        return _NOT_TAKEN + _size(n_bytes)
    with open(path, "rb", buffering=0) as file:

        def read(start: int, n: int) -> bytes:
            file.seek(start)
            return file.read(n)

        n_bytes = os.fstat(file.fileno()).st_size
        ends = [n_bytes]
        if isinstance(array.codec, ShardCodec):
            index_bytes = prod(array.codec.grid) * 16 + _CHECKSUM_BYTES
            index = array.codec.index(
                np.frombuffer(
                    read(max(0, n_bytes - index_bytes), min(index_bytes, n_bytes)), np.uint8
                ),
                n_bytes,
            )
            ends = [
                int(start) + int(size)
                for start, size in index.reshape(-1, 2)
                if int(start) != _ABSENT
            ]
        if not all(_CHECKSUM_BYTES <= end <= n_bytes for end in ends):
            raise RottenError(f"a chunk is not within its file of {n_bytes} bytes")
        return _crc(b"".join(read(end - _CHECKSUM_BYTES, _CHECKSUM_BYTES) for end in ends)) + _size(
            n_bytes
        )


def of_file(path: Path) -> str:
    """Return the footprint of a file outside of arrays. Raises: OSError."""
    if is_remote(path):
        content = read_file(path)
        return _crc(content) + _size(len(content))
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        while content := file.read(_READ_BYTES):
            crc, size = google_crc32c.extend(crc, content), size + len(content)
    return f"{crc:0{_CRC_DIGITS}x}{_size(size)}"


def _crc(content: bytes) -> str:
    return f"{int(google_crc32c.value(content)):0{_CRC_DIGITS}x}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes:0{_DIGITS - _CRC_DIGITS}x}"


def fits(written: str, found: str) -> bool:
    """Tell whether a file with footprint `found` is the file that was written."""
    crc, size = written[:_CRC_DIGITS], written[_CRC_DIGITS:]
    return found[_CRC_DIGITS:] == size and (
        crc == _NOT_TAKEN or found[:_CRC_DIGITS] in (crc, _NOT_TAKEN)
    )


def bytes_of(footprint: str) -> int:
    """Return the size of the file with this footprint."""
    return int(footprint[_CRC_DIGITS:], 16)
