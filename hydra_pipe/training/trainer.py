"""Training of a pipeline, with a recorder or without: the weights agree bit for bit."""

from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import (
    HydraError,
    InterruptedRunError,
    NonFiniteError,
    PipelineError,
    UsageError,
)
from hydra_pipe.progress import Progress, Task
from hydra_pipe.recording.datasets import called, on_device
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.pending import StepNote
from hydra_pipe.recording.recorder import Recorder
from hydra_pipe.recording.test_gradients import try_test
from hydra_pipe.recording.untouched import untouched
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.store.disk_space import room_for
from hydra_pipe.training.batches import Samples, epoch_order, test_batches
from hydra_pipe.training.checkpointing import Checkpoints, Place
from hydra_pipe.training.pipeline import Pipeline


@dataclass
class Trained:
    """The result of a training.

    Args:
        last_epoch_loss: mean loss of the samples of the last epoch, each taken when training met
            the sample.
        labels: target of each training sample if targets are integers, else None.
    """

    last_epoch_loss: float
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Midway:
    """The steps after which test gradients are taken, beside those at the end of training.

    Args:
        steps: number of steps from one time to the next; 0: never.
        n_steps: number of steps of the whole training.
    """

    steps: int
    n_steps: int

    @classmethod
    def parse(cls, text: str | None, pipeline: Pipeline) -> "Midway":
        """Parse "epoch", or "500" as steps; None: never.

        Raises:
            UsageError: the text is neither, or the pipeline has no test set.
        """
        of_epoch = -(-len(pipeline.train) // pipeline.batch_size)
        if text is not None and pipeline.test is None:
            raise UsageError(
                f"--test-every {text}: the pipeline has no test set: give it one, or leave out "
                "--test-every"
            )
        if text is not None and text != "epoch" and not (text.isdecimal() and int(text) > 0):
            raise UsageError(f"--test-every {text}: give epoch, or a number of steps, such as 500")
        steps = 0 if text is None else of_epoch if text == "epoch" else int(text)
        return cls(steps, pipeline.epochs * of_epoch)

    def due(self, step: int) -> bool:
        """Tell whether test gradients are due after `step` steps."""
        return self.steps > 0 and 0 < step < self.n_steps and step % self.steps == 0


def train(
    pipeline: Pipeline,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    tests: Midway | None = None,
) -> Trained:
    """Train `pipeline.model` in place, with a recorder and from a checkpoint if they are given.

    Args:
        pipeline: pipeline to train.
        recorder: recorder of each step; None: nothing is recorded.
        progress: receiver of progress; None: nothing is shown.
        checkpoints: checkpoints to take, and to resume from.
        tests: steps after which test gradients are taken during training; None: never.

    Raises:
        InterruptedRunError: a signal asked to stop.
        UserCodeError: the model, the loss or a dataset raised.
        PipelineError: the loss is not one per sample.
        DataError: samples of unlike shapes.
        NonFiniteError: a loss is infinite or not a number.
    """
    torch.manual_seed(pipeline.seed)
    device = next(pipeline.model.parameters()).device
    samples = Samples(pipeline, "train")
    place = checkpoints.resume() if checkpoints else None
    place = place or Place(0, 0, 0.0, nan, np.zeros(len(pipeline.train), np.int64))
    sizes = [len(ids) for ids in epoch_order(pipeline, 0)]
    n_rows = (pipeline.epochs - place.epoch) * len(pipeline.train) - sum(sizes[: place.step])
    progress = progress or Progress()
    between = _Between(pipeline, recorder, checkpoints, tests, progress, n_rows)
    n_rows += between.n_test_rows
    with (
        progress.task("record" if recorder else "train", n_rows, "rows") as task,
        ExitStack() as ends,
    ):
        between.test(task)  # due at once if the checkpoint was taken just before test gradients
        while place.epoch < pipeline.epochs:
            order = epoch_order(pipeline, place.epoch)
            for ids, inputs, targets in ends.enter_context(
                closing(samples.batches(order, place.epoch, place.step))
            ):
                if place.epoch == 0:
                    place.labels = _collect_labels(place.labels, ids, targets)
                where = f"step {place.epoch * len(order) + place.step} (epoch {place.epoch + 1})"
                with recorder.step(ids) if recorder else nullcontext(StepNote()) as note:
                    loss = take_step(
                        pipeline,
                        recorder,
                        note,
                        on_device(inputs, device),
                        on_device(targets, device),
                        ids,
                        where,
                    )
                place.epoch_loss += loss * len(ids)
                if pipeline.scheduler is not None:
                    pipeline.scheduler.step()
                place.step += 1
                task.advance(len(ids))
                if place.step < len(order):
                    between.steps(place, sizes[place.step], task)
            place = Place(
                place.epoch + 1, 0, 0.0, place.epoch_loss / len(pipeline.train), place.labels
            )
            between.steps(place, sizes[0] if place.epoch < pipeline.epochs else None, task)
    return Trained(place.last_loss, place.labels)


class _Between:
    """The work between two recorded steps: a checkpoint, then test gradients, each if it is due.

    A checkpoint taken just before test gradients leaves no trace: test gradients flush all rows
    too. The size of a row is known after the first step. Then a message says how much there is to
    write, and whether it fits on the disk.

    Args:
        pipeline, recorder, checkpoints, tests, progress: arguments of `train`.
        n_rows: number of rows of training samples to come.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        recorder: Recorder | None,
        checkpoints: Checkpoints | None,
        tests: Midway | None,
        progress: Progress,
        n_rows: int,
    ) -> None:
        self._pipeline, self._recorder, self._checkpoints = pipeline, recorder, checkpoints
        self._tests, self._progress, self._n_rows = tests or Midway(0, 0), progress, n_rows
        # steps during training after which test gradients are still to be taken, and their rows
        done = recorder.n_steps if recorder is not None else 0
        self._n_tests = 0 if pipeline.test is None else len(pipeline.test)
        self._n_due = sum(self._tests.due(step) for step in range(done, self._tests.n_steps))
        self.n_test_rows = self._n_due * self._n_tests
        self._has_said = recorder is None

    def steps(self, place: Place, next_batch: int | None, task: Task) -> None:
        """Do the work between a step and one of `next_batch` samples; None after the last step."""
        self._say_room()
        if self._checkpoints is not None:
            self._checkpoints.after_step(place, None if self._due() else next_batch)
        self.test(task)

    def test(self, task: Task) -> None:
        """Take test gradients if they are due."""
        if self._due():
            assert self._recorder is not None
            with closing(test_batches(self._pipeline, task, self._checkpoints)) as batches:
                self._recorder.record_test(
                    batches,
                    self._pipeline.loss,
                    labels=self._pipeline.test_labels,
                    keys=self._pipeline.test_keys,
                )

    def _say_room(self) -> None:
        if not self._has_said and self._recorder is not None:
            n_steps = -(-self._n_rows // self._pipeline.batch_size) + self._pipeline.epochs
            n_bytes = self._recorder.most_bytes(
                self._n_rows, n_steps, self.n_test_rows + self._n_tests, self._n_due + 1
            )
            n_bytes += self._checkpoints.most_bytes() if self._checkpoints is not None else 0
            self._progress.say(
                f"{self._n_rows:,} rows to record: {room_for(n_bytes, self._recorder.path)}"
            )
            self._has_said = True

    def _due(self) -> bool:
        recorder = self._recorder
        return (
            recorder is not None
            and self._tests.due(recorder.n_steps)
            and recorder.n_steps not in recorder.test_steps
        )


def try_tests(pipeline: Pipeline) -> None:
    """Take the losses of the first test samples before training. Training does not change.

    Raises: as `try_test`.
    """
    if pipeline.test is not None:
        device = next(pipeline.model.parameters()).device
        order = [np.arange(min(len(pipeline.test), pipeline.batch_size))]
        try:
            with closing(Samples(pipeline, "test").batches(order)) as samples:
                batches = ((inputs, targets) for _, inputs, targets in samples)
                try_test(pipeline.model, batches, pipeline.loss, device, pipeline.test)
        except HydraError:
            # an error that any samples cause is reported as the first step would
            _try_training(pipeline, device)
            raise


def _try_training(pipeline: Pipeline, device: torch.device) -> None:
    """Take the losses of the first step's samples. Training does not change.

    Raises: as `take_step`.
    """
    order = epoch_order(pipeline, 0)[:1]
    with (
        untouched(pipeline.model, pipeline.loss, pipeline.train),
        torch.no_grad(),
        closing(Samples(pipeline, "train").batches(order)) as batches,
    ):
        for ids, inputs, targets in batches:
            _losses(
                pipeline,
                on_device(inputs, device),
                on_device(targets, device),
                ids,
                "step 0 (epoch 1)",
            )


def take_tests(
    pipeline: Pipeline, recorder: Recorder, progress: Progress, checkpoints: Checkpoints | None
) -> Exception | None:
    """Take the test gradients at the end, if there is a test set.

    Returns:
        The error that stopped them, or None. The training is over by now, so the caller completes
        the recording without test gradients and then reports the error.

    Raises:
        InterruptedRunError: a signal asked to stop.
    """
    if pipeline.test is None:
        return None
    with (
        progress.task("test gradients", len(pipeline.test), "rows") as task,
        closing(test_batches(pipeline, task, checkpoints)) as batches,
    ):
        try:
            recorder.record_test(
                batches, pipeline.loss, labels=pipeline.test_labels, keys=pipeline.test_keys
            )
        except InterruptedRunError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, hours of training are worth more
            return error
    return None


def accuracy(pipeline: Pipeline) -> float | None:
    """Return the share of test samples whose largest output is their target.

    None if outputs or targets are not classes.
    """
    correct = 0
    device = next(pipeline.model.parameters()).device
    with (
        eval_mode(pipeline.model),
        torch.no_grad(),
        closing(test_batches(pipeline, Task(), None)) as batches,
    ):
        for inputs, targets in batches:
            output = called(pipeline.model, on_device(inputs, device))
            if (
                not isinstance(output, Tensor)
                or not isinstance(targets, Tensor)
                or output.dim() != 2
                or output.shape[1] < 2
                or targets.is_floating_point()
                or targets.dim() != 1
            ):
                return None
            correct += int((output.argmax(1).cpu() == targets).sum())
    return correct / len(pipeline.test)


def take_step(
    pipeline: Pipeline,
    recorder: Recorder | None,
    note: StepNote,
    inputs: Any,
    targets: Any,
    ids: NDArray[np.int64],
    where: str,
) -> float:
    """Take one step of the optimiser with the gradient of the batch's mean loss.

    Args:
        pipeline, recorder: arguments of `train`.
        note: note of the step; it receives the loss.
        inputs, targets, ids: inputs, targets and sample ids of the batch.
        where: position in training, in words, for messages.

    Returns:
        The mean loss.

    Raises:
        UserCodeError, PipelineError, NonFiniteError: the reasons given at `train`.
    """
    output, losses = _losses(pipeline, inputs, targets, ids, where)
    loss = losses.mean()
    note.loss = loss.item()
    if not np.isfinite(note.loss):
        bad = ids[~torch.isfinite(losses).cpu().numpy()]
        raise NonFiniteError(
            f"the loss is {note.loss} at {where}, samples {', '.join(map(str, bad[:5]))}: lower "
            "the learning rate, or set "
            f"max_grad_norm; the steps before it are recorded and readable"
        )
    if recorder is not None and isinstance(output, Tensor) and isinstance(targets, Tensor):
        recorder.set_loss(pipeline.loss, output, targets)
    with user_code(f"the backward pass raised at {where}"):
        loss.backward()  # type: ignore[no-untyped-call]
    if pipeline.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(pipeline.model.parameters(), pipeline.max_grad_norm)
    pipeline.optimizer.step()
    # The model's zero_grad, not the optimiser's: gradients left in untrained parameters would count
    # in the clipped norm.
    pipeline.model.zero_grad()
    return note.loss


def _losses(
    pipeline: Pipeline, inputs: Any, targets: Any, ids: NDArray[np.int64], where: str
) -> tuple[Any, Tensor]:
    """Return the model's output, and the losses of shape (batch,).

    Raises:
        UserCodeError, PipelineError: the reasons given at `train`.
    """
    with user_code(f"the model raised at {where}"):
        output = called(pipeline.model, inputs)
    with user_code(f"the loss raised at {where}"):
        losses = pipeline.loss(output, targets)
    if not isinstance(losses, Tensor) or losses.shape != (len(ids),):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PipelineError(
            f"the loss returned shape {shape} for a batch of {len(ids)}: it must return one loss "
            "per sample, "
            f"shape ({len(ids)},), such as cross_entropy(output, target, reduction='none')"
        )
    return output, losses


def _collect_labels(
    labels: NDArray[np.int64] | None, ids: NDArray[np.int64], targets: Any
) -> NDArray[np.int64] | None:
    if (
        labels is None
        or not isinstance(targets, Tensor)
        or targets.dim() != 1
        or targets.is_floating_point()
        or targets.is_complex()
    ):
        return None
    labels[ids] = targets.cpu().numpy()
    return labels
