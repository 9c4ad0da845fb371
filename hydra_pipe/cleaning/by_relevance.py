"""A proposal by relevance: samples that harm the test samples more than others of their label."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.decision import CLEAR, Cut, most_harmed, reasons, scores_of
from hydra_pipe.cleaning.evidence import means_by, sums_over
from hydra_pipe.cleaning.judged import unjudged
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.errors import NonFiniteError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import DROP, RELABEL, drop_schema
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
    attributes, columns = found.relevance.attributes, found.columns
    labels = found.gradients.labels(names.TRAIN_LABELS)
    (sums,) = sums_over(found.relevance, np.ones((1, columns.n_columns), bool), progress)
    check_finite(sums, method)
    scores = scores_of(sums, labels)
    beyond, caveats = unjudged(found, labels)
    judged = ~beyond if cut.is_fitted else np.ones(len(sums), bool)
    ids = cut.of(scores, judged)
    suggested = _suggested(found, ids, labels)
    what = (
        "mean relevance"
        if columns.by == MEAN
        else f"relevance summed over {columns.n_columns:,} {_columns_of(columns.by)}"
    )
    kind = rankings.label_type(labels)
    given = [label is not None for label in suggested]
    ranks = np.empty(len(sums), np.int32)
    ranks[np.argsort(sums, kind="stable")] = np.arange(1, len(sums) + 1, dtype=np.int32)
    drop = pa.Table.from_arrays(
        [
            pa.array(ids),
            rankings.label_column(labels, ids, kind),
            pa.array(sums[ids]),
            pa.array(ranks[ids]),
            pa.array(scores[ids]),
            pa.array(suggested, kind),
            pa.array([RELABEL if is_given else DROP for is_given in given], pa.string()),
            pa.array(reasons(sums, scores, ids, labels, suggested, what), pa.string()),
        ],
        schema=drop_schema(
            kind,
            rankings.metadata(
                method, attributes[names.SIGN], attributes[names.UNIT], directory.run_id
            ),
        ),
    )
    keep = np.setdiff1d(np.arange(len(sums)), ids)
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
        f"{sum(given):,} to relabel (one other class is harmed {CLEAR:g} times as much as any), "
        f"{len(ids) - sum(given):,} to drop, "
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
        RELABEL: sum(given),
        DROP: len(ids) - sum(given),
        "says": says,
    }
    return Cleaning(True, keep, drop, [], summary)


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


def _suggested(found: ReducedRun, ids: NDArray[np.int64], labels: NDArray[Any] | None) -> list[Any]:
    """Return a label for each of `ids`, or None if no label is clear."""
    of_columns = found.labels_of_columns()
    if (
        labels is None
        or of_columns is None
        or (labels.dtype == object) != (of_columns.dtype == object)
        or not len(ids)
    ):
        return [None] * len(ids)
    classes, groups = np.unique(of_columns, return_inverse=True)
    worst = most_harmed(means_by(found.relevance, ids, groups, len(classes)), classes, labels[ids])
    return [None if index < 0 else classes.tolist()[index] for index in worst]
