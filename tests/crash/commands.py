"""Runs hydra-pipe's commands one after the other, each in a process of its own that is forked from
here: so torch is loaded once.

Used as a program: its arguments are pairs of pipes. It reads jobs from the first of a pair, one a
line in JSON, and writes the exit code of each to the second (negative: the signal that ended it).
With the argument "small" files, chunks and passes are so small that a tiny run has several of each.
The state of long work is kept all the time.
"""

import atexit
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

EIGHTS = ((0, 8), (8, 16), (16, 24), (24, 26))
PATIENCE_SECONDS = 500
NAP_SECONDS = 0.002
# before the fork, with whatever these need
LOADED = (
    "cli.app",
    "recording.recorder",
    "training.run",
    "reduction.run",
    "replay.run",
    "exporting.run",
    "evaluation.run",
)
LOADED += (
    "retraining.campaign",
    "store.integrity.verify",
    "probing",
    "cleaning.retraining",
    "reporting.page",
    "reporting.gathering",
    "combining.run",
)
TWOS = ((0, 2), (2, 4), (4, 6), (6, 7))


def make_small() -> None:
    """Shards of 16 rows, lines of 4 steps, chunks of 8 samples; every second step is written; four
    models are trained together.
    """
    from hydra_pipe.evaluation import smoothness
    from hydra_pipe.plan import chunking
    from hydra_pipe.recording import row_buffer
    from hydra_pipe.reduction.solvers import sums
    from hydra_pipe.retraining import campaign
    from hydra_pipe.store.data import gradients_writer, hypergradients, relevance

    for module, name, value in (
        (chunking, "MAX_SHARD_ROWS", 16),
        (gradients_writer, "STEP_SHARD_ROWS", 4),
        (row_buffer, "BUFFER_STEPS", 2),
        (relevance, "CHUNK_SAMPLES", 8),
        (sums, "SAMPLE_MULTIPLE", 8),
        (hypergradients, "MOST_FILE_ROWS", 8),
        (campaign, "MOST_MODELS", 4),
        (smoothness, "DIRECTIONS", 2),
    ):
        getattr(module, name)  # or it would be set in vain
        setattr(module, name, value)


def plan_in(order: str) -> None:
    """Let reductions work in `order`, in four passes."""
    from hydra_pipe.plan.sums import plan_sums
    from hydra_pipe.reduction.solvers import sums

    def planned(given: Any, chunks: Any, answered: Any = None) -> Any:
        plan = plan_sums(given, chunks)
        whole = {
            "test_blocks": TWOS,
            "sample_blocks": EIGHTS if order == "fold first" else ((0, 26),),
        }
        plan = dataclasses.replace(plan, order=order, **whole)
        done, left = (
            answered.done if answered else 0,
            "sample_blocks" if order == "fold first" else "test_blocks",
        )
        return dataclasses.replace(
            plan, **{left: tuple(block for block in getattr(plan, left) if block[0] >= done)}
        )

    sums.plan_sums = planned


def plan_narrow() -> None:
    """Let sweeps and replays carry two columns at a time, and linear systems hold eight rows;
    training is gone through thrice.
    """
    from hydra_pipe.combining import run as combining
    from hydra_pipe.plan.combining import plan_combining
    from hydra_pipe.plan.from_matrix import plan_answers
    from hydra_pipe.plan.hypergradient_matrix import plan_matrix
    from hydra_pipe.plan.influence import plan_solve
    from hydra_pipe.plan.replay import plan_replay
    from hydra_pipe.plan.sweep import plan_sweep
    from hydra_pipe.reduction.solvers import from_matrix, hypergradient_matrix, influence, sweep
    from hydra_pipe.replay import solver as replay

    def swept(what: Any, done: int = 0) -> Any:
        blocks = tuple(block for block in TWOS if block[0] >= done)
        return dataclasses.replace(plan_sweep(what, done), columns=blocks, workers=2)

    def kept(what: Any, answered: Any = None) -> Any:
        plan = plan_matrix(what, answered)
        assert plan.n_columns == EIGHTS[-1][1]  # a forward sweep of every sample
        done = answered.done if answered else 0
        blocks = tuple(block for block in EIGHTS if block[0] >= done)
        return dataclasses.replace(plan, columns=blocks, workers=2)

    def answering(what: Any, done: int = 0) -> Any:
        blocks = tuple(block for block in TWOS if block[0] >= done)
        return dataclasses.replace(plan_answers(what, done), columns=blocks)

    def solved(what: Any) -> Any:
        return dataclasses.replace(plan_solve(what), test_blocks=TWOS, held_blocks=EIGHTS)

    def replayed(what: Any) -> Any:
        plan = plan_replay(what)
        columns = TWOS if what.recording.n_columns == TWOS[-1][1] else plan.columns
        return dataclasses.replace(
            plan, columns=columns, carried=columns, at_once=2, levels=3, most_states=2
        )

    def together(what: Any) -> Any:
        return dataclasses.replace(plan_combining(what), width=2)

    combining.plan_combining = together
    sweep.plan_sweep, influence.plan_solve, replay.plan_replay = swept, solved, replayed
    hypergradient_matrix.plan_matrix, from_matrix.plan_answers = kept, answering


def keep_always() -> None:
    """Keep the state of long work after every step of it."""
    from hydra_pipe.store.data import save_interval

    save_interval.KEEP_SECONDS = save_interval.TIMES_ITS_COST = 0.0


def perform(job: dict[str, Any]) -> NoReturn:
    """Do a job, and exit as the command does."""
    from hydra_pipe.cli import app

    for number, name in ((0, os.devnull), (1, job["output"]), (2, job["errors"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    # a command that waits for ever says where
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    if job["order"] == "narrow":
        plan_narrow()
    elif job["order"]:
        plan_in(job["order"])
    sys.argv = ["hydra-pipe", *job["arguments"]]
    ctypes.CDLL(None).hydra_pipe_shim_begin()
    code: object = 0
    try:
        app.main()
    except SystemExit as ended:
        code = ended.code
    Path(job["modules"]).write_text("\n".join(sys.modules))
    # as at the end of any program, but for the modules, which are taken apart one by one
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(int(code or 0))


def load(modules: list[str]) -> None:
    """Import what a command has, so that the next one need not: that takes longer than all else."""
    for name in modules:
        if name not in sys.modules and name != "__main__":
            with suppress(Exception):  # made by its package, in a way of its own
                importlib.import_module(name)


def serve(channels: list[tuple[int, int]], *, small: bool) -> None:
    """Answer jobs on each channel, a pair of pipes to read jobs from and to write codes to, by a
    fork of this process.
    """
    import torch

    for module in LOADED:
        importlib.import_module(f"hydra_pipe.{module}")
    torch.set_num_threads(1)
    keep_always()
    if small:
        make_small()
    servers = []
    for own in channels:
        gc.freeze()
        servers.append(os.fork())
        if servers[-1] == 0:
            for reader, writer in channels:
                if reader != own[0]:
                    os.close(reader)
                    os.close(writer)  # or nobody would see that another server has ended
            with open(own[0]) as jobs, open(own[1], "w") as codes:
                answer(jobs, codes)
            os._exit(0)
    for reader, writer in channels:
        os.close(reader)
        os.close(writer)
    for process in servers:
        os.waitpid(process, 0)


def answer(jobs: TextIO, codes: TextIO) -> None:
    """Do one job after the other."""
    known: set[str] = set()
    for line in iter(jobs.readline, ""):
        job = json.loads(line)
        gc.freeze()
        process = os.fork()
        if process == 0:
            perform(job)
        status = ended(process, job["seconds"])
        kind = " ".join(word for word in job["arguments"] if "/" not in word)
        if status == 0 and kind not in known:
            known.add(kind)
            load(Path(job["modules"]).read_text().split())
        print(os.waitstatus_to_exitcode(status), file=codes, flush=True)


def ended(process: int, seconds: float | None) -> int:
    """Wait for a process, and kill it when it has lasted `seconds`. Returns: its status."""
    if seconds is not None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return status
            time.sleep(min(left, NAP_SECONDS))
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


if __name__ == "__main__":
    ends = [int(word) for word in sys.argv[1:] if word.isdigit()]
    serve(list(zip(ends[::2], ends[1::2], strict=True)), small="small" in sys.argv[1:])
