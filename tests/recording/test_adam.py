"""Adam and AdamW: the symmetrically preconditioned recursion, against float64 loops that know
nothing of the code.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import in_float64, nearest_outer_products, one_by_one_gradients
from scipy.stats import spearmanr
from support.compare import relative_error
from support.pipelines import conv_net, conv_pipeline, cross_entropy, mlp_pipeline
from torch import nn

import hydra_pipe
from hydra_pipe import OptimizerRule, Pipeline, Recorder, register_optimizer_rule
from hydra_pipe.errors import OptimizerError
from hydra_pipe.recording import optimizers
from hydra_pipe.training.batches import epoch_order


def adam_pipeline(kind: type[torch.optim.Optimizer], **changes: object) -> Pipeline:
    model = conv_net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": weights, "weight_decay": 0.1},
        {"params": others, "lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    fields = {
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        "max_grad_norm": 0.5,
    }
    return conv_pipeline(model=model, optimizer=optimizer, **(fields | changes))


def adam_oracle(pipeline: Pipeline, factored: Sequence[str] = ()) -> np.ndarray:
    """Relevance of a new pipeline: its training repeated by the formulas of Adam, rows and sweep on
    whole float64 vectors. D is that of the end; of `factored` weights, and biases that share their
    columns, it is the nearest outer product.
    """
    model = in_float64(pipeline.model)
    names = [name for name, _ in model.named_parameters()]
    old = dict(zip(pipeline.model.parameters(), names, strict=True))
    group_of = {old[p]: group for group in pipeline.optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    decoupled = isinstance(pipeline.optimizer, torch.optim.AdamW)
    base = {name: group_of[name]["lr"] for name in names}
    inputs, targets = pipeline.train.tensors
    first = {name: torch.zeros_like(parameters[name]) for name in names}
    second = {name: torch.zeros_like(parameters[name]) for name in names}
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    steps = []
    for t, ids in enumerate(order, start=1):
        rows = one_by_one_gradients(model, cross_entropy, inputs[ids].double(), targets[ids], names)
        gradient = {n: sum(row[n] for row in rows) / len(ids) for n in names}
        norm = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = (
            min(1.0, pipeline.max_grad_norm / (float(norm) + 1e-6))
            if pipeline.max_grad_norm
            else 1.0
        )
        anneal = 0.5 * (1 + np.cos(np.pi * (t - 1) / 12)) if pipeline.scheduler is not None else 1.0
        rate = {}
        with torch.no_grad():
            for n in names:
                group = group_of[n]
                (beta1, beta2), decay = group["betas"], group["weight_decay"]
                rate[n] = base[n] * anneal
                used = clip * gradient[n] + (0.0 if decoupled else decay) * parameters[n]
                first[n] = beta1 * first[n] + (1 - beta1) * used
                second[n] = beta2 * second[n] + (1 - beta2) * used**2
                preconditioner = 1 / (torch.sqrt(second[n] / (1 - beta2**t)) + group["eps"])
                if decoupled:
                    parameters[n].mul_(1 - rate[n] * decay)
                parameters[n].sub_(rate[n] / (1 - beta1**t) * preconditioner * first[n])
        steps.append((ids, [{n: row[n] * clip / len(ids) for n in names} for row in rows], rate))
    root = {}
    for n in names:
        beta2, eps = group_of[n]["betas"][1], group_of[n]["eps"]
        root[n] = 1 / torch.sqrt(torch.sqrt(second[n] / (1 - beta2 ** len(steps))) + eps)
    root |= nearest_outer_products(root, factored)
    tests = one_by_one_gradients(
        model, cross_entropy, pipeline.test.tensors[0].double(), pipeline.test.tensors[1], names
    )
    relevance = np.zeros((len(inputs), len(tests)))
    for j, test in enumerate(tests):
        for n in names:
            group = group_of[n]
            beta1, decay = group["betas"][0], group["weight_decay"]
            adjoint, momentum = root[n] ** 2 * test[n], torch.zeros_like(test[n])
            for t in range(len(steps), 0, -1):
                ids, rows, rate = steps[t - 1]
                momentum = momentum - rate[n] / (1 - beta1**t) * adjoint
                g = (1 - beta1) * momentum
                for sample, row in zip(ids, rows, strict=True):
                    relevance[sample, j] -= float((g * row[n]).sum())
                adjoint = (1 - rate[n] * decay) * adjoint if decoupled else adjoint + decay * g
                momentum = beta1 * momentum
    return relevance


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_relevance_equals_the_float64_loop_of_the_same_recursion(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    hydra_pipe.record(adam_pipeline(kind), tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    run = hydra_pipe.open_run(tmp_path / "run")
    factored = [b.name for b in run.gradients.layout.blocks if b.inputs is not None]
    assert factored
    expected = adam_oracle(adam_pipeline(kind), factored)
    assert relative_error(np.asarray(run.relevance("hydra")), expected) < 1e-4
    exact = adam_oracle(adam_pipeline(kind))
    assert spearmanr(exact.ravel(), expected.ravel()).statistic > 0.97


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("encoding", ["exact", "projected"])
def test_weights_are_those_of_training_without_recording(
    tmp_path: Path, kind: type[torch.optim.Optimizer], encoding: str
) -> None:
    plain, recorded = adam_pipeline(kind), adam_pipeline(kind)
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run", encoding=encoding, dim=200)
    assert all(map(torch.equal, plain.model.parameters(), recorded.model.parameters()))


def test_a_projection_keeps_the_preconditioned_relevance_on_the_whole(tmp_path: Path) -> None:
    hydra_pipe.record(adam_pipeline(torch.optim.AdamW), tmp_path / "exact", encoding="exact")
    hydra_pipe.record(
        adam_pipeline(torch.optim.AdamW), tmp_path / "projected", encoding="projected", dim=400
    )
    for run in ("exact", "projected"):
        hydra_pipe.reduce(tmp_path / run, method="hydra")
    exact, projected = (
        np.asarray(hydra_pipe.open_run(tmp_path / r).relevance("hydra")).ravel()
        for r in ("exact", "projected")
    )
    assert np.corrcoef(exact, projected)[0, 1] > 0.8


def test_a_parameter_that_trains_now_and_then_counts_its_own_updates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"always": nn.Linear(3, 3), "sometimes": nn.Linear(3, 3)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=4, encoding="exact")
    for step in range(4):
        with recorder.step(np.arange(4)):
            x = model["always"](torch.ones(4, 3))
            (model["sometimes"](x) if step % 2 else x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    factors = hydra_pipe.open_run(tmp_path / "run").steps["step_factor"]
    np.testing.assert_allclose(factors[:, 0], [1 / (1 - 0.9**t) for t in (1, 2, 3, 4)])
    np.testing.assert_allclose(factors[[1, 3], 2], [1 / (1 - 0.9**t) for t in (1, 2)])


def test_a_constant_gradient_before_a_norm_does_not_unbalance_adams_books(tmp_path: Path) -> None:
    """Adam blows rounding up to steps of full size; the books are held before that."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    pipeline = mlp_pipeline(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))
    hydra_pipe.record(pipeline, tmp_path / "run")


class Lion(torch.optim.SGD):
    """A subclass that may do anything."""


def test_an_optimizer_of_ones_own_is_refused_until_it_is_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "_RULES", dict(optimizers._RULES))

    def pipeline() -> Pipeline:
        made: Callable[..., Pipeline] = mlp_pipeline
        built = made()
        built.optimizer = Lion(built.model.parameters(), lr=0.1, momentum=0.9)
        return built

    with pytest.raises(OptimizerError, match=r"Lion is not handled.*register_optimizer_rule"):
        hydra_pipe.record(pipeline(), tmp_path / "run")
    register_optimizer_rule(Lion, optimizers.SgdRule())
    hydra_pipe.record(pipeline(), tmp_path / "taught", encoding="exact", dtype="float32")
    hydra_pipe.record(mlp_pipeline(), tmp_path / "sgd", encoding="exact", dtype="float32")
    for run in ("taught", "sgd"):
        hydra_pipe.reduce(tmp_path / run, method="hydra")
    taught, sgd = (
        np.asarray(hydra_pipe.open_run(tmp_path / run).relevance("hydra"))
        for run in ("taught", "sgd")
    )
    np.testing.assert_array_equal(taught, sgd)
    with pytest.raises(
        OptimizerError,
        match="Lion has the rule SgdRule already; OptimizerRule cannot be registered",
    ):
        register_optimizer_rule(Lion, OptimizerRule())
