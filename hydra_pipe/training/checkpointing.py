"""Checkpoints of a pipeline's training: when they are taken, what they hold, how training resumes.

A checkpoint and the recorded rows agree. The recorder first puts its rows on the disk. Then the
checkpoint is written, with the number of these rows. When training resumes from a checkpoint, the
rows recorded after the checkpoint are discarded.

A checkpoint is taken only where the recorder writes its rows anyway (`Recorder.flushes_before`). So
the run is the same byte for byte, whenever checkpoints were taken.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_pipe.errors import HydraError, InterruptedRunError, StoreError, UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.recording.randomness import random_state, restore_random_state
from hydra_pipe.recording.recorder import Recorder
from hydra_pipe.store.data.checkpoints import (
    KEPT,
    checkpoints_in,
    remove_checkpoints,
    save_checkpoint,
)
from hydra_pipe.store.data.save_interval import is_due
from hydra_pipe.training.interruption import StopRequest
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.units import parse_seconds

VERSION = 1
# Upper bound for the part of a checkpoint beside its tensors: their names, three generators, the
# recorder's state.
_BESIDE_BYTES = 2**17


@dataclass
class Place:
    """The position of training.

    Args:
        epoch: number of the present epoch.
        step: number of the next step within the epoch.
        epoch_loss: summed losses of the epoch's samples so far.
        last_loss: mean loss of the samples of the epoch before.
        labels: integer targets of the training samples, as training met them; None if targets are
            not integers.
    """

    epoch: int
    step: int
    epoch_loss: float
    last_loss: float
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Interval:
    """The time or number of steps between two checkpoints.

    Args:
        steps: least number of steps between two checkpoints; None: `seconds` decides.
        seconds: least seconds between two checkpoints; None: the default, see
            store/data/save_interval.py.
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Interval":
        """Parse "500" as steps, and "10min", "30s" or "2h" as a time; None gives the default.

        Raises:
            UsageError: the text is neither steps nor a time.
        """
        if text is None:
            return cls()
        if text.isdecimal() and int(text) > 0:
            return cls(steps=int(text))
        seconds = parse_seconds(text)
        if seconds is None:
            raise UsageError(
                f"--checkpoint-every {text}: give a number of steps, such as 500, or a time, "
                "such as 30s, 10min or 2h"
            )
        return cls(seconds=seconds)

    def due(self, steps: int, seconds: float, cost: float) -> bool:
        """Tell whether a checkpoint is due.

        Args:
            steps: steps since the last checkpoint.
            seconds: seconds since the last checkpoint.
            cost: seconds that the last checkpoint took.
        """
        if self.steps is not None:
            return steps >= self.steps
        return is_due(seconds, cost) if self.seconds is None else seconds >= self.seconds


class Checkpoints:
    """Takes the checkpoints of a training.

    Args:
        directory: directory of the checkpoints.
        pipeline: the pipeline in training.
        recorder: recorder of the training.
        interval: time or steps between two checkpoints.
        stop: request to stop, set by a signal.
        progress: receiver of messages.
        anew: if True, existing checkpoints are ignored and training begins at the first step.
    """

    def __init__(
        self,
        directory: Path,
        pipeline: Pipeline,
        recorder: Recorder,
        interval: Interval,
        stop: StopRequest,
        progress: Progress,
        *,
        anew: bool,
    ) -> None:
        self._directory, self._pipeline, self._recorder = directory, pipeline, recorder
        self._interval, self._stop, self._progress = interval, stop, progress
        self._anew = anew
        # steps in the newest checkpoint, the moment it was taken, and the seconds it took
        self.step = 0
        self._at, self._cost = time.monotonic(), 0.0
        # seconds that all checkpoints took
        self.seconds = 0.0
        self._usable = True

    def resume(self) -> Place | None:
        """Restore the newest good checkpoint.

        Returns:
            The position of training; None if there is no good checkpoint, so that training begins
            anew.
        """
        for checkpoint in checkpoints_in(self._directory) if not self._anew else []:
            try:
                state = checkpoint.read()
                if state.get("version") != VERSION:
                    raise StoreError(
                        f"{checkpoint.path} is of version {state.get('version')}, not {VERSION}"
                    )
                place = self._restored(state)
            except HydraError as error:
                self._progress.say(f"passed over: {error}")
                continue
            remove_checkpoints(self._directory, after=checkpoint.step)
            self.step = checkpoint.step
            self._progress.say(f"resuming after step {checkpoint.step:,} (epoch {place.epoch + 1})")
            return place
        return None

    def _restored(self, state: dict[str, Any]) -> Place:
        pipeline = self._pipeline
        # The recorder first: it may refuse the state, and then nothing has been changed.
        self._recorder.load_state_dict(state["recorder"])
        pipeline.model.load_state_dict(state["model"])
        pipeline.optimizer.load_state_dict(state["optimizer"])
        if pipeline.scheduler is not None:
            pipeline.scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])
        labels = state["labels"]
        return Place(
            int(state["epoch"]),
            int(state["step"]),
            float(state["epoch_loss"]),
            float(state["last_loss"]),
            None if labels is None else labels.numpy(),
        )

    def after_step(self, place: Place, next_batch: int | None) -> None:
        """Take a checkpoint if one is due and the recorder's buffer is empty at this point.

        Args:
            place: position of training.
            next_batch: number of samples of the next step; None after the last step.

        Raises:
            InterruptedRunError: a signal asked to stop; the checkpoint has been taken.
        """
        due = self._usable and self._interval.due(
            self._recorder.n_steps - self.step, time.monotonic() - self._at, self._cost
        )
        if not due and self._stop.number is None:
            return
        if next_batch is not None and not self._recorder.flushes_before(next_batch):
            return
        if self._usable:
            self._take(place)
        if self._stop.number is not None:
            raise self._interrupted(f"after step {self._recorder.n_steps:,}")

    def most_bytes(self) -> int:
        """Return the most bytes that checkpoints take on the disk, with one that is being written.

        Call this after the first step: only then does the optimiser hold its state.
        """
        model, optimizer = self._pipeline.model.state_dict(), self._pipeline.optimizer
        held = [
            *model.values(),
            *(value for state in optimizer.state.values() for value in state.values()),
        ]
        one = sum(
            value.numel() * value.element_size()
            for value in held
            if isinstance(value, torch.Tensor)
        )
        return (KEPT + 1) * (one + _BESIDE_BYTES)

    def raise_if_stopped(self) -> None:
        """Stop after training, if a signal asked to stop. Raises: InterruptedRunError."""
        if self._stop.number is not None:
            raise self._interrupted("while taking test gradients")

    def _interrupted(self, when: str) -> InterruptedRunError:
        assert self._stop.number is not None
        where = (
            f"to resume after step {self.step:,}"
            if self.step
            else "to start again, there is no checkpoint"
        )
        return InterruptedRunError(
            f"stopped by {self._stop.name} {when}: run the same command again {where}",
            self._stop.number,
        )

    def _take(self, place: Place) -> None:
        start = time.monotonic()
        pipeline = self._pipeline
        state = {
            "version": VERSION,
            "recorder": self._recorder.state_dict(),
            "model": pipeline.model.state_dict(),
            "optimizer": pipeline.optimizer.state_dict(),
            "scheduler": pipeline.scheduler.state_dict()
            if pipeline.scheduler is not None
            else None,
            "random": random_state(),
            "epoch": place.epoch,
            "step": place.step,
            "epoch_loss": place.epoch_loss,
            "last_loss": place.last_loss,
            "labels": None if place.labels is None else torch.from_numpy(place.labels),
        }
        try:
            save_checkpoint(self._directory, self._recorder.n_steps, state)
        except StoreError as error:
            self._usable = False
            self._progress.say(
                "no checkpoints are taken, and an interrupted run starts again: the state of "
                "the model, the optimizer or the "
                f"scheduler is {error}"
            )
            return
        self.step, self._at = self._recorder.n_steps, time.monotonic()
        self._cost = self._at - start
        self.seconds += self._cost
