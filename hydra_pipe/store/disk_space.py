"""Free space on the disk, for what is about to be written."""

import os
from pathlib import Path

from hydra_pipe.progress import Progress
from hydra_pipe.store.files import is_remote
from hydra_pipe.units import format_bytes


def free_bytes(path: Path) -> int | None:
    """Return the bytes that this user has free on the file system of `path`.

    The path may not exist yet. None in an object store.
    """
    if is_remote(path):
        return None
    there = path.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def room_for(n_bytes: int, path: Path) -> str:
    """Return a message of how much is to be written at `path`, and whether it fits.

    Args:
        n_bytes: the most bytes to write.
        path: place of the files, which may not exist yet.
    """
    free = free_bytes(path)
    most = f"at most {format_bytes(n_bytes)} to write"
    if free is None:
        return most
    if n_bytes <= free:
        return f"{most}, {format_bytes(free)} free"
    return (
        f"{most}, and only {format_bytes(free)} free: it may not fit; on a full disk the command "
        "stops; run it again once there is room, and it resumes"
    )


def say_if_tight(n_bytes: int, path: Path, progress: Progress) -> None:
    """Warn the user if `n_bytes` may not fit at `path`."""
    free = free_bytes(path)
    if free is not None and n_bytes > free:
        progress.say(room_for(n_bytes, path))
