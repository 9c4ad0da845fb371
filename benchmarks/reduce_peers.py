"""From a finished recording to the relevance matrix: `hydra-pipe reduce` beside dattri-llm on its
own store, in one run.

    python benchmarks/reduce_peers.py DATA [--runs mlp,lenet] [--pairs 3] [--json FILE]

Fashion-MNIST, 5,000 samples and 5 epochs (25,000 rows), 200 test samples. Both record the same
training, then each is a process of its own in every round, in an order drawn at random: Python's
start, reading, and the 5,000 x 200 matrix on disk. dattri-llm's way is
`TracInAttributor.attribute_from_cache` and `agnostic_matrix`; the seconds of these calls alone, its
imports left out, are given beside it. The training is SGD with neither momentum nor decay, where
relevance is the learning rate times their score: the two matrices are compared.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loops import HYDRA, SIDES, Plain, disk_bytes, lenet, mlp, peer_version, run_loop, shuffled

import hydra_pipe
from hydra_pipe import Pipeline

EPOCHS, RATE = 5, 0.02
BUILDERS = {"mlp": mlp, "lenet": lenet}
PEER = "dattri-llm"
OURS = """
from hydra_pipe.cli.app import main
main()
"""
THEIRS = """
import sys, time
import numpy as np
from dattri_llm import AttributionArguments, TracInAttributor
start = time.perf_counter()
arguments = AttributionArguments(output_dir=sys.argv[3], use_cpu=True, dataloader_pin_memory=False)
score = TracInAttributor(arguments).attribute_from_cache(sys.argv[1], sys.argv[2])
samples, matrix = score.agnostic_matrix()
np.save(sys.argv[3] + "/matrix.npy", matrix.numpy())
print(time.perf_counter() - start)
"""


def build(name: str, data: Path, n_train: int, n_test: int) -> Pipeline:
    torch.manual_seed(0)
    pipeline = BUILDERS[name](data, n_train=n_train, n_test=n_test)
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=RATE)
    return pipeline


class HydraWithTests(SIDES[HYDRA]):
    """As hydra-pipe records; the test gradients at the end."""

    def __init__(self, pipeline: Pipeline, store: Path) -> None:
        super().__init__(pipeline, store)
        self.pipeline = pipeline

    def close(self) -> dict[str, Any]:
        inputs, targets = self.pipeline.test.tensors
        batches = zip(
            inputs.split(self.pipeline.batch_size),
            targets.split(self.pipeline.batch_size),
            strict=True,
        )
        self.recorder.record_test(batches, self.pipeline.loss)
        return super().close()


class DattriWithTests(SIDES[PEER]):
    """As dattri-llm records; the test gradients at the end, into a store beside the first."""

    def __init__(self, pipeline: Pipeline, store: Path) -> None:
        super().__init__(pipeline, store / "train")
        self.pipeline, self.store = pipeline, store

    def close(self) -> dict[str, Any]:
        facts = super().close()
        tests = SIDES[PEER](self.pipeline, self.store / "test")
        inputs, targets = self.pipeline.test.tensors
        size = self.pipeline.batch_size
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            self.pipeline.loss(self.pipeline.model(x), y).sum().backward()
        tests.close()
        return facts


def record(
    name: str, data: Path, side: type[Plain], store: Path, n_train: int, n_test: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_loop(build(name, data, n_train, n_test), side, store, EPOCHS)


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds and standard output of a process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed: {done.stderr[-500:]}")
    return seconds, done.stdout


def difference(ours: Path, theirs: Path, n_train: int) -> float:
    """Of the two matrices, relative to the norm of theirs, times the learning rate."""
    matrix = RATE * np.load(theirs)
    if len(matrix) != n_train:
        raise SystemExit(
            f"dattri-llm scored {len(matrix)} samples of {n_train}: it takes samples with the "
            "same content for one"
        )
    # theirs are in the order in which samples were first met, which is that of the data here
    relevance = np.asarray(hydra_pipe.open_run(ours).relevance())
    return float(np.linalg.norm(relevance - matrix) / np.linalg.norm(matrix))


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    sides = [HYDRA, PEER] if peer_version() else [HYDRA]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        ours, theirs = scratch / "ours", scratch / "theirs"
        record(name, given.data, HydraWithTests, ours, given.n_train, given.n_test)
        found: dict[str, Any] = {
            "rows": given.n_train * EPOCHS,
            "bytes": {HYDRA: disk_bytes(ours / "gradients.zarr")},
        }
        if PEER in sides:
            record(name, given.data, DattriWithTests, theirs, given.n_train, given.n_test)
            found["bytes"][PEER] = disk_bytes(theirs)
            (scratch / "scores").mkdir()
        commands = {
            HYDRA: [OURS, "reduce", str(ours), "--overwrite"],
            PEER: [THEIRS, str(theirs / "train"), str(theirs / "test"), str(scratch / "scores")],
        }
        found["seconds"] = {side: [] for side in sides}
        found["inner_seconds"] = []
        for order in shuffled(sides, given.pairs + 1):
            for side in order:
                seconds, output = timed(commands[side])
                found["seconds"][side].append(seconds)
                if side == PEER:
                    found["inner_seconds"].append(float(output))
        # the first round has read both stores into the operating system's cache
        found["seconds"] = {side: seconds[1:] for side, seconds in found["seconds"].items()}
        found["inner_seconds"] = found["inner_seconds"][1:]
        if PEER in sides:
            found["difference"] = difference(ours, scratch / "scores" / "matrix.npy", given.n_train)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['rows']:,} rows")
    for side, seconds in found["seconds"].items():
        times = ", ".join(f"{s:.2f}" for s in seconds)
        print(
            f"  {side:12s} {statistics.median(seconds):6.2f} s ({times}), store "
            f"{found['bytes'][side] / 1e6:,.0f} MB"
        )
    if "difference" in found:
        ours, theirs = found["seconds"][HYDRA], found["seconds"][PEER]
        inner = found["inner_seconds"]
        print(
            f"  {PEER}, its calls alone: {statistics.median(inner):.2f} s "
            f"({', '.join(f'{s:.2f}' for s in inner)})"
        )
        whole = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        alone = statistics.median(a / b for a, b in zip(ours, inner, strict=True))
        print(
            f"  {HYDRA} (whole process) over {PEER}: {whole:.2f} of its process, {alone:.2f} of "
            "its calls alone"
        )
        print(f"  the two matrices differ by {found['difference']:.1e} of their norm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="mlp,lenet")
    parser.add_argument(
        "--pairs", type=int, default=3, help="rounds, after one that is not counted"
    )
    parser.add_argument("--n-train", type=int, default=5000)
    parser.add_argument("--n-test", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    given = parser.parse_args()
    peer = peer_version()
    print(
        f"dattri-llm {peer}"
        if peer
        else "dattri-llm is not installed: going on without (benchmarks/requirements.txt)"
    )
    results = {}
    for name in given.runs.split(","):
        if name not in BUILDERS:
            raise SystemExit(f"there is no run called {name}: choose among {','.join(BUILDERS)}")
        results[name] = measure(name, given)
        show(name, results[name])
    if given.json:
        given.json.write_text(json.dumps({"dattri_llm": peer, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
