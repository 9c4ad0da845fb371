"""Peak memory and time of recorded steps beside plain ones: large tables, and accumulated batches.

    python benchmarks/step_memory.py [CASE...]

Each line is a process of its own: peak resident memory of the whole process, and processor seconds
of a step (the median of some), on one core. `docs/what-can-be-recorded.md` has the ratios.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe import Recorder

STEPS = 8


class Tables(nn.Module):
    """A head over eight columns of 50,000 categories each."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(50_000, 16) for _ in range(8)])
        self.head = nn.Linear(8 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1))


class Text(nn.Module):
    """A head over the mean of the tokens' vectors."""

    def __init__(self, n_words: int, width: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(n_words, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))


class Positions(nn.Module):
    """Six layers of 512 over 128 positions, and 5,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(512, 512), nn.GELU())])
        self.head = nn.Linear(512, 5000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        build: makes the model.
        batch: draws inputs, shape (sample, ...).
        n_classes: outputs of the model.
        optimizer: its class.
        accumulated: batches of a step.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    n_classes: int
    optimizer: type[torch.optim.Optimizer]
    accumulated: int = 1


def words(n_words: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, n_words, shape)


def positions(optimizer: type[torch.optim.Optimizer], accumulated: int) -> Case:
    return Case(Positions, lambda: torch.randn(32, 128, 512), 5000, optimizer, accumulated)


CASES = {
    "30,000 words of 64, SGD": Case(
        lambda: Text(30_000, 64), words(30_000, 64, 32), 2, torch.optim.SGD
    ),
    "50,000 words of 128, SGD": Case(
        lambda: Text(50_000, 128), words(50_000, 16, 64), 2, torch.optim.SGD
    ),
    "50,000 words of 128, AdamW": Case(
        lambda: Text(50_000, 128), words(50_000, 16, 64), 2, torch.optim.AdamW
    ),
    "8 columns of 50,000 categories, Adam": Case(Tables, words(50_000, 64, 8), 2, torch.optim.Adam),
    "6 layers of 512, SGD": positions(torch.optim.SGD, 1),
    "6 layers of 512, SGD, 16 batches a step": positions(torch.optim.SGD, 16),
    "6 layers of 512, AdamW": positions(torch.optim.AdamW, 1),
    "6 layers of 512, AdamW, 16 batches a step": positions(torch.optim.AdamW, 16),
}


def measure(case: Case, *, record: bool) -> None:
    """Train some steps and print peak MiB and milliseconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = case.build()
    optimizer = case.optimizer(model.parameters(), lr=1e-3)
    size = len(case.batch())
    n_samples = size * case.accumulated
    recorder = (
        Recorder(model, optimizer, tempfile.mkdtemp() + "/run", n_samples=n_samples)
        if record
        else None
    )
    seconds = []
    for _ in range(max(3, STEPS // case.accumulated)):
        start = time.process_time()
        for number in range(case.accumulated):
            if recorder is not None:
                recorder.next_batch(range(number * size, (number + 1) * size))
            targets = torch.randint(0, case.n_classes, (size,))
            (F.cross_entropy(model(case.batch()), targets) / case.accumulated).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    unit = 1024 if sys.platform == "linux" else 2**20  # KiB, and bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(peak, 1e3 * statistics.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="beginnings of the names of cases")
    parser.add_argument("--child", choices=("plain", "recorded"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    chosen = [
        name for name in CASES if not asked.cases or any(name.startswith(c) for c in asked.cases)
    ]
    if asked.child:
        measure(CASES[chosen[0]], record=asked.child == "recorded")
        return
    print(f"{'':45}{'plain':>18}{'recorded':>18}{'ratios':>14}")
    for name in chosen:
        found = []
        for kind in ("plain", "recorded"):
            command = [sys.executable, __file__, "--child", kind, name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append([float(word) for word in out.split()])
        (peak, ms), (peak_recorded, ms_recorded) = found
        sides = "".join(f"{p:8,.0f} MiB {t:6,.0f}ms" for p, t in found)
        print(f"{name:45}{sides}{peak_recorded / peak:8.2f}{ms_recorded / ms:6.2f}", flush=True)


if __name__ == "__main__":
    main()
