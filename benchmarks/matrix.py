"""What the matrix of hypergradients costs: keeping it, beside one sweep of all test samples, and an
answer from it.

    python benchmarks/matrix.py DATA [--dim 1024] [--samples 5000] [--tests 200]

DATA has Fashion-MNIST. Two runs: digits (pipelines/digits.py, exact) and LeNet-5
(pipelines/fashion_mnist.py, projected to --dim columns). Each line is a call of `hydra_pipe.reduce`
in this process: seconds by the clock, and processor seconds of all threads, which others on the
machine change less. `off`: the largest difference from the sweep, over the sweep's largest value.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import hydra_pipe
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import KEEP
from hydra_pipe.units import format_bytes

ROOT = Path(__file__).parents[1]
FISHER = "hydra-fisher"


def timed(title: str, run: str, **options: object) -> None:
    start, busy = time.perf_counter(), time.process_time()
    hydra_pipe.reduce(run, method=FISHER, overwrite=True, **options)  # type: ignore[arg-type]
    print(
        f"| {title} | {time.perf_counter() - start:.2f} | {time.process_time() - busy:.2f} |",
        flush=True,
    )


def measure(run: str, tests: int) -> None:
    of_some = f"0-{tests - 1}"
    # what is loaded at the first call is not counted
    hydra_pipe.reduce(run, method=FISHER, tests="0")
    print("\n| | seconds | processor seconds |\n| --- | --- | --- |")
    timed(f"sweep, {tests} tests", run, tests=of_some)
    swept = np.asarray(hydra_pipe.open_run(run).relevance(FISHER))
    timed(f"keep, and answer {tests} tests", run, tests=of_some, keep_hypergradients=True)
    timed(f"answer {tests} tests", run, tests=of_some)
    answered = np.asarray(hydra_pipe.open_run(run).relevance(FISHER))
    timed("answer one test", run, tests="0")
    kept = RunDirectory.open(run).stages[KEEP.of(FISHER)].facts
    off = np.abs(answered - swept).max() / np.abs(swept).max()
    print(f"\nkept: {format_bytes(kept['n_bytes'])} in {kept['seconds']:.1f} s; off: {off:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--tests", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        hydra_pipe.record(
            f"{ROOT}/pipelines/digits.py",
            f"{directory}/digits",
            settings=["epochs=5"],
            encoding="exact",
        )
        measure(f"{directory}/digits", asked.tests)
        settings = [
            f"data={asked.data}",
            f"n_train={asked.samples}",
            f"n_test={asked.tests}",
            "epochs=5",
        ]
        fashion = f"{ROOT}/pipelines/fashion_mnist.py"
        hydra_pipe.record(
            fashion, f"{directory}/lenet", settings=settings, encoding="projected", dim=asked.dim
        )
        measure(f"{directory}/lenet", asked.tests)


if __name__ == "__main__":
    main()
