"""What is lost by storing fewer bytes: rank correlation of `hydra` relevance with the exact float32
one, against bytes a row.

    python benchmarks/fidelity.py DATA [--runs lenet,gpt] [--plot FILE.svg] [--json FILE]

LeNet-5 on Fashion-MNIST (SGD with momentum) and the character GPT (AdamW), each trained anew for
every encoding and dtype: the same seed, and that the final weights are the same is checked.
Spearman over the training samples, mean over the test samples. Bytes a row are those on disk,
compressed, of rows and scales. Needs 4 GB in the temporary directory. Prints a Markdown table.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from loops import disk_bytes
from scipy.stats import rankdata

import hydra_pipe
from hydra_pipe import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import fashion_mnist
import shakespeare

DIMS = (256, 1024, 4096)
WORKLOADS: dict[str, tuple[str, Callable[[Path], Pipeline]]] = {
    "lenet": (
        "LeNet-5, Fashion-MNIST, SGD",
        lambda data: fashion_mnist.pipeline(
            data / "fashion-mnist", n_train=1500, n_test=100, epochs=3
        ),
    ),
    "gpt": (
        "GPT 4 x 128, Shakespeare, AdamW",
        lambda data: shakespeare.pipeline(
            data / "text", n_train=256, n_test=50, epochs=3, warm_up=8
        ),
    ),
}


@dataclass(frozen=True)
class Point:
    """One way to store the rows, and what came of it.

    Args:
        encoding, dtype: as recorded.
        dim: budget in columns; None: it plays no part.
        columns: of a row.
        exact: whether nothing was projected.
        bytes_a_row: on disk.
        spearman: with the exact float32 relevance.
    """

    encoding: str
    dim: int | None
    dtype: str
    columns: int
    exact: bool
    bytes_a_row: float
    spearman: float


def ways() -> Iterator[tuple[str, int | None, str]]:
    """Encoding, dim and dtype; the reference first."""
    yield from (("exact", None, dtype) for dtype in ("float32", "float16", "int8"))
    for encoding in ("auto", "projected"):
        for dim in DIMS:
            yield from ((encoding, dim, dtype) for dtype in ("float16", "int8"))


def spearman(found: np.ndarray, truth: np.ndarray) -> float:
    """Rank correlation over the first dimension, mean over the second."""
    ranks = [rankdata(values, axis=0) for values in (found, truth)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    return float(((a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))).mean())


def measure(build: Callable[[Path], Pipeline], data: Path) -> list[Point]:
    points: list[Point] = []
    truth, weights = np.empty(0), ""
    for encoding, dim, dtype in ways():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            hydra_pipe.record(
                build(data), directory, encoding=encoding, dim=dim or max(DIMS), dtype=dtype
            )
            hydra_pipe.reduce(directory)
            run = hydra_pipe.open_run(directory)
            relevance = np.asarray(run.relevance())
            info = run.info()
            stored = sum(
                disk_bytes(run.path / "gradients.zarr" / name) for name in ("gradient", "scale")
            )
        final = info["stages"]["record"]["facts"]["final_sha256"]
        if not points:
            truth, weights = relevance, final
        elif final != weights:
            raise SystemExit(
                f"training with encoding {encoding} and dtype {dtype} ended in other weights: "
                "nothing can be compared"
            )
        recording = info["recording"]
        exact = all(block["exact"] for block in recording["blocks"])
        bytes_a_row = stored / recording["rows"]
        points.append(
            Point(
                encoding,
                dim,
                dtype,
                recording["features"],
                exact,
                bytes_a_row,
                spearman(relevance, truth),
            )
        )
        show_row(points[-1])
    return points


def show_row(point: Point) -> None:
    way = f"{point.encoding}, {point.dim:,}" if point.dim else point.encoding
    lossless = "yes" if point.exact else "no"
    cells = (
        way,
        point.dtype,
        f"{point.columns:,}",
        lossless,
        f"{point.bytes_a_row:,.0f}",
        f"{point.spearman:.4f}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="lenet,gpt")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the figures there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    results = {}
    for name in given.runs.split(","):
        if name not in WORKLOADS:
            raise SystemExit(f"there is no run called {name}: choose among {','.join(WORKLOADS)}")
        title, build = WORKLOADS[name]
        print(
            f"\n{title}\n\n| encoding, dim | dtype | columns | lossless | bytes a row | Spearman |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        results[title] = measure(build, given.data)
    if given.json:
        plain = {title: [asdict(point) for point in points] for title, points in results.items()}
        given.json.write_text(json.dumps(plain, indent=2) + "\n")
    if given.plot:
        from fidelity_plot import draw

        draw(results, given.plot)


if __name__ == "__main__":
    main()
