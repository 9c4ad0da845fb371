"""Principal directions against NumPy in float64, and the choice of sides against trying all."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.maths.principal import chosen_sides, principal_directions


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9), (1, 5), (5, 1)])
def test_directions_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal(shape) @ np.diag(0.7 ** np.arange(shape[1]))
    energies, directions = principal_directions(rows.astype(np.float32), 99)
    _, values, expected = np.linalg.svd(rows, full_matrices=False)
    n = len(energies)
    assert n == min(shape)
    np.testing.assert_allclose(energies, values**2, rtol=1e-3, atol=1e-6 * values[0] ** 2)
    np.testing.assert_allclose(directions.T @ directions, np.eye(n), atol=1e-5)
    # the span of the first directions, whatever their signs
    for k in range(1, min(n, 6)):
        own, other = directions[:, :k] @ directions[:, :k].T, expected[:k].T @ expected[:k]
        np.testing.assert_allclose(own, other, atol=1e-3)


def test_rows_without_energy_have_no_direction() -> None:
    for shape in ((3, 5), (5, 3), (0, 4)):
        energies, directions = principal_directions(np.zeros(shape, np.float32), 9)
        assert energies.shape == (0,)
        assert directions.shape == (shape[1], 0)
    rank_two = np.random.default_rng(0).standard_normal((30, 2)).astype(np.float32) @ np.eye(
        2, 20, dtype=np.float32
    )
    assert len(principal_directions(rank_two, 9)[0]) == 2
    assert principal_directions(rank_two, 1)[1].shape == (20, 1)


spectra = st.lists(st.floats(1e-3, 1), min_size=1, max_size=4).map(lambda v: np.sort(v)[::-1])


def balanced(sides: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Both sides of an outer product have the energy of the product."""
    return tuple(side / side.sum() * sides[0].sum() for side in sides)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(spectra, min_size=1, max_size=2).map(balanced), min_size=1, max_size=2),
    st.lists(st.integers(1, 12), min_size=1, max_size=3).map(sorted),
)
def test_sides_fit_their_budget_and_hold_nearly_the_most_energy(
    energies: list[tuple[np.ndarray, ...]], budgets: list[int]
) -> None:
    found = chosen_sides(energies, budgets)

    def energy(taken: list[tuple[int, ...]]) -> float:
        return sum(
            prod(side[:n].sum() for side, n in zip(sides, own, strict=True))
            / sides[0].sum() ** (len(sides) - 1)
            for sides, own in zip(energies, taken, strict=True)
        )

    ways = [list(product(*(range(len(side) + 1) for side in sides))) for sides in energies]
    previous = [(0,) * len(sides) for sides in energies]
    for budget, taken in zip(budgets, found, strict=True):
        columns = sum(map(prod, taken))
        assert columns <= budget
        assert all(
            a <= b for x, y in zip(previous, taken, strict=True) for a, b in zip(x, y, strict=True)
        )
        best = max(
            energy(list(way)) for way in product(*ways) if sum(prod(own) for own in way) <= budget
        )
        # one by one is not the best way, and not far from it
        assert energy(taken) >= 0.5 * best
        previous = taken


def test_the_next_direction_is_that_with_most_energy_for_each_column() -> None:
    outer = (np.array([6.0, 3.0, 1.0]), np.array([8.0, 1.0, 1.0]))
    vector = (np.array([3.0, 0.5]),)
    taken = [chosen_sides([outer, vector], [budget])[0] for budget in range(6)]
    # 4.8 for one column; then 3 for a column of the vector; then 2.4, 0.8 for one column each
    assert taken == [
        [(0, 0), (0,)],
        [(1, 1), (0,)],
        [(1, 1), (1,)],
        [(2, 1), (1,)],
        [(3, 1), (1,)],
        [(3, 1), (2,)],
    ]
