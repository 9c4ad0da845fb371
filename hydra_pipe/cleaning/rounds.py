"""Further rounds of judging: a training on the cleaned labels, whose dynamics judge the given ones.

The training of a round is an ordinary run beside the first one, without test samples. Its rows
are as narrow as can be, because only the dynamics are read.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hydra_pipe.cleaning.by_dynamics import Seen, proposed_by_dynamics
from hydra_pipe.cleaning.dataset import CleanedDataset
from hydra_pipe.cleaning.decision import Cut
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.cleaning.treatments import DECIDED, Proposed
from hydra_pipe.cleaning.visits import dynamics_of, relabelled
from hydra_pipe.errors import RunError
from hydra_pipe.loading import pipeline_of
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.training.run import RecordOptions, record_run

_ADVICE = (
    "--rounds trains the pipeline again. Build the pipeline anew, and give it as "
    "hydra_pipe.clean(run, rounds=2, pipeline=...)"
)
# Settings of a recording: run whose labels were cleaned, and a digest of the cleaned labels.
_OF_RUN, _LABELS = "cleaned run", "cleaned labels"


def loader(directory: RunDirectory, pipeline: "str | Pipeline | None") -> Callable[[], Pipeline]:
    """Return a function that builds the untrained pipeline of a run.

    Raises:
        RunError: the pipeline is not known, or may not be run unasked.
    """
    return pipeline_of(directory, pipeline, _ADVICE)


def further_rounds(
    directory: RunDirectory,
    built: Pipeline,
    seen: Seen,
    first: Cleaning,
    cut: Cut,
    rounds: int,
    progress: Progress,
) -> Cleaning:
    """Train on the cleaned labels and judge the given labels again, `rounds` - 1 times.

    After an interruption the same call resumes the training that was interrupted.

    Args:
        directory: run that was judged first.
        built: untrained pipeline of the run, which stays untrained.
        seen: visits of the run.
        first: proposal of the first round.
        cut: rule of the proposals.
        rounds: number of rounds, 2 or more.
        progress: place to show progress.

    Returns:
        The proposal of the last round. Its summary has all rounds.

    Raises:
        RunError: the place of a round holds something else.
        HydraError: any error of a recording.
    """
    truth = None if built.true_labels is None else np.asarray(built.true_labels)
    found = first
    told = [_told(first, seen, truth)]
    says = [f"round 1: {_in_words(told[0])}"]
    for number in range(2, rounds + 1):
        place = directory.path.with_name(f"{directory.path.name}-round-{number}")
        kept = _trained(built, directory, found, seen, place, progress)
        own = Seen(
            directory.run_id,
            seen.n_samples,
            *_judged_again(place, kept, seen),
            seen.classes,
            seen.keys,
        )
        before, found = found, proposed_by_dynamics(own, cut, progress)
        told.append(_told(found, seen, truth))
        says.append(f"round {number}: {_in_words(told[-1])}; {_changes(before, found)}")
    found.summary["says"][:0] = says
    return replace(found, summary=found.summary | {names.ROUNDS: told})


def _trained(
    built: Pipeline,
    directory: RunDirectory,
    found: Cleaning,
    seen: Seen,
    place: Path,
    progress: Progress,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Train on the labels that a proposal cleans, and record it. Return the samples that stay."""
    treatment = Proposed.of(found.drop, found.judged, seen.n_samples).treated(DECIDED)
    train = CleanedDataset(built.train, treatment, seen.classes.given, seen.classes.labels)
    model, optimizer, scheduler = copy.deepcopy((built.model, built.optimizer, built.scheduler))
    pipeline = replace(
        built,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train=train,
        test=None,
        sample_labels=None,
        test_labels=None,
        sample_keys=None,
        test_keys=None,
        true_labels=None,
    )
    digest = hashlib.sha256(treatment.weights.tobytes() + treatment.classes.tobytes()).hexdigest()
    settings = {"pipeline": None, _OF_RUN: directory.run_id, _LABELS: digest[:16]}
    # One column for each parameter is the least that a recording has.
    options = RecordOptions.parse(
        "projected",
        len(list(model.parameters())),
        None,
        None,
        None,
        overwrite=_is_other(place, directory, digest[:16]),
    )
    progress.say(f"training on the cleaned labels, recorded in {place}")
    record_run(pipeline, place, settings, options, progress)
    return train.ids


def _is_other(place: Path, directory: RunDirectory, digest: str) -> bool:
    """Tell whether `place` has a training on other cleaned labels of this run, to be replaced.

    Raises:
        RunError: `place` holds a run that is no round of this one.
    """
    there = RunDirectory.open_or_none(place)
    if there is None or RECORD not in there.stages:
        return False
    settings = there.stages[RECORD].settings
    if _OF_RUN not in settings:
        raise RunError(
            f"{place} is the place of a further round, and holds another run: move that run away"
        )
    return (settings[_OF_RUN], settings.get(_LABELS)) != (directory.run_id, digest)


def _judged_again(place: Path, kept: Any, seen: Seen) -> tuple[Any, Any]:
    """Return the samples and visits of a round, with the labels that were given."""
    gradients, _ = open_recording(RunDirectory.open(place), None)
    ids, dynamics = dynamics_of(gradients)
    samples = kept[ids]
    return samples, relabelled(dynamics, seen.classes.given[samples])


def _told(found: Cleaning, seen: Seen, truth: Any) -> dict[str, Any]:
    """Return the numbers of a round."""
    ids = found.drop.column("train_id").to_numpy()
    told = {"n_proposed": len(ids), "n_wrong": found.summary["n_wrong"]}
    if truth is None:
        return told
    names_of, true = seen.classes.labels.astype(str), truth.astype(str)
    wrong = names_of[seen.classes.given] != true
    hits = int(wrong[ids].sum())
    new = found.drop.column("suggested_class").to_numpy()
    told["precision"] = hits / len(ids) if len(ids) else None
    told["recall"] = hits / int(wrong.sum()) if wrong.any() else None
    told["suggested_right"] = int((names_of[new] == true[ids]).sum())
    return told


def _in_words(told: dict[str, Any]) -> str:
    value, low, high = told["n_wrong"]
    text = f"{told['n_proposed']:,} proposed, about {value:,.0f} wrong ({low:,.0f} to {high:,.0f})"
    if told.get("precision") is not None and told.get("recall") is not None:
        text += (
            f"; by the pipeline's true labels precision {told['precision']:.3f}, recall "
            f"{told['recall']:.3f}, {told['suggested_right']:,} suggested labels right"
        )
    return text


def _changes(before: Cleaning, after: Cleaning) -> str:
    old, new = (set(one.drop.column("train_id").to_pylist()) for one in (before, after))
    return f"{len(new & old):,} as before, {len(new - old):,} new, {len(old - new):,} no longer"
