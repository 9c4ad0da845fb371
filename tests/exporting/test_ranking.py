"""Rankings against a plain sort."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hydra_pipe.exporting.ranking import ClassMeans, rank_harmful
from hydra_pipe.maths.ranking import Ranking, top_samples

# a busy machine is no fault
EVERY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# few distinct values, so that ties are the rule
relevances = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])
)


def by_plain_sort(relevance: np.ndarray, count: int) -> list[int]:
    positive = [i for i in range(len(relevance)) if relevance[i] > 0]
    return sorted(positive, key=lambda i: (-relevance[i], i))[:count]


@EVERY
@given(relevance=relevances, count=st.integers(1, 50))
def test_the_top_is_sorted_positive_and_ties_go_to_the_smaller_id(
    relevance: np.ndarray, count: int
) -> None:
    assert top_samples(relevance, count).tolist() == by_plain_sort(relevance, count)


@EVERY
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 3000),
    count=st.integers(1, 40),
    ties=st.booleans(),
)
def test_the_top_of_many_is_that_of_a_plain_sort(
    seed: int, size: int, count: int, ties: bool
) -> None:
    relevance = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    relevance = np.round(relevance, 1) if ties else relevance
    assert top_samples(relevance, count).tolist() == by_plain_sort(relevance, count)


@EVERY
@given(seed=st.integers(0, 1000), count=st.integers(1, 6), slab=st.integers(1, 12))
def test_both_sides_of_each_test_sample_are_ranked_from_1_however_samples_come(
    seed: int, count: int, slab: int
) -> None:
    relevance = np.random.default_rng(seed).integers(-3, 4, (3, 12)).astype(np.float32)
    ranking = Ranking(5, 3, count)
    for first in range(0, 12, slab):
        ranking.add(relevance[:, first : first + slab], first)
    ranked = ranking.ranked()
    rows = list(
        zip(ranked.test, ranked.helpful, ranked.rank, ranked.train, ranked.relevance, strict=True)
    )
    expected, ends = [], []
    for j in range(3):
        for helpful, column in ((True, relevance[j]), (False, -relevance[j])):
            for rank, i in enumerate(by_plain_sort(column, count), start=1):
                expected.append((j + 5, helpful, rank, i, relevance[j, i]))
        ends.append(len(expected))
    assert rows == expected
    assert ranked.ends.tolist() == ends


def test_the_most_harmful_sample_has_rank_1_and_ties_go_to_the_smaller_id() -> None:
    assert rank_harmful(np.array([3.0, -1.0, 0.0, -1.0])).tolist() == [4, 1, 3, 2]


@EVERY
@given(seed=st.integers(0, 1000), width=st.integers(1, 9), slab=st.integers(1, 15))
def test_class_means_are_those_of_a_plain_loop(seed: int, width: int, slab: int) -> None:
    generator = np.random.default_rng(seed)
    relevance = generator.normal(size=(9, 15)).astype(np.float32)
    train, test = generator.choice(["cat", "dog", "eel"], 15), generator.integers(7, 9, 9)
    classes = ClassMeans(train, test)
    for first in range(0, 9, width):
        for low in range(0, 15, slab):
            classes.add(relevance[first : first + width, low : low + slab], first, low)
    for a, train_name in enumerate(classes.train_names):
        for b, test_name in enumerate(classes.test_names):
            pairs = relevance[np.ix_(test == test_name, train == train_name)].astype(np.float64)
            assert classes.pairs()[a, b] == pairs.size
            np.testing.assert_allclose(classes.means()[a, b], pairs.mean(), rtol=1e-5, atol=1e-6)
