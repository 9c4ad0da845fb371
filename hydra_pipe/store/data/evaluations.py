"""`evaluation/KIND`: results of retrainings, kept as they finish, and the summary of them."""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hydra_pipe.store import names
from hydra_pipe.store.data.rankings import opened_table
from hydra_pipe.store.files import files_below, read_file, remove, replace_file, sync
from hydra_pipe.store.json_parsing import read_json

_PIECE = re.compile(r"(\d{8,})-(\d{8,})-([0-9a-f]{16})\.npy")
N_FOUND = 2  # loss and hit
_MOST_HEADER_BYTES = 2**16


def digest_of(
    run_id: str,
    weights: NDArray[np.floating],
    seed: int,
    mean_over: str,
    classes: NDArray[np.int32] | None = None,
) -> str:
    """Return a digest, 16 digits, of the run and of what the models of a piece train with.

    A piece of results counts only where the same digest is asked for.

    Args:
        run_id: id of the run.
        weights: weights of the samples, shape (model, sample).
        seed: seed of the models.
        mean_over: divisor of the weighted losses.
        classes: classes that replace targets, shape (model, sample). None: no target is replaced.
    """
    found = hashlib.sha256(
        f"{run_id} {seed} {mean_over} {weights.shape} {weights.dtype}\n".encode()
    )
    found.update(np.ascontiguousarray(weights).tobytes())
    if classes is not None:
        found.update(np.ascontiguousarray(classes).tobytes())
    return found.hexdigest()[:16]


class Retrained:
    """Results of retrainings, in pieces of some models, shape (model, `N_FOUND`, test), float64.

    Args:
        directory: directory of the evaluation.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / names.RETRAINED

    def of_round(self, number: int) -> "Retrained":
        """Return the results of round `number`, which is above 0.

        Retrainings of a later round depend on what came of those before. Round 0 is `self`.
        """
        return Retrained(self._directory.parent / f"{names.ROUND}{number}")

    def spans(self) -> list[tuple[int, int]]:
        """Return the first and one past the last retraining of each existing piece, in order."""
        found = [_PIECE.fullmatch(name) for name in files_below(self._directory)]
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def read(self, span: tuple[int, int], digest: str, n_tests: int) -> NDArray[np.float64] | None:
        """Read a piece.

        None where the piece is missing or damaged, or where its models trained with something else.
        """
        expected = (span[1] - span[0], N_FOUND, n_tests)
        n_bytes = prod(expected) * 8
        try:
            content = read_file(self._directory / _name(span, digest), n_bytes + _MOST_HEADER_BYTES)
            stream = io.BytesIO(content)
            # The header is read alone first: it may claim any shape.
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        except (OSError, ValueError, EOFError):
            return None
        if shape != expected or dtype != np.float64 or len(content) - stream.tell() != n_bytes:
            return None
        return np.frombuffer(content, np.float64, offset=stream.tell()).reshape(expected)

    def write(self, span: tuple[int, int], digest: str, values: NDArray[np.float64]) -> None:
        """Write a piece, safe on the disk."""
        content = io.BytesIO()
        np.save(content, values)
        replace_file(self._directory / _name(span, digest), [content.getvalue()])
        sync(self._directory)

    def keep_only(self, pieces: Mapping[tuple[int, int], str]) -> None:
        """Remove all pieces but those with these digests.

        The others may belong, for example, to relevance that has been computed anew since.
        """
        wanted = {_name(span, digest) for span, digest in pieces.items()}
        for name in files_below(self._directory):
            if name not in wanted:
                remove(self._directory / name)


def _name(span: tuple[int, int], digest: str) -> str:
    return f"{span[0]:08d}-{span[1]:08d}-{digest}.npy"


def write_result(
    directory: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Write `table.parquet` and `summary.json`, safe on the disk.

    Args:
        directory: directory of the evaluation.
        rows: rows of the table. Each has the same columns.
        summary: plain values.
    """
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), content)
    replace_file(directory / names.TABLE, [content.getvalue()])
    write_file(directory / names.SUMMARY, json.dumps(dict(summary), indent=2).encode() + b"\n")


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array as a `.npy` file, safe on the disk."""
    content = io.BytesIO()
    np.save(content, values)
    write_file(path, content.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file. Its content and its name are safe on the disk when this returns."""
    replace_file(path, [content])
    sync(path.parent)


def read_result(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows and the summary that `write_result` wrote.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: a file is missing or damaged.
    """
    table = opened_table(directory / names.TABLE).read()
    return table.to_pylist(), _read_summary(directory)


def read_says(directory: Path) -> list[str]:
    """Return the lines for a person in the summary of an evaluation.

    Raises:
        OSError, ValueError: the summary is missing or damaged.
    """
    lines: list[str] = _read_summary(directory)["says"]
    return lines


def _read_summary(directory: Path) -> dict[str, Any]:
    summary = read_json(directory / names.SUMMARY)
    says = summary.get("says") if isinstance(summary, dict) else None
    if (
        not isinstance(summary, dict)
        or not isinstance(says, list)
        or not all(isinstance(line, str) for line in says)
    ):
        raise ValueError(f"{directory / names.SUMMARY} is no summary of an evaluation")
    return summary
