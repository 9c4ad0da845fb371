"""Losses that mix the samples of a batch are refused, whatever shows the mixing; others are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import differences, gradients_of_losses, stored_rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hydra_pipe import Recorder
from hydra_pipe.errors import LayerError

# samples, features, classes
B, D, C = 6, 8, 3
X = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 1])
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])


class Net(nn.Module):
    """Logits, and features that a second head makes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.features = nn.Linear(D, D), nn.Linear(D, C), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"logits": self.head(hidden), "features": self.features(hidden)}


def cross_entropy(output: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output["logits"], Y, reduction="none") / B


def distances(output: dict[str, Tensor]) -> Tensor:
    """The hardest positive and the hardest negative of each anchor."""
    apart = torch.cdist(output["logits"], output["logits"])
    same = Y[:, None] == Y[None]
    return ((apart * same).max(1).values - (apart + 99 * same).min(1).values + 1).relu() / B


def ranking(output: dict[str, Tensor]) -> Tensor:
    scores = output["logits"][:, 0]
    return (1 - scores[:, None] + scores[None]).relu().mean(1) / B


def listed_pairs(output: dict[str, Tensor]) -> Tensor:
    scores = output["logits"][:, 0]
    margins = (2 - scores[torch.tensor([0, 1, 2, 4])] + scores[torch.tensor([3, 2, 5, 0])]).relu()
    return torch.zeros(B).index_add(0, torch.tensor([0, 1, 2, 4]), margins)


def city_block(output: dict[str, Tensor]) -> Tensor:
    z = output["logits"]
    positive, negative = ((z - z.roll(k, 0)).abs().sum(1) for k in (3, 1))
    return (positive - negative + 9).relu() / B


def of_features(output: dict[str, Tensor]) -> Tensor:
    z = F.normalize(output["features"], dim=1)
    return cross_entropy(output) + F.cross_entropy(z @ z.T, torch.arange(B), reduction="none") / B


def step(
    run: Path, losses: Callable[[dict[str, Tensor]], Tensor], total: Callable[[Tensor], Tensor]
) -> Net:
    """Record one step; return the model as it was before."""
    torch.manual_seed(0)
    model, before = Net(), Net()
    before.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        Recorder(model, optimizer, run, B, encoding="exact", dtype="float32") as recorder,
        recorder.step(range(B)),
    ):
        total(losses(model(X))).backward()
        optimizer.step()
    return before


@pytest.mark.parametrize("losses", [distances, ranking, listed_pairs, city_block, of_features])
def test_a_loss_that_mixes_samples_is_refused_without_a_second_derivative_and_in_any_output(
    losses: Callable[[dict[str, Tensor]], Tensor], tmp_path: Path
) -> None:
    with pytest.raises(LayerError, match="depends on the outputs of others"):
        step(tmp_path / "run", losses, torch.sum)
    assert not (tmp_path / "run").exists()


class Sum(torch.autograd.Function):
    """A sum that cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        ctx.size = losses.shape
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(ctx.size)


def test_a_loss_that_cannot_be_looked_into_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def inside(output: dict[str, Tensor]) -> Tensor:
        return Sum.apply(output["logits"].square() / B)

    step(tmp_path / "outside", cross_entropy, torch.sum)
    assert "whether it mixes" not in caplog.text
    step(tmp_path / "inside", inside, torch.sum)
    assert "whether it mixes the samples of the batch shows in its second derivative" in caplog.text


def of_groups(losses: Tensor) -> Tensor:
    return torch.zeros(3).index_add(0, GROUPS, losses).mul(torch.tensor([1.0, 2.0, 3.0])).sum()


@pytest.mark.parametrize(
    ("total", "weights"),
    [
        (of_groups, 1.0 + GROUPS),
        (lambda losses: losses.cumsum(0).sum(), torch.arange(B, 0, -1)),
        (lambda losses: (torch.outer(losses, torch.ones(2)) / 2).sum().mul(3), torch.tensor(3)),
        (lambda losses: losses.topk(B).values.sum(), torch.tensor(1)),
    ],
    ids=["groups", "cumulated", "outer", "sorted"],
)
def test_a_sum_of_losses_may_be_taken_in_any_way(
    total: Callable[[Tensor], Tensor], weights: Tensor, tmp_path: Path
) -> None:
    def both(output: dict[str, Tensor]) -> Tensor:
        return cross_entropy(output) + output["features"].square().mean(1) / B

    model = step(tmp_path / "run", both, total)
    truth = gradients_of_losses(weights * both(model(X)), dict(model.named_parameters()))
    samples, rows = stored_rows(tmp_path / "run")
    assert max(differences(rows, [truth[k] for k in samples]).values()) < 1e-4
