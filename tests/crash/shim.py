"""Builds `shim.c`, and says in the environment of a process what is to happen at which call.

HYDRA_PIPE_SHIM_ROOT   directory: only calls on files in it, or below, are counted
HYDRA_PIPE_SHIM_AT     number of the call that is struck, from 1; absent: none
HYDRA_PIPE_SHIM_DO     one of DEEDS
HYDRA_PIPE_SHIM_STAY   if there: whatever needs room fails from that call on
HYDRA_PIPE_SHIM_LOG    file to append the calls to
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# SIGKILL before the call, after it, or when half of it is written; half is written and said to be;
# the error
DEEDS = ("kill", "kill-after", "short-kill", "short", "enospc", "eio")


@dataclass(frozen=True)
class Call:
    """A call that was counted.

    Args:
        number: from 1.
        name: "open", "write", "writev", "pwrite", "fsync", "fdatasync", "ftruncate", "rename",
            "unlink", "mkdir" or "rmdir".
        path: that it is about, in full.
        to: what it renames that to, else empty.
    """

    number: int
    name: str
    path: str
    to: str


def why_not() -> str | None:
    """Why this machine cannot build it; None where it can."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "the shim is for Linux with glibc"
    return None if shutil.which("cc") else "the shim needs a C compiler, cc"


@cache
def library() -> Path:
    """The built library, in a temporary directory that the system is left to clean."""
    built = Path(tempfile.mkdtemp(prefix="hydra-pipe-shim-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", built, source, "-ldl"],
        check=True,
    )
    return built


def environment(
    root: Path, *, at: int = 0, do: str = "", stay: bool = False, log: Path | None = None
) -> dict[str, str]:
    """Variables for a process whose calls below `root` are counted; with `LD_PRELOAD`, see
    `preloaded`.
    """
    assert do in ("", *DEEDS)
    found = {"HYDRA_PIPE_SHIM_ROOT": os.path.realpath(root)}
    if at:
        found |= {"HYDRA_PIPE_SHIM_AT": str(at), "HYDRA_PIPE_SHIM_DO": do}
    if stay:
        found["HYDRA_PIPE_SHIM_STAY"] = "1"
    if log is not None:
        found["HYDRA_PIPE_SHIM_LOG"] = str(log)
    return found


def preloaded() -> dict[str, str]:
    """The variable by which a new process loads the library."""
    return {"LD_PRELOAD": str(library())}


def calls(log: Path) -> list[Call]:
    """What a process has written to `log`, in the order of the numbers."""
    fields = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    return sorted(
        (Call(int(number), name, path, to) for number, name, path, to in fields),
        key=lambda call: call.number,
    )
