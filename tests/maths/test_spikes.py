"""Steps that stand out from the steps before them."""

import numpy as np
import pytest

from hydra_pipe.maths.spikes import CUT, standing_out


def noisy(n: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """A loss that falls from 2.3 to 0.3, with noise in proportion to it."""
    rng = np.random.default_rng(seed)
    level = 0.3 + 2.0 * np.exp(-np.arange(n) / 100)
    return level * np.exp(scale * rng.normal(size=n))


def score_by_loop(values: np.ndarray, t: int) -> float:
    """The score of one step as the head of the module has it, of a positive series."""
    x = np.log(values)

    def apart(s: int) -> float:
        before = x[max(0, s - 20) : s]
        return x[s] - np.median(before) if len(before) >= 5 else np.nan

    earlier = np.array([apart(s) for s in range(max(0, t - 100), t)])
    earlier = earlier[np.isfinite(earlier)]
    if len(earlier) < 15:
        return np.nan
    scale = max(1.4826 * np.median(np.abs(earlier - np.median(earlier))), 0.02)
    return (apart(t) - max(np.median(earlier), 0)) / scale


@pytest.mark.parametrize("t", [0, 4, 19, 20, 21, 60, 130, 299])
def test_a_score_is_what_a_loop_over_the_steps_before_gives(t: int) -> None:
    values = noisy(300, 0)
    values[[60, 130]] *= 3
    expected = score_by_loop(values, t)
    np.testing.assert_allclose(standing_out(values).score[t], expected, rtol=1e-12)


@pytest.mark.parametrize("at", [40, 150, 299])
def test_one_high_step_is_found_and_no_other(at: int) -> None:
    values = noisy(300, 1)
    values[at] *= 2.5
    found = standing_out(values)
    assert np.flatnonzero(found.spikes).tolist() == [at]
    assert values[at] > found.line[at] > found.expected[at]


def test_smooth_noise_has_next_to_no_spikes() -> None:
    """1 of 100,000 steps; of 200 trainings of 500 steps one in a hundred would have five."""
    found = sum(int(standing_out(noisy(500, seed)).spikes.sum()) for seed in range(200))
    assert found <= 4


@pytest.mark.parametrize(
    "values",
    [
        np.full(100, 0.7),
        np.linspace(3, 0.1, 200),
        3 * np.exp(-np.arange(300) / 20.0) + 1e-4,
        np.r_[np.full(100, 2.0), np.full(100, 0.5)],
        np.zeros(100),
        -np.arange(100.0),
        np.array([]),
        np.array([1.0, 100.0]),
    ],
    ids=["constant", "line", "decay", "fall", "zero", "negative", "none", "two"],
)
def test_a_series_without_a_rise_has_no_spike(values: np.ndarray) -> None:
    assert not standing_out(values).spikes.any()


def test_a_rise_that_stays_is_a_spike_until_the_steps_before_know_it() -> None:
    values = np.r_[noisy(200, 2), 5 * np.exp(0.05 * np.random.default_rng(0).normal(size=100))]
    spikes = np.flatnonzero(standing_out(values).spikes)
    assert spikes[0] == 200
    assert (np.diff(spikes) == 1).all()
    assert spikes[-1] < 220


def test_a_spike_does_not_hide_the_next_one() -> None:
    values = noisy(300, 3)
    values[[100, 103, 110]] *= 4
    assert np.flatnonzero(standing_out(values).spikes).tolist() == [100, 103, 110]


def test_unknown_values_are_left_out_and_change_nothing_else() -> None:
    values = noisy(200, 4)
    values[120] *= 3
    with_gaps = np.full(400, np.nan)
    with_gaps[::2] = values
    with_gaps[1::4] = np.inf
    found, whole = standing_out(with_gaps), standing_out(values)
    np.testing.assert_array_equal(found.score[::2], whole.score)
    assert np.isnan(found.score[1::2]).all()
    assert np.flatnonzero(found.spikes).tolist() == [240]


def test_a_series_with_values_below_zero_is_judged_as_it_is() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=300)
    values[200] = 12
    found = standing_out(values)
    assert np.flatnonzero(found.spikes).tolist() == [200]
    assert found.score[200] > CUT


def test_pieces_of_steps_do_not_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    values = noisy(300, 6)
    whole = standing_out(values).score
    monkeypatch.setattr("hydra_pipe.maths.spikes._AT_ONCE", 7)
    np.testing.assert_array_equal(standing_out(values).score, whole)
