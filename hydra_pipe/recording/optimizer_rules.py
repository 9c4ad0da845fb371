"""The rules of optimisers: their updates as momentum SGD in coordinates of their own.

docs/methods.md, "Under each optimiser", derives each of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import OptimizerError
from hydra_pipe.maths import adafactor
from hydra_pipe.maths.adam import inverse_root, root_preconditioner
from hydra_pipe.maths.muon import best_multiple, orthogonalized, rate_of_shape
from hydra_pipe.maths.step_factors import nadam_pace, nadam_shares, radam_rectification

# a parameter's entry in `optimizer.state`, and its group in `optimizer.param_groups`
State = Mapping[str, Any]
Group = Mapping[str, Any]

# A number of updates after which the second moment's average is as long as it gets.
_LATE = 10**6


class OptimizerRule:
    """A rule that writes one optimiser's update as momentum SGD, possibly in its own coordinates.

    A subclass and `register_optimizer_rule` teach a new rule. The sweep (docs/architecture.md)
    is exact for an update of the form

        v = mu v + (1 - tau) G,   G = gradient + weight_decay theta,
        theta = (1 - decoupled_decay) theta - learning_rate * step_factor * P v

    with P = 1, or with an elementwise P that is not negative. Of P, the recording keeps the one of
    its end, and of each moment at which test gradients are taken.
    """

    #: True if P is not 1; then the root of P is stored beside the test gradients.
    preconditioned = False
    #: True if `paces` are not 1; then they are stored in the step tables.
    has_paces = False
    #: True if `measured_factor` multiplies G where G enters v, not the learning rate. `has_paces`
    #: is then True.
    measures_gain = False
    #: True if elements of a parameter do not depend on each other within the update.
    is_elementwise = True

    def check(self, group: Group, index: int) -> None:
        """Refuse options whose update is of another form. Raises: OptimizerError."""

    def settings(self, group: Group) -> dict[str, float]:
        """Return the group's columns of the step tables.

        The columns are learning_rate, momentum, dampening, weight_decay, nesterov and
        decoupled_decay.
        """
        raise NotImplementedError

    def starts_momentum(self, state: State, group: Group) -> bool:
        """Tell whether this step sets v to G, whatever tau is."""
        return False

    def step_factor(self, state: State, group: Group) -> float:
        """Return the further factor of the learning rate at this step."""
        return 1.0

    def measured_factor(
        self, parameter: nn.Parameter, gradient: Tensor, state: State, group: Group
    ) -> Tensor | None:
        """Return a further factor that depends on values, a scalar, or None.

        It multiplies the learning rate, or G if `measures_gain`.

        Such a factor is one number for the whole parameter, as a layer's rate by its norm (LARS).
        The host does not wait for the number. All values are those just before the step.

        Args:
            parameter: parameter of the block.
            gradient: gradient in use.
            state: state of the parameter.
            group: its parameter group.
        """
        return None

    def paces(self, state: State, group: Group) -> tuple[float, float]:
        """Return the further factors of the momentum and of 1 - dampening at this step."""
        return 1.0, 1.0

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        """Return the root of P after the latest step, the shape of `parameter`; None if P is 1."""
        return None


class SgdRule(OptimizerRule):
    """torch.optim.SGD with momentum, dampening, Nesterov and weight decay."""

    def settings(self, group: Group) -> dict[str, float]:
        return {
            "learning_rate": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": float(group["nesterov"]),
            "decoupled_decay": 0.0,
        }

    def starts_momentum(self, state: State, group: Group) -> bool:
        return bool(group["momentum"] != 0.0) and state.get("momentum_buffer") is None


class AdamRule(OptimizerRule):
    """The rule of torch.optim.Adam and AdamW, with coupled or decoupled weight decay."""

    preconditioned = True

    def settings(self, group: Group) -> dict[str, float]:
        rate, decay, beta1 = (
            float(group["lr"]),
            float(group["weight_decay"]),
            float(group["betas"][0]),
        )
        decoupled = bool(group.get("decoupled_weight_decay"))
        return {
            "learning_rate": rate,
            "momentum": beta1,
            "dampening": beta1,
            "weight_decay": 0.0 if decoupled else decay,
            "nesterov": 0.0,
            "decoupled_decay": rate * decay if decoupled else 0.0,
        }

    def step_factor(self, state: State, group: Group) -> float:
        return float(1.0 / (1.0 - float(group["betas"][0]) ** (_updates(state) + 1)))

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        moment = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        if moment is None:  # never updated, so that it has no rows either
            return torch.zeros_like(parameter)
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        return root_preconditioner(moment, _updates(state), beta2, eps)


class NAdamRule(AdamRule):
    """The rule of torch.optim.NAdam: Nesterov's form with a momentum that differs by step."""

    has_paces = True

    def settings(self, group: Group) -> dict[str, float]:
        return super().settings(group) | {"nesterov": 1.0}

    def step_factor(self, state: State, group: Group) -> float:
        return nadam_shares(_updates(state) + 1, *self._momentum(group))[0]

    def paces(self, state: State, group: Group) -> tuple[float, float]:
        beta1, decay = self._momentum(group)
        if beta1 == 0.0:
            return 1.0, 1.0
        before, after = (nadam_pace(_updates(state) + n, beta1, decay) for n in (0, 1))
        return after / before, after

    @staticmethod
    def _momentum(group: Group) -> tuple[float, float]:
        return float(group["betas"][0]), float(group["momentum_decay"])


class MuonRule(OptimizerRule):
    """The rule of torch.optim.Muon: SGD whose rate is measured at each step, for each matrix.

    The orthogonalised momentum counts as the nearest multiple of the momentum.
    """

    is_elementwise = False

    def settings(self, group: Group) -> dict[str, float]:
        rate, momentum = float(group["lr"]), float(group["momentum"])
        nesterov = bool(group["nesterov"]) and momentum > 0.0
        # Nesterov's form moves by (1 - mu) (G + mu v) with v = mu v + G, which is its own buffer
        # over 1 - mu. The measured factor has the 1 - mu.
        return {
            "learning_rate": rate,
            "momentum": momentum,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "nesterov": float(nesterov),
            "decoupled_decay": rate * float(group["weight_decay"]),
        }

    def measured_factor(
        self, parameter: nn.Parameter, gradient: Tensor, state: State, group: Group
    ) -> Tensor | None:
        momentum = float(group["momentum"])
        buffer = state.get("momentum_buffer", torch.zeros_like(gradient))
        moved = buffer.lerp(gradient, 1.0 - momentum)
        used = gradient.lerp(moved, momentum) if group["nesterov"] else moved
        made = orthogonalized(
            used, group["ns_coefficients"], int(group["ns_steps"]), float(group["eps"])
        )
        rate = (1.0 - momentum) * rate_of_shape(parameter.shape, group["adjust_lr_fn"])
        return rate * best_multiple(used, made)


class LionRule(OptimizerRule):
    """The rule of Lion (Chen et al. 2023), for `register_optimizer_rule`: PyTorch has no Lion.

    The optimizer moves theta by - lr (sign(U) + weight_decay theta), U = beta1 m + (1 - beta1) G,
    and then sets m = beta2 m + (1 - beta2) G. Its groups have `lr`, `betas` and `weight_decay`,
    and its state has m by the name `exp_avg`. The sign counts as the nearest multiple of U.
    """

    def check(self, group: Group, index: int) -> None:
        beta1, beta2 = group["betas"]
        if not 0.0 < beta1 <= beta2:
            raise OptimizerError(
                f"parameter group {index} has betas {(beta1, beta2)}: LionRule follows averages "
                "with 0 < beta1 <= beta2, as Lion is used"
            )

    def settings(self, group: Group) -> dict[str, float]:
        beta1, beta2 = map(float, group["betas"])
        rate = float(group["lr"])
        # With equal betas U is m. Else U = (1 - beta1 / beta2) (G + beta2 v) for v = k m after the
        # step with k = beta1 / (beta2 (beta2 - beta1)), which is Nesterov's form.
        gain = 1.0 - beta2
        if beta1 < beta2:
            gain *= beta1 / (beta2 * (beta2 - beta1))
        return {
            "learning_rate": rate,
            "momentum": beta2,
            "dampening": 1.0 - gain,
            "weight_decay": 0.0,
            "nesterov": float(beta1 < beta2),
            "decoupled_decay": rate * float(group["weight_decay"]),
        }

    def step_factor(self, state: State, group: Group) -> float:
        beta1, beta2 = map(float, group["betas"])
        return 1.0 - beta1 / beta2 if beta1 < beta2 else 1.0

    def measured_factor(
        self, parameter: nn.Parameter, gradient: Tensor, state: State, group: Group
    ) -> Tensor | None:
        average = state.get("exp_avg", torch.zeros_like(gradient))
        used = average.lerp(gradient, 1.0 - float(group["betas"][0]))
        return best_multiple(used, used.sign())


class RAdamRule(AdamRule):
    """The rule of torch.optim.RAdam. Its first steps, which have no preconditioner, count as 0."""

    def check(self, group: Group, index: int) -> None:
        if radam_rectification(_LATE, float(group["betas"][1])) is None:
            raise OptimizerError(
                f"parameter group {index} has beta2 = {group['betas'][1]}, with which RAdam never "
                "uses its second moment: raise beta2 above 2/3, or use torch.optim.SGD"
            )

    def step_factor(self, state: State, group: Group) -> float:
        rectification = radam_rectification(_updates(state) + 1, float(group["betas"][1]))
        return 0.0 if rectification is None else rectification * super().step_factor(state, group)

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        # RAdam adds eps before the second moment is made unbiased
        bias = 1.0 - float(group["betas"][1]) ** max(1, _updates(state))
        return super().root(parameter, state, dict(group, eps=float(group["eps"]) * bias**-0.5))


class RmsPropRule(OptimizerRule):
    """The rule of torch.optim.RMSprop, centred or not, with and without momentum."""

    preconditioned = True

    def settings(self, group: Group) -> dict[str, float]:
        return _undamped(group, float(group["momentum"]))

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        square = state.get("square_avg")
        if square is None:
            return torch.zeros_like(parameter)
        variance = (square - state["grad_avg"] ** 2).clamp(min=0.0) if group["centered"] else square
        return inverse_root(variance, float(group["eps"]), present=square > 0)


class AdagradRule(OptimizerRule):
    """The rule of torch.optim.Adagrad."""

    preconditioned = True

    def settings(self, group: Group) -> dict[str, float]:
        return _undamped(group, 0.0)

    def step_factor(self, state: State, group: Group) -> float:
        return float(1.0 / (1.0 + _updates(state) * float(group["lr_decay"])))

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        return inverse_root(state["sum"], float(group["eps"]), present=state["sum"] > 0)


class AdafactorRule(OptimizerRule):
    """The rule of torch.optim.Adafactor. The rate, relative to the parameter, is measured."""

    preconditioned = True
    is_elementwise = False

    def settings(self, group: Group) -> dict[str, float]:
        decay = float(group["lr"]) * float(group["weight_decay"])
        return _undamped(dict(group, weight_decay=0.0), 0.0) | {"decoupled_decay": decay}

    def step_factor(self, state: State, group: Group) -> float:
        rate, most = float(group["lr"]), float((_updates(state) + 1) ** -0.5)
        return most / rate if rate > most else 1.0

    def measured_factor(
        self, parameter: nn.Parameter, gradient: Tensor, state: State, group: Group
    ) -> Tensor | None:
        shapes = adafactor.state_shapes(parameter.shape)
        before = {
            name: state.get(name, gradient.new_zeros(shape)) for name, shape in shapes.items()
        }
        share = (_updates(state) + 1) ** float(group["beta2_decay"])
        eps1, eps2 = adafactor_eps(group, parameter)
        moment = adafactor.second_moment(adafactor.averaged(before, gradient, share), eps1)
        u = adafactor.divided(gradient, moment, eps1)
        return adafactor.relative_size(parameter.detach(), u, eps2, float(group["d"]))

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        if not state:
            return torch.zeros_like(parameter)
        eps1, _ = adafactor_eps(group, parameter)
        names = adafactor.state_shapes(parameter.shape)
        moment = adafactor.second_moment({name: state[name] for name in names}, eps1)
        return inverse_root(moment.clamp(min=eps1 * eps1), 0.0, present=moment > 0)


def adafactor_eps(group: Group, parameter: Tensor) -> tuple[float, float]:
    """Return eps1 and eps2 of a parameter group of torch.optim.Adafactor."""
    eps1, eps2 = group["eps"]
    return torch.finfo(parameter.dtype).eps if eps1 is None else float(eps1), float(eps2)


def _undamped(group: Group, momentum: float) -> dict[str, float]:
    """Return the settings of a group without dampening, whose weight decay is coupled."""
    return {
        "learning_rate": float(group["lr"]),
        "momentum": momentum,
        "dampening": 0.0,
        "weight_decay": float(group["weight_decay"]),
        "nesterov": 0.0,
        "decoupled_decay": 0.0,
    }


def _updates(state: State) -> int:
    """Return the number of updates before."""
    return int(state.get("step", 0))
