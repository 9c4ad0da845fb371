"""What each row counts with, by method: from the per-step tables of the store, and which row of a sample is its last."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.schedule import step_weights
from hydra_pipe.plan.parts import ends_of
from hydra_pipe.reduction.methods import Method
from hydra_pipe.store import names
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.rows import check_within

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# of which samples and steps are read at once
_ROWS = 2**20


@dataclass(frozen=True)
class StepWeights:
    """A weight for each step, once for each distinct history.

    Args:
        values: shape (step, series), float64.
        series: of each block, shape (block,).
    """

    values: NDArray[np.float64]
    series: NDArray[np.int64]

    def of_rows(self, steps: Ints, scale: Floats) -> Floats:
        """Weight of each block in each row: the step's, times the row's scale. Shape (row, block), float32."""
        weights: Floats = (self.values[np.ix_(steps, self.series)] * scale).astype(np.float32)
        return weights


def row_weights(gradients: Gradients, method: Method) -> StepWeights:
    """What the rows of each step count with.

    c(t) r(i, t) is the sample's share of the gradient that the optimiser used, so c(t) |B_t| r(i, t) is the sample's own gradient,
    with |B_t| the rows of the step (of all processes, of whose gradients the mean was taken: c says that too).

        hydra                           - alpha(t) c(t)
        tracin                          eta(t) c(t)
        self, of squared norms          eta(t) c(t)^2 |B_t|
        methods of the last rows        c(t) |B_t|
    """
    schedule, series = gradients.schedules()
    scale = gradients.step_table(names.GRADIENT_SCALE)[:, None]
    if method.keeps:
        return StepWeights(-step_weights(schedule) * scale, series)
    rows = gradients.rows_of_steps()[1].sum(axis=1)[:, None]
    if method.last_rows:
        return StepWeights(scale * rows, np.zeros_like(series))
    rate = schedule.learning_rate * schedule.updated
    return StepWeights(rate * scale if method.of_tests else rate * scale**2 * rows, series)


def checkpoint_of_steps(checkpoints: Ints, steps: Ints) -> Ints:
    """Which test checkpoint is used for each step: the nearest; of two as near, the later.

    Step t moves the parameters from what they were after t steps to what they are after t + 1: of two checkpoints as far from
    the former, the later one is nearer to the latter.

    Args:
        checkpoints: numbers of steps after which test gradients were taken, ascending, shape (checkpoint,).
        steps: shape (step,).

    Returns:
        Places in `checkpoints`, shape (step,).
    """
    # the first step for which the later of two neighbours is used: t - earlier >= later - t
    bounds = (checkpoints[:-1] + checkpoints[1:] + 1) // 2
    return np.searchsorted(bounds, steps, side="right").astype(np.int64)


def last_rows(gradients: Gradients, n_samples: int) -> Ints:
    """The last row of each training sample, ascending; none of samples that have no row.

    Of rows of the same step, which several processes or a sampler that repeats samples may give, that which is stored last counts.

    Raises:
        StoreError: damaged.
    """
    row_of: Ints = np.full(n_samples, -1, np.int64)
    step_of: Ints = np.full(n_samples, -1, np.int64)
    start = 0
    for end in ends_of(gradients.rows.part_rows):
        for low in range(start, end, _ROWS):
            rows = slice(low, min(low + _ROWS, end))
            samples, steps = gradients.samples(rows), gradients.step_of_rows(rows)
            check_within(samples, n_samples, f"samples of {gradients.path}")
            # steps of one part never decrease: of a sample's rows, the last that is written here stays
            later = steps >= step_of[samples]
            row_of[samples[later]] = np.arange(rows.start, rows.stop)[later]
            step_of[samples[later]] = steps[later]
        start = end
    return np.sort(row_of[row_of >= 0])
