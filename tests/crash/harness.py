"""Commands under the shim, and what they leave, so that two runs can be compared byte for byte."""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq
import shim

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# of the manifest: what is of the clock and of the disk, and not of the result; and checksums of
# files that have the run's id
_PARTICULAR = (
    "seconds",
    "train_seconds",
    "test_seconds",
    "checkpoint_seconds",
    "stalls",
    "stalled_seconds",
)
_PARTICULAR += ("checksums", "of_record", "of_reduce", "of_self")
KILLED = -9


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: its exit code; negative: the signal that killed it.
        errors: its standard error.
        calls: that the shim has counted.
    """

    code: int
    errors: str
    calls: list[shim.Call]

    def fault(self) -> str | None:
        """What is wrong with how it failed: it must say in one line of its own, the last, what is
        the matter and what to do.
        """
        told = [line for line in self.errors.splitlines() if line.startswith("hydra-pipe: ")]
        if self.code != 1:
            return f"exit code {self.code}"
        if (
            "Traceback" in self.errors
            or "Exception ignored" in self.errors
            or "defect of hydra-pipe" in self.errors
        ):
            return "a traceback, or a failure that is called a defect"
        if len(told) != 1 or not self.errors.rstrip().endswith(told[0]):
            return f"{len(told)} lines of hydra-pipe's own, or not the last"
        if not re.search(
            r"run the same command again|record (the run )?again|--overwrite", told[0]
        ):
            return "nothing that says what to do"
        return None


@contextmanager
def commands_for(threads: int, *, small: bool) -> Iterator[list["Commands"]]:
    """Servers of commands for as many threads: forked from one process, which imports once what all
    of them need.

    Args:
        threads: number of servers.
        small: with files, chunks and passes so small that a tiny run has several of each.
    """
    jobs, codes = ([os.pipe() for _ in range(threads)] for _ in range(2))
    theirs = [
        end
        for (reader, _), (_, writer) in zip(jobs, codes, strict=True)
        for end in (reader, writer)
    ]
    path = os.pathsep.join(map(str, (ROOT, HERE.parent, HERE)))
    with ExitStack() as opened:
        server = subprocess.Popen(
            [
                sys.executable,
                HERE / "commands.py",
                *map(str, theirs),
                *(["small"] if small else []),
            ],
            pass_fds=theirs,
            env=os.environ | shim.preloaded() | {"PYTHONPATH": path},
        )
        opened.callback(server.wait)
        for end in theirs:
            os.close(end)
        # closed before the server is waited for, which ends then
        ours = [
            (opened.enter_context(open(writer, "w")), opened.enter_context(open(reader)))
            for (_, writer), (reader, _) in zip(jobs, codes, strict=True)
        ]
        scratch = [
            Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="hydra-pipe-crash-")))
            for _ in ours
        ]
        yield [Commands(*files, own) for files, own in zip(ours, scratch, strict=True)]


@dataclass(frozen=True)
class Commands:
    """Runs hydra-pipe's commands one after the other, in processes of their own, see `commands.py`.

    Args:
        jobs, codes: to and from the server.
        scratch: directory for what a command leaves beside its run.
    """

    jobs: TextIO
    codes: TextIO
    scratch: Path

    def __call__(
        self,
        run: Path,
        arguments: Sequence[str],
        order: str | None = None,
        *,
        seconds: float | None = None,
        **struck: Any,
    ) -> Ended:
        """One command.

        Args:
            run: directory whose files are looked at.
            arguments: of the command, with "RUN" for the run. They name it relative to the
                directory that it is in, so that what is said of it is the same for all runs that
                are called alike.
            order: of a reduction, or "narrow"; None: as it plans itself.
            seconds: after which it is killed; None: it is not.
            struck: see `shim.environment`.
        """
        log, output, errors = (self.scratch / name for name in ("log", "output", "errors"))
        log.unlink(missing_ok=True)
        environment = shim.environment(run, log=log, **struck)
        named = [run.name if word == "RUN" else word for word in arguments]
        job: dict[str, Any] = {
            "arguments": named,
            "environment": environment,
            "order": order,
            "seconds": seconds,
        }
        run.parent.mkdir(parents=True, exist_ok=True)
        job |= {
            "directory": str(run.parent),
            "output": str(output),
            "errors": str(errors),
            "modules": str(self.scratch / "modules"),
        }
        print(json.dumps(job), file=self.jobs, flush=True)
        code = int(self.codes.readline())
        return Ended(code, errors.read_text(), shim.calls(log))


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but locks, without its id and without what is particular to this one."""
    run_id = json.loads((run / "run.json").read_text())["run_id"].encode()
    files = (file for file in sorted(run.rglob("*")) if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(run)): _without_id(file, run_id) for file in files}


def _without_id(file: Path, run_id: bytes) -> bytes:
    content = file.read_bytes()
    if file.name == "run.json":
        return _manifest(content)
    if file.parent.name == "checksums" and file.suffix == ".json":
        found = json.loads(content)
        return json.dumps([found["arrays"], list(found["files"])]).encode()
    if file.suffix == ".parquet":  # which has its schema once more, in base64
        schema = pq.read_metadata(file).metadata[b"ARROW:schema"]
        content = content.replace(schema, base64.b64decode(schema))
    return content.replace(run_id, b"ID")


def _manifest(content: bytes) -> bytes:
    manifest = json.loads(content)
    del manifest["run_id"]
    for stage in manifest["stages"].values():
        for name in _PARTICULAR:
            stage["facts"].pop(name, None)
        # the one counts what Python takes, the other how long a step took
        for name in ("peak_bytes", "picoseconds"):
            stage["facts"].get("plan", {}).pop(name, None)
    return json.dumps(manifest, indent=1).encode()


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> dict[str, int]:
    """Files that are not the same, with the number of bytes that differ."""
    names = sorted(found.keys() | expected.keys())
    return {
        name: n for name in names if (n := differing_bytes(found.get(name), expected.get(name)))
    }


def differing_bytes(found: bytes | None, expected: bytes | None) -> int:
    """Bytes that differ; those that only one has count, and a file that only one has counts at
    least as one.
    """
    if found is None or expected is None:
        return max(1, len(found or expected or b""))
    return abs(len(found) - len(expected)) + (
        0 if found == expected else sum(map(int.__ne__, found, expected))
    )


def leftovers(run: Path) -> list[str]:
    """Files that were begun and never finished."""
    return [str(path.relative_to(run)) for path in run.rglob("*.partial")]


def kind_of(call: shim.Call, run: Path) -> str:
    """A call's name, and that of the file without what is particular to it: calls of one kind do
    the same.
    """
    path = (call.to or call.path).removeprefix(os.path.realpath(run)).removeprefix("/")
    path = re.sub(r"\.\d+-[0-9a-f]+\.partial", ".partial", path)
    path = re.sub(r"(?<=/c)(/\d+)+", "/N", path)
    path = re.sub(r"step-\d+-[0-9a-f]+", "step-N", path)
    # arrays that are written alike
    path = re.sub(
        r"(?<=gradients.zarr/)(steps/\w+|curvature|sample|step|scale)(?=/|$)", "COLUMN", path
    )
    return f"{call.name} {path or '.'}"


def area_of(call: shim.Call, run: Path) -> str:
    """A call's name, and that of the part of the run it is in."""
    name, path = kind_of(call, run).split(" ", 1)
    return f"{name} {path.removesuffix('.partial').partition('/')[0]}"


def unsafe_names(calls: Sequence[shim.Call], run: Path) -> list[str]:
    """Files below a run that a power cut after `calls` could take, or take something of; those
    being written left out.
    """
    content: set[str] = set()  # written, and not flushed
    entries: set[str] = set()  # made or moved there, and their directory not flushed
    # directories, which are made but once: after that making them fails, which the log does not
    # tell
    made: set[str] = set()
    for call in calls:
        if call.name in ("open", "write", "writev", "pwrite", "ftruncate"):
            content.add(call.path)
            entries |= {call.path} if call.name == "open" else set()
        elif call.name in ("fsync", "fdatasync"):
            content.discard(call.path)
            entries = {name for name in entries if os.path.dirname(name) != call.path}
        elif call.name == "mkdir" and call.path not in made:
            entries.add(call.path)
            made.add(call.path)
        elif call.name == "rename":
            inside = call.path + "/"
            moved = {
                name for name in content | entries if name == call.path or name.startswith(inside)
            }
            made = {name for name in made if name != call.path and not name.startswith(inside)}
            for found in (content, entries):
                found |= {call.to + name.removeprefix(call.path) for name in moved & found}
                found -= moved
            entries.add(call.to)
        elif call.name in ("unlink", "rmdir"):
            # the log has the path of a tree's root only
            content, entries = content - {call.path}, entries - {call.path}
            made = {
                name for name in made if name != call.path and not name.startswith(call.path + "/")
            }
    root = os.path.realpath(run)
    ours = {
        name.removeprefix(root + "/") for name in content | entries if name.startswith(root + "/")
    }
    return sorted(
        name for name in ours if not name.endswith(".partial") and not name.startswith("locks")
    )
