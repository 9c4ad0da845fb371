"""Treatments of a training set, and the same treatments of as many samples at random."""

import numpy as np
import pytest

from hydra_pipe.cleaning.treatments import (
    AS_GIVEN,
    DECIDED,
    DROPPED,
    HOW,
    MIXED,
    RELABELLED,
    WEIGHTED,
    Proposed,
    at_random,
)

N = 200
GIVEN = np.random.default_rng(0).integers(0, 4, N)


def proposed() -> Proposed:
    ids = np.arange(0, 40, 2)
    classes = (GIVEN[ids] + 1) % 4
    classes[:3] = AS_GIVEN
    sure, acted = np.arange(20) % 2 == 0, np.arange(20) < 10
    weights = np.linspace(0, 1, N).astype(np.float32)
    return Proposed(N, ids, classes, sure, acted, np.zeros(20, bool), weights)


@pytest.mark.parametrize(
    ("how", "is_relabelled"),
    [
        (DROPPED, lambda i: False),
        (RELABELLED, lambda i: i >= 3),
        (MIXED, lambda i: i >= 3 and i % 2 == 0),
        (DECIDED, lambda i: 3 <= i < 10),
    ],
)
def test_a_proposed_sample_is_relabelled_or_left_out_and_others_stay(how, is_relabelled) -> None:
    own = proposed()
    found = own.treated(how)
    for place, sample in enumerate(own.ids):
        if is_relabelled(place):
            assert (found.weights[sample], found.classes[sample]) == (1, own.classes[place])
        else:
            expected = 1 if how == RELABELLED else 0
            assert (found.weights[sample], found.classes[sample]) == (expected, AS_GIVEN)
    others = np.setdiff1d(np.arange(N), own.ids)
    assert (found.weights[others] == 1).all()
    assert (found.classes[others] == AS_GIVEN).all()


def test_weights_leave_all_samples_as_given() -> None:
    found = proposed().treated(WEIGHTED)
    assert np.array_equal(found.weights, proposed().weights)
    assert (found.classes == AS_GIVEN).all()
    assert found.n_changed == pytest.approx(N / 2)


@pytest.mark.parametrize("how", HOW)
def test_as_many_are_treated_at_random_with_the_same_changes_of_classes(how: str) -> None:
    own = proposed().treated(how)
    draws = [at_random(own, GIVEN, np.random.default_rng(seed)) for seed in range(2)]
    for found in draws:
        assert np.array_equal(np.sort(found.weights), np.sort(own.weights))
        pairs = [
            sorted(zip(GIVEN[one.relabelled], one.classes[one.relabelled], strict=True))
            for one in (own, found)
        ]
        assert pairs[0] == pairs[1]
        assert found.n_changed == pytest.approx(own.n_changed)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(
            (draws[0].weights, draws[0].classes), (draws[1].weights, draws[1].classes), strict=True
        )
    )
