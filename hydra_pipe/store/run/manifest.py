"""A run directory and its manifest: the stages, their settings and their progress."""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

from hydra_pipe.errors import HydraError, ManifestError, RunError, StoreError, printable, shown
from hydra_pipe.store import names
from hydra_pipe.store.files import (
    is_partial_of,
    is_remote,
    is_web,
    location,
    read_file,
    remove,
    remove_partials_of,
    replace_file,
    sync,
)
from hydra_pipe.store.json_parsing import is_count, read_json
from hydra_pipe.store.json_writing import json_bytes
from hydra_pipe.store.run.locks import brief_lock
from hydra_pipe.store.run.results import refuse_top
from hydra_pipe.store.run.stages import (
    CHECKSUMS,
    COMBINE,
    OWNED,
    RECORD,
    REDUCE,
    Holds,
    Settings,
    Stage,
    StageId,
    StageKind,
    StageSource,
    State,
)

# Facts of the recording. PRUNED: its rows were deleted after it was complete. COMMITTED: the
# part that is safe on the disk, until it is complete.
PRUNED, COMMITTED = "pruned", "committed"


class RunDirectory:
    """An existing run. Its format and version have been read and understood."""

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
        # Stages that this object has changed. Another process may know more of the other stages.
        self._changed: set[StageId] = set()
        # Stages of kinds that only a later hydra-pipe knows, by name. They are kept unchanged.
        self._unknown = unknown

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the manifest of the run at `path`.

        Raises:
            RunError: there is no run at `path`.
            ManifestError: the manifest is damaged.
            StoreError: the manifest has a newer format version.
        """
        root = location(path)
        manifest = root / names.MANIFEST
        if is_web(root):
            _check_web(root)
        if (found := cls._remote_or_none(root)) is not None:
            return found
        if not root.exists():
            raise RunError(
                f"there is no run at {root}: record one with hydra-pipe record PIPELINE {root}"
            )
        if not manifest.is_file():
            is_lost = cls.from_copy(root) is not None
            advice = f", but a copy of it: run hydra-pipe verify {root} --repair" if is_lost else ""
            raise RunError(f"{root} is not a run of hydra-pipe: it has no {names.MANIFEST}{advice}")
        return cls._parse(root, manifest)

    @classmethod
    def open_or_none(cls, path: str | os.PathLike[str]) -> Self | None:
        """Read the run at `path`. None if nothing is there yet.

        Raises:
            RunError: `path` holds something else, which is left unchanged.
            StoreError: the errors of `open`.
        """
        root = location(path)
        if (found := cls._remote_or_none(root)) is not None:
            return found
        if not root.exists():
            return None
        if not root.is_dir():
            raise RunError(f"{root} is a file: name a directory for the run")
        if not (root / names.MANIFEST).is_file():
            # A recording that was killed during its first manifest leaves a part of the manifest,
            # and the manifest's copy.
            ours = (names.LOCKS, names.CHECKSUMS)
            if any(
                entry.name not in ours and not is_partial_of(names.MANIFEST, entry.name)
                for entry in root.iterdir()
            ):
                raise RunError(
                    f"{root} holds files but is not a run of hydra-pipe: name a new or an empty "
                    "directory"
                )
            return None
        return cls.open(root)

    @classmethod
    def _remote_or_none(cls, root: Path) -> Self | None:
        """Read the run at `root` if it is in an object store and has a manifest, in one request.

        Raises:
            RunError, StoreError: the errors of `open`.
        """
        if not is_remote(root):
            return None
        with suppress(FileNotFoundError):
            return cls._parse(root, root / names.MANIFEST)
        return None

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Return a new run. Nothing is written before its first stage begins."""
        return cls(location(path), uuid.uuid4().hex, {}, dict(_versions()))

    @classmethod
    def from_copy(cls, path: str | os.PathLike[str]) -> Self | None:
        """Read the run at `path` from the copy of its manifest. None if the copy is unreadable."""
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
                raise RunError(
                    f"{manifest} is not a manifest of hydra-pipe: {root} holds something else"
                )
            version = data["format_version"]
            if not is_count(version, 1):
                raise ValueError(f"format version {shown(version)}")
            if version > names.FORMAT_VERSION:
                raise StoreError(
                    f"{root} was written in format version {version}, this hydra-pipe reads up "
                    f"to {names.FORMAT_VERSION}: "
                    f"upgrade hydra-pipe"
                )
            if not isinstance(data["run_id"], str):
                raise TypeError(f"run id {shown(data['run_id'])}")
            stages = [
                (words, StageId.parse(words), _stage(words, entry))
                for words, entry in data["stages"].items()
            ]
            known = {which: stage for _, which, stage in stages if which is not None}
            unknown = {words: stage for words, which, stage in stages if which is None}
            return cls(
                root,
                data["run_id"],
                known,
                {k: str(v) for k, v in data["versions"].items()},
                unknown,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{manifest} is damaged ({shown(error)}): restore it, or record the run again "
                "elsewhere"
            ) from error

    def has_work(self, which: StageId, settings: Settings) -> bool:
        """Tell whether stage `which` has work to do with `settings`. Writes nothing.

        Raises:
            RunError: the stage was done, or begun, with other settings. The message names the
                first that differs.
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
                was, now = (
                    f"{printable(key)}={shown(settings.get(key))}" for settings in (old, new)
                )
                raise RunError(
                    f"{self.path}: {which} was run with {was}, now {now}: "
                    f"use another run directory, or --overwrite to discard what is there"
                )

    def end(self, which: StageId, state: State, **facts: Any) -> None:
        """Mark stage `which` as ended, with facts about it.

        The files of a stage must be safe on the disk before it is marked as complete.
        """
        stage = self.stages[which]
        stage.state = state
        # A complete stage needs no facts about its progress or about earlier errors.
        stage.facts = facts if state == "complete" else stage.facts | facts
        self.save(which)

    @contextmanager
    def failing(self, which: StageId) -> Iterator[None]:
        """Mark stage `which`, which has begun, as failed if the block raises."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # a full disk keeps "running", which reads as unfinished too
                self.end(which, "failed", error=str(error) or type(error).__name__)
            raise

    def of_kind(self, kind: StageKind) -> list[str]:
        """Return the names of the stages of one kind, begun or complete."""
        return [which.name for which in self.stages if which.kind is kind]

    def complete(self, kind: StageKind) -> list[str]:
        """Return the names of the complete stages of one kind."""
        return [
            which.name
            for which, stage in self.stages.items()
            if which.kind is kind and stage.state == "complete"
        ]

    @property
    def is_combined(self) -> bool:
        """True if the run combines others. It then has no recording."""
        return bool(self.of_kind(COMBINE))

    def n_samples(self, result: str) -> int:
        """Return the number of training samples of a result.

        Raises:
            StoreError: the manifest lacks the number.
        """
        stage = self.stages.get(COMBINE.of(result)) or self.stages[RECORD]
        return stage.count("n_samples", least=1)

    def checksums(self, which: StageId) -> Any:
        """Return the SHA-256 of the footprints of stage `which`, from the manifest.

        A result made from the stage is stale if it was made from footprints of another SHA-256.
        None: the stage is missing, or was never complete.
        """
        return self.stages[which].facts.get(CHECKSUMS) if which in self.stages else None

    def origin(self, which: StageId) -> dict[str, Any]:
        """Return the facts that name the sources of stage `which`, as the sources are now."""
        return {
            source.fact: self.checksums(source.stage)
            for source in which.sources(self.stages[which])
        }

    def stale(self, which: StageId) -> list[StageSource]:
        """Return the sources of stage `which` that have changed since the stage used them."""
        entry = self.stages[which]
        if names.UPTO in entry.settings:
            # More steps do not change the first steps. If the first steps are recorded anew, the
            # stage is forgotten.
            return []
        found = [(source, self.checksums(source.stage)) for source in which.sources(entry)]
        return [
            source
            for source, now in found
            if now is not None and entry.facts.get(source.fact) != now
        ]

    def command(self, which: StageId) -> str:
        """Return the command that makes stage `which` again, with its settings."""
        return which.command(self.path, self.stages)

    def forget(self, *stages: StageId) -> None:
        """Drop stages whose results are about to be removed."""
        for which in stages:
            self.stages.pop(which, None)
        self.save(*stages)
        for which in stages:
            remove(self.path / which.checksums_file)

    def require(self, which: StageId, command: str) -> Stage:
        """Return the stage `which`, which must be complete.

        Raises:
            RunError: the stage is not complete. The message names the command that completes it.
            UsageError: every pair is required of a result of the top samples alone.
        """
        if which.kind is REDUCE:
            refuse_top(which.name)
        stage = self.stages.get(which)
        if stage is None or stage.state != "complete":
            why = "has not been run" if stage is None else f"is not finished (state: {stage.state})"
            detail = (
                f", {printable(str(stage.facts['error']))}"
                if stage is not None and "error" in stage.facts
                else ""
            )
            raise RunError(f"{self.path}: {which} {why}{detail}: run {command} first")
        return stage

    def require_recording(self) -> Stage:
        """Return the recording, which must be complete.

        Raises:
            RunError: the recording is not complete. The message says what completes it.
        """
        stage = self.stages.get(RECORD)
        if stage is None and self.is_combined:
            raise RunError(
                f"{self.path} combines runs, and has no recording of its own: give one of its runs"
            )
        # The settings of a pipeline name it, if only as None. A user's own loop has no such
        # setting.
        if stage is None or stage.state == "complete" or "pipeline" in stage.settings:
            return self.require(RECORD, f"hydra-pipe record PIPELINE {self.path}")
        if stage.state == "running":
            raise RunError(
                f"the recording of {self.path} was never closed: call recorder.close() after the "
                "training, or train in a block "
                "`with Recorder(...) as recorder:`; if its process has ended, run the training "
                "again"
            )
        detail = f", {printable(str(stage.facts['error']))}" if "error" in stage.facts else ""
        raise RunError(
            f"{self.path}: record is not finished (state: {stage.state}){detail}: run the "
            "training again, or resume from a state of the recorder"
        )

    def save(self, *changed: StageId) -> None:
        """Write the manifest, safe on the disk.

        The old manifest or the new one exists at any moment, never half of one. Its copy is written
        before it. After a crash between the two the manifest lags, and the same command writes both
        again.

        Args:
            changed: stages that were changed or forgotten. All other stages stay as they are on
                the disk, for another process may be at work on them.
        """
        self._changed |= set(changed)
        self.path.mkdir(parents=True, exist_ok=True)
        with brief_lock(self.path):
            there = self._on_disk()
            stages = {**there._unknown} | {
                str(name): stage for name, stage in self._merged(there.stages).items()
            }
            data = {
                "format": names.FORMAT,
                "format_version": names.FORMAT_VERSION,
                "run_id": self.run_id,
                "versions": self.versions,
                "stages": {
                    name: {"state": s.state, "settings": s.settings, "facts": s.facts}
                    for name, s in stages.items()
                },
            }
            content = [json_bytes(data), b"\n"]
            for file in (self.path / names.CHECKSUMS / names.MANIFEST, self.path / names.MANIFEST):
                remove_partials_of(file)
                replace_file(file, content)
                for directory in dict.fromkeys((file.parent, self.path)):  # file.parent may be new
                    sync(directory)

    def _on_disk(self) -> "RunDirectory":
        """Return the run as the manifest has it, without any stage if that is of another run."""
        try:
            found = RunDirectory.open(self.path)
        except HydraError:
            found = self  # no manifest yet, or a damaged one: this object has the best there is
        return (
            found if found.run_id == self.run_id else RunDirectory(self.path, self.run_id, {}, {})
        )

    def _merged(self, on_disk: dict[StageId, Stage]) -> dict[StageId, Stage]:
        """Return `on_disk` with this object's changes, in the order in which stages first began."""
        merged = on_disk | {
            name: stage for name, stage in self.stages.items() if name in self._changed
        }
        return {
            name: stage
            for name, stage in merged.items()
            if name in self.stages or name not in self._changed
        }

    def refresh(self) -> None:
        """Read the manifest again, for another process may have ended a stage.

        Raises:
            RunError, ManifestError, StoreError: the errors of `open`.
        """
        found = RunDirectory.open(self.path)
        self.run_id, self.stages, self.versions = found.run_id, found.stages, found.versions

    def clear(self) -> None:
        """Remove everything that hydra-pipe has put into the directory, and nothing else."""
        reports = [stage for stage in self.stages if stage.kind.holds is Holds.FILE]
        # Claims go before files: a manifest must not call complete what is gone. But only the
        # claim of a report leads to its file, so this claim goes last.
        for stage in reports:
            self.begin(stage, self.stages[stage].settings)
            remove(self.path / stage.area)
        self.forget(*list(self.stages))
        for place in OWNED:
            remove(self.path / place)


def _check_web(root: Path) -> None:
    """Check that a web server has the run: it calls a file missing, whatever goes wrong.

    Raises:
        RunError: there is no run, or it cannot be read.
    """
    try:
        read_file(root / names.MANIFEST)
    except FileNotFoundError as error:
        raise RunError(
            f"there is no run at {root}: the web server has no {names.MANIFEST} there"
        ) from error
    except Exception as error:
        raise RunError(
            f"{root} cannot be read ({shown(error)}): check the address, and that the web server "
            "runs"
        ) from error
    listed: set[str] = set()
    with suppress(Exception):  # the server may answer anything in place of a listing
        listed = {entry.name for entry in root.iterdir()}
    if names.MANIFEST not in listed:
        raise RunError(
            f"the web server of {root} does not list its directories, and a run is read by its "
            "listings: have the server list them "
            f"(python -m http.server does, nginx with autoindex), or copy the run to a disk"
        )


def _stage(words: str, entry: Mapping[str, Any]) -> Stage:
    state, settings, facts = entry["state"], entry["settings"], entry["facts"]
    if state not in get_args(State):
        raise ValueError(f"unknown state {shown(state)}")
    if not isinstance(settings, dict) or not isinstance(facts, dict):
        raise TypeError(f"the settings or facts of {words} are no object")
    return Stage(state, settings, facts)


@cache
def _versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that write a run. They are read once."""
    import importlib.metadata  # takes as long as NumPy to import, and only a new run needs it
    import platform

    packages = ("hydra-pipe", "torch", "numpy", "zarr", "numcodecs", "dask", "pyarrow")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
