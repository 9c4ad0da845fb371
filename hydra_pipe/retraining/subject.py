"""The subject of an evaluation: a complete recording, its pipeline, and its relevance."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import PipelineError, RunError, UsageError, shown
from hydra_pipe.loading import PipelineFunction, load_pipeline
from hydra_pipe.plan.id_ranges import parse_selection
from hydra_pipe.progress import Progress
from hydra_pipe.recording.settings import json_settings
from hydra_pipe.retraining.models import Values
from hydra_pipe.retraining.retrainer import LOSS, Retrainer
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.recording import open_gradients
from hydra_pipe.store.data.recording_counts import checked_counts
from hydra_pipe.store.data.relevance import (
    ResultColumns,
    columns_of,
    open_relevance,
    read_relevance,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import (
    BY_LABEL,
    DEFAULT_METHOD,
    ITSELF,
    ResultName,
    refuse_top,
)
from hydra_pipe.store.run.stages import REDUCE
from hydra_pipe.training.pipeline import Pipeline, described
from hydra_pipe.types import I64

# Greatest distance between the test losses of a retraining with all weights 1 and the recorded
# ones, as shares of their norm: without a message, and at all.
SAME, SIMILAR = 1e-3, 0.05
# Settings of a recording that say how it was recorded, and not what was trained.
_OF_RECORDING = (
    "pipeline",
    "encoding",
    "dim",
    "dtype",
    "test_every",
    names.SAMPLE_KEYS_GIVEN,
    names.TEST_KEYS_GIVEN,
)
# Prefix of the names of a pipeline function's settings in a manifest.
_SET = "set "


@dataclass(frozen=True)
class Subject:
    """A run and its pipeline.

    Args:
        run: run with a complete recording.
        pipeline: pipeline of the run, as built, not trained.
        source: file and function of the pipeline, or None if a built Pipeline was given.
        gradients: the recording.
        n_samples, n_tests, n_steps: numbers of training samples, test samples and steps in the
            recording.
    """

    run: RunDirectory
    pipeline: Pipeline
    source: PipelineFunction | None
    gradients: Gradients
    n_samples: int
    n_tests: int
    n_steps: int

    @classmethod
    def open(
        cls,
        pipeline: str | Pipeline,
        run: RunDirectory,
        settings: Mapping[str, Any] | list[str] | None,
    ) -> "Subject":
        """Open a run with its pipeline, which must be the one that was recorded.

        Raises:
            RunError: nothing was recorded, or the pipeline has other settings. The message names
                the first difference.
            HydraError: the pipeline cannot be built, or the recording is damaged.
        """
        recording = run.require_recording()
        if isinstance(pipeline, Pipeline):
            if settings:
                raise PipelineError(
                    "settings are for a pipeline file, and a Pipeline was given: leave the "
                    "settings out"
                )
            source, built = None, pipeline
            own: dict[str, Any] = {}
        else:
            source = load_pipeline(pipeline, settings)
            built = source.build()
            own = dict(source.recorded_settings)
        own |= {"seed": built.seed, "n_samples": len(built.train)} | described(built)
        _compare(run, recording.settings, json_settings(own))
        gradients = open_gradients(run)
        counts = checked_counts(gradients, recording)
        counts.require_tests(run.path)
        return cls(
            run, built, source, gradients, counts.n_samples, counts.n_tests, gradients.n_steps
        )

    def recorded_losses(self) -> NDArray[np.float64]:
        """Return the losses of the test samples at the end of the run. Shape (test,)."""
        return self.gradients.test_losses(self.n_steps).astype(np.float64)

    def sample_labels(self) -> NDArray[Any] | None:
        """Return the labels of the training samples, as recorded, or None if unknown."""
        return self.gradients.labels(names.TRAIN_LABELS)

    def test_labels(self) -> NDArray[Any] | None:
        """Return the labels of the test samples, as recorded, or None if unknown."""
        return self.gradients.labels(names.TEST_LABELS)

    def true_labels(self) -> NDArray[Any]:
        """Return the true label of each training sample, of the recorded labels' type. Shape
        (sample,).

        Raises:
            PipelineError: the pipeline names no true labels, or the recorded labels are unknown
                or of another type.
        """
        truth, labels = self.pipeline.true_labels, self.sample_labels()
        if truth is None:
            raise PipelineError(
                "the pipeline has no true_labels, one for each training sample: return "
                "Pipeline(..., true_labels=...)"
            )
        if labels is None:
            raise PipelineError(
                f"{self.run.path} has no labels of its samples: record it with Pipeline(..., "
                "sample_labels=...)"
            )
        true = (
            np.array([str(label) for label in truth])
            if labels.dtype == object
            else np.asarray(truth)
        )
        if labels.dtype != object and true.dtype.kind not in "iu":
            raise PipelineError(
                f"true_labels are {true.dtype}, the recorded labels are integers: give the same "
                "kind for both"
            )
        return true

    def has_seeds(self) -> bool:
        """Tell whether `with_seed` can be called."""
        return self.source is not None and "seed" in self.source.settings

    def check_seeds(self) -> None:
        """Refuse several seeds for a pipeline without a setting `seed`.

        Raises:
            UsageError: `with_seed` cannot be called.
        """
        if not self.has_seeds():
            raise UsageError(
                "--seeds above 1 needs a pipeline function with a setting `seed`, from which the "
                "initial weights come"
            )

    def with_seed(self, seed: int) -> Values:
        """Return initial parameters and buffers of the pipeline for another seed.

        The data stay those of the run.
        """
        assert self.source is not None, "check_seeds has refused it"
        model = replace(self.source, settings=self.source.settings | {"seed": seed}).build().model
        return {
            name: value.detach().clone()
            for name, value in [*model.named_parameters(), *model.named_buffers()]
        }

    def check(self, retrainer: Retrainer, progress: Progress, *, strict: bool = True) -> None:
        """Train one model with all weights 1, and compare its test losses with the recorded
        ones.

        Args:
            retrainer: retrainer of the pipeline.
            progress: place to say that the losses differ a little.
            strict: True to refuse losses that are not similar. False only says how far they are
                apart.

        Raises:
            PipelineError: the test losses are not those of the run.
        """
        stacked, retrainer.models.stacked = retrainer.models.stacked, False
        try:
            with progress.task("train the run again", retrainer.n_steps, "steps") as task:
                found = retrainer.train(np.ones((1, self.n_samples), np.float32), task)[0, LOSS]
        finally:
            retrainer.models.stacked = stacked
        recorded = self.recorded_losses()
        apart = float(np.linalg.norm(found - recorded)) / max(
            float(np.linalg.norm(recorded)), 1e-30
        )
        if strict and not apart <= SIMILAR:
            raise PipelineError(
                "trained again with all samples the pipeline comes to other test losses than "
                f"{self.run.path} has ({apart:.1%} apart): its code, data or seed have changed, "
                "or it was trained already. Give the pipeline that was recorded"
            )
        if apart > SAME:
            progress.say(
                f"trained again with all samples the test losses are {apart:.2%} apart from the "
                "recorded ones: another machine or "
                "version of torch rounds "
                f"differently{'' if apart <= SIMILAR else ', which grows in a rough training'}, "
                "or the "
                f"pipeline has changed since"
            )

    def all_relevance(self) -> "dict[str, Relevance]":
        """Return all relevance that was computed for the recording's own test samples, by name.

        Raises:
            StoreError: a result is damaged.
        """
        # Probes have no losses to compare with.
        there = [name for name in self.run.complete(REDUCE) if ResultName.parse(name).probe is None]
        return {name: Relevance.of(self.run, name) for name in there}

    def relevance(
        self, chosen: str | None, groupings: tuple[str, ...] = (), tests: str | None = None
    ) -> "dict[str, Relevance]":
        """Return relevance that covers each of the test samples, by name.

        Args:
            chosen: names with commas between them. None means all that cover all steps.
            groupings: groupings of columns that are included too: "mean" or "label" over all test
                samples, or "self", the relevance of the training samples to themselves.
            tests: selection of the test samples that must be covered. Default: all.

        Raises:
            RunError: a chosen name is not there. The message says what to reduce.
            UsageError: a chosen result has the top samples alone.
        """
        stages = self.run.stages
        spans = ((0, self.n_tests),) if tests is None else parse_selection(tests, self.n_tests)
        ids = ResultColumns(spans).test_ids
        whole = {name: r for name, r in self.all_relevance().items() if r.covers(ids, groupings)}
        if chosen is None:
            return {
                name: r
                for name, r in whole.items()
                if names.UPTO not in stages[REDUCE.of(name)].settings
            }
        wanted = [name.strip() for name in chosen.split(",")]
        for name in wanted:
            refuse_top(name)
            if name not in whole:
                result = ResultName.parse(name)
                by = result.by if result.by in groupings else None
                needed = reducing(self.run, replace(result, by=by, probe=None), tests)
                has = f"it has {', '.join(whole)}" if whole else "it has none"
                raise RunError(
                    f"{self.run.path} has no relevance {shown(name)} for "
                    f"{self._in_words(tests)} ({has}): run {needed} first"
                )
        return {name: whole[name] for name in wanted}

    def _in_words(self, tests: str | None) -> str:
        """Return words for a selection of test samples."""
        if tests is None:
            return f"each of the {self.n_tests} test samples"
        return f"each of the test samples {tests}"

    def required_relevance(
        self, chosen: str | None, groupings: tuple[str, ...] = (), tests: str | None = None
    ) -> "dict[str, Relevance]":
        """Return the same as `relevance`, with at least one result.

        Raises:
            RunError: there is no result.
        """
        found = self.relevance(chosen, groupings, tests)
        if not found:
            needed = ResultName(DEFAULT_METHOD, groupings[0] if groupings else None)
            raise RunError(
                f"{self.run.path} has no relevance for {self._in_words(tests)}: run "
                f"{reducing(self.run, needed)} first (and other methods that you want to "
                "compare)"
            )
        return found


@dataclass(frozen=True)
class Relevance:
    """One relevance array.

    Args:
        run: run that holds the array.
        name: name of the array.
        columns: meaning of its columns.
        checksums: checksums of its files. They differ if the array was computed anew.
    """

    run: RunDirectory
    name: str
    columns: ResultColumns
    checksums: str

    @classmethod
    def of(cls, run: RunDirectory, name: str) -> "Relevance":
        """Open the array called `name`.

        Raises:
            StoreError: it is damaged.
        """
        columns = columns_of(open_relevance(run.path / names.RELEVANCE, name))
        return cls(run, name, columns, str(run.checksums(REDUCE.of(name))))

    def covers(self, tests: I64, groupings: tuple[str, ...]) -> bool:
        """Tell whether the array has a column for each of `tests`, shape (test,).

        Groups of `groupings` count too if they are of these test samples, or of none ("self").
        """
        by, own = self.columns.by, self.columns
        if by is None:
            return bool(np.isin(tests, own.test_ids).all())
        return by in groupings and (by == ITSELF or np.array_equal(own.test_ids, tests))

    def values(self) -> NDArray[np.float32]:
        """Return the values. Shape (sample, column).

        Raises:
            StoreError: the array is damaged.
        """
        return read_relevance(
            open_relevance(self.run.path / names.RELEVANCE, self.name), slice(None)
        )


def reducing(run: RunDirectory, result: ResultName, tests: str | None = None) -> str:
    """Return the command that computes `result` for the test samples `tests`; None means all."""
    options = {"--up-to-step": result.up_to_step, "--rank": result.rank, "--tests": tests}
    words = ["hydra-pipe reduce", str(run.path), "--method", result.method]
    words += [f"{option} {value}" for option, value in options.items() if value is not None]
    return " ".join(
        words + ([] if result.by is None else ["--by label" if result.by == BY_LABEL else "--mean"])
    )


def _compare(run: RunDirectory, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compare the recorded settings with those of the pipeline.

    Raises:
        RunError: the pipeline is not the one of the run.
    """
    if "optimizer" not in old:
        raise RunError(
            f"{run.path} was recorded in a loop of your own, which cannot be trained again from "
            "here: record a pipeline"
        )
    # A Pipeline that was given built has no settings of a function, whatever function built it.
    both_of_file = all(any(key.startswith(_SET) for key in settings) for settings in (old, new))
    for key in dict.fromkeys([*new, *old]):
        if key in _OF_RECORDING or (key.startswith(_SET) and not both_of_file):
            continue
        if old.get(key) != new.get(key):
            was, now = (f"{key}={shown(settings.get(key))}" for settings in (old, new))
            raise RunError(
                f"{run.path} was recorded with {was}, the pipeline now has {now}: give the "
                "pipeline and the settings of the run"
            )
