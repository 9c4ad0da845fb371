"""Tell whether a stage may write where it is about to, asked before it withdraws anything."""

import errno
import os
from pathlib import Path

from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, refuse_read_only
from hydra_pipe.store.stages import StageId


def check_stages(run: Path, *stages: StageId) -> None:
    """Refuse where what `stages` have written may not be replaced, or not be removed. Changes nothing. Raises: as below."""
    check_writable(run, *(stage.area for stage in stages))


def check_writable(run: Path, *places: str) -> None:
    """Refuse where the manifest or one of `places` may not be replaced, or not be removed. Changes nothing.

    Args:
        run: directory of the run, which may not be there yet.
        places: files and directories, relative to the run, likewise.

    Raises:
        PermissionError: it may not; its file name is that of the directory. OSError: the file system is read-only.
        RunError: nobody may, for it is on a web server.
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
    # the effective user is who opens files
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        number = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), os.fspath(directory))  # which makes a PermissionError of the latter
