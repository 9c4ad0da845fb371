"""Cautions for a reader of a result, in plain words: docs/methods.md in short."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.content import NoRelevance
from hydra_pipe.reporting.duplicates import Duplicates
from hydra_pipe.reporting.labels import JudgedLabels
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, Rank, ResultName
from hydra_pipe.store.run.stages import REDUCE, REPORT

# Thresholds of warnings: less curvature left by saturation than this, or more imbalance than
# this.
LITTLE_CURVATURE, MUCH_IMBALANCE = 0.5, 1e-3
# Share of the test samples predicted right, above that of one class for all: below it, little
# has been learnt.
LITTLE_LEARNT = 0.25
# Share of the labels that look wrong from which their most frequent confusion is named.
FREQUENT = 0.1

_NUMBERS = (
    *("none", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
METHODS = {
    "hydra": "adds up what each training step did to the test loss, and leaves out how later "
    "steps changed it (no curvature). "
    "It ranks mislabelled samples well. As a prediction of leaving a sample out it is poor on "
    "long runs and on runs with "
    "momentum, where its values come out many times too large: use its order.",
    "hydra-fisher": "goes back through training with the curvature that the recorded gradients "
    "show (the empirical Fisher, bounded "
    "where a step was too large for it). It is an approximation, usually the best that needs no "
    "second training.",
    "hydra-exact": "trains again and differentiates the training itself. It is exact for a small "
    "change of a sample's weight; "
    "where training is not smooth, that says little of leaving many samples out.",
    "tracin": "adds up what the steps have lowered the test loss by, to first order. What was "
    "learnt early counts in full, though "
    "later steps may have undone it.",
    "grad-dot": "multiplies the last gradient of a training sample with the gradient of the test "
    "sample. Only its order means anything: large gradients, of mislabelled and odd samples, come "
    "first everywhere.",
    "grad-cos": "is the cosine between the last gradient of a training sample and the gradient of "
    "the test sample: only directions count.",
    "influence": "assumes that training has ended in an optimum and asks how that moves "
    "(influence functions, with the empirical "
    "Fisher of the last gradients). How training got there is left out.",
}

# What a method leaves to others at a rank.
_OF_RANK = {
    "hydra-exact": (
        "Only {:,} directions of the test gradients were replayed: hydra-fisher answers for the "
        "rest."
    ),
}


@dataclass(frozen=True)
class Circumstances:
    """Facts about how a result was made.

    Args:
        method: method of the result, without suffixes.
        rank: value of `--rank`. None means what the method takes without it.
        up_to_step: number of steps that the result covers, for `--up-to-step`. None means all.
        record, reduce: facts of the two stages.
        n_samples: number of training samples.
        n_rows: number of recorded rows.
        unvisited: number of training samples that no step used.
        projected, n_blocks: numbers of projected blocks, and of all blocks.
        strange: number of pairs whose relevance is infinite or not a number.
    """

    method: str
    rank: Rank | None
    up_to_step: int | None
    record: Mapping[str, Any]
    reduce: Mapping[str, Any]
    n_samples: int
    n_rows: int
    unvisited: int
    projected: int
    n_blocks: int
    strange: int


def warnings(what: Circumstances) -> list[str]:
    """Return cautions of a sentence or two each, the gravest first."""
    found: list[str] = []
    if what.strange:
        found.append(
            f"{what.strange:,} values of the relevance are infinite or not a number: do not rely "
            "on this result."
        )
    imbalance = _number(what.record.get("worst_imbalance"))
    if imbalance is not None and imbalance > MUCH_IMBALANCE:
        found.append(
            f"The books do not balance well: at the worst step {_percent(imbalance)} of a "
            "parameter's gradient is in no sample's "
            f"record. Something, such as half precision, was rounded, or was not recorded."
        )
    left = _number(what.reduce.get("curvature_left"))
    if left is not None and left < LITTLE_CURVATURE:
        found.append(
            f"Saturation has left {_percent(left)} of the curvature: the training steps were "
            "large against it, and the result "
            "leans on how it was bounded. A run with a lower learning rate, or hydra-exact, "
            "tells more."
        )
    if what.projected:
        found.append(
            f"{what.projected} of {what.n_blocks} parameters were recorded by random projection: "
            "each value is an unbiased "
            "estimate with noise in it, which hides small relevance first and costs methods "
            "with curvature most."
        )
    curved = what.record.get("n_curved_rows")
    if what.method in ("hydra-fisher", "influence") and is_count(curved) and curved < what.n_rows:
        found.append(
            f"Of {what.n_rows - curved:,} of {what.n_rows:,} recorded gradients the curvature of "
            "the loss is not known: they count "
            f"as if their Fisher were it. Tell the recorder the loss (Recorder.set_loss)."
        )
    if what.up_to_step is not None:
        found.append(
            f"This is the relevance of the first {what.up_to_step:,} steps, as if training had "
            "ended "
            "there."
        )
    if isinstance(what.rank, int) and what.method in _OF_RANK:
        found.append(_OF_RANK[what.method].format(what.rank))
    if what.unvisited:
        found.append(
            f"{what.unvisited:,} of {what.n_samples:,} training samples were in no recorded "
            "step: their relevance is 0, which says "
            f"nothing about them."
        )
    return found


def hardly_learnt(right: NDArray[np.float64], targets: Sequence[Any]) -> list[str]:
    """Return a caution if test samples are predicted little better than by one class for all.

    Args:
        right: 1 for each prediction that is right, else 0, shape (test,).
        targets: class of each test sample.
    """
    _, counts = np.unique(np.array(targets), return_counts=True)
    base, share = float(counts.max() / counts.sum()), float(right.mean())
    if base == 1.0 or (share - base) / (1 - base) >= LITTLE_LEARNT:
        return []
    return [
        f"The network has hardly learnt: it predicts {_percent(share)} of the test samples right, "
        f"and their most frequent class alone would be right for {_percent(base)}. What made a "
        "prediction says little before the network has learnt: train longer."
    ]


def without_relevance(run: RunDirectory) -> NoRelevance:
    """Return what a page without relevance lacks, and the command that leads to it."""
    reduced = [name for name in run.complete(REDUCE) if not ResultName.parse(name).is_of_itself]
    if reduced:
        return NoRelevance(
            "Which training samples made a prediction is on the page of a result",
            run.command(REPORT.of(reduced[0])),
        )
    return NoRelevance(
        "Which training samples made a prediction, and which tests a wrong label hurts, is on "
        "the page that report writes after",
        run.command(REDUCE.of(DEFAULT_METHOD)),
    )


def number(n: int) -> str:
    """Return a number as people write it: words up to twelve, then digits."""
    return _NUMBERS[n] if n < len(_NUMBERS) else f"{n:,}"


def labels_title(judged: JudgedLabels, n_first: int) -> str:
    """Return the heading of the labels that look wrong.

    Args:
        judged: the labels.
        n_first: number of labels that are shown first.
    """
    if not len(judged.proposed):
        return f"None of {judged.n_samples:,} labels looks wrong enough to check"
    n_wrong = max(1, round(judged.n_wrong[0]))
    often = ""
    if judged.most_often is not None:
        given, suggested, n = judged.most_often
        if n > FREQUENT * len(judged.proposed):
            how = "most of them" if 2 * n > len(judged.proposed) else "most often"
            often = f", {how} {judged.classes[suggested]} taken for {judged.classes[given]}"
    n_shown = min(n_first, len(judged.doubts))
    here = "here is one" if n_shown == 1 else f"here are {number(n_shown)}"
    look = "label looks" if judged.n_samples == 1 else "labels look"
    return f"About {n_wrong:,} of {judged.n_samples:,} {look} wrong{often}: {here}"


def about_labels(judged: JudgedLabels) -> list[str]:
    """Return sentences about the labels that look wrong."""
    _, low, high = judged.n_wrong
    found = [
        f"Judged by what the network thought of each sample while it trained. Between {low:,.0f} "
        f"and {high:,.0f} labels may be wrong; {len(judged.proposed):,} are proposed, the most "
        "suspicious first."
    ]
    if len(judged.proposed) > len(judged.doubts):
        found.append(
            f"The page has the first {len(judged.doubts):,}. All are in relabel.parquet, which "
            "hydra-pipe clean writes."
        )
    return found


def alike_in_words(found: Duplicates | str) -> str:
    """Return a sentence about the inputs that are alike, or the reason why there is none."""
    if isinstance(found, str):
        return f"Inputs were not compared: {found}"
    compared = f"{found.n_train:,} training samples and {found.n_test:,} test samples"
    if not found.n_pairs:
        return f"No two of {compared} are the same, or nearly."
    pairs = "pair is" if found.n_pairs == 1 else "pairs are"
    return (
        f"{found.n_pairs:,} {pairs} the same, or nearly, among {compared}. The labels differ in "
        f"{found.n_differ:,} of them, and {found.n_across:,} join a training sample and a test "
        "sample."
    )


def sign_in_words(unit: str) -> str:
    """Return how to read a value of relevance."""
    more = (
        "about so much is added to the test loss" if unit == "test loss" else f"in units of {unit}"
    )
    return (
        "A positive value means helpful: without the training sample the test loss would be "
        f"higher ({more}). A negative value "
        f"means harmful: without it the test loss would be lower."
    )


def _number(value: Any) -> float | None:
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        else None
    )


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"
