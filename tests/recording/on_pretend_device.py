"""Record small models on the host and on the pretend device, and say how the two differ.

    python tests/recording/on_pretend_device.py DIRECTORY

Prints one JSON object: for each case what differs, reads of the host in steps without a flush, the
most reads of a step with one, and operators of a step, plain and recorded.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import pretend_device as pretend
from support.recordings import arrays

from hydra_pipe import Recorder

BATCH, STEPS = 10, 20


class Text(nn.Module):
    """Tokens, a norm, and a head over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 8), nn.LayerNorm(8)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.norm(self.table(x)))).mean(1))


class Language(nn.Module):
    """A next-token model, whose outputs are too large to wait for a flush."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(600, 8), nn.Linear(8, 600)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 12), nn.ReLU(), nn.Linear(12, 5))


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(144, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 5)),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 5)),
    )


def pictures() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 1, 14, 14), torch.arange(BATCH) % 5


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 50, (BATCH, 6)), torch.arange(BATCH) % 5


def next_words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 600, (BATCH, 64)), torch.randint(0, 600, (BATCH, 64))


def classes(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


Case = tuple[
    Callable[[], nn.Module],
    Callable[[], tuple[Tensor, Tensor]],
    Callable[[Tensor, Tensor], Tensor],
    str,
    dict[str, Any],
    int,
]
EXACT: dict[str, Any] = {"encoding": "exact", "dtype": "float32"}
PROJECTED: dict[str, Any] = {"encoding": "projected", "dim": 120}
CASES: dict[str, Case] = {
    "MLP, SGD": (mlp, pictures, classes, "sgd", {}, 1),
    "MLP, AdamW, projected": (mlp, pictures, classes, "adamw", PROJECTED, 1),
    "LeNet-5, SGD": (lenet, pictures, classes, "sgd", {}, 1),
    "LeNet-5, AdamW": (lenet, pictures, classes, "adamw", {}, 1),
    "LeNet-5, SGD, projected": (lenet, pictures, classes, "sgd", PROJECTED, 1),
    "norms, AdamW, exact": (norms, pictures, classes, "adamw", EXACT, 1),
    "text, SGD, exact": (Text, words, classes, "sgd", EXACT, 1),
    "text, AdamW, accumulated": (Text, words, classes, "adamw", {}, 2),
    "MLP, AdamW that counts there": (mlp, pictures, classes, "capturable", {}, 1),
    "language, AdamW": (Language, next_words, tokens, "adamw", {"dim": 400}, 1),
}


def train(case: Case, run: Path | None, device: str) -> tuple[nn.Module, list[int], list[int]]:
    """The trained model, and reads and operators of each step."""
    make, data, loss, kind, options, n_parts = case
    torch.manual_seed(0)
    model, (x, y) = make(), data()
    reads, operators = [], []
    with pretend.Mode() if device == pretend.NAME else nullcontext():
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer: torch.optim.Optimizer
        if kind == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        else:
            # counts of updates are then on the device, as those of a fused optimiser
            counts_there = kind == "capturable" and device == pretend.NAME
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=counts_there)
        recorder = (
            None if run is None else Recorder(model, optimizer, run, n_samples=BATCH, **options)
        )
        parts = torch.arange(BATCH).chunk(n_parts)
        for _ in range(STEPS):
            pretend.forget()
            with nullcontext() if recorder is None else recorder.step(np.arange(BATCH)):
                for part in parts:
                    own = slice(int(part[0]), int(part[-1]) + 1)
                    loss(model(x[own]), y[own]).sum().div(BATCH).backward()
                optimizer.step()
                optimizer.zero_grad()
            reads.append(pretend.reads())
            operators.append(sum(pretend.operators.values()))
        if recorder is not None:
            recorder.record_test([(x[:5], y[:5]), (x[5:], y[5:])], loss)
            recorder.close()
    return model, reads, operators


def differing(case: Case, directory: Path) -> dict[str, Any]:
    host, device = directory / "host", directory / "device"
    ours, _, _ = train(case, host, "cpu")
    theirs, reads, operators = train(case, device, pretend.NAME)
    plain, _, of_plain = train(case, None, pretend.NAME)
    found, wanted = arrays(device), arrays(host)
    unlike = sorted(found.keys() ^ wanted.keys())
    for name in found.keys() & wanted.keys():
        # sums in other pieces are rounded otherwise
        near = np.allclose(
            found[name].astype(float),
            wanted[name].astype(float),
            rtol=1e-2,
            atol=1e-3 * max(1.0, float(np.abs(np.nan_to_num(wanted[name])).max(initial=0))),
            equal_nan=True,
        )
        if not near:
            unlike.append(name)
    state, of_host = plain.state_dict(), ours.state_dict()
    for name, values in theirs.state_dict().items():
        if not torch.equal(values.cpu(), state[name].cpu()):
            unlike.append(f"{name} of plain training")
        if not torch.allclose(values.cpu(), of_host[name], atol=1e-5):
            unlike.append(f"{name} of the host")
    # the first step is checked at once, and the next may choose
    later = sorted(reads[2:])
    return {
        "unlike": unlike,
        "steps without a read": later.count(0),
        "most reads": max(later),
        "operators": int(np.median(operators[2:])),
        "plain": int(np.median(of_plain[2:])),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        found[name] = differing(case, directory / str(number))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
