"""Seconds, peak memory and bytes of each stage of the main job on Fashion-MNIST, beside plain
training in the same run.

    python benchmarks/main_job.py DATA [--n-train 20000] [--n-test 500]

DATA is the directory with Fashion-MNIST's four gzipped files. Each stage is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIPELINE = str(Path(__file__).parents[1] / "pipelines" / "fashion_mnist.py")
PLAIN = """
import os, sys, time
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
import hydra_pipe
from hydra_pipe.loading import load_pipeline
pipeline = load_pipeline(sys.argv[1], sys.argv[2:]).build()
start = time.monotonic()
hydra_pipe.train(pipeline)
print(time.monotonic() - start)
"""


def run(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a command, from the operating system's
    own accounting.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, usage.ru_maxrss * 1024, output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--n-train", type=int, default=20_000)
    parser.add_argument("--n-test", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    settings = [f"data={given.data}", f"n_train={given.n_train}", f"n_test={given.n_test}"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "hydra_pipe.cli.app"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = f"{scratch}/run"
        plain, recorded = [], []
        for _ in range(given.repeats):
            plain.append(float(run([sys.executable, "-c", PLAIN, PIPELINE, *settings])[2]))
            seconds, peak, _ = run(
                [*command, "record", PIPELINE, directory, *options, "--overwrite"]
            )
            facts = json.loads(Path(directory, "run.json").read_text())["stages"]["record"]["facts"]
            recorded.append(facts["train_seconds"])
        print(f"plain training      {', '.join(f'{s:.1f}' for s in plain)} s")
        print(f"recorded training   {', '.join(f'{s:.1f}' for s in recorded)} s")
        print(
            "ratio, pair by pair "
            f"{', '.join(f'{b / a:.2f}' for a, b in zip(plain, recorded, strict=True))}"
        )
        print(f"test accuracy       {facts['test_accuracy']:.4f}")
        print(f"stage record        {seconds:6.1f} s  peak {peak / 2**20:6.0f} MiB")
        for stage in (["reduce"], ["export"], ["verify"]):
            seconds, peak, _ = run([*command, *stage, directory])
            print(f"stage {stage[0]:13s} {seconds:6.1f} s  peak {peak / 2**20:6.0f} MiB")
        info = json.loads(run([*command, "info", directory, "--json"])[2])
        for name, n_bytes in info["bytes"].items():
            print(f"bytes {name:16s} {n_bytes / 2**20:8.1f} MiB")
        recording = info["recording"]
        full = recording["rows"] * recording["parameters"] * 2
        print(
            "bytes stored / (rows x parameters x 2 bytes): "
            f"1/{full / info['bytes']['gradients.zarr']:.1f}"
        )


if __name__ == "__main__":
    main()
