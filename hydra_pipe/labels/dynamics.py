"""Dynamics of a training: what the network thought of each sample at each visit."""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.errors import DataError
from hydra_pipe.types import F64, I64, Bools, Floating

# A logit further from the largest one than this has no probability in float32.
DEEPEST = -80.0


@dataclass(frozen=True)
class TopLogits:
    """The logits that are kept of a problem with many classes.

    Attributes:
        own: logit of the sample's label, shape (epoch, sample).
        largest: the largest logits, shape (epoch, sample, kept).
        classes: classes of the largest logits, integers, shape (epoch, sample, kept).
        log_sum: logarithm of the sum of the exponentials of all logits, shape (epoch, sample).
        n_classes: number of classes.
    """

    own: Floating
    largest: Floating
    classes: I64
    log_sum: Floating
    n_classes: int


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

    def centred(self, epoch: int) -> F64:
        """Return the logarithm of each class's probability at one epoch.

        Where only some logits are kept, the others share what the kept ones leave, evenly.

        Returns:
            Shape (sample, class). Rows without a finite visit are not a number.
        """
        if isinstance(self.logits, TopLogits):
            return _spread(self.logits, self.labels, epoch)
        z = self.logits[epoch].astype(np.float64)
        z[~np.isfinite(z).all(axis=1)] = np.nan
        z -= z.max(axis=1, keepdims=True)
        z = np.maximum(z, DEEPEST)
        found: F64 = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return found


def _spread(top: TopLogits, labels: I64, epoch: int) -> F64:
    n = len(labels)
    rows = np.arange(n)
    total = top.log_sum[epoch].astype(np.float64)
    known = np.full((n, top.n_classes), np.nan)
    known[rows, labels] = top.own[epoch] - total
    np.put_along_axis(
        known, top.classes[epoch].astype(np.int64), top.largest[epoch] - total[:, None], axis=1
    )
    is_kept = ~np.isnan(known)
    left = 1 - np.exp(np.where(is_kept, known, -np.inf)).sum(axis=1)
    share = np.maximum(left, 0) / np.maximum((~is_kept).sum(axis=1), 1)
    rest = np.log(np.maximum(share, np.exp(DEEPEST)))
    spread = np.where(is_kept, np.maximum(known, DEEPEST), rest[:, None])
    spread[~np.isfinite(total) | ~is_kept.any(axis=1)] = np.nan
    found: F64 = spread - np.log(np.exp(spread).sum(axis=1, keepdims=True))
    return found


def visited(log_probabilities: F64) -> Bools:
    """Return the flag of each sample that was visited, shape (sample,)."""
    return np.isfinite(log_probabilities[:, 0])
