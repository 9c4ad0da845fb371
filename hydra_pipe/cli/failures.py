"""Failures of a command: one line on standard error, an exit code, no traceback unless asked."""

import errno
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import typer

from hydra_pipe.errors import HydraError, RecordWarning, UserCodeError, printable

_ADVICE = {
    errno.ENOSPC: "make room on the disk and run the same command again",
    errno.EDQUOT: "make room in your quota and run the same command again",
    errno.EIO: (
        "the disk, or the way to it, is faulty: mend it, or name a run directory elsewhere, and "
        "run the same command again"
    ),
    errno.EROFS: "the file system is read-only: name a run directory elsewhere",
    errno.EACCES: "no permission: name a run directory elsewhere, or change its permissions",
    errno.EPERM: "no permission: name a run directory elsewhere, or change its permissions",
    errno.ENOTDIR: "a part of the path is a file: name another directory",
    errno.ENAMETOOLONG: "name a shorter path",
}


# Packages that talk to object stores. fsspec lets their own errors through.
_STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command`, with its errors printed in one line. It must have a `debug` parameter."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, debug=debug, **kwargs)
        # BrokenPipeError: the reader of the output, such as `head`, has enough
        except (typer.Exit, SystemExit, BrokenPipeError):
            raise
        except BaseException as error:
            if debug:
                raise
            if isinstance(error, UserCodeError):
                print(error.excerpt, end="", file=sys.stderr)
            code, message = _told(error)
            print(f"hydra-pipe: {message}", file=sys.stderr)
            raise typer.Exit(code) from None

    return wrapped


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, RecordWarning):
        print(f"hydra-pipe: {printable(str(message))}", file=sys.stderr)
    else:
        print(
            warnings.formatwarning(message, category, filename, lineno, line),
            end="",
            file=sys.stderr,
        )


def _told(error: BaseException) -> tuple[int, str]:
    if isinstance(error, HydraError):
        return error.exit_code, _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted: finished work is kept; run the same command again to resume"
    if isinstance(error, MemoryError):
        return (
            1,
            "out of memory: lower --memory, or record fewer columns with --encoding projected "
            "--dim N",
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno, "fix this, and run the same command again")
        return 1, printable(f"{where}{error.strerror}: {advice}")
    if type(error).__module__.partition(".")[0] in _STORE_CLIENTS:
        return (
            1,
            f"the object store cannot be used ({_one_line(error)}): check the URL, and the "
            "credentials in the environment",
        )
    if isinstance(error, OSError):  # from a package that gives no errno
        return (
            1,
            f"{_one_line(error)}: check the disk or the connection, and run the same command again",
        )
    return (
        1,
        f"{type(error).__name__}: {_one_line(error)}: this is a defect of hydra-pipe, please "
        "report what --debug prints",
    )


def _one_line(error: BaseException) -> str:
    return printable(str(error))
