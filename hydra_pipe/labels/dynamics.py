"""Dynamics of a training: what the network thought of each sample at each visit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import DataError
from hydra_pipe.types import F64, I64, Bools, Floating

# A logit further from the largest one than this has no probability in float32.
DEEPEST = -80.0
# Some samples: a run of them, or their numbers.
Samples = slice | I64
_ALL = slice(None)
# Pairs of sample and class that are held at once.
CHANCES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class TopLogits:
    """The logits that are kept of a problem with many classes.

    Attributes:
        own: logit of the sample's label, shape (epoch, sample).
        largest: the largest logits, shape (epoch, sample, kept).
        classes: classes of the largest logits, integers of any width, shape (epoch, sample, kept).
        log_sum: logarithm of the sum of the exponentials of all logits, shape (epoch, sample).
        n_classes: number of classes.
    """

    own: Floating
    largest: Floating
    classes: NDArray[np.integer[Any]]
    log_sum: Floating
    n_classes: int

    @classmethod
    def of_columns(
        cls, logits: Floating, classes: NDArray[np.integer[Any]], n_classes: int
    ) -> "TopLogits":
        """Return the logits that a recording keeps, from its two columns.

        Args:
            logits: own logit, `log_sum`, then the largest logits, shape (epoch, sample, 2 + kept).
            classes: classes of the largest logits, shape (epoch, sample, kept).
            n_classes: number of classes.
        """
        return cls(logits[..., 0], logits[..., 2:], classes, logits[..., 1], n_classes)


@dataclass(frozen=True)
class Dynamics:
    """Visits of all training samples, epoch by epoch, and the labels as they were given.

    A sample that an epoch does not visit has logits that are not a number there.

    Attributes:
        labels: given label of each sample, int64 from 0, shape (sample,).
        logits: logits at each visit, float16 or wider, shape (epoch, sample, class); or what is
            kept of them if there are many classes.
        inputs: inputs of the last layer or projections of them, float16 or wider, shape (epoch,
            sample, feature). None: not recorded.

    Raises:
        DataError: shapes do not fit, or a label is outside of the classes.
    """

    labels: I64
    logits: Floating | TopLogits
    inputs: Floating | None = None

    def __post_init__(self) -> None:
        expected = (self.n_epochs, len(self.labels))
        arrays = (
            {"logits": self.logits}
            if not isinstance(self.logits, TopLogits)
            else {"largest": self.logits.largest, "own": self.logits.own}
        ) | ({} if self.inputs is None else {"inputs": self.inputs})
        for name, array in arrays.items():
            if array.shape[:2] != expected:
                raise DataError(
                    f"{name} has shape {array.shape}, and there are {expected[0]} epochs and "
                    f"{expected[1]} labels: give shape (epoch, sample, ...)"
                )
        if not expected[0] or not expected[1]:
            raise DataError(f"{expected[0]} epochs of {expected[1]} samples: there is no visit")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.n_classes:
            raise DataError(
                f"labels run from {low} to {high}, and the logits have {self.n_classes} classes: "
                f"number the labels from 0 in the order of the logits"
            )

    @property
    def n_epochs(self) -> int:
        """Number of epochs."""
        return len(self.logits.own if isinstance(self.logits, TopLogits) else self.logits)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        if isinstance(self.logits, TopLogits):
            return self.logits.n_classes
        return int(self.logits.shape[2])

    def centred(self, epoch: int, samples: Samples = _ALL) -> F64:
        """Return the logarithm of each class's probability at one epoch.

        Where only some logits are kept, the others share what the kept ones leave, evenly.

        Args:
            epoch: number of the epoch.
            samples: the samples. Default: all.

        Returns:
            Shape (sample, class). Rows without a finite visit are not a number.
        """
        if isinstance(self.logits, TopLogits):
            return _spread(self.logits, self.labels, epoch, samples)
        z = self.logits[epoch, samples].astype(np.float64)
        z[~np.isfinite(z).all(axis=1)] = np.nan
        z -= z.max(axis=1, keepdims=True)
        z = np.maximum(z, DEEPEST)
        found: F64 = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return found


def _spread(top: TopLogits, labels: I64, epoch: int, samples: Samples) -> F64:
    own = labels[samples]
    total = top.log_sum[epoch, samples].astype(np.float64)
    known = np.full((len(own), top.n_classes), np.nan)
    known[np.arange(len(own)), own] = top.own[epoch, samples] - total
    classes, largest = top.classes[epoch, samples], top.largest[epoch, samples]
    np.put_along_axis(known, classes.astype(np.int64), largest - total[:, None], axis=1)
    is_kept = ~np.isnan(known)
    left = 1 - np.exp(np.where(is_kept, known, -np.inf)).sum(axis=1)
    share = np.maximum(left, 0) / np.maximum((~is_kept).sum(axis=1), 1)
    rest = np.log(np.maximum(share, np.exp(DEEPEST)))
    spread = np.where(is_kept, np.maximum(known, DEEPEST), rest[:, None])
    spread[~np.isfinite(total) | ~is_kept.any(axis=1)] = np.nan
    found: F64 = spread - np.log(np.exp(spread).sum(axis=1, keepdims=True))
    return found


def blocks_of(n_samples: int, n_classes: int) -> Iterator[slice]:
    """Yield blocks of samples whose chances are held together: 16 MiB an array."""
    height = max(1, CHANCES_AT_ONCE // n_classes)
    for first in range(0, n_samples, height):
        yield slice(first, min(first + height, n_samples))


def visited(log_probabilities: F64) -> Bools:
    """Return the flag of each sample that was visited, shape (sample,)."""
    return np.isfinite(log_probabilities[:, 0])
