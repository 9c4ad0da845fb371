"""Four runs on Fashion-MNIST, from smooth to rough: what each method predicts of training on half
of the data; which to trust.

    python benchmarks/four_runs.py DATA [--runs ABCD] [--seeds 0,1,2] [--retrainings 100]

The runs of benchmarks/curvature.py (600 samples of which 60 are mislabelled, 40 tests, MLP
784-48-32-10 with ReLU, batch 64, weight decay 5e-4; A: lr 0.01, momentum 0.9, 8 epochs; B: 0.05,
none, 12; C: 0.01, 0.9, 30; D: 0.05, 0.9, 8), recorded, reduced by every method and evaluated by the
package: `evaluate lds` (100 retrainings on random halves) and `evaluate smoothness`. Mean over the
seeds, which are of the samples, the first weights and the order; the intervals are those of the
seeds' means.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from curvature import BATCH, DECAY, RUNS, SIZES, samples
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline

METHODS = ("hydra", "hydra-fisher", "hydra-exact", "tracin", "grad-dot", "grad-cos", "influence")


def build(data: Path, run: str, seed: int) -> Pipeline:
    x, y, test_x, test_y = samples(data, seed)
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(SIZES) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    rate, momentum, epochs = RUNS[run]
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(
            model.parameters(), lr=rate, momentum=momentum, weight_decay=DECAY
        ),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(x, y),
        test=TensorDataset(test_x, test_y),
        batch_size=BATCH,
        epochs=epochs,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="ABCD")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--retrainings", type=int, default=100, help="random halves, the same ones for each seed"
    )
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    print(
        "| run | " + " | ".join(METHODS) + " | smoothness |\n" + "| --- " * (len(METHODS) + 2) + "|"
    )
    for name in given.runs:
        scores, verdicts, took = defaultdict(list), [], defaultdict(float)
        for seed in seeds:
            data = given.data / "fashion-mnist"
            with tempfile.TemporaryDirectory() as run:
                hydra_pipe.record(
                    build(data, name, seed),
                    run,
                    encoding="exact",
                    dtype="float32",
                    test_every="epoch",
                )
                for method in METHODS:
                    start = time.perf_counter()
                    pipeline = build(data, name, seed) if method == "hydra-exact" else None
                    hydra_pipe.reduce(run, method=method, pipeline=pipeline)
                    took[method] += time.perf_counter() - start
                for row in hydra_pipe.evaluate(
                    build(data, name, seed), run, "lds", retrainings=given.retrainings
                ).rows:
                    scores[row["method"]].append((row["lds"], row["lds_low"], row["lds_high"]))
                found = hydra_pipe.evaluate(build(data, name, seed), run, "smoothness").summary
                verdicts.append(f"{found['verdict'].split(':')[0]} ({found['ceiling']:.2f})")
        cells = ["{:.3f} ({:.2f} to {:.2f})".format(*np.mean(scores[m], axis=0)) for m in METHODS]
        print(f"| {name} | " + " | ".join(cells) + " | " + ", ".join(verdicts) + " |", flush=True)
        print(
            "  seconds a seed: " + ", ".join(f"{m} {took[m] / len(seeds):.1f}" for m in METHODS),
            flush=True,
        )


if __name__ == "__main__":
    main()
