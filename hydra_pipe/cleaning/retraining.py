"""The effect of a proposal on accuracy: training without it, without as many others, with all.

A test sample that has helped to choose what is left out flatters the choice. So the tests are
split. The relevance to one half chooses, by the same rule, and the other half measures. Then the
halves change places. The result therefore describes the rule, not the very set that is proposed,
which all tests have chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.decision import Cut, scores_of
from hydra_pipe.cleaning.evidence import sums_over
from hydra_pipe.cleaning.judged import unjudged
from hydra_pipe.loading import recorded_assignments, recorded_spec
from hydra_pipe.maths.rank_statistics import crossed_interval
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.intervals import ONE_TEST
from hydra_pipe.retraining.retrainer import HIT, LOSS
from hydra_pipe.retraining.subject import Subject
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.store.run.stages import RECORD
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.types import I64

DEFAULT_SEEDS = 3
ALL, PROPOSED, RANDOM, WRONG = (
    "all samples",
    "without the proposed",
    "without as many at random",
    "without the wrong labels",
)
_SEED = 0x636C65
_ADVICE = (
    "--retrain trains the pipeline again. Build the pipeline anew, and give it as "
    "hydra_pipe.clean(run, retrain=True, pipeline=...)"
)
Row = dict[str, Any]


def opened(
    directory: RunDirectory, pipeline: "str | Pipeline | None", seeds: int | None
) -> tuple[Subject, int]:
    """Open the run with its pipeline, built as it was recorded, and choose the number of seeds.

    Raises:
        RunError: the pipeline is not known, may not be run unasked, or is another one.
        UsageError: several seeds are asked for, and the pipeline has no setting `seed`.
        PipelineError: the pipeline cannot be built.
    """
    spec = recorded_spec(directory, pipeline, _ADVICE)
    settings = directory.stages[RECORD].settings
    subject = Subject.open(
        spec, directory, recorded_assignments(settings) if isinstance(spec, str) else None
    )
    if seeds is None:
        return subject, DEFAULT_SEEDS if subject.has_seeds() else 1
    if seeds > 1:
        subject.check_seeds()
    return subject, seeds


@dataclass(frozen=True)
class Fold:
    """A split of the test samples: some choose, the others measure.

    Args:
        chosen: mask of the relevance columns whose sum chooses, bool (column,).
        tests: ids of the test samples that measure.
    """

    chosen: NDArray[np.bool_]
    tests: I64


def folds_of(
    columns: ResultColumns, n_tests: int, labels: NDArray[Any] | None
) -> tuple[list[Fold], str]:
    """Return the folds, and words on how independent the measuring tests are of the choice.

    Args:
        columns: columns of the relevance.
        n_tests: number of test samples in the recording.
        labels: labels of the columns, whose shares both halves should have alike. None if
            unknown.
    """
    everything = np.ones(columns.n_columns, bool)
    if columns.by is None and columns.n_columns > 1:
        order = np.random.default_rng(_SEED).permutation(columns.n_columns)
        if labels is not None:
            order = order[
                np.argsort(np.unique(labels, return_inverse=True)[1][order], kind="stable")
            ]
        half = np.zeros(columns.n_columns, bool)
        half[order[::2]] = True
        ids = columns.test_ids
        folds = [Fold(half, ids[~half]), Fold(~half, ids[half])]
        return (
            folds,
            "the relevance to one half of the tests chooses, by the same rule, and the other "
            "half measures; then the other way round",
        )
    others = np.setdiff1d(np.arange(n_tests), columns.test_ids)
    if len(others):
        return [
            Fold(everything, others)
        ], f"measured on the {len(others):,} tests that the relevance does not cover"
    if columns.by is None:
        return [Fold(everything, np.arange(n_tests))], (
            "NOT independent: there is one test sample, and it has also chosen the proposals, so "
            "the gain says nothing"
        )
    return [Fold(everything, np.arange(n_tests))], (
        "NOT independent: a mean over the tests cannot be split, so these tests have also chosen "
        "the proposals, and the measured gain is too good; reduce without --mean or --by to "
        "measure it on other tests"
    )


def compared(
    subject: Subject,
    method: str,
    cut: Cut,
    drop: pa.Table,
    directory: Retrained,
    progress: Progress,
    *,
    seeds: int,
    memory: str,
) -> tuple[list[Row], dict[str, Any]]:
    """Train with all samples, without the proposed ones, and without as many at random.

    A fourth set leaves out the wrong labels, if they are known. "Without" means weight 0 in the
    batches of the run, with the mean over the samples that are kept.

    Args:
        subject: run and pipeline.
        method: name of the relevance.
        cut: rule of the proposal.
        drop: samples that all tests propose, compared with true labels if the pipeline has them.
        directory: store of the retrainings.
        progress: place to show progress.
        seeds: number of seeds to train with.
        memory: budget of this process, such as "4GiB".

    Returns:
        A row for each set, and a summary.

    Raises:
        HydraError: any error of `retrain`.
    """
    labels = subject.sample_labels()
    if method == DYNAMICS:
        tests = np.arange(subject.n_tests)
        folds, how = [Fold(np.ones(0, bool), tests)], "measured on all tests: none has chosen"
        proposed = [drop.column("train_id").to_numpy()]
    else:
        folds, how, proposed = _by_halves(subject, method, cut, labels, progress)
    rng = np.random.default_rng(_SEED)
    at_random = [rng.permutation(subject.n_samples)[: len(ids)] for ids in proposed]
    nobody: I64 = np.empty(0, np.int64)
    # For each set, the ids left out in each fold.
    sets: dict[str, list[I64]] = {ALL: [nobody] * len(folds), PROPOSED: proposed, RANDOM: at_random}
    summary: dict[str, Any] = {"seeds": seeds, "folds": len(folds)}
    says = []
    if subject.pipeline.true_labels is not None:
        truth = subject.true_labels()
        wrong = np.flatnonzero(np.asarray(labels != truth))
        summary["known"] = known = _held_against(truth, wrong, drop)
        says += _known_in_words(known)
        if 0 < len(wrong) < subject.n_samples:
            sets[WRONG] = [wrong] * len(folds)
    distinct = list({ids.tobytes(): ids for own in sets.values() for ids in own}.values())
    at = {ids.tobytes(): index for index, ids in enumerate(distinct)}
    own_seed = subject.pipeline.seed
    job = Retraining.without(distinct, subject.n_samples, tuple(own_seed + s for s in range(seeds)))
    outcome = retrain(subject, job, directory, memory, progress, strict=False)
    measured = {
        name: np.concatenate(
            [
                outcome[:, at[ids.tobytes()]][:, :, fold.tests]
                for ids, fold in zip(own, folds, strict=True)
            ],
            axis=2,
        )
        for name, own in sets.items()
    }
    rows = [_row(name, sets[name], values, measured[ALL]) for name, values in measured.items()]
    return rows, summary | {"says": [*says, *_says(how, seeds, folds, measured)]}


def _by_halves(
    subject: Subject, method: str, cut: Cut, labels: NDArray[Any] | None, progress: Progress
) -> tuple[list[Fold], str, list[I64]]:
    """Return the folds, words on them, and what each fold's own tests propose by relevance."""
    found = ReducedRun.open(subject.run, method)
    folds, how = folds_of(found.columns, subject.n_tests, found.labels_of_columns())
    sums = sums_over(found.relevance, np.stack([fold.chosen for fold in folds]), progress)
    judged = ~unjudged(found, labels)[0] if cut.is_fitted else None
    return folds, how, [cut.of(scores_of(own, labels), judged) for own in sums]


def _held_against(truth: NDArray[Any], wrong: I64, drop: pa.Table) -> dict[str, Any]:
    ids = drop.column("train_id").to_numpy()
    right = np.isin(ids, wrong)
    suggested = drop.column("suggested_label").to_pylist()
    hits = sum(
        label == truth[sample]
        for sample, label in zip(ids, suggested, strict=True)
        if label is not None
    )
    return {
        "wrong": len(wrong),
        "found": int(right.sum()),
        "precision": float(right.mean()) if len(ids) else None,
        "recall": float(right.sum() / len(wrong)) if len(wrong) else None,
        "by_chance": len(wrong) / len(truth),
        "suggested": sum(label is not None for label in suggested),
        "suggested_right": int(hits),
    }


def _known_in_words(known: dict[str, Any]) -> list[str]:
    if known["precision"] is None or known["recall"] is None:
        return [f"by the pipeline's true labels {known['wrong']:,} labels are wrong"]
    return [
        f"by the pipeline's true labels {known['found']:,} of the proposed are wrong: precision "
        f"{known['precision']:.3f} (by "
        f"chance {known['by_chance']:.3f}), recall {known['recall']:.3f} of {known['wrong']:,}; "
        f"of {known['suggested']:,} "
        f"suggested labels {known['suggested_right']:,} are right"
    ]


def _row(
    name: str, left_out: Sequence[I64], values: NDArray[np.float64], everything: NDArray[np.float64]
) -> Row:
    """Return the table row of one set, from its `values` of shape (seed, 2, test)."""
    row: Row = {
        "trained on": name,
        "left_out": round(float(np.mean([len(ids) for ids in left_out]))),
    }
    for what, index in (("accuracy", HIT), ("loss", LOSS)):
        row |= _with_interval(what, values[:, index])
        row |= _with_interval(f"{what}_change", values[:, index] - everything[:, index])
    return row


def _with_interval(name: str, values: NDArray[np.float64]) -> Row:
    # Accuracy is unknown if outputs or targets are not classes; losses are not finite if a
    # training diverged.
    if np.isnan(values).any():
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = crossed_interval(values) if values.shape[1] > 1 else (np.nan, np.nan)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def _says(
    how: str, seeds: int, folds: Sequence[Fold], measured: dict[str, NDArray[np.float64]]
) -> list[str]:
    n_tests = sum(len(fold.tests) for fold in folds)
    says = [
        f"{how}; left_out: mean over the {len(folds)} halves" if len(folds) > 1 else how,
        f"{n_tests:,} tests, {seeds} {'seeds' if seeds > 1 else 'seed'}; intervals of 95 % by "
        "drawing seeds and tests anew, 2,000 "
        f"times; changes are against all samples, test by test",
    ]
    if seeds == 1:
        says.append(
            "with one seed intervals do not show how another training would come out: add --seeds 3"
        )
    change = measured[PROPOSED][:, HIT] - measured[RANDOM][:, HIT]
    if n_tests < 2:
        says.append(ONE_TEST)
    elif not np.isnan(change).any():
        low, high = crossed_interval(change)
        says.append(
            "accuracy without the proposed, less that without as many at random: "
            f"{change.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        )
    return says
