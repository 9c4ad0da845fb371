"""Training of a pipeline again: many models side by side, each with its own sample weights."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from hydra_pipe.errors import DataError, PipelineError
from hydra_pipe.progress import Progress, Task
from hydra_pipe.recording.datasets import Batch, on_device
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.optimizers import rules_of_groups
from hydra_pipe.recording.several_optimizers import optimizers_in
from hydra_pipe.retraining.models import Models, Values
from hydra_pipe.streams import Stream
from hydra_pipe.training.batches import Samples, epoch_order, test_batches
from hydra_pipe.training.pipeline import Pipeline

# Divisor of the weighted losses of a batch: the number of all its samples, or the sum of their
# weights.
MeanOver = Literal["batch", "weights"]
Gradients = tuple[Tensor | None, ...]
LOSS, HIT = 0, 1
# Copies of the parameters for a model in a stack: parameters, gradients, two moments of Adam,
# and temporary values of an update.
_PARAMETER_COPIES = 6
# Bytes for a training sample and model: its weight and its class, as they are made and as tensors.
_SAMPLE_BYTES = 16
# Class of a sample that keeps its target.
AS_GIVEN = -1
# Number that torch.nn.utils.clip_grad_norm_ adds to the norm.
_CLIP_EPS = 1e-6


class Retrainer:
    """Trainer of many models of an untrained pipeline, which itself stays unchanged.

    Batches, their order, random draws of datasets and dropout, the optimiser and its schedule
    are the same as in the run. A sample's weight multiplies its loss. By default the mean stays
    over the whole batch, so that relevance is the derivative in the weights.

    Args:
        pipeline: pipeline as built, not trained.
        progress: place to say that the models cannot be stacked.
        mean_over: divisor of the weighted losses, see `MeanOver`.

    Raises:
        PipelineError: the pipeline was trained already.
    """

    def __init__(
        self, pipeline: Pipeline, progress: Progress, mean_over: MeanOver = "batch"
    ) -> None:
        if _has_stepped(pipeline.optimizer):
            raise PipelineError(
                "the pipeline was trained already: build it anew, its model must be as it was "
                "before training"
            )
        self._pipeline, self._mean_over = pipeline, mean_over
        self.models = Models(pipeline, progress)
        self._device = next(pipeline.model.parameters()).device
        self._parameters = {name: p.detach() for name, p in pipeline.model.named_parameters()}
        self._trained = [name for name, p in pipeline.model.named_parameters() if p.requires_grad]
        self._buffers = {name: b.detach() for name, b in pipeline.model.named_buffers()}
        # The scheduler changes settings at each step, the same for all models.
        self._schedule = _schedule(pipeline)
        self._saved_bytes = 0

    @property
    def n_steps(self) -> int:
        return len(self._schedule)

    @property
    def model_bytes(self) -> int:
        """Bytes for one more model in a stack, known once a model has been trained."""
        n_bytes = sum(p.numel() * p.element_size() for p in self._parameters.values())
        return (
            _PARAMETER_COPIES * n_bytes
            + 2 * self._saved_bytes
            + _SAMPLE_BYTES * len(self._pipeline.train)
        )

    def train(
        self,
        weights: NDArray[np.floating],
        task: Task,
        *,
        classes: NDArray[np.int32] | None = None,
        seed: int | None = None,
        start: Values | None = None,
    ) -> NDArray[np.float64]:
        """Train one model for each row of `weights`.

        Args:
            weights: weights of the samples, shape (model, sample).
            task: counter of optimiser steps, summed over models.
            classes: class that replaces each sample's target, shape (model, sample). `AS_GIVEN`
                keeps the target. Default: all targets are kept.
            seed: seed of the order and of dropout. Default: the pipeline's own.
            start: parameters and buffers at the beginning. Default: the pipeline's own.

        Returns:
            Loss and hit (`LOSS`, `HIT`; see `Found.hits`) of each test sample at the end, shape
            (model, 2, test).

        Raises:
            UserCodeError: the model, the loss or a dataset raised.
            DataError: with `classes`: targets are not class numbers.
        """
        pipeline = self._pipeline if seed is None else replace(self._pipeline, seed=seed)
        k = len(weights)
        own = torch.as_tensor(weights, device=self._device)
        other = None if classes is None else torch.as_tensor(classes, device=self._device)
        parameters, buffers = (
            {
                name: (start or values)[name].expand(k, *value.shape).clone()
                for name, value in values.items()
            }
            for values in (self._parameters, self._buffers)
        )
        for name in self._trained:
            parameters[name].requires_grad_()
        updates = self._updates(parameters, k)
        trained = [parameters[name] for name in self._trained]
        torch.manual_seed(pipeline.seed)
        with closing(_batches(pipeline)) as batches:
            for (ids, inputs, targets), settings in zip(batches, self._schedule, strict=True):
                with torch.autograd.graph.saved_tensors_hooks(
                    self._count if self._saved_bytes == 0 else _same, _same
                ):
                    wanted = on_device(targets, self._device)
                    found = self.models(
                        parameters,
                        buffers,
                        on_device(inputs, self._device),
                        wanted if other is None else _replaced(wanted, other[:, ids]),
                        own_targets=other is not None,
                    )
                self._saved_bytes = self._saved_bytes or 1
                buffers = found.buffers
                loss = self._mean(
                    own[:, torch.from_numpy(ids)].to(found.losses.dtype), found.losses
                ).sum()
                gradients: Gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                if pipeline.max_grad_norm is not None:
                    gradients = _clipped(gradients, pipeline.max_grad_norm)
                for update in updates:
                    update.take(settings, dict(zip(self._trained, gradients, strict=True)))
                buffers = {name: buffer.detach() for name, buffer in buffers.items()}
                task.advance(k)
        return self._tested(pipeline, parameters, buffers)

    def _mean(self, weights: Tensor, losses: Tensor) -> Tensor:
        weighted = weights * losses
        if self._mean_over == "batch":
            return weighted.mean(dim=1)
        total = weights.sum(dim=1)
        # no gradient if nothing is left of a batch
        return weighted.sum(dim=1) / torch.where(total > 0, total, 1.0)

    def _count(self, tensor: Tensor) -> Tensor:
        self._saved_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def _updates(self, parameters: Values, n_models: int) -> list["_Update"]:
        """Return the updates by the pipeline's optimiser that a step of all models takes.

        One update of the stacked parameters does for all models if the optimiser is elementwise.
        Others, such as Muon, take an update for each model.
        """
        given = self._pipeline.optimizer
        names: dict[Tensor, str] = {p: n for n, p in self._pipeline.model.named_parameters()}
        if all(rule.is_elementwise for rule in rules_of_groups(given)):
            return [_Update(_of_parameters(given, names, parameters), parameters, None)]
        found = []
        for k in range(n_models):
            own = {name: parameter.detach()[k] for name, parameter in parameters.items()}
            found.append(_Update(_of_parameters(given, names, own), own, k))
        return found

    def _tested(
        self, pipeline: Pipeline, parameters: Values, buffers: Values
    ) -> NDArray[np.float64]:
        pieces = []
        with (
            eval_mode(pipeline.model),
            torch.no_grad(),
            closing(test_batches(pipeline, Task(), None)) as batches,
        ):
            for inputs, targets in batches:
                found = self.models(
                    parameters,
                    buffers,
                    on_device(inputs, self._device),
                    on_device(targets, self._device),
                )
                pieces.append(torch.stack([found.losses, found.hits], dim=1).double().cpu().numpy())
        return np.concatenate(pieces, axis=2)


@dataclass(frozen=True)
class _Update:
    """The update of the parameters of all models, or of one.

    Args:
        optimizer: optimiser of the parameters.
        parameters: parameters by name, of all models as a stack, or of one model.
        model: number of the model. None: all models.
    """

    optimizer: torch.optim.Optimizer
    parameters: Values
    model: int | None

    def take(self, settings: list[dict[str, Any]], gradients: dict[str, Tensor | None]) -> None:
        """Take a step with these settings of the groups, and the gradients of all models."""
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        for name, gradient in gradients.items():
            if gradient is not None and self.model is not None:
                gradient = gradient[self.model]
            self.parameters[name].grad = gradient
        self.optimizer.step()


def _of_parameters(
    given: torch.optim.Optimizer, names: dict[Tensor, str], parameters: Values
) -> torch.optim.Optimizer:
    """Return a copy of the optimiser `given`, of other parameters of the same names.

    Some optimisers make a state before their first step, such as Adagrad. It is copied too.
    """
    found = copy.deepcopy(given)
    for one, before in zip(optimizers_in(found), optimizers_in(given), strict=True):
        one.state.clear()
        for group, of_group in zip(one.param_groups, before.param_groups, strict=True):
            group["params"] = [parameters[names[p]] for p in of_group["params"]]
        for parameter, state in before.state.items():
            own = parameters[names[parameter]]
            one.state[own] = {
                key: value.expand_as(own).clone() if value.shape == parameter.shape else value
                for key, value in copy.deepcopy(state).items()
            }
    return found


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimiser has taken a step. Some optimisers make a state before."""
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values())


def _replaced(targets: Any, classes: Tensor) -> Tensor:
    """Return the targets of each model, shape (model, batch).

    Args:
        targets: targets of a batch, shape (batch,), integers.
        classes: classes that replace them, shape (model, batch).

    Raises:
        DataError: targets are something else.
    """
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        raise DataError(
            "the targets of the training samples are not class numbers, one for each sample, so "
            "no other class can take their place: leave out --retrain, or return class numbers"
        )
    return torch.where(classes == AS_GIVEN, targets, classes.to(targets.dtype))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _batches(pipeline: Pipeline) -> Stream[Batch]:
    """Return the batches of the whole training, in order. The caller closes the stream."""
    ends = ExitStack()
    return Stream(_of_training(pipeline, ends), ends.close)


def _of_training(pipeline: Pipeline, ends: ExitStack) -> Iterator[Batch]:
    samples, dataset = Samples(pipeline, "train"), pipeline.train
    for epoch in range(pipeline.epochs):
        order = epoch_order(pipeline, epoch)
        # sample by sample, reading takes as long as the training
        if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
            inputs, targets = dataset.tensors
            yield from ((ids, inputs[ids], targets[ids]) for ids in order)
        else:
            # No `yield from`: the garbage collector, when it closes this generator, would close
            # the batches too.
            for ids, inputs, targets in ends.enter_context(closing(samples.batches(order, epoch))):
                yield ids, inputs, targets


def _schedule(pipeline: Pipeline) -> list[list[dict[str, Any]]]:
    """Return the optimiser's settings at each step, by parameter group.

    The scheduler runs through all steps once, and is put back.
    """
    optimizer, scheduler = pipeline.optimizer, pipeline.scheduler
    before = [_settings(group) for group in optimizer.param_groups]
    if scheduler is None:
        return [before] * pipeline.n_steps
    state = copy.deepcopy(scheduler.state_dict())
    for parameter in pipeline.model.parameters():
        parameter.grad = None
    found = []
    for _ in range(pipeline.n_steps):
        found.append([_settings(group) for group in optimizer.param_groups])
        optimizer.step()  # changes nothing without gradients, and the scheduler wants it
        scheduler.step()
    scheduler.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, before, strict=True):
        group.update(values)
    return found


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    # A learning rate may be a tensor, which a scheduler changes in place.
    return {
        name: copy.copy(value) if not isinstance(value, Tensor) else value.clone()
        for name, value in group.items()
        if name != "params"
    }


def _clipped(gradients: Gradients, most: float) -> Gradients:
    """Clip gradients like torch.nn.utils.clip_grad_norm_, for each model by itself."""
    there = [g for g in gradients if g is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in there], dim=1)
    factor = (most / (torch.linalg.vector_norm(norms, dim=1) + _CLIP_EPS)).clamp(max=1.0)
    return tuple(
        None if g is None else g * factor.view(-1, *[1] * (g.dim() - 1)).to(g.dtype)
        for g in gradients
    )
