"""The texts of `reduce --dry-run`, and what a reduction says and counts, for every method on one
tiny run.

The texts are in `dry_run.txt`. After an intended change, `python tests/reduction/test_dry_run.py`
writes the file anew.
"""

import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.pipelines import conv_pipeline

import hydra_pipe
from hydra_pipe import api
from hydra_pipe.plan import chunking
from hydra_pipe.progress import Progress, Task
from hydra_pipe.reduction import executors
from hydra_pipe.reduction.methods import METHODS
from hydra_pipe.store.files import remove

TEXTS = Path(__file__).with_name("dry_run.txt")
_HYDRA = {"method": "hydra"}
_KEPT = (_HYDRA | {"keep_hypergradients": True}, _HYDRA)
# what is asked one after the other of a copy of the run; an option `keep_hypergradients` is carried
# out as well
SEQUENCES: dict[str, tuple[dict[str, Any], ...]] = {
    **{method: ({"method": method},) for method in METHODS},
    "hydra, kept": _KEPT,
    "hydra-fisher, kept": ({"keep_hypergradients": True}, {}),
    "hydra-exact, some directions": ({"method": "hydra-exact", "rank": 2},),
    "hydra, means": tuple(
        _HYDRA | options
        for options in ({"by": "label", "tests": "0-4"}, {"by": "mean", "chunks": "4x100"})
    ),
    "hydra-fisher, in a basis": ({"rank": 24},),
    "hydra-fisher, means": ({"method": "hydra-fisher", "by": "label"},),
    "influence, means": ({"method": "influence", "by": "mean"},),
    "tracin, the first steps": ({"method": "tracin", "up_to_step": 4},),
    "hydra, one thread": (_HYDRA | {"scheduler": "synchronous"},),
    "hydra, processes": (_HYDRA | {"scheduler": "processes"},),
    "hydra-fisher, processes": ({"method": "hydra-fisher", "scheduler": "processes"},),
}


def normal(text: str) -> str:
    """`text` without what depends on the machine: disks, directories, and how long a first step
    took.
    """
    text = re.sub(r"[\d.]+ [KMGT]?i?B (are )?free( at \S+)?", "FREE", text)
    return re.sub(r"about [^,]*, as a first step took", "about TIME, as a first step took", text)


class Lines(Progress):
    """Keeps what is said and what is counted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        if "inner loops are not compiled" not in message:
            self.said.append(message)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        counted = Counted()
        yield counted
        self.said.append(f"{description}: {counted.n:,} of {total:,} {unit}")


class Counted(Task):
    """Keeps the sum."""

    def __init__(self) -> None:
        self.n, self._lock = 0, threading.Lock()

    def advance(self, n: int) -> None:
        with self._lock:
            self.n += n


def texts(run: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Each name and its text."""
    patch.setattr(executors, "n_cores", lambda: 2)
    patch.setattr("hydra_pipe.reduction.executors.local.resident_bytes", lambda: 0)
    patch.setattr("hydra_pipe.replay.solver.resident_bytes", lambda: 0)
    for name, sequence in SEQUENCES.items():
        copy = run.with_name("copy")
        shutil.copytree(run, copy)
        for number, options in enumerate(sequence, 1):
            pipeline = (
                {"pipeline": conv_pipeline()} if options.get("method") == "hydra-exact" else {}
            )
            parts = [str(api.plan_reduction(copy, **options, **pipeline))]
            if options.get("scheduler") != "processes":
                lines = Lines()
                pipeline = {"pipeline": conv_pipeline()} if pipeline else {}
                hydra_pipe.reduce(copy, **options, **pipeline, progress=lines, overwrite=True)
                parts.append("\n".join(lines.said))
            yield f"{name}, {number}", normal("\n---\n".join(parts))
        remove(copy)


def recording(path: Path) -> Path:
    """A run in several shards, so that there is work for two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MAX_SHARD_ROWS", 16)
        hydra_pipe.record(conv_pipeline(), path, encoding="exact", dtype="float32", test_every="4")
    return path


def expected() -> dict[str, str]:
    sections = re.split(r"^=== (.*) ===\n", TEXTS.read_text(), flags=re.MULTILINE)[1:]
    return {
        name: text.rstrip("\n") for name, text in zip(sections[::2], sections[1::2], strict=True)
    }


def test_plans_are_told_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dict(texts(recording(tmp_path / "run"), monkeypatch)) == expected()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patching:
        written = texts(recording(Path(directory) / "run"), patching)
        TEXTS.write_text("\n".join(f"=== {name} ===\n{text}\n" for name, text in written))
