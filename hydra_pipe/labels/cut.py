"""The number of labels to propose, and the number that is wrong, without any truth.

Both come from chances of being wrong. The constants were chosen on trainings with labels that were
made wrong on purpose, and on trainings without (`benchmarks/labels.py`).
"""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.types import F64

# Weight of recall in the expected F, squared: precision counts twice as much.
_RECALL = 0.5
# Error of the log-odds, all in the same direction: as large as in the trainings looked at.
_SHIFT = 1.5
# Share of right labels that a network that learns slowly makes look wrong.
_SLOW = 0.02
_TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A number with an interval.

    Attributes:
        value: best guess.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float


def number_wrong(chances: F64) -> Estimate:
    """Estimate how many labels are wrong.

    The interval shifts the log-odds of all chances together by 1.5, up and down. The low end also
    leaves out 2 % of the samples. It is no interval of sampling: the chances themselves are off.

    Args:
        chances: chance of each label to be wrong, shape (sample,).
    """
    odds = chances / np.maximum(1 - chances, _TINY)
    low, high = (
        float((shifted / (1 + shifted)).sum())
        for shifted in (odds * np.exp(-_SHIFT), odds * np.exp(_SHIFT))
    )
    total = float(chances.sum())
    return Estimate(total, max(0.0, low - _SLOW * len(chances)), max(high, total))


def recommended_cut(chances: F64) -> int:
    """Return the number of proposals with the largest expected F, which leans to precision.

    The first k of the samples in falling order of their chances pi have about

        F(k) ~ sum of the first k pi / (k + 0.5 sum of all pi)

    Labels that are likelier wrong than right are proposed in any case.

    Args:
        chances: chance of each label to be wrong, shape (sample,).

    Returns:
        k. 0 if no label can be wrong.
    """
    ordered = np.sort(chances)[::-1]
    total = ordered.sum()
    if total <= 0:
        return 0
    counts = np.arange(1, len(ordered) + 1)
    best = int((np.cumsum(ordered) / (counts + _RECALL * total)).argmax()) + 1
    return max(best, cautious_cut(chances))


def cautious_cut(chances: F64) -> int:
    """Return the number of labels that are likelier wrong than right."""
    return int((chances > 0.5).sum())
