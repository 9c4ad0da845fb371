"""Work on a stage, such that a crash at any moment leaves a true manifest (docs/architecture.md).

One process takes up a stage, and looks anew at what there is to do. The stage is marked as
running before any of its files change. It is marked as failed if the work raises. It is
marked as complete when all its files are sealed and safe on the disk.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_pipe.progress import Progress
from hydra_pipe.store.files import replaced_directory
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.listing import say_unlisted
from hydra_pipe.store.run.locks import one_writer
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.stages import CHECKSUMS, Settings, StageId


@contextmanager
def alone(run: RunDirectory, *stages: StageId) -> Iterator[None]:
    """Lock `stages` for the block, and read what other processes have done to `run`.

    Raises:
        RunError: another process writes one of the stages.
    """
    with one_writer(run.path, *stages):
        run.refresh()
        yield


@contextmanager
def taken_up(
    run: RunDirectory, *stages: StageId, has_work: Callable[[], bool], progress: Progress
) -> Iterator[bool]:
    """Take up `stages` of `run` if they have work to do, and yield whether they have.

    Args:
        run: the run.
        stages: all stages that the block writes.
        has_work: function that tells whether there is work to do. It is asked again when this
            process is alone, for another process may have done the work.
        progress: progress, which is told the unlisted files of `run` before work begins.

    Raises:
        RunError: another process writes one of `stages`.
    """
    if not has_work():
        yield False
        return
    with alone(run, *stages):
        is_needed = has_work()
        if is_needed:
            say_unlisted(run, progress)
        yield is_needed


@dataclass
class Work:
    """A stage that is running.

    Args:
        run: run of the stage.
        stage: the stage.
        facts: facts for the manifest of the complete stage. Seconds and sources are added
            without the caller.
    """

    run: RunDirectory
    stage: StageId
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Path of what the stage writes."""
        return self.run.path / self.stage.area

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield a new directory for all files of the stage, which then replaces the old one.

        Readers see the old files or the new ones, all of them from one writer.
        """
        with replaced_directory(self.place) as partial:
            yield partial
            self.facts[CHECKSUMS] = seal(self.run, self.stage, partial)

    def seal(self) -> None:
        """Write down the footprints of all files of the stage, unless `replaced` has done so.

        Raises:
            StoreError, OSError: a file of the stage is missing or damaged.
        """
        if CHECKSUMS not in self.facts:
            self.facts[CHECKSUMS] = seal(self.run, self.stage)

    def complete(self) -> None:
        """Mark the stage as complete. All its files must be safe on the disk.

        Raises:
            StoreError, OSError: the errors of `seal`.
        """
        self.seal()
        self.run.end(self.stage, "complete", **self.facts, **self.run.origin(self.stage))


@contextmanager
def completing(run: RunDirectory, stage: StageId) -> Iterator[Work]:
    """Run the rest of `stage`, which is marked as running.

    The stage is marked as failed if the block raises, else as complete.
    """
    work, start = Work(run, stage), time.monotonic()
    with run.failing(stage):
        yield work
        work.facts["seconds"] = time.monotonic() - start
        work.seal()
    work.complete()


@contextmanager
def running(run: RunDirectory, stage: StageId, settings: Settings) -> Iterator[Work]:
    """Run all of `stage` with `settings`.

    Raises:
        OSError: existing files may not be replaced. Nothing was changed.
    """
    check_stages(run.path, stage)
    run.begin(stage, settings)
    with completing(run, stage) as work:
        yield work
