"""Optimisers beside SGD and Adam: relevance against a float64 loop forward through their own
updates, the rows, and the weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import in_float64, nearest_outer_products, one_by_one_gradients
from rows import differences, stored_rows
from support.compare import relative_error
from support.optimizers import CASES, Kind, Lars, LarsRule, Lion, muon_without_rounding, pipeline_of
from support.pipelines import conv_net, cross_entropy
from torch import Tensor

import hydra_pipe
from hydra_pipe import LionRule, Pipeline, Recorder
from hydra_pipe.errors import OptimizerError, RecordWarning
from hydra_pipe.recording import optimizers
from hydra_pipe.training.batches import epoch_order

T = torch.optim
pytestmark = [
    pytest.mark.filterwarnings("ignore:the optimizer has maximize=True"),
    pytest.mark.usefixtures("_are_taught"),
]


@pytest.fixture
def _are_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizers._RULES, Lion, LionRule())
    monkeypatch.setitem(optimizers._RULES, Lars, LarsRule())


class Moved:
    """Change of one parameter by a change of its gradients, with D left out of the update.

    The update is as PyTorch's documentation has it.

    Args:
        like: the change of the parameter for each sample, shape (sample, ...), zeros.
    """

    def __init__(self, like: Tensor) -> None:
        self.theta, self.buffer = like, torch.zeros_like(like)

    def step(
        self, kind: Kind, group: dict[str, Any], t: int, gradient: Tensor, multiple: float
    ) -> None:
        """`multiple`: of the momentum, that stands for what Muon makes of it."""
        lr, decay = group["lr"], group["weight_decay"]
        decoupled = kind in (T.AdamW, T.Muon, T.Adafactor, Lion) or group.get(
            "decoupled_weight_decay", False
        )
        used = gradient + (0.0 if decoupled else decay) * self.theta
        if decoupled:
            self.theta = (1 - lr * decay) * self.theta
        if kind is Lars:
            used, multiple = multiple * used, 1.0
        self.theta = self.theta - lr * multiple * self._move(kind, group, t, used)

    def _move(self, kind: Kind, group: dict[str, Any], t: int, g: Tensor) -> Tensor:
        if kind in (T.SGD, T.RMSprop, Lars):
            self.buffer = group["momentum"] * self.buffer + g
            return self.buffer
        if kind is T.Muon:
            mu = group["momentum"]
            self.buffer = mu * self.buffer + (1 - mu) * g
            return (1 - mu) * g + mu * self.buffer if group["nesterov"] else self.buffer
        if kind is T.Adafactor:
            return g
        if kind is Lion:
            beta1, beta2 = group["betas"]
            used = beta1 * self.buffer + (1 - beta1) * g
            self.buffer = beta2 * self.buffer + (1 - beta2) * g
            return used
        if kind is T.Adagrad:
            return g / (1 + (t - 1) * group["lr_decay"])
        beta1, beta2 = group["betas"]
        self.buffer = beta1 * self.buffer + (1 - beta1) * g
        if kind is T.NAdam:
            mu = [
                beta1 * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in range(1, t + 2)
            ]
            of_gradient = (1 - mu[t - 1]) / (1 - np.prod(mu[:t]))
            return of_gradient * g + mu[t] / (1 - np.prod(mu)) * self.buffer
        moved = self.buffer / (1 - beta1**t)
        if kind is not T.RAdam:
            return moved
        longest = 2 / (1 - beta2) - 1
        rho = longest - 2 * t * beta2**t / (1 - beta2**t)
        if rho <= 5:  # these steps are left out (docs/methods.md)
            return torch.zeros_like(moved)
        return moved * np.sqrt(
            (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
        )


def dividing(kind: Kind, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """What the last update was divided by, elementwise."""
    if kind in (T.SGD, T.Muon, Lion, Lars):
        return torch.ones(())
    if kind is T.Adagrad:
        return state["sum"].sqrt() + group["eps"]
    if kind is T.Adafactor:
        # of parameters in float32, which the package sees
        eps = torch.finfo(torch.float32).eps if group["eps"][0] is None else group["eps"][0]
        return adafactor_moment(state, eps).sqrt().clamp(min=eps)
    if kind is T.RMSprop:
        mean = state["grad_avg"] if group["centered"] else torch.zeros(())
        return (state["square_avg"] - mean**2).sqrt() + group["eps"]
    unbiased = 1 - group["betas"][1] ** float(state["step"])
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    if kind is T.RAdam:
        return (second.sqrt() + group["eps"]) / unbiased**0.5
    return (second / unbiased).sqrt() + group["eps"]


def orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon's polynomials make of the singular values, in full precision."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


def nearest_multiple(parameter: Tensor, group: dict[str, Any], buffer: Tensor) -> float:
    """The number that makes the momentum nearest to its orthogonal form, times Muon's own factor by
    shape.
    """
    mu, gradient = group["momentum"], parameter.grad
    assert gradient is not None
    buffer = mu * buffer + (1 - mu) * gradient
    used = (1 - mu) * gradient + mu * buffer if group["nesterov"] else buffer
    own = torch.linalg.lstsq(
        used.reshape(-1, 1), orthogonal(used, group).reshape(-1, 1)
    ).solution.item()
    rows, columns = parameter.shape
    by_shape = {
        None: max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
    }
    return float(own * by_shape[group["adjust_lr_fn"]])


def adafactor_moment(state: dict[str, Tensor], eps: float) -> Tensor:
    """Each element from the mean of its row, the mean of its column, and the mean of all."""
    if "variance" in state:
        return state["variance"]
    rows, columns = state["row_var"].squeeze(-1), state["col_var"].squeeze(-2)
    whole = rows.mean(-1).clamp(min=eps)
    return torch.einsum("...r,...c,...->...rc", rows, columns, 1 / whole)


def relative_rate(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
    """Adafactor's rate of this step over lr: its step is `rate * lr * g / sqrt(V)`."""
    g, t = parameter.grad, float(state.get("step", 0)) + 1
    assert g is not None
    share, eps = t ** group["beta2_decay"], group["eps"][0] or torch.finfo(torch.float32).eps
    after = {}
    for name, dims in (("row_var", -1), ("col_var", -2)) if g.dim() > 1 else (("variance", ()),):
        mean = (g**2).mean(dims, keepdim=True) if dims else g**2
        after[name] = (1 - share) * state.get(name, 0.0) + share * mean
    u = g / adafactor_moment(after, eps).sqrt().clamp(min=eps)
    root = [float((x**2).mean().sqrt()) for x in (parameter.detach(), u)]
    rate = max(group["eps"][1], root[0]) * min(group["lr"], t**-0.5)
    return rate / max(1.0, root[1] / group["d"]) / group["lr"]


def measured(kind: Kind, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
    """The factor of the next step that depends on values."""
    zeros = torch.zeros_like(p)
    if kind is T.Muon:
        return nearest_multiple(p, group, state.get("momentum_buffer", zeros))
    if kind is Lion:
        beta1 = group["betas"][0]
        used = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * p.grad
        return float(used.abs().sum() / used.norm() ** 2)
    if kind is Lars:
        return Lars.rate(p, group).item()
    return relative_rate(p, group, state) if kind is T.Adafactor else 1.0


def by_loop(pipeline: Pipeline, factored: list[str]) -> np.ndarray:
    """Relevance of a new pipeline: its training in float64 by torch's own optimiser on batch-of-one
    gradients, and d theta / d w_i of every sample carried forward beside it. D is that of the end.
    """
    optimizer = pipeline.optimizer
    several = getattr(optimizer, "optimizers", [optimizer])
    model = in_float64(pipeline.model)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    twin = dict(zip(pipeline.model.parameters(), names, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [parameters[twin[p]] for p in group["params"]]
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    kind_of = {p: type(one) for one in several for g in one.param_groups for p in g["params"]}
    # Adagrad has made its state already
    for old in list(optimizer.state):
        state = optimizer.state.pop(old)
        optimizer.state[parameters[twin[old]]] = {
            key: value.double() if key == "sum" else value for key, value in state.items()
        }
    inputs, targets = pipeline.train.tensors
    moved = {n: Moved(parameters[n].new_zeros(len(inputs), *parameters[n].shape)) for n in names}
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    for t, ids in enumerate(order, start=1):
        rows = one_by_one_gradients(model, pipeline.loss, inputs[ids].double(), targets[ids], names)
        for n in names:
            parameters[n].grad = sum(row[n] for row in rows) / len(ids)
        before = parameters[names[0]].grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), pipeline.max_grad_norm)
        clip = float((parameters[names[0]].grad / before).mean())
        for n in names:
            changed = torch.zeros_like(moved[n].theta)
            for i, row in zip(ids, rows, strict=True):
                changed[i] = sign * clip * row[n] / len(ids)
            p = parameters[n]
            group, own = group_of[p], optimizer.state.get(p, {})
            multiple = measured(kind_of[p], p, group, own)
            moved[n].step(kind_of[p], group, t, changed, multiple)
        optimizer.step()
        pipeline.scheduler.step()
    root = {}
    for n in names:
        own = optimizer.state[parameters[n]]
        kind = kind_of[parameters[n]]
        root[n] = dividing(kind, group_of[parameters[n]], own).rsqrt().expand_as(parameters[n])
    if not all(one in (T.SGD, Lion, Lars) for one in kind_of.values()):
        root |= nearest_outer_products(root, factored)
    test_inputs, test_targets = pipeline.test.tensors
    tests = one_by_one_gradients(model, pipeline.loss, test_inputs.double(), test_targets, names)
    relevance = np.zeros((len(inputs), len(tests)))
    for j, test in enumerate(tests):
        for n in names:
            adjoint = (root[n] ** 2 * test[n]).flatten()
            relevance[:, j] -= (moved[n].theta.detach().flatten(1) @ adjoint).numpy()
    return relevance


@pytest.mark.parametrize("case", CASES)
def test_relevance_equals_the_float64_loop_through_the_optimisers_own_update(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    muon_without_rounding(monkeypatch)
    hydra_pipe.record(pipeline_of(case), tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    run = hydra_pipe.open_run(tmp_path / "run")
    factored = [b.name for b in run.gradients.layout.blocks if b.inputs is not None]
    assert factored
    expected = by_loop(pipeline_of(case), factored)
    assert relative_error(np.asarray(run.relevance("hydra")), expected) < 1e-4
    assert hydra_pipe.verify(tmp_path / "run") == []


@pytest.mark.parametrize("case", CASES)
def test_rows_are_batch_of_one_gradients_and_weights_those_of_training_without_recording(
    case: str, tmp_path: Path
) -> None:
    plain, recorded = pipeline_of(case, epochs=1), pipeline_of(case, epochs=1)
    untrained = pipeline_of(case)
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run", encoding="exact", dtype="float32")
    assert all(map(torch.equal, plain.model.parameters(), recorded.model.parameters()))
    samples, rows = stored_rows(tmp_path / "run")
    first = epoch_order(untrained, 0)[0]
    inputs, targets = (values[first] for values in untrained.train.tensors)
    names = [name for name, _ in untrained.model.named_parameters()]
    alone = one_by_one_gradients(untrained.model, untrained.loss, inputs, targets, names)
    truth = {
        int(i): {n: g / len(first) for n, g in r.items()} for i, r in zip(first, alone, strict=True)
    }
    rows = rows[: len(first)]
    assert sorted(samples[: len(first)]) == sorted(truth)
    whole = [{n: g.flatten() for n, g in truth[i].items()} for i in samples[: len(first)]]
    assert max(differences(rows, whole).values()) < 1e-4


def test_climbing_in_a_pipeline_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(RecordWarning, match="maximize=True, so a large loss of a test sample"):
        hydra_pipe.record(pipeline_of("climbing by SGD", epochs=1), tmp_path / "run")


def test_climbing_is_descending_the_negative_of_the_loss(tmp_path: Path) -> None:
    """Rows and test gradients change their sign, and the gradient in use does not."""
    climbing, descending = pipeline_of("climbing by AdamW"), pipeline_of("climbing by AdamW")
    descending.loss = cross_entropy
    for group in descending.optimizer.param_groups:
        group["maximize"] = False
    found = {}
    for name, pipeline in (("up", climbing), ("down", descending)):
        hydra_pipe.record(pipeline, tmp_path / name, encoding="exact", dtype="float32")
        for method in ("hydra", "hydra-fisher", "influence", "grad-dot", "self", "tracin"):
            hydra_pipe.reduce(tmp_path / name, method=method)
        run = hydra_pipe.open_run(tmp_path / name)
        found[name] = {
            m: np.asarray(run.relevance(m))
            for m in ("hydra", "hydra-fisher", "influence", "grad-dot", "tracin")
        }
        found[name]["self"] = (
            -np.asarray(run.relevance("self"))
            if name == "up"
            else np.asarray(run.relevance("self"))
        )
        assert (run.steps["gradient_scale"] < 0).all() == (name == "up")
    for method, down in found["down"].items():
        assert relative_error(-found["up"][method], down) < 1e-4, method


def test_groups_that_climb_beside_groups_that_descend_are_refused(tmp_path: Path) -> None:
    model = conv_net()
    one, *others = model.parameters()
    optimizer = T.SGD([{"params": [one], "maximize": True}, {"params": others}], lr=0.1)
    with pytest.raises(OptimizerError, match="give all groups the same"):
        Recorder(model, optimizer, tmp_path / "run", n_samples=4)


def test_radam_that_never_uses_its_second_moment_is_refused(tmp_path: Path) -> None:
    model = conv_net()
    optimizer = T.RAdam(model.parameters(), betas=(0.9, 0.6))
    with pytest.raises(OptimizerError, match=r"raise beta2 above 2/3, or use torch\.optim\.SGD"):
        Recorder(model, optimizer, tmp_path / "run", n_samples=4)


def test_lions_whose_averages_are_another_are_refused(tmp_path: Path) -> None:
    model = conv_net()
    with pytest.raises(OptimizerError, match=r"betas \(0\.99, 0\.9\): LionRule follows averages"):
        Recorder(
            model,
            Lion(model.parameters(), lr=1e-3, betas=(0.99, 0.9)),
            tmp_path / "run",
            n_samples=4,
        )
