"""State and basis of sweeps, kept beside the array that they fill, to resume in the middle."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hydra_pipe.store.files import files_below, read_file, remove, replace_file, sync
from hydra_pipe.store.zarr.arrays import METADATA
from hydra_pipe.types import Floating, Span

_PREFIX = "sweep-"
_BASIS = f"{_PREFIX}basis"
_DIGEST_BYTES = 32
_MOST_HEADER_BYTES = 2**16


def _path(array: Path, columns: Span) -> Path:
    return array / f"{_PREFIX}{columns[0]}-{columns[1]}"


def save_state(
    array: Path, columns: Span, state: Mapping[str, int | float], arrays: Mapping[str, Floating]
) -> None:
    """Write the state of the sweep that fills `columns` of an array, safe on the disk.

    Args:
        array: directory of the relevance array.
        columns: first and one past the last.
        state: numbers.
        arrays: arrays by name, float32 or float64.
    """
    _save(_path(array, columns), {"columns": list(columns), "state": dict(state)}, arrays)


def load_state(
    array: Path, columns: Span, like: Mapping[str, Floating]
) -> tuple[dict[str, Any], dict[str, Floating]] | None:
    """Read the state that `save_state` wrote: numbers, and arrays.

    None where there is no state, it is damaged, or another run has left it here.

    Args:
        array: directory of the relevance array.
        columns: first and one past the last.
        like: arrays of the expected names, shapes and dtypes.

    Returns:
        The numbers, and the arrays by name, as read-only views of the file's bytes.
    """
    found = _load(_path(array, columns), sum(a.nbytes for a in like.values()))
    if found is None:
        return None
    header, arrays = found
    if header.get("columns") != list(columns) or header["arrays"] != _kinds(like):
        return None
    state = header.get("state")
    return (state, arrays) if isinstance(state, dict) else None


def save_basis(
    array: Path, boxes: Sequence[Sequence[Sequence[int]]], arrays: Mapping[str, Floating]
) -> None:
    """Write the basis that the sweeps of an array work in, safe on the disk.

    Args:
        array: directory of the relevance array.
        boxes: number of directions of each side of each part, by box.
        arrays: directions by name, float32.
    """
    _save(array / _BASIS, {"boxes": boxes}, arrays)


def load_basis(array: Path, most_bytes: int) -> tuple[Any, dict[str, Floating]] | None:
    """Read the basis that `save_basis` wrote: boxes as they were in JSON, and directions by name.

    None where there is no basis, it is damaged, or another run has left it here.

    Args:
        array: directory of the relevance array.
        most_bytes: upper bound of the bytes of the directions.
    """
    found = _load(array / _BASIS, most_bytes)
    return None if found is None else (found[0].get("boxes"), found[1])


def _save(path: Path, of: Mapping[str, Any], arrays: Mapping[str, Floating]) -> None:
    header = {"of": _made_for(path.parent), **of, "arrays": _kinds(arrays)}
    pieces = [
        json.dumps(header).encode() + b"\n",
        *(np.ascontiguousarray(a).tobytes() for a in arrays.values()),
    ]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    replace_file(path, [digest.digest(), *pieces])


def _load(path: Path, most_bytes: int) -> tuple[dict[str, Any], dict[str, Floating]] | None:
    """Return the header and the arrays of a file; None if it is missing, damaged or another's."""
    try:
        content = memoryview(read_file(path, most_bytes + _MOST_HEADER_BYTES))
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            return None
        line, _, _ = (
            content[_DIGEST_BYTES : _DIGEST_BYTES + _MOST_HEADER_BYTES].tobytes().partition(b"\n")
        )
        header = json.loads(line)
        if header["of"] != _made_for(path.parent):
            return None
        found, start = {}, _DIGEST_BYTES + len(line) + 1
        for name, (kind, *shape) in header["arrays"].items():
            n_bytes = np.dtype(kind).itemsize * prod(shape)
            values = np.frombuffer(content[start : start + n_bytes], kind)
            found[name], start = values.reshape(shape), start + n_bytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return header, found


def _made_for(array: Path) -> str:
    """Return an id of the array that differs from an array of the same name in another run.

    It is the SHA-256 of the array's metadata and of its group's metadata, which name the run.
    """
    return hashlib.sha256(
        b"".join(read_file(path / METADATA) for path in (array, array.parent))
    ).hexdigest()


def _kinds(arrays: Mapping[str, Floating]) -> dict[str, list[Any]]:
    return {name: [a.dtype.name, *a.shape] for name, a in arrays.items()}


def remove_state(array: Path, columns: Span) -> None:
    """Remove the state of a sweep that has come to its end."""
    remove(_path(array, columns))


def remove_states(array: Path) -> None:
    """Remove the states of all sweeps, also of abandoned widths."""
    for name in files_below(array):
        if name.startswith(_PREFIX):
            remove(array / name)
    sync(array)  # or a power cut brings the states back, beside a complete result
