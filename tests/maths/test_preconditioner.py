"""D^(1/2) as one outer product, and as one number: the least weighted squares."""

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from hydra_pipe.maths.adam import rank_one, root_preconditioner, scalar_root


def error(a: np.ndarray, b: np.ndarray, root: np.ndarray) -> float:
    present = root > 0
    weight = np.where(present, np.where(present, root, 1.0) ** -4.0, 0.0)
    return float((weight * (root - np.outer(a, b)) ** 2).sum())


def test_an_outer_product_is_found_and_lines_without_gradient_are_zero() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 1e3, 5), rng.uniform(1e-3, 10, 7)
    root = np.outer(a, b)
    root[2], root[:, 4] = 0, 0
    outputs, inputs = rank_one(torch.from_numpy(root))
    np.testing.assert_allclose(np.outer(outputs, inputs), root, rtol=1e-5)
    assert outputs[2] == 0
    assert inputs[4] == 0
    none = rank_one(torch.zeros(2, 3))
    assert [float(x.sum()) for x in none] == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_the_weighted_squares_are_near_a_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = np.outer(np.exp(rng.normal(size=6)), np.exp(rng.normal(size=5)))
    root *= np.exp(0.2 * rng.normal(size=root.shape))
    outputs, inputs = (x.double().numpy() for x in rank_one(torch.from_numpy(root)))

    def residuals(x: np.ndarray) -> np.ndarray:
        return ((root - np.outer(x[:6], x[6:])) / root**2).ravel()

    start = np.concatenate([outputs, inputs])
    found = least_squares(residuals, start, x_scale=start)
    assert (residuals(start) ** 2).sum() <= (residuals(found.x) ** 2).sum() * 1.001
    assert error(outputs, inputs, root) < 0.5 * error(np.ones(6), np.full(5, root.mean()), root)


def test_the_number_is_the_weighted_mean() -> None:
    root = np.array([1.0, 2.0, 4.0, 0.0])
    weight = root[:3] ** -4.0
    wanted = float((weight * root[:3]).sum() / weight.sum())
    assert scalar_root(torch.from_numpy(root)) == pytest.approx(wanted)


def test_an_element_that_never_had_a_gradient_has_no_part() -> None:
    root = root_preconditioner(torch.tensor([0.0, 0.04]), 2, 0.5, 1e-8)
    torch.testing.assert_close(root, torch.tensor([0.0, (0.04 / 0.75) ** -0.25]))
