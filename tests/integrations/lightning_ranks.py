"""One of the two processes that test_lightning.py starts: `lightning.Trainer` trains on both, by
strategy="ddp".

    python lightning_ranks.py DIRECTORY

trains without the callback, with it, and with it again, stopped and resumed; puts the weights of
each into DIRECTORY/RANK.pt.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_lightning import EXACT, TESTS, Killer, Net, StoppedError, fit, loader
from support.pipelines import cross_entropy

from hydra_pipe.integrations.lightning import HydraCallback


def main(directory: Path) -> None:
    found = {}
    for name, stop, resume in (
        ("plain", None, None),
        ("whole", None, None),
        ("run", 8, None),
        ("run", None, "step=4.ckpt"),
    ):
        kept = ModelCheckpoint(
            directory / f"{name}-out", every_n_train_steps=2, save_top_k=-1, filename="{step}"
        )
        callbacks = (
            []
            if name == "plain"
            else [HydraCallback(directory / name, TESTS, cross_entropy, **EXACT), kept]
        )
        options = {
            "strategy": "ddp",
            "devices": 2,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "max_epochs": 3,
        }
        module = Net(dropout=0.0)
        with suppress(StoppedError):
            fit(
                module,
                *callbacks,
                *([] if stop is None else [Killer(stop)]),
                train=loader(batch_size=5),
                resume=None if resume is None else directory / "run-out" / resume,
                **options | {"enable_checkpointing": name != "plain"},
            )
        found[name] = module.state_dict()
    torch.save(found, directory / f"{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
