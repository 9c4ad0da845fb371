"""The optimiser's next update, read just before it: the gradients in use and the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.optimizer_rules import OptimizerRule
from hydra_pipe.recording.optimizers import gradients_in_use
from hydra_pipe.store.data.gradients import GROUP_COLUMNS, PACE_COLUMNS

_NO_STATE: Mapping[str, Any] = {}
_STEP = "step"
_STEP_FACTOR, _GAIN = "step_factor", "gain_factor"


@dataclass(frozen=True)
class _Deferred:
    """Factors of one step whose counts of updates are on a device.

    Args:
        factors: the step's factors by column and block, to be filled in.
        blocks: blocks to fill in.
        groups: number and settings of their parameter groups, as they were.
        counts: number of updates of each block before the step, shape (block,), on the device.
    """

    factors: Mapping[str, list[float]]
    blocks: Sequence[int]
    groups: Sequence[tuple[int, Mapping[str, Any]]]
    counts: Tensor


@dataclass(frozen=True)
class _Measured:
    """Factors of one step that rules have measured.

    Args:
        factors: a column of the step's factors by block, to be multiplied.
        blocks: blocks to multiply.
        values: factor of each of these blocks, shape (block,), on the device.
    """

    factors: list[float]
    blocks: Sequence[int]
    values: Tensor


class OptimizerReader:
    """Reads the updates of `optimizer`.

    Args:
        optimizer: optimiser that has a rule.
        rules: rule of each parameter group.
        trained: name and parameter group of every recorded parameter, in the order of the blocks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rules: Sequence[OptimizerRule],
        trained: Mapping[nn.Parameter, tuple[str, int]],
    ) -> None:
        self._optimizer, self._rules = optimizer, rules
        self._is_paced = any(rule.has_paces for rule in rules)
        self._trained = [(parameter, group) for parameter, (_, group) in trained.items()]
        self._ids = set(map(id, trained))
        self._n_groups = len(optimizer.param_groups)
        self._deferred: list[_Deferred] = []
        self._measured: list[_Measured] = []

    def gradients(self, step: int) -> list[Tensor | None]:
        """Return the gradient in use of every recorded parameter; None for one without a gradient.

        Raises:
            RecordError: no recorded parameter has a gradient, or a parameter that is not recorded
                has one.
        """
        if len(self._optimizer.param_groups) != self._n_groups:
            raise RecordError(
                f"the optimizer has a new parameter group at step {step}: begin another recording "
                "there"
            )
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._ids and parameter.grad is not None:
                    raise RecordError(
                        f"a parameter of shape {tuple(parameter.shape)} began to train at step "
                        f"{step}: it was frozen, or not in the optimizer, when recording started. "
                        "Begin another recording there"
                    )
        gradients = [p.grad for p, _ in self._trained]
        if all(g is None for g in gradients):
            raise RecordError(
                f"no parameter has a gradient at step {step}: call loss.backward() before "
                "optimizer.step()"
            )
        return gradients_in_use(self._optimizer, gradients)

    def roots(self) -> list[Tensor] | None:
        """Return the root of the preconditioner of each block after the latest step.

        Returns:
            Tensors of the shapes of the parameters; None if the optimiser has no preconditioner.
        """
        if not any(rule.preconditioned for rule in self._rules):
            return None
        states, groups = self._optimizer.state, self._optimizer.param_groups
        found = [
            self._rules[group].root(parameter, states.get(parameter, _NO_STATE), groups[group])
            for parameter, group in self._trained
        ]
        return [
            torch.ones_like(parameter) if root is None else root.detach()
            for root, (parameter, _) in zip(found, self._trained, strict=True)
        ]

    def settings(self, gradients: Sequence[Tensor | None]) -> dict[str, Any]:
        """Return the step's line of the step tables by parameter group and by block.

        A fused or capturable optimiser counts updates on its device, and some rules measure the
        gradient there. `fill` fills in the step factors of such blocks.

        Args:
            gradients: gradients in use; None for a block without one.
        """
        groups = self._optimizer.param_groups
        of_groups = [rule.settings(group) for rule, group in zip(self._rules, groups, strict=True)]
        states, started = self._optimizer.state, []
        measured: dict[str, dict[int, Tensor]] = {}
        factors: dict[str, list[float]] = {name: [] for name in self._names}
        on_device: list[tuple[int, int, Tensor]] = []
        for index, ((parameter, group), gradient) in enumerate(
            zip(self._trained, gradients, strict=True)
        ):
            state, rule = states.get(parameter, _NO_STATE), self._rules[group]
            started.append(gradient is not None and rule.starts_momentum(state, groups[group]))
            if gradient is not None:
                value = rule.measured_factor(parameter, gradient, state, groups[group])
                if value is not None:
                    # a step without momentum has no v, and its G moves the parameter at once
                    in_buffer = rule.measures_gain and of_groups[group]["momentum"] != 0.0
                    measured.setdefault(_GAIN if in_buffer else _STEP_FACTOR, {})[index] = value
            count = state.get(_STEP)
            if isinstance(count, Tensor) and count.device.type != "cpu":
                on_device.append((index, group, count))
                found = dict.fromkeys(factors, nan)
            else:
                found = self._factors(group, state, groups[group])
            for name, column in factors.items():
                column.append(found[name])
        if on_device:
            kept = {group: dict(groups[group], params=()) for _, group, _ in on_device}
            self._deferred.append(
                _Deferred(
                    factors,
                    [index for index, *_ in on_device],
                    [(group, kept[group]) for _, group, _ in on_device],
                    torch.stack([count for *_, count in on_device]),
                )
            )
        for name, of_blocks in measured.items():
            stacked = torch.stack([value.detach().double() for value in of_blocks.values()])
            self._measured.append(_Measured(factors[name], list(of_blocks), stacked))
        values: dict[str, Any] = {
            name: [of_group[name] for of_group in of_groups] for name in GROUP_COLUMNS
        }
        updated = [gradient is not None for gradient in gradients]
        return values | {"updated": updated, "momentum_started": started} | factors

    @property
    def _names(self) -> tuple[str, ...]:
        return (_STEP_FACTOR, *(PACE_COLUMNS if self._is_paced else ()))

    def _factors(
        self, number: int, state: Mapping[str, Any], group: Mapping[str, Any]
    ) -> dict[str, float]:
        """Return the factors of the step of a block in group `number`, by column."""
        rule = self._rules[number]
        paces = rule.paces(state, group) if self._is_paced else ()
        return dict(zip(self._names, (rule.step_factor(state, group), *paces), strict=True))

    def take(self) -> list[Tensor]:
        """Return the values that `fill` needs on the host, on their devices."""
        return [
            *(one.counts for one in self._deferred),
            *(one.values for one in self._measured),
        ]

    def fill(self, values: Sequence[NDArray[Any]]) -> None:
        """Fill in the step factors that `settings` has left open.

        Args:
            values: values of the last `take`.
        """
        deferred, self._deferred = self._deferred, []
        measured, self._measured = self._measured, []
        left = iter(values)
        for one in deferred:
            for block, group, count in zip(one.blocks, one.groups, next(left), strict=True):
                for name, value in self._factors(group[0], {_STEP: float(count)}, group[1]).items():
                    one.factors[name][block] = value
        for own in measured:
            for block, factor in zip(own.blocks, next(left), strict=True):
                own.factors[block] *= float(factor)
