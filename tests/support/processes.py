"""Other processes, and work that is cut short."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.store.files import remove
from hydra_pipe.training import trainer


def forked(target: Callable[..., object], *args: object, **options: object) -> BaseProcess:
    """Start another process for `target`.

    It has imported what this one has: torch alone takes seconds, its optimisers more.
    """
    process = multiprocessing.get_context("fork").Process(target=target, args=args, kwargs=options)
    with warnings.catch_warnings():
        # said since Python 3.12 where there are other threads: none of them holds what the target
        # needs
        warnings.filterwarnings(
            "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
        )
        process.start()
    return process


def _die_at(
    kill_at: int, build: Callable[[], Pipeline], run: Path, options: dict[str, Any]
) -> None:
    real, steps = trainer.take_step, 0

    def step(*args: Any, **kwargs: Any) -> float:
        nonlocal steps
        steps += 1
        if steps > kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    trainer.take_step = step  # type: ignore[assignment]
    hydra_pipe.record(build(), run, **options)


def record_and_die(kill_at: int, build: Callable[[], Pipeline], run: Path, **options: Any) -> None:
    """Record in a process of its own, which is killed before its step `kill_at`."""
    process = forked(_die_at, kill_at, build, run, options)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def killed_after(n: int) -> Callable[[Path], None]:
    """`hydra_pipe.store.files.remove`, which does it n times and is then interrupted."""
    left = n

    def killed(path: Path) -> None:
        nonlocal left
        if not left:
            raise InterruptedError
        left -= 1
        remove(path)

    return killed
