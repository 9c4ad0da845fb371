"""Sums of scores by sample, against a loop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.maths.relevance import add_by_sample


@settings(max_examples=100, deadline=None)
@given(
    samples=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    n_tests=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_scores_are_added_to_their_sample_however_often_it_comes(
    samples: list[int], n_tests: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    total = generator.normal(size=(10, n_tests)).astype(np.float32)
    scores = generator.normal(size=(len(samples), n_tests)).astype(np.float32)
    truth = total.astype(np.float64)
    for sample, score in zip(samples, scores, strict=True):
        truth[sample] += score
    add_by_sample(total, np.array(samples), scores)
    np.testing.assert_allclose(total, truth, rtol=0, atol=1e-5)


def test_samples_that_have_no_row_keep_their_total() -> None:
    total = np.arange(8, dtype=np.float32).reshape(4, 2)
    add_by_sample(total, np.array([2, 0, 2]), np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(total, [[1, 2], [2, 3], [6, 7], [6, 7]])


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(12)), seed=st.integers(0, 1000))
def test_permuting_the_rows_of_an_epoch_changes_no_bit(order: list[int], seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(12, 3)).astype(np.float32)
    samples = np.arange(12)
    total, permuted = np.ones((12, 3), np.float32), np.ones((12, 3), np.float32)
    add_by_sample(total, samples, scores)
    add_by_sample(permuted, samples[order], scores[order])
    np.testing.assert_array_equal(permuted, total)


def test_scores_and_samples_are_left_as_they_were() -> None:
    samples, scores = np.array([1, 0, 1]), np.arange(3, dtype=np.float32)[:, None]
    add_by_sample(np.zeros((2, 1), np.float32), samples, scores)
    assert samples.tolist() == [1, 0, 1]
    assert scores[:, 0].tolist() == [0, 1, 2]
