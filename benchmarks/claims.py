"""The claims of the HYDRA paper (AAAI 2021), checked by commands that anybody can type, and printed
as Markdown tables.

    python benchmarks/claims.py DATA SCRATCH [--parts noise,hessian] [--cells NAME,NAME]

DATA is the directory that has mnist, fashion-mnist and cifar10 in it. Runs are kept in SCRATCH, and
what is done there is not done again.

noise: wrong labels, flipped or those that people gave, found by the mean relevance over the test
samples. hessian: `hydra` against `hydra-exact` after each epoch, for the test samples 0 to 9, with
`hydra-fisher` and `influence` beside. The commands go to standard error.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

PIPELINES = Path(__file__).parents[1] / "pipelines"
METHODS = ("hydra", "hydra-fisher", "hydra-exact", "influence", "tracin", "grad-dot", "grad-cos")
COMPARED = ("hydra", "hydra-fisher", "influence")
EXACT, TESTS = "hydra-exact", "0-9"
APART = {
    name: name.replace("_", " ")
    for name in ("method", "steps", "distance", "relative_error", "wrong_signs", "spearman")
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        title: of its table.
        pipeline: file in `PIPELINES`.
        data: directory in DATA.
        settings: of the pipeline function.
        left_out: as of `evaluate ... noise`.
    """

    title: str
    pipeline: str
    data: str
    settings: dict[str, Any]
    left_out: str = "0"


FIGURES = {"n_train": 3000, "n_test": 500, "epochs": 5, "lr": 0.02}
PHOTOS = {"n_train": 2000, "n_test": 300, "epochs": 5, "width": 8}
SMALL = {"n_train": 1000, "n_test": 100, "epochs": 5, "lr": 0.02}
MNIST, FASHION = ("mnist.py", "mnist"), ("fashion_mnist.py", "fashion-mnist")
LENET = {"network": "lenet5"}
NOISE = {
    f"{name}-{percent}": Cell(
        f"{title}, LeNet-5, {percent} % of labels flipped",
        *of,
        own | FIGURES | {"noise": percent / 100},
        "1" if (name, percent) == ("fashion", 20) else "0",
    )
    for percent in (20, 10, 30)
    for name, title, of, own in (
        ("mnist", "MNIST", MNIST, LENET),
        ("fashion", "Fashion-MNIST", FASHION, {}),
    )
} | {
    name: Cell(
        f"CIFAR-10N `{name}`, small ResNet", "cifar10n.py", "cifar10", PHOTOS | {"labels": name}
    )
    for name in ("aggre", "worse")
}
HESSIAN = {
    "hessian-mnist": Cell("MNIST, LeNet-5", *MNIST, LENET | SMALL),
    "hessian-fashion": Cell("Fashion-MNIST, LeNet-5", *FASHION, SMALL),
}


@dataclass(frozen=True)
class Run:
    """Commands on the run of one cell."""

    cell: Cell
    data: Path
    path: Path

    @property
    def _pipeline(self) -> str:
        return str(PIPELINES / self.cell.pipeline)

    @property
    def _settings(self) -> list[str]:
        settings = {"data": self.data / self.cell.data} | self.cell.settings
        return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def record(self) -> None:
        _do("record", self._pipeline, self.path, *self._settings, "--test-every", "epoch")

    def reduce(self, method: str, *options: Any) -> None:
        _do("reduce", self.path, "--method", method, *options)

    def evaluate(self, kind: str, *options: Any) -> list[Row]:
        _do("evaluate", self._pipeline, self.path, kind, *self._settings, *options)
        rows: list[Row] = pq.read_table(
            self.path / "evaluation" / kind / "table.parquet"
        ).to_pylist()
        return rows

    def facts(self) -> Any:
        return json.loads((self.path / "run.json").read_text())["stages"]["record"]["facts"]


def noise(run: Run) -> None:
    """Which methods put wrong labels first."""
    run.record()
    for method in METHODS:
        run.reduce(method, "--mean")
    run.reduce("self")
    rows = run.evaluate("noise", "--left-out", run.cell.left_out)
    summary = json.loads((run.path / "evaluation" / "noise" / "summary.json").read_text())
    wrong = summary["wrong"]
    accuracy = (
        f"; accuracy {run.facts()['test_accuracy']:.3f}" if "test_accuracy" in run.facts() else ""
    )
    print(
        f"\n{run.cell.title}: {wrong} of {run.cell.settings['n_train']} labels are "
        f"wrong{accuracy}\n"
    )
    columns = {
        "roc_auc": "ROC-AUC",
        f"precision_{wrong}": f"precision at {wrong}",
        f"without_{wrong}": f"accuracy without {wrong}",
    }
    _table(rows, {"method": "method"} | columns)
    print("\nThe same means, against that of hydra-exact\n")
    _table(run.evaluate("approximation"), APART)


def hessian(run: Run) -> None:
    """How far the fast form is from the one with the Hessian, as training goes on."""
    run.record()
    batches = -(-run.cell.settings["n_train"] // 64)
    epochs = run.cell.settings["epochs"]
    for up_to_step in [["--up-to-step", epoch * batches] for epoch in range(1, epochs)] + [[]]:
        for method in (*COMPARED, EXACT):
            run.reduce(method, "--tests", TESTS, *up_to_step)
    rows = run.evaluate("approximation")
    print(
        f"\n{run.cell.title}, {run.cell.settings['n_train']} samples, test samples {TESTS}, "
        f"{batches} steps an epoch\n"
    )
    _table(rows, APART)


def _do(*words: Any) -> None:
    """Run a command of hydra-pipe."""
    command = [str(word) for word in words]
    print(
        f"{time.strftime('%H:%M:%S')} hydra-pipe {shlex.join(command)}", file=sys.stderr, flush=True
    )
    subprocess.run(
        [sys.executable, "-m", "hydra_pipe.cli.app", *command],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _table(rows: list[Row], columns: dict[str, str]) -> None:
    columns = {name: title for name, title in columns.items() if name in rows[0]}
    print("| " + " | ".join(columns.values()) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(_cell(row[name]) for name in columns) + " |", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"`{value}`" if isinstance(value, str) and not value.startswith("(") else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--parts", default="noise,hessian")
    parser.add_argument(
        "--cells",
        default="",
        help=f"of {', '.join([*NOISE, *HESSIAN])}; if not given: all of the parts",
    )
    given = parser.parse_args()
    chosen = {"noise": (noise, NOISE), "hessian": (hessian, HESSIAN)}
    for part in given.parts.split(","):
        check, cells = chosen[part]
        for name, cell in cells.items():
            if not given.cells or name in given.cells.split(","):
                check(Run(cell, given.data.absolute(), given.scratch.absolute() / name))


if __name__ == "__main__":
    main()
