"""What each row counts with, from the per-step tables of the store; and which row of a sample is its last."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.schedule import step_weights
from hydra_pipe.plan.parts import ends_of
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


# c(t) r(i, t) is the sample's share of the gradient that the optimiser used, so c(t) |B_t| r(i, t) is the sample's own
# gradient, with |B_t| the rows of the step (of all processes, of whose gradients the mean was taken: c says that too).


def hydra_weights(gradients: Gradients) -> StepWeights:
    """- alpha(t) c(t), of the Hessian-free sweep on scalars."""
    schedule, series = gradients.schedules()
    return StepWeights(-step_weights(schedule) * _scales(gradients), series)


def tracin_weights(gradients: Gradients) -> StepWeights:
    """eta(t) c(t): the step's learning rate."""
    rate, series = _rates(gradients)
    return StepWeights(rate * _scales(gradients), series)


def self_weights(gradients: Gradients) -> StepWeights:
    """eta(t) c(t)^2 |B_t|, of squared norms of rows."""
    rate, series = _rates(gradients)
    return StepWeights(rate * _scales(gradients) ** 2 * _batch_sizes(gradients), series)


def gradient_weights(gradients: Gradients) -> StepWeights:
    """c(t) |B_t|, which makes a row the sample's own gradient."""
    _, series = gradients.schedules()
    return StepWeights(_scales(gradients) * _batch_sizes(gradients), np.zeros_like(series))


def _scales(gradients: Gradients) -> NDArray[np.float64]:
    """c(t), shape (step, 1)."""
    return gradients.step_table(names.GRADIENT_SCALE)[:, None]


def _batch_sizes(gradients: Gradients) -> NDArray[np.int64]:
    """|B_t|, shape (step, 1)."""
    sizes: NDArray[np.int64] = gradients.rows_of_steps()[1].sum(axis=1)[:, None]
    return sizes


def _rates(gradients: Gradients) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Learning rate of each step that updated a series, shape (step, series); the series of each block."""
    schedule, series = gradients.schedules()
    return schedule.learning_rate * schedule.updated, series


@dataclass(frozen=True)
class RowUse:
    """Which rows a method uses, and what each counts with.

    Args:
        weigh: weight of the rows of each step. A function of a module, which other processes find by its name.
        last: whether the last row of each sample is used, and no other.
        cosine: whether rows and test gradients are divided by their norms.
    """

    weigh: Callable[[Gradients], StepWeights]
    last: bool = False
    cosine: bool = False


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
