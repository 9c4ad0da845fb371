"""The weight of each row, from the store's per-step tables, and the last row of each sample."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.schedule import step_weights
from hydra_pipe.plan.rank_rows import ends_of
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.types import F32, I64

# number of rows whose samples and steps are read at once
_ROWS = 2**20


@dataclass(frozen=True)
class StepWeights:
    """A weight for each step and series. Blocks with the same history share a series.

    Args:
        values: weight of each step in each series, shape (step, series), float64.
        series: series of each block, shape (block,), int64.
    """

    values: NDArray[np.float64]
    series: NDArray[np.int64]

    def of_rows(self, steps: I64, scale: F32) -> F32:
        """Return the weight of each block in each row: the step's weight times the row's scale.

        Args:
            steps: step of each row, shape (row,), int64.
            scale: scale of each block in each row, shape (row, block).

        Returns:
            Shape (row, block), float32.
        """
        weights: F32 = (self.values[np.ix_(steps, self.series)] * scale).astype(np.float32)
        return weights


# c(t) r(i, t) is the sample's part of the gradient that the optimiser used. So c(t) |B_t| r(i, t)
# is the sample's own gradient. |B_t| counts the rows of the step over all processes. The mean over
# the gradients of the processes is part of c.


def hydra_weights(gradients: Gradients) -> StepWeights:
    """Return - alpha(t) c(t), from the Hessian-free sweep on scalars."""
    schedule, series = gradients.schedules()
    return StepWeights(-step_weights(schedule) * _scales(gradients), series)


def tracin_weights(gradients: Gradients) -> StepWeights:
    """Return eta(t) c(t), with the step's learning rate eta."""
    rate, series = _rates(gradients)
    return StepWeights(rate * _scales(gradients), series)


def self_weights(gradients: Gradients) -> StepWeights:
    """Return eta(t) c(t)^2 |B_t|, the weight of squared norms of rows."""
    rate, series = _rates(gradients)
    return StepWeights(rate * _scales(gradients) ** 2 * _batch_sizes(gradients), series)


def used_weights(gradients: Gradients) -> StepWeights:
    """Return c(t), which makes a row the sample's part of the gradient that the step used.

    The weight is 0 where the step did not update the series.
    """
    schedule, series = gradients.schedules()
    return StepWeights(schedule.updated * _scales(gradients), series)


def gradient_weights(gradients: Gradients) -> StepWeights:
    """Return c(t) |B_t|, which makes a row the sample's own gradient."""
    _, series = gradients.schedules()
    return StepWeights(_scales(gradients) * _batch_sizes(gradients), np.zeros_like(series))


def _scales(gradients: Gradients) -> NDArray[np.float64]:
    """Return c(t), shape (step, 1), float64."""
    return gradients.step_table(names.GRADIENT_SCALE)[:, None]


def _batch_sizes(gradients: Gradients) -> NDArray[np.int64]:
    """Return |B_t|, shape (step, 1), int64."""
    sizes: NDArray[np.int64] = gradients.rows_of_steps()[1].sum(axis=1)[:, None]
    return sizes


def _rates(gradients: Gradients) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the learning rate of each step, and the series of each block.

    The rates have shape (step, series), float64. A rate is 0 if the step did not update the series.
    """
    schedule, series = gradients.schedules()
    return schedule.learning_rate * schedule.updated, series


@dataclass(frozen=True)
class RowUse:
    """Rows that a method uses, and their weights.

    Args:
        weigh: function that returns the weights of the steps. It must be a function of a module,
            because other processes find it by its name.
        last: True if only the last row of each sample is used.
        cosine: True if rows and test gradients are divided by their norms.
    """

    weigh: Callable[[Gradients], StepWeights]
    last: bool = False
    cosine: bool = False


def checkpoint_of_steps(checkpoints: I64, steps: I64) -> I64:
    """Return the test checkpoint that each step uses: the nearest one, and the later one on a tie.

    Step t moves the parameters from their state after t steps to their state after t + 1 steps. If
    two checkpoints are equally far from the first state, the later one is nearer to the second.

    Args:
        checkpoints: numbers of steps after which test gradients were taken, ascending, shape
            (checkpoint,), int64.
        steps: numbers of the steps, shape (step,), int64.

    Returns:
        Places in `checkpoints`, shape (step,).
    """
    # first step that uses the later of two neighbouring checkpoints: t - earlier >= later - t
    bounds = (checkpoints[:-1] + checkpoints[1:] + 1) // 2
    return np.searchsorted(bounds, steps, side="right").astype(np.int64)


def last_rows(gradients: Gradients, n_samples: int) -> I64:
    """Return the last row of each training sample, ascending. Samples without rows are left out.

    A sample may have several rows in a step: from several processes, or from a sampler that repeats
    samples. The row that is stored last then counts.

    Raises:
        StoreError: the recording is damaged.
    """
    row_of: I64 = np.full(n_samples, -1, np.int64)
    step_of: I64 = np.full(n_samples, -1, np.int64)
    start = 0
    for end in ends_of(gradients.rows.part_rows):
        for low in range(start, end, _ROWS):
            rows = slice(low, min(low + _ROWS, end))
            samples, steps = gradients.samples(rows), gradients.step_of_rows(rows)
            check_within(samples, n_samples, f"samples of {gradients.path}")
            # steps of one part never decrease, so the last row assigned here is the sample's last
            later = steps >= step_of[samples]
            row_of[samples[later]] = np.arange(rows.start, rows.stop)[later]
            step_of[samples[later]] = steps[later]
        start = end
    return np.sort(row_of[row_of >= 0])
