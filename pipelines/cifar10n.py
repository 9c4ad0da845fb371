"""CIFAR-10 with labels that people gave (CIFAR-10N), and a small ResNet with BatchNorm."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., "Deep Residual Learning", 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm_one(self.one(x)), inplace=True)
        return F.relu(self.norm_two(self.two(hidden)) + self.shortcut(x), inplace=True)


def resnet(width: int = 16) -> nn.Module:
    """ResNet-8: a first convolution, three blocks, a classifier; 78,000 parameters at width 16."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def pixels(images: np.ndarray) -> Tensor:
    """Normalised pictures, shape (n, 3, 32, 32), from uint8 (n, 32, 32, 3)."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pipeline(
    data: Path = Path("data/cifar10"),
    labels: Literal["clean", "aggre", "worse"] = "aggre",
    n_train: int = 10_000,
    n_test: int = 500,
    epochs: int = 10,
    lr: float = 0.05,
    width: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> Pipeline:
    """A small ResNet on 10,000 pictures by SGD with momentum, weight decay and a cosine schedule.

    Args:
        data: directory of cifar10_subset_12k.npz.
        labels: "clean", or what people gave: "aggre" (majority of three), "worse" (the worst of
            three).
        n_train: training pictures, the first of the file.
        n_test: test pictures, spread over the ten classes.
        epochs: passes over the training pictures.
        lr: learning rate at the first step.
        width: channels of the first block.
        batch_size: pictures a step.
        seed: of the weights and the order.
    """
    with np.load(data / "cifar10_subset_12k.npz", allow_pickle=False) as file:
        name = "y_train" if labels == "clean" else f"y_train_{labels}"
        train = TensorDataset(
            pixels(file["x_train"][:n_train]),
            torch.from_numpy(file[name][:n_train].astype(np.int64)),
        )
        # the file is in order of class
        chosen = np.linspace(0, len(file["y_test"]) - 1, n_test).astype(int)
        classes = file["class_names"].tolist()
        truth = file["y_train"][:n_train].tolist()
        test = TensorDataset(
            pixels(file["x_test"][chosen]),
            torch.from_numpy(file["y_test"][chosen].astype(np.int64)),
        )
    model = resnet(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=train,
        test=test,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        sample_labels=[classes[label] for label in train.tensors[1].tolist()],
        test_labels=[classes[label] for label in test.tensors[1].tolist()],
        true_labels=[classes[label] for label in truth],
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs * -(-n_train // batch_size)
        ),
    )
