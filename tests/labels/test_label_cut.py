"""Cuts that see no truth."""

import numpy as np

from hydra_pipe.labels.cut import cautious_cut, expected_f1_cut


def test_the_cut_has_the_largest_expected_f1_of_all_counts() -> None:
    chances = np.random.default_rng(0).beta(0.3, 1.5, 200)
    ordered = sorted(chances, reverse=True)
    values = [2 * sum(ordered[:k]) / (k + sum(ordered)) for k in range(1, 201)]
    assert expected_f1_cut(chances) == int(np.argmax(values)) + 1


def test_nothing_is_proposed_where_nothing_can_be_wrong() -> None:
    assert expected_f1_cut(np.zeros(5)) == 0


def test_the_cautious_cut_takes_what_is_likelier_wrong_than_right() -> None:
    assert cautious_cut(np.array([0.9, 0.5, 0.51, 0.1])) == 2
