"""The steps of a training run, taken again from first to last and then visited from last to first.

The parameters before a step cannot be computed from the parameters after it. So training runs once
from the start, and its state is kept now and then. From each kept state, the steps up to the next
kept state are run again when they are needed (Griewank, "Achieving logarithmic growth of temporal
and spatial complexity in reverse automatic differentiation", 1992). Two levels of sqrt(T) states
each cost one more training. Where memory requires more levels, each further level costs one more.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.recording.datasets import on_device
from hydra_pipe.recording.pending import StepNote
from hydra_pipe.recording.randomness import random_state, restore_random_state
from hydra_pipe.training.batches import Samples, epoch_order
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.training.trainer import take_step

# function of a step's number, its loss and its number of samples
AfterStep = Callable[[int, float, int], None]
# samples, inputs and targets
_Batch = tuple[NDArray[np.int64], Tensor, Tensor]


@dataclass(frozen=True)
class TrainingState:
    """Everything that training resumes from.

    Args:
        step: number of the next step.
        model: state_dict() of the model, with its tensors copied.
        optimizer: state_dict() of the optimiser, with its tensors copied.
        scheduler: state_dict() of the scheduler, copied. None: there is no scheduler.
        random: states of all random generators.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    random: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of training, about to be taken.

    Args:
        state: state of training before the step.
        ids: ids of the training samples of the batch, shape (batch,), int64.
        inputs: inputs of the batch, on the model's device.
        targets: targets of the batch, on the model's device.
    """

    state: TrainingState
    ids: NDArray[np.int64]
    inputs: Tensor
    targets: Tensor

    @property
    def number(self) -> int:
        """Number of the step, counted from 0."""
        return self.state.step


class Trajectory:
    """The run that `pipeline` trains, with the same steps as `train` takes.

    Args:
        pipeline: pipeline as it was built, before any training.
        n_steps: number of steps, counted from the start of the run.
    """

    def __init__(self, pipeline: Pipeline, n_steps: int) -> None:
        self._pipeline, self._n_steps, self._most = pipeline, n_steps, 2
        self._device = next(pipeline.model.parameters()).device
        torch.manual_seed(pipeline.seed)
        self._start = training_state(pipeline, 0)
        # kept states of the whole run, in order
        self._kept: list[TrainingState] = []

    def forward(self, most_states: int, after_step: AfterStep) -> None:
        """Train from the start to the end. The pipeline's model then has its final parameters.

        Args:
            most_states: largest number of states kept at a time at one level, 2 or more.
            after_step: function called after each step.
        """
        self._most = most_states
        borders = _borders(0, self._n_steps, self._most)
        self._kept = self._states(self._start, borders, after_step)

    def backward(self, first: int, after_step: AfterStep) -> Iterator[Step]:
        """Yield the steps before step `first`, the last of them first. Call `forward` before.

        Args:
            first: number of the step just after the first one to yield.
            after_step: function called after each step that is run again.
        """
        for state, end in reversed(
            list(zip(self._kept, [*(s.step for s in self._kept[1:]), self._n_steps], strict=True))
        ):
            if state.step < first:
                yield from self._backward(state, min(end, first), after_step)

    def _backward(self, state: TrainingState, end: int, after_step: AfterStep) -> Iterator[Step]:
        """Yield the steps from `state` to before step `end`, the last of them first."""
        if end - state.step <= self._most:
            yield from reversed(self._steps(state, end, after_step))
            return
        borders = _borders(state.step, end, self._most)
        kept = self._states(state, borders, after_step)
        for own, last in reversed(list(zip(kept, [*(s.step for s in kept[1:]), end], strict=True))):
            yield from self._backward(own, last, after_step)

    def _states(
        self, start: TrainingState, borders: list[int], after_step: AfterStep
    ) -> list[TrainingState]:
        """Train from `start` to the last border. Return the states before all other borders.

        The first border is the step of `start`, and its state is `start` itself.
        """
        kept, wanted = [start], set(borders[1:-1])

        def keep(number: int, _: _Batch) -> None:
            if number in wanted:
                kept.append(training_state(self._pipeline, number))

        self._train(start, borders[-1], keep, after_step)
        return kept

    def _steps(self, start: TrainingState, end: int, after_step: AfterStep) -> list[Step]:
        """Run the steps from `start` to before step `end`. Return them in order."""
        found: list[Step] = []

        def keep(number: int, batch: _Batch) -> None:
            found.append(Step(training_state(self._pipeline, number), *batch))

        self._train(start, end, keep, after_step)
        return found

    def _train(
        self,
        start: TrainingState,
        end: int,
        before_step: Callable[[int, _Batch], None],
        after_step: AfterStep,
    ) -> None:
        """Train from `start` to before step `end`.

        Each step and its batch are passed to `before_step` just before the step is taken.
        """
        pipeline = self._pipeline
        restore(pipeline, start)
        samples = Samples(pipeline, "train")
        of_epoch = -(-len(pipeline.train) // pipeline.batch_size)
        number = start.step
        while number < end:
            epoch, first = divmod(number, of_epoch)
            # later batches of the epoch are not loaded
            order = epoch_order(pipeline, epoch)[: end - epoch * of_epoch]
            with closing(samples.batches(order, epoch, first)) as batches:
                for ids, inputs, targets in batches:
                    inputs, targets = (
                        on_device(inputs, self._device),
                        on_device(targets, self._device),
                    )
                    before_step(number, (ids, inputs, targets))
                    loss = take_step(
                        pipeline, None, StepNote(), inputs, targets, ids, f"step {number}"
                    )
                    if pipeline.scheduler is not None:
                        pipeline.scheduler.step()
                    after_step(number, loss, len(ids))
                    number += 1


def training_state(pipeline: Pipeline, step: int) -> TrainingState:
    """Return a copy of the present state of training, just before step `step`."""
    return TrainingState(
        step,
        _own(pipeline.model.state_dict()),
        _own(pipeline.optimizer.state_dict()),
        copy.deepcopy(pipeline.scheduler.state_dict()) if pipeline.scheduler is not None else None,
        random_state(),
    )


def restore(pipeline: Pipeline, state: TrainingState) -> None:
    """Put training back to `state`."""
    pipeline.model.load_state_dict(state.model)
    # load_state_dict keeps the tensors it is given, and the optimiser then changes them in place
    pipeline.optimizer.load_state_dict(_own(state.optimizer))
    if pipeline.scheduler is not None and state.scheduler is not None:
        pipeline.scheduler.load_state_dict(copy.deepcopy(state.scheduler))
    restore_random_state(state.random)


def _own(value: Any) -> Any:
    """Return `value` with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_own(item) for item in value)
    return value


def _borders(first: int, last: int, most: int) -> list[int]:
    """Cut [first, last) into at most `most` even pieces. Return the start of each, and `last`."""
    length = -(-(last - first) // most)
    return [*range(first, last, max(1, length)), last]
