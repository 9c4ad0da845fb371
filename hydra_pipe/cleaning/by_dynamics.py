"""A proposal by the dynamics of the training: labels that the network did not believe."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.classes import Classes, labels_of
from hydra_pipe.cleaning.decision import Cut, check_some_stay
from hydra_pipe.cleaning.proposal import Cleaning, as_proposed
from hydra_pipe.cleaning.visits import dynamics_of
from hydra_pipe.labels.dynamics import Dynamics
from hydra_pipe.labels.judging import Verdict, judge
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import KEEP, RELABEL, TESTS, WARNINGS, dynamics_schema
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.types import I64


@dataclass(frozen=True)
class Seen:
    """A run whose labels are to be judged.

    Args:
        run_id: id of the run.
        n_samples: number of training samples.
        ids: samples that were visited, ascending, shape (judged,).
        dynamics: visits of these samples, with the given labels.
        classes: classes of all samples.
        keys: keys of all samples. None: they have none.
    """

    run_id: str
    n_samples: int
    ids: I64
    dynamics: Dynamics
    classes: Classes
    keys: Keys | None

    @classmethod
    def of(cls, directory: RunDirectory) -> "Seen":
        """Read the visits of a run.

        Raises:
            RunError: the recording has no logits.
            DataError: a label is not known, or changes.
            StoreError: the recording is damaged.
        """
        gradients, counts = open_recording(directory, None)
        return cls.in_recording(gradients, counts.n_samples)

    @classmethod
    def in_recording(cls, gradients: Gradients, n_samples: int) -> "Seen":
        """Read the visits of a recording, or of its first steps. Raises: the errors of `of`."""
        ids, dynamics = dynamics_of(gradients)
        given: I64 = np.full(n_samples, -1, np.int64)
        given[ids] = dynamics.labels
        labels = labels_of(gradients.labels(names.TRAIN_LABELS), given, dynamics.n_classes)
        keys = gradients.keys(names.TRAIN_KEYS)
        return cls(gradients.run_id, n_samples, ids, dynamics, Classes(given, labels), keys)


def proposed_by_dynamics(seen: Seen, cut: Cut, progress: Progress) -> Cleaning:
    """Return the proposal of samples whose labels the network did not believe. Writes nothing.

    Raises:
        UsageError: `cut` would propose all samples.
    """
    with progress.task("judge labels", 1, "run") as task:
        verdict = judge(seen.dynamics)
        task.advance(1)
    chosen = _chosen(verdict, cut, seen.n_samples)
    summary = {
        "run_id": seen.run_id,
        "method": DYNAMICS,
        "lowest": cut.lowest,
        "cautious": cut.cautious,
        "n_samples": seen.n_samples,
        "n_proposed": len(chosen),
        RELABEL: len(chosen),
        "n_wrong": [verdict.n_wrong.value, verdict.n_wrong.low, verdict.n_wrong.high],
        "classes": seen.classes.labels.tolist(),
        WARNINGS: list(verdict.warnings),
        "says": _says(seen, verdict, chosen, cut),
    }
    return as_proposed(_table(seen, verdict, chosen), seen.keys, seen.n_samples, summary)


def _chosen(verdict: Verdict, cut: Cut, n_samples: int) -> I64:
    """Return places of the proposed samples among the judged ones, the most suspicious first."""
    n = verdict.n_cautious if cut.cautious else verdict.n_proposed
    n = n if cut.lowest is None else cut.lowest
    check_some_stay(n, n_samples)
    return verdict.order[:n]


def _table(seen: Seen, verdict: Verdict, chosen: I64) -> pa.Table:
    """Return the table of all judged samples, the proposed ones first."""
    classes, order = seen.classes.labels, verdict.order
    given, suggested = seen.dynamics.labels[order], verdict.suggested[order]
    p = verdict.evidence.predictions
    kind = rankings.label_type(classes)
    n_kept = len(order) - len(chosen)
    reasons = [*_reasons(seen.dynamics, verdict, chosen, classes), *[None] * n_kept]
    return pa.Table.from_arrays(
        [
            pa.array(seen.ids[order]),
            rankings.label_column(classes, given, kind),
            pa.array(given),
            pa.array(verdict.score[order]),
            pa.array(verdict.chance[order]),
            rankings.label_column(classes, suggested, kind),
            pa.array(suggested),
            pa.array(verdict.suggested_chance[order]),
            pa.array(p.given[order]),
            pa.array(p.suggested[order]),
            pa.array(verdict.evidence.statistics.mean_loss[order]),
            pa.array([RELABEL] * len(chosen) + [KEEP] * n_kept, pa.string()),
            pa.array(reasons, pa.string()),
            pa.array(np.zeros(len(order), bool)),
            pa.nulls(len(order), TESTS),
        ],
        schema=dynamics_schema(kind, rankings.metadata(DYNAMICS, _SIGN, _UNIT, seen.run_id)),
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


def _says(seen: Seen, verdict: Verdict, chosen: I64, cut: Cut) -> list[str]:
    n_wrong, dynamics, classes = verdict.n_wrong, seen.dynamics, seen.classes.labels
    says = [
        f"about {n_wrong.value:,.0f} of {seen.n_samples:,} labels look wrong "
        f"({n_wrong.low:,.0f} to {n_wrong.high:,.0f}), by what the network thought of each "
        "sample while it trained"
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
