"""Which form of a step's curvature lets a backward sweep predict trainings on random halves of the
data.

    python benchmarks/curvature.py DATA [--runs ABCD] [--seeds 0,1,2] [--convention kept]

Needs benchmarks/requirements.txt.

Fashion-MNIST, 600 training samples of which 60 are mislabelled, 40 test samples, pixels
standardised, MLP 784-48-32-10 with ReLU, batch 64, weight decay 5e-4. Linear datamodelling score:
Spearman, over 100 trainings on random halves, of the sum of R over the samples kept with minus the
test loss; mean over tests, and over seeds (samples, first weights, order and halves). A batch's
loss is the mean over the samples kept in it (`kept`), or the sum over them divided by the size of
the whole batch (`zero`).

The sweep is that of `hydra-fisher`, but carries no vectors of parameters: an adjoint lives in the
span of the rows and of h, and its products with the rows of all steps are enough. Rows of a layer
are outer products, so that their Gram matrix is cheap. Needs 7 GB for run C.
"""

import argparse
import gzip
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from hydra_pipe.maths.fisher import FORMS, saturation

N, M, WRONG, BATCH, DECAY, HALVES = 600, 40, 60, 64, 5e-4, 100
SIZES = (784, 48, 32, 10)
# learning rate, momentum, epochs
RUNS = {"A": (0.01, 0.9, 8), "B": (0.05, 0.0, 12), "C": (0.01, 0.9, 30), "D": (0.05, 0.9, 8)}
# bounds of rho, of which "sqrt" takes the root
RHO: dict[str, tuple[float, float]] = {
    "1": (1, 1),
    "rho": (0, np.inf),
    "max(rho, 1)": (1, np.inf),
    "min(rho, 1)": (0, 1),
}


@dataclass(frozen=True)
class Way:
    """To take the curvature of a step.

    Args:
        factor: f of kappa.
        rho: bounds of what a row weighs, before its root is taken.
        root: whether that is taken.
        window: steps before and after, whose rows count as much as the step's own.
        forget: share of the adjoint that each step takes away.
        damping: curvature that every direction has besides.
        centred: whether the batch's mean gradient is taken off its rows.
        horizon: steps after which nothing flows further back.
    """

    factor: float = 0.3
    rho: tuple[float, float] = RHO["1"]
    root: bool = False
    window: int = 0
    forget: float = 0.0
    damping: float = 0.0
    centred: bool = False
    horizon: int | None = None


WAYS = {
    f"f = {f:g}, {name}": Way(f, bounds)
    for f in (0.03, 0.1, 0.3, 1.0, 3.0)
    for name, bounds in RHO.items()
}
WAYS |= {f"f = {f:g}, sqrt(rho)": Way(f, RHO["rho"], root=True) for f in (0.1, 0.3)}
for _name, _more in {
    "one step either side": {"window": 1},
    "1 % forgotten each step": {"forget": 0.01},
    "damped by 0.1": {"damping": 0.1},
    "centred": {"centred": True},
    "60 steps": {"horizon": 60},
}.items():
    WAYS |= {
        f"f = 0.3, 1, {_name}": Way(**_more),
        f"f = 0.1, rho, {_name}": Way(0.1, RHO["rho"], **_more),
    }
MEANS = {
    "mean of f = 0.1, rho and f = 0.3, 1": {"f = 0.1, rho": 0.5, "f = 0.3, 1": 0.5},
    "mean of f = 0.1, max(rho, 1) and f = 0.3, min(rho, 1)": {
        "f = 0.1, max(rho, 1)": 0.5,
        "f = 0.3, min(rho, 1)": 0.5,
    },
    "default": {
        next(
            name for name, way in WAYS.items() if way == Way(form.factor, (form.least, form.most))
        ): form.share
        for form in FORMS
    },
}


@dataclass
class Training:
    """A run as it was, by its rows.

    Args:
        rate, momentum: of its optimiser.
        blocks: first and last row of each step.
        sample: of each row.
        rho: of each row.
        gram: products of all rows with each other.
        tests: products of the rows with the test gradients.
    """

    rate: float
    momentum: float
    blocks: list[tuple[int, int]] = field(default_factory=list)
    sample: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    rho: Tensor = field(default_factory=lambda: torch.empty(0))
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    tests: Tensor = field(default_factory=lambda: torch.empty(0))


def pixels(path: Path) -> np.ndarray:
    return (
        np.frombuffer(gzip.open(path).read(), np.uint8, offset=16)
        .reshape(-1, 784)
        .astype(np.float32)
        / 255
        - 0.286
    ) / 0.353


def labels(path: Path) -> np.ndarray:
    return np.frombuffer(gzip.open(path).read(), np.uint8, offset=8).astype(np.int64)


def samples(data: Path, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = pixels(data / "train-images-idx3-ubyte.gz"), labels(data / "train-labels-idx1-ubyte.gz")
    test_x, test_y = (
        pixels(data / "t10k-images-idx3-ubyte.gz"),
        labels(data / "t10k-labels-idx1-ubyte.gz"),
    )
    generator = np.random.default_rng(100 + seed)
    train, test = (generator.choice(len(of), n, replace=False) for of, n in ((x, N), (test_x, M)))
    own = y[train]
    own[:WRONG] = (own[:WRONG] + generator.integers(1, 10, WRONG)) % 10
    return tuple(torch.tensor(of) for of in (x[train], own, test_x[test], test_y[test]))  # type: ignore[return-value]


def first_weights(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(SIZES)]
    return [
        p.detach().clone()
        for layer in layers
        for p in (layer.weight.T.contiguous(), layer.bias[None])
    ]


def order(epochs: int, seed: int) -> list[np.ndarray]:
    shuffled = [np.random.default_rng([seed, epoch]).permutation(N) for epoch in range(epochs)]
    return [ids[low : low + BATCH] for ids in shuffled for low in range(0, N, BATCH)]


def forward(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs of every layer, and the output. Of a stack of models, where weights are stacked."""
    found = [x]
    for i in range(0, len(weights), 2):
        out = found[-1] @ weights[i] + weights[i + 1]
        found.append(torch.relu(out) if i < len(weights) - 2 else out)
    return found


def backward(weights: list[Tensor], inputs: list[Tensor], at_output: Tensor) -> list[Tensor]:
    """Gradients at the output of every layer."""
    found = [at_output]
    for i in range(len(weights) - 2, 0, -2):
        found.append((found[-1] @ weights[i].transpose(-1, -2)) * (inputs[i // 2] > 0))
    return found[::-1]


def error(output: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss in the output."""
    return torch.softmax(output, -1) - F.one_hot(y, SIZES[-1])


def move(
    weights: list[Tensor],
    buffers: list[Tensor],
    inputs: list[Tensor],
    at: list[Tensor],
    rate: float,
    momentum: float,
) -> None:
    for i, d in enumerate(at):
        for k, g in (
            (2 * i, inputs[i].transpose(-1, -2) @ d),
            (2 * i + 1, d.sum(-2, keepdim=True)),
        ):
            buffers[k].mul_(momentum).add_(g).add_(weights[k], alpha=DECAY)
            weights[k].sub_(buffers[k], alpha=rate)


def trained_on_halves(
    run: str, seed: int, of: tuple[Tensor, ...], kept: Tensor, convention: str
) -> np.ndarray:
    """Losses of the tests after training on each half, shape (half, test)."""
    (rate, momentum, epochs), (x, y, test_x, test_y) = RUNS[run], of
    weights = [p.expand(len(kept), *p.shape).clone() for p in first_weights(seed)]
    buffers = [torch.zeros_like(p) for p in weights]
    for ids in order(epochs, seed):
        own = kept[:, ids]
        count = own.sum(1, keepdim=True).clamp(min=1) if convention == "kept" else len(ids)
        inputs = forward(weights, x[ids])
        at = backward(weights, inputs, error(inputs[-1], y[ids]) * (own / count)[..., None])
        move(weights, buffers, inputs, at, rate, momentum)
    output = forward(weights, test_x)[-1]
    return (
        F.cross_entropy(output.flatten(0, 1), test_y.repeat(len(kept)), reduction="none")
        .reshape(len(kept), M)
        .numpy()
    )


def recorded(run: str, seed: int, of: tuple[Tensor, ...]) -> Training:
    (rate, momentum, epochs), (x, y, test_x, test_y) = RUNS[run], of
    weights, found, ids_of = first_weights(seed), Training(rate, momentum), []
    buffers = [torch.zeros_like(p) for p in weights]
    inputs_of: list[list[Tensor]] = [[] for _ in SIZES[1:]]
    at_of: list[list[Tensor]] = [[] for _ in SIZES[1:]]
    rho, first = [], 0
    for ids in order(epochs, seed):
        inputs = forward(weights, x[ids])
        e = error(inputs[-1], y[ids])
        rho.append(
            (1 - torch.softmax(inputs[-1], -1).square().sum(1)) / e.square().sum(1).clamp(min=1e-20)
        )
        at = backward(weights, inputs, e / len(ids))
        for i in range(len(at)):
            inputs_of[i].append(inputs[i])
            at_of[i].append(at[i])
        ids_of.append(torch.tensor(ids))
        found.blocks.append((first, first + len(ids)))
        first += len(ids)
        move(weights, buffers, inputs, at, rate, momentum)
    test_inputs = forward(weights, test_x)
    test_at = backward(weights, test_inputs, error(test_inputs[-1], test_y))
    found.sample, found.rho = torch.cat(ids_of), torch.cat(rho)
    found.gram, found.tests = torch.zeros(first, first), torch.zeros(first, M)
    for i, (inputs, at) in enumerate(zip(inputs_of, at_of, strict=True)):
        a, d = torch.cat(inputs), torch.cat(at)
        found.tests += (a @ test_inputs[i].T + 1) * (d @ test_at[i].T)
        for low in range(0, first, 2000):
            own = slice(low, low + 2000)
            found.gram[own] += (a[own] @ a.T + 1) * (d[own] @ d.T)
    return found


def swept(run: Training, way: Way | None) -> np.ndarray:
    """R, shape (sample, test). No way: without curvature."""
    a, v = run.tests.clone(), torch.zeros_like(run.tests)
    relevance = torch.zeros(N, M)
    for t in range(len(run.blocks) - 1, -1, -1):
        first, last = run.blocks[t]
        near = 0 if way is None else way.window
        steps = run.blocks[max(0, t - near) : t + near + 1]
        rows = slice(steps[0][0], steps[-1][1])
        known = slice(0, rows.stop)
        v[known] -= run.rate * a[known]
        g = v[known]
        relevance.index_add_(0, run.sample[first:last], -g[first:last])
        if way is None:
            a[known] += DECAY * g
        elif way.horizon is None or len(run.blocks) - t <= way.horizon:
            n = torch.cat([torch.full((high - low,), float(high - low)) for low, high in steps])
            rho = run.rho[rows].clamp(*way.rho)
            weight = n / len(steps) * (rho.sqrt() if way.root else rho)
            mix = torch.diag(weight.sqrt())
            if way.centred:
                mix = mix @ (
                    torch.eye(len(n))
                    - torch.block_diag(*[torch.full((h - b, h - b), 1 / (h - b)) for b, h in steps])
                )
            kappa = saturation(run.rate, run.momentum, 0.0, nesterov=False, factor=way.factor)
            gram = mix.T @ run.gram[rows, rows] @ mix
            pulled = torch.linalg.solve(
                torch.eye(len(n)).double() + kappa * gram.double(), (mix.T @ g[rows]).double()
            ).float()
            step = run.gram[rows, known].T @ (mix @ pulled)
            a[known] = a[known] * (1 - way.forget) + (DECAY + way.damping) * g + step
        v[known] *= run.momentum
    return relevance.numpy()


def scores(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman of each test."""
    a, b = (rankdata(values, axis=0) for values in (found, truth))
    a, b = (values - values.mean(axis=0) for values in (a, b))
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def interval(per_test: np.ndarray) -> str:
    draw = np.random.default_rng(0).integers(0, len(per_test), (2000, len(per_test)))
    low, high = np.quantile(per_test[draw].mean(axis=1), (0.025, 0.975))
    return f"{per_test.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="ABCD")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--convention", choices=("kept", "zero"), default="kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    table: Any = defaultdict(lambda: defaultdict(list))
    for run in given.runs:
        for seed in map(int, given.seeds.split(",")):
            of = samples(given.data / "fashion-mnist", seed)
            generator = np.random.default_rng(1000 + seed)
            kept = np.zeros((HALVES, N), np.float32)
            for half in kept:
                half[generator.permutation(N)[: N // 2]] = 1
            truth = -trained_on_halves(run, seed, of, torch.tensor(kept), given.convention)
            training = recorded(run, seed, of)
            found = {"hydra": swept(training, None)} | {
                name: swept(training, way) for name, way in WAYS.items()
            }
            for name, parts in MEANS.items():
                found[name] = sum(share * found[part] for part, share in parts.items())
            for name, relevance in found.items():
                table[name][run].append(scores(kept @ relevance, truth))
    print("| curvature |", " | ".join(given.runs), "|")
    print("| --- " * (1 + len(given.runs)) + "|")
    for name, of_runs in table.items():
        print(
            f"| {name} |",
            " | ".join(interval(np.concatenate(of_runs[run])) for run in given.runs),
            "|",
        )


if __name__ == "__main__":
    main()
