"""Cuts and counts that see no truth."""

from math import exp, log

import numpy as np
import pytest

from hydra_pipe.labels.cut import cautious_cut, number_wrong, recommended_cut


def test_the_cut_has_the_largest_expected_f_of_all_counts() -> None:
    chances = np.random.default_rng(0).beta(0.3, 3, 200)
    ordered = sorted(chances, reverse=True)
    values = []
    for k in range(1, 201):
        precision, recall = sum(ordered[:k]) / k, sum(ordered[:k]) / sum(ordered)
        values.append(1.5 * precision * recall / (0.5 * precision + recall))
    assert recommended_cut(chances) == int(np.argmax(values)) + 1
    assert chances[chances > 0.5].size < int(np.argmax(values)) + 1


def test_labels_that_are_likelier_wrong_than_right_are_always_proposed() -> None:
    assert recommended_cut(np.array([0.99] * 50 + [0.55] * 5 + [0.01] * 50)) == 55


def test_nothing_is_proposed_where_nothing_can_be_wrong() -> None:
    assert recommended_cut(np.zeros(5)) == 0


def test_labels_that_are_surely_wrong_are_all_proposed() -> None:
    assert recommended_cut(np.array([1.0] * 7 + [0.0] * 93)) == 7


def test_the_cautious_cut_takes_labels_that_are_likelier_wrong_than_right() -> None:
    assert cautious_cut(np.array([0.9, 0.5, 0.51, 0.1])) == 2


def test_the_count_has_an_interval_of_shifted_odds() -> None:
    chances = np.random.default_rng(1).beta(0.5, 2, 50)
    ends = []
    for shift in (-1.5, 1.5):
        total = 0.0
        for p in chances:
            total += 1 / (1 + exp(-(log(p / (1 - p)) + shift)))
        ends.append(total)
    found = number_wrong(chances)
    assert found.value == pytest.approx(chances.sum())
    assert found.low == pytest.approx(ends[0] - 0.02 * 50)
    assert found.high == pytest.approx(ends[1])


def test_the_interval_of_few_doubts_holds_zero() -> None:
    assert number_wrong(np.full(100, 0.02)).low == 0.0


def test_labels_without_and_with_certainty_have_a_count() -> None:
    found = number_wrong(np.array([1.0, 1.0, 0.0]))
    assert found.value == 2.0
    assert found.low <= 2.0 <= found.high
    assert np.isfinite([found.low, found.high]).all()
