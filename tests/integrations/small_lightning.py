"""A small module, a trainer, and what stops it, for the tests of `lightning.Trainer`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from support.pipelines import conv_net, images
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

EXACT: dict[str, Any] = {"encoding": "exact", "dtype": "float32"}
TRAIN, TESTS = images(26, 1), images(5, 2)


class Net(pl.LightningModule):
    """A conv net with dropout, warmed up."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        dropout: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.net, self.dropout = conv_net(), dropout
        self._optimizer, self._options = optimizer, {"lr": 0.05} | options

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), self.dropout, self.training)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert len(batch) == 2  # nothing is added to it
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters(), **self._options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        **(quiet | {"accelerator": "cpu", "devices": 1, "max_epochs": 2} | options),
        callbacks=list(callbacks),
    )


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TRAIN, **({"batch_size": 4, "shuffle": True} | options))


def fit(
    module: Any,
    *callbacks: pl.Callback,
    train: Any = None,
    tests: Any = TESTS,
    resume: Path | None = None,
    **options: Any,
) -> Any:
    pl.seed_everything(5, verbose=False)
    made = trainer(*callbacks, **options)
    made.fit(
        module, train if train is not None else loader(), DataLoader(tests, 5), ckpt_path=resume
    )
    return module


class StoppedError(Exception):
    """As if the process had been killed."""


class Killer(pl.Callback):
    """Stops a training after so many batches."""

    def __init__(self, batches: int) -> None:
        self._left = batches

    def on_train_batch_end(self, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            raise StoppedError


class Order:
    """Batches in another order in each epoch, which may begin in its middle."""

    def __init__(self) -> None:
        self.epoch = self.given = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(26, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for k in range(self.given, 7):
            self.epoch, self.given = self.epoch + (k == 6), (k + 1) % 7
            yield order[4 * k : 4 * k + 4]


class GoingOn(DataLoader[Any]):
    """Can go on in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__(TRAIN, batch_sampler=Order())

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batch_sampler.epoch, "given": self.batch_sampler.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.epoch, self.batch_sampler.given = state["epoch"], state["given"]
