"""Several optimisers that train one model: in a loop of one's own, and as one optimiser."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.recordings import contents
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Recorder, SeveralOptimizers
from hydra_pipe.errors import OptimizerError, RecordError

N, BATCH = 12, 4
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
Optimizers = list[torch.optim.Optimizer]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def both(model: nn.Module) -> Optimizers:
    """Muon of the matrices, AdamW of the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def train(model: nn.Module, step: Callable[[torch.Tensor], Any]) -> None:
    """`step` of each batch of two epochs, after its backward pass."""
    for ids in torch.arange(N).repeat(2).split(BATCH):
        step(ids)


def in_a_loop(run: Path, *, as_one: bool) -> nn.Module:
    model = mlp()
    optimizers = both(model)
    together = SeveralOptimizers(optimizers)
    stepping: list[Any] = [together] if as_one else optimizers
    with Recorder(model, together if as_one else optimizers, run, n_samples=N) as recorder:

        def step(ids: torch.Tensor) -> None:
            with recorder.step(ids):
                F.cross_entropy(model(X[ids]), Y[ids]).backward()
                for one in stepping:
                    one.step()
                for one in stepping:
                    one.zero_grad()

        train(model, step)
        recorder.record_test(DataLoader(TensorDataset(X, Y), batch_size=N), F.cross_entropy)
    return model


def test_a_list_in_a_loop_is_recorded_as_one_optimizer_of_all_is(tmp_path: Path) -> None:
    plain = mlp()
    optimizers = both(plain)

    def step(ids: torch.Tensor) -> None:
        F.cross_entropy(plain(X[ids]), Y[ids]).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()

    train(plain, step)
    for as_one in (False, True):
        model = in_a_loop(tmp_path / str(as_one), as_one=as_one)
        assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert contents(tmp_path / "False") == contents(tmp_path / "True")
    run = hydra_pipe.open_run(tmp_path / "True")
    assert run.steps["learning_rate"].tolist() == [[0.02, 0.01]] * 6
    factors = dict(
        zip([b.name for b in run.gradients.layout.blocks], run.steps["step_factor"].T, strict=True)
    )
    np.testing.assert_allclose(factors["0.bias"], [1 / (1 - 0.9**t) for t in range(1, 7)])
    assert len(set(factors["0.weight"])) == 6  # measured at each step


def test_a_tracked_loader_takes_the_steps_of_several_optimizers(tmp_path: Path) -> None:
    model = mlp()
    optimizers = both(model)
    with Recorder(model, optimizers, tmp_path / "run", n_samples=N) as recorder:
        for inputs, targets in recorder.track(DataLoader(TensorDataset(X, Y), batch_size=BATCH)):
            for one in reversed(optimizers):
                one.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            for one in reversed(optimizers):  # in any order
                one.step()
    assert hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]["facts"]["n_steps"] == 3


def failing(run: Path, update: Callable[[Optimizers], Any], match: str) -> None:
    model = mlp()
    optimizers = both(model)
    recorder = Recorder(model, optimizers, run, n_samples=N)

    def step() -> None:
        with recorder.step(range(BATCH)):
            F.cross_entropy(model(X[:BATCH]), Y[:BATCH]).backward()
            update(optimizers)

    with pytest.raises(RecordError, match=match):
        step()


def test_an_optimizer_that_leaves_a_step_out_is_told(tmp_path: Path) -> None:
    failing(tmp_path / "one", lambda all_: all_[0].step(), "AdamW did not take step 0")

    def twice(optimizers: Optimizers) -> None:
        optimizers[0].step()
        optimizers[0].step()

    failing(tmp_path / "twice", twice, "AdamW did not take step 0")
    model = mlp()
    optimizers = both(model)
    recorder = Recorder(model, optimizers, tmp_path / "tracked", n_samples=N)
    for inputs, targets in recorder.track(DataLoader(TensorDataset(X, Y), batch_size=N)):
        F.cross_entropy(model(inputs), targets).backward()
        optimizers[1].step()
    with pytest.raises(RecordError, match="Muon did not take step 0"):
        recorder.close()


def test_gradients_that_change_between_the_steps_are_told(tmp_path: Path) -> None:
    def cleared(optimizers: Optimizers) -> None:
        optimizers[0].step()
        for one in optimizers:
            one.zero_grad()
        optimizers[1].step()

    def scaled(optimizers: Optimizers) -> None:
        optimizers[0].step()
        for group in optimizers[1].param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1e-3)
        optimizers[1].step()

    for name, update in (("cleared", cleared), ("scaled", scaled)):
        failing(tmp_path / name, update, r"a gradient of shape \(5,\) changed at step 0 after")


def test_a_closure_of_one_of_several_is_refused(tmp_path: Path) -> None:
    failing(
        tmp_path / "run", lambda all_: all_[0].step(lambda: 0.0), r"Muon\.step\(\) has a closure"
    )


def test_a_closure_of_all_is_called_once(tmp_path: Path) -> None:
    model = mlp()
    together = SeveralOptimizers(both(model))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(X[:BATCH]), Y[:BATCH])
        loss.backward()
        return loss

    with (
        Recorder(model, together, tmp_path / "run", n_samples=N) as recorder,
        recorder.step(range(BATCH)),
    ):
        assert together.step(closure).item() > 0
    assert len(calls) == 1
    assert hydra_pipe.open_run(tmp_path / "run").steps["updated"].all()


def test_what_several_optimizers_cannot_be(tmp_path: Path) -> None:
    model = mlp()
    optimizers = both(model)
    with pytest.raises(OptimizerError, match=r"both hold a parameter of shape \(5, 6\)"):
        Recorder(model, [optimizers[0], *optimizers], tmp_path / "run", n_samples=N)
    with pytest.raises(OptimizerError, match=r"torch\.optim\.Adadelta is not handled"):
        Recorder(
            model,
            [optimizers[0], torch.optim.Adadelta(model[0].parameters())],
            tmp_path / "run",
            n_samples=N,
        )
    with pytest.raises(OptimizerError, match="give the optimizer of the model's parameters"):
        Recorder(model, [], tmp_path / "run", n_samples=N)
    with pytest.raises(OptimizerError, match="there are no optimizers"):
        SeveralOptimizers([])


def test_a_state_and_a_copy_hold_all_of_several_optimizers(tmp_path: Path) -> None:
    model = mlp()
    together = SeveralOptimizers(both(model))
    F.cross_entropy(model(X), Y).backward()
    together.step()
    state = copy.deepcopy(together.state_dict())
    copied = copy.deepcopy(together)
    assert [type(one) for one in copied.optimizers] == [torch.optim.Muon, torch.optim.AdamW]
    assert len(copied.state) == 4
    other = SeveralOptimizers(both(mlp()))
    other.load_state_dict(state)
    for one, two in zip(together.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(OptimizerError, match="the state is of 2 optimizers, and there are 1"):
        SeveralOptimizers(both(mlp())[:1]).load_state_dict(state)
