"""Variance of the noise between trainings, against loops and against noise that is known."""

import numpy as np
import pytest

from hydra_pipe.maths.two_way import residual_variance, share_of_variance


def test_the_residual_variance_is_that_of_a_plain_loop() -> None:
    values = np.random.default_rng(0).normal(size=(3, 7, 4))
    for test in range(4):
        own, total = values[:, :, test], 0.0
        for s in range(3):
            for i in range(7):
                total += (own[s, i] - own[s].mean() - own[:, i].mean() + own.mean()) ** 2
        assert residual_variance(values)[test] == pytest.approx(total / (2 * 6))


def test_effects_of_subsets_and_of_seeds_are_no_noise() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(1, 50, 3)) + rng.normal(size=(4, 1, 3))
    np.testing.assert_allclose(residual_variance(values), 0.0, atol=1e-25)


@pytest.mark.parametrize("n_seeds", [2, 5])
def test_noise_is_estimated_without_bias_and_shrinks_in_a_mean_over_seeds(n_seeds: int) -> None:
    rng = np.random.default_rng(2)
    subsets, noise = 2.0, 3.0
    values = subsets * rng.normal(size=(1, 40, 2000)) + noise * rng.normal(size=(n_seeds, 40, 2000))
    variance = residual_variance(values)
    assert variance.mean() == pytest.approx(noise**2, rel=0.02)
    of_one = share_of_variance(variance, values[0])
    of_mean = share_of_variance(variance / n_seeds, values.mean(axis=0))
    # the root of what is left is the correlation of such losses with the effect of the subsets
    for share, expected in ((of_one, noise**2), (of_mean, noise**2 / n_seeds)):
        assert share.mean() == pytest.approx(expected / (subsets**2 + expected), rel=0.1)


def test_a_share_is_at_most_one_and_losses_that_are_all_equal_have_no_noise() -> None:
    values = np.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(share_of_variance(np.array([0.0, 9.0]), values), [0.0, 1.0])
