"""What recording under lightning.Trainer costs, beside the same training without the callback.

    python benchmarks/lightning_overhead.py DATA [--optimizers sgd,adamw] [--n 6400] [--epochs 2]
    [--pairs 5]

DATA is the directory of the shared data sets. LeNet-5 on the first pictures of Fashion-MNIST, 64 a
batch, one thread, in one
process: the two sides of a pair run one after the other, the first of them in turn, from the same
start. Seconds are the processor's in `trainer.fit()`, with everything: 20 test gradients, and what
is written in the background. The ratio is the median over the pairs. "same weights": training was
left as it was.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hydra_pipe.integrations.lightning import HydraCallback
from hydra_pipe.loading import load_pipeline

FASHION_MNIST = Path(__file__).parents[1] / "pipelines" / "fashion_mnist.py"
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


class LeNet(pl.LightningModule):
    """LeNet-5, trained by one of `OPTIMIZERS`."""

    def __init__(self, net: torch.nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self._optimizer = net, optimizer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = OPTIMIZERS[self._optimizer](self.parameters())
        return found


def fit(optimizer: str, pipeline: Any, epochs: int, run: Path | None) -> tuple[float, LeNet]:
    """Train once, recorded into `run`, if any. Processor seconds, and what was trained."""
    module = LeNet(pipeline.model, optimizer)
    callbacks: list[pl.Callback] = (
        [] if run is None else [HydraCallback(run, pipeline.test, F.cross_entropy)]
    )
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks, **options
    )
    torch.manual_seed(0)
    loader: DataLoader[Any] = DataLoader(TensorDataset(*pipeline.train.tensors), 64, shuffle=True)
    start = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - start, module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--n", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    source = load_pipeline(
        str(FASHION_MNIST), {"data": given.data / "fashion-mnist", "n_train": given.n, "n_test": 20}
    )
    print(
        "| optimizer | recorded over plain (least to most) | processor seconds | bytes a row | "
        "same weights |"
    )
    print("|---|---|---|---|---|")
    for optimizer in given.optimizers.split(","):
        fit(optimizer, source.build(), 1, None)  # what is done once in a process
        ratios, seconds, same, n_bytes = [], [], True, 0
        for pair in range(given.pairs):
            with tempfile.TemporaryDirectory() as scratch:
                run = Path(scratch) / "run"
                sides = [None, run] if pair % 2 == 0 else [run, None]
                took = {side: fit(optimizer, source.build(), given.epochs, side) for side in sides}
                n_bytes = sum(
                    file.stat().st_size
                    for file in (run / "gradients.zarr").rglob("*")
                    if file.is_file()
                )
            (plain, module), (recorded, other) = took[None], took[run]
            ratios.append(recorded / plain)
            seconds.append((plain, recorded))
            same &= all(
                torch.equal(a, b)
                for a, b in zip(module.parameters(), other.parameters(), strict=True)
            )
        plain, recorded = (statistics.median(side) for side in zip(*seconds, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        bytes_a_row = n_bytes / (given.n * given.epochs)
        print(
            f"| {optimizer} | {spread} | {plain:.1f} -> {recorded:.1f} | {bytes_a_row:,.0f} | "
            f"{'yes' if same else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
