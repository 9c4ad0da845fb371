"""What it costs to know whose a gradient is: recording with and without its checks, in turn.

    python benchmarks/checks.py [--steps 600] [--pairs 5] [--only mlp]
    python benchmarks/checks.py --shares [--steps 2000]
    python benchmarks/checks.py --instructions [--steps 300]      # needs valgrind

Processor seconds a step, of an MLP, LeNet-5 and a small GPT. Without the checks no probe is sent,
no loss is looked at, and no target is held against a label. What hooks cost is in both.

`--shares`: processor time within the functions of the checks, over the time of all steps of one
training. Noise of the machine is in both alike. The clock takes as long as a small check, so what
two readings of it take is measured beside each call, and is taken off.

`--instructions`: instructions of the processor in trainings of 1 and of `--steps` steps, with and
without the checks, as valgrind counts them. Start-up drops out, and the machine's noise has no
part. Probes are sent at the first step, and at steps 64, 256 and so on. Valgrind has no AVX-512, so
that the products of matrices take more instructions than without valgrind.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe import Recorder
from hydra_pipe.recording.attribution import Attribution
from hydra_pipe.recording.capture import Capture
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


MODELS: dict[str, tuple[Callable[[], Made], int]] = {
    "mlp": (mlp, 64),
    "lenet": (lenet, 64),
    "gpt": (gpt, 16),
}
# What each step does for the checks. No model here has parameters without a layer rule, for which
# `Attribution.end` would do more.
CHECKS = (
    (Capture, "_check_arrangement"),
    (Attribution, "end"),
    (LossCoupling, "add"),
    (LossCoupling, "after_backward"),
    (LossCoupling, "check_repeats"),
)
# What checks do now and then, or when steps are written.
LATER_CHECKS = ((LossCoupling, "_look"), (TargetCheck, "check"), (TargetCheck, "check_all"))


@contextmanager
def unchecked() -> Iterator[None]:
    """Leave out all checks."""
    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(patch.object(owner, name, lambda *_, **__: False))
        yield


def share(make: Callable[[], Made], batch: int, steps: int) -> float:
    """Processor time within the functions of the checks, over that of all steps."""
    spent, of_clock, depth = [0.0], [0.0], [0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            # as cold as the reading after it
            first = time.process_time()
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:  # a check may call another one
                    spent[0] += time.process_time() - begun
                    of_clock[0] += begun - first

        return call

    with ExitStack() as stack:
        for owner, name in (*CHECKS, *LATER_CHECKS):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        of_step = seconds(make, batch, steps, checks=True)
    # each call reads the clock three times; as many intervals lie within the steps
    return (spent[0] - of_clock[0]) / (of_step * steps - 3 * of_clock[0])


def train_in_forks(names: Sequence[str], lengths: Sequence[int]) -> None:
    """Train each model for each number of steps, with checks and without, each in a fork.

    One step is taken before, so that all modules are imported once. Prints the id of each fork's
    process.
    """
    seconds(mlp, 64, 1, checks=True)
    for name, steps, checks in product(names, lengths, (True, False)):
        process = os.fork()
        if not process:
            with nullcontext() if checks else unchecked():
                seconds(*MODELS[name], steps, checks=checks)
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"the training of {name} has failed")
        print(process, flush=True)


def tell_instructions(names: Sequence[str], steps: int) -> None:
    """Count the instructions of trainings, and print the share of the checks."""
    own = [sys.executable, __file__, "--forks", "--only", ",".join(names), "--steps", str(steps)]
    run = subprocess.run(
        [
            "valgrind",
            "--tool=cachegrind",
            "--cache-sim=no",
            "--cachegrind-out-file=/dev/null",
            *own,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    # each count has what came before the fork in it, which drops out of the differences
    counted = {
        process: int(count.replace(",", ""))
        for process, count in re.findall(r"==(\d+)== I\s+refs:\s+([\d,]+)", run.stderr)
    }
    counts = iter([counted[process] for process in run.stdout.split()])
    for name in names:
        one, one_without, all_with, all_without = (next(counts) for _ in range(4))
        of_step = (all_without - one_without) / (steps - 1)
        first, last = one - one_without, all_with - all_without
        print(
            f"{name}: {of_step / 1e6:.2f} million instructions a step without checks; the first "
            f"look takes as many as {first / of_step:.2f} steps; the checks take "
            f"{last / of_step / steps:.2%} of {steps} steps, "
            f"{(last - first) / of_step / (steps - 1):.2%} of those after the first",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default=",".join(MODELS), help="models")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--forks", action="store_true", help="what --instructions counts")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = asked.only.split(",")
    if asked.forks:
        train_in_forks(names, (1, asked.steps))
        return
    if asked.instructions:
        tell_instructions(names, asked.steps)
        return
    for name in names:
        make, batch = MODELS[name]
        if asked.shares:
            found = [share(make, batch, asked.steps) for _ in range(3)]
            print(f"{name}: {min(found):.2%} to {max(found):.2%} of the time", flush=True)
            continue
        ratios, with_checks = [], []
        for _ in range(asked.pairs):
            with unchecked():
                without = seconds(make, batch, asked.steps, checks=False)
            with_checks.append(seconds(make, batch, asked.steps, checks=True))
            ratios.append(with_checks[-1] / without)
        print(
            f"{name}: {np.median(with_checks) * 1e3:.2f} ms a step with checks; with / "
            "without: median "
            f"{np.median(ratios):.4f}, "
            f"{min(ratios):.4f} to {max(ratios):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
