"""The effect of a proposal on accuracy: training as given, and on treated training sets.

Each treatment is held against the same treatment of as many other samples, drawn at random.
Trainings have equal steps: a sample is left out by weight 0 in the batches of the run.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.cleaning.classes import Classes, trained_classes
from hydra_pipe.cleaning.decision import Cut
from hydra_pipe.cleaning.effects import Measured, rows_of, says_of
from hydra_pipe.cleaning.folds import DECIDED_BY_TESTS, FOLDS_OF_ALL, Folds, folds_by_relevance
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.cleaning.treatments import (
    AS_GIVEN,
    DECIDED,
    DROPPED,
    MIXED,
    RELABELLED,
    WEIGHTED,
    Proposed,
    Treatment,
    at_random,
)
from hydra_pipe.errors import DataError
from hydra_pipe.loading import recorded_assignments, recorded_spec
from hydra_pipe.progress import Progress
from hydra_pipe.recording.datasets import pair_of
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.subject import Subject
from hydra_pipe.store.data.clean_result import DECISIONS
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.store.run.stages import RECORD
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.types import I64

DEFAULT_SEEDS = 3
ALL, WRONG, TRUE = "as given", "without the wrong labels", "true labels"
RANDOM = {
    how: f"{how} as many at random" if how != WEIGHTED else "weighted at random"
    for how in (DROPPED, RELABELLED, MIXED, DECIDED, WEIGHTED)
}
# Relabelled samples whose targets are compared with the recorded classes before training.
_LOOKED_AT = 32
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
class Comparison:
    """Options of a comparison.

    Args:
        method: name of the relevance, or "dynamics".
        cut: rule of the proposal.
        seeds: number of seeds to train with.
        memory: budget of this process, such as "4GiB".
    """

    method: str
    cut: Cut
    seeds: int
    memory: str


def compared(
    subject: Subject,
    found: Cleaning,
    options: Comparison,
    directory: Retrained,
    progress: Progress,
) -> tuple[list[Row], dict[str, Any]]:
    """Train on the samples as given and on treated ones, each beside as many at random.

    Initial weights and orders are new: their seeds are not the seed of the run, whose training
    has chosen the proposal. A pipeline without a setting `seed` has only its own.

    Args:
        subject: run and pipeline.
        found: the proposal.
        options: options of the comparison.
        directory: store of the retrainings.
        progress: place to show progress.

    Returns:
        A row for each training set, and a summary.

    Raises:
        HydraError: any error of `retrain`.
    """
    classes = trained_classes(subject.gradients, subject.n_samples, progress)
    folds = _folds(subject, found, options, classes, progress)
    says: list[str] = []
    hows = _hows(subject, found, folds, classes, says)
    trainings = _Trainings(subject.n_samples, classes)
    trainings.add(ALL, [Treatment.of(subject.n_samples)] * len(folds.tests))
    for how in hows:
        own = [proposed.treated(how) for proposed in folds.proposed]
        trainings.add(how, own)
        trainings.add_random(RANDOM[how], own)
    summary: dict[str, Any] = {"seeds": options.seeds, "folds": len(folds.tests)}
    if subject.pipeline.true_labels is not None:
        known = _add_known(subject, found.drop, classes, trainings, len(folds.tests))
        summary["known"] = known
        says += _known_in_words(known)
    job = trainings.job(_seeds(subject, options.seeds))
    outcome = retrain(subject, job, directory, options.memory, progress, strict=False)
    measured = Measured(
        trainings.by_name(outcome, folds.tests),
        {name: trainings.n_changed(name) for name in trainings.at},
        {how: RANDOM[how] for how in hows},
        ALL,
    )
    if len(folds.tests) > 1:
        says.append(f"{folds.how}; changed: mean over the {len(folds.tests)} halves")
    else:
        says.append(folds.how)
    return rows_of(measured), summary | {"says": [*says, *says_of(measured)]}


def _seeds(subject: Subject, n_seeds: int) -> tuple[int, ...]:
    own = subject.pipeline.seed
    return tuple(own + 1 + s for s in range(n_seeds)) if subject.has_seeds() else (own,)


def _folds(
    subject: Subject,
    found: Cleaning,
    options: Comparison,
    classes: Classes | None,
    progress: Progress,
) -> Folds:
    """Return the splits of the tests, and what is proposed in each."""
    is_decided = DECISIONS in found.summary
    if options.method != DYNAMICS and not is_decided:
        return folds_by_relevance(subject.run, options.method, options.cut, classes, progress)
    proposed = Proposed.of(found.drop, found.judged, subject.n_samples)
    how = FOLDS_OF_ALL if options.method == DYNAMICS else DECIDED_BY_TESTS
    return Folds([np.arange(subject.n_tests)], [proposed], how)


def _hows(
    subject: Subject, found: Cleaning, folds: Folds, classes: Classes | None, says: list[str]
) -> list[str]:
    """Return the treatments to compare. `says` is told of those that cannot be compared."""
    hows = [DROPPED]
    relabelled = np.concatenate([own.treated(RELABELLED).relabelled for own in folds.proposed])
    why_not = (
        "no other label is suggested"
        if not len(relabelled)
        else None
        if classes is None
        else _other_targets(subject.pipeline, classes, relabelled)
    )
    if why_not is None:
        hows += [RELABELLED, DECIDED if DECISIONS in found.summary else MIXED]
    else:
        says.append(f"relabelling is not compared: {why_not}")
    if all(own.weights is not None for own in folds.proposed):
        hows.append(WEIGHTED)
    return hows


def _other_targets(pipeline: Pipeline, classes: Classes, relabelled: I64) -> str | None:
    """Return why other classes cannot replace the pipeline's targets, or None if they can."""
    for sample in np.unique(relabelled)[:_LOOKED_AT].tolist():
        with user_code(f"the train dataset raised at sample {sample}"):
            item = pipeline.train[sample]
        try:
            target = np.asarray(pair_of(item, "the train dataset")[1])
        except (DataError, TypeError, ValueError):
            return f"the target of sample {sample} is no number"
        if target.shape != () or target.dtype.kind not in "iu":
            return f"the target of sample {sample} is not the number of a class"
        if target != classes.given[sample]:
            return (
                f"the target of sample {sample} is {target}, and the recording has the label "
                f"{classes.given[sample]}"
            )
    return None


@dataclass
class _Trainings:
    """Trainings of each seed: names of rows, and the treated training sets behind them.

    Args:
        n_samples: number of training samples.
        classes: classes of the run.
        at: number of the training of each fold, by the name of the row.
    """

    n_samples: int
    classes: Classes | None
    at: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sets: list[Treatment] = []
        self._is_random: list[bool] = []
        self._known: dict[bytes, int] = {}

    def add(self, name: str, treatments: list[Treatment]) -> None:
        """Add a row: a training set for each fold. Equal sets are trained on once."""
        self.at[name] = []
        for treatment in treatments:
            key = treatment.weights.tobytes() + treatment.classes.tobytes()
            if key not in self._known:
                self._known[key] = self._append(treatment, is_random=False)
            self.at[name].append(self._known[key])

    def add_random(self, name: str, treatments: list[Treatment]) -> None:
        """Add a row: the same treatments of other samples, which each seed draws anew."""
        self.at[name] = [self._append(treatment, is_random=True) for treatment in treatments]

    def _append(self, treatment: Treatment, *, is_random: bool) -> int:
        self._sets.append(treatment)
        self._is_random.append(is_random)
        return len(self._sets) - 1

    def n_changed(self, name: str) -> int:
        """Return how many samples a row changes, as a mean over the folds.

        A weight of 0.3 counts as 0.7 samples.
        """
        return round(float(np.mean([self._sets[index].n_changed for index in self.at[name]])))

    def job(self, seeds: tuple[int, ...]) -> Retraining:
        """Return the retrainings to make."""

        def sets(first: int, end: int) -> list[Treatment]:
            return [self._of(number) for number in range(first, end)]

        def weights(first: int, end: int) -> NDArray[np.float32]:
            return np.stack([one.weights for one in sets(first, end)])

        def classes(first: int, end: int) -> NDArray[np.int32] | None:
            found = np.stack([one.classes for one in sets(first, end)]).astype(np.int32)
            return found if (found >= 0).any() else None

        return Retraining(len(self._sets), weights, seeds, "weights", classes)

    def _of(self, number: int) -> Treatment:
        """Return the training set of a retraining, counted over all seeds."""
        index = number % len(self._sets)
        if not self._is_random[index]:
            return self._sets[index]
        given = None if self.classes is None else self.classes.given
        return at_random(self._sets[index], given, np.random.default_rng([_SEED, number]))

    def by_name(
        self, outcome: NDArray[np.float64], tests: list[I64]
    ) -> dict[str, NDArray[np.float64]]:
        """Return loss and hit of the measuring tests for each row, shape (seed, 2, test)."""
        return {
            name: np.concatenate(
                [outcome[:, at][:, :, own] for at, own in zip(indices, tests, strict=True)],
                axis=2,
            )
            for name, indices in self.at.items()
        }


def _add_known(
    subject: Subject,
    drop: pa.Table,
    classes: Classes | None,
    trainings: _Trainings,
    n_folds: int,
) -> dict[str, Any]:
    """Compare a proposal with true labels, and add trainings that know them."""
    labels, truth = subject.sample_labels(), subject.true_labels()
    wrong = np.flatnonzero(np.asarray(labels != truth))
    if 0 < len(wrong) < subject.n_samples:
        without, right = (Treatment.of(subject.n_samples) for _ in range(2))
        without.weights[wrong] = 0.0
        trainings.add(WRONG, [without] * n_folds)
        if classes is not None and _other_targets(subject.pipeline, classes, wrong) is None:
            numbers = [classes.number_of(label) for label in truth[wrong].tolist()]
            right.classes[wrong] = [AS_GIVEN if n is None else n for n in numbers]
            trainings.add(TRUE, [right] * n_folds)
    return _held_against(truth, wrong, drop)


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
