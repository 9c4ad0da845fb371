"""Small real runs that many tests look at."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline
from hydra_pipe.store.files import remove

ROOT = Path(__file__).parents[1]

# a shell ignores it in what runs in the background, and then so do the commands that tests start to interrupt them
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # pytest-xdist runs several processes on the same cores


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def images(n: int, seed: int, size: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (n,), generator=generator)
    inputs = torch.rand(n, 1, size, size, generator=generator) + targets[:, None, None, None] / 4
    return TensorDataset(inputs, targets)


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.LayerNorm(12),
        nn.Tanh(),
        nn.Linear(12, 4),
    )


def conv_pipeline(epochs: int = 3, n_train: int = 26, n_test: int = 7, seed: int = 0, **changes: object) -> Pipeline:
    """A conv net with everything SGD has: two parameter groups, Nesterov, weight decay, cosine, clipping, a short batch."""
    model = conv_net(seed)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [
            {"params": weights, "weight_decay": 0.05, "nesterov": True, "momentum": 0.8},
            {"params": others, "lr": 0.2, "momentum": 0.5, "dampening": 0.3},
        ],
        lr=0.1,
    )
    steps = epochs * -(-n_train // 8)
    fields: dict[str, object] = {
        "model": model,
        "optimizer": optimizer,
        "loss": cross_entropy,
        "train": images(n_train, 1),
        "test": images(n_test, 2),
        "batch_size": 8,
        "epochs": epochs,
        "seed": seed,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "max_grad_norm": 0.5,
    }
    return Pipeline(**(fields | changes))


def mlp_pipeline(epochs: int = 2, n_train: int = 40, n_test: int = 9, seed: int = 0, **changes: object) -> Pipeline:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    fields: dict[str, object] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss": cross_entropy,
        "train": images(n_train, 1),
        "test": images(n_test, 2),
        "batch_size": 8,
        "epochs": epochs,
        "seed": seed,
    }
    return Pipeline(**(fields | changes))


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A recorded run of `conv_pipeline`, once for each set of options; tests copy it before they change it."""
    import hydra_pipe

    made: dict[tuple[tuple[str, object], ...], Path] = {}

    def record(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            hydra_pipe.record(conv_pipeline(), made[key], **options)
        return made[key]

    return record


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data sets; `.ci/run` says where they are."""
    where = os.environ.get("HYDRA_PIPE_DATA")
    if not where:
        pytest.skip("HYDRA_PIPE_DATA does not name the shared data sets")
    return Path(where)


def forked(target: Callable[..., object], *args: object, **options: object) -> BaseProcess:
    """Start another process for `target`. It has imported what this one has: torch alone takes seconds, its optimisers more."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, kwargs=options)
    with warnings.catch_warnings():
        # said since Python 3.12 where there are other threads: none of them holds what the target needs
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        process.start()
    return process


def killed_after(n: int) -> Callable[[Path], None]:
    """`hydra_pipe.store.files.remove`, which does it n times and is then interrupted."""
    left = n

    def killed(path: Path) -> None:
        nonlocal left
        if not left:
            raise InterruptedError
        left -= 1
        remove(path)

    return killed


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
