"""What treated training sets came to: rows of a table, and which of the treatments help."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.rank_statistics import crossed_interval
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
    rows = []
    for name, values in measured.values.items():
        row: Row = {"trained on": name, "changed": measured.changed[name]}
        control = measured.controls.get(name)
        for what, index in ((ACCURACY, HIT), (LOSSES, LOSS)):
            own = values[:, index]
            beside = None if control is None else own - measured.values[control][:, index]
            row |= _with_interval(what, own)
            row |= _with_interval(f"{what}_change", own - measured.values[measured.given][:, index])
            row |= _with_interval(f"{what}_over_random", beside)
        rows.append(row)
    return rows


def _with_interval(name: str, values: F64 | None) -> Row:
    # Accuracy is unknown if outputs or targets are not classes; losses are not finite if a
    # training diverged.
    if values is None or not np.isfinite(values).all():
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = crossed_interval(values) if values.shape[1] > 1 else (np.nan, np.nan)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


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
    over_given = {how: measured.gain(what, how, measured.given) for how in measured.controls}
    over_random = {how: measured.gain(what, how, by) for how, by in measured.controls.items()}
    ordered = sorted(over_given, key=lambda how: -float(over_given[how].mean()))
    helping = [
        how
        for how in ordered
        if crossed_interval(over_given[how])[0] > 0 and crossed_interval(over_random[how])[0] > 0
    ]
    harming = [how for how in ordered if crossed_interval(over_given[how])[1] < 0]

    def told(hows: list[str]) -> str:
        return ", ".join(f"{how} {_in_words(over_given[how], what)}" for how in hows)

    if helping:
        best, others = helping[0], helping[1:]
        text = (
            f"{what}: {best} helps most, {_in_words(over_given[best], what)} against training as "
            f"given and {_in_words(over_random[best], what)} against as many at random"
            f"{f'; also {told(others)}' if others else ''}"
        )
    else:
        text = (
            f"{what}: no treatment is shown to help; the most is {told(ordered[:1])} against "
            f"training as given, {_in_words(over_random[ordered[0]], what)} against as many at "
            "random"
        )
    if harming:
        text += f"; worse than training as given: {told(harming)}"
    says = [text]
    if len(ordered) > 1 and measured.n_tests >= _FEWEST_TO_HALVE:
        says.append(
            f"{what}: the best by one half of the tests, measured on the other half, gains "
            f"{_in_words(_chosen_by_halves(over_given), what)}"
        )
    return says


def _chosen_by_halves(gains: dict[str, F64]) -> F64:
    """Return the gains of the treatment that is best on one half, on the other half.

    The best of several treatments looks better than it is on the tests that have chosen it.

    Args:
        gains: gain of each treatment, shape (seed, test).

    Returns:
        Shape (seed, test).
    """
    stacked = np.stack(list(gains.values()))
    half = np.zeros(stacked.shape[2], bool)
    half[np.random.default_rng(_SEED).permutation(len(half))[::2]] = True
    found: F64 = np.empty(stacked.shape[1:])
    for chooses in (half, ~half):
        best = int(stacked[:, :, chooses].mean(axis=(1, 2)).argmax())
        found[:, ~chooses] = stacked[best][:, ~chooses]
    return found


def _in_words(gain: F64, what: str) -> str:
    """Return a mean gain with its interval. A loss falls where it gains."""
    low, high = crossed_interval(gain)
    mean = float(gain.mean())
    if what == LOSSES:
        mean, low, high = -mean, -high, -low
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
