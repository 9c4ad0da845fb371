"""Adjoints of the whole training state, from last step to first: `hydra-exact` for some columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_pipe.errors import OptimizerError, PipelineError
from hydra_pipe.maths.unrolled import (
    AdamStep,
    Moments,
    SgdStep,
    adam_adjoint,
    sgd_adjoint,
    unclipped,
)
from hydra_pipe.recording.optimizers import check_optimizer
from hydra_pipe.recording.several_optimizers import owners_of_groups
from hydra_pipe.replay.products import Batch, batch_of
from hydra_pipe.replay.trajectory import Step, restore
from hydra_pipe.replay.updates import (
    adjoint_of_update,
    differentiated,
    not_differentiated,
    state_shapes,
    update_of,
)
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.types import Floating


@dataclass
class _Trained:
    """A parameter that the optimiser trains.

    Args:
        place: index of the parameter in `moving(pipeline)`.
        group: index of its parameter group in the optimiser.
        states: adjoints of the optimiser's state of the parameter, such as SGD's momentum buffer
            or Adam's two moments.
    """

    place: int
    group: int
    states: list[Tensor]


class ExactSweep:
    """The state of a sweep, and its sums.

    Args:
        pipeline: pipeline whose model is restored to each step.
        tests: test gradients at the end of training, one tensor (column, ...) for each parameter of
            `moving(pipeline)`. The sweep changes them in place: they become the adjoints.
        n_samples: number of training samples.
        at_once: number of columns that go through a batch's graph together.
    """

    def __init__(
        self, pipeline: Pipeline, tests: list[Tensor], n_samples: int, at_once: int
    ) -> None:
        self._pipeline, self._at_once = pipeline, at_once
        self._parameters = moving(pipeline)
        optimizer = pipeline.optimizer
        groups = {p: group for p, (_, group) in check_optimizer(optimizer, pipeline.model).items()}
        self.a = tests
        self._owners = owners_of_groups(optimizer)
        self._trained = [
            _Trained(i, groups[p], self._adjoints_of_state(p, groups[p], tests[i]))
            for i, p in enumerate(self._parameters)
            if p in groups
        ]
        # d l_j / d w_i, shape (sample, column)
        self.sums: NDArray[np.float64] = np.zeros((n_samples, len(tests[0])), np.float64)

    def _adjoints_of_state(self, parameter: Tensor, group: int, a: Tensor) -> list[Tensor]:
        settings = self._pipeline.optimizer.param_groups[group]
        shapes = state_shapes(self._owners[group], settings, parameter.shape)
        return [a.new_zeros(len(a), *shape) for shape in shapes]

    def arrays(self) -> dict[str, Floating]:
        """Return the state that resuming needs, by name: the adjoints and the sums."""
        tensors = {f"a{i}": a for i, a in enumerate(self.a)}
        tensors |= {
            f"s{own.place}-{i}": state
            for own in self._trained
            for i, state in enumerate(own.states)
        }
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()} | {
            "sums": self.sums
        }

    def restore(self, arrays: Mapping[str, Floating]) -> None:
        """Put back the state that `arrays` returned."""
        # torch needs a writable copy; one array at a time, because all may take most of the memory
        for i, a in enumerate(self.a):
            a.copy_(torch.from_numpy(arrays[f"a{i}"].copy()))
        for own in self._trained:
            for i, state in enumerate(own.states):
                state.copy_(torch.from_numpy(arrays[f"s{own.place}-{i}"].copy()))
        self.sums = arrays["sums"].astype(np.float64)

    def step(self, step: Step) -> None:
        """Go one step back."""
        restore(self._pipeline, step.state)
        batch = batch_of(self._pipeline, self._parameters, step.inputs, step.targets)
        with torch.no_grad():
            adjoints = [torch.zeros_like(a) for a in self.a]
            clipped = self._clipped(batch)
            for own in self._trained:
                gradient = clipped[own.place]
                if gradient is not None:  # the optimiser skips a parameter without a gradient
                    adjoints[own.place] = self._through_optimizer(own, gradient)
            if self._pipeline.max_grad_norm is not None:
                known = [i for i, g in enumerate(batch.gradients) if g is not None]
                raw = [g.detach() for g in batch.gradients if g is not None]
                for i, u in zip(
                    known,
                    unclipped([adjoints[i] for i in known], raw, self._pipeline.max_grad_norm),
                    strict=True,
                ):
                    adjoints[i] = u
        scores, bent = batch.products(adjoints, self._at_once)
        with torch.no_grad():
            for a, more in zip(self.a, bent, strict=True):
                a += more
        # a sample may be in a batch twice
        np.add.at(self.sums, step.ids, scores.T.cpu().double().numpy())

    def _clipped(self, batch: Batch) -> list[Tensor | None]:
        """Return the gradients as the optimiser gets them, after clipping."""
        found = [None if g is None else g.detach() for g in batch.gradients]
        if self._pipeline.max_grad_norm is None:
            return found
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g) for g in found if g is not None])
        )
        scale = (self._pipeline.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * scale for g in found]

    def _through_optimizer(self, own: _Trained, gradient: Tensor) -> Tensor:
        group = self._pipeline.optimizer.param_groups[own.group]
        if not group.get("maximize"):
            return self._through_update(own, gradient)
        return -self._through_update(own, -gradient)

    def _through_update(self, own: _Trained, gradient: Tensor) -> Tensor:
        parameter, owner = self._parameters[own.place], self._owners[own.group]
        group = self._pipeline.optimizer.param_groups[own.group]
        state = owner.state.get(parameter, {})
        a = self.a[own.place]
        update = update_of(owner, group)
        if update is not None:
            return adjoint_of_update(update, group, state, parameter, gradient, a, own.states)
        if isinstance(owner, torch.optim.SGD):
            return sgd_adjoint(_sgd_step(group, state), a, *own.states)
        step = _adam_step(group, state)
        if step.weight_decay and not step.decoupled:
            gradient = gradient + step.weight_decay * parameter
        return adam_adjoint(step, _moments(step, state, gradient), a, *own.states)


def moving(pipeline: Pipeline) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, also those that the optimiser does not train.

    The clipping of gradients counts all of them.

    Raises:
        OptimizerError: the optimiser's update is not differentiated.
        PipelineError: a parameter is neither float32 nor float64.
    """
    if others := not_differentiated(pipeline.optimizer):
        raise OptimizerError(
            f"hydra-exact differentiates {', '.join(differentiated())}, not "
            f"{', '.join(others)}: use --method hydra-fisher"
        )
    found = [p for p in pipeline.model.parameters() if p.requires_grad]
    if half := [p.dtype for p in found if p.dtype not in (torch.float32, torch.float64)]:
        raise PipelineError(
            f"the model has parameters of {half[0]}: hydra-exact needs float32 or float64 to go "
            "back through training"
        )
    return found


def _sgd_step(group: dict[str, Any], state: dict[str, Any]) -> SgdStep:
    return SgdStep(
        float(group["lr"]),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        state.get("momentum_buffer") is None,
    )


def _adam_step(group: dict[str, Any], state: dict[str, Any]) -> AdamStep:
    beta1, beta2 = map(float, group["betas"])
    decoupled = bool(group.get("decoupled_weight_decay"))
    number = int(state.get("step", 0)) + 1
    return AdamStep(
        float(group["lr"]),
        beta1,
        beta2,
        float(group["eps"]),
        float(group["weight_decay"]),
        decoupled,
        number,
    )


def _moments(step: AdamStep, state: dict[str, Any], gradient: Tensor) -> Moments:
    first = state.get("exp_avg", torch.zeros_like(gradient))
    second = state.get("exp_avg_sq", torch.zeros_like(gradient))
    return Moments(
        gradient,
        step.beta1 * first + (1.0 - step.beta1) * gradient,
        step.beta2 * second + (1.0 - step.beta2) * gradient**2,
    )
