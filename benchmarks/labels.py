"""Wrong labels found from one training: `hydra_pipe.labels` beside the mean loss and AUM.

    python benchmarks/labels.py DATA SCRATCH [--seeds 5,6,7] [--cells NAME,NAME]

DATA is the directory that has mnist, fashion-mnist, cifar10, text and tabular in it. Trainings are
kept in SCRATCH (`label_runs.py`), and a training that is there is not done again. Each cell shows
ROC-AUC, average precision, and precision among as many as are wrong. A cut shows precision, recall
and F1. All of them are means over the seeds. A mean over cells gives each cell the same weight.
"""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from label_runs import CELLS, CLEAN, kept
from numpy.typing import NDArray

from hydra_pipe.labels import Dynamics, Verdict, judge
from hydra_pipe.maths.rank_statistics import roc_auc

F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]


def ranked(score: F64, wrong: Bools) -> list[float]:
    """ROC-AUC, average precision, precision among as many as are wrong."""
    hits = wrong[np.argsort(-score, kind="stable")]
    average = (np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean()
    return [roc_auc(score, wrong), float(average), float(hits[: wrong.sum()].mean())]


def found(proposed: NDArray[np.int64], wrong: Bools) -> list[float]:
    """Precision, recall and F1 of what is proposed."""
    hits = float(wrong[proposed].sum())
    precision, recall = hits / max(len(proposed), 1), hits / wrong.sum()
    return [precision, recall, 2 * hits / (len(proposed) + wrong.sum())]


def measured(run: Mapping[str, NDArray[Any]], verdict: Verdict) -> dict[str, list[float]]:
    """Figures of one training, by column of the table."""
    labels, truth = run["labels"], run["truth"]
    wrong, n = labels != truth, len(labels)
    low, high = verdict.n_wrong.low, verdict.n_wrong.high
    columns = {
        "test accuracy": [float(run["accuracy"])],
        "wrong, %": [100 * wrong.mean()],
        "estimated, %": [100 * verdict.n_wrong.value / n, 100 * low / n, 100 * high / n],
        "within": [float(low <= wrong.sum() <= high)],
        "proposed, %": [100 * verdict.n_proposed / n],
    }
    if wrong.any():
        statistics = verdict.evidence.statistics
        columns |= {
            "mean loss": ranked(statistics.mean_loss, wrong),
            "AUM": ranked(-statistics.mean_margin, wrong),
            "judge": ranked(verdict.score, wrong),
            "recommended cut": found(verdict.proposed, wrong),
            "expected precision": [verdict.precision],
            "cautious cut": found(verdict.order[: verdict.n_cautious], wrong),
            "suggested right": [float((verdict.suggested == truth)[wrong].mean())],
        }
    return columns


class Tenth(NamedTuple):
    """Samples whose chance of a wrong label lies from `low` to `high`."""

    low: float
    high: float
    n: int
    chance: float  # mean
    wrong: float  # share


def reliability(chance: F64, wrong: Bools) -> list[Tenth]:
    """Return each tenth of the chance that has samples."""
    rows = []
    for low, high in pairwise(np.linspace(0, 1, 11).tolist()):
        there = (chance >= low) & ((chance < high) | (high == 1))
        if there.any():
            mean, share = float(chance[there].mean()), float(wrong[there].mean())
            rows.append(Tenth(low, high, int(there.sum()), mean, share))
    return rows


def calibration(runs: list[tuple[F64, Bools]]) -> None:
    """Print the share of wrong labels among samples of each range of the chance, over all runs."""
    print("\n| chance | samples | mean chance | wrong |\n| --- | --- | --- | --- |")
    chance = np.concatenate([c for c, _ in runs])
    wrong = np.concatenate([w for _, w in runs])
    for row in reliability(chance, wrong):
        print(f"| {row.low:.1f} to {row.high:.1f} | {row.n} | {row.chance:.2f} | {row.wrong:.2f} |")


def line(name: str, columns: Mapping[str, list[float]], titles: list[str]) -> str:
    cells = ["/".join(f"{v:.3f}" for v in columns.get(title, [])) for title in titles]
    return f"| {name} | " + " | ".join(cells) + " |"


def averaged(several: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Means of each column's figures."""
    titles = [title for title in several[0] if all(title in own for own in several)]
    return {title: np.mean([own[title] for own in several], axis=0).tolist() for title in titles}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seeds", default="5,6,7")
    parser.add_argument("--cells", default=",".join(CELLS | CLEAN))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    cells: dict[str, dict[str, list[float]]] = {}
    chances: list[tuple[F64, Bools]] = []
    for name in given.cells.split(","):
        runs = [kept(name, seed, given.data, given.scratch) for seed in seeds]
        verdicts = [judge(Dynamics(run["labels"], run["logits"], run["inputs"])) for run in runs]
        chances += [
            (verdict.chance, run["labels"] != run["truth"])
            for run, verdict in zip(runs, verdicts, strict=True)
        ]
        cells[name] = averaged([measured(*pair) for pair in zip(runs, verdicts, strict=True)])
        if len(cells) == 1:
            titles = list(cells[name])
            print("| cell | " + " | ".join(titles) + " |\n" + "| --- " * (len(titles) + 1) + "|")
        print(line(name, cells[name], titles), flush=True)
    for title, group in (("mean, some wrong", CELLS), ("mean, none wrong", CLEAN)):
        own = [columns for name, columns in cells.items() if name in group]
        if own:
            print(line(title, averaged(own), titles))
    calibration(chances)


if __name__ == "__main__":
    main()
