"""What recording costs: training with it over training without, paired, in one run, the order of each pair drawn at random.

    python benchmarks/record.py DATA [--pairs 5]

DATA is the directory of the shared data sets (fashion-mnist, cifar10, text). Everything is written to disk; the loop is a plain
one, batches are made beforehand. Prints seconds a step, the ratio's median and range, rows a second, bytes a row, and the peak
memory that three times the steps add.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does, for both sides

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hydra_pipe import Pipeline, Recorder

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import cifar10n
import fashion_mnist
import shakespeare

Batches = list[tuple[Tensor, Tensor]]


def batches_of(pipeline: Pipeline) -> Batches:
    inputs, targets = pipeline.train.tensors
    return list(zip(inputs.split(pipeline.batch_size), targets.split(pipeline.batch_size), strict=True))


def mlp(data: Path) -> Pipeline:
    pipeline = fashion_mnist.pipeline(data / "fashion-mnist", n_train=6400, n_test=10, epochs=1)
    pipeline.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=0.02, momentum=0.9)
    return pipeline


RUNS: dict[str, tuple[Callable[[Path], Pipeline], int]] = {
    "MLP 784-256-128-10": (mlp, 15),
    "LeNet-5": (lambda data: fashion_mnist.pipeline(data / "fashion-mnist", n_train=6400, n_test=10, epochs=1), 3),
    "ResNet-8 on CIFAR-10": (lambda data: cifar10n.pipeline(data / "cifar10", n_train=1280, n_test=10, epochs=1), 2),
    "GPT 4 x 128, context 64, AdamW": (lambda data: shakespeare.pipeline(data / "text", n_train=512, n_test=10, epochs=1), 2),
}


def train(build: Callable[[Path], Pipeline], data: Path, passes: int, run: str | None) -> tuple[float, int]:
    """Seconds of the loop, closing included, and its steps."""
    torch.manual_seed(0)
    pipeline = build(data)
    model, optimizer, batches = pipeline.model, pipeline.optimizer, batches_of(pipeline)
    n_samples, size = len(pipeline.train), pipeline.batch_size
    recorder = Recorder(model, optimizer, run, n_samples) if run else None
    start = time.perf_counter()
    for _ in range(passes):
        for step, (inputs, targets) in enumerate(batches):
            ids = range(step * size, step * size + len(inputs))
            with recorder.step(ids) if recorder else contextlib.nullcontext():
                pipeline.loss(model(inputs), targets).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    if recorder:
        recorder.close()
    return time.perf_counter() - start, passes * len(batches)


def resident_peak() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    order = random.Random(0)
    for name, (build, passes) in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            train(build, given.data, 1, None)
            train(build, given.data, 1, f"{scratch}/warm")
            ratios, plain, recorded, steps = [], [], [], 0
            for pair in range(given.pairs):
                runs: dict[str | None, float] = {}
                for run in order.sample([None, f"{scratch}/{pair}"], 2):
                    runs[run], steps = train(build, given.data, passes, run)
                with_it, without = runs[f"{scratch}/{pair}"], runs[None]
                ratios.append(with_it / without)
                plain.append(without / steps)
                recorded.append(with_it / steps)
            stored = sum(f.stat().st_size for f in Path(scratch, "0", "gradients.zarr").rglob("*") if f.is_file())
            rows = passes * len(build(given.data).train)
            before = resident_peak()
            train(build, given.data, 3 * passes, f"{scratch}/long")
            seconds = statistics.median(recorded)
            print(
                f"{name}: {statistics.median(plain) * 1e3:.2f} ms a step without, {seconds * 1e3:.2f} with; ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {rows / steps / seconds:,.0f} rows/s; "
                f"{stored / rows:,.0f} bytes a row; "
                f"three times the steps add {(resident_peak() - before) / 2**20:.0f} MiB to the peak"
            )


if __name__ == "__main__":
    main()
