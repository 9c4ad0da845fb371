"""Which training samples are proposed, and why. Arrays in, arrays out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.maths.tails import robust_scores, tail_threshold

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# the class that a sample harms most suggests its label if it is harmed this many times as much as the next one
CLEAR = 2.0


@dataclass(frozen=True)
class Cut:
    """How many are proposed.

    Args:
        lowest: so many; None: as many as score below the threshold.
        threshold: scores below it are proposed; None: it is fitted, see `tail_threshold`.

    Raises:
        UsageError: both are given, or a value cannot be.
    """

    lowest: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.lowest is not None and self.threshold is not None:
            raise UsageError("--lowest and --threshold: choose one of them")
        if self.lowest is not None and self.lowest < 1:
            raise UsageError(f"--lowest {self.lowest}: give 1 or more")
        if self.threshold is not None and not -np.inf < self.threshold < 0:
            raise UsageError(f"--threshold {self.threshold:g}: give a number below 0, such as -3")

    @property
    def is_fitted(self) -> bool:
        """Tell whether nobody has said how many, or below which score."""
        return self.lowest is None and self.threshold is None

    def of(self, scores: Floats, judged: NDArray[np.bool_] | None = None) -> Ints:
        """Ids of the samples that are proposed, the lowest score first; ties go to the smaller id.

        Args:
            scores: shape (sample,).
            judged: which samples may be proposed, shape (sample,); None: all.

        Raises:
            UsageError: that would be all of them.
        """
        candidates = np.arange(len(scores)) if judged is None else np.flatnonzero(judged)
        own = scores[candidates]
        order = candidates[np.argsort(own, kind="stable")]
        n = self.lowest if self.lowest is not None else int((own < self.below(own)).sum())
        if n >= len(scores):
            raise UsageError(f"--lowest {n}: there are {len(scores)} training samples, and some must stay: give fewer")
        return order[:n]

    def below(self, scores: Floats) -> float:
        """The threshold; minus infinity where nothing is found to be odd."""
        if self.threshold is not None:
            return self.threshold
        return tail_threshold(scores) if len(scores) else -np.inf


def scores_of(sums: Floats, labels: NDArray[Any] | None) -> Floats:
    """How far each sample's summed relevance is from that of the samples with its label, see `robust_scores`. Shape (sample,)."""
    return robust_scores(sums, labels)


def most_harmed(by_class: Floats, classes: NDArray[Any], labels: NDArray[Any]) -> Ints:
    """Class that a sample's label is likely to be instead: the one whose tests it harms most, if it is clear which that is.

    A sample with a wrong label teaches that what looks like its true class is another one, and so harms that class's tests.

    Args:
        by_class: mean relevance of each sample for the tests of each class, shape (sample, class).
        classes: labels of the classes, shape (class,).
        labels: of the samples, shape (sample,).

    Returns:
        Indices into `classes`, shape (sample,); -1 where it is not clear: none of the others is harmed, or another one is harmed
        more than 1 / `CLEAR` times as much.
    """
    harm = np.where(classes[None, :] == labels[:, None], -np.inf, -by_class)
    worst = harm.argmax(axis=1)
    first = harm[np.arange(len(harm)), worst]
    harm[np.arange(len(harm)), worst] = -np.inf
    clear = (first > 0) & (first >= CLEAR * harm.max(axis=1))
    return np.where(clear, worst, -1)


def reasons(sums: Floats, scores: Floats, ids: Ints, labels: NDArray[Any] | None, suggested: Sequence[Any], what: str) -> list[str]:
    """In words and numbers, for each of `ids`, why it is proposed.

    Args:
        sums, scores, labels: of all samples.
        ids: those that are proposed.
        suggested: a label for each of them, or None.
        what: the relevance that is summed, in words.
    """
    found = []
    for sample, label in zip(ids, suggested, strict=True):
        side = "below" if scores[sample] < 0 else "above"
        others = "all samples" if labels is None else f"the samples labelled {labels[sample]}"
        text = f"{what} {sums[sample]:.4g}: {abs(scores[sample]):.1f} robust standard deviations {side} the median of {others}"
        if label is not None:
            text += f"; of the other classes it harms tests of {label} most, at least {CLEAR:g} times as much as the next"
        found.append(text)
    return found
