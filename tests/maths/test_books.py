"""What the books notice, and what they take for the one scalar that they allow."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_pipe.maths import gradient_check as maths

# what the recorder takes for rounding in a float32 model
LIMIT = 1e-4
SIZES = st.lists(st.integers(2, 9), min_size=2, max_size=5)


@dataclass
class OfStep:
    """The balance of one step: a scalar, and the imbalance of each block."""

    scalar: float
    imbalance: np.ndarray


def as_arrays(
    expected: list[Tensor], actual: list[Tensor], magnitude: np.ndarray
) -> tuple[np.ndarray, ...]:
    sums, grads = (torch.cat(vectors).double().numpy()[None] for vectors in (expected, actual))
    starts = np.cumsum([0, *(len(vector) for vector in expected[:-1])])
    return sums, grads, starts, magnitude[None], torch.finfo(expected[0].dtype).eps


def balance(
    expected: list[Tensor], actual: list[Tensor], magnitude: np.ndarray, scalar: float | None = None
) -> OfStep:
    books = maths.balance(*as_arrays(expected, actual, magnitude), scalar)
    return OfStep(float(books.scalar[0]), books.imbalance[0])


def best_explained(
    expected: list[Tensor], actual: list[Tensor], magnitude: np.ndarray, limit: np.ndarray
) -> OfStep:
    books = maths.best_explained(*as_arrays(expected, actual, magnitude), limit)
    return OfStep(float(books.scalar[0]), books.imbalance[0])


@dataclass
class Step:
    """Rows of each block, shape (batch, size), float32."""

    rows: list[Tensor]

    @property
    def expected(self) -> list[Tensor]:
        return [rows.sum(0) for rows in self.rows]

    @property
    def magnitude(self) -> np.ndarray:
        return np.array(
            [rows.double().abs().amax(1).sum().item() * rows.shape[1] ** 0.5 for rows in self.rows]
        )


def step_of(sizes: list[int], magnitudes: list[float], seed: int) -> Step:
    """Rows that do not cancel: about 1 in each element, times the block's magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return Step(
        [
            10.0**m * (1 + 0.5 * torch.randn(6, n, generator=generator))
            for n, m in zip(sizes, magnitudes, strict=False)
        ]
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    sizes = draw(SIZES)
    magnitudes = draw(st.lists(st.floats(-6, 3), min_size=len(sizes), max_size=len(sizes)))
    return step_of(sizes, magnitudes, draw(st.integers(0, 1000)))


def summed_otherwise(step: Step) -> list[Tensor]:
    """The same gradients as another order of summation rounds them."""
    return [rows.flip(0).double().sum(0).float() for rows in step.rows]


@settings(max_examples=100, deadline=None)
@given(
    step=steps(),
    scalar=st.one_of(st.floats(1e-6, 0.999), st.floats(1.001, 1e6)),
    sign=st.sampled_from([-1, 1]),
)
@example(step_of([3, 4], [0.0, 0.0], 0), 0.95, 1)
@example(step_of([3, 4], [0.0, 0.0], 0), 1.0001, 1)
def test_the_scalar_that_multiplies_all_of_the_gradient_is_recovered(
    step: Step, scalar: float, sign: int
) -> None:
    books = balance(
        step.expected, [sign * scalar * g for g in summed_otherwise(step)], step.magnitude
    )
    assert books.scalar == pytest.approx(sign * scalar, rel=1e-6)
    assert books.imbalance.max() < LIMIT / 100


@settings(max_examples=100, deadline=None)
@given(steps())
def test_the_scalar_is_exactly_1_where_nothing_was_scaled(step: Step) -> None:
    books = balance(step.expected, summed_otherwise(step), step.magnitude)
    assert books.scalar == 1.0
    assert books.imbalance.max() < LIMIT / 100


def test_a_scalar_of_0_balances() -> None:
    step = step_of([3, 4], [0.0, 0.0], 0)
    books = balance(step.expected, [torch.zeros(3), torch.zeros(4)], step.magnitude)
    assert books.scalar == 0.0
    assert books.imbalance.tolist() == [0.0, 0.0]


@settings(max_examples=150, deadline=None)
@given(step=steps(), scalar=st.sampled_from([1.0, 0.01, 300.0]), data=st.data())
def test_a_contribution_missing_from_any_one_block_is_noticed(
    step: Step, scalar: float, data: st.DataObject
) -> None:
    block = data.draw(st.integers(0, len(step.rows) - 1))
    missing = 0.05 * step.rows[block][0] * torch.linspace(-1, 1, step.rows[block].shape[1])
    actual = summed_otherwise(step)
    actual[block] = actual[block] + missing
    books = balance(step.expected, [scalar * g for g in actual], step.magnitude)
    assert books.imbalance.max() > LIMIT


@pytest.mark.parametrize("block", range(3))
def test_a_contribution_missing_from_one_of_equal_blocks_is_laid_to_that_block(block: int) -> None:
    step = step_of([5, 6, 7], [0.0, 0.0, 0.0], 0)
    actual = summed_otherwise(step)
    actual[block] = actual[block] + step.rows[block][0] * torch.linspace(-1, 1, len(actual[block]))
    assert balance(step.expected, actual, step.magnitude).imbalance.argmax() == block


def test_a_small_block_is_held_to_its_own_size() -> None:
    step = step_of([5, 6], [6.0, -6.0], 0)
    actual = summed_otherwise(step)
    actual[1] = 1.5 * actual[1]
    books = balance(step.expected, actual, step.magnitude)
    assert books.scalar == 1.0
    assert books.imbalance[0] < LIMIT / 100
    assert 0.1 < books.imbalance[1] < 0.5


def test_imbalance_is_the_missing_norm_over_the_summed_norms_of_the_rows() -> None:
    expected = [torch.tensor([100.0, 0.0]), torch.tensor([3.0, 4.0])]
    actual = [torch.tensor([100.0, 0.0]), torch.tensor([3.0, 4.0]) + torch.tensor([-4.0, 3.0])]
    books = balance(expected, actual, np.array([200.0, 20.0]))
    np.testing.assert_allclose(books.imbalance, [0.0, 5.0 / 20.0], atol=1e-12)


def test_a_block_scaled_by_itself_does_not_balance() -> None:
    step = step_of([5, 6], [0.0, 0.0], 0)
    first, second = summed_otherwise(step)
    assert balance(step.expected, [0.5 * first, second], step.magnitude).imbalance.max() > 0.1


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_gradient_beside_rows_that_are_all_zero_is_wholly_unaccounted_for(silent: int) -> None:
    step = step_of([3, 4, 5], [0.0, 0.0, 0.0], 0)
    actual = summed_otherwise(step)
    step.rows[silent].zero_()
    actual[silent] = 1e-9 * actual[silent]
    books = balance(step.expected, actual, step.magnitude)
    assert books.imbalance[silent] == pytest.approx(1.0)
    assert np.delete(books.imbalance, silent).max() < LIMIT


def test_a_gradient_where_no_row_has_anything_is_unaccounted_for() -> None:
    books = balance([torch.zeros(3)], [torch.tensor([0.0, 2.0, 0.0])], np.zeros(1))
    assert books.scalar == 1.0
    assert books.imbalance.tolist() == [1.0]


def test_a_gradient_beside_rows_that_cancel_is_noticed() -> None:
    books = balance([torch.zeros(2)], [torch.tensor([3.0, 4.0])], np.array([10.0]))
    assert books.imbalance.tolist() == [0.5]


def test_zero_rows_beside_zero_gradients_balance() -> None:
    books = balance(
        [torch.zeros(3), torch.ones(2)], [torch.zeros(3), torch.ones(2)], np.array([0.0, 2.0])
    )
    assert books.scalar == 1.0
    assert books.imbalance.tolist() == [0.0, 0.0]


def test_a_gradient_that_has_nothing_of_the_rows_in_it_is_noticed() -> None:
    # the best scalar is 0 then, and nothing is left of the rows to compare with
    books = balance([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])], np.array([1.0]))
    assert books.imbalance[0] > LIMIT


def test_a_gradient_that_is_not_a_number_does_not_balance() -> None:
    step = step_of([3, 4], [0.0, 0.0], 0)
    actual = summed_otherwise(step)
    actual[1][2] = torch.nan
    books = balance(step.expected, actual, step.magnitude)
    # as the recorder asks: anything but "within the limit"
    assert not bool((books.imbalance <= LIMIT).all())


@pytest.mark.parametrize("overflowed", [np.inf, np.nan])
def test_a_gradient_beside_norms_that_have_overflowed_does_not_balance(overflowed: float) -> None:
    step = step_of([3, 4], [1.0, 1.0], 0)
    actual = [step.expected[0] * 2.0 + torch.tensor([0.0, 1.0, 0.0]), step.expected[1]]
    imbalance = balance(
        step.expected, actual, np.array([overflowed, step.magnitude[1]]), 1.0
    ).imbalance
    assert not imbalance[0] <= LIMIT
    assert imbalance[1] <= LIMIT


def test_float64_rows_are_compared_in_float64() -> None:
    rows = torch.linspace(1, 2, 6, dtype=torch.float64)
    changed = rows * (1 + 1e-9 * torch.linspace(-1, 1, 6, dtype=torch.float64))
    imbalance = balance([rows], [changed], np.array([rows.norm().item()])).imbalance
    assert 1e-10 < imbalance[0] < 1e-9


def test_a_scalar_that_is_known_is_used_as_it_is() -> None:
    step = step_of([3, 4], [0.0, 0.0], 0)
    halves = [0.5 * g for g in summed_otherwise(step)]
    assert balance(step.expected, halves, step.magnitude, scalar=0.5).imbalance.max() < LIMIT / 100
    books = balance(step.expected, halves, step.magnitude, scalar=1.0)
    assert books.scalar == 1.0
    assert books.imbalance.min() > 0.1


@settings(max_examples=100, deadline=None)
@given(step=steps(), scalar=st.sampled_from([1.0, 0.01, 300.0]), data=st.data())
def test_the_best_explanation_lays_what_is_missing_to_the_block_that_misses_it(
    step: Step, scalar: float, data: st.DataObject
) -> None:
    # three blocks at least: of two, either may be the one that is off
    if len(step.rows) == 2:
        step.rows.append(step.rows[0].clone())
    block = data.draw(st.integers(0, len(step.rows) - 1))
    actual = [scalar * g for g in summed_otherwise(step)]
    # a weight that is used twice and seen once: in line with the rows, so that a least-squares
    # scalar would hide it
    actual[block] = actual[block] * data.draw(st.sampled_from([1.5, 2.0, 0.5]))
    limit = np.full(len(step.rows), LIMIT)
    books = best_explained(step.expected, actual, step.magnitude, limit)
    assert np.flatnonzero(books.imbalance > LIMIT).tolist() == [block]
    assert books.scalar == pytest.approx(scalar, rel=1e-5)


def test_the_best_explanation_of_books_that_balance_has_their_scalar() -> None:
    step = step_of([3, 4], [0.0, 0.0], 0)
    books = best_explained(
        step.expected, [0.5 * g for g in summed_otherwise(step)], step.magnitude, np.full(2, LIMIT)
    )
    assert books.scalar == pytest.approx(0.5, rel=1e-6)
    assert books.imbalance.max() < LIMIT


def test_the_steps_of_one_call_are_balanced_each_by_itself() -> None:
    steps = [step_of([3, 4], [0.0, -3.0], seed) for seed in range(3)]
    scalars = (1.0, 0.25, -7.0)
    actual = [
        [c * g for g in summed_otherwise(step)] for c, step in zip(scalars, steps, strict=True)
    ]
    actual[1][0] = 1.5 * actual[1][0]
    each = [
        as_arrays(step.expected, a, step.magnitude) for step, a in zip(steps, actual, strict=True)
    ]
    together = [
        np.concatenate(parts) for parts in zip(*((s, g, m) for s, g, _, m, _ in each), strict=True)
    ]
    books = maths.balance(together[0], together[1], each[0][2], together[2], each[0][4])
    for k, (sums, grads, starts, magnitude, eps) in enumerate(each):
        alone = maths.balance(sums, grads, starts, magnitude, eps)
        assert books.scalar[k] == pytest.approx(alone.scalar[0], rel=1e-12)
        assert books.imbalance[k] == pytest.approx(alone.imbalance[0], rel=1e-9, abs=1e-15)
    assert (books.imbalance.max(1) > LIMIT).tolist() == [False, True, False]


def test_gradients_below_the_least_normal_number_are_not_held_to_their_rounding() -> None:
    """One sum of vanishing terms keeps four units, and the other sum keeps one."""
    unit = 2.0**-149
    expected = [torch.ones(3), torch.tensor([0.0, 4 * unit])]
    actual = [torch.ones(3), torch.tensor([3 * unit, unit])]
    books = balance(expected, actual, np.array([3.0, 5 * unit]))
    assert books.scalar == 1.0
    assert books.imbalance.max() < LIMIT / 100
    # The squares of these vanish.
    books = balance([torch.full((2,), 1e-30)], [torch.full((2,), 2e-30)], np.zeros(1), 1.0)
    assert books.imbalance.max() < LIMIT / 100
    books = balance([torch.full((2,), 1e-18)], [torch.full((2,), 2e-18)], np.zeros(1), 1.0)
    assert books.imbalance.max() > LIMIT
