"""Steps that are taken and not written yet: their rows wait, and are checked and written several at once."""

from contextlib import suppress
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.joint import StepSync
from hydra_pipe.recording.output import Output
from hydra_pipe.recording.portions import Mixture
from hydra_pipe.recording.slab import Slab
from hydra_pipe.recording.update import UpdateReader
from hydra_pipe.store import names


@dataclass
class StepNote:
    """What the loop may say of the step it is in.

    Args:
        loss: mean loss of the batch, kept in the step table; not a number where the loop does not say.
    """

    loss: float = nan


class PendingSteps:
    """Takes each step when the optimiser is about to act, and writes it a few steps later.

    Args:
        collector: of the rows.
        updates: of the optimiser.
        curvature: of the rows.
        sync: agrees with other processes on the steps.
        output: where the steps go.
    """

    def __init__(
        self, collector: Collector, updates: UpdateReader, curvature: CurvatureWatch, sync: StepSync, output: Output
    ) -> None:
        self._collector, self._updates, self._curvature = collector, updates, curvature
        self._sync, self._output = sync, output
        #: steps taken, those of earlier processes included
        self.n_steps = 0
        # rows of the steps that wait, and what else their lines of the step tables hold
        self._slab: Slab | None = None
        self._lines: list[tuple[StepNote, dict[str, Any]]] = []

    def go_on(self, n_steps: int) -> None:
        """Go on after `n_steps` steps that are written."""
        self.n_steps = n_steps

    def add(self, samples: NDArray[np.int64], mixture: Mixture | None, note: StepNote) -> None:
        """Take the step that the optimiser is about to take.

        A first step is checked at once, where this process may: what it would refuse has to be refused before
        anything is written.

        Args:
            samples: ids of the step's samples, shape (batch,).
            mixture: how the rows are shared out; None: each is its sample's own.
            note: the loss is read from it when the step is written.

        Raises:
            RecordError: nothing has a gradient, or the passes did not cover the samples.
            LayerError: a factored block no longer has one position a sample.
            HydraError: as in `flush`, of the steps that wait.
        """
        gradients = self._updates.gradients(self.n_steps)
        shares = None if mixture is None else mixture.places
        curvature = self._curvature.see(self._collector.outputs, samples, shares)
        if mixture is not None:
            samples = np.concatenate([samples, mixture.partners])
        if self._sync.flushes_at_will and self._slab is not None and not self._slab.fits(len(samples)):
            self.flush()
        columns = {
            names.SAMPLE: samples,
            names.STEP: np.full(len(samples), self.n_steps),
            names.CURVATURE: curvature,
        }
        when = f"at step {self.n_steps}"
        self._slab = self._collector.add_to(self._slab, gradients, columns, when, at_step=True)
        self._lines.append((note, self._updates.settings(gradients) | {names.N_ROWS: len(samples)}))
        self.n_steps += 1
        if self._sync.flushes_at_will and self._output.writer is None:
            self.flush()

    def flush(self) -> None:
        """Check and write the steps that wait; several ranks meet here.

        Raises:
            NonFiniteError, BooksError, RecordError: of the first step that cannot be recorded.
            RunError: the run is recorded by a later recorder.
            StoreError: writing failed.
        """
        self._curvature.settle()  # first: it may call a loss of the user's, which may raise, and the steps are good all the same
        lines = [(note.loss, values) for note, values in self._lines]
        self._lines = []
        with torch.no_grad():
            checked, agreed, error = self._sync.meet(self._slab, lines)
            if self._slab is not None and checked is not None and checked.entries:
                assert self._collector.dtype is not None  # it was chosen with the layout
                writer = self._output.open(self._slab.layout, self._collector.dtype)
                with self._sync.holding():
                    self._output.write(writer, self._slab, checked, agreed)
        if error is not None:
            raise error

    def save(self) -> None:
        """Write what is good after an error, if this process may do so by itself; nothing is raised."""
        # the first error is the one to tell, whatever comes of a disk, or of the user's loss that is called here
        with suppress(Exception):
            self._curvature.settle()
        if self._sync.flushes_at_will:
            with suppress(Exception):
                self.flush()

    def begin_anew(self) -> None:
        """Put the steps to come together as if none had come before: which are checked together decides how sums are rounded."""
        self._slab = None

    def rests_before(self, batch: int) -> bool:
        """Tell whether nothing waits once a step of `batch` samples comes, for there is no room for it before a flush."""
        return self._slab is None or not self._lines or not self._slab.fits(batch)
