"""Rankings against a plain sort."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hydra_pipe.exporting.ranking import ClassMeans, rank_harmful, rank_tests, top_samples

# few distinct values, so that ties are the rule
relevances = arrays.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]))


def by_plain_sort(relevance: np.ndarray, count: int) -> list[int]:
    positive = [i for i in range(len(relevance)) if relevance[i] > 0]
    return sorted(positive, key=lambda i: (-relevance[i], i))[:count]


@given(relevance=relevances, count=st.integers(1, 50))
def test_the_top_is_sorted_positive_and_ties_go_to_the_smaller_id(relevance: np.ndarray, count: int) -> None:
    assert top_samples(relevance, count).tolist() == by_plain_sort(relevance, count)


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_both_sides_of_each_test_sample_are_ranked_from_1(seed: int, count: int) -> None:
    relevance = np.random.default_rng(seed).integers(-3, 4, (12, 3)).astype(np.float32)
    ranked = rank_tests(relevance, 5, count)
    rows = list(zip(ranked.test, ranked.helpful, ranked.rank, ranked.train, ranked.relevance, strict=True))
    expected = []
    for j in range(3):
        for helpful, column in ((True, relevance[:, j]), (False, -relevance[:, j])):
            for rank, i in enumerate(by_plain_sort(column, count), start=1):
                expected.append((j + 5, helpful, rank, i, relevance[i, j]))
    assert rows == expected


def test_the_most_harmful_sample_has_rank_1_and_ties_go_to_the_smaller_id() -> None:
    assert rank_harmful(np.array([3.0, -1.0, 0.0, -1.0])).tolist() == [4, 1, 3, 2]


@given(seed=st.integers(0, 1000), width=st.integers(1, 9))
def test_class_means_are_those_of_a_plain_loop(seed: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    relevance = generator.normal(size=(15, 9)).astype(np.float32)
    train, test = generator.choice(["cat", "dog", "eel"], 15), generator.integers(7, 9, 9)
    classes = ClassMeans(train, test)
    for first in range(0, 9, width):
        classes.add(relevance[:, first : first + width], first)
    for a, train_name in enumerate(classes.train_names):
        for b, test_name in enumerate(classes.test_names):
            pairs = relevance[np.ix_(train == train_name, test == test_name)].astype(np.float64)
            assert classes.pairs()[a, b] == pairs.size
            np.testing.assert_allclose(classes.means()[a, b], pairs.mean(), rtol=1e-5, atol=1e-6)
