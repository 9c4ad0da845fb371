"""The tests marked `gpu`, then the cost of recording on a GPU, in one command.

    python benchmarks/gpu.py [--tiny] [--steps 30] [--rounds 3] [--no-tests] [--json FILE]

ResNet-18 on pictures of CIFAR-10's size (batch 128, SGD with momentum, float32) and a GPT-2 of 124M
parameters (8 x 1,024 tokens, fused AdamW, bfloat16 autocast), on random data, which costs what real
data do. Sides of a round run one after the other, in an order drawn at random, from the same
weights: plain, hydra-pipe, and dattri-llm where it is installed (benchmarks/requirements.txt).
bergson records inside of its own trainer only: benchmarks/trainer.py has it. For each side
milliseconds of a step (median over rounds, range), samples or tokens a second, peak memory of the
device; of one step more the launches, the host's waits and copies (torch.profiler), and whether the
weights are those of plain training. Under 8 minutes on one GPU. `--tiny` takes small models and few
steps, and runs on the CPU, where operators stand for launches.
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import PEERS, PLAIN, SIDES, Plain, peer_version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import shakespeare

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# what the runtime is asked for, as the profiler names it
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for pictures of 32 x 32; of width 64 it has 11.2M parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Residual(inputs, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        title: of the model.
        model: makes it.
        batch: inputs and targets of a batch.
        loss: losses of shape (batch,).
        optimizer: of the parameters.
        casts: whether the forward pass is under bfloat16 autocast.
        unit: what is counted a second.
        n_units: of a batch.
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    casts: bool
    unit: str
    n_units: int


def token_losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


def cases(*, tiny: bool) -> list[Case]:
    size, width = (16, 8) if tiny else (128, 64)
    batch, length, words, layers, wide = (4, 32, 200, 2, 32) if tiny else (8, 1024, 50257, 12, 768)
    return [
        Case(
            f"ResNet-18 of width {width}, 32 x 32, batch {size}, SGD",
            lambda: resnet18(width),
            lambda: (torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))),
            lambda output, target: F.cross_entropy(output, target, reduction="none"),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            False,
            "pictures",
            size,
        ),
        Case(
            f"GPT-2, {layers} x {wide}, {batch} x {length} tokens, fused AdamW, bfloat16",
            lambda: shakespeare.Gpt(words, length, layers, wide, max(4, wide // 64)),
            lambda: (
                torch.randint(0, words, (batch, length)),
                torch.randint(0, words, (batch, length)),
            ),
            token_losses,
            lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, fused=True),
            True,
            "tokens",
            batch * length,
        ),
    ]


@dataclass
class Found:
    """Times, memory and calls of one side.

    Args:
        step_ms: milliseconds of each step but the first ones.
        peak_bytes: of the device, or 0.
        calls: launches, waits and copies of one step; operators on the CPU.
        digest: of the weights at the end.
    """

    step_ms: list[float]
    peak_bytes: int
    calls: dict[str, int]
    digest: float


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def counted(step: Callable[[], None]) -> dict[str, int]:
    """Calls of one step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as seen:
        step()
        wait()
    counts = {event.key: event.count for event in seen.key_averages()}
    if not CUDA:
        return {"operators": sum(n for name, n in counts.items() if name.startswith("aten::"))}
    kinds = {"launches": LAUNCHES, "waits": WAITS, "copies": COPIES}
    return {kind: sum(counts.get(name, 0) for name in of) for kind, of in kinds.items()}


def run(case: Case, side: type[Plain], n_steps: int, scratch: Path) -> Found:
    torch.manual_seed(0)
    model = case.model().to(DEVICE).train()
    x, y = (values.to(DEVICE) for values in case.batch())
    optimizer = case.optimizer(model.parameters())
    data = TensorDataset(torch.zeros(len(x)), torch.zeros(len(x)))
    pipeline = Pipeline(model, optimizer, case.loss, data, data, len(x), 1)
    recording = side(pipeline, scratch / "store")
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def casting() -> AbstractContextManager[Any]:
        return torch.autocast(DEVICE.type, torch.bfloat16) if case.casts else nullcontext()

    def step() -> None:
        with recording.step(range(len(x))):
            with casting():
                losses = case.loss(model(x), y)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    times = []
    for _ in range(n_steps):
        wait()
        begun = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - begun) * 1e3)
    calls = counted(step)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    recording.close()
    digest = float(sum(p.detach().double().sum() for p in model.parameters()))
    return Found(times, peak, calls, digest)


def measured(case: Case, sides: list[str], n_steps: int, rounds: int) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in random.Random(number).sample(sides, len(sides)):
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(run(case, SIDES[name], n_steps, Path(scratch)))
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    return found


def table(case: Case, found: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """Print the figures of a case, and return them."""
    plain = [statistics.median(one.step_ms) for one in found[PLAIN]]
    print(f"\n{case.title}\n")
    print(f"| | ms a step | over plain | {case.unit} a second | peak | calls of a step | weights |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    lines = []
    for name, runs in found.items():
        medians = [statistics.median(one.step_ms) for one in runs]
        ratios = [ours / theirs for ours, theirs in zip(medians, plain, strict=True)]
        same = all(a.digest == b.digest for a, b in zip(runs, found[PLAIN], strict=True))
        line = {
            "case": case.title,
            "side": name,
            "step_ms": medians,
            "over plain": ratios,
            "a second": case.n_units / statistics.median(medians) * 1e3,
            "peak_bytes": max(one.peak_bytes for one in runs),
            "calls": runs[-1].calls,
            "same weights": same,
        }
        calls = ", ".join(f"{n:,} {kind}" for kind, n in runs[-1].calls.items())
        print(
            f"| {name} | {statistics.median(medians):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {line['a second']:,.0f} | "
            f"{line['peak_bytes'] / 2**30:.2f} GiB | {calls} | {'same' if same else 'OTHER'} |",
            flush=True,
        )
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models, also on the CPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not CUDA and not asked.tiny:
        raise SystemExit("there is no CUDA device: give --tiny for a trial on the CPU")
    if not CUDA:
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}")
    failed = 0
    if not asked.no_tests:
        tests = Path(__file__).parents[1] / "tests"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(tests)]
        failed = subprocess.run(command, check=False).returncode
    sides = [name for name in SIDES if name not in PEERS or peer_version() is not None]
    lines = []
    for case in cases(tiny=asked.tiny):
        steps, rounds = (4, 2) if asked.tiny else (asked.steps, asked.rounds)
        lines += table(case, measured(case, sides, steps, rounds))
    if asked.json:
        asked.json.write_text(json.dumps(lines, indent=1))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
