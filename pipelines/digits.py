"""Handwritten digits, 8x8 pixels, as they ship with scikit-learn: an MLP, and labels made wrong on
purpose.
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline, open_run

N_TEST = 397


def load(noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (1797, 64) in [0, 1], labels with a fraction `noise` of the training ones changed, and
    the true labels.
    """
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    truth = torch.tensor(digits.target[order], dtype=torch.int64)
    generator = np.random.default_rng([seed, 1])
    n_train = len(truth) - N_TEST
    wrong = torch.tensor(
        generator.choice(n_train, round(noise * n_train), replace=False), dtype=torch.int64
    )
    labels = truth.clone()
    labels[wrong] = (truth[wrong] + torch.tensor(generator.integers(1, 10, len(wrong)))) % 10
    return images, labels, truth


def pipeline(epochs: int = 20, lr: float = 0.05, noise: float = 0.0, seed: int = 0) -> Pipeline:
    """An MLP 64-32-10 trained by SGD on 1,400 digits, tested on 397.

    Args:
        epochs: passes over the training samples.
        lr: learning rate.
        noise: fraction of training labels that are changed to another digit.
        seed: of the split, the noise, the weights and the order.
    """
    images, labels, truth = load(noise, seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, weight_decay=1e-4),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(images[:-N_TEST], labels[:-N_TEST]),
        test=TensorDataset(images[-N_TEST:], labels[-N_TEST:]),
        batch_size=32,
        epochs=epochs,
        seed=seed,
        true_labels=truth[:-N_TEST].tolist(),
        render=lambda pixels: pixels.reshape(8, 8),
    )


def show(run: str) -> None:
    """Print the most harmful training samples of a finished run beside the truth, which only this
    file knows.
    """
    import pyarrow.parquet as pq

    found = open_run(run)
    settings = found.info()["stages"]["record"]["settings"]
    _, labels, truth = load(settings["set noise"], settings["set seed"])
    table = found.path / "rankings" / "method=hydra-fisher" / "samples.parquet"
    ranking = pq.read_table(table).sort_by("rank").to_pydict()
    wrong = (labels != truth)[: len(ranking["train_id"])]
    print(
        "The most harmful training samples (relevance: units of the test loss, summed over all "
        "test samples):\n"
    )
    print("rank  train_id  label  true label   relevance")
    for rank, sample, relevance in zip(
        ranking["rank"][:12], ranking["train_id"], ranking["relevance_sum"], strict=False
    ):
        mark = "  <- mislabelled" if wrong[sample] else ""
        print(
            f"{rank:4d}  {sample:8d}  {labels[sample]:5d}  {truth[sample]:10d}  "
            f"{relevance:10.2f}{mark}"
        )
    lowest = ranking["train_id"][:50]
    hits, chance = int(wrong[lowest].sum()), 50 * float(wrong.float().mean())
    print(
        f"\nOf the 50 lowest-ranked, {hits} are truly mislabelled; {chance:.0f} would be by chance."
    )
    print(f"Parquet: {table.parent}")


if __name__ == "__main__":
    show(sys.argv[1])
