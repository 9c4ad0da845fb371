"""Batches in another order than their ids: told whatever the width of a sample, before a row is
written.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from hydra_pipe import Recorder
from hydra_pipe.errors import RecordError

N = 8
ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
Samples = list[Any]


def drawn(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, width, generator=generator), torch.arange(N) % 3


def record(
    run: Path,
    width: int,
    collate: Callable[[Samples], Any] | None = None,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y),
) -> None:
    x, y = drawn(width)
    model = nn.Linear(width, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, run, n_samples=N) as recorder:
        for batch in recorder.track(DataLoader(TensorDataset(x, y), N, collate_fn=collate)):
            inputs, targets = change(*batch)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()


def sorts(samples: Samples) -> Any:
    samples.sort(key=lambda sample: float(sample[0][0]))
    return default_collate(samples)


def reverses(samples: Samples) -> Any:
    samples.reverse()
    return default_collate(samples)


def shuffles(samples: Samples) -> Any:
    random.Random(0).shuffle(samples)
    return default_collate(samples)


def sorts_a_copy(samples: Samples) -> Any:
    return default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))


@pytest.mark.parametrize("collate", [sorts, reverses, shuffles, sorts_a_copy])
def test_a_collate_function_that_moves_samples_is_refused(
    tmp_path: Path, collate: Callable[[Samples], Any]
) -> None:
    with pytest.raises(RecordError, match="in another order than its samples were drawn in"):
        record(tmp_path / "run", 6, collate)
    assert not (tmp_path / "run").exists()


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "scaled": lambda x: 3 * x + 1,
    "normalised": normalized,
    "in double precision and back": lambda x: x.double().float(),
    "with little noise": lambda x: x + 1e-5 * torch.ones_like(x).cumsum(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("width", [3, 6, 200])
def test_a_batch_that_the_loop_permutes_is_refused(tmp_path: Path, width: int, change: str) -> None:
    with pytest.raises(RecordError, match="the batch is permuted between the loader and the model"):
        record(
            tmp_path / "run",
            width,
            change=lambda x, y: (CHANGES[change](x)[ORDER], y[ORDER]),
        )


def test_a_batch_of_two_values_that_the_loop_permutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="the batch is permuted"):
        record(tmp_path / "run", 2, change=lambda x, y: (x[ORDER], y[ORDER]))


KEPT: dict[str, Callable[[Tensor], Tensor]] = CHANGES | {
    "turned round": lambda x: -x,
    "columns in another order": lambda x: x.flip(1),
    "drawn": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("change", KEPT)
@pytest.mark.parametrize("width", [1, 2, 6, 200])
def test_a_batch_that_keeps_its_order_is_recorded(tmp_path: Path, width: int, change: str) -> None:
    record(tmp_path / "run", width, change=lambda x, y: (KEPT[change](x), y))


def test_values_that_are_turned_round_are_not_permuted(tmp_path: Path) -> None:
    """Times from 0 to 1 backwards, and the other of two classes."""
    times = torch.linspace(0, 1, N)[:, None]
    for x, change in (
        (times, lambda x: 1 - x),
        (torch.cat([times > 0.5, times < 0.5], 1).float(), lambda x: 1 - x),
    ):
        model = nn.Linear(x.shape[1], 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = tmp_path / str(x.shape[1])
        with Recorder(model, optimizer, run, n_samples=N) as recorder:
            for (batch,) in recorder.track(DataLoader(TensorDataset(x), N)):
                F.cross_entropy(model(change(batch)), torch.arange(N) % 3).backward()
                optimizer.step()
