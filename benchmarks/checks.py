"""What it costs to know whose a gradient is: recording with and without its checks, in turn.

    python benchmarks/checks.py [--steps 600] [--pairs 5]
    python benchmarks/checks.py --shares [--steps 2000]

Processor seconds a step, of an MLP, LeNet-5 and a small GPT. Without the checks no probe is sent,
no loss is looked at, and no target is held against a label. What hooks cost is in both. With
`--shares`: the processor time within the functions of the checks, over the time of all steps of one
training; noise of the machine is in both alike.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe import Recorder
from hydra_pipe.recording.attribution import Attribution
from hydra_pipe.recording.coupling import LossCoupling
from hydra_pipe.recording.targets import TargetCheck

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

Made = tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]


def pictures(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return lambda n: (
        torch.rand(n, *shape, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
    )


def mlp() -> Made:
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), pictures(784), F.cross_entropy


def lenet() -> Made:
    convolutions = [
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
    ]
    layers = [
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    ]
    return nn.Sequential(*convolutions, *layers), pictures(1, 28, 28), F.cross_entropy


def gpt() -> Made:
    import shakespeare

    tokens = torch.randint(0, 65, (4096,), generator=torch.Generator().manual_seed(0))

    def batch(n: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(n) * 37 % 4000
        rows = torch.stack([tokens[a : a + 33] for a in at])
        return rows[:, :-1], rows[:, 1:]

    return (
        shakespeare.Gpt(65, 32, 2, 64),
        batch,
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
    )


def seconds(make: Callable[[], Made], batch: int, steps: int, *, checks: bool) -> float:
    """Of a processor, of one recorded training without its end."""
    torch.manual_seed(0)
    model, data, loss = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data(batch)
    labels = y if y.dim() == 1 and checks else None
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(
            model, optimizer, directory + "/run", n_samples=batch, sample_labels=labels
        )
        begun = time.process_time()
        for _ in range(steps):
            with recorder.step(np.arange(batch)):
                loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        spent = time.process_time() - begun
        recorder.close()
    return spent / steps


CHECKS = (
    (Attribution, "end"),
    (LossCoupling, "add"),
    (LossCoupling, "_look"),
    (LossCoupling, "after_backward"),
    (LossCoupling, "check_repeats"),
    (TargetCheck, "check"),
)


def share(make: Callable[[], Made], batch: int, steps: int) -> float:
    """Processor time within the functions of the checks, over that of all steps."""
    spent, depth = [0.0], [0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:  # a check may call another one
                    spent[0] += time.process_time() - begun

        return call

    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        of_step = seconds(make, batch, steps, checks=True)
    return spent[0] / (of_step * steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shares", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.shares:
        for make, batch in ((mlp, 64), (lenet, 64), (gpt, 16)):
            found = [share(make, batch, asked.steps) for _ in range(3)]
            print(f"{make.__name__}: {min(found):.2%} to {max(found):.2%} of the time", flush=True)
        return
    for make, batch in ((mlp, 64), (lenet, 64), (gpt, 16)):
        ratios, with_checks = [], []
        for _ in range(asked.pairs):
            with (
                patch.object(Attribution, "_is_due", lambda *_: 0),
                patch.object(LossCoupling, "add", lambda *_, **__: None),
            ):
                without = seconds(make, batch, asked.steps, checks=False)
            with_checks.append(seconds(make, batch, asked.steps, checks=True))
            ratios.append(with_checks[-1] / without)
        print(
            f"{make.__name__}: {np.median(with_checks) * 1e3:.2f} ms a step with checks; with / "
            "without: median "
            f"{np.median(ratios):.4f}, "
            f"{min(ratios):.4f} to {max(ratios):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
