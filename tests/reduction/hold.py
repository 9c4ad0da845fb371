"""Preloaded by the workers of test_schedulers.py: the first to come to a point that is named in a
directory waits there.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra_pipe.reduction import answers
from hydra_pipe.reduction.solvers import sums

HOLD = Path(os.environ["HYDRA_PIPE_TEST_HOLD"])


def wait_at(point: str) -> None:
    """Wait while the file `point` is there, if no one has before: `point.pid` says who does."""
    if not (HOLD / point).exists():
        return
    try:
        with open(HOLD / f"{point}.claim", "x"):
            pass
    except FileExistsError:
        return
    (HOLD / "writing").write_text(str(os.getpid()))
    (HOLD / "writing").rename(HOLD / f"{point}.pid")
    while (HOLD / point).exists():
        time.sleep(0.01)


def held(module: ModuleType, name: str, where: str) -> None:
    """Let the function `name` of a module wait at the point `name`, before it runs or after."""
    real: Callable[..., Any] = getattr(module, name)

    def waiting(*args: Any) -> Any:
        if where == "before":
            wait_at(name)
        result = real(*args)
        if where == "after":
            wait_at(name)
        return result

    setattr(module, name, waiting)


# in the middle of a run of rows, of adding up (something has been added, the total has not been
# handed on), and of writing
held(sums, "_add_scores", "after")
held(sums, "_add", "after")
held(answers, "write_relevance", "before")
held(sums, "write_relevance", "before")
