"""Steps of a training whose loss stands out from the steps before, by robust statistics.

Symbols: x_t the loss of step t, or its logarithm; l_t the level that the steps before let expect.

    l_t = median of the 20 steps before t               r_t = x_t - l_t
    m_t, s_t = median of the 100 r before t, and 1.4826 times their median absolute deviation
    score_t = (r_t - max(m_t, 0)) / max(s_t, floor)     a spike has a score above 5

x is the logarithm where all values are positive: batch losses scatter in proportion to their
level. A falling level makes m_t negative, and is not subtracted: scores are then too low, never
too high. All statistics look back, so that a step does not hide behind its own consequences.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hydra_pipe.types import F64, Bools

# Score above which a step is a spike. Independent normal noise exceeds it at 1 of 100,000 steps,
# at 7 of them among the first hundred, and at 9 if neighbours correlate by 0.9.
CUT = 5.0
# Steps that a level and a scale look back, and the fewest that they need.
_LEVEL, _FEWEST_LEVEL = 20, 5
_SCALE, _FEWEST_SCALE = 100, 15
# Standard deviation of a normal distribution over its median absolute deviation.
_OF_MEDIAN = 1.4826
# Least scale, as a share of the loss: a spike is at least 10 % above its level.
_FLOOR = 0.02
# Steps whose windows are sorted at once.
_AT_ONCE = 10_000


@dataclass(frozen=True)
class Standing:
    """The series beside what the steps before let expect. Not a number where it is not judged.

    Attributes:
        expected: level of each step, in units of the series, shape (step,).
        line: value above which a step is a spike, in units of the series, shape (step,).
        score: distance above the level in robust standard deviations, shape (step,).
    """

    expected: F64
    line: F64
    score: F64

    @property
    def spikes(self) -> Bools:
        """True for each step whose score is above the cut, shape (step,)."""
        return np.asarray(self.score > CUT)


def standing_out(values: F64) -> Standing:
    """Judge each step of a series by the steps before it.

    Args:
        values: loss or gradient norm of each step, shape (step,). Steps without a finite value are
            left out.
    """
    known = np.flatnonzero(np.isfinite(values))
    own = values[known].astype(np.float64)
    is_log = bool((own > 0).all())
    x = np.log(own) if is_log else own
    level = _medians_before(x, _LEVEL, _FEWEST_LEVEL)
    apart = x - level
    centre = _medians_before(apart, _SCALE, _FEWEST_SCALE)
    scale = _OF_MEDIAN * _deviations_before(apart, centre)
    floor = np.full(len(x), _FLOOR) if is_log else _FLOOR * np.abs(level)
    scale = np.maximum(scale, floor + np.finfo(np.float64).tiny)
    expected = level + np.maximum(centre, 0)
    score, line = (x - expected) / scale, expected + CUT * scale
    unit = np.exp if is_log else np.asarray
    found = np.full((3, len(values)), np.nan)
    found[:, known] = unit(expected), unit(line), score
    return Standing(*found)


def _medians_before(x: F64, width: int, fewest: int) -> F64:
    """Return the median of the `width` values before each one. NaN of fewer than `fewest`."""
    found = np.full(len(x), np.nan)
    for steps, windows in _windows(x, width, fewest):
        found[steps] = np.nanmedian(windows, axis=1)
    return found


def _deviations_before(x: F64, centre: F64) -> F64:
    """Return the median distance from `centre` of the values before each one."""
    found = np.full(len(x), np.nan)
    for steps, windows in _windows(x, _SCALE, _FEWEST_SCALE):
        found[steps] = np.nanmedian(np.abs(windows - centre[steps, None]), axis=1)
    return found


def _windows(x: F64, width: int, fewest: int) -> list[tuple[slice, F64]]:
    """Return the values before each step that has enough of them, in pieces of steps."""
    first = int(np.flatnonzero(np.isfinite(x))[:1].sum()) + fewest
    padded = np.concatenate([np.full(width, np.nan), x])
    windows = sliding_window_view(padded, width)[: len(x)]
    return [
        (slice(low, min(low + _AT_ONCE, len(x))), windows[low : min(low + _AT_ONCE, len(x))])
        for low in range(first, len(x), _AT_ONCE)
    ]
