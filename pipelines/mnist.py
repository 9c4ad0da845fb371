"""MNIST digits, 28x28: an MLP without loss of information, or LeNet-5, and labels flipped on
purpose.
"""

from pathlib import Path
from typing import Literal

import torch
from fashion_mnist import flip, lenet5, load
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline


def pipeline(
    data: Path = Path("data/mnist"),
    network: Literal["mlp", "lenet5"] = "mlp",
    n_train: int = 20_000,
    n_test: int = 500,
    epochs: int = 5,
    lr: float = 0.05,
    momentum: float = 0.9,
    noise: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Pipeline:
    """An MLP 784-256-128-10 or LeNet-5 on MNIST by SGD with momentum.

    Args:
        data: directory of the four IDX files, gzipped, as they are distributed.
        network: "mlp" or "lenet5".
        n_train: training digits, the first of the file.
        n_test: test digits, the first of the file.
        epochs: passes over the training digits.
        lr: learning rate.
        momentum: of SGD.
        noise: fraction of training labels that are changed to another digit.
        batch_size: digits a step.
        seed: of the weights, the noise and the order.
    """
    train, test = load(data, "train", n_train), load(data, "t10k", n_test)
    images, labels = train.tensors
    mlp = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    model = mlp if network == "mlp" else lenet5()
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(images, flip(labels, noise, seed)),
        test=test,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        true_labels=labels.tolist() if noise > 0 else None,
    )
