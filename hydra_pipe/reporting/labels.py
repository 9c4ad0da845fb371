"""Labels that look wrong, with the network's confidence in them over training."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hydra_pipe.cleaning.by_dynamics import Seen, proposed_by_dynamics
from hydra_pipe.cleaning.decision import Cut
from hydra_pipe.cleaning.visits import MOST_VISITS
from hydra_pipe.errors import BudgetError, RunError
from hydra_pipe.labels.dynamics import Dynamics, blocks_of, visited
from hydra_pipe.plan.reporting import judging_bytes
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.scatter import Scatter, scatter
from hydra_pipe.reporting.source import ReportSource, cleaning_of
from hydra_pipe.store.data.clean_result import KEEP, WARNINGS, read_proposal
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.store.run.stages import CLEAN
from hydra_pipe.types import F64, I64
from hydra_pipe.units import format_bytes, resident_bytes

# Most labels of the queue on a page.
MOST_SHOWN = 60
# Columns of `judged.parquet` that the queue is made from.
_CLASSES = ("given_class", "suggested_class")
_COLUMNS = ("train_id", *_CLASSES, "suggested_chance", "action")


@dataclass(frozen=True)
class Doubt:
    """A training sample whose label looks wrong.

    Args:
        id: id of the sample.
        given, suggested: numbers of the given class and of the suggested one.
        chance: estimated chance that the suggested label is right.
        confidence: probability that the network gave the given label at each visit, shape
            (visit,).
        suggested_confidence: the same for the suggested label, shape (visit,).
    """

    id: int
    given: int
    suggested: int
    chance: float
    confidence: F64
    suggested_confidence: F64


@dataclass(frozen=True)
class JudgedLabels:
    """Labels of all visited samples, and those that look wrong.

    Args:
        n_samples: number of all training samples.
        ids: ids of the visited samples, ascending, shape (judged,).
        labels: class of each sample's label, shape (judged,).
        predicted: class predicted at each sample's last visit, shape (judged,).
        classes: names of the classes.
        proposed: ids of all samples whose labels look wrong, the most suspicious first.
        doubts: the first of them, to show.
        n_wrong: estimated number of wrong labels, and the ends of its interval.
        most_often: given class, suggested class and number of the most frequent confusion
            among `proposed`. None if there is none.
        warnings: reasons not to trust the judgement, a sentence each.
        scatter: map of the samples. None if no features of them are known.
    """

    n_samples: int
    ids: I64
    labels: I64
    predicted: I64
    classes: list[str]
    proposed: I64
    doubts: list[Doubt]
    n_wrong: tuple[float, float, float]
    most_often: tuple[int, int, int] | None
    warnings: list[str]
    scatter: Scatter | None


def judged_labels(source: ReportSource, memory_bytes: int, progress: Progress) -> JudgedLabels:
    """Judge the labels of a recording, by the proposal of `clean` if there is one.

    Args:
        source: the recording.
        memory_bytes: budget of the process.
        progress: place to show progress.

    Raises:
        RunError: the recording has no outputs of two classes or more.
        BudgetError: the budget is too small.
        DataError: labels are not known, or change.
        StoreError: the recording is damaged.
    """
    if source.recording is None:
        raise RunError(
            "labels are judged by what one network thought of its samples, and several are "
            "combined here: the pages of the runs have them"
        )
    gradients, n_samples = source.recording.gradients, source.samples.n_samples
    shape = gradients.dynamics_shape
    if shape.n_outputs < 2:
        raise RunError(
            "the recording has no outputs of two classes or more for each sample, as runs of "
            "tokens and regressions have none"
        )
    visits = min(-(-gradients.rows.n_rows // n_samples), MOST_VISITS)
    n_numbers = sum(1 if column.width is None else column.width[0] for column in shape.columns)
    needed = resident_bytes() + judging_bytes(n_samples, visits, shape.n_outputs, n_numbers)
    if needed > memory_bytes:
        raise BudgetError(
            f"judging {n_samples:,} labels needs {format_bytes(needed)}, the budget "
            f"is {format_bytes(memory_bytes)}: raise --memory"
        )
    seen = Seen.in_recording(gradients, n_samples)
    return _judged(seen, *_proposal(source, seen, progress))


def _proposal(
    source: ReportSource, seen: Seen, progress: Progress
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the table of proposed samples and the summary: those of `clean`, or new ones.

    Decisions that `clean` was given leave the proposal as it was.
    """
    if source.up_to_step is None and cleaning_of(source.directory) is not None:
        with suppress(OSError, ValueError, pa.ArrowException):
            place = source.directory.path / CLEAN.of(DYNAMICS).area
            *_, judged, _, summary = read_proposal(place, seen.n_samples)
            proposed = judged.filter(pc.not_equal(judged.column("action"), KEEP))
            if _is_usable(proposed, summary, seen):
                return proposed, summary
    found = proposed_by_dynamics(seen, Cut(), progress)
    return found.drop, found.summary


def _is_usable(proposed: pa.Table, summary: dict[str, Any], seen: Seen) -> bool:
    """Tell whether a stored proposal has what the queue needs, in the form it needs."""
    numbers, texts = summary.get("n_wrong"), summary.get(WARNINGS)
    if not set(_COLUMNS) <= set(proposed.column_names) or any(
        proposed[name].null_count for name in _COLUMNS
    ):
        return False
    classes = np.concatenate([proposed[name].to_numpy() for name in _CLASSES])
    return (
        isinstance(numbers, list)
        and len(numbers) == 3
        and all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)
        and isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
        and bool(((classes >= 0) & (classes < seen.dynamics.n_classes)).all())
        and bool(np.isin(proposed["train_id"].to_numpy(), seen.ids).all())
    )


def _judged(seen: Seen, drop: pa.Table, summary: dict[str, Any]) -> JudgedLabels:
    proposed, given, suggested = (
        drop[name].to_numpy().astype(np.int64) for name in ("train_id", *_CLASSES)
    )
    shown = slice(0, MOST_SHOWN)
    rows = np.searchsorted(seen.ids, proposed[shown])
    own, others, predicted = _watched(seen.dynamics, rows, given[shown], suggested[shown])
    chances = drop["suggested_chance"].to_numpy()
    pairs = Counter(zip(given.tolist(), suggested.tolist(), strict=True))
    low_to_high = tuple(float(n) for n in summary["n_wrong"])
    return JudgedLabels(
        n_samples=seen.n_samples,
        ids=seen.ids,
        labels=seen.dynamics.labels,
        predicted=predicted,
        classes=[str(label) for label in seen.classes.labels.tolist()],
        proposed=proposed,
        doubts=[
            Doubt(int(i), int(a), int(b), float(c), one, other)
            for i, a, b, c, one, other in zip(
                proposed[shown], given, suggested, chances, own.T, others.T, strict=False
            )
        ],
        n_wrong=(low_to_high[0], low_to_high[1], low_to_high[2]),
        most_often=next(((*pair, n) for pair, n in pairs.most_common(1)), None),
        warnings=list(summary[WARNINGS]),
        scatter=scatter(seen.dynamics, np.isin(seen.ids, proposed)),
    )


def _watched(dynamics: Dynamics, rows: I64, given: I64, suggested: I64) -> tuple[F64, F64, I64]:
    """Return the probabilities of two classes at each visit, and the last predictions.

    Args:
        dynamics: the visits.
        rows: samples to watch, shape (watched,).
        given, suggested: the two classes of each, shape (watched,).

    Returns:
        Two arrays of shape (visit, watched), not a number without a visit. The class that each
        sample's last visit predicts, shape (sample,).
    """
    shape = dynamics.n_epochs, len(rows)
    own, others = np.full(shape, np.nan), np.full(shape, np.nan)
    predicted = np.full(len(dynamics.labels), -1)
    for epoch in range(dynamics.n_epochs):
        log_p = dynamics.centred(epoch, rows)
        places = np.arange(len(rows))
        own[epoch] = np.exp(log_p[places, given])
        others[epoch] = np.exp(log_p[places, suggested])
        for block in blocks_of(len(predicted), dynamics.n_classes):
            log_p = dynamics.centred(epoch, block)
            there = visited(log_p)
            predicted[block][there] = log_p[there].argmax(axis=1)
    return own, others, predicted
