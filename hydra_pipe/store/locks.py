"""One writer for each stage of a run: a second one is refused, by name of the first.

On a local disk, or a network file system that passes locks on (NFS from version 4 on), it is `flock` on a file in the run, which
the system lets go when its holder ends, however it ends; the file says who that is. Where there are no such locks (object stores,
some network file systems) it is a *lease*: a file that its holder writes again and again, and that counts as left when it is
`LEASE_SECONDS` old.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from hydra_pipe.errors import RunError
from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, read_file, remove, replace_file

LEASE_SECONDS = 120.0
_RENEW_SECONDS = 20.0
# between writing a lease and reading it back: another who has written at the same time is seen then
_SETTLE_SECONDS = 0.5
# of a lock's file: one that has more is not ours
_MOST_BYTES = 4096
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


# those of this process
_HELD: WeakSet["Lock"] = WeakSet()


def _forget_in_child() -> None:
    # a child (a worker of a DataLoader, say) would hold on to its parent's locks after that was killed
    for lock in _HELD:
        lock.forget()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def one_writer(run: Path, stage: str) -> Iterator[None]:
    """A block in which this process alone writes `stage` of the run at `run`.

    Args:
        run: directory of the run, which is made if it is not there; and removed again where nothing came into it.
        stage: "record", "reduce" or "export".

    Raises:
        RunError: another process writes it; the message says which.
    """
    lock = Lock(run, stage)
    try:
        yield
    finally:
        lock.release()


class Lock:
    """Taken when it is made.

    Args:
        run: directory of the run.
        stage: see `one_writer`.
        take_over: from this very process: the earlier lock is `lost` then. For what a notebook has begun and left.

    Raises:
        RunError: another process has it.
    """

    def __init__(self, run: Path, stage: str, *, take_over: bool = False) -> None:
        self._descriptor: int | None = None
        self._path = run / names.LOCKS / f"{stage}.lock"
        self._stage = stage
        self.lost = False
        own = next((lock for lock in _HELD if lock._path == self._path), None)
        if own is not None and take_over:
            own.release()
            own.lost = True
        self._ended = threading.Event()
        self._token = secrets.token_hex(8)
        if is_remote(run) or not self._flock():
            self._lease()
        _HELD.add(self)

    def release(self) -> None:
        """Let it go; nothing stays behind. May be called again."""
        if self._ended.is_set():
            return
        self._ended.set()
        _HELD.discard(self)
        with suppress(OSError):
            remove(self._path)  # while it is held: who waits for this very file sees that it is not the one in the directory
        self._close()
        if not is_remote(self._path):
            for directory in (self._path.parent, self._path.parent.parent):
                with suppress(OSError):
                    directory.rmdir()  # only where it is empty

    def __del__(self) -> None:
        # a recorder that was left without `close`: its descriptor would stay locked, and nobody would know of it any more
        if self._descriptor is not None:  # one that was refused has nothing: the file is its holder's
            self.release()

    def forget(self) -> None:
        """In a child of the process that holds it: it is not the child's."""
        self._ended.set()
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _flock(self) -> bool:
        """Take it as a lock of the system; False: there are none here."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    return False
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._refusal(self._holder()) from None
                raise
            if self._is_in_directory(descriptor):
                break
            os.close(descriptor)  # its holder has just removed it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, self._self_description())
        self._descriptor = descriptor
        return True

    def _is_in_directory(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _lease(self) -> None:
        holder = self._holder()
        age = time.time() - holder.get("time", 0.0)
        left = holder.get("host") == socket.gethostname() and not _is_alive(holder.get("pid"))
        if holder and age < LEASE_SECONDS and not left:
            raise self._refusal(holder)
        replace_file(self._path, [self._self_description()], safely=False)
        time.sleep(_SETTLE_SECONDS)
        holder = self._holder()
        if holder.get("token") != self._token:
            raise self._refusal(holder)
        threading.Thread(target=self._renew, name="hydra-pipe lease", daemon=True).start()

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            with suppress(Exception):  # an object store that does not answer now may do so before the lease has run out
                replace_file(self._path, [self._self_description()], safely=False)

    def _self_description(self) -> bytes:
        found = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "token": self._token}
        return json.dumps(found).encode()

    def _holder(self) -> dict[str, Any]:
        """What the lock's file says; empty where there is none, or it says nothing that makes sense."""
        try:
            found = json.loads(read_file(self._path, _MOST_BYTES))
            ours = {"pid": int(found["pid"]), "host": str(found["host"]), "time": float(found["time"])}
            return ours | {"token": str(found["token"])}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return {}

    def _refusal(self, holder: dict[str, Any]) -> RunError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        if (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
            who = "this very process"
        run = self._path.parent.parent
        return RunError(f"{run} is being written by {who} ({self._stage}): wait for it or stop it, or use another directory")


def _is_alive(pid: int | None) -> bool:
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextmanager
def brief_lock(directory: Path) -> Iterator[None]:
    """A block that no other process of this kind is in, as far as the file system has locks: for a file that several rewrite."""
    if is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
