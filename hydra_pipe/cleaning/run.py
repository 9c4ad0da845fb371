"""A whole proposal: training samples to relabel or drop, by existing relevance, and its files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.decision import CLEAR, Cut, most_harmed, reasons, scores_of
from hydra_pipe.cleaning.evidence import means_by, sums_over
from hydra_pipe.cleaning.judged import unjudged
from hydra_pipe.errors import NonFiniteError, UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import (
    DROP,
    RELABEL,
    RETRAINING,
    carry_retrained,
    drop_schema,
    read_proposal,
    write_proposal,
    write_retraining,
)
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.files import remove_partials
from hydra_pipe.store.run.listing import say_unlisted
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import BY_LABEL, MEAN, ResultName
from hydra_pipe.store.run.stage_runner import Work, alone, running
from hydra_pipe.store.run.stages import CLEAN, REDUCE, Settings
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.training.pipeline import Pipeline

# Number of initial weights and orders for each set, if the user gives none and the pipeline has
# a seed.
DEFAULT_SEEDS = 3
# Fact of the stage: number of seeds of the stored retrainings.
_SEEDS = "seeds"
_Row = dict[str, Any]


@dataclass(frozen=True)
class Cleaning:
    """Result of `clean`.

    Args:
        is_new: False if the proposal was there already, so that nothing was done.
        keep: ids of the samples that stay, ascending, shape (kept,).
        drop: table of `drop.parquet`, the most suspicious sample first.
        retraining: rows of the table of retrainings, empty if nothing was trained.
        summary: findings as plain values. Its `says` holds lines for a person. After retrainings
            its `retraining` is a summary of them.
    """

    is_new: bool
    keep: NDArray[np.int64]
    drop: pa.Table
    retraining: list[_Row]
    summary: dict[str, Any]


def clean_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    lowest: int | None = None,
    threshold: float | None = None,
    retrain: bool = False,
    seeds: int | None = None,
    pipeline: "str | Pipeline | None" = None,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Cleaning:
    """Propose training samples to relabel or drop.

    A sample is proposed if its relevance, summed over the test samples, is far below that of the
    samples with the same label. docs/cleaning.md describes the rule, and how well it finds wrong
    labels.

    Args:
        run: directory of the run.
        method: name of the result whose relevance decides, such as "hydra-fisher" or
            "influence-mean".
        lowest: number of samples to propose.
        threshold: score below which samples are proposed, in robust standard deviations. It is
            fitted if neither `lowest` nor `threshold` is given.
        retrain: True to also train again without the proposed samples, without as many others,
            and with all. Accuracy and loss are compared on test samples that did not choose the
            proposal.
        seeds: with `retrain`: number of initial weights and orders for each training. Default:
            3, or 1 if the pipeline has no setting `seed`.
        pipeline: with `retrain`: "path/to/file.py:function" if the file has moved, or a newly
            built Pipeline if such an object was recorded.
        memory: with `retrain`: budget of this process.
        overwrite: replace a proposal that was made with other settings.
        progress: place to show progress. Default: nowhere.

    Returns:
        The proposal. It is also in RUN/cleaning/method=METHOD, as `keep.txt`, `drop.parquet` and
        `summary.json`.

    Raises:
        RunError: there is no run, it lacks the relevance, or a proposal was made with other
            settings.
        StoreError: the relevance is damaged.
        NonFiniteError: the relevance has infinite values, or values that are not a number.
        UsageError: a value is not possible.
        PipelineError: with `retrain`: the pipeline cannot be used, or its test losses differ
            from those of the run.
    """
    cut = Cut(lowest, threshold)
    _check(method, retrain, seeds, pipeline)
    parse_bytes(memory)
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    directory.require(REDUCE.of(method), directory.command(REDUCE.of(method)))
    subject = None
    if retrain:
        from hydra_pipe.cleaning.retraining import opened  # torch takes seconds to import

        subject, seeds = opened(directory, pipeline, seeds)
    proposal = _Proposal(directory, method, cut)
    with alone(directory, proposal.stage):
        found = None if overwrite else proposal.existing()
        if found is None:
            say_unlisted(directory, progress)
            with proposal.running() as work:
                found = proposed(directory, method, cut, progress)
                _write(work, found, carry=not overwrite)
        if subject is not None and proposal.seeds != seeds:
            from hydra_pipe.cleaning.retraining import compared

            with proposal.running() as work:
                pieces = Retrained(work.place)
                rows, summary = compared(
                    subject,
                    method,
                    cut,
                    found.drop,
                    pieces,
                    progress,
                    seeds=seeds or 1,
                    memory=memory,
                )
                found = replace(
                    found,
                    is_new=True,
                    retraining=rows,
                    summary=found.summary | {RETRAINING: summary},
                )
                _write(work, found, carry=True)
                work.facts[_SEEDS] = seeds
    return found


def _check(method: str, retrain: bool, seeds: int | None, pipeline: object) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: an option needs another one, or a value is not possible.
    """
    if ResultName.parse(method).is_of_itself:
        raise UsageError(f"--method {method} has no test samples: choose another method")
    if retrain and ResultName.parse(method).probe is not None:
        raise UsageError(
            f"--retrain measures accuracy on the run's own tests, and {method} is relevance for a "
            "probe: leave out --retrain"
        )
    if not retrain and (seeds is not None or pipeline is not None):
        raise UsageError(
            f"{'--seeds' if seeds is not None else '--pipeline'} is for --retrain: add it"
        )
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds {seeds}: give 1 or more")


class _Proposal:
    """The stage of a proposal.

    Args:
        directory: directory of the run.
        method: name of the relevance.
        cut: rule of the proposal.
    """

    def __init__(self, directory: RunDirectory, method: str, cut: Cut) -> None:
        self._directory = directory
        self.stage = CLEAN.of(method)
        self._settings: Settings = {"lowest": cut.lowest, "threshold": cut.threshold}

    @property
    def seeds(self) -> object:
        """Number of seeds of the complete stage's retrainings, or None if it has none."""
        return self._directory.stages[self.stage].facts.get(_SEEDS)

    def existing(self) -> Cleaning | None:
        """Return the stored proposal, or None if it cannot serve.

        It cannot serve if it is missing, unfinished or damaged, or was made from other relevance
        than is there now.

        Raises:
            RunError: the proposal was made with other settings.
        """
        directory = self._directory
        if directory.has_work(self.stage, self._settings) or directory.stale(self.stage):
            return None
        n_samples = directory.stages[self.stage].count("n_samples", least=1)
        with suppress(OSError, ValueError, pa.ArrowException):
            return Cleaning(False, *read_proposal(directory.path / self.stage.area, n_samples))
        return None

    @contextmanager
    def running(self) -> Iterator[Work]:
        """Run the stage for the length of a block, which ends with `_write`."""
        with running(self._directory, self.stage, self._settings) as work:
            remove_partials(work.place)
            yield work


def _write(work: Work, found: Cleaning, *, carry: bool) -> None:
    """Replace all files of the stage. With `carry`, the stored retrainings stay."""
    with work.replaced() as partial:
        write_proposal(partial, found.keep, found.drop, found.summary)
        if found.retraining:
            write_retraining(partial, found.retraining)
        if carry:
            carry_retrained(work.place, partial)
    n_proposed = found.drop.num_rows
    work.facts |= {"n_samples": len(found.keep) + n_proposed, "n_proposed": n_proposed}


def proposed(directory: RunDirectory, method: str, cut: Cut, progress: Progress) -> Cleaning:
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
