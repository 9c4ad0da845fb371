"""Runs hydra-pipe's commands one after the other, each in a process of its own that is forked from here: so torch is loaded once.

Used as a program: a job in JSON a line on its standard input, and the exit code of each on its standard output (negative: the
signal that ended it). With the argument "small" files, chunks and passes are so small that a tiny run has several of each.
"""

import atexit
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

EIGHTS = ((0, 8), (8, 16), (16, 24), (24, 26))
PATIENCE_SECONDS = 60
TWOS = ((0, 2), (2, 4), (4, 6), (6, 7))


def make_small() -> None:
    """Shards of 16 rows, lines of 4 steps, chunks of 8 samples; every second step is written."""
    from hydra_pipe.plan import geometry
    from hydra_pipe.recording import slab
    from hydra_pipe.reduction import hydra
    from hydra_pipe.store import hypergradients, relevance, writing

    for module, name, value in (
        (geometry, "MAX_SHARD_ROWS", 16),
        (writing, "STEP_SHARD_ROWS", 4),
        (slab, "SLAB_STEPS", 2),
        (relevance, "CHUNK_SAMPLES", 8),
        (hydra, "SAMPLE_MULTIPLE", 8),
        (hypergradients, "MOST_FILE_ROWS", 8),
    ):
        getattr(module, name)  # or it would be set in vain
        setattr(module, name, value)


def plan_in(order: str) -> None:
    """Let reductions work in `order`, in four passes."""
    from hydra_pipe.plan.reduction import plan_reduction
    from hydra_pipe.reduction import request

    def planned(given: Any, chunks: Any, answered: Any = None) -> Any:
        plan = plan_reduction(given, chunks)
        whole = {"test_blocks": TWOS, "sample_blocks": EIGHTS if order == "fold first" else ((0, 26),)}
        plan = dataclasses.replace(plan, order=order, **whole)
        done, left = answered.done if answered else 0, "sample_blocks" if order == "fold first" else "test_blocks"
        return dataclasses.replace(plan, **{left: tuple(block for block in getattr(plan, left) if block[0] >= done)})

    request.plan_reduction = planned


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
    if job["order"]:
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


def serve(*, small: bool) -> None:
    import torch

    # loaded before the fork, as is whatever these need
    for module in ("cli.app", "recording.recorder", "recording.trainer", "reduction.run", "exporting.run", "store.verify"):
        importlib.import_module(f"hydra_pipe.{module}")
    torch.set_num_threads(1)
    if small:
        make_small()
    known: set[str] = set()
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        gc.freeze()
        process = os.fork()
        if process == 0:
            perform(job)
        _, status = os.waitpid(process, 0)
        if status == 0 and job["arguments"][0] not in known:
            known.add(job["arguments"][0])
            load(Path(job["modules"]).read_text().split())
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve(small="small" in sys.argv[1:])
