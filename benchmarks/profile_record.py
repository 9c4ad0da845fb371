"""Where the time of a recorded step goes, by model: an instrumented run, beside plain training in
the same run.

    python benchmarks/profile_record.py DATA [--runs mlp,lenet,resnet,gpt] [--passes N]

Every stage is timed by a wrapper around one of the package's methods, set from here; time in a
stage called from another counts for the inner one only. "training itself" is what is left: forward,
backward and the optimiser, slower than alone because of caches and of the writer beside it. The
writer's line is processor time of its own thread, which overlaps with the rest. The wrappers cost
some microseconds a call. A name that is gone from the package is an error: mend STAGES.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does

import argparse
import contextlib
import functools
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loops import HYDRA, PLAIN, Workload, chosen, run_side

from hydra_pipe.recording.capture import Capture
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.dynamics import DynamicsWatch
from hydra_pipe.recording.encoder import RowEncoder
from hydra_pipe.recording.encodings import ENCODINGS
from hydra_pipe.recording.loop import Loop
from hydra_pipe.recording.recorder import Recorder
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.store.zarr.table import BackgroundWriter, TableWriter

HOOKS, TABLES, BOOKS = "hooks and rules", "settings and tables", "books"
OUTPUTS = "curvature and dynamics"
WATCHES = (CurvatureWatch, DynamicsWatch)
# of the thread that trains; whatever a method calls that is not named itself counts with it
STAGES: list[tuple[type, str, str]] = [
    *((Capture, name, HOOKS) for name in ("_begin_call", "_forward", "_end_call", "_backward")),
    (Collector, "watch", HOOKS),
    *((encoding, "reduce", "encoding.reduce") for encoding in ENCODINGS.values()),
    (Collector, "add_to", "assembling"),
    (RowEncoder, "place", "place"),
    (RowEncoder, "project_for_check", BOOKS),
    (RowBuffer, "prepare", BOOKS),
    (RowBuffer, "check_finite", BOOKS),
    (RowBuffer, "check_gradient", BOOKS),
    (RowBuffer, "write", "quantise and copy"),
    *((watch, name, OUTPUTS) for watch in WATCHES for name in ("observe", "take", "fill")),
    (Loop, "take_update", TABLES),
    (TableWriter, "append", TABLES),
    (TableWriter, "flush", "handing to the writer"),
    (Recorder, "close", "close"),
]
WRITER = (BackgroundWriter, "submit")


class Clock:
    """Adds up what each stage took, without the stages inside it, on one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.writer_seconds = 0.0
        self._thread = threading.get_ident()
        self._inner: list[float] = []

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[stage] += whole - self._inner.pop()
                self.calls[stage] += 1
                if self._inner:
                    self._inner[-1] += whole

        return wrapped

    def timed_writer(self, submit: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(submit)
        def submitted(writer: BackgroundWriter, job: Callable[[], None]) -> Any:
            def timed_job() -> None:
                start = time.thread_time()
                try:
                    job()
                finally:
                    self.writer_seconds += time.thread_time() - start

            return submit(writer, timed_job)

        return submitted


@contextlib.contextmanager
def instrumented() -> Iterator[Clock]:
    """The package with every stage timed; as it was afterwards."""
    clock = Clock()
    with contextlib.ExitStack() as undo:

        def replace(
            owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
        ) -> None:
            original = vars(owner).get(name)
            if not callable(original):
                raise SystemExit(
                    f"{owner.__module__}.{owner.__name__} has no method {name} any more: mend "
                    f"{Path(__file__).name}"
                )
            setattr(owner, name, wrap(original))
            undo.callback(setattr, owner, name, original)

        for owner, name, stage in STAGES:
            replace(owner, name, functools.partial(clock.timed, stage))
        replace(*WRITER, clock.timed_writer)
        yield clock


def profile(workload: Workload, data: Path, passes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for side in (PLAIN, HYDRA):
            run_side(workload, data, side, scratch, 1)
        plain = run_side(workload, data, PLAIN, scratch, passes)
        recorded = run_side(workload, data, HYDRA, scratch, passes)
        with instrumented() as clock:
            timed = run_side(workload, data, HYDRA, scratch, passes)
    rest = timed.seconds - sum(clock.seconds.values())
    added = timed.seconds - plain.seconds
    both = (
        f"{plain.step_ms:.2f} ms a step without, {recorded.step_ms:.2f} with, "
        f"{timed.step_ms:.2f} instrumented"
    )
    print(f"\n{workload.title}: {both}\n")
    print(
        "| stage | ms a step | of what recording adds | calls a step |\n| --- | --- | --- | --- |"
    )
    for stage in dict.fromkeys(stage for _, _, stage in STAGES):
        seconds = clock.seconds[stage]
        calls = clock.calls[stage] / timed.steps
        print(
            f"| {stage} | {seconds / timed.steps * 1e3:.3f} | {seconds / added:.0%} | {calls:.2f} |"
        )
    slower = rest - plain.seconds
    print(
        f"| training itself, beyond {plain.step_ms:.2f} | {slower / timed.steps * 1e3:.3f} | "
        f"{slower / added:.0%} | |"
    )
    stalled = timed.facts["stalled_seconds"] / timed.steps * 1e3
    print(
        "| writer thread, processor time beside it | "
        f"{clock.writer_seconds / timed.steps * 1e3:.3f} | | |"
    )
    print(
        f"| waiting for the writer, within the above | {stalled:.3f} | | "
        f"{timed.facts['stalls'] / timed.steps:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="mlp,lenet,resnet,gpt")
    parser.add_argument("--passes", type=int, help="over the data, instead of each model's own")
    given = parser.parse_args()
    for workload in chosen(given.runs).values():
        profile(workload, given.data, given.passes or workload.passes)


if __name__ == "__main__":
    main()
