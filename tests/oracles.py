"""Slow twins: plain float64 loops, obviously right, against which everything fast is held."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hydra_pipe.maths.adam import rank_one

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
            {
                n: torch.zeros_like(parameters[n]) if g is None else g.detach().clone()
                for n, g in zip(names, gradients, strict=True)
            }
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
    curvature: np.ndarray


def curvature_weights(output: Tensor, targets: Tensor) -> np.ndarray:
    """rho of each sample's cross-entropy: (1 - sum p^2) / |p - e_y|^2."""
    p = output.detach().softmax(dim=1)
    residual = p - torch.nn.functional.one_hot(targets, p.shape[1])
    return ((1 - (p**2).sum(dim=1)) / (residual**2).sum(dim=1)).numpy()


def record_by_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Sequence[tuple[np.ndarray, Tensor, Tensor]],
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    after: Callable[[int], None] = lambda _: None,
) -> list[RecordedStep]:
    """Train in float64 with batch-of-one gradients and write down what the sweep needs.

    `after` is told how many steps were taken, after each.
    """
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
            scale = (
                parameters[largest].grad.flatten()[index] / before[largest].flatten()[index]
            ).item()
        settings, started = {}, {}
        for name in names:
            group = group_of[parameters[name]]
            settings[name] = {
                k: float(group[k])
                for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")
            }
            state = optimizer.state.get(parameters[name], {})
            started[name] = group["momentum"] != 0 and state.get("momentum_buffer") is None
        rho = curvature_weights(model(inputs), targets)
        steps.append(RecordedStep(np.asarray(ids), rows, scale, settings, started, rho))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        after(len(steps))
    return steps


def hessian_free_relevance(
    steps: Sequence[RecordedStep], test_gradients: Sequence[dict[str, Tensor]], n_samples: int
) -> np.ndarray:
    """The sweep of docs/architecture.md with zero curvature, on whole vectors, one test sample and
    one parameter at a time.
    """
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
                    momentum = (
                        torch.zeros_like(momentum)
                        if step.started[name]
                        else s["momentum"] * momentum
                    )
                for sample, row in zip(step.samples, step.rows, strict=True):
                    relevance[sample, j] -= (g * row[name]).sum().item() * step.scale
                adjoint = adjoint + s["weight_decay"] * g
    return relevance


# (step, perturbations (sample, parameter)) -> the mean batch loss's curvature at that step times
# each, the same shape
Curvature = Callable[[int, Tensor], Tensor]


def forward_relevance(
    steps: Sequence[RecordedStep],
    test_gradients: Sequence[dict[str, Tensor]],
    n_samples: int,
    curvature: Curvature,
) -> np.ndarray:
    """HYDRA's own form (AAAI 2021): d theta_t / d w_i of every training sample, carried forward
    through SGD. N products a step.

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
        started = torch.repeat_interleave(
            torch.tensor([step.started[n] for n in names]), torch.tensor(sizes)
        )
        momentum, gain = each("momentum"), torch.where(started, 1.0, 1 - each("dampening"))
        buffer = torch.where(
            momentum > 0, torch.where(started, 0.0, momentum) * buffer + gain * gradient, buffer
        )
        nesterov = gradient + momentum * buffer
        update = torch.where(
            momentum > 0, torch.where(each("nesterov") > 0, nesterov, buffer), gradient
        )
        moved = moved - each("lr") * update
    return -(moved @ flat.T).numpy()


def tracin(
    steps: Sequence[RecordedStep], tests: dict[int, Sequence[dict[str, Tensor]]], n_samples: int
) -> np.ndarray:
    """Sum over steps of eta <c r, h>, h from the test gradients that are nearest to the step, of
    two as near the later ones.
    """
    relevance = np.zeros((n_samples, len(next(iter(tests.values())))))
    for t, step in enumerate(steps):
        nearest = max(tests, key=lambda s: (-abs(s - t), s))
        for i, row in zip(step.samples, step.rows, strict=True):
            for j, test in enumerate(tests[nearest]):
                relevance[i, j] += sum(
                    step.settings[n]["lr"] * step.scale * (row[n] * h).sum().item()
                    for n, h in test.items()
                )
    return relevance


def self_relevance(steps: Sequence[RecordedStep], n_samples: int) -> np.ndarray:
    """Sum over steps of eta <c r, g> with g = c |B| r, the sample's own gradient."""
    relevance = np.zeros((n_samples, 1))
    for step in steps:
        for i, row in zip(step.samples, step.rows, strict=True):
            for n, r in row.items():
                relevance[i, 0] += (
                    step.settings[n]["lr"] * step.scale**2 * len(step.rows) * (r**2).sum().item()
                )
    return relevance


def last_gradients(steps: Sequence[RecordedStep]) -> tuple[dict[int, np.ndarray], dict[int, float]]:
    """Of each sample its gradient c |B| r, all parameters in one, when it was last used; and rho /
    c.
    """
    gradients, weights = {}, {}
    for step in steps:
        for i, row, rho in zip(step.samples, step.rows, step.curvature, strict=True):
            gradients[int(i)] = step.scale * len(step.rows) * in_one(row)
            weights[int(i)] = float(rho) / step.scale
    return gradients, weights


def damping(steps: Sequence[RecordedStep]) -> np.ndarray:
    """Of each feature: 1 over the lengths of its steps, and the weight decay along them. Of SGD."""
    found = []
    for n, r in steps[0].rows[0].items():
        lengths = [
            s.settings[n]["lr"] * (1 - s.settings[n]["dampening"]) / (1 - s.settings[n]["momentum"])
            for s in steps
        ]
        decay = sum(
            length * s.settings[n]["weight_decay"] for length, s in zip(lengths, steps, strict=True)
        )
        found.append(np.full(r.numel(), (1 + decay) / sum(lengths)))
    return np.concatenate(found)


def in_one(gradient: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([g.flatten() for g in gradient.values()]).numpy()


def influence(
    gradients: np.ndarray, weights: np.ndarray, tests: np.ndarray, damping: np.ndarray
) -> np.ndarray:
    """1/N G (F + Lambda)^-1 H.T with the Fisher as a matrix, for G (sample, feature), H (test,
    feature), Lambda (feature,).
    """
    fisher = (gradients.T * weights) @ gradients / len(gradients)
    return gradients @ np.linalg.inv(fisher + np.diag(damping)) @ tests.T / len(gradients)


def nearest_outer_products(root: dict[str, Tensor], factored: Sequence[str]) -> dict[str, Tensor]:
    """Return the outer product nearest to `root`, of each factored weight and its bias."""
    found = {}
    for name in factored:
        bias = name.removesuffix("weight") + "bias"
        a, b = rank_one(torch.cat([root[name], root[bias][:, None]], 1))
        found[name], found[bias] = torch.outer(a, b[:-1]).double(), (a * b[-1]).double()
    return found


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64."""
    return deepcopy(model).double()


def rows_in_context(
    model: nn.Module, losses: Callable[[Tensor], Tensor], inputs: Tensor
) -> dict[str, Tensor]:
    """Each sample's gradient, by a backward pass from its loss alone through a pass over the whole
    batch; shape (batch, numel).
    """
    names, parameters = zip(
        *[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True
    )
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for loss in losses(model(inputs)):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            rows[name].append(
                torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
            )
    return {name: torch.stack(of_samples) for name, of_samples in rows.items()}
