"""hydra-fisher in a basis, beside the sweep over all features: what it predicts, what it takes.

    python benchmarks/basis.py DATA [--runs ABCD] [--seeds 3,4,5] [--ranks 512,2048,full]
    python benchmarks/basis.py DATA --lenet [--ranks 512,2048]

The runs of benchmarks/four_runs.py: linear datamodelling score over 100 retrainings on random
halves, and processor seconds of `reduce`, for the default rank and for `--ranks`. With `--lenet`:
processor seconds for LeNet-5 on 5,000 pictures, 5 epochs (25,000 rows), 200 tests, in one thread
and with the threads of the machine.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from four_runs import build

import hydra_pipe
from hydra_pipe.store.run.results import Rank, parse_rank

METHOD = "hydra-fisher"
LENET = {"n_train": 5000, "n_test": 200, "epochs": 5}


@contextmanager
def timed(took: dict[str, float], name: str) -> Iterator[None]:
    begun = time.process_time()
    yield
    took[name] = time.process_time() - begun


def four(data: Path, runs: str, seeds: list[int], ranks: list[Rank]) -> None:
    named = {METHOD: None} | {f"{METHOD}-rank-{rank}": rank for rank in ranks}
    print("| run, seed | " + " | ".join(named) + " | seconds |")
    print("| --- " * (len(named) + 2) + "|")
    for name in runs:
        for seed in seeds:
            took: dict[str, float] = {}
            with tempfile.TemporaryDirectory() as run:
                pipeline = build(data, name, seed)
                hydra_pipe.record(pipeline, run, encoding="exact", dtype="float32")
                for result, rank in named.items():
                    with timed(took, result):
                        hydra_pipe.reduce(run, method=METHOD, rank=rank)
                found = hydra_pipe.evaluate(build(data, name, seed), run, "lds", retrainings=100)
            scores = {row["method"]: row["lds"] for row in found.rows}
            cells = [f"{scores[result]:.3f}" for result in named]
            seconds = ", ".join(f"{took[result]:.1f}" for result in named)
            print(f"| {name}, {seed} | " + " | ".join([*cells, seconds]) + " |", flush=True)


def lenet(data: Path, ranks: list[Rank]) -> None:
    pipeline = Path(__file__).parents[1] / "pipelines/fashion_mnist.py"
    print("| rank | one thread | threads |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as run:
        hydra_pipe.record(str(pipeline), run, settings={"data": data} | LENET)
        for rank in (None, *ranks):
            took: dict[str, float] = {}
            for scheduler in ("synchronous", "threads"):
                with timed(took, scheduler):
                    hydra_pipe.reduce(
                        run, method=METHOD, rank=rank, scheduler=scheduler, overwrite=True
                    )
            cells = " | ".join(f"{seconds:.1f}" for seconds in took.values())
            print(f"| {'default' if rank is None else rank} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="directory of the shared data sets")
    parser.add_argument("--runs", default="ABCD")
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--ranks", default="512,2048,full")
    parser.add_argument("--lenet", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ranks = [parse_rank(rank) for rank in given.ranks.split(",")]
    fashion = given.data / "fashion-mnist"
    if given.lenet:
        lenet(fashion, ranks)
    else:
        four(fashion, given.runs, [int(seed) for seed in given.seeds.split(",")], ranks)


if __name__ == "__main__":
    main()
