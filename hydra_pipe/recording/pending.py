"""Steps that are taken but not written yet: their rows wait, to be checked and written together."""

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import isnan, nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.dynamics import DynamicsWatch
from hydra_pipe.recording.micro_batches import Mixture
from hydra_pipe.recording.optimizer_reader import OptimizerReader
from hydra_pipe.recording.recording_stage import RecordingStage
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.recording.step_sync import StepSync
from hydra_pipe.recording.transfer import to_host
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import DynamicsShape
from hydra_pipe.types import F32


@dataclass
class StepNote:
    """A note on the present step, which the loop may fill in.

    Args:
        loss: mean loss of the batch, kept in the step table. nan: the mean of the samples' losses,
            if they are known.
    """

    loss: float = nan


def _mean_loss(note: StepNote, losses: F32) -> float:
    """Return the mean loss of a step: what the loop set, or else the mean of the rows' losses."""
    return float(losses.mean(dtype=np.float64)) if isnan(note.loss) else note.loss


class PendingSteps:
    """Takes each step just before the update, and writes the step a few steps later.

    Args:
        collector: collector of the rows.
        updates: reader of the optimiser's updates.
        curvature: source of the rows' curvature weights and losses.
        dynamics: source of the rows' logits and last inputs.
        sync: agreement with other processes on the steps.
        output: destination of the steps.
    """

    def __init__(
        self,
        collector: Collector,
        updates: OptimizerReader,
        curvature: CurvatureWatch,
        dynamics: DynamicsWatch,
        sync: StepSync,
        output: RecordingStage,
    ) -> None:
        self._collector, self._updates, self._curvature = collector, updates, curvature
        self._sync, self._output, self._dynamics = sync, output, dynamics
        #: steps taken, including the steps before a resume
        self.n_steps = 0
        # rows of the waiting steps, and the other values of their lines in the step tables
        self._buffer: RowBuffer | None = None
        self._lines: list[tuple[StepNote, F32, dict[str, Any]]] = []

    def resume(self, n_steps: int) -> None:
        """Resume after `n_steps` steps that are written."""
        self.n_steps = n_steps

    def add(self, samples: NDArray[np.int64], mixture: Mixture | None, note: StepNote) -> None:
        """Take the step that the optimiser is about to take.

        The first step is checked at once, if this process may flush alone. A refusal of this step
        then comes before anything is written.

        Args:
            samples: ids of the step's samples, shape (batch,).
            mixture: shares of other samples in the rows; None: each row is its sample's own.
            note: note of the step; its loss is read when the step is written.

        Raises:
            RecordError: nothing has a gradient, or the passes did not cover the samples.
            LayerError: a factored block no longer has one position a sample.
            HydraError: an error of `flush`, in one of the waiting steps.
        """
        gradients = self._updates.gradients(self.n_steps)
        shares = None if mixture is None else mixture.places
        outputs = self._collector.outputs
        of_loss = self._curvature.observe(outputs, samples, shares)
        n_rows = len(of_loss.losses)
        seen = self._dynamics.observe(outputs, n_rows, mixed=mixture is not None)
        if mixture is not None:
            samples = np.concatenate([samples, mixture.partners])
        if (
            self._sync.flushes_at_will
            and self._buffer is not None
            and not self._buffer.fits(len(samples))
        ):
            self.flush()
        columns = {
            names.SAMPLE: samples,
            names.STEP: np.full(len(samples), self.n_steps),
            names.CURVATURE: of_loss.curvature,
            names.LOSS: of_loss.losses,
            names.TARGET: of_loss.targets,
            **seen,
        }
        when = f"at step {self.n_steps}"
        self._buffer = self._collector.add_to(self._buffer, gradients, columns, when, at_step=True)
        settings = self._updates.settings(gradients) | {names.N_ROWS: len(samples)}
        self._lines.append((note, of_loss.losses, settings))
        self.n_steps += 1
        if self._sync.flushes_at_will and self._output.writer is None:
            self.flush()

    def flush(self) -> None:
        """Check and write the waiting steps. Collective.

        Raises:
            NonFiniteError, GradientMismatchError, RecordError: the first step that cannot be
            recorded.
            RunError: the run is recorded by a later recorder.
            StoreError: writing failed.
        """
        # first: it may call the user's loss, which may raise; the steps are good all the same
        self._fill_columns()
        lines = [(_mean_loss(note, losses), values) for note, losses, values in self._lines]
        self._lines = []
        with torch.no_grad():
            checked, agreed, error = self._sync.synchronize(self._buffer, lines)
            if self._buffer is not None and checked is not None and checked.entries:
                assert self._collector.dtype is not None  # it was chosen with the layout
                shape = self._dynamics.shape or DynamicsShape()
                writer = self._output.open(self._buffer.layout, self._collector.dtype, shape)
                self._dynamics.shape = writer.dynamics
                with self._sync.holding():
                    self._output.write(writer, self._buffer, checked, agreed)
        if error is not None:
            raise error

    def save(self) -> None:
        """Write the good steps after an error, if this process may flush alone. Never raise."""
        # Report the first error only. The disk may fail here too, and so may the user's loss, which
        # finish() calls.
        with suppress(Exception):
            self._fill_columns()
        if self._sync.flushes_at_will:
            with suppress(Exception):
                self.flush()

    def _fill_columns(self) -> None:
        """Fill in what is known of the rows beside their gradients. The host waits once."""
        of_loss, of_outputs = self._curvature.take(), self._dynamics.take()
        of_updates = self._updates.take()
        buffer = self._buffer if self._lines else None
        of_rows = [] if buffer is None else buffer.prepare()
        found = iter(to_host([*of_loss, *of_outputs, *of_updates, *of_rows]))
        shares = [list(islice(found, len(own))) for own in (of_loss, of_outputs, of_updates)]
        if buffer is not None:
            buffer.accept(list(found))
        self._updates.fill(shares[2])
        self._dynamics.fill(shares[1])
        # last: it may call the user's loss, which may raise
        self._curvature.fill(shares[0])

    def begin_anew(self) -> None:
        """Group the steps to come as if no step had come before.

        The grouping matters: steps that are checked together decide how sums are rounded.
        """
        self._buffer = None

    def flushes_before(self, batch: int) -> bool:
        """Tell whether nothing waits when a step of `batch` samples comes.

        Nothing waits if the buffer is empty, or if it has no room for the step and is flushed
        first.
        """
        return self._buffer is None or not self._lines or not self._buffer.fits(batch)
