"""Updates of torch's optimisers as functions that autograd differentiates.

`hydra-exact` goes back over a step with the derivative of the whole update, the optimiser's state
included. SGD and Adam have adjoints written by hand (maths/unrolled.py). An optimiser here has
its update, from PyTorch's documentation of it, and autograd finds the adjoint.

Symbols: theta the parameter, g the gradient in use (clipped, with coupled weight decay), t the
number of the update, counted from 1. Tensors of the state have PyTorch's names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydra_pipe.maths import adafactor
from hydra_pipe.maths.muon import orthogonalized, rate_of_shape
from hydra_pipe.maths.step_factors import nadam_shares, radam_rectification
from hydra_pipe.recording.optimizer_rules import adafactor_eps
from hydra_pipe.recording.several_optimizers import optimizers_in

Group = Mapping[str, Any]
States = dict[str, Tensor]
Shape = Sequence[int]

# Optimisers whose adjoints are written by hand, and the tensors of their state.
_BY_HAND: dict[type[torch.optim.Optimizer], int] = {
    torch.optim.SGD: 1,
    torch.optim.Adam: 2,
    torch.optim.AdamW: 2,
}
# Columns of adjoints that go through an update together: their temporary values are few.
_AT_ONCE = 16


@dataclass(frozen=True)
class Update:
    """The update of one parameter by one kind of optimiser.

    Args:
        states: function of a parameter group and a parameter's shape. It returns the shapes, by
            name, of the state's tensors that a later update depends on.
        step: function of group, t, theta, g and the states before the step. It returns theta and
            the states after the step.
        decays_by_itself: True if weight decay is no part of g, whatever the group says.
    """

    states: Callable[[Group, Shape], dict[str, Shape]]
    step: Callable[[Group, int, Tensor, Tensor, States], tuple[Tensor, States]]
    decays_by_itself: bool = False


def differentiated() -> list[str]:
    """Return the names of the optimisers whose updates are differentiated."""
    return [kind.__name__ for kind in (*_BY_HAND, *_UPDATES)]


def not_differentiated(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimisers in `optimizer` whose updates are not differentiated."""
    kinds = map(type, optimizers_in(optimizer))
    return [kind.__name__ for kind in kinds if kind not in _BY_HAND and kind not in _UPDATES]


def update_of(optimizer: torch.optim.Optimizer, group: Group) -> Update | None:
    """Return the update of a parameter group; None if its adjoint is written by hand."""
    if type(optimizer) in _BY_HAND:
        return _AMSGRAD if group.get("amsgrad") else None
    return _UPDATES[type(optimizer)]


def state_shapes(optimizer: torch.optim.Optimizer, group: Group, shape: Shape) -> list[Shape]:
    """Return the shapes of the tensors in a parameter's state that a later update depends on.

    Args:
        optimizer: optimiser of the parameter.
        group: its parameter group.
        shape: its shape.
    """
    update = update_of(optimizer, group)
    if update is None:
        return [shape] * _BY_HAND[type(optimizer)]
    return [*update.states(group, shape).values()]


def adjoint_of_update(
    update: Update,
    group: Group,
    state: Mapping[str, Any],
    theta: Tensor,
    gradient: Tensor,
    a: Tensor,
    states: Sequence[Tensor],
) -> Tensor:
    """Go back over an update.

    Args:
        update: update of the optimiser.
        group: parameter group as it was at the step.
        state: state of the parameter before the step.
        theta: parameter before the step.
        gradient: gradient that the optimiser was given, the shape of `theta`.
        a, states: adjoints of theta and of the states after the step, shape (column, ...). They
            are changed in place to the adjoints before the step, except for the part that comes
            through the gradient.

    Returns:
        The adjoint of the gradient, shape (column, ...).
    """
    names = update.states(group, theta.shape)
    number = int(state.get("step", 0)) + 1
    with torch.enable_grad():
        inputs = [
            x.detach().clone().requires_grad_()
            for x in (
                theta,
                gradient,
                *(state.get(name, theta.new_zeros(shape)) for name, shape in names.items()),
            )
        ]
        own = dict(zip(names, inputs[2:], strict=True))
        used = inputs[1] if update.decays_by_itself else _used(group, *inputs[:2])
        moved, after = update.step(group, number, inputs[0], used, own)
        outputs = [moved, *(after[name] for name in names)]
    found = torch.zeros_like(a)
    for first in range(0, len(a), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        adjoints = torch.autograd.grad(
            outputs,
            inputs,
            [a[part], *(x[part] for x in states)],
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        for to, value in zip((a, found, *states), adjoints, strict=True):
            to[part] = 0.0 if value is None else value
    return found


def _used(group: Group, theta: Tensor, gradient: Tensor) -> Tensor:
    """Return g: the gradient with coupled weight decay."""
    decay = float(group["weight_decay"])
    if decay and not _is_decoupled(group):
        return gradient + decay * theta
    return gradient


def _is_decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay"))


def _shrunk(group: Group, theta: Tensor) -> Tensor:
    """Return theta after decoupled weight decay."""
    if not _is_decoupled(group):
        return theta
    return theta * (1.0 - float(group["lr"]) * float(group["weight_decay"]))


def _root(square: Tensor) -> Tensor:
    """Return the root, whose derivative is taken to be 0 at 0: the gradient always was 0 there."""
    present = square > 0
    return torch.where(present, square, 1.0).sqrt() * present


def _moments(group: Group, g: Tensor, states: States) -> States:
    """Return the first and the second moment after the step."""
    beta1, beta2 = map(float, group["betas"])
    return {
        "exp_avg": beta1 * states["exp_avg"] + (1.0 - beta1) * g,
        "exp_avg_sq": beta2 * states["exp_avg_sq"] + (1.0 - beta2) * g**2,
    }


def _elementwise(*names: str) -> Callable[[Group, Shape], dict[str, Shape]]:
    """Return the `states` of an update whose state has these tensors of the parameter's shape."""
    return lambda _, shape: dict.fromkeys(names, shape)


def _amsgrad_step(
    group: Group, t: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    """Adam's update with the largest second moment so far (Reddi et al. 2018)."""
    beta1, beta2 = map(float, group["betas"])
    after = _moments(group, g, states)
    largest = torch.maximum(states["max_exp_avg_sq"], after["exp_avg_sq"])
    denominator = _root(largest) / (1.0 - beta2**t) ** 0.5 + float(group["eps"])
    size = float(group["lr"]) / (1.0 - beta1**t)
    moved = _shrunk(group, theta) - size * after["exp_avg"] / denominator
    return moved, after | {"max_exp_avg_sq": largest}


def _rmsprop_states(group: Group, shape: Shape) -> dict[str, Shape]:
    centred = ("grad_avg",) if group["centered"] else ()
    momentum = ("momentum_buffer",) if group["momentum"] else ()
    return dict.fromkeys(("square_avg", *centred, *momentum), shape)


def _rmsprop_step(
    group: Group, _: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    alpha, momentum = float(group["alpha"]), float(group["momentum"])
    after = {"square_avg": alpha * states["square_avg"] + (1.0 - alpha) * g**2}
    square = after["square_avg"]
    if group["centered"]:
        after["grad_avg"] = alpha * states["grad_avg"] + (1.0 - alpha) * g
        square = square - after["grad_avg"] ** 2
    move = g / (_root(square) + float(group["eps"]))
    if momentum:
        move = after["momentum_buffer"] = momentum * states["momentum_buffer"] + move
    return theta - float(group["lr"]) * move, after


def _adagrad_step(
    group: Group, t: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    total = states["sum"] + g**2
    rate = float(group["lr"]) / (1.0 + (t - 1) * float(group["lr_decay"]))
    return theta - rate * g / (_root(total) + float(group["eps"])), {"sum": total}


def _nadam_step(
    group: Group, t: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    beta1, beta2 = map(float, group["betas"])
    of_gradient, of_moment = nadam_shares(t, beta1, float(group["momentum_decay"]))
    after = _moments(group, g, states)
    denominator = _root(after["exp_avg_sq"]) / (1.0 - beta2**t) ** 0.5 + float(group["eps"])
    move = (of_gradient * g + of_moment * after["exp_avg"]) / denominator
    return _shrunk(group, theta) - float(group["lr"]) * move, after


def _radam_step(
    group: Group, t: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    beta1, beta2 = map(float, group["betas"])
    after = _moments(group, g, states)
    move = after["exp_avg"] / (1.0 - beta1**t)
    rectification = radam_rectification(t, beta2)
    if rectification is not None:
        root = _root(after["exp_avg_sq"]) + float(group["eps"])
        move = rectification * (1.0 - beta2**t) ** 0.5 * move / root
    return _shrunk(group, theta) - float(group["lr"]) * move, after


def _muon_step(
    group: Group, _: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    """Muon's update. The rounding to bfloat16 within has no derivative: it is left out."""
    momentum, rate = float(group["momentum"]), float(group["lr"])
    buffer = momentum * states["momentum_buffer"] + (1.0 - momentum) * g
    used = (1.0 - momentum) * g + momentum * buffer if group["nesterov"] else buffer
    made = orthogonalized(
        used, group["ns_coefficients"], int(group["ns_steps"]), float(group["eps"])
    )
    size = rate * rate_of_shape(theta.shape, group["adjust_lr_fn"])
    shrunk = theta * (1.0 - rate * float(group["weight_decay"]))
    return shrunk - size * made, {"momentum_buffer": buffer}


def _adafactor_step(
    group: Group, t: int, theta: Tensor, g: Tensor, states: States
) -> tuple[Tensor, States]:
    eps1, eps2 = adafactor_eps(group, theta)
    rate = float(group["lr"])
    after = adafactor.averaged(states, g, t ** float(group["beta2_decay"]))
    u = adafactor.divided(g, adafactor.second_moment(after, eps1), eps1)
    size = min(rate, t**-0.5) * adafactor.relative_size(theta, u, eps2, float(group["d"]))
    return theta * (1.0 - rate * float(group["weight_decay"])) - size * u, after


_AMSGRAD = Update(_elementwise("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _amsgrad_step)
_UPDATES: dict[type[torch.optim.Optimizer], Update] = {
    torch.optim.RMSprop: Update(_rmsprop_states, _rmsprop_step),
    torch.optim.Adagrad: Update(_elementwise("sum"), _adagrad_step),
    torch.optim.NAdam: Update(_elementwise("exp_avg", "exp_avg_sq"), _nadam_step),
    torch.optim.RAdam: Update(_elementwise("exp_avg", "exp_avg_sq"), _radam_step),
    torch.optim.Muon: Update(_elementwise("momentum_buffer"), _muon_step, decays_by_itself=True),
    torch.optim.Adafactor: Update(
        lambda _, shape: dict(adafactor.state_shapes(shape)),
        _adafactor_step,
        decays_by_itself=True,
    ),
}
