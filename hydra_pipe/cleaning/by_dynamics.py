"""A proposal by the dynamics of the training: labels that the network did not believe."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.decision import Cut, check_some_stay
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.cleaning.visits import dynamics_of
from hydra_pipe.labels.dynamics import Dynamics
from hydra_pipe.labels.judging import Verdict, judge
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import RELABEL, WARNINGS, dynamics_schema
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.types import I64


def proposed_by_dynamics(directory: RunDirectory, cut: Cut, progress: Progress) -> Cleaning:
    """Return the proposal of samples whose labels the network did not believe. Writes nothing.

    Raises:
        RunError: the recording has no logits.
        DataError: a label is not known, or changes.
        StoreError: the recording is damaged.
        UsageError: `cut` would propose all samples.
    """
    gradients, counts = open_recording(directory, None)
    return proposed_from(gradients, *dynamics_of(gradients), counts.n_samples, cut, progress)


def proposed_from(
    gradients: Gradients, ids: I64, dynamics: Dynamics, n_samples: int, cut: Cut, progress: Progress
) -> Cleaning:
    """Return the proposal from dynamics that were read before.

    Args:
        gradients: the recording.
        ids: ids of the samples that were visited, shape (judged,).
        dynamics: dynamics of these samples.
        n_samples: number of all training samples.
        cut: rule for how many to propose.
        progress: place to show progress.

    Raises:
        UsageError: `cut` would propose all samples.
    """
    with progress.task("judge labels", 1, "run") as task:
        verdict = judge(dynamics)
        task.advance(1)
    chosen = _chosen(verdict, cut, n_samples)
    classes = class_labels(gradients.labels(names.TRAIN_LABELS), ids, dynamics)
    drop = _table(gradients.run_id, ids, dynamics, verdict, chosen, classes)
    summary = {
        "run_id": gradients.run_id,
        "method": DYNAMICS,
        "lowest": cut.lowest,
        "cautious": cut.cautious,
        "n_samples": n_samples,
        "n_proposed": len(chosen),
        RELABEL: len(chosen),
        "n_wrong": [verdict.n_wrong.value, verdict.n_wrong.low, verdict.n_wrong.high],
        WARNINGS: list(verdict.warnings),
        "says": _says(dynamics, verdict, chosen, classes, n_samples, cut),
    }
    keep = np.setdiff1d(np.arange(n_samples), ids[chosen])
    return Cleaning(True, keep, drop, [], summary)


def _chosen(verdict: Verdict, cut: Cut, n_samples: int) -> I64:
    """Return places of the proposed samples among the judged ones, the most suspicious first."""
    n = verdict.n_cautious if cut.cautious else verdict.n_proposed
    n = n if cut.lowest is None else cut.lowest
    check_some_stay(n, n_samples)
    return verdict.order[:n]


def class_labels(recorded: NDArray[Any] | None, ids: I64, dynamics: Dynamics) -> NDArray[Any]:
    """Return the label of each class of the logits, shape (class,).

    The recorded labels are the labels of classes if each class has a most frequent label of its
    own. Otherwise classes are called by their numbers.

    Args:
        recorded: labels of all training samples, or None.
        ids: ids of the judged samples.
        dynamics: dynamics of these samples.
    """
    numbers = np.arange(dynamics.n_classes)
    if recorded is None:
        return numbers
    found: list[Any] = []
    for number in numbers:
        own = Counter(recorded[ids[dynamics.labels == number]].tolist())
        found.append(own.most_common(1)[0][0] if own else None)
    known = [label for label in found if label is not None]
    if len(set(known)) < len(known) or recorded.dtype != object:
        return numbers
    unnamed = [str(n) if label is None else label for n, label in zip(numbers, found, strict=True)]
    return np.array(unnamed, object)


def _table(
    run_id: str, ids: I64, dynamics: Dynamics, verdict: Verdict, chosen: I64, classes: NDArray[Any]
) -> pa.Table:
    given, suggested = dynamics.labels[chosen], verdict.suggested[chosen]
    p = verdict.evidence.predictions
    kind = rankings.label_type(classes)
    schema = dynamics_schema(kind, rankings.metadata(DYNAMICS, _SIGN, _UNIT, run_id))
    return pa.Table.from_arrays(
        [
            pa.array(ids[chosen]),
            rankings.label_column(classes, given, kind),
            pa.array(verdict.score[chosen]),
            pa.array(verdict.chance[chosen]),
            rankings.label_column(classes, suggested, kind),
            pa.array(p.given[chosen]),
            pa.array(p.suggested[chosen]),
            pa.array(verdict.evidence.statistics.mean_loss[chosen]),
            pa.array([RELABEL] * len(chosen), pa.string()),
            pa.array(_reasons(dynamics, verdict, chosen, classes), pa.string()),
        ],
        schema=schema,
    )


_SIGN = "positive: another class is likelier than the label"
_UNIT = "log-odds"


def _reasons(dynamics: Dynamics, verdict: Verdict, chosen: I64, classes: NDArray[Any]) -> list[str]:
    evidence, found = verdict.evidence, []
    p, r, v = evidence.predictions, evidence.ridge, evidence.votes
    for sample in chosen.tolist():
        given, suggested = dynamics.labels[sample], verdict.suggested[sample]
        text = (
            f"while it learnt, the network gave {classes[given]} {p.given[sample]:.0%} and "
            f"{classes[suggested]} {p.suggested[sample]:.0%}"
        )
        if r is not None and v is not None:
            text += (
                f"; a linear fit to the others gives {classes[suggested]} "
                f"{r.suggested[sample]:.0%}, and {v.suggested[sample]:.0%} of its neighbours are "
                f"{classes[suggested]}"
            )
        found.append(text)
    return found


def _says(
    dynamics: Dynamics,
    verdict: Verdict,
    chosen: I64,
    classes: NDArray[Any],
    n_samples: int,
    cut: Cut,
) -> list[str]:
    n_wrong = verdict.n_wrong
    says = [
        f"about {n_wrong.value:,.0f} of {n_samples:,} labels look wrong ({n_wrong.low:,.0f} to "
        f"{n_wrong.high:,.0f}), by what the network thought of each sample while it trained"
    ]
    how = (
        f"the {cut.lowest:,} most suspicious"
        if cut.lowest is not None
        else "those that are likelier wrong than right"
        if cut.cautious
        else "the best balance of finds and false alarms"
    )
    if len(chosen):
        expected = float(verdict.chance[chosen].mean())
        says.append(
            f"{len(chosen):,} proposed ({how}), some {expected:.0%} of them expected to be wrong"
        )
    else:
        says.append("none is proposed: --lowest K shows the most suspicious")
    pairs = Counter(
        (dynamics.labels[sample], verdict.suggested[sample]) for sample in chosen.tolist()
    )
    if pairs and dynamics.n_classes > 2:
        (given, suggested), n = pairs.most_common(1)[0]
        says.append(
            f"most often {classes[suggested]} labelled {classes[given]}: {n:,} of {len(chosen):,}"
        )
    return [*says, *verdict.warnings]
