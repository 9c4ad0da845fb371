"""Where a sweep has got to, kept beside the array that it is to fill, so that it goes on in the middle."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.selection import Span
from hydra_pipe.store.files import files_below, read_file, remove, replace_file

_PREFIX = "sweep-"
_DIGEST_BYTES = 32
_MOST_HEADER_BYTES = 2**16


def _path(array: Path, columns: Span) -> Path:
    return array / f"{_PREFIX}{columns[0]}-{columns[1]}"


def save_state(array: Path, columns: Span, state: Mapping[str, int | float], arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Keep the state of the sweep that fills `columns` of an array, safe on the disk.

    Args:
        array: directory of the relevance array.
        columns: first and one past the last.
        state: numbers.
        arrays: by name, float32.
    """
    header = {"columns": list(columns), "state": dict(state), "shapes": {name: list(a.shape) for name, a in arrays.items()}}
    pieces = [json.dumps(header).encode() + b"\n", *(np.ascontiguousarray(a).tobytes() for a in arrays.values())]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    replace_file(_path(array, columns), [digest.digest(), *pieces])


def load_state(
    array: Path, columns: Span, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]] | None:
    """What `save_state` has kept: numbers, and arrays of these shapes. None where there is none, or it is damaged: begin anew."""
    n_bytes = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    try:
        content = memoryview(read_file(_path(array, columns), n_bytes + _MOST_HEADER_BYTES))
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            return None
        line, _, _ = content[_DIGEST_BYTES : _DIGEST_BYTES + _MOST_HEADER_BYTES].tobytes().partition(b"\n")
        header = json.loads(line)
        if header["columns"] != list(columns) or header["shapes"] != {name: list(shape) for name, shape in shapes.items()}:
            return None
        values = np.frombuffer(content[_DIGEST_BYTES + len(line) + 1 :], np.float32)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = values[start : start + size].reshape(shape).copy()
        start += size
    return header["state"], found


def remove_state(array: Path, columns: Span) -> None:
    """Remove the state of a sweep that has come to its end."""
    remove(_path(array, columns))


def remove_states(array: Path) -> None:
    """Remove those of all sweeps: of widths too that were given up."""
    for name in files_below(array):
        if name.startswith(_PREFIX):
            remove(array / name)
