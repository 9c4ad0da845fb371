"""A run directory and its manifest: what was done with which settings, and how far it got."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from hydra_pipe.errors import HydraError, ManifestError, RunError, StoreError, printable, shown
from hydra_pipe.store import names
from hydra_pipe.store.files import is_partial_of, is_web, location, read_file, remove, remove_partials_of, replace_file, sync
from hydra_pipe.store.locks import brief_lock
from hydra_pipe.store.parsing import is_count, is_plain, read_json

State = Literal["running", "failed", "complete"]
Settings = dict[str, Any]

RECORD = "record"
# facts of the recording: its rows were deleted after that; and until it is complete, what is safe on the disk
PRUNED, COMMITTED = "pruned", "committed"
# setting of a reduction: of the first steps only
UPTO = "upto"
# facts: SHA-256 of the file of a stage's footprints, and of those of what it was computed from
CHECKSUMS, OF_RECORD, OF_PROBE, OF_REDUCE, OF_SELF = "checksums", "of_record", "of_probe", "of_reduce", "of_self"


def reduce_stage(method: str) -> str:
    """Name of the stage that computes `method`'s relevance."""
    return f"reduce {method}"


def keep_stage(method: str) -> str:
    """Name of the stage that keeps `method`'s hypergradients."""
    return f"keep {method}"


def export_stage(method: str) -> str:
    """Name of the stage that writes `method`'s rankings."""
    return f"export {method}"


def clean_stage(method: str) -> str:
    """Name of the stage that proposes which samples to relabel or drop, by `method`'s relevance."""
    return f"clean {method}"


def report_stage(method: str) -> str:
    """Name of the stage that writes the page about `method`'s relevance."""
    return f"report {method}"


def stages_of_result(method: str) -> tuple[str, ...]:
    """Names of the stages whose results come from `method`'s relevance, and go when it does."""
    return export_stage(method), clean_stage(method), report_stage(method)


def probe_stage(name: str) -> str:
    """Name of the stage that takes the test gradients of probe `name`."""
    return f"probe {name}"


def evaluate_stage(kind: str) -> str:
    """Name of the stage that holds relevance against the truth, by one kind of evaluation."""
    return f"evaluate {kind}"


_REPORT = report_stage("")


@dataclass
class Stage:
    """One stage of a run.

    Args:
        state: how it stands; "running" also after a crash.
        settings: those that its result depends on.
        facts: what it found or took: counts, seconds, what went wrong.
    """

    state: State
    settings: Settings
    facts: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, least: int = 0) -> int:
        """A fact, or else a setting, that counts something. Raises: StoreError: the manifest lacks it."""
        value = self.facts.get(name, self.settings.get(name))
        if not is_count(value, least):
            raise _strange(name, value)
        return value

    def counts(self, name: str) -> dict[str, int]:
        """A fact that counts things by their names; empty if it is not there. Raises: StoreError: it is something else."""
        value = self.facts.get(name, {})
        if not isinstance(value, dict) or not all(map(is_count, value.values())):
            raise _strange(name, value)
        return dict(value)

    def rank_rows(self) -> list[int]:
        """Rows of each process that recorded. Raises: StoreError: the manifest lacks them, or they do not add up."""
        n_rows = self.count("n_rows")
        value = self.facts.get("rank_rows", [n_rows])
        if not isinstance(value, list) or not all(map(is_count, value)) or sum(value) != n_rows:
            raise _strange("rank_rows", value)
        return list(value)


class RunDirectory:
    """An existing run. Valid once made: format and version were read and understood."""

    def __init__(self, path: Path, run_id: str, stages: dict[str, Stage], versions: dict[str, str]) -> None:
        self.path = path
        self.run_id = run_id
        self.stages = stages
        self.versions = versions
        # stages that this object has changed: of the others another process may know more
        self._changed: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the manifest of the run at `path`.

        Raises:
            RunError: there is no run at `path`.
            ManifestError: its manifest is damaged. StoreError: it is of a newer format version.
        """
        root = location(path)
        manifest = root / names.MANIFEST
        if is_web(root):
            _check_web(root)
        if not root.exists():
            raise RunError(f"there is no run at {root}: record one with hydra-pipe record PIPELINE {root}")
        if not manifest.is_file():
            is_lost = cls.from_copy(root) is not None
            advice = f", but a copy of it: run hydra-pipe verify {root} --repair" if is_lost else ""
            raise RunError(f"{root} is not a run of hydra-pipe: it has no {names.MANIFEST}{advice}")
        return cls._parse(root, manifest)

    @classmethod
    def open_or_none(cls, path: str | os.PathLike[str]) -> Self | None:
        """The run at `path`, or None where there is nothing yet.

        Raises:
            RunError: `path` holds something else, which is left as it is.
            StoreError: as `open`.
        """
        root = location(path)
        if not root.exists():
            return None
        if not root.is_dir():
            raise RunError(f"{root} is a file: name a directory for the run")
        if not (root / names.MANIFEST).is_file():
            # a recording that was killed while it wrote the first manifest leaves a part of it, and its copy
            ours = (names.LOCKS, names.CHECKSUMS)
            if any(entry.name not in ours and not is_partial_of(names.MANIFEST, entry.name) for entry in root.iterdir()):
                raise RunError(f"{root} holds files but is not a run of hydra-pipe: name a new or an empty directory")
            return None
        return cls.open(root)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """A new run; nothing is written before its first stage begins."""
        return cls(location(path), uuid.uuid4().hex, {}, _versions())

    @classmethod
    def from_copy(cls, path: str | os.PathLike[str]) -> Self | None:
        """The run at `path` as the copy of its manifest has it, or None where there is none that can be read."""
        root = location(path)
        try:
            return cls._parse(root, root / names.CHECKSUMS / names.MANIFEST)
        except (HydraError, OSError):
            return None

    @classmethod
    def _parse(cls, root: Path, manifest: Path) -> Self:
        try:
            data = read_json(manifest)
            if not isinstance(data, dict) or data.get("format") != names.FORMAT:
                raise RunError(f"{manifest} is not a manifest of hydra-pipe: {root} holds something else")
            version = data["format_version"]
            if not is_count(version, 1):
                raise ValueError(f"format version {shown(version)}")
            if version > names.FORMAT_VERSION:
                raise StoreError(
                    f"{root} was written in format version {version}, this hydra-pipe reads up to {names.FORMAT_VERSION}: "
                    f"upgrade hydra-pipe"
                )
            if not isinstance(data["run_id"], str):
                raise TypeError(f"run id {shown(data['run_id'])}")
            stages = {name: _stage(name, entry) for name, entry in data["stages"].items()}
            return cls(root, data["run_id"], stages, {k: str(v) for k, v in data["versions"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{manifest} is damaged ({shown(error)}): restore it, or record the run again elsewhere") from error

    def has_work(self, name: str, settings: Settings) -> bool:
        """Whether stage `name` has work to do with `settings`. Writes nothing.

        Raises:
            RunError: it was done, or begun, with other settings; the message names the first that differs.
        """
        stage = self.stages.get(name)
        if stage is None:
            return True
        self._compare(name, stage.settings, settings)
        return stage.state != "complete"

    def begin(self, name: str, settings: Settings) -> None:
        """Mark stage `name` as running with `settings`."""
        self.stages[name] = Stage("running", settings)
        self.save(name)

    def _compare(self, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*new, *old]):
            if old.get(key) != new.get(key):
                was, now = (f"{printable(key)}={shown(settings.get(key))}" for settings in (old, new))
                raise RunError(
                    f"{self.path}: {name} was run with {was}, now {now}: "
                    f"use another run directory, or --overwrite to discard what is there"
                )

    def end(self, name: str, state: State, **facts: Any) -> None:
        """Mark stage `name` as ended, with what it found. What is called complete must be safe on the disk before."""
        stage = self.stages[name]
        stage.state = state
        # how far it got, or what went wrong before, is of no interest any more when it is complete
        stage.facts = facts if state == "complete" else stage.facts | facts
        self.save(name)

    @contextmanager
    def failing(self, name: str) -> Iterator[None]:
        """A block of stage `name`, which has begun: what the block raises marks the stage as failed."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # on a full disk the manifest stays at "running", which reads as unfinished too
                self.end(name, "failed", error=str(error) or type(error).__name__)
            raise

    def kept_methods(self) -> list[str]:
        """Methods whose hypergradients are kept, to the end."""
        prefix = keep_stage("")
        return [name.removeprefix(prefix) for name, s in self.stages.items() if name.startswith(prefix) and s.state == "complete"]

    def forget(self, *stage_names: str) -> None:
        """Drop stages whose results are about to be removed."""
        for name in stage_names:
            self.stages.pop(name, None)
        self.save(*stage_names)
        for name in stage_names:
            remove(self.path / names.checksums_file(name))

    def require(self, name: str, command: str) -> Stage:
        """The stage `name`, which must be complete.

        Raises:
            RunError: it is not; the message names the command that completes it.
        """
        stage = self.stages.get(name)
        if stage is None or stage.state != "complete":
            why = "has not been run" if stage is None else f"is not finished (state: {stage.state})"
            detail = f", {printable(str(stage.facts['error']))}" if stage is not None and "error" in stage.facts else ""
            raise RunError(f"{self.path}: {name} {why}{detail}: run {command} first")
        return stage

    def require_recording(self) -> Stage:
        """The recording, which must be complete. Raises: RunError: it is not; the message says what completes it."""
        stage = self.stages.get(RECORD)
        # a pipeline's settings name it, if only as None; those of a loop of one's own do not
        if stage is None or stage.state == "complete" or "pipeline" in stage.settings:
            return self.require(RECORD, f"hydra-pipe record PIPELINE {self.path}")
        if stage.state == "running":
            raise RunError(
                f"the recording of {self.path} was never closed: call recorder.close() after the training, or train in a block "
                f"`with Recorder(...) as recorder:`; if its process has ended, run the training again"
            )
        detail = f", {printable(str(stage.facts['error']))}" if "error" in stage.facts else ""
        raise RunError(
            f"{self.path}: record is not finished (state: {stage.state}){detail}: run the training again, or go on from a state of "
            f"the recorder"
        )

    def save(self, *changed: str) -> None:
        """Write the manifest: the old one or the new one is there at any moment, never half of one. It is safe on the disk then.

        Its copy is written before it: after a crash between the two the manifest lags, and the same command writes both again.

        Args:
            changed: stages that were changed, or forgotten. Those that were not are left as they are on the disk, for another
                process may be at work on them.
        """
        self._changed |= set(changed)
        self.path.mkdir(parents=True, exist_ok=True)
        with brief_lock(self.path):
            stages = self._merged(self._on_disk())
            data = {
                "format": names.FORMAT,
                "format_version": names.FORMAT_VERSION,
                "run_id": self.run_id,
                "versions": self.versions,
                "stages": {name: {"state": s.state, "settings": s.settings, "facts": s.facts} for name, s in stages.items()},
            }
            content = [json.dumps(data, indent=2).encode(), b"\n"]
            for file in (self.path / names.CHECKSUMS / names.MANIFEST, self.path / names.MANIFEST):
                remove_partials_of(file)
                replace_file(file, content)
                for directory in dict.fromkeys((file.parent, self.path)):  # which of the copy may be new in the run's
                    sync(directory)

    def _on_disk(self) -> dict[str, Stage]:
        """Stages as the manifest has them; none of another run's."""
        try:
            found = RunDirectory.open(self.path)
        except HydraError:
            found = self  # there is none yet, or it is damaged: what was read before is the best there is
        return found.stages if found.run_id == self.run_id else {}

    def _merged(self, on_disk: dict[str, Stage]) -> dict[str, Stage]:
        """`on_disk`, but for the stages that this object has changed, in the order in which they first began."""
        merged = on_disk | {name: stage for name, stage in self.stages.items() if name in self._changed}
        return {name: stage for name, stage in merged.items() if name in self.stages or name not in self._changed}

    def refresh(self) -> None:
        """Read the manifest again: another process may have ended what it was at. Raises: as `open`."""
        found = RunDirectory.open(self.path)
        self.run_id, self.stages, self.versions = found.run_id, found.stages, found.versions

    def clear(self) -> None:
        """Remove everything hydra-pipe has put into the directory, and nothing else."""
        reports = [stage for stage in self.stages if stage.startswith(_REPORT)]
        # first the claim, then what it claims: a manifest must not call complete what is gone. Whose file only the claim leads to,
        # its claim is the last to go.
        for stage in reports:
            self.begin(stage, self.stages[stage].settings)
            remove(self.path / names.report_file(stage.removeprefix(_REPORT)))
        self.forget(*list(self.stages))
        for name in names.OWNED:
            remove(self.path / name)


def _check_web(root: Path) -> None:
    """A web server says of whatever goes wrong that nothing is there. Raises: RunError: there is no run, or it cannot be read."""
    try:
        read_file(root / names.MANIFEST)
    except FileNotFoundError as error:
        raise RunError(f"there is no run at {root}: the web server has no {names.MANIFEST} there") from error
    except Exception as error:
        raise RunError(f"{root} cannot be read ({shown(error)}): check the address, and that the web server runs") from error
    listed: set[str] = set()
    with suppress(Exception):  # whatever the server answers in place of a listing
        listed = {entry.name for entry in root.iterdir()}
    if names.MANIFEST not in listed:
        raise RunError(
            f"the web server of {root} does not list its directories, and a run is read by its listings: have the server list them "
            f"(python -m http.server does, nginx with autoindex), or copy the run to a disk"
        )


def _stage(name: str, entry: Mapping[str, Any]) -> Stage:
    # the second word becomes the name of files
    if not all(map(is_plain, name.split(" "))):
        raise ValueError(f"a stage called {shown(name)}")
    state, settings, facts = entry["state"], entry["settings"], entry["facts"]
    if state not in get_args(State):
        raise ValueError(f"unknown state {shown(state)}")
    if not isinstance(settings, dict) or not isinstance(facts, dict):
        raise TypeError(f"the settings or facts of {name} are no object")
    return Stage(state, settings, facts)


def _strange(name: str, value: Any) -> StoreError:
    return StoreError(f"{names.MANIFEST} is damaged: it says {name} is {shown(value)}: record the run again with --overwrite")


def _versions() -> dict[str, str]:
    import importlib.metadata  # takes as long as NumPy, and only a new run needs it
    import platform

    packages = ("hydra-pipe", "torch", "numpy", "zarr", "numcodecs", "dask", "pyarrow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
