"""Census incomes (UCI Adult): numbers and categories in a table, an MLP with embeddings, AdamW."""

import csv
import gzip
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

NUMBERS = (0, 2, 4, 10, 11, 12)
CATEGORIES = (1, 3, 5, 6, 7, 8, 9, 13)
COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
)
CLASSES = ("<=50K", ">50K")


class Tabular(nn.Module):
    """Embeddings of the categories beside the numbers, then two hidden layers.

    Args:
        sizes: values of each category, one embedding row each.
        n_numbers: columns of numbers, which come first in the input.
    """

    def __init__(
        self, sizes: list[int], n_numbers: int, width: int = 64, embedding: int = 8
    ) -> None:
        super().__init__()
        self.n_numbers = n_numbers
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding) for size in sizes)
        self.layers = nn.Sequential(
            nn.Linear(n_numbers + embedding * len(sizes), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        numbers, categories = x[:, : self.n_numbers], x[:, self.n_numbers :].long()
        embedded = [embed(categories[:, i]) for i, embed in enumerate(self.embeddings)]
        return self.layers(torch.cat([numbers, *embedded], dim=1))


def read(file: Path, count: int) -> list[list[str]]:
    """The first `count` rows of a gzipped CSV file without header."""
    with gzip.open(file, "rt") as lines:
        rows = [row for row in csv.reader(lines, skipinitialspace=True) if len(row) == 15]
    return rows[:count]


def pipeline(
    data: Path = Path("data/tabular"),
    n_train: int = 20_000,
    n_test: int = 500,
    epochs: int = 5,
    lr: float = 2e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> Pipeline:
    """Whether an income is above 50,000 dollars, by AdamW.

    Args:
        data: directory of adult.train.csv.gz and adult.test.csv.gz.
        n_train: training rows, the first of the file.
        n_test: test rows, the first of the file.
        epochs: passes over the training rows.
        lr: learning rate.
        batch_size: rows a step.
        seed: of the weights and the order.
    """
    train, test = (
        read(data / "adult.train.csv.gz", n_train),
        read(data / "adult.test.csv.gz", n_test),
    )
    values = [sorted({row[column] for row in train}) for column in CATEGORIES]
    # 0: not seen in training
    codes = [{value: code + 1 for code, value in enumerate(names)} for names in values]
    numbers = torch.tensor([[float(row[column]) for column in NUMBERS] for row in train])
    mean, spread = numbers.mean(0), numbers.std(0).clamp_min(1e-6)

    def dataset(rows: list[list[str]]) -> TensorDataset:
        scaled = (
            torch.tensor([[float(row[column]) for column in NUMBERS] for row in rows]) - mean
        ) / spread
        categories = torch.tensor(
            [[c.get(row[k], 0) for c, k in zip(codes, CATEGORIES, strict=True)] for row in rows]
        )
        labels = torch.tensor([int(row[14].startswith(">50K")) for row in rows])
        return TensorDataset(torch.cat([scaled, categories.float()], dim=1), labels)

    def render(row: Tensor) -> dict[str, str]:
        unscaled = (row[: len(NUMBERS)] * spread + mean).round().long().tolist()
        found = dict(zip(NUMBERS, map(str, unscaled), strict=True))
        for column, names, code in zip(
            CATEGORIES, values, row[len(NUMBERS) :].long().tolist(), strict=True
        ):
            found[column] = names[code - 1] if code else "(not in the training rows)"
        return {name: found[column] for column, name in enumerate(COLUMNS)}

    train_set, test_set = dataset(train), dataset(test)
    model = Tabular([len(names) + 1 for names in values], len(NUMBERS))
    return Pipeline(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=train_set,
        test=test_set,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        sample_labels=[CLASSES[label] for label in train_set.tensors[1].tolist()],
        test_labels=[CLASSES[label] for label in test_set.tensors[1].tolist()],
        render=render,
    )
