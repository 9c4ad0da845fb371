"""The choice of training samples to propose, with reasons. Arrays in, arrays out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.maths.outliers import robust_scores, tail_threshold
from hydra_pipe.types import F64, I64

# The class that a sample harms most suggests the sample's label if it is harmed this many times
# as much as the next class.
CLEAR = 2.0


@dataclass(frozen=True)
class Cut:
    """The rule for how many samples to propose.

    Args:
        lowest: number of samples to propose. None means all that score below the threshold.
        threshold: score below which samples are proposed. None means a fitted one, see
            `tail_threshold`.
        cautious: True to propose only samples whose label is likelier wrong than right.

    Raises:
        UsageError: both are given, or a value is not possible.
    """

    lowest: int | None = None
    threshold: float | None = None
    cautious: bool = False

    def __post_init__(self) -> None:
        if self.lowest is not None and self.threshold is not None:
            raise UsageError("--lowest and --threshold: choose one of them")
        if self.cautious and not self.is_fitted:
            given = "--lowest" if self.lowest is not None else "--threshold"
            raise UsageError(f"--cautious and {given}: choose one of them")
        if self.lowest is not None and self.lowest < 1:
            raise UsageError(f"--lowest {self.lowest}: give 1 or more")
        if self.threshold is not None and not -np.inf < self.threshold < 0:
            raise UsageError(f"--threshold {self.threshold:g}: give a number below 0, such as -3")

    @property
    def is_fitted(self) -> bool:
        """True if the user gave neither a number of samples nor a threshold."""
        return self.lowest is None and self.threshold is None

    def of(self, scores: F64, judged: NDArray[np.bool_] | None = None) -> I64:
        """Return the ids to propose, the lowest score first; ties go to the smaller id.

        Args:
            scores: scores of the samples, shape (sample,).
            judged: mask of the samples that may be proposed, shape (sample,). None means all.

        Raises:
            UsageError: `lowest` would propose all samples.
        """
        candidates = np.arange(len(scores)) if judged is None else np.flatnonzero(judged)
        own = scores[candidates]
        order = candidates[np.argsort(own, kind="stable")]
        n = self.lowest if self.lowest is not None else int((own < self.below(own)).sum())
        check_some_stay(n, len(scores))
        return order[:n]

    def below(self, scores: F64) -> float:
        """Return the threshold, or minus infinity if no score is odd."""
        if self.threshold is not None:
            return self.threshold
        return tail_threshold(scores) if len(scores) else -np.inf


def check_some_stay(n_proposed: int, n_samples: int) -> None:
    """Refuse to propose all training samples. Raises: UsageError."""
    if n_proposed >= n_samples:
        raise UsageError(
            f"--lowest {n_proposed}: there are {n_samples} training samples, and some must stay: "
            "give fewer"
        )


def scores_of(sums: F64, labels: NDArray[Any] | None) -> F64:
    """Score how far each sample's summed relevance is from that of samples with the same label.

    See `robust_scores`. Shape (sample,).
    """
    return robust_scores(sums, labels)


def most_harmed(by_class: F64, classes: NDArray[Any], labels: NDArray[Any]) -> I64:
    """Return the class that each sample's label probably should be, if it is clear.

    The class is the one whose tests the sample harms most. A sample with a wrong label teaches
    that inputs like its true class belong to another class, and so harms the tests of its true
    class.

    Args:
        by_class: mean relevance of each sample for the tests of each class, shape (sample,
            class).
        classes: labels of the classes, shape (class,).
        labels: labels of the samples, shape (sample,).

    Returns:
        Indices into `classes`, shape (sample,). The index is -1 if the class is not clear. No
        other class is harmed, or a second one is harmed more than 1 / `CLEAR` times as much.
    """
    harm = np.where(classes[None, :] == labels[:, None], -np.inf, -by_class)
    worst = harm.argmax(axis=1)
    first = harm[np.arange(len(harm)), worst]
    harm[np.arange(len(harm)), worst] = -np.inf
    clear = (first > 0) & (first >= CLEAR * harm.max(axis=1))
    return np.where(clear, worst, -1)


def reasons(
    sums: F64,
    scores: F64,
    ids: I64,
    labels: NDArray[Any] | None,
    suggested: Sequence[Any],
    what: str,
) -> list[str]:
    """Return why each of `ids` is proposed, in words and numbers.

    Args:
        sums, scores, labels: values of all samples, shape (sample,).
        ids: ids of the proposed samples.
        suggested: suggested label of each proposed sample, or None.
        what: name of the summed relevance, in words.
    """
    found = []
    for sample, label in zip(ids, suggested, strict=True):
        side = "below" if scores[sample] < 0 else "above"
        others = "all samples" if labels is None else f"the samples labelled {labels[sample]}"
        text = (
            f"{what} {sums[sample]:.4g}: {abs(scores[sample]):.1f} robust standard deviations "
            f"{side} the median of {others}"
        )
        if label is not None:
            text += (
                f"; of the other classes it harms tests of {label} most, at least {CLEAR:g} "
                "times as much as the next"
            )
        found.append(text)
    return found
