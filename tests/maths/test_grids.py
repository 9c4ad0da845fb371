"""Coordinates in grids: what they are a function of, that factors and rows agree, and what they do
to inner products.
"""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hydra_pipe.maths.grids import Grids
from hydra_pipe.per_sample.factors import Factors
from hydra_pipe.per_sample.registry import rule_for
from hydra_pipe.plan.layout import Block
from hydra_pipe.recording.encodings import Given, GridsOfElements

SIZES = st.integers(1, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def from_the_text(
    seed: int, name: str, sides: tuple[int, int], grid: tuple[int, int], k: int
) -> list[int]:
    """The elements of the columns, as docs/format.md has them."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{sides}\n{grid}".encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], np.uint64))
    n_grids = k // (grid[0] * grid[1])
    drawn = []
    for size, of in zip(grid, sides, strict=True):
        left = [list(range(of)) for _ in range(n_grids)]
        lines: list[list[int]] = [[] for _ in range(n_grids)]
        for _ in range(size):
            words = [int(word) for word in philox.random_raw(n_grids)]
            for numbers, line, word in zip(left, lines, words, strict=True):
                line.append(numbers.pop(word % len(numbers)))
        drawn.append(lines)
    return [
        o * sides[1] + i
        for outputs, inputs in zip(*drawn, strict=True)
        for o in outputs
        for i in inputs
    ]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    outputs=SIZES,
    inputs=SIZES,
    n_grids=st.integers(1, 5),
    batch=st.integers(1, 3),
    positions=st.integers(1, 4),
)
def test_factors_and_the_rows_they_make_up_are_projected_alike(
    data: st.DataObject, outputs: int, inputs: int, n_grids: int, batch: int, positions: int
) -> None:
    grid = data.draw(st.integers(1, outputs)), data.draw(st.integers(1, inputs))
    k = n_grids * grid[0] * grid[1]
    grids = Grids(3, "w", (outputs, inputs), grid, k)
    assert grids.elements.tolist() == from_the_text(3, "w", (outputs, inputs), grid, k)
    left, right = random(batch, positions, outputs), random(batch, positions, inputs, seed=1)
    rows = torch.einsum("bpo,bpi->boi", left, right).flatten(1)
    wanted = rows[:, grids.elements] * np.sqrt(outputs * inputs / k)
    torch.testing.assert_close(grids(rows), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grids.of_factors(left, right), wanted, rtol=1e-12, atol=1e-12)


def test_inner_products_are_unbiased_with_the_variance_of_the_formula() -> None:
    (outputs, inputs), (g_o, g_i), n_grids = (9, 7), (4, 3), 2
    x, y, n, g = random(outputs, inputs), random(outputs, inputs, seed=1), 63, 12
    z = x * y
    s, rows, columns = (z**2).sum(), (z.sum(1) ** 2).sum(), (z.sum(0) ** 2).sum()
    whole, both = z.sum() ** 2, g / n
    same_output, same_input = both * (g_i - 1) / (inputs - 1), both * (g_o - 1) / (outputs - 1)
    apart = same_output * (g_o - 1) / (outputs - 1)
    square = (n / g) ** 2 * (
        both * s
        + same_output * (rows - s)
        + same_input * (columns - s)
        + apart * (whole - rows - columns + s)
    )
    variance = float((square - whole) / n_grids)
    draws = 6000
    found = torch.stack(
        [
            (grids(x.reshape(1, -1)) * grids(y.reshape(1, -1))).sum()
            for seed in range(draws)
            for grids in [Grids(seed, "w", (outputs, inputs), (g_o, g_i), n_grids * g)]
        ]
    )
    assert abs(float(found.mean() - z.sum())) < 4 * np.sqrt(variance / draws)
    assert float(found.var()) == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolutions_rows_are_projected_in_the_order_of_its_weight(
    kind: type[nn.Module],
) -> None:
    module = kind(4, 5, 3).double()
    sides = (len(module.weight), module.weight[0].numel())
    block = Block("w", tuple(module.weight.shape), 0, "grids", (0, 32), grids=(*sides, 4, 4))
    x = random(3, 4, 6, 6)
    with torch.no_grad():
        grad_output = random(*module(x).shape, seed=1)
        (value,) = rule_for(module)(module, (x,), {}, grad_output, ["weight"]).values()
    assert isinstance(value, Factors)
    encoding = GridsOfElements(block, 0)
    found = encoding.reduce(Given(value, 0)).value
    wanted = torch.stack([encoding.project_gradient(row, ()) for row in value.rows()])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10 columns are no number of grids"):
        Grids(0, "w", (4, 4), (2, 2), 10)
    with pytest.raises(ValueError, match="no number of grids"):
        Grids(0, "w", (3, 4), (4, 4), 16)
