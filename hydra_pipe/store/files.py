"""Files and directories of runs, on a local disk or in an object store: they appear whole or not at all, and go away.

A run on a local disk is a `pathlib.Path`. One in an object store is a `upath.UPath`, which behaves like it, over fsspec: a file is
an object, put there in one request, and a directory is nothing but the beginning of names. What differs is in this module.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from hydra_pipe.errors import RunError, StoreError, UsageError

# how the names of files end that are not whole yet
PARTIAL = ".partial"
# what fsspec needs for a protocol -> the extra of this package that has it
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# protocols of web servers, which are read only
_WEB = ("http", "https")
# protocols of this machine's own files
_LOCAL = ("file", "local")
# a protocol, and however many slashes follow it
_SLASHES = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)", re.DOTALL)
# what making a directory or a file raises where the other stands
_IN_THE_WAY = (IsADirectoryError, FileExistsError, NotADirectoryError)


def location(path: "str | os.PathLike[str]") -> Path:
    """Where a user says that a run is: a path, or a URL such as "s3://bucket/run".

    Raises:
        UsageError: it is empty, or looks like a URL and is none; the message says what was meant.
        RunError: the URL cannot be used; the message says what to install.
    """
    if _is_url_path(path):
        return cast(Path, path)  # behaves like one
    text = os.fspath(path)
    _refuse_slashes(text)
    protocol, is_url, rest = text.partition("://")
    if not is_url:
        return local_path(text, "RUN")
    if protocol in _LOCAL:
        return Path(rest)
    extra = _EXTRAS.get(protocol, "url")
    try:
        from upath import UPath

        # fsspec remembers listings: another process, or another machine, may have changed what is there
        found = UPath(text, use_listings_cache=False)
        found.fs  # noqa: B018 - which imports what the protocol needs
    except ImportError as error:
        raise RunError(f"{text}: {error}: pip install 'hydra-pipe[{extra}]'") from error
    except ValueError as error:
        raise RunError(f"{text}: {error}: name a directory, or a URL that fsspec knows such as s3://bucket/run") from error
    return cast(Path, found)  # behaves like one


def local_path(text: str, what: str) -> Path:
    """A path of this machine, as a user writes it. `~` at its beginning is a home directory, whoever has read it before.

    Args:
        text: as it was given.
        what: it is of, for the message.

    Raises:
        UsageError: it is empty, holds a null character, or names a user that is none.
    """
    if not text.strip() or "\0" in text:
        fault = "holds a null character" if text.strip() else "is empty"
        raise UsageError(f"{what} {fault}: name a file or directory, or a URL such as s3://bucket/run where a run may be one")
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise UsageError(f"{text}: there is no such user: write ./{text} for a path of that name") from error
    # what was written "./~" or "./s3:/x" has lost its beginning, and would be read as something else the next time
    return path.absolute() if str(path).startswith("~") or _SLASHES.match(str(path)) else path


def _refuse_slashes(text: str) -> None:
    """Refuse a URL with more slashes than two, or fewer, before a directory of such a name is made. Raises: UsageError."""
    found = _SLASHES.match(text)
    if found is None or len(found[2]) == 2 or (found[1] in _LOCAL and len(found[2]) == 3):
        return
    from fsspec.registry import known_implementations

    protocol, rest = found[1].lower(), found[3]
    if protocol in known_implementations or protocol in _LOCAL:
        meant = f"{protocol}://{'/' if protocol in _LOCAL else ''}{rest}"
        raise UsageError(f"{text}: did you mean {meant}? (pathlib takes a slash away: give text; for a directory, write ./{text})")


def _is_url_path(path: Any) -> bool:
    return hasattr(path, "fs") and hasattr(path, "storage_options") and not isinstance(path, Path)


def is_remote(path: Path) -> bool:
    """Whether `path` is in an object store."""
    return _is_url_path(path)


def is_web(path: Path) -> bool:
    """Tell whether `path` is on a web server, from which it can be read only."""
    return is_remote(path) and path.protocol in _WEB  # type: ignore[attr-defined]


def refuse_read_only(path: Path) -> None:
    """Refuse to write where nobody can. Raises: RunError."""
    if is_web(path):
        raise RunError(
            f"{path} is on a web server, which can be read only (info, verify, hydra_pipe.open_run): copy the run to a disk, or "
            f"name an object store such as s3://bucket/run"
        )


def read_file(path: Path, most_bytes: int | None = None) -> bytes:
    """A whole file, in one request.

    Args:
        path: of the file.
        most_bytes: that it can have. A disk says how many it has, an object store is believed.

    Raises:
        OSError: it cannot be read, is larger, or is none: a pipe would have us wait for ever, a device has no end.
    """
    if is_remote(path):
        content: bytes = _fs(path).cat_file(_name(path))
        return content
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        if most_bytes is not None and status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, {most_bytes} at most", str(path))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def sha256_of(path: Path) -> str:
    """Of a file, which may be larger than memory on a disk. Raises: OSError."""
    if is_remote(path):
        return hashlib.sha256(read_file(path)).hexdigest()
    with open(path, "rb", opener=_open_at_once) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: Iterable[bytes], *, safely: bool = True) -> None:
    """Put the pieces of `content` at `path` in one step.

    Args:
        path: of the file; its directory is made if it is not there.
        content: of the file.
        safely: return when its content is safe on the disk; that it is there under this name, `sync` of its directory makes safe.
            In an object store both always are.

    Raises:
        StoreError: a directory is in its place, or a file in that of its directory. OSError: the disk is full or gone.
    """
    if is_remote(path):
        _fs(path).pipe_file(_name(path), b"".join(content))
        return
    # a name of its own: a task of a cluster that was given up on may still be writing the same file
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident():x}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except _IN_THE_WAY as error:
        raise _in_the_way(path, error) from error
    try:
        with open(partial, "wb") as file:
            file.writelines(content)
            if safely:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise _in_the_way(path, error) from error
        if isinstance(error, OSError) and error.errno is not None:  # a write does not say of which file
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise


def sync(path: Path) -> None:
    """Return when a file, or the names in a directory, are safe on the disk."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path, *, files: bool = True) -> None:
    """`sync` a directory and everything in it, if it is there; only the names where `files` is False."""
    if is_remote(path):
        return
    for directory, _, found in os.walk(path):
        for name in found if files else ():
            sync(Path(directory, name))
        sync(Path(directory))


def remove(path: Path) -> None:
    """Remove a file or a directory tree, if it is there."""
    if is_remote(path):
        if path.exists():
            _fs(path).rm(_name(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove what killed processes have left of files in a directory and below it. Nobody may be writing there."""
    if is_remote(path):
        return
    for name in files_below(path):
        if name.endswith(PARTIAL):
            (path / name).unlink(missing_ok=True)


def remove_partials_of(path: Path) -> None:
    """Remove what killed processes have left of one file. Nobody may be writing it."""
    if is_remote(path) or not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        if is_partial_of(path.name, entry.name):
            entry.unlink(missing_ok=True)


def is_partial_of(name: str, entry: str) -> bool:
    """Whether a file called `entry` is what was begun of a file `name`."""
    return entry.startswith(f"{name}.") and entry.endswith(PARTIAL)


def is_partial(name: str) -> bool:
    """Whether a file is what a writer that was stopped has left, or is at: no reader takes it for data."""
    return any(part.endswith(PARTIAL) for part in name.split("/"))


def move(path: Path, target: Path) -> None:
    """Move a file or a directory tree to where nothing is."""
    if is_remote(path):
        # file by file: object stores have no directories, and `mv` would move those too
        fs, source = _fs(path), _name(path)
        fs.invalidate_cache()  # which may list files that came and went
        files = fs.find(source)
        fs.copy(files, [_name(target) + name[len(source) :] for name in files])
        fs.rm(source, recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def files_below(path: Path) -> dict[str, int]:
    """Every file in a directory and in those below it: name relative to `path`, with slashes, and bytes. Empty without one."""
    if is_remote(path):
        start = len(_name(path).rstrip("/")) + 1
        found = _fs(path).find(_name(path), detail=True)
        shown = unquote if is_web(path) else str  # a web server's listing is of links
        return {shown(name[start:]): _size(path, name, entry) for name, entry in found.items()}
    return _local_files(os.fspath(path)) if path.is_dir() else {}


def _size(path: Path, name: str, entry: dict[str, Any]) -> int:
    """Bytes of a file, which the listings of web servers do not have."""
    size = entry.get("size")
    size = _fs(path).info(name)["size"] if size is None else size
    return int(size if size is not None else len(_fs(path).cat_file(name)))


def _local_files(root: str) -> dict[str, int]:
    found, waiting = {}, [(root, "")]
    while waiting:
        directory, prefix = waiting.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_file():  # not a link that leads nowhere
                    found[prefix + entry.name] = entry.stat().st_size
    return found


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if is_web(path):  # to which a directory is a file too, with its listing in it
        return sum(files_below(path).values()) or _size(path, _name(path), {})
    return path.stat().st_size if path.is_file() else sum(files_below(path).values())


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A directory on a local disk to fill, which takes the place of `path` when the block ends, and goes away if it fails.

    On a local disk readers see the old files or the new ones, and the new ones are safe there when the block has ended; what a
    killed process has left is removed first. In an object store the old ones are removed first, and the new ones come one after the
    other: whoever reads must know whether the stage is complete.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="hydra-pipe-") as scratch:
            yield Path(scratch)
            remove(path)
            for name in files_below(Path(scratch)):
                _fs(path).put_file(os.path.join(scratch, name), _name(path / name))
        return
    # hidden, so that readers of all that is in the directory pass over what a killed process leaves
    partial, old = path.with_name(f".{path.name}{PARTIAL}"), path.with_name(f".{path.name}.old{PARTIAL}")
    try:
        remove(partial)
        remove(old)
        partial.mkdir(parents=True)
    except _IN_THE_WAY as error:
        raise _in_the_way(path, error) from error
    try:
        yield partial
        sync_tree(partial)
        with _moved_away(path, old):
            partial.rename(path)
        for directory in (path.parent, path.parent.parent):
            sync(directory)
        remove(old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not say of which file
            error.filename = os.fspath(path)
        raise


@contextmanager
def _moved_away(path: Path, old: Path) -> Iterator[None]:
    """A block in which nothing is at `path`: what was there is at `old`, and comes back if the block fails."""
    is_there = os.path.lexists(path)
    if is_there:
        path.rename(old)
    try:
        yield
    except BaseException:
        if is_there:
            with suppress(OSError):
                old.rename(path)
        raise


def _in_the_way(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written ({error.strerror}): remove what is in its place")


def _fs(path: Path) -> Any:
    return path.fs  # type: ignore[attr-defined]


def _name(path: Path) -> str:
    return str(path.path)  # type: ignore[attr-defined]
