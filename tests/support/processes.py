"""Other processes, and work that is cut short."""

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from hydra_pipe.store.files import remove


def forked(target: Callable[..., object], *args: object, **options: object) -> BaseProcess:
    """Start another process for `target`. It has imported what this one has: torch alone takes seconds, its optimisers more."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, kwargs=options)
    with warnings.catch_warnings():
        # said since Python 3.12 where there are other threads: none of them holds what the target needs
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        process.start()
    return process


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
