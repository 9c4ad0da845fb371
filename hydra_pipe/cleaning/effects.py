"""Results of training on treated training sets: a table, and which of the treatments help."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.rank_statistics import crossed_intervals
from hydra_pipe.retraining.intervals import ONE_TEST
from hydra_pipe.retraining.retrainer import HIT, LOSS
from hydra_pipe.types import F64

_SEED = 0x636C65
ACCURACY, LOSSES = "accuracy", "loss"
# Fewest tests whose one half can choose a treatment for the other half.
_FEWEST_TO_HALVE = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Losses and hits of test samples.

    Args:
        values: loss and hit of each measuring test, by the name of the row, each of shape (seed,
            2, test).
        changed: number of samples that each row changes.
        controls: name of the random row of each treatment, by the name of the treatment.
        given: name of the row that is trained as given.
    """

    values: dict[str, NDArray[np.float64]]
    changed: dict[str, int]
    controls: dict[str, str]
    given: str

    @property
    def n_tests(self) -> int:
        """Number of measurements of a training, over all folds."""
        return int(self.values[self.given].shape[2])

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(self.values[self.given].shape[0])

    @property
    def has_accuracy(self) -> bool:
        """True if outputs and targets are classes."""
        return not any(np.isnan(own[:, HIT]).any() for own in self.values.values())

    def gain(self, what: str, name: str, other: str) -> F64:
        """Return how much better a row is than another one, shape (seed, test).

        Args:
            what: "accuracy", or "loss", which gains by falling.
            name, other: names of the rows.
        """
        index, sign = (HIT, 1.0) if what == ACCURACY else (LOSS, -1.0)
        found: F64 = sign * (self.values[name][:, index] - self.values[other][:, index])
        return found


def rows_of(measured: Measured) -> list[Row]:
    """Return the rows of `retraining.parquet`."""
    rows: list[Row] = []
    series: list[tuple[Row, str, F64 | None]] = []
    for name, values in measured.values.items():
        row: Row = {"trained on": name, "changed": measured.changed[name]}
        rows.append(row)
        control = measured.controls.get(name)
        for what, index in ((ACCURACY, HIT), (LOSSES, LOSS)):
            own, given = values[:, index], measured.values[measured.given][:, index]
            beside = None if control is None else own - measured.values[control][:, index]
            series += [
                (row, what, own),
                (row, f"{what}_change", own - given),
                (row, f"{what}_over_random", beside),
            ]
    # Accuracy is unknown if outputs or targets are not classes; losses are not finite if a
    # training diverged.
    known = [None if v is None or not np.isfinite(v).all() else v for _, _, v in series]
    found = iter(intervals_of([values for values in known if values is not None]))
    for (row, name, _), is_known in zip(series, known, strict=True):
        one = None if is_known is None else next(found)
        row |= {
            name: None if one is None else one.mean,
            f"{name}_low": None if one is None else one.low,
            f"{name}_high": None if one is None else one.high,
        }
    return rows


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of 95 %. The bounds are not a number if there is one test."""

    mean: float
    low: float
    high: float


def intervals_of(series: Sequence[F64]) -> list[Interval]:
    """Return the mean and interval of each series, shape (seed, test)."""
    if not len(series):
        return []
    stacked = np.stack(list(series))
    bounds = (
        crossed_intervals(stacked) if stacked.shape[2] > 1 else np.full((len(stacked), 2), np.nan)
    )
    return [
        Interval(float(own.mean()), float(low), float(high))
        for own, (low, high) in zip(stacked, bounds, strict=True)
    ]


def says_of(measured: Measured) -> list[str]:
    """Return lines for a person: how it was measured, and which treatments help."""
    n, seeds = measured.n_tests, measured.seeds
    says = [
        f"{n:,} tests, {seeds} {'seeds' if seeds > 1 else 'seed'}; intervals of 95 % by drawing "
        "seeds and tests anew, 2,000 times; changes are against training as given, over_random "
        "against as many at random, test by test"
    ]
    if seeds == 1:
        says.append(
            "with one seed intervals do not show how another training would come out: add --seeds 3"
        )
    if n < 2:
        return [*says, ONE_TEST]
    if not all(np.isfinite(own[:, LOSS]).all() for own in measured.values.values()):
        return [*says, "a training diverged: which treatment helps cannot be said"]
    whats = (ACCURACY, LOSSES) if measured.has_accuracy else (LOSSES,)
    return [*says, *(line for what in whats for line in _which_helps(measured, what))]


def _which_helps(measured: Measured, what: str) -> list[str]:
    """Return which treatments are better than training as given, and than as many at random."""
    hows = list(measured.controls)
    gains = [measured.gain(what, how, measured.given) for how in hows]
    chosen = _chosen_by_halves(gains)
    found = intervals_of(
        [*gains, *(measured.gain(what, how, measured.controls[how]) for how in hows), chosen]
    )
    over_given = dict(zip(hows, found, strict=False))
    over_random = dict(zip(hows, found[len(hows) :], strict=False))
    ordered = sorted(hows, key=lambda how: -over_given[how].mean)
    helping = [how for how in ordered if min(over_given[how].low, over_random[how].low) > 0]
    harming = [how for how in ordered if over_given[how].high < 0]

    def told(hows: list[str]) -> str:
        return ", ".join(f"{how} {_in_words(over_given[how], what)}" for how in hows)

    best, others = (helping or ordered)[0], helping[1:]
    beside = f"{_in_words(over_random[best], what)} against as many at random"
    if helping:
        text = (
            f"{what}: {best} helps most, {_in_words(over_given[best], what)} against training as "
            f"given and {beside}{f'; also {told(others)}' if others else ''}"
        )
    else:
        text = (
            f"{what}: no treatment is shown to help; the most is {told([best])} against training "
            f"as given, {beside}"
        )
    if harming:
        text += f"; worse than training as given: {told(harming)}"
    if len(hows) == 1 or measured.n_tests < _FEWEST_TO_HALVE:
        return [text]
    by_halves = (
        f"{what}: the best by one half of the tests, measured on the other half, gains "
        f"{_in_words(found[-1], what)}"
    )
    return [text, by_halves]


def _chosen_by_halves(gains: Sequence[F64]) -> F64:
    """Return the gains of the treatment that is best on one half, on the other half.

    The best of several treatments looks better than it is on the tests that have chosen it.

    Args:
        gains: gain of each treatment, shape (seed, test).

    Returns:
        Shape (seed, test).
    """
    stacked = np.stack(gains)
    half = np.zeros(stacked.shape[2], bool)
    half[np.random.default_rng(_SEED).permutation(len(half))[::2]] = True
    found: F64 = np.empty(stacked.shape[1:])
    for chooses in (half, ~half):
        best = int(stacked[:, :, chooses].mean(axis=(1, 2)).argmax())
        found[:, ~chooses] = stacked[best][:, ~chooses]
    return found


def _in_words(gain: Interval, what: str) -> str:
    """Return a mean gain with its interval. A loss falls where it gains."""
    mean, low, high = gain.mean, gain.low, gain.high
    if what == LOSSES:
        mean, low, high = -mean, -high, -low
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
