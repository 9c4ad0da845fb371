"""The two-sided projection: what it is a function of, that factors and rows agree, and what it does
to inner products.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hydra_pipe.maths.kron import Kron
from hydra_pipe.per_sample.factors import Factors, projected
from hydra_pipe.per_sample.registry import rule_for
from hydra_pipe.plan.layout import choose_sides

SIZES = st.integers(1, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def matrix(kron: Kron, n: int) -> Tensor:
    """The projection as a matrix of shape (k, n): what it does to each unit vector."""
    return kron(torch.eye(n, dtype=torch.float64)).T


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    outputs=SIZES,
    inputs=SIZES,
    batch=st.integers(1, 3),
    positions=st.integers(1, 4),
)
def test_factors_and_the_rows_they_make_up_are_projected_alike(
    data: st.DataObject, outputs: int, inputs: int, batch: int, positions: int
) -> None:
    k_out, k_in = data.draw(st.integers(1, outputs)), data.draw(st.integers(1, inputs))
    kron = Kron(0, "w", (outputs, inputs), k_out, k_in, (outputs, inputs))
    factors = Factors(random(batch, positions, outputs), random(batch, positions, inputs, seed=1))
    found = projected(factors, kron)
    assert found.shape == (batch, kron.n_columns) == (batch, k_out * k_in)
    torch.testing.assert_close(found, kron(factors.rows()), rtol=1e-12, atol=1e-12)
    bias = Factors(factors.left, None)
    of_bias = Kron(0, "b", (outputs,), k_out, 1, (outputs, 1))
    torch.testing.assert_close(projected(bias, of_bias), of_bias(bias.rows()), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
)
def test_the_patches_of_a_convolution_are_projected_without_being_written_out(
    data: st.DataObject, dims: int, transposed: bool, batch: int
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = sizes(1, 3), sizes(1, 2), sizes(1, 3)
    options = {"stride": stride, "dilation": dilation, "padding": sizes(0, 2)}
    if transposed:
        options["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    module = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(
        2, 3, kernel, **options
    ).double()
    sides = (len(module.weight), module.weight[0].numel())
    kron = Kron(
        0, "w", module.weight.shape, *choose_sides(*sides, data.draw(st.integers(1, 40))), sides
    )
    inputs = random(batch, 2, *sizes(7, 8))
    with torch.no_grad():
        grad_output = random(*module(inputs).shape, seed=1)
        (factors,) = rule_for(module)(module, (inputs,), {}, grad_output, ["weight"]).values()
    assert isinstance(factors, Factors)
    found, norms = projected(factors, kron), factors.norms()
    # written out where that side is the identity only
    assert kron.n_columns % sides[1] == 0 or "right" not in vars(factors)
    torch.testing.assert_close(found, kron(factors.rows()), rtol=1e-10, atol=1e-10)
    assert bool((norms >= factors.rows().norm(dim=1) * (1 - 1e-12)).all())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), outputs=SIZES, inputs=SIZES)
def test_it_is_a_product_of_a_matrix_a_side_of_equal_magnitudes_or_the_identity(
    data: st.DataObject, outputs: int, inputs: int
) -> None:
    k_out, k_in = data.draw(st.integers(1, outputs)), data.draw(st.integers(1, inputs))
    found = matrix(
        Kron(0, "w", (outputs, inputs), k_out, k_in, (outputs, inputs)), outputs * inputs
    )
    blocks = found.contiguous().reshape(k_out, k_in, outputs, inputs)
    side = blocks[:, 0, :, 0] / blocks[0, 0, 0, 0]
    other = blocks[0, :, 0, :]
    torch.testing.assert_close(
        torch.kron(side.contiguous(), other.contiguous()), found, rtol=1e-12, atol=1e-12
    )
    if k_out == outputs:
        torch.testing.assert_close(side, torch.eye(outputs, dtype=torch.float64))
    else:
        torch.testing.assert_close(side.abs(), torch.ones(k_out, outputs, dtype=torch.float64))


def test_inner_products_are_exact_where_both_sides_are_the_identity() -> None:
    rows = random(5, 30)
    assert torch.equal(Kron(0, "w", (5, 3, 2), 5, 6, (5, 6))(rows), rows)


def test_rows_are_left_as_they_were() -> None:
    rows = random(5, 12)
    before = rows.clone()
    for k_out, k_in in ((3, 4), (2, 2)):
        Kron(0, "w", (3, 4), k_out, k_in, (3, 4))(rows).mul_(2)
        assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_keep_their_dtype(dtype: torch.dtype) -> None:
    # scaled by 1/2: exact in all
    kron, rows = (
        Kron(0, "w", (3, 4), 2, 2, (3, 4)),
        torch.arange(24.0, dtype=dtype).reshape(2, 12),
    )
    found = kron(rows)
    assert found.dtype == dtype
    assert found.tolist() == kron(rows.double()).tolist()


@pytest.mark.parametrize(
    "other", [(1, "w", (4, 6)), (0, "v", (4, 6)), (0, "w", (6, 4)), (0, "w", (24,))]
)
def test_another_seed_name_or_shape_gives_another_projection(
    other: tuple[int, str, tuple[int, ...]],
) -> None:
    assert not torch.equal(
        matrix(Kron(0, "w", (4, 6), 3, 3, (4, 6)), 24), matrix(Kron(*other, 3, 3, (4, 6)), 24)
    )


def test_the_sides_of_a_square_weight_are_not_projected_alike() -> None:
    blocks = matrix(Kron(0, "w", (9, 9), 4, 4, (9, 9)), 81).reshape(4, 4, 9, 9)
    assert not torch.equal(
        blocks[:, 0, :, 0].sign() * blocks[0, 0, 0, 0].sign(), blocks[0, :, 0, :].sign()
    )


@pytest.mark.parametrize(
    ("k_out", "k_in", "sides"), [(0, 3, (4, 6)), (5, 3, (4, 6)), (2, 7, (4, 6)), (2, 2, (4, 5))]
)
def test_what_cannot_be_projected_is_named(k_out: int, k_in: int, sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"head.weight .* to {k_out} x {k_in}"):
        Kron(0, "head.weight", (4, 6), k_out, k_in, sides)


def test_the_projection_is_the_one_that_stores_were_written_with() -> None:
    # Computed once. If this fails, rows on disk and test gradients taken from now on no longer
    # match.
    rows = torch.arange(1.0, 25.0).square().repeat(2, 1) * torch.tensor([[1.0], [2.0]])
    expected = {
        (2, 2): [[15.0, -157.0, -24.0, -456.0], [30.0, -314.0, -48.0, -912.0]],
        (4, 1): [[-15.0, -27.0, -39.0, -51.0], [-30.0, -54.0, -78.0, -102.0]],
    }
    for k, values in expected.items():
        assert Kron(3, "layers.0.weight", (4, 3, 2), *k, (4, 6))(rows).tolist() == values


def variance(x: Tensor, y: Tensor, k_out: int, k_in: int) -> float:
    """The formula of the module's docstring."""
    outer, inner, dots = x @ y.T, x.T @ y, x * y
    of_rows, of_columns = (x**2).sum(1) * (y**2).sum(1), (x**2).sum(0) * (y**2).sum(0)
    v_out = (outer**2).sum() + (outer * outer.T).sum() - 2 * (dots.sum(1) ** 2).sum()
    v_in = (inner**2).sum() + (inner * inner.T).sum() - 2 * (dots.sum(0) ** 2).sum()
    v_both = (
        (x**2).sum() * (y**2).sum() + dots.sum() ** 2
        + (outer**2).sum() + (inner**2).sum() + 4 * (dots**2).sum()
        - 2 * (of_rows + dots.sum(1) ** 2).sum() - 2 * (of_columns + dots.sum(0) ** 2).sum()
    )  # fmt: skip
    outputs, inputs = x.shape
    out, in_ = (0 if k_out == outputs else 1 / k_out), (0 if k_in == inputs else 1 / k_in)
    return float(v_out * out + v_in * in_ + v_both * out * in_)


def pairs(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Matrices X and Y, shape (pair, O, I): random, nearly alike, outer products, sparse, dominated
    by a few elements.
    """
    x, y = random(2, outputs, inputs, seed=5)
    few = torch.arange(inputs) < 2
    large = (1.0 + torch.arange(outputs))[:, None] ** 2
    outer = torch.outer(x[:, 0], x[0]), torch.outer(y[:, 0], x[0] + y[0])
    return torch.stack([x, x, outer[0], x * few, x * large]), torch.stack(
        [y, x + 0.1 * y, outer[1], (x + y) * few, y * large]
    )


@pytest.mark.parametrize(
    ("sides", "k_out", "k_in"),
    [
        ((5, 6), 3, 2),
        ((5, 6), 1, 1),
        ((5, 6), 5, 2),
        ((5, 6), 2, 6),
        ((12, 1), 4, 1),
        ((8, 9), 7, 8),
    ],
)
def test_inner_products_are_unbiased_with_the_variance_of_the_formula(
    sides: tuple[int, int], k_out: int, k_in: int
) -> None:
    n_seeds = 4000
    x, y = pairs(*sides)
    both = torch.cat([x, y]).flatten(1)
    products = torch.empty(n_seeds, len(x), dtype=torch.float64)
    for seed in range(n_seeds):
        projected_x, projected_y = Kron(seed, "w", sides, k_out, k_in, sides)(both).split(len(x))
        products[seed] = (projected_x * projected_y).sum(1)
    truth, squares = (x * y).sum((1, 2)), (x**2).sum((1, 2)) * (y**2).sum((1, 2))
    expected = torch.tensor(
        [variance(a, b, k_out, k_in) for a, b in zip(x, y, strict=True)], dtype=torch.float64
    )
    # five standard errors, and rounding; the seeds are fixed, so that this passes always or never
    assert bool(
        (
            (products.mean(0) - truth).abs()
            <= 5 * (expected / n_seeds).sqrt() + 1e-12 * squares.sqrt()
        ).all()
    )
    deviation = (products - truth) ** 2
    assert bool(
        (
            (deviation.mean(0) - expected).abs()
            <= 5 * deviation.std(0) / n_seeds**0.5 + 1e-24 * squares
        ).all()
    )
    bound = (1 if k_out == sides[0] else 1 + 2 / k_out) * (
        1 if k_in == sides[1] else 1 + 2 / k_in
    ) - 1
    assert bool((expected <= bound * squares * (1 + 1e-12)).all())


def test_the_variance_is_that_of_all_sign_matrices() -> None:
    """Every S and T there is, each as likely: no sampling error, so the formula is held to
    rounding.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    x, y = random(2, 3, 3, seed=2)
    sides = signs.reshape(-1, 2, 3) / 2**0.5
    projected_x, projected_y = (torch.einsum("aki,ij,blj->abkl", sides, m, sides) for m in (x, y))
    products = (projected_x * projected_y).sum((2, 3))
    assert products.mean().item() == pytest.approx((x * y).sum().item(), rel=1e-12)
    assert products.var(unbiased=False).item() == pytest.approx(variance(x, y, 2, 2), rel=1e-12)


def bound(k_out: int, k_in: int, outputs: int, inputs: int) -> float:
    return (1 if k_out == outputs else 1 + 2 / k_out) * (1 if k_in == inputs else 1 + 2 / k_in) - 1


@settings(max_examples=100, deadline=None)
@given(outputs=st.integers(1, 20), inputs=st.integers(1, 20), columns=st.integers(1, 450))
def test_the_chosen_sides_are_within_budget_and_no_others_have_a_smaller_bound(
    outputs: int, inputs: int, columns: int
) -> None:
    k_out, k_in = choose_sides(outputs, inputs, columns)
    assert 1 <= k_out <= outputs
    assert 1 <= k_in <= inputs
    assert k_out * k_in <= columns
    least = min(
        bound(a, b, outputs, inputs)
        for a in range(1, outputs + 1)
        for b in range(1, inputs + 1)
        if a * b <= columns
    )
    assert bound(k_out, k_in, outputs, inputs) == pytest.approx(least, rel=1e-12, abs=1e-12)
    if columns >= outputs * inputs:
        assert (k_out, k_in) == (outputs, inputs)


@pytest.mark.parametrize(
    ("outputs", "inputs", "columns", "chosen"),
    [
        (768, 3072, 4096, (64, 64)),
        (10, 512, 320, (10, 32)),
        (1000, 1, 64, (64, 1)),
        (50257, 768, 1, (1, 1)),
    ],
)
def test_sides_of_usual_layers(
    outputs: int, inputs: int, columns: int, chosen: tuple[int, int]
) -> None:
    assert choose_sides(outputs, inputs, columns) == chosen
