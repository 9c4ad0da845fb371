"""Check whether a stage may write to its place, before the stage withdraws anything."""

import errno
import os
from pathlib import Path

from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, refuse_read_only
from hydra_pipe.store.run.stages import StageId


def check_stages(run: Path, *stages: StageId) -> None:
    """Refuse where the files of `stages` may not be replaced or removed. Changes nothing.

    Raises:
        PermissionError, OSError, RunError: the errors of `check_writable`.
    """
    check_writable(run, *(stage.area for stage in stages))


def check_writable(run: Path, *places: str) -> None:
    """Refuse where the manifest or one of `places` may not be replaced or removed.

    Changes nothing.

    Args:
        run: directory of the run, which may not exist yet.
        places: files and directories, relative to the run, which may not exist yet.

    Raises:
        PermissionError: a directory may not be changed. The error's file name is the
            directory's.
        OSError: the file system is read-only.
        RunError: the run is on a web server, where nobody may write.
    """
    refuse_read_only(run)
    if is_remote(run):
        return
    for place in (names.CHECKSUMS, *places):
        there = run.absolute() / place
        for directory, _, _ in os.walk(there):
            _check(Path(directory))
        while not (there := there.parent).is_dir() and there != there.parent:
            pass
        _check(there)


def _check(directory: Path) -> None:
    # The effective user opens files, so the effective user's rights are checked.
    if not os.access(
        directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        number = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), os.fspath(directory))  # EACCES: PermissionError
