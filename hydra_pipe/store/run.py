"""A run directory and its manifest: what was done with which settings, and how far it got."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

from hydra_pipe.errors import HydraError, ManifestError, RunError, StoreError, printable, shown
from hydra_pipe.store import names
from hydra_pipe.store.files import is_partial_of, is_web, location, read_file, remove, remove_partials_of, replace_file, sync
from hydra_pipe.store.locks import brief_lock
from hydra_pipe.store.parsing import is_count, read_json
from hydra_pipe.store.stages import (
    CHECKSUMS,
    OWNED,
    RECORD,
    Holds,
    Settings,
    Source,
    Stage,
    StageId,
    StageKind,
    State,
)

# facts of the recording: its rows were deleted after that; and until it is complete, what is safe on the disk
PRUNED, COMMITTED = "pruned", "committed"


class RunDirectory:
    """An existing run. Valid once made: format and version were read and understood."""

    def __init__(
        self,
        path: Path,
        run_id: str,
        stages: dict[StageId, Stage],
        versions: dict[str, str],
        unknown: Mapping[str, Stage] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.run_id = run_id
        self.stages = stages
        self.versions = versions
        # stages that this object has changed: of the others another process may know more
        self._changed: set[StageId] = set()
        # stages of kinds that a later hydra-pipe knows, by their words: they are kept as they are
        self._unknown = unknown

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
            stages = [(words, StageId.parse(words), _stage(words, entry)) for words, entry in data["stages"].items()]
            known = {which: stage for _, which, stage in stages if which is not None}
            unknown = {words: stage for words, which, stage in stages if which is None}
            return cls(root, data["run_id"], known, {k: str(v) for k, v in data["versions"].items()}, unknown)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{manifest} is damaged ({shown(error)}): restore it, or record the run again elsewhere") from error

    def has_work(self, which: StageId, settings: Settings) -> bool:
        """Tell whether stage `which` has work to do with `settings`. Writes nothing.

        Raises:
            RunError: it was done, or begun, with other settings; the message names the first that differs.
        """
        stage = self.stages.get(which)
        if stage is None:
            return True
        self._compare(which, stage.settings, settings)
        return stage.state != "complete"

    def begin(self, which: StageId, settings: Settings) -> None:
        """Mark stage `which` as running with `settings`."""
        self.stages[which] = Stage("running", settings)
        self.save(which)

    def _compare(self, which: StageId, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*new, *old]):
            if old.get(key) != new.get(key):
                was, now = (f"{printable(key)}={shown(settings.get(key))}" for settings in (old, new))
                raise RunError(
                    f"{self.path}: {which} was run with {was}, now {now}: "
                    f"use another run directory, or --overwrite to discard what is there"
                )

    def end(self, which: StageId, state: State, **facts: Any) -> None:
        """Mark stage `which` as ended, with what it found. What is called complete must be safe on the disk before."""
        stage = self.stages[which]
        stage.state = state
        # how far it got, or what went wrong before, is of no interest any more when it is complete
        stage.facts = facts if state == "complete" else stage.facts | facts
        self.save(which)

    @contextmanager
    def failing(self, which: StageId) -> Iterator[None]:
        """A block of stage `which`, which has begun: what the block raises marks the stage as failed."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # on a full disk the manifest stays at "running", which reads as unfinished too
                self.end(which, "failed", error=str(error) or type(error).__name__)
            raise

    def of_kind(self, kind: StageKind) -> list[str]:
        """Names of the stages of one kind, begun or complete."""
        return [which.name for which in self.stages if which.kind is kind]

    def complete(self, kind: StageKind) -> list[str]:
        """Names of the complete stages of one kind."""
        return [which.name for which, stage in self.stages.items() if which.kind is kind and stage.state == "complete"]

    def checksums(self, which: StageId) -> Any:
        """What the manifest has of the footprints of stage `which`, by which what was made from it is told to be stale.

        None: it is not there, or was never complete.
        """
        return self.stages[which].facts.get(CHECKSUMS) if which in self.stages else None

    def origin(self, which: StageId) -> dict[str, Any]:
        """Facts that say what stage `which` is made from, as that is now."""
        return {source.fact: self.checksums(source.stage) for source in which.sources(self.stages[which])}

    def stale(self, which: StageId) -> list[Source]:
        """What stage `which` was made from, and is another now than it was then."""
        entry = self.stages[which]
        if names.UPTO in entry.settings:
            return []  # the first steps are the same when more have come, and where they are recorded anew the stage is forgotten
        found = [(source, self.checksums(source.stage)) for source in which.sources(entry)]
        return [source for source, now in found if now is not None and entry.facts.get(source.fact) != now]

    def command(self, which: StageId) -> str:
        """The command that makes stage `which` again, with the settings that it had."""
        return which.command(self.path, self.stages)

    def forget(self, *stages: StageId) -> None:
        """Drop stages whose results are about to be removed."""
        for which in stages:
            self.stages.pop(which, None)
        self.save(*stages)
        for which in stages:
            remove(self.path / which.checksums_file)

    def require(self, which: StageId, command: str) -> Stage:
        """The stage `which`, which must be complete.

        Raises:
            RunError: it is not; the message names the command that completes it.
        """
        stage = self.stages.get(which)
        if stage is None or stage.state != "complete":
            why = "has not been run" if stage is None else f"is not finished (state: {stage.state})"
            detail = f", {printable(str(stage.facts['error']))}" if stage is not None and "error" in stage.facts else ""
            raise RunError(f"{self.path}: {which} {why}{detail}: run {command} first")
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

    def save(self, *changed: StageId) -> None:
        """Write the manifest: the old one or the new one is there at any moment, never half of one. It is safe on the disk then.

        Its copy is written before it: after a crash between the two the manifest lags, and the same command writes both again.

        Args:
            changed: stages that were changed, or forgotten. Those that were not are left as they are on the disk, for another
                process may be at work on them.
        """
        self._changed |= set(changed)
        self.path.mkdir(parents=True, exist_ok=True)
        with brief_lock(self.path):
            there = self._on_disk()
            stages = {**there._unknown} | {str(name): stage for name, stage in self._merged(there.stages).items()}
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

    def _on_disk(self) -> "RunDirectory":
        """The run as the manifest has it; without any stage where that is of another run."""
        try:
            found = RunDirectory.open(self.path)
        except HydraError:
            found = self  # there is none yet, or it is damaged: what was read before is the best there is
        return found if found.run_id == self.run_id else RunDirectory(self.path, self.run_id, {}, {})

    def _merged(self, on_disk: dict[StageId, Stage]) -> dict[StageId, Stage]:
        """`on_disk`, but for the stages that this object has changed, in the order in which they first began."""
        merged = on_disk | {name: stage for name, stage in self.stages.items() if name in self._changed}
        return {name: stage for name, stage in merged.items() if name in self.stages or name not in self._changed}

    def refresh(self) -> None:
        """Read the manifest again: another process may have ended what it was at. Raises: as `open`."""
        found = RunDirectory.open(self.path)
        self.run_id, self.stages, self.versions = found.run_id, found.stages, found.versions

    def clear(self) -> None:
        """Remove everything hydra-pipe has put into the directory, and nothing else."""
        reports = [stage for stage in self.stages if stage.kind.holds is Holds.FILE]
        # first the claim, then what it claims: a manifest must not call complete what is gone. Whose file only the claim leads to,
        # its claim is the last to go.
        for stage in reports:
            self.begin(stage, self.stages[stage].settings)
            remove(self.path / stage.area)
        self.forget(*list(self.stages))
        for place in OWNED:
            remove(self.path / place)


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


def _stage(words: str, entry: Mapping[str, Any]) -> Stage:
    state, settings, facts = entry["state"], entry["settings"], entry["facts"]
    if state not in get_args(State):
        raise ValueError(f"unknown state {shown(state)}")
    if not isinstance(settings, dict) or not isinstance(facts, dict):
        raise TypeError(f"the settings or facts of {words} are no object")
    return Stage(state, settings, facts)


def _versions() -> dict[str, str]:
    import importlib.metadata  # takes as long as NumPy, and only a new run needs it
    import platform

    packages = ("hydra-pipe", "torch", "numpy", "zarr", "numcodecs", "dask", "pyarrow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
