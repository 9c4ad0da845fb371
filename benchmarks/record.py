"""What recording costs: training with it over training without, and beside dattri-llm on the same
loops, in one run.

    python benchmarks/record.py DATA [--runs mlp,lenet,resnet,gpt] [--pairs 5] [--json FILE]

DATA is the directory of the shared data sets (fashion-mnist, cifar10, text). The sides of a round
run one after the other, in an order drawn at random, from the same start; ratios are of the same
round, their median and range. Everything is written to disk; the loop is a plain one, batches are
made beforehand. Peak memory is that of a process for each figure, 1 and 10 times the steps.
dattri-llm (benchmarks/requirements.txt) is left out where it is not installed, and where it cannot
record a model, which is said. dattri-llm stores raw float32 factors, under AdamW too; what its
method for AdamW needs beside them is not counted.

"marginal" is a step without the first one and without what comes after the last; "added" is what a
step takes more than in plain training of the same round, with everything.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does, for every side

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loops import (
    HYDRA,
    PEER_PACKAGE,
    PEERS,
    PLAIN,
    Timed,
    Workload,
    chosen,
    left_out,
    peer_version,
    run_side,
    shuffled,
)

PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from loops import WORKLOADS, run_side
workload = WORKLOADS[sys.argv[3]]
passes = int(sys.argv[6]) * workload.passes
run_side(workload, Path(sys.argv[2]), sys.argv[4], Path(sys.argv[5]), passes)
# not ru_maxrss, which a process inherits from the one that started it
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_bytes(data: Path, name: str, side: str, times: int) -> int:
    """Peak resident memory of a process that only trains so, `times` the usual passes."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [str(Path(__file__).parent), str(data), name, side, scratch, str(times)]
        command = [sys.executable, "-c", PEAK, *arguments]
        return (
            int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            * 1024
        )


def sides_of(workload: Workload, data: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """The sides that can record this model, each tried once to warm it up, and what is to be said
    of the others.
    """
    sides, notes = [], []
    for name in (PLAIN, HYDRA, *(PEERS if peer_version() else ())):
        try:
            tried = run_side(workload, data, name, scratch, 1)
        except Exception as error:
            if name not in PEERS:
                raise
            notes.append(
                f"{name} cannot record it: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            )
            continue
        sides.append(name)
        missed = left_out(workload.build(data), tried.facts["layers"]) if name in PEERS else ""
        if missed:
            notes.append(f"{PEER_PACKAGE} leaves out {missed}")
    return sides, list(dict.fromkeys(notes))


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def told(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def measure(workload: Workload, data: Path, pairs: int) -> dict[str, Any]:
    """All figures of one model but its memory, by side."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        sides, notes = sides_of(workload, data, scratch)
        rounds: list[dict[str, Timed]] = []
        for order in shuffled(sides, pairs):
            rounds.append(
                {name: run_side(workload, data, name, scratch, workload.passes) for name in order}
            )
    return {
        "title": workload.title,
        "notes": notes,
        "sides": {name: figures(name, rounds) for name in sides},
    }


def figures(name: str, rounds: Sequence[dict[str, Timed]]) -> dict[str, Any]:
    """Of one side; ratios and differences are taken within each round."""
    runs = [timed[name] for timed in rounds]
    first = runs[0]

    def over(other: str) -> dict[str, float]:
        return summary([timed[name].seconds / timed[other].seconds for timed in rounds])

    side: dict[str, Any] = {
        "step_ms": summary([run.step_ms for run in runs]),
        "marginal_ms": summary([run.marginal_ms for run in runs]),
        "first_step_ms": summary([run.first_seconds * 1e3 for run in runs]),
        "last_ms": summary([run.last_seconds * 1e3 for run in runs]),
        "rows_a_second": statistics.median(run.rows / run.seconds for run in runs),
        "steps": first.steps,
        "rows": first.rows,
    }
    if name != PLAIN:
        side |= {
            "added_ms": summary([timed[name].step_ms - timed[PLAIN].step_ms for timed in rounds]),
            "over_plain": over(PLAIN),
            "stored_bytes": first.stored_bytes,
            "bytes_a_row": first.stored_bytes / first.rows,
        }
    if name == HYDRA:
        peers = [peer for peer in rounds[0] if peer in PEERS]
        side |= {
            "stalls": [run.facts["stalls"] for run in runs],
            "stalled_seconds": [run.facts["stalled_seconds"] for run in runs],
            "over_peers": {peer: over(peer) for peer in sorted(peers)},
            "bytes_over_peers": {
                peer: first.stored_bytes / rounds[0][peer].stored_bytes for peer in peers
            },
        }
    return side


def measure_memory(data: Path, name: str) -> dict[str, dict[str, int]]:
    return {
        side: {f"{times}x": peak_bytes(data, name, side, times) for times in (1, 10)}
        for side in (PLAIN, HYDRA)
    }


def show(found: dict[str, Any]) -> None:
    sides = found["sides"]
    print(f"\n{found['title']}: {sides[PLAIN]['steps']} steps, {sides[PLAIN]['rows']:,} rows")
    print(f"  {'':18s} ms/step  marginal  added   over plain             rows/s  bytes a row")
    for name, side in sides.items():
        line = f"  {name:18s} {side['step_ms']['median']:7.2f} {side['marginal_ms']['median']:9.2f}"
        if name == PLAIN:
            line += f" {'':6s}  {'':22s}"
        else:
            line += f" {side['added_ms']['median']:6.2f}   {told(side['over_plain']):22s}"
        line += f" {side['rows_a_second']:7,.0f}"
        print(line + (f"  {side['bytes_a_row']:11,.0f}" if name != PLAIN else ""))
    for note in found["notes"]:
        print(f"  {note}")
    ours = sides[HYDRA]
    for peer, ratio in ours["over_peers"].items():
        print(
            f"  {HYDRA} over {peer}: time {told(ratio)}, bytes {ours['bytes_over_peers'][peer]:.4f}"
        )
    print(
        f"  queue stalls of each recording: {ours['stalls']}, "
        f"{', '.join(f'{s:.2f}' for s in ours['stalled_seconds'])} s"
    )
    for side, peaks in found.get("peak_bytes", {}).items():
        grown = peaks["10x"] - peaks["1x"]
        print(
            f"  peak memory, {side}: {peaks['1x'] / 2**20:.0f} MiB; 10 times the steps "
            f"{peaks['10x'] / 2**20:.0f} MiB "
            f"({grown / 2**20:+.0f} MiB)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="mlp,lenet,resnet,gpt")
    parser.add_argument("--pairs", type=int, default=5, help="rounds, each with every side once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory, which takes minutes"
    )
    given = parser.parse_args()
    peer = peer_version()
    print(
        f"dattri-llm {peer}"
        if peer
        else "dattri-llm is not installed: going on without (benchmarks/requirements.txt)"
    )
    results = {}
    for name, workload in chosen(given.runs).items():
        results[name] = measure(workload, given.data, given.pairs)
        if not given.no_memory:
            results[name]["peak_bytes"] = measure_memory(given.data, name)
        show(results[name])
        if given.json:
            given.json.write_text(
                json.dumps({"dattri_llm": peer, "pairs": given.pairs, "runs": results}, indent=2)
                + "\n"
            )


if __name__ == "__main__":
    main()
