"""Trainings of a moment, which many tests record."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

# several processes run tests on the same cores, and start others, which build these pipelines too
torch.set_num_threads(1)


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def likelihood(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What an optimiser with maximize=True raises."""
    return -cross_entropy(output, target)


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


def conv_pipeline(
    epochs: int = 3, n_train: int = 26, n_test: int = 7, seed: int = 0, **changes: object
) -> Pipeline:
    """A conv net with everything SGD has: two parameter groups, Nesterov, weight decay, cosine,
    clipping, a short batch.
    """
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


def mlp_pipeline(
    epochs: int = 2, n_train: int = 40, n_test: int = 9, seed: int = 0, **changes: object
) -> Pipeline:
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
