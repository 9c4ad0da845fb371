"""The training of the archived runs: ten samples, two with a wrong label, and three tests. It must
never change.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

N_TRAIN, N_TEST, N_NEW = 10, 3, 2
WRONG = (2, 7)


def samples(n: int, first: int) -> TensorDataset:
    """Images whose brightness tells their label, with noise that is a formula: no generator of any
    library's version.
    """
    numbers = torch.arange(first, first + n)
    labels = numbers % 3
    noise = torch.remainder(torch.arange(n * 36).reshape(n, 1, 6, 6) * 37 + first * 11, 101) / 101
    return TensorDataset(noise + labels[:, None, None, None] / 2, labels)


def new_samples() -> TensorDataset:
    """Samples of the probe `new`."""
    return samples(N_NEW, 100)


def pipeline(seed: int = 0) -> Pipeline:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.remainder(torch.arange(parameter.numel()) * 53 + 7 + seed, 89) / 89 - 0.5
            parameter.copy_(values.reshape(parameter.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    images, labels = samples(N_TRAIN, 0).tensors
    recorded = [
        (int(label) + 1) % 3 if i in WRONG else int(label) for i, label in enumerate(labels)
    ]
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(images, torch.tensor(recorded)),
        test=samples(N_TEST, 50),
        batch_size=4,
        epochs=2,
        seed=seed,
        true_labels=labels.tolist(),
    )


def keyed(seed: int = 0) -> Pipeline:
    """The same with keys of the samples."""
    return replace(
        pipeline(seed),
        sample_keys=[f"train/{i}.png" for i in range(N_TRAIN)],
        test_keys=[f"test/{i}.png" for i in range(N_TEST)],
    )


def adam(seed: int = 0) -> Pipeline:
    """The same with AdamW: rows are preconditioned."""
    made = pipeline(seed)
    made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.01, weight_decay=0.1)
    return made
