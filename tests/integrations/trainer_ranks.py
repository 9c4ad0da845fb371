"""One of the two processes that test_transformers.py starts as torchrun does: the trainer trains a
classifier on both.

    python trainer_ranks.py DIRECTORY

trains without the callback, with it, and with it again, stopped and resumed; puts the weights of
each into DIRECTORY/RANK.pt.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from small_trainers import EXACT, Killer, StoppedError, classifier, texts, trainer

from hydra_pipe.integrations.transformers import HydraCallback


def main(directory: Path) -> None:
    train, tests = texts(32, 0, causal=False), texts(5, 1, causal=False)
    found = {}
    for name, stop in (("plain", None), ("whole", None), ("run", 3), ("run", None)):
        model = classifier()
        callbacks = [] if name == "plain" else [HydraCallback(directory / name, tests, **EXACT)]
        callbacks += [] if stop is None else [Killer(stop)]
        made = trainer(
            directory / f"{name}-out",
            model,
            train,
            callbacks,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
        )
        last = directory / f"{name}-out" / "checkpoint-3"
        with suppress(StoppedError):
            made.train(resume_from_checkpoint=str(last) if last.is_dir() else None)
        found[name] = model.state_dict()
    torch.save(found, directory / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
