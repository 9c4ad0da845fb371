"""Gathering of a page's content. A part that is not available becomes a line with the reason."""

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import HydraError, StoreError
from hydra_pipe.plan.id_ranges import parse_selection
from hydra_pipe.plan.reporting import block_columns
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.choice import SHOWN_HARMFUL, interesting
from hydra_pipe.reporting.content import Content, Suspect, TestColumn
from hydra_pipe.reporting.findings import Findings, findings
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.reporting.source import ReportSource
from hydra_pipe.reporting.words import Circumstances, warnings
from hydra_pipe.store import names
from hydra_pipe.store.data.evaluations import read_says
from hydra_pipe.store.run.results import MEAN, ResultName
from hydra_pipe.store.run.stages import EVALUATE, RECORD, REDUCE
from hydra_pipe.units import format_bytes, resident_bytes
from hydra_pipe.view import Run

if TYPE_CHECKING:
    from hydra_pipe.reporting.drawing import Drawn
    from hydra_pipe.reporting.inputs import Inputs, Predictions
    from hydra_pipe.training.pipeline import Pipeline

# Bytes for the page, its pictures and Matplotlib, beside what is planned.
_OVERHEAD_BYTES = 128 * 2**20
# Greatest distance of test losses from the recorded ones, as a share of their norm. Beyond it,
# the samples or the model are others.
_SAME_LOSSES = 0.02


class Gathering:
    """Gathering of everything that the page needs.

    Args:
        source: result to report on.
        tests: test samples to show, such as "0-99,150". None means those that tell most.
        top: number of training samples on each side.
        memory_bytes: memory budget of the process.
        progress: place to show progress.
    """

    def __init__(
        self,
        source: ReportSource,
        tests: str | None,
        top: int,
        memory_bytes: int,
        progress: Progress,
    ) -> None:
        self._source, self._tests, self._top = source, tests, top
        self._memory_bytes, self._progress = memory_bytes, progress
        # Reasons for the parts that are missing.
        self.no_samples: str | None = None
        self._missing: list[str] = []

    def content(self, pipeline: "str | Pipeline | None", samples: ShownSamples | None) -> Content:
        """Return all content. `samples`, if given, are shown instead of the pipeline's."""
        source, directory = self._source, self._source.directory
        gradients, columns = source.gradients, source.columns
        train_labels = gradients.labels(names.TRAIN_LABELS)
        if train_labels is not None and len(train_labels) != source.counts.n_samples:
            raise StoreError(
                f"{gradients.path} has {len(train_labels)} labels of {source.counts.n_samples} "
                "training samples"
            )
        test_labels = source.labels_of_columns()
        losses = self._losses()
        inputs = self._inputs(pipeline) if samples is None else None
        predictions = (
            None if inputs is None or source.grouped else self._predictions(inputs, losses)
        )
        chosen = self._chosen(losses, predictions)
        found = self._findings(chosen, train_labels, test_labels)
        order = np.argsort(found.sums, kind="stable")[:SHOWN_HARMFUL]
        suspects = order[found.sums[order] < 0]
        visits = source.visits(self._progress)
        train_drawn, test_drawn = self._drawn(samples, inputs, chosen, found, suspects)
        unit = str(source.relevance.attributes[names.UNIT])
        return Content(
            name=os.path.basename(os.path.abspath(str(directory.path))),
            run_id=directory.run_id,
            result=source.result,
            method=ResultName.parse(source.result).method,
            unit=unit,
            n_samples=source.counts.n_samples,
            columns_are="groups of test samples" if source.grouped else "test samples",
            grouped=source.grouped,
            columns=self._columns(
                chosen, found, losses, test_labels, test_drawn, inputs, predictions
            ),
            n_chosen=self._how_chosen(len(chosen), predictions),
            suspects=[
                Suspect(
                    int(i),
                    float(found.sums[i]),
                    float(found.sums[i]) / columns.n_columns,
                    int(visits[i]),
                )
                for i in suspects
            ],
            train_labels=train_labels,
            train_drawn=train_drawn,
            tiles=self._tiles(losses, predictions, found),
            warnings=self._warnings(visits, found),
            missing=self._missing,
            classes=found.classes,
            distribution=found.distribution,
            losses=gradients.step_table(names.LOSS),
            test_losses=self._test_losses(),
            evaluations=self._told(),
            evaluate_command=directory.command(EVALUATE.of("smoothness")),
            recording=self._recording(),
            settings=self._settings(),
        )

    def _losses(self) -> NDArray[np.float64]:
        """Return the loss of each column at the end, a mean for a group. Shape (column,)."""
        source = self._source
        recorded = source.tested.losses(source.gradients).astype(np.float64)
        losses: NDArray[np.float64] = recorded[source.columns.test_ids]
        if not source.grouped:
            return losses
        if source.columns.by == MEAN:
            return np.array([losses.mean()])
        labels = source.tested.labels(source.gradients)
        if labels is None:
            return np.full(source.columns.n_columns, np.nan)
        own = labels[source.columns.test_ids]
        return np.array(
            [
                losses[own == name].mean() if (own == name).any() else np.nan
                for name in source.columns.names
            ]
        )

    def _inputs(self, pipeline: "str | Pipeline | None") -> "Inputs | None":
        """Return the pipeline of the run, or None after noting why it is not available."""
        from hydra_pipe.reporting.inputs import Inputs  # torch takes seconds to import

        self._progress.say("building the pipeline, to draw its samples")
        try:
            return Inputs.of_run(self._source.directory, pipeline, self._source.probe)
        except HydraError as error:
            self._lacks_samples(error)
            return None

    def _lacks_samples(self, error: HydraError) -> None:
        self.no_samples = str(error)
        self._missing.append(f"Samples are shown by id and label only: {error}")
        self._progress.say(f"the report shows samples by id and label only: {error}")

    def _predictions(self, inputs: "Inputs", losses: NDArray[np.float64]) -> "Predictions | None":
        source = self._source
        if not source.final:
            self._missing.append(
                f"Predictions are not shown: the parameters after {source.up_to_step:,} steps "
                "were not "
                "kept."
            )
            return None
        try:
            inputs.load_final(source.directory)
            found = inputs.predict(source.columns.test_ids, self._progress)
        except HydraError as error:
            self._missing.append(f"Predictions are not shown: {error}")
            self._progress.say(f"the report shows no predictions: {error}")
            return None
        apart = float(np.linalg.norm(found.losses - losses)) / max(
            float(np.linalg.norm(losses)), 1e-30
        )
        if not apart <= _SAME_LOSSES:
            self._missing.append(
                f"The test losses are now {apart:.0%} apart from those that were recorded: the "
                "pipeline's data or code have changed since, so pictures and predictions may "
                "show other samples."
            )
        return found

    def _chosen(
        self, losses: NDArray[np.float64], predictions: "Predictions | None"
    ) -> NDArray[np.int64]:
        """Return the columns to show, in order."""
        columns = self._source.columns
        wrong = (
            None if predictions is None or not predictions.are_classes else predictions.right == 0.0
        )
        if self._tests is not None:
            chosen = np.searchsorted(
                columns.test_ids, np.concatenate([np.arange(*span) for span in self._spans()])
            )
            key = np.where(wrong[chosen], 0, 1) if wrong is not None else np.zeros(len(chosen))
            return chosen[np.lexsort((-losses[chosen], key))]
        if columns.by is not None:
            return np.arange(columns.n_columns)
        return interesting(losses, wrong)

    def _spans(self) -> tuple[tuple[int, int], ...]:
        assert self._tests is not None
        return parse_selection(self._tests, self._source.n_tests)

    def _how_chosen(self, n: int, predictions: "Predictions | None") -> str:
        source = self._source
        of = (
            f"{n:,} of {source.columns.n_columns:,} "
            f"{'groups' if source.grouped else 'test samples'}"
        )
        bars = (
            f"Bars show the {self._top} training samples that help and harm each most, on one "
            "scale within it."
        )
        if source.grouped:
            return f"All {n:,} groups of test samples, each with the mean of its relevance. {bars}"
        if self._tests is not None:
            return f"{of}, as chosen by --tests {self._tests}. {bars}"
        if n == source.columns.n_columns:
            return f"All {n:,} test samples. {bars}"
        if predictions is not None and predictions.are_classes:
            return (
                f"{of}: those predicted wrongly with the highest loss, then others, of high loss "
                f"and of any. {bars}"
            )
        return f"{of}: those of the highest loss, and some of any. {bars}"

    def _findings(
        self,
        chosen: NDArray[np.int64],
        train_labels: NDArray[Any] | None,
        test_labels: NDArray[Any] | None,
    ) -> Findings:
        relevance = self._source.relevance
        base = resident_bytes() + _OVERHEAD_BYTES
        width = block_columns(relevance.shape[0], relevance.shape[1], base, self._memory_bytes)
        with self._progress.task("read relevance", relevance.shape[1], "tests") as task:
            return findings(
                relevance, chosen.tolist(), self._top, train_labels, test_labels, width, task
            )

    def _drawn(
        self,
        samples: ShownSamples | None,
        inputs: "Inputs | None",
        chosen: NDArray[np.int64],
        found: Findings,
        suspects: NDArray[np.int64],
    ) -> "tuple[dict[int, Drawn], dict[int, Drawn]]":
        """Return views of the training samples and of the test samples on the page, by id."""
        if samples is None and inputs is None:
            return {}, {}
        train = np.unique(
            np.concatenate([suspects, *(side.ids for both in found.sides for side in both)])
        )
        tests = (
            np.zeros(0, np.int64)
            if self._source.grouped
            else np.sort(self._source.columns.test_ids[chosen])
        )

        def drawn(which: str, ids: NDArray[np.int64]) -> "dict[int, Drawn]":
            from hydra_pipe.reporting.inputs import draw_shown  # torch takes seconds to import

            if samples is not None:
                return draw_shown(samples, which, ids, self._progress)
            assert inputs is not None
            return inputs.draw(which, ids, self._progress)

        try:
            return drawn("train", train), drawn("test", tests)
        except HydraError as error:
            self._lacks_samples(error)
            return {}, {}

    def _columns(
        self,
        chosen: NDArray[np.int64],
        found: Findings,
        losses: NDArray[np.float64],
        labels: NDArray[Any] | None,
        drawn: "dict[int, Drawn]",
        inputs: "Inputs | None",
        predictions: "Predictions | None",
    ) -> list[TestColumn]:
        columns = self._source.columns
        names_of = _class_names(predictions, labels)
        is_class = predictions is not None and predictions.are_classes
        shown_columns = []
        for place, (helpful, harmful) in zip(chosen.tolist(), found.sides, strict=True):
            test, right = int(columns.ids[place]), None
            target = predicted = None
            if predictions is not None and inputs is not None:
                right = (
                    None if np.isnan(predictions.right[place]) else float(predictions.right[place])
                )
                if predictions.values is not None and predictions.targets is not None:
                    predicted = _in_words(predictions.values[place], names_of, inputs)
                    target = (
                        _in_words(predictions.targets[place], names_of, inputs)
                        if labels is None
                        else None
                    )
            loss = float(losses[place]) if np.isfinite(losses[place]) else None
            label = (
                "all test samples"
                if columns.by == MEAN
                else None
                if labels is None
                else labels[place]
            )
            shown_columns.append(
                TestColumn(
                    test,
                    label,
                    target,
                    predicted,
                    right,
                    is_class,
                    loss,
                    drawn.get(test),
                    helpful,
                    harmful,
                )
            )
        return shown_columns

    def _tiles(
        self, losses: NDArray[np.float64], predictions: "Predictions | None", found: Findings
    ) -> list[tuple[str, str]]:
        """Return pairs of a figure and its meaning."""
        source = self._source
        tiles = [
            (f"{source.counts.n_samples:,}", "training samples"),
            (f"{source.columns.n_tests:,}", "test samples looked at"),
            (f"{source.gradients.n_steps:,}", "training steps"),
        ]
        if predictions is not None and not np.isnan(predictions.right).any():
            of = "these" if predictions.are_classes else "their positions"
            tiles.append((f"{predictions.right.mean():.1%}", f"of {of} predicted right"))
        tiles.append(
            (
                f"{np.nanmean(losses):.3g}" if np.isfinite(losses).any() else "unknown",
                "mean test loss",
            )
        )
        tiles.append(
            (f"{(found.sums < 0).mean():.1%}", "of the training samples harm more than they help")
        )
        return tiles

    def _warnings(self, visits: NDArray[np.int64], found: Findings) -> list[str]:
        source, stages = self._source, self._source.directory.stages
        parts, blocks = ResultName.parse(source.result), source.gradients.layout.blocks
        return warnings(
            Circumstances(
                method=parts.method,
                rank=parts.rank,
                up_to_step=source.up_to_step,
                record=stages[RECORD].facts,
                reduce=stages[REDUCE.of(source.result)].facts,
                n_samples=source.counts.n_samples,
                n_rows=source.gradients.rows.n_rows,
                unvisited=int((visits == 0).sum()),
                projected=sum(not block.exact for block in blocks),
                n_blocks=len(blocks),
                strange=found.distribution.strange,
            )
        )

    def _test_losses(self) -> list[tuple[int, float]]:
        """Return pairs of a step with test losses and their mean."""
        gradients, last = self._source.gradients, self._source.counts.checkpoint
        steps = [step for step in gradients.test_steps() if step <= last]
        means = [
            (step, float(np.mean(gradients.test_losses(step), dtype=np.float64))) for step in steps
        ]
        return [(step, mean) for step, mean in means if np.isfinite(mean)]

    def _told(self) -> list[tuple[str, list[str]]]:
        """Return the lines of each evaluation of the run, by kind.

        An evaluation that cannot be read is left out, because `verify` reports it.
        """
        told = []
        for kind in self._source.directory.complete(EVALUATE):
            with suppress(OSError, ValueError):
                told.append((kind, read_says(self._source.directory.path / EVALUATE.of(kind).area)))
        return told

    def _recording(self) -> dict[str, Any]:
        info = Run(self._source.directory).info()
        recording: dict[str, Any] = info["recording"]
        return recording | {"bytes": format_bytes(info["bytes"].get(names.GRADIENTS, 0))}

    def _settings(self) -> list[tuple[str, str]]:
        stages = self._source.directory.stages
        found = [(f"record: {name}", value) for name, value in stages[RECORD].settings.items()]
        found += [
            (f"reduce: {name}", value)
            for name, value in stages[REDUCE.of(self._source.result)].settings.items()
        ]
        found += [
            (f"version of {name}", value) for name, value in self._source.directory.versions.items()
        ]
        return [
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in found
            if value is not None
        ]


def _class_names(predictions: "Predictions | None", labels: NDArray[Any] | None) -> dict[int, str]:
    """Return names for the classes that the model predicts.

    A class has the label of the test samples that have the class as target.
    """
    if (
        predictions is None
        or predictions.targets is None
        or labels is None
        or labels.dtype != object
    ):
        return {}
    found: dict[int, set[str]] = {}
    for target, label in zip(predictions.targets, labels, strict=True):
        if np.ndim(target) == 0 and np.issubdtype(np.asarray(target).dtype, np.integer):
            found.setdefault(int(target), set()).add(str(label))
    return {target: next(iter(called)) for target, called in found.items() if len(called) == 1}


def _in_words(value: Any, names_of: dict[int, str], inputs: "Inputs") -> str | None:
    """Return a prediction or a target as text for a person."""
    values = np.asarray(value)
    if values.ndim == 0:
        return (
            names_of.get(int(values), str(int(values)))
            if values.dtype.kind in "iub"
            else f"{float(values):.4g}"
        )
    return inputs.drawn_prediction(value)
