"""The count sketch: what it is a function of, and what it does to inner products."""

import hashlib
from math import gcd, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Philox
from torch import Tensor

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.maths.sketch_runs import run_length

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def matrix(sketch: Sketch, n: int) -> Tensor:
    """The sketch as a matrix of shape (k, n): what it does to each unit vector."""
    return sketch(torch.eye(n, dtype=torch.float64)).T


def random_rows(n_rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n_rows, n)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), name=st.text(max_size=5), shape=SHAPES, data=st.data())
def test_the_sketch_is_a_function_of_seed_name_shape_and_width(
    seed: int, name: str, shape: tuple, data: st.DataObject
) -> None:
    n = prod(shape)
    k = data.draw(st.integers(1, n))
    torch.manual_seed(0)
    first = matrix(Sketch(seed, name, shape, k), n)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(matrix(Sketch(seed, name, shape, k), n), first)


@pytest.mark.parametrize(
    "other", [(1, "w", (4, 6)), (0, "v", (4, 6)), (0, "w", (6, 4)), (0, "w", (24,))]
)
def test_another_seed_name_or_shape_gives_another_sketch(
    other: tuple[int, str, tuple[int, ...]],
) -> None:
    assert not torch.equal(matrix(Sketch(0, "w", (4, 6), 5), 24), matrix(Sketch(*other, 5), 24))


def test_equal_shapes_of_other_types_give_the_same_sketch() -> None:
    truth = matrix(Sketch(0, "w", (3, 4), 5), 12)
    for shape in (torch.Size((3, 4)), tuple(np.array([3, 4]))):
        assert shape == (3, 4)
        assert torch.equal(matrix(Sketch(0, "w", shape, 5), 12), truth)


def test_the_sketch_is_the_one_that_stores_were_written_with() -> None:
    # Computed once. If this fails, rows on disk and test gradients taken from now on no longer
    # match.
    rows = torch.arange(1.0, 24.0).repeat(2, 1) * torch.tensor([[1.0], [2.0]])
    found = Sketch(3, "layers.0.weight", (23,), 5)(rows)
    assert found.tolist() == [[-1.0, 28.0, 16.0, 18.0, -1.0], [-2.0, 56.0, 32.0, 36.0, -2.0]]


@pytest.mark.parametrize(("shape", "k"), [((6, 7), 4), ((9,), 9), ((16, 8), 3), ((30, 5), 8)])
def test_the_sketch_is_the_one_of_the_format_document(shape: tuple[int, ...], k: int) -> None:
    n = prod(shape)
    lengths = [r for r in range(1, 17) if n % r == 0 and gcd(r, k) == 1 and n >= 4 * r * k]
    run = max([1, *lengths])
    philox = Philox(
        key=np.frombuffer(hashlib.sha256(f"5\nweight\n{shape}".encode()).digest()[:16], np.uint64)
    )
    order = np.argsort(philox.random_raw(n // run), kind="stable")
    words = [int(word) for word in philox.random_raw((n + 63) // 64)]
    gradient = random_rows(1, n)[0].numpy()
    signed = np.array([-g if words[i // 64] >> (i % 64) & 1 else g for i, g in enumerate(gradient)])
    columns = np.zeros(k)
    for place, value in enumerate(np.concatenate([signed[run * o : run * (o + 1)] for o in order])):
        columns[place % k] += value
    found = Sketch(5, "weight", shape, k)(torch.from_numpy(gradient)[None])[0]
    np.testing.assert_allclose(found.numpy(), columns, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_every_coordinate_goes_with_a_sign_to_one_of_buckets_of_even_size(
    shape: tuple, data: st.DataObject
) -> None:
    n = prod(shape)
    k = data.draw(st.integers(1, n))
    found = matrix(Sketch(0, "w", shape, k), n)
    assert found.shape == (k, n)
    assert torch.equal(found.abs().sum(0), torch.ones(n, dtype=torch.float64))
    assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}
    sizes = found.abs().sum(1)
    assert sizes.max() - sizes.min() <= 1


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_the_sketch_is_linear(shape: tuple, data: st.DataObject) -> None:
    n = prod(shape)
    sketch = Sketch(0, "w", shape, data.draw(st.integers(1, n)))
    x, y = random_rows(1, n, 1), random_rows(1, n, 2)
    torch.testing.assert_close(
        sketch(2.5 * x - y), 2.5 * sketch(x) - sketch(y), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("n", "k"), [(12, 4), (13, 4), (7, 7), (5, 1), (1, 1)])
def test_each_row_is_projected_by_itself_and_left_as_it_was(n: int, k: int) -> None:
    sketch, rows = Sketch(0, "w", (n,), k), random_rows(6, n)
    given_rows = rows.clone()
    together = sketch(rows)
    assert torch.equal(rows, given_rows)
    assert together.shape == (6, k)
    for row, projected in zip(rows, together, strict=True):
        assert torch.equal(sketch(row[None])[0], projected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_their_dtype(dtype: torch.dtype) -> None:
    rows = torch.arange(24).reshape(2, 12).to(dtype)  # small whole numbers: exact in all of them
    found = Sketch(0, "w", (3, 4), 5)(rows)
    assert found.dtype == dtype
    assert found.tolist() == Sketch(0, "w", (3, 4), 5)(rows.double()).tolist()


def test_rows_that_are_not_contiguous_are_projected_alike() -> None:
    sketch, rows = Sketch(0, "w", (12,), 5), random_rows(12, 4)
    assert torch.equal(sketch(rows.T), sketch(rows.T.contiguous()))


def test_inner_products_are_exact_where_nothing_is_lost() -> None:
    rows = random_rows(5, 30)
    projected = Sketch(0, "w", (5, 6), 30)(rows)
    torch.testing.assert_close(projected @ projected.T, rows @ rows.T, rtol=1e-12, atol=1e-12)


def share_a_bucket(n: int, k: int) -> float:
    """P(two coordinates share a bucket), buckets of n // k or one more."""
    large = n % k
    sizes = [n // k + 1] * large + [n // k] * (k - large)
    return sum(s * (s - 1) for s in sizes) / (n * (n - 1))


@pytest.mark.parametrize(("n", "k"), [(96, 5), (204, 4), (144, 3), (125, 6)])
def test_coordinates_of_long_rows_meet_no_more_often_than_by_chance(n: int, k: int) -> None:
    assert run_length(n, k) > 1
    n_seeds = 1000
    meetings = np.zeros((n, n))
    for seed in range(n_seeds):
        buckets = matrix(Sketch(seed, "w", (n,), k), n).abs().numpy()
        meetings += buckets.T @ buckets
    chance = meetings / n_seeds
    within_runs = np.arange(n)[:, None] // run_length(n, k) == np.arange(n) // run_length(n, k)
    assert np.all(chance[within_runs & ~np.eye(n, dtype=bool)] == 0) or k < run_length(n, k)
    # six standard errors for the largest of n^2 figures
    assert chance[~within_runs].max() <= 1.02 / k + 6 * np.sqrt(1 / k / n_seeds)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors x and y, shape (pair, n): random, nearly alike, sparse, and dominated by a few
    elements.
    """
    x, y = np.random.default_rng(5).normal(size=(2, n))
    few = np.arange(n) < 3
    large = (1.0 + np.arange(n)) ** 2
    return np.stack([x, x, x * few, x * large]), np.stack(
        [y, x + 0.1 * y, (x + y) * few, y * large]
    )


@pytest.mark.parametrize(
    ("n", "k"), [(24, 6), (23, 6), (9, 8), (10, 1), (50, 7), (6, 6), (84, 5), (65, 1)]
)
def test_inner_products_are_unbiased_with_the_variance_of_the_formula(n: int, k: int) -> None:
    n_seeds = 5000
    x, y = pairs(n)
    both = torch.from_numpy(np.concatenate([x, y]))
    products = np.empty((n_seeds, len(x)))
    for seed in range(n_seeds):
        sketched_x, sketched_y = Sketch(seed, "w", (n,), k)(both).numpy().reshape(2, len(x), k)
        products[seed] = (sketched_x * sketched_y).sum(1)
    q = k * share_a_bucket(n, k)
    assert q <= 1
    truth, squares = (x * y).sum(1), (x**2).sum(1) * (y**2).sum(1)
    variance = q / k * (squares + truth**2 - 2 * (x**2 * y**2).sum(1))
    # five standard errors, and rounding; the seeds are fixed, so that this passes always or never
    assert np.all(
        np.abs(products.mean(0) - truth)
        <= 5 * np.sqrt(variance / n_seeds) + 1e-12 * np.sqrt(squares)
    )
    deviation = (products - truth) ** 2
    error = 5 * deviation.std(0) / np.sqrt(n_seeds) + 1e-24 * squares
    assert np.all(deviation.mean(0) <= 1.02 * variance + error)
    if run_length(n, k) == 1:
        assert np.all(deviation.mean(0) >= variance - error)


@pytest.mark.parametrize(
    ("lines", "width", "k"), [(50, 8, 16), (31, 7, 9), (400, 16, 33), (300, 7, 11), (60, 7, 6)]
)
@pytest.mark.parametrize("by", ["loops", "torch", "float64"])
def test_lines_of_a_table_are_projected_as_the_whole_row_is(
    lines: int, width: int, k: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "torch":
        monkeypatch.setattr(row_kernels, "compiled", None)
    generator = torch.Generator().manual_seed(0)
    sketch = Sketch(3, "table", (lines, width), k)
    tokens = torch.randint(0, lines, (4, 6), generator=generator)
    dtype = torch.float64 if by == "float64" else torch.float32
    values = torch.randn(4, width, 6, generator=generator).to(dtype).transpose(1, 2)
    whole = torch.zeros(4, lines, width, dtype=dtype)
    for i in range(4):
        whole[i].index_add_(0, tokens[i], values[i])
    found = sketch.lines(torch.unique(tokens)).project(values, tokens)
    torch.testing.assert_close(found, sketch(whole.flatten(1)), rtol=1e-5, atol=1e-5)
    every = sketch.lines(torch.arange(lines)).project_all(whole[0])
    torch.testing.assert_close(every[None], sketch(whole[:1].flatten(1)), rtol=1e-5, atol=1e-5)
