"""Slow twins: plain float64 loops that are obviously right, against which everything fast is held."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def one_by_one_gradients(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Gradient of each sample's loss, from one backward pass over a batch of one for each."""
    parameters = dict(model.named_parameters())
    result = []
    for i in range(len(inputs)):
        total = loss(model(inputs[i : i + 1]), targets[i : i + 1]).sum()
        gradients = torch.autograd.grad(total, [parameters[n] for n in names], allow_unused=True)
        result.append(
            {n: torch.zeros_like(parameters[n]) if g is None else g.detach().clone() for n, g in zip(names, gradients, strict=True)}
        )
    return result


@dataclass
class RecordedStep:
    """One optimiser step as the oracle saw it: float64, one dictionary of gradients a sample."""

    samples: np.ndarray
    rows: list[dict[str, Tensor]]
    scale: float
    settings: dict[str, dict[str, float]]
    started: dict[str, bool]


def record_by_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Sequence[tuple[np.ndarray, Tensor, Tensor]],
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
) -> list[RecordedStep]:
    """Train in float64 with batch-of-one gradients and write down what the sweep needs."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    group_of = {p: g for g in optimizer.param_groups for p in g["params"]}
    steps = []
    for ids, inputs, targets in batches:
        rows = one_by_one_gradients(model, loss, inputs, targets, names)
        rows = [{n: g / len(ids) for n, g in row.items()} for row in rows]
        for name in names:
            parameters[name].grad = sum(row[name] for row in rows)
        scale = 1.0
        if max_grad_norm is not None:
            before = {n: parameters[n].grad.clone() for n in names}
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            largest = max(names, key=lambda n: before[n].abs().max().item())
            index = before[largest].abs().argmax()
            scale = (parameters[largest].grad.flatten()[index] / before[largest].flatten()[index]).item()
        settings, started = {}, {}
        for name in names:
            group = group_of[parameters[name]]
            settings[name] = {k: float(group[k]) for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}
            state = optimizer.state.get(parameters[name], {})
            started[name] = group["momentum"] != 0 and state.get("momentum_buffer") is None
        steps.append(RecordedStep(np.asarray(ids), rows, scale, settings, started))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return steps


def hessian_free_relevance(
    steps: Sequence[RecordedStep], test_gradients: Sequence[dict[str, Tensor]], n_samples: int
) -> np.ndarray:
    """The sweep of docs/architecture.md with zero curvature, on whole vectors, one test sample and one parameter at a time."""
    relevance = np.zeros((n_samples, len(test_gradients)))
    for j, test in enumerate(test_gradients):
        for name, gradient in test.items():
            adjoint, momentum = gradient.clone(), torch.zeros_like(gradient)
            for step in reversed(steps):
                s = step.settings[name]
                d = -s["lr"] * adjoint
                if s["momentum"] == 0:
                    g = d
                else:
                    gain = 1.0 if step.started[name] else 1.0 - s["dampening"]
                    if s["nesterov"]:
                        momentum = momentum + s["momentum"] * d
                        g = d + gain * momentum
                    else:
                        momentum = momentum + d
                        g = gain * momentum
                    momentum = torch.zeros_like(momentum) if step.started[name] else s["momentum"] * momentum
                for sample, row in zip(step.samples, step.rows, strict=True):
                    relevance[sample, j] -= (g * row[name]).sum().item() * step.scale
                adjoint = adjoint + s["weight_decay"] * g
    return relevance


# (step, perturbations (sample, parameter)) -> the mean batch loss's curvature at that step times each, the same shape
Curvature = Callable[[int, Tensor], Tensor]


def forward_relevance(
    steps: Sequence[RecordedStep], test_gradients: Sequence[dict[str, Tensor]], n_samples: int, curvature: Curvature
) -> np.ndarray:
    """HYDRA's own form (AAAI 2021): d theta_t / d w_i of every training sample, carried forward through SGD. N products a step.

    Args:
        steps: of the run, whose clipping's derivative is left out.
        test_gradients: h_j.
        n_samples: training samples.
        curvature: what stands for the Hessian, in parameters side by side in the order of the rows.
    """
    names = list(test_gradients[0])
    sizes = [test_gradients[0][n].numel() for n in names]
    flat = torch.stack([torch.cat([h[n].flatten() for n in names]) for h in test_gradients])
    moved = flat.new_zeros(n_samples, flat.shape[1])
    buffer = torch.zeros_like(moved)
    for t, step in enumerate(steps):

        def each(key: str) -> Tensor:
            values = [float(step.settings[n][key]) for n in names]  # noqa: B023 - called at once
            return torch.repeat_interleave(torch.tensor(values).to(flat), torch.tensor(sizes))

        gradient = step.scale * curvature(t, moved)
        for sample, row in zip(step.samples, step.rows, strict=True):
            gradient[sample] += step.scale * torch.cat([row[n].flatten() for n in names])
        gradient = gradient + each("weight_decay") * moved
        started = torch.repeat_interleave(torch.tensor([step.started[n] for n in names]), torch.tensor(sizes))
        momentum, gain = each("momentum"), torch.where(started, 1.0, 1 - each("dampening"))
        buffer = torch.where(momentum > 0, torch.where(started, 0.0, momentum) * buffer + gain * gradient, buffer)
        nesterov = gradient + momentum * buffer
        update = torch.where(momentum > 0, torch.where(each("nesterov") > 0, nesterov, buffer), gradient)
        moved = moved - each("lr") * update
    return -(moved @ flat.T).numpy()


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64."""
    return deepcopy(model).double()
