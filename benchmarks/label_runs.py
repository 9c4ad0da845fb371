"""Trainings with wrong labels, kept as files.

A training is plain torch on one thread, without hydra-pipe. Each visit of a sample leaves its
logits, and 32 fixed random projections of the input of the last layer, in float16. `labels.py`
judges these files; `label_peers.py` trains on parts of the samples, and under a recorder.
"""

import gzip
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

I64 = NDArray[np.int64]
N_PROJECTIONS = 32
BATCH = 64
MOST_WORDS = 40


@dataclass(frozen=True)
class Cell:
    """A data set, how its labels are made wrong, and how a network is trained on it.

    Attributes:
        data: name in `DATA`.
        noise: "0", a percentage of labels that become any other class, "a" and a percentage that
            become the next class (adult: of the ones that become zeros), or a name of CIFAR-10N.
        epochs: passes over the samples.
        optimizer: "sgd" or "adamw".
        lr: learning rate at the first step.
        cosine: whether the learning rate falls to 0 along a cosine.
        crops: whether pictures are cropped and mirrored at random.
    """

    data: str
    noise: str
    epochs: int
    optimizer: str
    lr: float
    cosine: bool = False
    crops: bool = False


def _cells() -> dict[str, Cell]:
    cells = {f"digits-{x}": Cell("digits", x, 20, "sgd", 0.05) for x in ("10", "20", "30", "a20")}
    cells |= {f"mnist-{x}": Cell("mnist", x, 5, "sgd", 0.02) for x in ("10", "30", "a20")}
    cells |= {
        f"fashion-{x}": Cell("fashion", x, 5, "sgd", 0.02, True) for x in ("10", "20", "30", "a20")
    }
    cells |= {f"fashion-{x}W": Cell("fashion", x, 10, "adamw", 2e-3) for x in ("20", "a20")}
    cells["fashion-20L"] = Cell("fashion", "20", 40, "sgd", 0.02, True)
    cells["fashion-20S"] = Cell("fashion", "20", 2, "sgd", 0.02, True)
    cells |= {f"trec-{x}": Cell("trec", x, 10, "adamw", 2e-3) for x in ("10", "20", "a20")}
    cells["trec-20L"] = Cell("trec", "20", 40, "adamw", 2e-3)
    cells["sst2-20"] = Cell("sst2", "20", 6, "adamw", 2e-3)
    cells["sst2-20L"] = Cell("sst2", "20", 24, "adamw", 2e-3)
    cells |= {f"adult-{x}": Cell("adult", x, 10, "adamw", 2e-3) for x in ("20", "a30")}
    cells["adult-20L"] = Cell("adult", "20", 60, "adamw", 2e-3)
    cells |= {f"cifar-{x}": Cell("cifar", x, 12, "sgd", 0.05, True) for x in ("aggre", "worse")}
    cells["cifar-aggreA"] = Cell("cifar", "aggre", 12, "sgd", 0.05, True, crops=True)
    return cells


CELLS = _cells()
# The same trainings on labels of which none was made wrong.
CLEAN = {
    "digits-0": Cell("digits", "0", 20, "sgd", 0.05),
    "mnist-0": Cell("mnist", "0", 5, "sgd", 0.02),
    "fashion-0": Cell("fashion", "0", 5, "sgd", 0.02, True),
    "fashion-0W": Cell("fashion", "0", 10, "adamw", 2e-3),
    "trec-0": Cell("trec", "0", 10, "adamw", 2e-3),
    "sst2-0": Cell("sst2", "0", 6, "adamw", 2e-3),
    "adult-0": Cell("adult", "0", 10, "adamw", 2e-3),
    "cifar-0": Cell("cifar", "0", 12, "sgd", 0.05, True),
}


@dataclass(frozen=True)
class Data:
    """Samples, true labels, samples to test, and the network.

    Attributes:
        train, test: inputs, shape (n, ...).
        truth, tests: true labels, shape (n,).
        body: everything below the last layer.
        width: numbers that the body gives for a sample.
        human: labels that people gave, by name, shape (n,).
    """

    train: Tensor
    truth: I64
    test: Tensor
    tests: I64
    body: nn.Module
    width: int
    human: dict[str, I64]


def _read_idx(path: Path) -> NDArray[np.uint8]:
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _digits(_: Path, rng: np.random.Generator) -> Data:
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    truth = digits.target[order].astype(np.int64)
    body = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    return Data(images[:1400], truth[:1400], images[1400:], truth[1400:], body, 32, {})


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
    )


def _figures(directory: str) -> Callable[[Path, np.random.Generator], Data]:
    def load(data: Path, rng: np.random.Generator) -> Data:
        def part(name: str, chosen: Any) -> tuple[Tensor, I64]:
            images = _read_idx(data / directory / f"{name}-images-idx3-ubyte.gz")[chosen]
            labels = _read_idx(data / directory / f"{name}-labels-idx1-ubyte.gz")[chosen]
            return torch.tensor(images)[:, None] / 255, labels.astype(np.int64)

        chosen = rng.choice(60_000, 3000, replace=False)
        return Data(*part("train", chosen), *part("t10k", slice(2000)), _lenet(), 84, {})

    return load


class _Bag(nn.Module):
    """Mean of the embeddings of a text's words, and one hidden layer. Word 0 is no word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, 64, mode="mean", padding_idx=0)
        self.hidden = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.hidden(self.embedding(x)))


def _texts(name: str) -> Callable[[Path, np.random.Generator], Data]:
    def load(data: Path, _: np.random.Generator) -> Data:
        def part(which: str) -> tuple[list[list[str]], I64]:
            rows = (data / "text" / f"{name}_{which}.tsv").read_text().splitlines()[1:]
            pairs = [row.split("\t", 1) for row in rows]
            words = [re.findall(r"[a-z0-9']+", text.lower()) for _, text in pairs]
            return words, np.array([int(label) for label, _ in pairs])

        train, truth = part("train")
        test, tests = part("test")
        counts = Counter(word for words in train for word in words)
        known = {word: k + 2 for k, (word, c) in enumerate(sorted(counts.items())) if c > 1}
        numbers = max(known.values()) + 1

        def ids(texts: list[list[str]]) -> Tensor:
            rows = [[known.get(word, 1) for word in words[:MOST_WORDS]] or [1] for words in texts]
            return torch.tensor([row + [0] * (MOST_WORDS - len(row)) for row in rows])

        return Data(ids(train), truth, ids(test), tests, _Bag(numbers), 64, {})

    return load


def _adult(data: Path, rng: np.random.Generator) -> Data:
    def part(which: str) -> tuple[list[list[str]], I64]:
        text = gzip.decompress((data / "tabular" / f"adult.{which}.csv.gz").read_bytes()).decode()
        rows = [row.split(", ") for row in text.splitlines() if row.count(",") == 14]
        return [row[:-1] for row in rows], np.array([int(row[-1][0] == ">") for row in rows])

    rows, truth = part("train")
    others, tests = part("test")
    numeric = [k for k in range(14) if all(re.fullmatch(r"\d+", row[k]) for row in rows[:2000])]
    named = [k for k in range(14) if k not in numeric]
    values = {k: sorted({row[k] for row in rows}) for k in named}
    numbers = np.log1p(np.array([[float(row[k]) for k in numeric] for row in rows]))
    mean, deviation = numbers.mean(axis=0), numbers.std(axis=0)

    def inputs(chosen: list[list[str]]) -> Tensor:
        numbers = np.log1p(np.array([[float(row[k]) for k in numeric] for row in chosen]))
        flags = [np.array([row[k] for row in chosen])[:, None] == values[k] for k in named]
        joined = np.concatenate([(numbers - mean) / deviation, *flags], axis=1)
        return torch.tensor(joined, dtype=torch.float32)

    chosen = rng.choice(len(rows), 8000, replace=False)
    train = inputs([rows[i] for i in chosen])
    body = nn.Sequential(nn.Linear(train.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    return Data(train, truth[chosen], inputs(others[:4000]), tests[:4000], body, 32, {})


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm_one(self.one(x)))
        return F.relu(self.norm_two(self.two(hidden)) + self.shortcut(x))


def _photos(data: Path, rng: np.random.Generator) -> Data:
    with np.load(data / "cifar10" / "cifar10_subset_12k.npz", allow_pickle=False) as file:
        chosen = rng.choice(len(file["x_train"]), 4000, replace=False)
        images = [file["x_train"][chosen], file["x_test"]]
        names = ("aggre", "worse")
        human = {name: file[f"y_train_{name}"][chosen].astype(np.int64) for name in names}
        truth, tests = (file[key].astype(np.int64) for key in ("y_train", "y_test"))
    train, test = (
        (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25 for x in images
    )
    body = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return Data(train, truth[chosen], test, tests, body, 64, human)


DATA: dict[str, Callable[[Path, np.random.Generator], Data]] = {
    "digits": _digits,
    "mnist": _figures("mnist"),
    "fashion": _figures("fashion-mnist"),
    "trec": _texts("trec"),
    "sst2": _texts("sst2"),
    "adult": _adult,
    "cifar": _photos,
}


def given_labels(cell: Cell, data: Data, rng: np.random.Generator) -> I64:
    """Labels of which some are wrong, shape (n,)."""
    truth, classes = data.truth, int(data.truth.max()) + 1
    if cell.noise in data.human:
        return data.human[cell.noise]
    share = int(cell.noise.removeprefix("a")) / 100
    one_way = cell.noise.startswith("a") and classes == 2
    pool = np.flatnonzero(truth == 1) if one_way else np.arange(len(truth))
    wrong = rng.choice(pool, round(share * len(pool)), replace=False)
    steps = 1 if cell.noise.startswith("a") else rng.integers(1, classes, len(wrong))
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + steps) % classes
    return labels


def _cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = (torch.randint(0, 9, (len(images),), generator=generator) for _ in range(2))
    mirror = torch.rand(len(images), generator=generator) < 0.5
    crops = [
        padded[i, :, d : d + 32, r : r + 32]
        for i, (d, r) in enumerate(zip(down.tolist(), right.tolist(), strict=True))
    ]
    stacked = torch.stack(crops)
    return torch.where(mirror[:, None, None, None], stacked.flip(-1), stacked)


@dataclass(frozen=True)
class Trained:
    """A network after its training, and what was seen.

    Attributes:
        model: the network.
        logits: of each visit, float16, shape (epoch, n, class).
        inputs: inputs of the last layer, projected, of each visit, float16, shape (epoch, n, at
            most 32).
    """

    model: nn.Module
    logits: NDArray[np.float16]
    inputs: NDArray[np.float16]


# A context for each step, by the ids of its samples.
Step = Callable[[Tensor], AbstractContextManager[Any]]
Watch = Callable[[nn.Module, torch.optim.Optimizer], Step]


def unwatched(*_: object) -> Step:
    return lambda _: nullcontext()


def prepared(cell: Cell, seed: int, data: Path) -> tuple[Data, I64]:
    """Seed torch, and return the data, the network at its start, and labels of shape (n,)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 77])
    loaded = DATA[cell.data](data, rng)
    return loaded, given_labels(cell, loaded, rng)


def fit(
    cell: Cell, loaded: Data, labels: I64, seed: int, n_classes: int, watch: Watch = unwatched
) -> Trained:
    """Train the network of `loaded` on its samples and these labels.

    Args:
        cell: how to train.
        loaded: samples and body. The body is trained in place.
        labels: shape (n,).
        seed: seed of the order and of the projections. The head is drawn from torch's own state.
        n_classes: outputs of the head.
        watch: called with the network and its optimiser before the first step.
    """
    model = nn.Sequential(loaded.body, nn.Linear(loaded.width, n_classes))
    optimizer = _optimizer(cell, model)
    n, batch = len(labels), 32 if cell.data == "digits" else BATCH
    steps = cell.epochs * -(-n // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    few = loaded.width <= N_PROJECTIONS
    matrix = (
        torch.eye(loaded.width)
        if few
        else torch.randn(loaded.width, N_PROJECTIONS, generator=generator) / loaded.width**0.5
    )
    targets = torch.from_numpy(labels)
    logits = np.empty((cell.epochs, n, n_classes), np.float16)
    inputs = np.empty((cell.epochs, n, matrix.shape[1]), np.float16)
    hidden: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, given: hidden.append(given[0].detach()))
    step = watch(model, optimizer)
    for epoch in range(cell.epochs):
        for ids in torch.randperm(n, generator=generator).split(batch):
            x = loaded.train[ids]
            hidden.clear()
            with step(ids):
                output = model(_cropped(x, generator) if cell.crops else x)
                optimizer.zero_grad()
                F.cross_entropy(output, targets[ids]).backward()
                optimizer.step()
            if cell.cosine:
                schedule.step()
            logits[epoch, ids.numpy()] = output.detach().numpy()
            inputs[epoch, ids.numpy()] = (hidden[-1] @ matrix).numpy()
    return Trained(model.eval(), logits, inputs)


def _optimizer(cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    if cell.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=cell.lr, weight_decay=1e-2)
    momentum, decay = (0.0, 1e-4) if cell.data == "digits" else (0.9, 5e-4)
    return torch.optim.SGD(model.parameters(), lr=cell.lr, momentum=momentum, weight_decay=decay)


def probabilities(model: nn.Module, samples: Tensor) -> NDArray[np.float64]:
    """Return the chance of each class for each sample, shape (n, class)."""
    with torch.no_grad():
        found = torch.cat([model(x).double().softmax(1) for x in samples.split(500)])
    return np.asarray(found)


def train(cell: Cell, seed: int, data: Path) -> dict[str, NDArray[Any]]:
    """Train once, and return what was seen.

    Returns:
        logits and inputs as in `Trained`; labels and truth, int64, shape (n,); accuracy on the
        test samples, float64, shape ().
    """
    loaded, labels = prepared(cell, seed, data)
    trained = fit(cell, loaded, labels, seed, int(loaded.truth.max()) + 1)
    predicted = probabilities(trained.model, loaded.test).argmax(1)
    return {
        "logits": trained.logits,
        "inputs": trained.inputs,
        "labels": labels,
        "truth": loaded.truth,
        "accuracy": np.array(float((predicted == loaded.tests).mean())),
    }


def kept(name: str, seed: int, data: Path, scratch: Path) -> dict[str, NDArray[Any]]:
    """What `train` returns, from a file in `scratch` if there is one."""
    path = scratch / f"{name}-{seed}.npz"
    if not path.exists():
        torch.set_num_threads(1)
        found = train((CELLS | CLEAN)[name], seed, data)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, **found)  # type: ignore[arg-type]
        partial.rename(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
