"""Every layer rule in every encoding, from losses of both reductions to rows on disk, against
batch-of-one gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import in_float64, one_by_one_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_pipe
from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.plan import layout
from hydra_pipe.plan.layout import Block
from hydra_pipe.store.data.gradients import Gradients

BATCH, CLASSES = 4, 3
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Case:
    """A module and what it is fed.

    Args:
        make: the module, new.
        shape: of one sample's input.
        tokens: whether inputs are whole numbers below 5.
        shares: whether rows are shares of the batch gradient, with no meaning by themselves.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    shares: bool = False


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class WithoutRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.gain


def after_some_training(module: nn.Module, *shape: int) -> nn.Module:
    module(torch.randn(8, *shape))
    return module.eval()


CASES = {
    "Linear": Case(lambda: nn.Linear(6, 5), (6,)),
    "Linear, several positions": Case(lambda: nn.Linear(6, 5), (2, 3, 6)),
    "Linear without bias": Case(lambda: nn.Linear(6, 5, bias=False), (6,)),
    "Conv1d": Case(lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 6)),
    "Conv2d": Case(lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 5, 5)),
    "Conv2d, groups": Case(lambda: nn.Conv2d(2, 4, 3, groups=2), (2, 5, 5)),
    "Conv2d, one position": Case(lambda: nn.Conv2d(2, 4, 3), (2, 3, 3)),
    "Conv3d": Case(lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    "ConvTranspose2d": Case(lambda: nn.ConvTranspose2d(2, 3, 2, padding=1), (2, 3, 3)),
    "ConvTranspose3d, groups": Case(lambda: nn.ConvTranspose3d(2, 4, 2, groups=2), (2, 2, 2, 2)),
    "Embedding": Case(lambda: nn.Embedding(5, 4, padding_idx=0), (6,), tokens=True),
    "LayerNorm": Case(lambda: nn.LayerNorm(6), (3, 6)),
    "RMSNorm": Case(lambda: nn.RMSNorm(6), (3, 6)),
    "GroupNorm": Case(lambda: nn.GroupNorm(2, 6), (6, 3)),
    "InstanceNorm": Case(lambda: nn.InstanceNorm1d(6, affine=True), (6, 3)),
    "BatchNorm in eval mode": Case(lambda: after_some_training(nn.BatchNorm1d(6), 6, 3), (6, 3)),
    "BatchNorm in training": Case(lambda: nn.BatchNorm2d(6), (6, 2, 2), shares=True),
    "MultiheadAttention": Case(SelfAttention, (3, 4)),
    "LSTM": Case(lambda: nn.LSTM(3, 4, batch_first=True), (3, 3)),
    "GRU": Case(lambda: nn.GRU(3, 4, batch_first=True), (3, 3)),
    "no rule": Case(WithoutRule, (2, 4)),
}
# what a user may choose, and the columns that are given to it
CHOICES = {"exact": 4096, "auto": 12, "projected": 12}


class Classifier(nn.Module):
    """`body`, and a fixed map of its output to classes: nothing else to record."""

    def __init__(self, body: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.body = body
        with torch.no_grad():
            width = self._hidden(inputs[:2]).shape[1]
        self.register_buffer("readout", torch.randn(width, CLASSES))

    def _hidden(self, inputs: Tensor) -> Tensor:
        output = self.body(inputs)
        return (output[0] if isinstance(output, tuple) else output).flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._hidden(inputs) @ self.readout


def losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def assert_rows_are_those_of_the_oracle(
    case: Case, choice: str, run: Path, batch: int = BATCH
) -> None:
    """Record one step of each reduction, and compare what is on disk with gradients taken in
    float64 before each.
    """
    torch.manual_seed(0)
    shape = (len(REDUCTIONS), batch, *case.shape)
    inputs = torch.randint(0, 5, shape) if case.tokens else torch.randn(shape)
    targets = torch.randint(0, CLASSES, shape[:2])
    model = Classifier(case.make(), inputs[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hydra_pipe.Recorder(
        model,
        optimizer,
        run,
        n_samples=batch,
        encoding=choice,
        dim=CHOICES[choice],
        dtype="float32",
        seed=3,
    )
    truths = []
    for x, y, reduction in zip(inputs, targets, REDUCTIONS, strict=True):
        truths.append(true_rows(model, x, y, reduction, shares=case.shares))
        with recorder.step(range(batch)):
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    store = hydra_pipe.open_run(run).gradients
    assert store.layout.n_features <= CHOICES[choice]
    assert choice != "exact" or all(block.exact for block in store.layout.blocks)
    for step, truth in enumerate(truths):
        rows = slice(step * batch, (step + 1) * batch)
        for index, block in enumerate(store.layout.blocks):
            found, expected = (
                decoded(store, index, rows),
                projected(block, truth[block.name], store.layout.seed),
            )
            if case.shares:
                found, expected = found.sum(0), expected.sum(0)
            np.testing.assert_allclose(
                found, expected, rtol=1e-5, atol=2e-6, err_msg=f"{block.name} at step {step}"
            )


def true_rows(
    model: Classifier, inputs: Tensor, targets: Tensor, reduction: str, *, shares: bool
) -> dict[str, Tensor]:
    """Each sample's share of the batch gradient, shape (B, numel); where only the sum is known, all
    of it in the first row.
    """
    model = in_float64(model)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    parameters = dict(model.named_parameters())
    if shares:
        total = F.cross_entropy(model(inputs), targets, reduction=reduction)
        gradients = torch.autograd.grad(total, list(parameters.values()))
        return {
            name: g.flatten().unsqueeze(0) for name, g in zip(parameters, gradients, strict=True)
        }
    rows = one_by_one_gradients(model, losses, inputs, targets, list(parameters))
    divisor = len(inputs) if reduction == "mean" else 1
    return {
        name: torch.stack([row[name].flatten() for row in rows]) / divisor for name in parameters
    }


def decoded(store: Gradients, index: int, rows: slice) -> np.ndarray:
    """What docs/format.md makes of the columns of a block: (row, numel), or (row, k) where it is
    projected.
    """
    block = store.layout.blocks[index]
    values = store.rows.features(rows, slice(*block.columns)).astype(np.float64)
    if block.inputs is not None:
        inputs = store.rows.features(rows, slice(*block.inputs))
        values = np.einsum("ro,ri->roi", values, inputs).reshape(len(values), -1)
    return values * store.rows.scales(rows)[:, index, None]


def projected(block: Block, rows: Tensor, seed: int) -> np.ndarray:
    if not block.exact:
        if block.kron is not None:
            outputs, inputs, k_out, k_in = block.kron
            return Kron(seed, block.name, block.shape, k_out, k_in, (outputs, inputs))(rows).numpy()
        assert block.encoding == "sketch"
        rows = Sketch(seed, block.name, block.shape, block.columns[1] - block.columns[0])(rows)
    return rows.numpy()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_recorded_rows_are_each_samples_share(name: str, choice: str, tmp_path: Path) -> None:
    assert_rows_are_those_of_the_oracle(CASES[name], choice, tmp_path / "run")


@pytest.mark.parametrize("name", CASES)
def test_rows_too_large_to_be_written_out_are_projected_on_both_sides(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "LARGEST_WRITTEN_OUT", 0)
    assert_rows_are_those_of_the_oracle(CASES[name], "projected", tmp_path / "run")
    blocks = hydra_pipe.open_run(tmp_path / "run").gradients.layout.blocks
    if name.startswith(("Linear", "Conv")) and "groups" not in name:
        assert any(block.encoding == "kron" for block in blocks)


@st.composite
def cases_of_any_shape(draw: st.DrawFn) -> Case:
    i, o, n, kernel, stride = (draw(st.integers(1, high)) for high in (4, 5, 4, 2, 2))
    return draw(
        st.sampled_from(
            [
                Case(lambda: nn.Linear(i, o), (i,)),
                Case(lambda: nn.Linear(i, o), (n, i)),
                Case(lambda: nn.Conv2d(i, o, kernel, stride), (i, n + 1, n + 1)),
                Case(lambda: nn.Embedding(5, o), (n,), tokens=True),
            ]
        )
    )


@settings(max_examples=20, deadline=None)
@given(case=cases_of_any_shape(), choice=st.sampled_from(list(CHOICES)), batch=st.integers(1, 5))
def test_recorded_rows_of_any_shape_are_each_samples_share(
    case: Case, choice: str, batch: int
) -> None:
    with TemporaryDirectory() as directory:
        assert_rows_are_those_of_the_oracle(case, choice, Path(directory) / "run", batch)


@pytest.mark.parametrize("name", ["ConvTranspose2d", "Conv2d", "Linear, several positions"])
def test_a_layer_that_keeps_samples_apart_is_not_taken_for_one_that_mixes_them(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(BATCH, *CASES[name].shape), torch.randint(0, CLASSES, (BATCH,))
    model = Classifier(CASES[name].make(), inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hydra_pipe.Recorder(model, optimizer, tmp_path / "run", n_samples=BATCH)
    with recorder.step(range(BATCH)):
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    recorder.record_test([(inputs, targets)], losses)
    recorder.close()
    assert hydra_pipe.open_run(tmp_path / "run").gradients.test_rows(1).n_rows == BATCH
