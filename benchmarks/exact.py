"""What each method costs, in plain trainings: `hydra-exact` for one test sample, for groups, for
all; the forward form.

    python benchmarks/exact.py DATA [--samples 2000] [--epochs 2] [--tests 200]

Digits: the momentum run of benchmarks/truth.py (400 samples, 200 steps, 1,810 parameters, float64).
The paper's forward form carries a vector of parameters for each of the 400 training samples; its
relevance is compared with that of `hydra-exact`. Fashion-MNIST: LeNet-5, 61,706 parameters.
Everything is a call of `hydra_pipe.reduce` in this process, after one that is not counted where it
is short; plain training is `hydra_pipe.train` without a recorder, measured before and after.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from truth import RUNS, make

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.loading import load_pipeline
from hydra_pipe.replay.products import batch_of
from hydra_pipe.training.batches import epoch_order

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from oracles import forward_relevance, one_by_one_gradients, record_by_loop  # noqa: E402 - the oracle, where tests have it

METHODS = ("hydra", "hydra-fisher", "tracin", "grad-dot", "grad-cos", "influence", "self")


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(build: Callable[[], Pipeline], run: str, columns: dict[str, dict[str, Any]]) -> None:
    before = min(seconds(lambda: hydra_pipe.train(build())) for _ in range(2))
    hydra_pipe.record(build(), run, encoding="exact", dtype="float32", test_every="epoch")
    found = {}
    for method in METHODS:
        hydra_pipe.reduce(run, method=method, tests=None if method == "self" else "0")
        found[method] = seconds(lambda: hydra_pipe.reduce(run, method=method, overwrite=True))  # noqa: B023 - called at once
    for title, options in columns.items():
        found[title] = seconds(
            lambda: hydra_pipe.reduce(
                run,
                method="hydra-exact",
                pipeline=build(),
                overwrite=True,
                **options,  # noqa: B023
            )
        )
    plain = min(before, *(seconds(lambda: hydra_pipe.train(build())) for _ in range(2)))
    print(f"\nPlain training {plain:.2f} s.\n\n| | seconds | trainings |\n| --- | --- | --- |")
    for title, own in found.items():
        print(f"| {title} | {own:.2f} | {own / plain:.1f} |", flush=True)


def forward(build: Callable[[], Pipeline], run: str) -> None:
    """The paper's form, with Hessian-vector products of every sample, on the digits run."""
    pipeline = build()
    model, inputs, targets = pipeline.model, *pipeline.train.tensors
    parameters = list(model.parameters())
    names = [n for n, _ in model.named_parameters()]
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    states: list[dict[str, torch.Tensor]] = []

    def batches() -> Any:
        for ids in order:
            states.append({n: v.clone() for n, v in model.state_dict().items()})
            yield ids, inputs[ids], targets[ids]

    steps = record_by_loop(model, pipeline.optimizer, pipeline.loss, batches())
    tests = one_by_one_gradients(model, pipeline.loss, *pipeline.test.tensors, names)

    def curvature(t: int, moved: torch.Tensor) -> torch.Tensor:
        model.load_state_dict(states[t])
        batch = batch_of(pipeline, parameters, inputs[order[t]], targets[order[t]])
        vectors = [
            v.view(-1, *p.shape)
            for v, p in zip(
                moved.split([p.numel() for p in parameters], 1), parameters, strict=True
            )
        ]
        return torch.cat([product.flatten(1) for product in batch.products(vectors, 100)[1]], dim=1)

    start = time.perf_counter()
    found = forward_relevance(steps, tests, len(inputs), curvature)
    took = time.perf_counter() - start
    ours = np.asarray(hydra_pipe.open_run(run).relevance("hydra-exact"))
    apart = np.linalg.norm(found - ours) / np.linalg.norm(ours)
    print(f"| forward form, {len(inputs)} samples (apart by {apart:.1e}) | {took:.2f} | |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tests", type=int, default=200)
    given = parser.parse_args()
    exact = {
        "hydra-exact, one test sample": {"tests": "0"},
        "hydra-exact, ten groups": {"by": "label"},
    }
    exact |= {"hydra-exact, rank 20": {"rank": 20}, "hydra-exact, all test samples": {}}
    digits = RUNS["SGD 0.05, momentum, 20 epochs"]
    with tempfile.TemporaryDirectory() as run:
        print(f"Digits, {digits}, 100 test samples.")
        measured(lambda: make(*digits), run, exact)
        forward(lambda: make(*digits), run)
    settings = {
        "data": given.data / "fashion-mnist",
        "n_train": given.samples,
        "n_test": given.tests,
        "epochs": given.epochs,
    }
    source = load_pipeline(str(ROOT / "pipelines/fashion_mnist.py"), settings)
    with tempfile.TemporaryDirectory() as run:
        print(
            f"\nFashion-MNIST, LeNet-5, {given.samples:,} samples, {given.epochs} epochs, "
            f"{given.tests} test samples."
        )
        measured(source.build, run, exact)


if __name__ == "__main__":
    main()
