"""Locks that give each stage of a run one writer. A second writer is told who the first is.

On a local disk the lock is `flock` on a file in the run. The system releases it when its
holder ends, however the holder ends. The file names the holder. Network file systems that
pass locks on work the same way (NFS from version 4 on). Object stores and some network file
systems have no locks. There the lock is a *lease*: a file that its holder writes again and
again. A lease that is `LEASE_SECONDS` old counts as abandoned.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

from hydra_pipe.errors import RunError
from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, read_file, refuse_read_only, remove, replace_file
from hydra_pipe.store.run.stages import StageId

LEASE_SECONDS = 120.0
_RENEW_SECONDS = 20.0
# Time between writing a lease and reading it back, to see another writer of the same moment.
_SETTLE_SECONDS = 0.5
# The most bytes of a lock's file. A larger file is not ours.
_MOST_BYTES = 4096
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@dataclass(eq=False)
class _Held:
    """The state of a lock: a file that is open and locked, or a lease and its renewing thread."""

    path: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    descriptor: int | None = None
    renewing: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    released: bool = False

    def release(self) -> None:
        """Release the lock, and leave nothing behind. May be called again."""
        if not self.released:
            self.released = True
            self.ended.set()
            if self.renewing is not None:
                self.renewing.join()  # the thread may be writing the lease at this moment
            with suppress(OSError):
                # Remove the file while it is locked. A process that waits for this file then
                # sees that it is no longer the file in the directory.
                remove(self.path)
        self.close()
        if not is_remote(self.path):
            for directory in (self.path.parent, self.path.parent.parent):
                with suppress(OSError):
                    directory.rmdir()  # only where it is empty

    def close(self) -> None:
        """Close the file, and leave it where it is."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def renew(self) -> None:
        """Write the lease again and again."""
        while not self.ended.wait(_RENEW_SECONDS):
            with suppress(Exception):  # the store may answer again before the lease ends
                replace_file(self.path, [self.description()], safely=False)

    def description(self) -> bytes:
        """Return the file's content, which describes the holder."""
        found = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
            "token": self.token,
        }
        return json.dumps(found).encode()


# Locks of this process, with their owners. A lock may lose its owner without `release`, with
# a recorder that nobody closed. The next lock that is taken then releases it. The garbage
# collector must not: it runs at any moment, in any thread.
_HELD: dict[_Held, "ref[Lock]"] = {}


def _forget_in_child() -> None:
    # A child process (a worker of a DataLoader, say) would hold its parent's locks after the
    # parent was killed.
    for held in _HELD:
        held.released = True
        held.close()
    _HELD.clear()


def _release_left() -> None:
    for held, holder in list(_HELD.items()):
        if holder() is None:
            _HELD.pop(held, None)
            with suppress(Exception):  # its store may be gone, no fault of the next lock
                held.release()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def one_writer(run: Path, *stages: StageId) -> Iterator[None]:
    """Lock `stages` of the run at `run` for the block: only this process writes them.

    Args:
        run: directory of the run. It is made if it is missing, and removed again if it stays
            empty.
        stages: the stages. A stage that is named twice is locked once.

    Raises:
        RunError: another process writes one of the stages. The message says which process.
    """
    with ExitStack() as locks:
        for stage in dict.fromkeys(stages):
            locks.callback(Lock(run, stage).release)
        yield


class Lock:
    """A lock on a stage, taken when the object is made.

    Args:
        run: directory of the run.
        stage: the stage.
        take_over: True to take the lock from an earlier object of this process, which is
            `lost` then. A notebook may have begun a stage and left it.

    Raises:
        RunError: another process holds the lock.
    """

    def __init__(self, run: Path, stage: StageId, *, take_over: bool = False) -> None:
        refuse_read_only(run)
        _release_left()
        self._held = _Held(run / names.LOCKS / f"{stage}.lock")
        self._path, self._stage = self._held.path, stage
        self.lost = False
        if take_over:
            for own in [
                holder() for held, holder in list(_HELD.items()) if held.path == self._path
            ]:
                if own is not None:
                    own.release()
                    own.lost = True
        # Before anything else, so that an interruption at any point leaves the lock registered.
        _HELD[self._held] = ref(self)
        try:
            if is_remote(run) or not self._flock():
                self._lease()
        except BaseException:
            if self._holder().get("token") == self._held.token:
                self._held.release()  # the interruption came after the lock was taken
            self._held.close()
            _HELD.pop(self._held, None)
            raise

    def release(self) -> None:
        """Release the lock, and leave nothing behind. May be called again."""
        self._held.release()
        _HELD.pop(self._held, None)

    def _flock(self) -> bool:
        """Take the lock by `flock`. False: the file system has no locks."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._held.descriptor = descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._held.close()
                if error.errno in _NO_LOCKS:
                    return False
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._refusal(self._holder()) from None
                raise
            if self._is_in_directory(descriptor):
                break
            self._held.close()  # the holder has just removed this file
        os.ftruncate(descriptor, 0)
        os.write(descriptor, self._held.description())
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
        replace_file(self._path, [self._held.description()], safely=False)
        time.sleep(_SETTLE_SECONDS)
        holder = self._holder()
        if holder.get("token") != self._held.token:
            raise self._refusal(holder)
        self._held.renewing = threading.Thread(
            target=self._held.renew, name="hydra-pipe lease", daemon=True
        )
        self._held.renewing.start()

    def _holder(self) -> dict[str, Any]:
        """Return the content of the lock's file, or {} if it is missing or makes no sense."""
        try:
            found = json.loads(read_file(self._path, _MOST_BYTES))
            ours = {
                "pid": int(found["pid"]),
                "host": str(found["host"]),
                "time": float(found["time"]),
            }
            return ours | {"token": str(found["token"])}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return {}

    def _refusal(self, holder: dict[str, Any]) -> RunError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        if (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
            who = "this very process"
        run = self._path.parent.parent
        return RunError(
            f"{run} is being written by {who} ({self._stage}): wait for it or stop it, or use "
            "another directory"
        )


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
    """Keep other processes out of the block, as far as the file system has locks.

    The lock is for a file that several processes rewrite.
    """
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
