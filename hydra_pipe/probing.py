"""Test gradients of new inputs on a finished run, from a dataset to `probes/NAME.zarr`."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn

from hydra_pipe.errors import RunError, UsageError
from hydra_pipe.loading import load_dataset, pipeline_of
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.progress import Progress, Task
from hydra_pipe.recording.collectives import unwrapped
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.datasets import BATCH, dataset_batches, given_batches, is_dataset, size_of
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.settings import (
    Labels,
    checked_keys,
    json_settings,
    setting_of_keys,
)
from hydra_pipe.recording.test_gradients import digest_of, record_test_gradients
from hydra_pipe.recording.untouched import untouched
from hydra_pipe.store import names
from hydra_pipe.store.data.checkpoints import load_final, state_digests
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.probes import (
    KEYS,
    LABELS,
    SAMPLES,
    check_name,
    drop_results,
    probe_table,
    results_of,
    write_probe_keys,
    write_probe_labels,
)
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.run.commands import DATASET
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.stage_runner import running, taken_up
from hydra_pipe.store.run.stages import PROBE, RECORD, Settings, StageId
from hydra_pipe.training.pipeline import Pipeline, check_dataset
from hydra_pipe.units import format_seconds

_AGAIN = "record the run again with --overwrite"


@dataclass(frozen=True)
class _Asked:
    """A probe to take.

    Args:
        dataset: new test samples, or batches of new test samples as a loader has given them.
        n_samples: number of samples.
        seed, batch_size: seed and batch size for drawing from a dataset.
        labels: labels of the samples. None means integer targets, or unknown.
        keys: keys of the samples. None means they have none.
        settings: settings of the stage.
    """

    dataset: Any
    n_samples: int
    seed: int
    batch_size: int
    labels: Labels | None
    keys: list[str] | None
    settings: Settings

    def batches(self, task: Task) -> Iterator[tuple[Any, Any]]:
        """Return batches of (inputs, targets), in order."""
        return _counted(_batches(self.dataset, self.seed, self.batch_size), task)


def _batches(dataset: Any, seed: int, batch_size: int) -> Iterator[tuple[Any, Any]]:
    return (
        dataset_batches(dataset, "probe", seed, batch_size)
        if is_dataset(dataset)
        else iter(dataset)
    )


def _counted(batches: Iterator[tuple[Any, Any]], task: Task) -> Iterator[tuple[Any, Any]]:
    for inputs, targets in batches:
        yield inputs, targets
        task.advance(size_of(targets))


def probe(
    run: str | os.PathLike[str],
    dataset: Any,
    *,
    name: str,
    settings: Mapping[str, Any] | list[str] | None = None,
    labels: Labels | None = None,
    keys: Sequence[str] | None = None,
    pipeline: str | Pipeline | None = None,
    model: nn.Module | None = None,
    loss: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Take the test gradients of new inputs on a finished run, for `reduce(..., probe=name)`.

    The gradients are taken at the run's final parameters, with its encodings and seeds. They
    equal the gradients that the inputs would have as test samples of the run.

    Args:
        run: directory of the run.
        dataset: test samples in a form that `Recorder.record_test` takes, or
            "path/to/file.py:function" for a function that returns such samples.
        name: name of the probe: letters, digits and "_".
        settings: settings of the function, as a mapping of values or as "KEY=VALUE" strings.
        labels: one label, integer or string, for each sample. Default: integer targets.
        keys: one string for each sample that names no other one, such as a path.
        pipeline: recorded pipeline: the file if it has moved, or a Pipeline if such an object
            was recorded. Its model gets the final parameters.
        model, loss: model and loss of a run that was recorded in a loop of one's own. The model
            has the parameters it had at `record_test`. The loss maps (output, target) to losses
            of shape (batch,), or to their mean or sum.
        overwrite: take the probe again, and discard everything computed from it.
        progress: place to show progress. Default: nowhere.

    Returns:
        True if there was anything to do, else False.

    Raises:
        RunError: there is no run, its recording is not complete, or the model is not the one of
            the run.
        StoreError: the recording is damaged.
        UsageError: arguments do not go together, or have impossible values.
        PipelineError, UserCodeError, DataError, NonFiniteError, GradientMismatchError, LayerError:
        the same
            errors as in recording.
    """
    check_name(name)
    if (model is None) != (loss is None) or (model is not None and pipeline is not None):
        raise UsageError("give either a pipeline, or a model and its loss")
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    gradients, counts = open_recording(directory, None)
    asked = _asked(directory, dataset, settings, labels, keys, counts.checkpoint, progress)
    stage = PROBE.of(name)

    def has_work() -> bool:
        return overwrite or _has_work(directory, stage, asked.settings)

    with taken_up(
        directory, stage, *results_of(directory, name), has_work=has_work, progress=progress
    ) as is_needed:
        if is_needed:
            start = time.monotonic()
            subject = _subject(directory, gradients, counts.checkpoint, pipeline, model, loss)
            _take(directory, gradients, name, subject, asked, progress)
            progress.say(
                f"took the gradients of {asked.n_samples:,} samples in "
                f"{format_seconds(time.monotonic() - start)}"
            )
    return is_needed


def _has_work(directory: RunDirectory, stage: StageId, settings: Settings) -> bool:
    """Tell whether the probe is yet to be taken.

    A failed probe left nothing, so its settings do not matter.

    Raises:
        RunError: the probe was taken with other settings.
    """
    found = directory.stages.get(stage)
    return found is None or found.state != "complete" or directory.has_work(stage, settings)


def _asked(
    directory: RunDirectory,
    dataset: Any,
    settings: Mapping[str, Any] | list[str] | None,
    labels: Labels | None,
    keys: Sequence[str] | None,
    checkpoint: int,
    progress: Progress,
) -> _Asked:
    """Load the dataset, and return the probe to take.

    Raises:
        UsageError, PipelineError, UserCodeError, DataError: the dataset cannot be loaded, or is
            not a dataset.
    """
    recorded = directory.stages[RECORD].settings
    seed, batch_size = recorded.get("seed"), recorded.get("batch_size")
    seed, batch_size = (
        seed if is_count(seed) else 0,
        batch_size if is_count(batch_size, 1) else BATCH,
    )
    own: Settings = {DATASET: None}
    if isinstance(dataset, str):
        source = load_dataset(dataset, settings)
        own = {DATASET: source.spec} | source.recorded_settings
        dataset = source.build()
    elif settings:
        raise UsageError(
            "settings are for a function FILE:NAME, and a dataset was given: leave the settings out"
        )
    if is_dataset(dataset) or not isinstance(dataset, Iterable):
        check_dataset("the dataset", dataset)
        n_samples = len(dataset)
    else:  # a loader gives its batches once, and may draw others the next time
        dataset = list(given_batches(dataset, seed))
        n_samples = sum(size_of(targets) for _, targets in dataset)
    with progress.task("read", n_samples, "rows") as task:
        own[SAMPLES] = digest_of(_counted(_batches(dataset, seed, batch_size), task))
    if labels is not None:
        own[LABELS] = hashlib.sha256(repr(np.asarray(labels).tolist()).encode()).hexdigest()[:16]
    checked = None if keys is None else checked_keys(keys, "keys", n_samples)
    own |= setting_of_keys(KEYS, checked)
    return _Asked(
        dataset,
        n_samples,
        seed,
        batch_size,
        labels,
        checked,
        json_settings(own | {"checkpoint": checkpoint}),
    )


@dataclass(frozen=True)
class _Subject:
    """The model whose gradients are taken.

    Args:
        model: model with the final parameters.
        loss: loss of the model.
        trained: name and group of each recorded parameter, in the order of the blocks.
    """

    model: nn.Module
    loss: Any
    trained: dict[nn.Parameter, tuple[str, int]]


def _subject(
    directory: RunDirectory,
    gradients: Gradients,
    step: int,
    pipeline: str | Pipeline | None,
    model: nn.Module | None,
    loss: Any,
) -> _Subject:
    """Return the model of the run, with its final parameters.

    Raises:
        RunError: the model is not the one of the run, or is not known.
    """
    if model is None:
        advice = (
            "a probe needs the model. Give hydra_pipe.probe(run, dataset, name=..., model=..., "
            "loss=...), or pipeline=... if a pipeline was recorded"
        )
        load, sha256 = (
            pipeline_of(directory, pipeline, advice),
            directory.stages[RECORD].facts.get("final_sha256"),
        )
        if sha256 is None:
            raise RunError(
                f"{directory.path} was recorded in a loop of your own, which keeps its parameters "
                f"itself: {advice}"
            )
        built = load()
        model, loss = built.model, built.loss
        final = load_final(directory.path / names.CHECKPOINTS, sha256)
        _check_names(directory, model.state_dict(), final)
        model.load_state_dict(final)
    model = unwrapped(model)
    _check_state(directory, gradients.state_at(step), state_digests(model), step)
    parameters = dict(model.named_parameters())
    trained = {}
    for block in gradients.layout.blocks:
        parameter = parameters.get(block.name)
        if parameter is None or tuple(parameter.shape) != block.shape:
            has = (
                "none of that name"
                if parameter is None
                else f"one of shape {tuple(parameter.shape)}"
            )
            raise RunError(
                f"{directory.path} has recorded parameter {block.name} {block.shape}, the model "
                f"has {has}: give the model of the run"
            )
        trained[parameter] = (block.name, block.group)
    return _Subject(model, loss, trained)


def _check_names(directory: RunDirectory, now: Mapping[str, Any], final: Mapping[str, Any]) -> None:
    """Compare the model's state with the state that was kept at the end of training.

    Raises:
        RunError: parameters or buffers differ in name or shape.
    """
    for name in dict.fromkeys([*final, *now]):
        shapes = [
            tuple(np.shape(values[name])) if name in values else None for values in (final, now)
        ]
        if shapes[0] != shapes[1]:
            was, has = ("none" if shape is None else f"shape {shape}" for shape in shapes)
            raise RunError(
                f"{directory.path} was recorded with {name}: {was}, and the model has {has}: give "
                "the model of the run"
            )


def _check_state(
    directory: RunDirectory, recorded: Mapping[str, str], now: Mapping[str, str], step: int
) -> None:
    """Check that the model has the parameters and buffers of the recorded test gradients.

    Raises:
        RunError: a parameter or buffer differs, or the run does not tell.
    """
    if not recorded:
        raise RunError(
            f"{directory.path} does not say at which parameters its test gradients were taken: "
            f"{_AGAIN}"
        )
    for name in dict.fromkeys([*recorded, *now]):
        if recorded.get(name) != now.get(name):
            how = (
                "lacks it"
                if name not in now
                else "has it beside"
                if name not in recorded
                else "has other values"
            )
            raise RunError(
                f"{directory.path}: {name} is not as it was after {step} steps, when the test "
                "gradients were taken: the model "
                f"{how}: load the parameters of that moment"
            )


def _take(
    directory: RunDirectory,
    gradients: Gradients,
    name: str,
    subject: _Subject,
    asked: _Asked,
    progress: Progress,
) -> None:
    stage = PROBE.of(name)
    # before anything is discarded
    check_stages(directory.path, stage, *results_of(directory, name))
    drop_results(directory, name)
    attributes = {names.RUN_ID: directory.run_id, names.MADE_OF: asked.settings}
    dtype = str(gradients.rows.dtype)
    with running(directory, stage, asked.settings) as work, work.replaced() as partial:
        with (
            _collecting(subject, gradients, cast(Dtype, dtype)) as collector,
            progress.task("probe", asked.n_samples, "rows") as task,
            probe_table(partial, attributes, gradients.layout, dtype) as table,
        ):
            n_tests, labels, worst = record_test_gradients(
                subject.model,
                collector,
                table,
                asked.batches(task),
                subject.loss,
                asked.labels,
                "at the end",
                "probe",
            )
        if labels is not None:
            write_probe_labels(partial, labels)
        if asked.keys is not None:
            write_probe_keys(partial, asked.keys)
        work.facts |= {"n_tests": n_tests, "worst_imbalance": worst}


@contextmanager
def _collecting(subject: _Subject, gradients: Gradients, dtype: Dtype) -> Iterator[Collector]:
    """Collect the model's gradients in the run's own columns for the length of a block.

    Afterwards the model and its hooks are as they were.
    """
    # A parameter that was trained and then frozen has a gradient all the same.
    frozen = [parameter for parameter in subject.trained if not parameter.requires_grad]
    layout = gradients.layout
    collector = Collector(
        subject.model, subject.trained, "auto", layout.n_features, layout.seed, dtype
    )
    try:
        collector.resume(layout, dtype)
        for parameter in frozen:
            parameter.requires_grad_(True)
        with untouched(subject.model, subject.loss), eval_mode(subject.model):
            yield collector
    finally:
        collector.detach()
        for parameter in frozen:
            parameter.requires_grad_(False)
