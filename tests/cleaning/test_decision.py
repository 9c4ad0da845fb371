"""Which samples are proposed: on distributions whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.cleaning.decision import CLEAR, Cut, most_harmed, reasons, scores_of
from hydra_pipe.errors import UsageError
from hydra_pipe.maths.outliers import FEWEST, MOST_FALSE, robust_scores, tail_threshold

values_of = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60).map(np.array)


def mixture(
    seed: int, n: int, wrong: int, shift: float = -8.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of three labels, each with its own centre and spread, `wrong` of them `shift` spreads
    lower; and which these are.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    spread, centre = np.array([0.1, 1.0, 50.0])[labels], np.array([5.0, -2.0, 300.0])[labels]
    is_wrong = np.zeros(n, bool)
    is_wrong[rng.choice(n, wrong, replace=False)] = True
    return centre + spread * (rng.normal(size=n) + shift * is_wrong), labels, is_wrong


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_the_lower_part_of_a_mixture_is_found_within_each_label(share: float) -> None:
    sums, labels, wrong = mixture(0, 3000, int(3000 * share))
    proposed = Cut().of(scores_of(sums, labels))
    assert wrong[proposed].mean() > 0.95
    assert len(proposed) > 0.9 * wrong.sum()
    together = np.argsort(sums)[: wrong.sum()]
    assert wrong[together].mean() < 0.8, "the sums themselves, all labels together, tell less"


def test_of_a_normal_distribution_next_to_nothing_is_proposed() -> None:
    sums, labels, _ = mixture(1, 3000, 0)
    assert len(Cut().of(scores_of(sums, labels))) == 0


@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_a_symmetric_distribution_has_no_tail_of_its_own_however_heavy(tail: str) -> None:
    rng = np.random.default_rng(4)
    values = robust_scores(
        rng.normal(size=4000) if tail == "normal" else rng.standard_t(2, size=4000)
    )
    assert (values < tail_threshold(values)).mean() <= 0.01
    assert (values < -3.0).mean() > (0.0 if tail == "normal" else 0.03), (
        "a fixed threshold would have proposed them"
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.3), st.floats(-12.0, -2.0))
def test_the_fitted_threshold_is_near_where_the_odd_ones_are_as_dense_as_the_bulk(
    seed: int, share: float, centre: float
) -> None:
    rng = np.random.default_rng(seed)
    n = 4000
    odd = np.arange(n) < round(share * n)
    values = np.where(odd, centre, 0.0) + rng.normal(size=n)
    proposed = values < tail_threshold(values)
    # up to there, all that is proposed: less than every second one is of the bulk, but for the luck
    # of so many draws
    assert proposed.sum() == 0 or odd[proposed].mean() > 1 - MOST_FALSE - 2.5 / np.sqrt(
        proposed.sum()
    )
    if centre < -4:
        assert proposed[odd].mean() > 0.5


def test_scores_are_standard_deviations_of_what_has_none_of_the_tail() -> None:
    rng = np.random.default_rng(2)
    values = 7.0 + 3.0 * rng.normal(size=20_000)
    np.testing.assert_allclose(robust_scores(values), (values - 7.0) / 3.0, atol=0.15)
    half_equal = np.r_[np.zeros(60), rng.normal(size=40)]
    assert np.ptp(robust_scores(half_equal)) > 1.0


@given(values_of, st.floats(0.01, 100.0), st.floats(-1e3, 1e3))
def test_scores_know_neither_unit_nor_origin(
    values: np.ndarray, scale: float, shift: float
) -> None:
    values = np.round(values, 3)
    before = robust_scores(values)
    after = robust_scores(scale * values + shift)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(before).max()))


def test_a_small_group_is_held_against_all_and_a_large_one_against_itself() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=200)
    groups = np.zeros(200, int)
    groups[:FEWEST] = 1
    values[:FEWEST] -= 100.0
    assert np.abs(robust_scores(values, groups)[:FEWEST]).max() < 10
    groups[0] = 0
    assert robust_scores(values, groups)[1:FEWEST].max() < -50


@given(values_of)
def test_equal_values_score_zero_and_every_score_is_finite(values: np.ndarray) -> None:
    assert np.isfinite(robust_scores(values)).all()
    assert (robust_scores(np.full(9, values[0])) == 0).all()


@given(values_of, st.data())
def test_the_lowest_of_a_larger_number_begin_with_those_of_a_smaller(
    values: np.ndarray, data: st.DataObject
) -> None:
    more = data.draw(st.integers(1, len(values) - 1))
    fewer = data.draw(st.integers(1, more))
    larger = Cut(lowest=more).of(values)
    assert len(larger) == more
    assert Cut(lowest=fewer).of(values).tolist() == larger[:fewer].tolist()
    assert values[larger].max() <= np.delete(values, larger).min()


@given(values_of, st.floats(-5.0, -0.1), st.floats(-5.0, -0.1))
def test_a_lower_threshold_proposes_fewer(values: np.ndarray, one: float, other: float) -> None:
    scores = robust_scores(values)
    low, high = (set(Cut(threshold=t).of(scores).tolist()) for t in sorted((one, other)))
    assert low <= high


def test_ties_go_to_the_smaller_id() -> None:
    assert Cut(lowest=3).of(np.array([0.0, -1.0, -2.0, -1.0, -1.0])).tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 0}, "1 or more"),
        ({"threshold": 0.0}, "below 0"),
        ({"threshold": float("nan")}, "below 0"),
        ({"threshold": float("-inf")}, "below 0"),
        ({"lowest": 3, "threshold": -3.0}, "choose one"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cut(**options)  # type: ignore[arg-type]


def test_some_samples_must_stay() -> None:
    with pytest.raises(UsageError, match="some must stay"):
        Cut(lowest=4).of(np.arange(4.0))


def test_a_label_is_suggested_only_where_one_class_is_clearly_harmed_most() -> None:
    classes, labels = np.array([3, 5, 7]), np.array([3, 3, 3, 5, 9])
    by_class = np.array(
        [
            [9.0, -2.0, -1.0],  # 5, CLEAR times as much as 7
            [-9.0, -1.9, -1.0],  # not clear; its own label does not count
            [-9.0, 0.5, 1.0],  # none of the others is harmed
            [-4.0, -9.0, 1.0],  # 3: it is labelled 5
            [1.0, 2.0, -0.1],  # a label that no test has
        ]
    )
    assert CLEAR == 2.0
    assert most_harmed(by_class, classes, labels).tolist() == [1, -1, -1, 0, 2]


def test_reasons_have_the_numbers() -> None:
    sums, scores = np.array([-4.0, 1.0, -2.5]), np.array([-6.04, 0.5, -3.2])
    labels = np.array(["cat", "dog", "dog"], object)
    one, other = reasons(
        sums, scores, np.array([0, 2]), labels, ["dog", None], "relevance summed over 9 tests"
    )
    assert one == (
        "relevance summed over 9 tests -4: 6.0 robust standard deviations below the median of "
        "the samples labelled cat; "
        "of the other classes it harms tests of dog most, at least 2 times as much as the next"
    )
    assert other == (
        "relevance summed over 9 tests -2.5: 3.2 robust standard deviations below the median "
        "of the samples labelled dog"
    )
