"""The pipeline behind a run: views of its samples, and its predictions. This file needs torch."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import HydraError
from hydra_pipe.loading import pipeline_of, with_probe
from hydra_pipe.progress import Progress, Task
from hydra_pipe.recording.datasets import batches_of, called, on_device
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.reporting.drawing import Drawn, Text, by_kind, rendered
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.store import names
from hydra_pipe.store.data.checkpoints import load_final
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD
from hydra_pipe.streams import Stream
from hydra_pipe.training.batches import Samples
from hydra_pipe.training.pipeline import Pipeline

_ADVICE = "build the pipeline anew, and give it as hydra_pipe.report(run, pipeline=...)"


class Shown(Protocol):
    """Samples that a page can draw."""

    def values(self, which: str, ids: NDArray[np.int64], task: Task) -> Stream[tuple[int, Any]]:
        """Yield the samples `ids`, ascending, of "train" or "test", each with its id.

        The caller closes the stream.

        Raises:
            HydraError: during iteration, if the dataset raised.
        """
        ...

    def drawn(self, value: Any, what: str) -> Drawn:
        """Return a view of one sample.

        Raises:
            HydraError: `render` raised, or returned a value that cannot be shown.
        """
        ...

    def n_samples(self, which: str) -> int:
        """Return the number of samples of "train" or "test"."""
        ...


def draw(shown: Shown, which: str, ids: NDArray[np.int64], progress: Progress) -> dict[int, Drawn]:
    """Return views of the samples `ids`, ascending, of "train" or "test".

    Raises:
        HydraError: the dataset or `render` raised, or a sample cannot be shown.
    """
    with (
        progress.task(f"draw {which} samples", len(ids), "samples") as task,
        closing(shown.values(which, ids, task)) as values,
    ):
        return {sample: shown.drawn(value, f"{which} sample {sample}") for sample, value in values}


class GivenSamples:
    """Samples that a user gives to a report.

    Args:
        samples: the samples.
    """

    def __init__(self, samples: ShownSamples) -> None:
        self._samples = samples

    def _dataset(self, which: str) -> Any:
        return self._samples.train if which == "train" else self._samples.test

    def n_samples(self, which: str) -> int:
        """See `Shown`."""
        with user_code(f"the {which} dataset has no length"):
            return len(self._dataset(which))

    def values(self, which: str, ids: NDArray[np.int64], task: Task) -> Stream[tuple[int, Any]]:
        """See `Shown`."""
        dataset = self._dataset(which)

        def each() -> Iterator[tuple[int, Any]]:
            for sample in ids.tolist():
                with user_code(f"the dataset raised at {which} sample {sample}"):
                    value = dataset[sample]
                yield sample, value
                task.advance(1)

        return Stream(each(), lambda: None)

    def drawn(self, value: Any, what: str) -> Drawn:
        """See `Shown`."""
        return drawn_by(self._samples.render, value, what)


def drawn_by(render: Callable[[Any], Any] | None, value: Any, what: str) -> Drawn:
    """Return a view of one input.

    Raises:
        HydraError: `render` raised, or returned a value that cannot be shown.
    """
    if render is None:
        return by_kind(value)
    with user_code(f"render raised at {what}"):
        shown = render(value)
    return rendered(shown)


@dataclass(frozen=True)
class Predictions:
    """Predictions of the final parameters for some test samples.

    Args:
        values: prediction for each sample: a class, a number, or a class for each position. None
            if outputs are none of these.
        targets: targets, in the same form.
        right: share of each prediction that is right, from 0 to 1, shape (test,). Not a number
            if nothing can be right or wrong.
        confidence: probability of each predicted class, shape (test,). Not a number if unknown.
        losses: losses of the samples, shape (test,).
        drawn: function from a prediction for each position to text, or to None if inputs are no
            texts.
    """

    values: list[Any] | None
    targets: list[Any] | None
    right: NDArray[np.float64]
    confidence: NDArray[np.float64]
    losses: NDArray[np.float64]
    drawn: Callable[[Any], str | None]

    @property
    def are_classes(self) -> bool:
        """True if each prediction is right or wrong as a whole."""
        return (
            self.targets is not None
            and not np.isnan(self.right).any()
            and all(np.ndim(target) == 0 for target in self.targets)
        )


class Inputs:
    """Samples and model of a pipeline.

    Args:
        pipeline: pipeline, newly built.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def of_run(cls, run: RunDirectory, given: str | Pipeline | None, probe: str | None) -> "Inputs":
        """Build the pipeline that `run` was recorded from.

        The samples of a probe, if given, take the place of its tests.

        Raises:
            HydraError: the pipeline is not known, gone, or another one now.
        """
        load = pipeline_of(run, given, _ADVICE)
        return cls((load if probe is None else with_probe(run, load, probe))())

    def load_final(self, run: RunDirectory) -> None:
        """Put the final parameters into the model.

        Raises:
            StoreError: the parameters are missing or damaged.
        """
        final = load_final(
            run.path / names.CHECKPOINTS, run.stages[RECORD].facts.get("final_sha256")
        )
        with user_code("the model does not take the final parameters"):
            self.pipeline.model.load_state_dict(final)

    def predict(self, tests: NDArray[np.int64], progress: Progress) -> Predictions:
        """Run the model on some of the test samples, in eval mode.

        Args:
            tests: ids of the test samples, ascending.
            progress: place to show progress.

        Raises:
            HydraError: the model, the loss or the dataset raised.
        """
        pipeline = self.pipeline
        device = next(pipeline.model.parameters()).device
        found: list[tuple[NDArray[Any], NDArray[Any]] | None] = []
        right: list[NDArray[np.float64]] = []
        confidence: list[NDArray[np.float64]] = []
        losses: list[NDArray[np.float64]] = []
        # The batches are those of the recording, because a dataset's random draws may depend on
        # them.
        order = batches_of(np.arange(len(pipeline.test)), pipeline.batch_size)
        with (
            eval_mode(pipeline.model),
            torch.no_grad(),
            progress.task("predict", len(pipeline.test), "tests") as task,
            closing(Samples(pipeline, "test").batches(order)) as batches,
        ):
            for ids, inputs, targets in batches:
                task.advance(len(ids))
                own = np.flatnonzero(np.isin(ids, tests))
                if not len(own):
                    continue
                with user_code(f"the model raised at test samples {ids[0]}-{ids[-1]}"):
                    output, to = (
                        called(pipeline.model, on_device(inputs, device)),
                        on_device(targets, device),
                    )
                    losses.append(
                        per_sample_losses(pipeline.loss, output, to).cpu().double().numpy()[own]
                    )
                predicted, share = _predicted(output, to)
                right.append(share.cpu().double().numpy()[own])
                confidence.append(_confidence(output, to).cpu().double().numpy()[own])
                found.append(
                    None
                    if predicted is None
                    else (predicted.cpu().numpy()[own], targets.cpu().numpy()[own])
                )
        both = [pair for pair in found if pair is not None]
        known = len(both) == len(found)
        return Predictions(
            [value for values, _ in both for value in values] if known else None,
            [target for _, targets in both for target in targets] if known else None,
            np.concatenate(right),
            np.concatenate(confidence),
            np.concatenate(losses),
            self._drawn_prediction,
        )

    def n_samples(self, which: str) -> int:
        """See `Shown`."""
        return len(self.pipeline.train if which == "train" else self.pipeline.test)

    def values(self, which: str, ids: NDArray[np.int64], task: Task) -> Stream[tuple[int, Any]]:
        """See `Shown`."""
        order = batches_of(ids, self.pipeline.batch_size)
        batches = Samples(self.pipeline, which).batches(order)

        def each() -> Iterator[tuple[int, Any]]:
            for batch, inputs, _ in batches:
                yield from zip(batch.tolist(), inputs, strict=True)
                task.advance(len(batch))

        return Stream(each(), batches.close)

    def drawn(self, value: Any, what: str) -> Drawn:
        """See `Shown`."""
        return drawn_by(self.pipeline.render, value, what)

    def _drawn_prediction(self, value: Any) -> str | None:
        """Return a prediction for each position as text, or None if inputs are not texts."""
        try:
            shown = self.drawn(torch.as_tensor(value), "a prediction")
        except HydraError:
            return None  # `render` is for inputs, and need not take a prediction
        # A prediction stands beside its target, position by position, so it stays on one line.
        return shown.text.replace("\n", "\N{RETURN SYMBOL}") if isinstance(shown, Text) else None


def _predicted(output: Any, targets: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the predictions in a model's output, and the share of each that is right.

    Predictions are classes or numbers, or None if the output stands for neither.
    """
    unknown = torch.full((len(targets),), torch.nan)
    if not isinstance(output, Tensor):
        return None, unknown
    if targets.is_floating_point():
        of_one = (
            output.reshape(len(targets), -1).shape[1] == 1
            and targets.reshape(len(targets), -1).shape[1] == 1
        )
        return (output.reshape(-1) if of_one else None), unknown
    class_dimension = _class_dimension(output, targets)
    if class_dimension is None:
        return None, unknown
    predicted = output.argmax(class_dimension)
    return predicted, (predicted == targets).reshape(len(targets), -1).double().mean(1)


def _confidence(output: Any, targets: Tensor) -> Tensor:
    """Return the probability of each predicted class, shape (batch,).

    Outputs are logits, or probabilities if they are positive and sum to 1. Not a number if a
    sample has no single class.
    """
    unknown = torch.full((len(targets),), torch.nan)
    if (
        not isinstance(output, Tensor)
        or output.dim() != 2
        or targets.dim() != 1
        or targets.is_floating_point()
        or output.shape[1] < 2
    ):
        return unknown
    output = output.double()
    sums = output.sum(1)
    if not ((output >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        output = output.softmax(1)
    largest: Tensor = output.max(1).values
    return largest


def _class_dimension(output: Tensor, targets: Tensor) -> int | None:
    """Return the dimension of the classes in an output, or None if there is none.

    Args:
        output: output of the model.
        targets: targets, shape (batch, ...).
    """
    for dimension in dict.fromkeys((1, output.dim() - 1)):
        if 0 < dimension < output.dim() and output.shape[dimension] > 1:
            others = (*output.shape[:dimension], *output.shape[dimension + 1 :])
            if others == tuple(targets.shape):
                return dimension
    return None
