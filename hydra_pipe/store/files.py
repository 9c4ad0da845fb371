"""Files that appear whole or not at all, and directories that go away."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, content: Iterable[bytes], *, safely: bool = True) -> None:
    """Put the pieces of `content` at `path` in one step.

    Args:
        path: of the file; its directory is made if it is not there.
        content: of the file.
        safely: return when it is safe on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(content)
        if safely:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Return when a file, or the names in a directory, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` a directory and everything in it, if it is there."""
    for directory, _, files in os.walk(path):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))


def remove(path: Path) -> None:
    """Remove a file or a directory tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
