"""Gathering of a page's content. A part that is not available becomes a line with the reason."""

import os
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import HydraError, StoreError
from hydra_pipe.plan.id_ranges import parse_selection
from hydra_pipe.plan.reporting import block_columns
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.alike import alike_inputs
from hydra_pipe.reporting.choice import SHOWN_HARMFUL, interesting
from hydra_pipe.reporting.columns import OF_TESTS, Naming, confusions_of, shown_columns
from hydra_pipe.reporting.content import (
    Content,
    Hurt,
    LabelPart,
    NoRelevance,
    RelevancePart,
    Suspect,
)
from hydra_pipe.reporting.counting import Confusion, class_counts
from hydra_pipe.reporting.duplicates import Duplicates
from hydra_pipe.reporting.ensemble import about_combined, first_run, tiles_of
from hydra_pipe.reporting.facts import (
    losses_of_columns,
    mean_test_losses,
    recording_of,
    settings_of,
    told,
)
from hydra_pipe.reporting.findings import Findings, Wanted, findings
from hydra_pipe.reporting.labels import JudgedLabels, judged_labels
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.reporting.source import ReportSource
from hydra_pipe.reporting.words import Circumstances, hardly_learnt, warnings, without_relevance
from hydra_pipe.store import names
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import EVALUATE, RECORD, REDUCE
from hydra_pipe.types import I64
from hydra_pipe.units import resident_bytes

if TYPE_CHECKING:
    from hydra_pipe.reporting.drawing import Drawn
    from hydra_pipe.reporting.inputs import Inputs, Predictions, Shown
    from hydra_pipe.training.pipeline import Pipeline

_Labels = NDArray[Any] | None
# Bytes for the page, its pictures and Matplotlib, beside what is planned.
_OVERHEAD_BYTES = 128 * 2**20
# Greatest distance of test losses from the recorded ones, as a share of their norm. Beyond it,
# the samples or the model are others.
_SAME_LOSSES = 0.02


def _keys_of(keys: Keys | None, ids: I64) -> dict[int, str]:
    """Return the keys of samples by id. Empty if they have none."""
    return {} if keys is None else dict(zip(ids.tolist(), keys.take(ids), strict=True))


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
        source = self._source
        train_labels, test_labels = self._train_labels(), source.labels_of_columns()
        losses = losses_of_columns(source)
        judged = self._judged()
        shown, predictions = self._shown(pipeline, samples, losses)
        chosen = self._chosen(losses, predictions)
        queue = [] if isinstance(judged, str) else [doubt.id for doubt in judged.doubts]
        found = self._findings(chosen, queue, train_labels, test_labels)
        suspects = self._suspects(found)
        visits = source.samples.visits(self._progress)
        alike = self._alike(shown, judged, train_labels)
        train = [*queue, *suspects.tolist()]
        of_train, of_test = self._on_page(train, chosen, found, alike)
        train_drawn, test_drawn = self._drawn(shown, of_train, of_test)
        naming = Naming.of(judged, predictions, test_labels)
        confusions = confusions_of(judged, predictions, naming)
        return Content(
            name=os.path.basename(os.path.abspath(str(source.directory.path))),
            run_id=source.directory.run_id,
            result=source.result,
            method=ResultName.parse(source.result).method,
            n_samples=source.samples.n_samples,
            labels=self._label_part(judged, found, test_labels, confusions),
            confusions=list(confusions.items()),
            columns_are="groups of test samples" if source.grouped else "test samples",
            grouped=source.grouped,
            columns=shown_columns(
                source.columns,
                chosen,
                found,
                losses,
                naming,
                predictions,
                test_drawn,
                source.combined,
            ),
            n_chosen=self._how_chosen(len(chosen), predictions),
            train_labels=train_labels,
            train_drawn=train_drawn,
            test_drawn=test_drawn,
            test_labels=self._labels_of_tests(alike),
            train_keys=_keys_of(source.samples.keys(), of_train),
            test_keys=_keys_of(source.keys_of_tests(), of_test),
            duplicates=alike,
            tiles=self._tiles(losses, predictions, found),
            warnings=self._warnings(visits, found, predictions),
            missing=self._missing,
            relevance=self._relevance_part(found, suspects, visits),
            losses=self._losses(),
            test_losses=mean_test_losses(source),
            evaluations=told(source),
            evaluate_command=None
            if source.recording is None
            else source.directory.command(EVALUATE.of("smoothness")),
            recording=recording_of(source),
            settings=settings_of(source),
        )

    def _train_labels(self) -> _Labels:
        source = self._source
        labels, n_samples = source.samples.labels(), source.samples.n_samples
        if labels is not None and len(labels) != n_samples:
            raise StoreError(
                f"{source.directory.path} has {len(labels)} labels of {n_samples} training samples"
            )
        return labels

    def _losses(self) -> NDArray[np.float64]:
        """Return the loss of each step, shape (step,). Empty where several runs are combined."""
        recording = self._source.recording
        return np.zeros(0) if recording is None else recording.gradients.step_table(names.LOSS)

    def _judged(self) -> JudgedLabels | str:
        """Return the judged labels, or the reason why they were not judged."""
        try:
            return judged_labels(self._source, self._memory_bytes, self._progress)
        except StoreError:
            raise
        except HydraError as error:
            return str(error)

    def _shown(
        self,
        pipeline: "str | Pipeline | None",
        samples: ShownSamples | None,
        losses: NDArray[np.float64],
    ) -> "tuple[Shown | None, Predictions | None]":
        """Return the samples to draw, and predictions. None after noting why they are missing."""
        # torch takes seconds to import
        from hydra_pipe.reporting.inputs import GivenSamples, Inputs

        if samples is not None:
            return GivenSamples(samples), None
        source = self._source
        self._progress.say("building the pipeline, to draw its samples")
        try:
            run = source.directory if source.combined is None else first_run(source)
            inputs = Inputs.of_run(run, pipeline, source.probe)
        except HydraError as error:
            self._lacks_samples(error)
            return None, None
        if source.grouped or not source.columns.n_tests:
            return inputs, None
        return inputs, self._predictions(inputs, losses)

    def _lacks_samples(self, error: HydraError) -> None:
        self.no_samples = str(error)
        self._missing.append(f"Samples are shown by id and label only: {error}")
        self._progress.say(f"the report shows samples by id and label only: {error}")

    def _predictions(self, inputs: "Inputs", losses: NDArray[np.float64]) -> "Predictions | None":
        source = self._source
        if source.combined is not None:
            self._missing.append(
                "Predictions are not shown: each of the runs has a network of its own."
            )
            return None
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

    def _chosen(self, losses: NDArray[np.float64], predictions: "Predictions | None") -> I64:
        """Return the columns to show, in order."""
        columns = self._source.columns
        wrong = (
            None if predictions is None or not predictions.are_classes else predictions.right == 0.0
        )
        if self._tests is not None:
            spans = parse_selection(self._tests, self._source.n_tests)
            chosen = np.searchsorted(
                columns.test_ids, np.concatenate([np.arange(*span) for span in spans])
            )
            key = np.where(wrong[chosen], 0, 1) if wrong is not None else np.zeros(len(chosen))
            return chosen[np.lexsort((-losses[chosen], key))]
        if columns.by is not None:
            return np.arange(columns.n_columns)
        return interesting(losses, wrong)

    def _how_chosen(self, n: int, predictions: "Predictions | None") -> str:
        source = self._source
        of = (
            f"{n:,} of {source.columns.n_columns:,} "
            f"{'groups' if source.grouped else 'test samples'}"
        )
        bars = (
            ""
            if source.relevance is None
            else (
                f" Bars show the {self._top} training samples that help and harm each most, on one "
                "scale within it."
            )
        )
        if source.grouped:
            return f"All {n:,} groups of test samples, each with the mean of its relevance.{bars}"
        if self._tests is not None:
            return f"{of}, as chosen by --tests {self._tests}.{bars}"
        if n == source.columns.n_columns:
            return f"All {n:,} test samples.{bars}"
        if predictions is not None and predictions.are_classes:
            return (
                f"{of}: those predicted wrongly with the highest loss, then others, of high loss "
                f"and of any.{bars}"
            )
        return f"{of}: those of the highest loss, and some of any.{bars}"

    def _findings(
        self, chosen: I64, queue: list[int], train_labels: _Labels, test_labels: _Labels
    ) -> Findings | None:
        relevance = self._source.relevance
        if relevance is None:
            return None
        base = resident_bytes() + _OVERHEAD_BYTES
        width = block_columns(relevance.shape[0], relevance.shape[1], base, self._memory_bytes)
        wanted = Wanted(chosen.tolist(), self._top, queue)
        with self._progress.task("read relevance", relevance.shape[1], "tests") as task:
            return findings(relevance, wanted, train_labels, test_labels, width, task)

    def _suspects(self, found: Findings | None) -> I64:
        """Return the most harmful training samples, the most harmful first."""
        if found is None:
            return np.zeros(0, np.int64)
        order = np.argsort(found.sums, kind="stable")[:SHOWN_HARMFUL]
        return order[found.sums[order] < 0]

    def _alike(
        self, shown: "Shown | None", judged: JudgedLabels | str, train_labels: _Labels
    ) -> Duplicates | str:
        """Return the inputs that are alike, or the reason why they were not compared."""
        if shown is None:
            return "samples are known by id and label only"
        source = self._source
        first = np.zeros(0, np.int64) if isinstance(judged, str) else judged.proposed
        labels = train_labels, source.samples.test_labels()
        try:
            return alike_inputs(shown, first, labels, self._progress)
        except HydraError as error:
            return str(error)

    def _labels_of_tests(self, alike: Duplicates | str) -> dict[int, Any]:
        """Return the labels of the test samples that a training sample is like, by id."""
        labels = self._source.samples.test_labels()
        if isinstance(alike, str) or labels is None:
            return {}
        tests = [pair.other for pair in alike.pairs if pair.is_test]
        return {test: labels[test] for test in tests if test < len(labels)}

    def _on_page(
        self, train: list[int], chosen: I64, found: Findings | None, alike: Duplicates | str
    ) -> tuple[I64, I64]:
        """Return the training samples and the test samples on the page, ascending."""
        pairs = [] if isinstance(alike, str) else alike.pairs
        sides = (
            [] if found is None else [side.ids.tolist() for both in found.sides for side in both]
        )
        of_train = {*train, *(i for ids in sides for i in ids), *(pair.one for pair in pairs)}
        of_train |= {pair.other for pair in pairs if not pair.is_test}
        of_test = {pair.other for pair in pairs if pair.is_test}
        if not self._source.grouped:
            of_test |= set(self._source.columns.test_ids[chosen].tolist())
        return np.array(sorted(of_train), np.int64), np.array(sorted(of_test), np.int64)

    def _drawn(
        self, shown: "Shown | None", of_train: I64, of_test: I64
    ) -> "tuple[dict[int, Drawn], dict[int, Drawn]]":
        """Return views of training samples and of test samples, by id."""
        if shown is None:
            return {}, {}
        from hydra_pipe.reporting.inputs import draw  # torch takes seconds to import

        try:
            return (
                draw(shown, "train", of_train, self._progress),
                draw(shown, "test", of_test, self._progress),
            )
        except HydraError as error:
            self._lacks_samples(error)
            return {}, {}

    def _label_part(
        self,
        judged: JudgedLabels | str,
        found: Findings | None,
        test_labels: _Labels,
        confusions: dict[str, Confusion],
    ) -> LabelPart | str:
        if isinstance(judged, str):
            return judged
        columns, hurts = self._source.columns, None
        if found is not None:
            hurts = {
                doubt.id: [
                    Hurt(int(columns.ids[c]), None if test_labels is None else test_labels[c])
                    for c in harmed
                ]
                for doubt, harmed in zip(judged.doubts, found.harmed, strict=True)
            }
        run = str(self._source.directory.path)
        command = shlex.join(["hydra-pipe", "clean", run, "--decisions", "decisions.csv"])
        doubted = np.isin(judged.ids, judged.proposed)
        tests = confusions.get(OF_TESTS)
        counts = class_counts(judged.labels, doubted, judged.classes, tests)
        return LabelPart(judged, hurts, command, counts)

    def _relevance_part(
        self, found: Findings | None, suspects: I64, visits: I64
    ) -> RelevancePart | NoRelevance:
        source = self._source
        if found is None or source.relevance is None:
            return without_relevance(source.directory)
        return RelevancePart(
            str(source.relevance.attributes[names.UNIT]),
            [
                Suspect(
                    int(i),
                    float(found.sums[i]),
                    float(found.sums[i]) / source.columns.n_columns,
                    int(visits[i]),
                )
                for i in suspects
            ],
            found.classes,
            found.distribution,
        )

    def _tiles(
        self,
        losses: NDArray[np.float64],
        predictions: "Predictions | None",
        found: Findings | None,
    ) -> list[tuple[str, str]]:
        """Return pairs of a figure and its meaning."""
        source = self._source
        tiles = [
            (f"{source.samples.n_samples:,}", "training samples"),
            (f"{source.columns.n_tests:,}", "test samples looked at"),
        ]
        if source.recording is not None:
            tiles.append((f"{source.recording.gradients.n_steps:,}", "training steps"))
        if source.combined is not None:
            tiles += tiles_of(source.combined)
        if predictions is not None and not np.isnan(predictions.right).any():
            of = "these" if predictions.are_classes else "their positions"
            tiles.append((f"{predictions.right.mean():.1%}", f"of {of} predicted right"))
        known = np.isfinite(losses).any()
        tiles.append((f"{np.nanmean(losses):.3g}" if known else "unknown", "mean test loss"))
        if found is not None:
            harmful = f"{(found.sums < 0).mean():.1%}"
            tiles.append((harmful, "of the training samples harm more than they help"))
        return tiles

    def _warnings(
        self, visits: I64, found: Findings | None, predictions: "Predictions | None"
    ) -> list[str]:
        source, stages = self._source, self._source.directory.stages
        if source.recording is None:
            return [] if source.combined is None else about_combined(source.combined)
        gradients = source.recording.gradients
        parts, blocks = ResultName.parse(source.result), gradients.layout.blocks
        has_relevance = found is not None
        told_of_relevance = warnings(
            Circumstances(
                method=parts.method,
                rank=parts.rank,
                up_to_step=source.up_to_step,
                record=stages[RECORD].facts,
                reduce=stages[REDUCE.of(source.result)].facts if has_relevance else {},
                n_samples=source.samples.n_samples,
                n_rows=gradients.rows.n_rows,
                unvisited=int((visits == 0).sum()),
                projected=sum(not block.exact for block in blocks) if has_relevance else 0,
                n_blocks=len(blocks),
                strange=0 if found is None else found.distribution.strange,
            )
        )
        if predictions is None or not predictions.are_classes or predictions.targets is None:
            return told_of_relevance
        return [*hardly_learnt(predictions.right, predictions.targets), *told_of_relevance]
