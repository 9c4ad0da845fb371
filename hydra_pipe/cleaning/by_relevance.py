"""A proposal by relevance: samples that harm the test samples more than others of their label."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.classes import Classes, classes_of
from hydra_pipe.cleaning.decision import CLEAR, Cut, most_harmed, reasons, scores_of
from hydra_pipe.cleaning.evidence import means_by, sums_over
from hydra_pipe.cleaning.judged import unjudged
from hydra_pipe.cleaning.proposal import Cleaning, as_proposed
from hydra_pipe.errors import NonFiniteError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import DROP, KEEP, RELABEL, TESTS, relevance_schema
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import BY_LABEL, MEAN


def proposed_by_relevance(
    directory: RunDirectory, method: str, cut: Cut, progress: Progress
) -> Cleaning:
    """Return the proposal by `method`'s relevance, which must be there. Writes nothing.

    Raises:
        StoreError: the relevance is damaged.
        NonFiniteError: the relevance has infinite values, or values that are not a number.
        UsageError: `cut` would propose all samples.
    """
    found = ReducedRun.open(directory, method)
    columns = found.columns
    labels = found.samples.labels()
    (sums,) = sums_over(found.relevance, np.ones((1, columns.n_columns), bool), progress)
    check_finite(sums, method)
    scores = scores_of(sums, labels)
    beyond, caveats = unjudged(found, labels)
    judged = ~beyond if cut.is_fitted else np.ones(len(sums), bool)
    ids = cut.of(scores, judged)
    suggested = suggested_labels(found, labels, ids, np.ones(columns.n_columns, bool))
    what = (
        "mean relevance"
        if columns.by == MEAN
        else f"relevance summed over {columns.n_columns:,} {_columns_of(columns.by)}"
    )
    n_relabelled = sum(label is not None for label in suggested)
    classes = classes_of(found.samples, progress)
    table = _table(
        found,
        directory.run_id,
        _Judged(method, labels, sums, scores, ids, suggested, what),
        classes,
    )
    held = "all samples" if labels is None else "the samples with the same label"
    below = None if cut.lowest is not None else cut.below(scores[judged])
    if below is None:
        asked = f"the {cut.lowest:,} lowest"
    else:
        asked = f"those below {below:.3g}{' (fitted)' if cut.threshold is None else ''}"
    says = [
        f"{len(ids):,} of {len(sums):,} training samples are proposed: {asked} by {what} "
        f"({method}), in robust standard deviations "
        f"from the median of {held}",
        f"{n_relabelled:,} to relabel (one other class is harmed {CLEAR:g} times as much as any), "
        f"{len(ids) - n_relabelled:,} to drop, "
        f"or to look at",
        *caveats,
    ]
    summary = {
        "run_id": directory.run_id,
        "method": method,
        "lowest": cut.lowest,
        "threshold": below if below is not None and np.isfinite(below) else None,
        "n_samples": len(sums),
        "n_proposed": len(ids),
        RELABEL: n_relabelled,
        DROP: len(ids) - n_relabelled,
        "classes": None if classes is None else classes.labels.tolist(),
        "says": says,
    }
    return as_proposed(table, found.samples.keys(), len(sums), summary)


@dataclass(frozen=True)
class _Judged:
    """Samples judged by relevance.

    Args:
        method: name of the relevance.
        labels: label of each sample, shape (sample,). None: unknown.
        sums, scores: summed relevance and score of each sample, shape (sample,).
        ids: proposed samples, the lowest score first.
        suggested: suggested label of each proposed sample, or None.
        what: name of the summed relevance, in words.
    """

    method: str
    labels: NDArray[Any] | None
    sums: NDArray[np.float64]
    scores: NDArray[np.float64]
    ids: NDArray[np.int64]
    suggested: list[Any]
    what: str


def _table(found: ReducedRun, run_id: str, judged: _Judged, classes: Classes | None) -> pa.Table:
    """Return the table of all samples, the proposed ones first, then by score."""
    labels, attributes = judged.labels, found.relevance.attributes
    others = np.setdiff1d(np.arange(len(judged.sums)), judged.ids)
    others = others[np.argsort(judged.scores[others], kind="stable")]
    order, kept = np.concatenate([judged.ids, others]), [None] * len(others)
    ranks = np.empty(len(order), np.int32)
    ranks[np.argsort(judged.sums, kind="stable")] = np.arange(1, len(order) + 1, dtype=np.int32)
    kind = rankings.label_type(labels)
    given = None if classes is None else classes.given[order]
    numbers = [
        None if label is None or classes is None else classes.number_of(label)
        for label in judged.suggested
    ]
    actions = [DROP if label is None else RELABEL for label in judged.suggested]
    why = reasons(judged.sums, judged.scores, judged.ids, labels, judged.suggested, judged.what)
    return pa.Table.from_arrays(
        [
            pa.array(order),
            rankings.label_column(labels, order, kind),
            pa.nulls(len(order), pa.int64()) if given is None else pa.array(given, mask=given < 0),
            pa.array(judged.sums[order]),
            pa.array(ranks[order]),
            pa.array(judged.scores[order]),
            pa.array([*judged.suggested, *kept], kind),
            pa.array([*numbers, *kept], pa.int64()),
            pa.array([*actions, *[KEEP] * len(others)], pa.string()),
            pa.array([*why, *kept], pa.string()),
            pa.array(np.zeros(len(order), bool)),
            pa.nulls(len(order), TESTS),
        ],
        schema=relevance_schema(
            kind,
            rankings.metadata(
                judged.method, attributes[names.SIGN], attributes[names.UNIT], run_id
            ),
        ),
    )


def check_finite(sums: NDArray[np.float64], method: str) -> None:
    """Refuse sums of relevance that are infinite or not a number.

    Raises:
        NonFiniteError: a sum is not finite.
    """
    strange = int((~np.isfinite(sums)).sum())
    if strange:
        raise NonFiniteError(
            f"relevance {method} of {strange:,} of {sums.shape[-1]:,} training samples is "
            "infinite or not a number, so clean cannot use it: choose another method"
        )


def _columns_of(by: str | None) -> str:
    return "labels of tests" if by == BY_LABEL else "tests"


def suggested_labels(
    found: ReducedRun,
    labels: NDArray[Any] | None,
    ids: NDArray[np.int64],
    chosen: NDArray[np.bool_],
) -> list[Any]:
    """Return the label of the class that each of `ids` harms most, or None if no class is clear.

    Args:
        found: the relevance.
        labels: label of each training sample, shape (sample,). None: unknown.
        ids: training samples.
        chosen: mask of the columns that may tell, shape (column,).

    Raises:
        StoreError: the relevance is damaged.
    """
    of_columns = found.labels_of_columns()
    if (
        labels is None
        or of_columns is None
        or (labels.dtype == object) != (of_columns.dtype == object)
        or not len(ids)
    ):
        return [None] * len(ids)
    classes, groups = np.unique(of_columns, return_inverse=True)
    # A group of its own for the columns that may not tell.
    means = means_by(found.relevance, ids, np.where(chosen, groups, len(classes)), len(classes) + 1)
    worst = most_harmed(means[:, :-1], classes, labels[ids])
    return [None if index < 0 else classes.tolist()[index] for index in worst]
