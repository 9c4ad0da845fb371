"""Files and directories of runs, on a local disk or in an object store.

Every file appears whole or not at all. A run on a local disk is a `pathlib.Path`. A run in
an object store is a `upath.UPath`, which behaves like a `pathlib.Path`, over fsspec: a file
is an object, put there in one request, and a directory is only the beginning of names. All
differences between the two are in this module.
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

# End of the names of unfinished files.
PARTIAL = ".partial"
# Protocol -> the extra of this package that installs what fsspec needs for it.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# In an object store a file that may be as large as this is read in parallel.
_LARGE_BYTES = 2**30
# Protocols of web servers, which can only be read.
_WEB = ("http", "https")
# Protocols of this machine's own files.
_LOCAL = ("file", "local")
# A protocol, and any number of slashes after it.
_SLASHES = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)", re.DOTALL)
# Errors of making a directory where a file is, or a file where a directory is.
_IN_THE_WAY = (IsADirectoryError, FileExistsError, NotADirectoryError)


def location(path: "str | os.PathLike[str]") -> Path:
    """Return the place of a run, from a user's path or URL such as "s3://bucket/run".

    Raises:
        UsageError: the text is empty, or resembles a URL but is none. The message names the
            URL that was probably meant.
        RunError: the URL cannot be used. The message says what to install.
    """
    if _is_url_path(path):
        return cast(Path, path)  # UPath behaves like a Path
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

        # fsspec caches listings, but other processes and machines may change the directory.
        found = UPath(text, use_listings_cache=False)
        found.fs  # noqa: B018 - imports what the protocol needs
    except ImportError as error:
        raise RunError(f"{text}: {error}: pip install 'hydra-pipe[{extra}]'") from error
    except ValueError as error:
        raise RunError(
            f"{text}: {error}: name a directory, or a URL that fsspec knows such as s3://bucket/run"
        ) from error
    return cast(Path, found)  # UPath behaves like a Path


def local_path(text: str, what: str) -> Path:
    """Return a path on this machine, from a user's text.

    A `~` at the beginning is a home directory, also where no shell has expanded it.

    Args:
        text: text as the user gave it.
        what: name of the thing that the path is for, for the message.

    Raises:
        UsageError: the text is empty, holds a null character, or names an unknown user.
    """
    if not text.strip() or "\0" in text:
        fault = "holds a null character" if text.strip() else "is empty"
        raise UsageError(
            f"{what} {fault}: name a file or directory, or a URL such as s3://bucket/run where a "
            "run may be one"
        )
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise UsageError(
                f"{text}: there is no such user: write ./{text} for a path of that name"
            ) from error
    # pathlib drops the beginning of "./~" or "./s3:/x". The next reader of the path would take
    # the rest for something else, so it becomes absolute.
    return path.absolute() if str(path).startswith("~") or _SLASHES.match(str(path)) else path


def _refuse_slashes(text: str) -> None:
    """Refuse a URL with more or fewer slashes than two, before a directory of its name is made.

    Raises:
        UsageError: the number of slashes is wrong.
    """
    found = _SLASHES.match(text)
    if found is None or len(found[2]) == 2 or (found[1] in _LOCAL and len(found[2]) == 3):
        return
    from fsspec.registry import known_implementations

    protocol, rest = found[1].lower(), found[3]
    if protocol in known_implementations or protocol in _LOCAL:
        meant = f"{protocol}://{'/' if protocol in _LOCAL else ''}{rest}"
        raise UsageError(
            f"{text}: did you mean {meant}? (pathlib takes a slash away: give text; for a "
            f"directory, write ./{text})"
        )


def _is_url_path(path: Any) -> bool:
    return hasattr(path, "fs") and hasattr(path, "storage_options") and not isinstance(path, Path)


def is_remote(path: Path) -> bool:
    """Tell whether `path` is in an object store."""
    return _is_url_path(path)


def is_web(path: Path) -> bool:
    """Tell whether `path` is on a web server, which can only be read."""
    return is_remote(path) and path.protocol in _WEB  # type: ignore[attr-defined]


def refuse_read_only(path: Path) -> None:
    """Refuse a place that nobody can write to. Raises: RunError."""
    if is_web(path):
        raise RunError(
            f"{path} is on a web server, which can be read only (info, verify, "
            "hydra_pipe.open_run): copy the run to a disk, or "
            f"name an object store such as s3://bucket/run"
        )


def read_file(path: Path, most_bytes: int | None = None) -> bytes:
    """Read a whole file, in one request where the file is not large.

    Args:
        path: path of the file.
        most_bytes: largest size that the file may have. It is compared with the size on a
            local disk. In an object store a file that may be large is read in parallel.

    Raises:
        OSError: the file cannot be read, is larger, or is not a regular file. A pipe would
            block for ever, and a device has no end.
    """
    if is_remote(path):
        fs = _fs(path)
        options: dict[str, int] = {}
        # s3fs asks for the size first where it may read in parallel.
        if getattr(fs, "max_concurrency", 1) > 1 and (most_bytes or _LARGE_BYTES) < _LARGE_BYTES:
            options = {"max_concurrency": 1}
        content: bytes = fs.cat_file(_name(path), **options)
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
    """Return the SHA-256 of a file. On a local disk it may be larger than memory.

    Raises:
        OSError: the file cannot be read.
    """
    if is_remote(path):
        return hashlib.sha256(read_file(path)).hexdigest()
    with open(path, "rb", opener=_open_at_once) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: Iterable[bytes], *, safely: bool = True) -> None:
    """Write the pieces of `content` to `path` in one step.

    Args:
        path: path of the file. Its directory is made if it is missing.
        content: pieces of the file's content.
        safely: True to return only when the content is safe on the disk. The file's name is
            safe only after `sync` of its directory. In an object store both always are.

    Raises:
        StoreError: a directory is in the file's place, or a file in the directory's place.
        OSError: the disk is full or gone.
    """
    if is_remote(path):
        _fs(path).pipe_file(_name(path), b"".join(content))
        return
    # The name is unique: an abandoned task of a cluster may still be writing the same file.
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
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise _in_the_way(path, error) from error
        if isinstance(error, OSError) and error.errno is not None:  # a write names no file
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
    """Call `sync` on an existing directory and on everything in it.

    Args:
        path: path of the directory. Nothing happens if it is missing.
        files: False to sync only the directories, which hold the names.
    """
    if is_remote(path):
        return
    for directory, _, found in os.walk(path):
        for name in found if files else ():
            sync(Path(directory, name))
        sync(Path(directory))


def remove(path: Path) -> None:
    """Remove a file or a directory tree, if it exists."""
    if is_remote(path):
        if path.exists():
            _fs(path).rm(_name(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove unfinished files of killed processes from a directory and all below it.

    Nobody may be writing there.
    """
    if is_remote(path):
        return
    for name in files_below(path):
        if name.endswith(PARTIAL):
            (path / name).unlink(missing_ok=True)


def remove_partials_of(path: Path) -> None:
    """Remove what killed processes have left of one file. Nobody may be writing the file."""
    if is_remote(path) or not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        if is_partial_of(path.name, entry.name):
            entry.unlink(missing_ok=True)


def is_partial_of(name: str, entry: str) -> bool:
    """Tell whether file `entry` is an unfinished version of file `name`."""
    return entry.startswith(f"{name}.") and entry.endswith(PARTIAL)


def is_partial(name: str) -> bool:
    """Tell whether a file is unfinished: its writer is at work, or has stopped.

    No reader takes such a file for data.
    """
    return any(part.endswith(PARTIAL) for part in name.split("/"))


def move(path: Path, target: Path) -> None:
    """Move a file or a directory tree to a free place."""
    if is_remote(path):
        # Files move one by one: object stores have no directories, and `mv` would move
        # directories too.
        fs, source = _fs(path), _name(path)
        fs.invalidate_cache()  # the cache may list files that came and went
        files = fs.find(source)
        fs.copy(files, [_name(target) + name[len(source) :] for name in files])
        fs.rm(source, recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def files_below(path: Path) -> dict[str, int]:
    """Return every file in a directory and below it: name relative to `path` -> bytes.

    Names have slashes. The result is empty if there is no such directory.
    """
    if is_remote(path):
        start = len(_name(path).rstrip("/")) + 1
        found = _fs(path).find(_name(path), detail=True)
        shown = unquote if is_web(path) else str  # a web server lists links, which are quoted
        return {shown(name[start:]): _size(path, name, entry) for name, entry in found.items()}
    return _local_files(os.fspath(path)) if path.is_dir() else {}


def _size(path: Path, name: str, entry: dict[str, Any]) -> int:
    """Return the bytes of a file. The listings of web servers do not have them."""
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
                elif entry.is_file():  # False for a link that leads nowhere
                    found[prefix + entry.name] = entry.stat().st_size
    return found


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory."""
    if is_web(path):  # a web server serves a directory as a file too, which holds the listing
        return sum(files_below(path).values()) or _size(path, _name(path), {})
    return path.stat().st_size if path.is_file() else sum(files_below(path).values())


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield a local directory to fill, which takes the place of `path` when the block ends.

    If the block fails, the new directory is removed. On a local disk a reader sees the old
    files or the new ones. The new files are safe there when the block has ended. Leftovers of a
    killed process are removed first. In an object store the old files are removed first, and
    the new files come one after the other. A reader there must know whether the stage is
    complete.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="hydra-pipe-") as scratch:
            yield Path(scratch)
            remove(path)
            for name in files_below(Path(scratch)):
                _fs(path).put_file(os.path.join(scratch, name), _name(path / name))
        return
    # Hidden, so that a reader of everything in the directory passes over what a killed process
    # leaves.
    partial, old = (
        path.with_name(f".{path.name}{PARTIAL}"),
        path.with_name(f".{path.name}.old{PARTIAL}"),
    )
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
        if isinstance(error, OSError) and error.filename is None:  # a write names no file
            error.filename = os.fspath(path)
        raise


@contextmanager
def _moved_away(path: Path, old: Path) -> Iterator[None]:
    """Move what is at `path` to `old` for the block, and back if the block fails."""
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
