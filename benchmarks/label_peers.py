"""Wrong labels found by `hydra-pipe clean`, by cleanlab and by aum, on the same trainings.

    python benchmarks/label_peers.py DATA [--seeds 5] [--cells NAME,NAME] [--plot FILE]

DATA is the directory that has mnist, fashion-mnist, text and tabular in it. cleanlab and aum are
installed beside hydra-pipe, from `peers/requirements`. Cells and trainings are those of
`label_runs.py`. Figures are means over the seeds.

- hydra-pipe: the verdict of `hydra_pipe.labels.judge` on the training's own dynamics. Its seconds
  are what `Recorder` adds to the training, and `hydra_pipe.clean` on the recording.
- cleanlab: five more trainings, each without a fifth of the samples, give chances out of sample.
  `find_label_issues` proposes; `get_label_quality_scores` orders. Both have their defaults.
- aum: `AUMCalculator` orders by the logits of the same training. Its own threshold needs samples
  that get a class of their own, as many as an average class has. Two more trainings have disjoint
  ones. A label is proposed if its AUM lies below the 99th percentile of these samples, in the
  training where it is not one of them. Its paper trains up to the first fall of the learning rate.

A suggestion is the likeliest class other than the given label. Seconds are of the processor, beyond
the one training: while it runs, and after it. They leave out loading the data.
"""

import argparse
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from aum import AUMCalculator
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from label_runs import CELLS, I64, Cell, Data, Step, Trained, fit, prepared, probabilities
from labels import F64, Bools, found, ranked, reliability
from matplotlib.figure import Figure
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.optim import Optimizer

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.labels import Dynamics, judge

# New lines beside a plain training loop that ends in an order, a set and suggestions. Each import
# and each statement is one; `train` is the plain loop as a function of its data.
LINES = {
    "hydra-pipe": """
import hydra_pipe
recorder = hydra_pipe.Recorder(model, optimizer, "run", n_samples=len(data))
loader = recorder.track(loader)
recorder.close()
found = hydra_pipe.clean("run")
""",
    "cleanlab": """
from cleanlab.filter import find_label_issues
from sklearn.model_selection import StratifiedKFold
chances = np.empty((len(data), n_classes))
for others, held in StratifiedKFold(5, shuffle=True).split(labels, labels):
    model = train(Subset(data, others))
    with torch.no_grad():
        chances[held] = torch.cat([model(x).softmax(1) for x, _ in batches(Subset(data, held))])
found = find_label_issues(labels, chances, return_indices_ranked_by="self_confidence")
suggested = chances[found].argmax(1)
""",
    "aum": """
from aum import AUMCalculator, DatasetWithIndex
parts = np.random.permutation(len(data))[: 2 * (len(data) // (n_classes + 1))].reshape(2, -1)
values = []
for k, part in enumerate(parts):
    data.labels = labels.copy()
    data.labels[part] = n_classes
    calculator = AUMCalculator(f"aum-{k}")
    train(DatasetWithIndex(data), n_classes + 1, calculator)
    calculator.update(logits.detach(), targets, ids.tolist())  # in the loop, at each step
    calculator.finalize()
    values.append(pd.read_csv(f"aum-{k}/aum_values.csv").set_index("sample_id").aum.sort_index())
cuts = [np.percentile(value[part], 99) for value, part in zip(values, parts)]
first = ~np.isin(np.arange(len(data)), parts[0])
found = np.flatnonzero(np.where(first, values[0] <= cuts[0], values[1] <= cuts[1]))
""",
}
Side = dict[str, list[float]]


@dataclass(frozen=True)
class Finding:
    """Order, proposal and suggestions of one side.

    Attributes:
        suspicion: the higher, the more suspicious, shape (n,).
        proposed: samples proposed without any truth.
        suggested: the likeliest other class, shape (n,). None: no suggestions.
        during, after: seconds of the processor beyond the one training, in it and after it.
    """

    suspicion: F64
    proposed: I64
    suggested: I64 | None
    during: float
    after: float


@dataclass(frozen=True)
class Given:
    """A cell with its one training.

    Attributes:
        data: directory of the data sets.
        trained: the one training.
        seconds: of the processor, which the training took.
    """

    cell: Cell
    seed: int
    data: Path
    n_classes: int
    trained: Trained
    seconds: float

    def load(self) -> tuple[Data, I64]:
        """Return samples, the network at its start, and given labels."""
        return prepared(self.cell, self.seed, self.data)


def by_hydra_pipe(given: Given) -> tuple[Finding, F64]:
    """Return the finding, and the chance of each label to be wrong, shape (n,)."""
    loaded, labels = given.load()
    recorders: list[Recorder] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"

        def watch(model: nn.Module, optimizer: Optimizer) -> Step:
            recorders.append(Recorder(model, optimizer, directory, n_samples=len(labels)))
            return recorders[0].step

        start = time.process_time()
        recorded = fit(given.cell, loaded, labels, given.seed, given.n_classes, watch)
        recorders[0].close()
        between = time.process_time()
        hydra_pipe.clean(directory)
        during, after = between - start - given.seconds, time.process_time() - between
    assert np.array_equal(recorded.logits, given.trained.logits)
    verdict = judge(Dynamics(labels, given.trained.logits, given.trained.inputs))
    finding = Finding(verdict.score, verdict.proposed, verdict.suggested, during, after)
    return finding, verdict.chance


def by_cleanlab(given: Given) -> Finding:
    loaded, labels = given.load()
    start = time.process_time()
    chances = np.empty((len(labels), given.n_classes))
    folds = StratifiedKFold(5, shuffle=True, random_state=given.seed)
    for others, held in folds.split(labels, labels):
        part = replace(loaded, train=loaded.train[others], body=deepcopy(loaded.body))
        model = fit(given.cell, part, labels[others], given.seed, given.n_classes).model
        chances[held] = probabilities(model, loaded.train[held])
    suspicion = -get_label_quality_scores(labels, chances)
    proposed = np.flatnonzero(find_label_issues(labels, chances, n_jobs=1))
    seconds = time.process_time() - start
    chances[np.arange(len(labels)), labels] = -1
    return Finding(suspicion, proposed, chances.argmax(1), 0, seconds)


def aum_of(trained: Trained, labels: I64) -> F64:
    """Area under the margin of each sample by aum, shape (n,)."""
    targets = torch.from_numpy(labels)
    with tempfile.TemporaryDirectory() as directory:
        calculator = AUMCalculator(directory)
        for logits in torch.from_numpy(trained.logits).float():
            for ids in torch.arange(len(labels)).split(64):
                calculator.update(logits[ids], targets[ids], ids.tolist())
        calculator.finalize()
        table = pd.read_csv(Path(directory) / "aum_values.csv")
    return np.asarray(table.set_index("sample_id")["aum"].sort_index())


def by_aum(given: Given) -> Finding:
    loaded, labels = given.load()
    n, extra = len(labels), given.n_classes
    start = time.process_time()
    suspicion = -aum_of(given.trained, labels)
    between = time.process_time()
    size = n // (extra + 1)
    parts = np.random.default_rng(given.seed).permutation(n)[: 2 * size].reshape(2, size)
    below: list[Bools] = []
    for part in parts:
        own = labels.copy()
        own[part] = extra
        again = replace(loaded, body=deepcopy(loaded.body))
        values = aum_of(fit(given.cell, again, own, given.seed, extra + 1), own)
        below.append(values <= np.percentile(values[part], 99))
    in_first = np.isin(np.arange(n), parts[0])
    proposed = np.flatnonzero(np.where(in_first, below[1], below[0]))
    return Finding(suspicion, proposed, None, between - start, time.process_time() - between)


def figures(finding: Finding, labels: I64, truth: I64) -> Side:
    """Figures of one side, by column of the table."""
    wrong = labels != truth
    auc, _, precision = ranked(finding.suspicion, wrong)
    columns = {
        "missed": [1 - precision],
        "ROC-AUC": [auc],
        "precision / recall / F1": found(finding.proposed, wrong),
    }
    if finding.suggested is not None:
        right = finding.suggested == truth
        hits = finding.proposed[wrong[finding.proposed]]
        columns["suggested right"] = [float(right[hits].mean()), float(right[wrong].mean())]
    return columns | {"seconds": [finding.during, finding.after]}


def measured(name: str, seed: int, data: Path) -> tuple[dict[str, Side], float, F64, Bools]:
    """Return the figures of each side, the training's seconds, chances, and what is wrong."""
    cell = CELLS[name]
    seconds = 0.0
    for _ in range(2):  # their mean: what others take is compared with it
        loaded, labels = prepared(cell, seed, data)
        n_classes = int(loaded.truth.max()) + 1
        start = time.process_time()
        trained = fit(cell, loaded, labels, seed, n_classes)
        seconds += (time.process_time() - start) / 2
    given = Given(cell, seed, data, n_classes, trained, seconds)
    ours, chance = by_hydra_pipe(given)
    sides = {"hydra-pipe": ours, "cleanlab": by_cleanlab(given), "aum": by_aum(given)}
    columns = {side: figures(each, labels, loaded.truth) for side, each in sides.items()}
    return columns, seconds, chance, labels != loaded.truth


def line(name: str, side: str, columns: Side, training: float) -> str:
    """One row of the table."""
    cells = [
        " / ".join(f"{value:.3f}" for value in columns.get(title, []))
        for title in ("missed", "ROC-AUC", "precision / recall / F1", "suggested right")
    ]
    seconds = " / ".join(f"{value:.1f}" for value in columns["seconds"])
    row = [name, side, *cells, seconds, f"{training:.1f}", str(LINES[side].count("\n") - 1)]
    return "| " + " | ".join(row) + " |"


def curve(chance: F64, wrong: Bools) -> tuple[list[float], list[float]]:
    """Mean chance and share of wrong labels in each tenth of the chance with 20 samples or more."""
    rows = [row for row in reliability(chance, wrong) if row.n >= 20]
    return [row.chance for row in rows], [row.wrong for row in rows]


def plot(cells: dict[str, tuple[F64, Bools]], path: Path) -> None:
    """Draw the share of wrong labels over the estimated chance, for each cell and for all."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9})
    figure = Figure(figsize=(4.6, 4.2), layout="tight")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#66727f", linewidth=0.8, linestyle="--")
    for (name, pair), mark in zip(cells.items(), "osv^DXP*<>" * 4, strict=False):
        axes.plot(*curve(*pair), linewidth=0.8, marker=mark, markersize=3.5, alpha=0.8, label=name)
    together = (np.concatenate(each) for each in zip(*cells.values(), strict=True))
    axes.plot(*curve(*together), color="#1f2933", linewidth=2, label="all")
    axes.set(xlabel="estimated chance that a label is wrong", ylabel="share that is wrong")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", default="5")
    parser.add_argument("--cells", default="digits-20,digits-a20,fashion-20,trec-20,adult-20")
    parser.add_argument("--plot", type=Path, help="a picture of the chances, .svg or .png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {version(name)}" for name in ("cleanlab", "aum", "torch")))
    titles = "cell | by | missed | ROC-AUC | precision / recall / F1 of its set "
    titles += (
        "| suggested right, of the found / of all wrong | seconds during / after the training "
    )
    titles += "| the training itself | lines"
    print(f"| {titles} |\n" + "| --- " * 9 + "|")
    measured("digits-20", 0, given.data)  # what a first step loads counts for no side
    cells = {}
    for name in given.cells.split(","):
        runs = [measured(name, int(seed), given.data) for seed in given.seeds.split(",")]
        for side in LINES:
            several = [columns[side] for columns, *_ in runs]
            mean = {title: np.mean([s[title] for s in several], 0).tolist() for title in several[0]}
            training = float(np.mean([run[1] for run in runs]))
            print(line(name, side, mean, training), flush=True)
        cells[name] = (np.concatenate([r[2] for r in runs]), np.concatenate([r[3] for r in runs]))
    if given.plot:
        plot(cells, given.plot)


if __name__ == "__main__":
    main()
