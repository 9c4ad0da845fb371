"""Which statistic finds wrong labels, and where to cut: what `clean` does, beside what else was
tried, as Markdown tables.

    python benchmarks/cleaning.py DATA SCRATCH [--cells NAME,NAME]

DATA is the directory that has mnist, fashion-mnist and cifar10 in it. Runs are kept in SCRATCH, and
what is done there is not done again. Statistics: ROC-AUC, and precision among as many as are wrong.
Cuts: how many are proposed, precision and recall. By `hydra`. The accuracy without what is proposed
is `hydra-pipe clean RUN --retrain`, on the same runs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hydra_pipe
from hydra_pipe.cleaning.decision import most_harmed, scores_of
from hydra_pipe.loading import load_pipeline, recorded_assignments
from hydra_pipe.maths.outliers import robust_scores, tail_threshold
from hydra_pipe.maths.rank_statistics import roc_auc

PIPELINES = Path(__file__).parents[1] / "pipelines"
F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
FIGURES = {"n_train": 3000, "n_test": 500, "epochs": 5, "lr": 0.02}
PHOTOS = {"n_train": 2000, "n_test": 500, "epochs": 5, "width": 8}
# name -> pipeline, directory in DATA, settings
CELLS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    **{f"digits-{share}": ("digits.py", None, {"noise": share}) for share in (0.0, 0.1, 0.2, 0.3)},
    **{
        f"mnist-{p}": ("mnist.py", "mnist", {"network": "lenet5"} | FIGURES | {"noise": p / 100})
        for p in (10, 30)
    },
    **{
        f"fashion-{p}": ("fashion_mnist.py", "fashion-mnist", FIGURES | {"noise": p / 100})
        for p in (10, 20, 30)
    },
    "aggre": ("cifar10n.py", "cifar10", PHOTOS | {"labels": "aggre"}),
}


def z_score(below: float) -> Callable[[F64], Bools]:
    return lambda scores: scores < below


def mirrored(most_false: float) -> Callable[[F64], Bools]:
    """As many of the lowest as there may be with this share of all of them accounted for by the
    mirrored upper half.
    """

    def cut(scores: F64) -> Bools:
        ordered, null = np.sort(scores), np.sort(-scores)
        share = (np.searchsorted(null, ordered, "right") + 1) / np.arange(1, len(scores) + 1)
        fit = np.flatnonzero((share <= most_false) & (ordered < 0))
        return scores <= ordered[fit[-1]] if len(fit) else np.zeros(len(scores), bool)

    return cut


def local(scores: F64) -> Bools:
    return scores < tail_threshold(scores)


def mixture(scores: F64) -> Bools:
    """Two normal distributions by expectation maximisation; those that the lower one is likelier
    for.
    """
    x = scores.clip(-50, 50)
    mean, deviation, share = np.array([0.0, -3.0]), np.array([1.0, 3.0]), np.array([0.9, 0.1])
    for _ in range(200):
        logs = np.log(share) - np.log(deviation) - ((x[:, None] - mean) / deviation) ** 2 / 2
        parts = np.exp(logs - logs.max(axis=1, keepdims=True))
        parts /= parts.sum(axis=1, keepdims=True)
        weight = parts.sum(axis=0) + 1e-9
        mean = (parts * x[:, None]).sum(axis=0) / weight
        deviation = np.sqrt((parts * (x[:, None] - mean) ** 2).sum(axis=0) / weight) + 1e-3
        share = weight / len(x)
    low = int(mean.argmin())
    lower: Bools = (parts[:, low] > 0.5) & (x < mean[1 - low])
    return lower


def otsu(scores: F64) -> Bools:
    """The cut with the largest variance between its two sides."""
    ordered = np.sort(scores)
    n, sums = len(ordered), np.cumsum(ordered)
    k = np.arange(1, n)
    between = k * (n - k) * (sums[:-1] / k - (sums[-1] - sums[:-1]) / (n - k)) ** 2
    return scores < ordered[int(between.argmax()) + 1]


CUTS: dict[str, Callable[[F64], Bools]] = {
    "below -3": z_score(-3.0),
    "below -3.5": z_score(-3.5),
    "mirrored, 10 %": mirrored(0.1),
    "mirrored, 20 %": mirrored(0.2),
    "mirrored, locally 50 % (`clean`)": local,
    "two normals, EM": mixture,
    "Otsu": otsu,
}


def statistics(
    relevance: F64, own: F64, labels: NDArray[Any], tests: NDArray[Any]
) -> dict[str, F64]:
    """Candidates, the lowest the most suspicious."""
    classes, groups = np.unique(tests, return_inverse=True)
    by_class = relevance @ (groups[:, None] == np.arange(len(classes))) / np.bincount(groups)
    others = np.stack([robust_scores(column, labels) for column in by_class.T], axis=1)
    others[classes[None, :] == labels[:, None]] = np.inf
    return {
        "sum over the tests": relevance.sum(axis=1),
        "the same, within its label (`clean`)": scores_of(relevance.sum(axis=1), labels),
        "sum over the tests of its label": np.where(tests == labels[:, None], relevance, 0.0).sum(
            axis=1
        ),
        "the most harmed other class, within its label": others.min(axis=1),
        "`self`, the highest first": -own,
    }


def suggestions(
    relevance: F64, labels: NDArray[Any], tests: NDArray[Any], truth: NDArray[Any], chosen: Bools
) -> str:
    classes, groups = np.unique(tests, return_inverse=True)
    by_class = relevance @ (groups[:, None] == np.arange(len(classes))) / np.bincount(groups)
    worst = most_harmed(by_class, classes, labels)
    made = chosen & (worst >= 0)
    return (
        f"{int((classes[worst] == truth)[made].sum())} of {int(made.sum())}"
        if made.any()
        else "none"
    )


def found(chosen: Bools, wrong: Bools) -> str:
    hits = int((chosen & wrong).sum())
    if not chosen.any() or not wrong.any():
        return str(int(chosen.sum()))
    return f"{int(chosen.sum())}: {hits / chosen.sum():.2f}, {hits / wrong.sum():.2f}"


def column(name: str, data: Path, scratch: Path) -> dict[str, str]:
    """A column of the table: by row."""
    file, directory, settings = CELLS[name]
    given = settings | ({} if directory is None else {"data": data / directory})
    run = scratch / name
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    for command in (
        ["record", PIPELINES / file, run, *words],
        ["reduce", run],
        ["reduce", run, "--method", "self"],
    ):
        subprocess.run(
            [sys.executable, "-m", "hydra_pipe.cli.app", *map(str, command)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    opened = hydra_pipe.open_run(run)
    recorded = opened.info()["stages"]["record"]
    pipeline = load_pipeline(
        str(PIPELINES / file), recorded_assignments(recorded["settings"])
    ).build()
    labels, tests = (np.asarray(opened.gradients.labels(which)) for which in ("train", "test"))
    truth = labels if pipeline.true_labels is None else np.asarray(pipeline.true_labels)
    wrong = labels != truth
    relevance, own = (
        np.asarray(opened.relevance(method), np.float64) for method in ("hydra", "self")
    )
    n_wrong = int(wrong.sum())
    rows = {
        "wrong": f"{n_wrong} of {len(wrong)}",
        "test accuracy": f"{recorded['facts']['test_accuracy']:.3f}",
    }
    for title, scores in statistics(relevance, own[:, 0], labels, tests).items():
        first = np.argsort(scores, kind="stable")[:n_wrong]
        rows[title] = f"{roc_auc(-scores, wrong):.3f}, {wrong[first].mean():.2f}" if n_wrong else ""
    scores = scores_of(relevance.sum(axis=1), labels)
    for title, cut in CUTS.items():
        rows[title] = found(cut(scores), wrong)
    rows["labels suggested for them, right"] = suggestions(
        relevance, labels, tests, truth, local(scores)
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS)}")
    given = parser.parse_args()
    cells = given.cells.split(",")
    columns = [column(name, given.data.absolute(), given.scratch.absolute()) for name in cells]
    print("| | " + " | ".join(cells) + " |")
    print("| --- " * (len(cells) + 1) + "|")
    for title in columns[0]:
        print(f"| {title} | " + " | ".join(own[title] for own in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
