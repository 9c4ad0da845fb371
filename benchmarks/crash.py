"""What killed and failing commands leave: each is run again until it is done, and held against
uninterrupted runs.

    python benchmarks/crash.py [--kills 300] [--seed 0] [--faults] [--every 1] [--only NAME,NAME]
    [--tiny] [--scratch DIRECTORY]

Data are real: `pipelines/digits.py`, 1,400 samples of which a tenth are mislabelled, one epoch, 397
test samples; a checkpoint every 10 steps. Prints, for each command, how often it was struck, how
many bytes differ in what it leaves (weights:
checkpoints/final.pt; rows: gradients.zarr; relevance: relevance.zarr and hypergradients; rankings:
every Parquet file;
evaluation: all of it; other: the manifest, but for its clock and the id of the run, probes,
proposals, reports, and files that should not be there), how many faults `verify` finds in that, and
how many commands failed that should not, or said it badly. Exits 1 if any of these is not 0.

Linux with glibc and cc. Each command is a process of its own, forked from one that has loaded the
packages already, so that what is struck is the work and not an import. State of long work is kept
after each step of it, in place of each minute.

kills    SIGKILL at an instant drawn evenly over the time that the command takes; one time in three
         the command that follows is killed too, and so on; then it is run to its end. All commands
         in turn. Instants after the end of a command are drawn again, and do not count
--faults every call of each command that changes a file is struck in turn, by the library of
         tests/crash: SIGKILL before it, after it, half-way through a write; no space once, and from
         then on; input/output error; half a write that says so. What of these a call meets goes
         round, and begins at --seed: seven runs with seeds 0 to 6 do all. --every 20: each 20th
--only   these commands, such as fisher,loo
--tiny   those of tests/crash, on its run of 26 samples in small files: many more in the same
         time
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "crash"))

import shim
import stages
from harness import KILLED, Commands, Ended, commands_for, contents, differences, leftovers

import hydra_pipe

PIPELINE = str(Path(__file__).parents[1] / "pipelines" / "digits.py")
SETTINGS = ["--set", "epochs=1", "--set", "noise=0.1"]
EVALUATE = ["evaluate", PIPELINE, "RUN", *SETTINGS]
# arguments, how a reduction is planned (None: as it plans itself), and what comes before it
DIGITS: stages.Stages = {
    "record": (
        ["record", PIPELINE, "RUN", *SETTINGS, "--checkpoint-every", "10", "--test-every", "20"],
        None,
        [],
    ),
    "reduce": (["reduce", "RUN"], None, ["record"]),
    "reduce-keep": (["reduce", "RUN", "--keep-hypergradients"], None, ["record"]),
    "export": (["export", "RUN", "--full"], None, ["record", "reduce"]),
    "fisher": (
        ["reduce", "RUN", "--method", "hydra-fisher", "--memory", "256MiB"],
        None,
        ["record"],
    ),
    "exact": (["reduce", "RUN", "--method", "hydra-exact", "--tests", "0-49"], None, ["record"]),
    "rank": (
        ["reduce", "RUN", "--method", "hydra-exact", "--tests", "0-49", "--rank", "8"],
        None,
        ["record"],
    ),
    "keep": (
        ["reduce", "RUN", "--method", "hydra-fisher", "--keep-hypergradients"],
        None,
        ["record"],
    ),
    "influence": (["reduce", "RUN", "--method", "influence"], None, ["record"]),
    "tracin": (["reduce", "RUN", "--method", "tracin"], None, ["record"]),
    "self": (["reduce", "RUN", "--method", "self"], None, ["record"]),
    "loo": ([*EVALUATE, "loo", "--samples", "0-149"], None, ["record", "reduce"]),
    "lds": ([*EVALUATE, "lds"], None, ["record", "reduce"]),
    "noise": ([*EVALUATE, "noise"], None, ["record", "reduce"]),
    "smoothness": ([*EVALUATE, "smoothness"], None, ["record"]),
    "report": (["report", "RUN"], None, ["record", "reduce"]),
    "clean": (
        ["clean", "RUN", "--method", "hydra", "--retrain", "--seeds", "1"],
        None,
        ["record", "reduce"],
    ),
}
DEEDS = ("kill", "enospc", "short-kill", "eio", "kill-after", "short", "enospc for good")
PARTS = {
    "checkpoints": "weights",
    "gradients.zarr": "rows",
    "relevance.zarr": "relevance",
    "hypergradients": "relevance",
    "rankings": "rankings",
    "evaluation": "evaluation",
}
COLUMNS = (
    "struck",
    "weights",
    "rows",
    "relevance",
    "rankings",
    "evaluation",
    "other",
    "verify",
    "failed",
)


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
        for fault in hydra_pipe.verify(run):
            self.counts["verify"] += 1
            print(f"  {what}: {fault.where} {fault.what}", flush=True)

    def fail(self, what: str, why: str) -> None:
        self.counts["failed"] += 1
        print(f"  {what}: {why}", flush=True)


@dataclass
class Bench:
    """Commands, and what they leave where nothing happens to them.

    Args:
        commands: runs them.
        table: of all commands there are.
        names: of those that are struck.
        scratch: directory.
    """

    commands: Commands
    table: stages.Stages
    names: list[str]
    scratch: Path
    wholes: dict[str, Whole] = field(default_factory=dict)

    def perform(self, name: str, run: Path, **struck: Any) -> Ended:
        arguments, order, _ = self.table[name]
        return self.commands(run, arguments, order, **struck)

    def begun(self, name: str, run: Path) -> Path:
        """`run` as it is before the command `name`."""
        shutil.rmtree(run, ignore_errors=True)
        for before in self.table[name][2][-1:]:
            shutil.copytree(self.wholes[before].run, run)
        return run

    def uninterrupted(self) -> None:
        """The commands and those before them, run to their end, the second time timed: the first
        loads modules.
        """
        needed = {name for struck in self.names for name in (struck, *self.table[struck][2])}
        for name in (name for name in self.table if name in needed):
            for _ in range(2):
                run = self.begun(name, self.scratch / name.replace(", ", "-") / "run")
                start = time.perf_counter()
                ended = self.perform(name, run)
                if ended.code != 0:
                    sys.exit(f"{name} fails without being struck: {ended.errors}")
                seconds = time.perf_counter() - start
            self.wholes[name] = Whole(run, seconds, contents(run))
            print(f"{name}: {seconds:.1f} s, {len(self.wholes[name].expected)} files", flush=True)

    def kill(self, n_kills: int, draw: random.Random) -> dict[str, Tally]:
        """Kill commands at random instants."""
        tallies = {name: Tally() for name in self.names}
        turn = done = 0
        while done < n_kills:
            name = self.names[turn % len(self.names)]
            turn += 1
            tally, run = tallies[name], self.begun(name, self.scratch / "struck" / "run")
            instants = list(self._killed(name, run, draw))
            tally.counts["struck"] += len(instants)
            done += len(instants)
            what = f"{name} killed after {', '.join(f'{seconds:.2f} s' for seconds in instants)}"
            ended = self.perform(name, run)
            if ended.code != 0:
                tally.fail(what, ended.errors.strip())
                continue
            tally.compare(run, self.wholes[name], what)
            if turn % 10 == 0:
                print(f"{done} kills", flush=True)
        return tallies

    def _killed(self, name: str, run: Path, draw: random.Random) -> Iterator[float]:
        """Kill the command once, and sometimes what follows it; the instants."""
        again = True
        while again:
            seconds = draw.uniform(0, self.wholes[name].seconds)
            if self.perform(name, run, seconds=seconds).code == KILLED:
                yield seconds
            again = draw.random() < 1 / 3

    def strike(self, first: int, every: int) -> dict[str, Tally]:
        """Strike every call in turn, or each of `every`."""
        tallies = {name: Tally() for name in self.names}
        for name, tally in tallies.items():
            n_calls = len(
                self.perform(name, self.begun(name, self.scratch / "struck" / "run")).calls
            )
            print(f"{name}: {n_calls} calls", flush=True)
            for number, at in enumerate(range(1, n_calls + 1, every)):
                deed = DEEDS[(number + first) % len(DEEDS)]
                run = self.begun(name, self.scratch / "struck" / "run")
                what = f"{name}, {deed} at call {at}"
                do, _, stay = deed.partition(" ")
                ended = self.perform(name, run, at=at, do=do, stay=bool(stay))
                tally.counts["struck"] += 1
                if ended.code == 0:
                    tally.compare(run, self.wholes[name], what)
                elif ended.code != KILLED and (fault := ended.fault()) is not None:
                    tally.fail(what, f"{fault}: {ended.errors.strip()}")
                again = self.perform(name, run)
                if again.code != 0:
                    tally.fail(f"{what}, again", again.errors.strip())
                else:
                    tally.compare(run, self.wholes[name], f"{what}, again")
        return tallies


def show(title: str, tallies: dict[str, Tally]) -> bool:
    """Print a table; whether nothing is wrong."""
    print(f"\n{title:17}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, tally in tallies.items():
        print(f"{name:17}" + "".join(f"{tally.counts[column]:11,}" for column in COLUMNS))
    return not any(tally.counts[column] for tally in tallies.values() for column in COLUMNS[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    if (reason := shim.why_not()) is not None:
        sys.exit(reason)
    table = stages.ALL if options.tiny else DIGITS
    names = options.only or list(table)
    if unknown := set(names) - set(table):
        sys.exit(f"--only {', '.join(unknown)}: choose of {', '.join(table)}")
    with (
        tempfile.TemporaryDirectory(dir=options.scratch, prefix="hydra-pipe-crash-") as directory,
        commands_for(1, small=options.tiny) as [commands],
    ):
        bench = Bench(commands, table, names, Path(directory))
        bench.uninterrupted()
        good = show("kills", bench.kill(options.kills, random.Random(options.seed)))
        if options.faults:
            good &= show("faults", bench.strike(options.seed, options.every))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
