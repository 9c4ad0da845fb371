"""Fashion-MNIST and LeNet-5: 28x28 pictures of clothes, ten classes."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def lenet5() -> nn.Module:
    """LeNet-5 with ReLU and max pooling: 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of the MNIST files, gzipped."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load(data: Path, part: str, count: int) -> TensorDataset:
    """The first `count` pictures of `part` ("train" or "t10k"), shape (count, 1, 28, 28) in [0, 1],
    and their labels.
    """
    images = read_idx(data / f"{part}-images-idx3-ubyte.gz")[:count]
    labels = read_idx(data / f"{part}-labels-idx1-ubyte.gz")[:count]
    return TensorDataset(
        torch.tensor(images)[:, None] / 255, torch.tensor(labels, dtype=torch.int64)
    )


def flip(labels: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """`labels` of ten classes with a fraction `noise` of them changed, each to another class."""
    generator = np.random.default_rng([seed, 1])
    wrong = torch.from_numpy(
        generator.choice(len(labels), round(noise * len(labels)), replace=False)
    )
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + torch.from_numpy(generator.integers(1, 10, len(wrong)))) % 10
    return changed


def named(labels: torch.Tensor) -> list[str]:
    """Of each label the name of its class."""
    return [CLASSES[label] for label in labels.tolist()]


def pipeline(
    data: Path = Path("data/fashion-mnist"),
    n_train: int = 20_000,
    n_test: int = 500,
    epochs: int = 5,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    noise: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Pipeline:
    """LeNet-5 on Fashion-MNIST by SGD with momentum and a cosine schedule.

    Args:
        data: directory of the four IDX files, gzipped, as they are distributed.
        n_train: training pictures, the first of the file.
        n_test: test pictures, the first of the file.
        epochs: passes over the training pictures.
        lr: learning rate at the first step; it falls to 0 along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        noise: fraction of training labels that are changed to another class.
        batch_size: pictures a step.
        seed: of the weights, the noise and the order.
    """
    train, test = load(data, "train", n_train), load(data, "t10k", n_test)
    images, labels = train.tensors
    given = flip(labels, noise, seed)
    model = lenet5()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    steps = epochs * -(-n_train // batch_size)
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(images, given),
        test=test,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        sample_labels=named(given),
        test_labels=named(test.tensors[1]),
        true_labels=named(labels) if noise > 0 else None,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )
