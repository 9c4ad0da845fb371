"""What killed and failing commands leave: record, reduce and export, each run again until it is done, against uninterrupted runs.

    python benchmarks/crash.py [--kills 300] [--seed 0] [--faults] [--every 1] [--scratch DIRECTORY]

Data are real: `pipelines/digits.py`, 1,400 samples, one epoch, 397 test samples; a checkpoint every 10 steps. Prints, for each
command, how often it was struck, how many bytes differ in what it leaves (weights: checkpoints/final.pt; rows: gradients.zarr;
relevance: relevance.zarr and hypergradients.zarr; rankings: every Parquet file; other: the manifest, but for its clock and the
id of the run, and files that should not be there), and how many commands failed that should not, or said it badly. Exits 1 if any
of these is not 0.

kills    SIGKILL at an instant drawn evenly over the time that the command takes, from the start of its process to its end; one time
         in three the command that follows is killed too, and so on; then it is run to its end. In turn: record, reduce,
         reduce --keep-hypergradients, export --full. Instants after the end of a command are drawn again, and do not count
--faults every call of each command that changes a file is struck in turn, by the library of tests/crash (Linux with glibc and cc):
         SIGKILL before it, after it, half-way through a write; no space once, and from then on; input/output error; half a write
         that says so. What of these a call meets goes round, and begins at --seed: seven runs with seeds 0 to 6 do all. About
         2,500 calls, forty minutes to an hour; --every 20 takes each 20th
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "crash"))

import shim
from harness import KILLED, Commands, contents, differences, leftovers

ROOT = Path(__file__).parents[1]
PIPELINE = str(ROOT / "pipelines" / "digits.py")
COMMANDS = {
    "record": ["record", PIPELINE, "RUN", "--set", "epochs=1", "--checkpoint-every", "10"],
    "reduce": ["reduce", "RUN"],
    "reduce, keep": ["reduce", "RUN", "--keep-hypergradients"],
    "export": ["export", "RUN", "--full"],
}
BEFORE = {"record": None, "reduce": "record", "reduce, keep": "record", "export": "reduce"}
DEEDS = ("kill", "enospc", "short-kill", "eio", "kill-after", "short", "enospc for good")
PARTS = {
    "checkpoints": "weights",
    "gradients.zarr": "rows",
    "relevance.zarr": "relevance",
    "hypergradients.zarr": "relevance",
    "rankings": "rankings",
}
COLUMNS = ("struck", "weights", "rows", "relevance", "rankings", "other", "failed")


@dataclass
class Whole:
    """A command that was not interrupted.

    Args:
        run: what it left.
        seconds: it took.
        expected: every file of it.
    """

    run: Path
    seconds: float
    expected: dict[str, bytes]


@dataclass
class Tally:
    """Of one command: what COLUMNS says."""

    counts: Counter[str] = field(default_factory=Counter)

    def compare(self, run: Path, whole: Whole, what: str) -> None:
        """Count the bytes in which `run` is not what it should be, and say where."""
        found = differences(contents(run), whole.expected) | dict.fromkeys(leftovers(run), 1)
        for name, n in found.items():
            self.counts[PARTS.get(name.partition("/")[0], "other")] += n
            print(f"  {what}: {name} differs in {n} bytes", flush=True)

    def fail(self, what: str, why: str) -> None:
        self.counts["failed"] += 1
        print(f"  {what}: {why}", flush=True)


def words(name: str, run: Path) -> list[str]:
    return [str(run) if word == "RUN" else word for word in COMMANDS[name]]


def started(name: str, run: Path, errors: Path) -> subprocess.Popen[bytes]:
    """The command as a user starts it."""
    # one thread, as in tests/crash: torch rounds sums otherwise with more
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with errors.open("wb") as file:
        command = [sys.executable, "-m", "hydra_pipe.cli.app", *words(name, run)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)


def begun(wholes: dict[str, Whole], name: str, run: Path) -> Path:
    """`run` as it is before the command `name`."""
    shutil.rmtree(run, ignore_errors=True)
    if (before := BEFORE[name]) is not None:
        shutil.copytree(wholes[before].run, run)
    return run


def uninterrupted(scratch: Path) -> dict[str, Whole]:
    """Every command, run to its end, the second time timed: the first reads Python's modules from the disk."""
    wholes: dict[str, Whole] = {}
    for name in COMMANDS:
        for _ in range(2):
            run = begun(wholes, name, scratch / name.replace(", ", "-"))
            start = time.perf_counter()
            if started(name, run, scratch / "errors").wait() != 0:
                sys.exit(f"{name} fails without being struck: {(scratch / 'errors').read_text()}")
            seconds = time.perf_counter() - start
        wholes[name] = Whole(run, seconds, contents(run))
        print(f"{name}: {seconds:.1f} s, {len(wholes[name].expected)} files", flush=True)
    return wholes


def kill(scratch: Path, wholes: dict[str, Whole], n_kills: int, draw: random.Random) -> dict[str, Tally]:
    """Kill commands at random instants."""
    tallies = {name: Tally() for name in COMMANDS}
    turn = 0
    while (done := sum(tally.counts["struck"] for tally in tallies.values())) < n_kills:
        name = list(COMMANDS)[turn % len(COMMANDS)]
        turn += 1
        tally, whole, run = tallies[name], wholes[name], begun(wholes, name, scratch / "run")
        instants = list(killed(name, run, whole, scratch / "errors", draw))
        tally.counts["struck"] += len(instants)
        what = f"{name} killed after {', '.join(f'{seconds:.2f} s' for seconds in instants)}"
        if started(name, run, scratch / "errors").wait() != 0:
            tally.fail(what, (scratch / "errors").read_text().strip())
            continue
        tally.compare(run, whole, what)
        if done // 50 != (done + len(instants)) // 50:
            print(f"{done + len(instants)} kills", flush=True)
    return tallies


def killed(name: str, run: Path, whole: Whole, errors: Path, draw: random.Random) -> Iterator[float]:
    """Kill the command once, and sometimes what follows it; the instants."""
    again = True
    while again:
        seconds = draw.uniform(0, whole.seconds)
        process = started(name, run, errors)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            if process.wait() == KILLED:
                yield seconds
        again = draw.random() < 1 / 3


def strike(scratch: Path, wholes: dict[str, Whole], first: int, every: int) -> dict[str, Tally]:
    """Strike every call in turn, or each of `every`."""
    tallies = {name: Tally() for name in COMMANDS}
    with Commands(small=False) as commands:
        for name, tally in tallies.items():
            run = begun(wholes, name, scratch / "run")
            n_calls = len(commands(run, words(name, run)).calls)
            print(f"{name}: {n_calls} calls", flush=True)
            for number, at in enumerate(range(1, n_calls + 1, every)):
                deed = DEEDS[(number + first) % len(DEEDS)]
                run = begun(wholes, name, scratch / "run")
                what = f"{name}, {deed} at call {at}"
                do, _, stay = deed.partition(" ")
                ended = commands(run, words(name, run), at=at, do=do, stay=bool(stay))
                tally.counts["struck"] += 1
                if ended.code == 0:
                    tally.compare(run, wholes[name], what)
                elif ended.code != KILLED and (fault := ended.fault()) is not None:
                    tally.fail(what, f"{fault}: {ended.errors.strip()}")
                again = commands(run, words(name, run))
                if again.code != 0:
                    tally.fail(f"{what}, again", again.errors.strip())
                else:
                    tally.compare(run, wholes[name], f"{what}, again")
    return tallies


def show(title: str, tallies: dict[str, Tally]) -> bool:
    """Print a table; whether nothing is wrong."""
    print(f"\n{title:14}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, tally in tallies.items():
        print(f"{name:14}" + "".join(f"{tally.counts[column]:11,}" for column in COLUMNS))
    return not any(tally.counts[column] for tally in tallies.values() for column in COLUMNS[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    if options.faults and (reason := shim.why_not()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="hydra-pipe-crash-") as directory:
        scratch = Path(directory)
        wholes = uninterrupted(scratch)
        good = show("kills", kill(scratch, wholes, options.kills, random.Random(options.seed)))
        if options.faults:
            good &= show("faults", strike(scratch, wholes, options.seed, options.every))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
