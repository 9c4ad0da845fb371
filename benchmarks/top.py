"""Cost of `reduce --top` where the matrix would be large, and a check of the samples that it keeps.

    python benchmarks/top.py SCRATCH [--samples 1000000] [--tests 10000] [--features 32]
    [--batch 10000] [--top 100] [--method hydra] [--memory 1GiB] [--json FILE]

The run (SCRATCH/top-SAMPLESxTESTSxFEATURES-BATCH, made once) is a finished recording of one random
row a sample. `reduce --top` runs in a process of its own, whose peak memory the kernel tells. Then
every pair of eight of the tests is computed, and sorted by NumPy. `differing`: samples of these
tests that are in one of the two and not in the other, pairs of the same relevance to six digits
aside.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from export import record_one_row_each

import hydra_pipe
from hydra_pipe.store.data.reduced_run import ReducedTops
from hydra_pipe.store.files import tree_bytes
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, TOPS
from hydra_pipe.units import format_bytes

COMPARED = 8
REDUCING = """
import json, sys, time
import hydra_pipe
options = json.loads(sys.argv[2])
plan = hydra_pipe.plan_reduction(sys.argv[1], **options)
start, used = time.perf_counter(), time.process_time()
hydra_pipe.reduce(sys.argv[1], **options, overwrite=True)
seconds, cpu = time.perf_counter() - start, time.process_time() - used
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
found = {"seconds": seconds, "cpu": cpu, "peak": int(peak) * 1024, "planned": plan.peak_bytes}
print(json.dumps(found | {"passes": plan.passes, "written": plan.written_bytes}))
"""


def made_run(path: Path, n_samples: int, n_tests: int, n_features: int, batch: int) -> Path:
    """A finished recording, made if it is not there."""
    if not path.exists() or RunDirectory.open(path).stages[RECORD].state != "complete":
        run = RunDirectory.create(path)
        record_one_row_each(run, n_samples, n_tests, n_features, batch)
    return path


def differing(run: Path, method: str, top: int) -> int:
    """Return the number of samples of some tests that only one of two ways has at the top."""
    directory = RunDirectory.open(run)
    found = ReducedTops.open(directory, f"{method}-top")
    tests = np.linspace(0, found.columns.n_tests - 1, COMPARED).astype(int).tolist()
    selection = ",".join(map(str, dict.fromkeys(tests)))
    hydra_pipe.reduce(run, method=method, tests=selection, overwrite=True)
    whole = np.asarray(hydra_pipe.open_run(run).relevance(method))
    count = 0
    for test, column in zip(dict.fromkeys(tests), whole.T, strict=True):
        tops = found.tops.read((test, test + 1), top, found.samples.n_samples)
        for side, sign in enumerate((1, -1)):
            ids = tops.samples[0, side]
            ids = ids[ids >= 0]
            wanted = np.argsort(-sign * column, kind="stable")[: len(ids)]
            last = abs(column[wanted[-1]])
            only_one = np.setxor1d(ids, wanted)
            count += int((np.abs(np.abs(column[only_one]) - last) > 1e-6 * last).sum())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    for name, usual in (("samples", 10**6), ("tests", 10**4), ("features", 32)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--batch", type=int, default=10**4)
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--method", default="hydra")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = (args.samples, args.tests, args.features)
    name = "top-" + "x".join(map(str, sizes)) + f"-{args.batch}"
    run = made_run(args.scratch / name, *sizes, args.batch)
    options = {"method": args.method, "top": args.top, "memory": args.memory}
    command = [sys.executable, "-c", REDUCING, str(run), json.dumps(options)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found: dict[str, Any] = json.loads(said)
    found["bytes"] = tree_bytes(run / TOPS.of(f"{args.method}-top").area)
    found["differing"] = differing(run, args.method, args.top)
    matrix = args.samples * args.tests * 4
    print("| what | measured |\n| --- | --- |")
    print(f"| seconds, processor seconds | {found['seconds']:.1f}, {found['cpu']:.1f} |")
    print(f"| passes | {found['passes']:,} |")
    peak, planned = (format_bytes(found[name]) for name in ("peak", "planned"))
    print(f"| peak memory, planned bound, --memory | {peak}, {planned}, {args.memory} |")
    print(f"| on disk, the matrix | {format_bytes(found['bytes'])}, {format_bytes(matrix)} |")
    print(f"| differing samples of {COMPARED} tests | {found['differing']:,} |")
    if args.json is not None:
        args.json.write_text(json.dumps(vars(args) | found, default=str, indent=1))


if __name__ == "__main__":
    main()
