"""How a stage is worked on, so that a crash at any moment leaves a manifest that tells the truth (docs/architecture.md).

A stage is taken up by one process, which looks anew at what there is to do; it is marked as running before anything of it changes,
as failed where the work raises, and as complete when all that it has written is sealed and safe on the disk.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_pipe.progress import Progress
from hydra_pipe.store.checksums import seal
from hydra_pipe.store.files import replaced_directory
from hydra_pipe.store.listing import say_unlisted
from hydra_pipe.store.locks import one_writer
from hydra_pipe.store.permission import check_stages
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import CHECKSUMS, Settings, StageId


@contextmanager
def alone(run: RunDirectory, *stages: StageId) -> Iterator[None]:
    """A block in which this process alone writes `stages`, and knows what others have done to `run` until now.

    Raises:
        RunError: another process writes one of them.
    """
    with one_writer(run.path, *stages):
        run.refresh()
        yield


@contextmanager
def taken_up(run: RunDirectory, *stages: StageId, has_work: Callable[[], bool], progress: Progress) -> Iterator[bool]:
    """A block that works on `stages` of `run`, if there is anything to do; it is given whether there is.

    Args:
        run: the run.
        stages: all that the block writes.
        has_work: tells whether there is anything to do; asked again when this process is alone, for another may have done it.
        progress: told which files of `run` are not its own, before work begins beside them.

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
        facts: what the manifest is to say of the stage when it is complete; seconds and sources come by themselves.
    """

    run: RunDirectory
    stage: StageId
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where the stage writes."""
        return self.run.path / self.stage.area

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """A block that writes all files of the stage into a new directory, which then takes the place of what is there.

        Readers see the old files or the new ones, all of them of one writer.
        """
        with replaced_directory(self.place) as partial:
            yield partial
            self.facts[CHECKSUMS] = seal(self.run, self.stage, partial)

    def seal(self) -> None:
        """Write down the footprints of all that the stage has written, unless `replaced` has.

        Raises:
            StoreError, OSError: a file of the stage is missing or damaged.
        """
        if CHECKSUMS not in self.facts:
            self.facts[CHECKSUMS] = seal(self.run, self.stage)

    def complete(self) -> None:
        """Mark the stage as complete: all that it has written is safe on the disk. Raises: as `seal`."""
        self.seal()
        self.run.end(self.stage, "complete", **self.facts, **self.run.origin(self.stage))


@contextmanager
def completing(run: RunDirectory, stage: StageId) -> Iterator[Work]:
    """A block that does the rest of `stage`, which is marked as running: as failed where the block raises, else as complete."""
    work, start = Work(run, stage), time.monotonic()
    with run.failing(stage):
        yield work
        work.facts["seconds"] = time.monotonic() - start
        work.seal()
    work.complete()


@contextmanager
def running(run: RunDirectory, stage: StageId, settings: Settings) -> Iterator[Work]:
    """A block that does all of `stage` with `settings`.

    Raises:
        OSError: what is there may not be replaced; nothing was changed.
    """
    check_stages(run.path, stage)
    run.begin(stage, settings)
    with completing(run, stage) as work:
        yield work
