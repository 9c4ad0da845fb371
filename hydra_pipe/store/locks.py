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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

from hydra_pipe.errors import RunError
from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, read_file, refuse_read_only, remove, replace_file
from hydra_pipe.store.stages import StageId

LEASE_SECONDS = 120.0
_RENEW_SECONDS = 20.0
# between writing a lease and reading it back: another who has written at the same time is seen then
_SETTLE_SECONDS = 0.5
# of a lock's file: one that has more is not ours
_MOST_BYTES = 4096
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@dataclass(eq=False)
class _Held:
    """What there is of a lock: a file that is open and locked, or a lease and the thread that writes it again."""

    path: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    descriptor: int | None = None
    renewing: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    released: bool = False

    def release(self) -> None:
        """Let it go; nothing stays behind. May be called again."""
        if not self.released:
            self.released = True
            self.ended.set()
            if self.renewing is not None:
                self.renewing.join()  # it may be writing the lease at this moment
            with suppress(OSError):
                remove(self.path)  # while it is held: who waits for this very file sees that it is not the one in the directory
        self.close()
        if not is_remote(self.path):
            for directory in (self.path.parent, self.path.parent.parent):
                with suppress(OSError):
                    directory.rmdir()  # only where it is empty

    def close(self) -> None:
        """Let the file go, and leave it where it is."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def renew(self) -> None:
        """Write the lease again and again."""
        while not self.ended.wait(_RENEW_SECONDS):
            with suppress(Exception):  # an object store that does not answer now may do so before the lease has run out
                replace_file(self.path, [self.description()], safely=False)

    def description(self) -> bytes:
        """What the file says of its holder."""
        found = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "token": self.token}
        return json.dumps(found).encode()


# Those of this process, and whose they are. One that is left without `release`, with a recorder that nobody closed, is let go by
# the next lock that is taken, and not by the garbage collector: that comes at any moment, in any thread.
_HELD: dict[_Held, "ref[Lock]"] = {}


def _forget_in_child() -> None:
    # a child (a worker of a DataLoader, say) would hold on to its parent's locks after that was killed
    for held in _HELD:
        held.released = True
        held.close()
    _HELD.clear()


def _release_left() -> None:
    for held, holder in list(_HELD.items()):
        if holder() is None:
            _HELD.pop(held, None)
            with suppress(Exception):  # whose store is gone, say: it is no affair of who takes the next
                held.release()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def one_writer(run: Path, *stages: StageId) -> Iterator[None]:
    """A block in which this process alone writes `stages` of the run at `run`.

    Args:
        run: directory of the run, which is made if it is not there; and removed again where nothing came into it.
        stages: the stages; one that is named twice is locked once.

    Raises:
        RunError: another process writes one of them; the message says which.
    """
    with ExitStack() as locks:
        for stage in dict.fromkeys(stages):
            locks.callback(Lock(run, stage).release)
        yield


class Lock:
    """Taken when it is made.

    Args:
        run: directory of the run.
        stage: the stage.
        take_over: from this very process: the earlier lock is `lost` then. For what a notebook has begun and left.

    Raises:
        RunError: another process has it.
    """

    def __init__(self, run: Path, stage: StageId, *, take_over: bool = False) -> None:
        refuse_read_only(run)
        _release_left()
        self._held = _Held(run / names.LOCKS / f"{stage}.lock")
        self._path, self._stage = self._held.path, stage
        self.lost = False
        if take_over:
            for own in [holder() for held, holder in list(_HELD.items()) if held.path == self._path]:
                if own is not None:
                    own.release()
                    own.lost = True
        # first of all: whatever comes between, somebody knows of what is held
        _HELD[self._held] = ref(self)
        try:
            if is_remote(run) or not self._flock():
                self._lease()
        except BaseException:
            if self._holder().get("token") == self._held.token:
                self._held.release()  # interrupted when it was taken already
            self._held.close()
            _HELD.pop(self._held, None)
            raise

    def release(self) -> None:
        """Let it go; nothing stays behind. May be called again."""
        self._held.release()
        _HELD.pop(self._held, None)

    def _flock(self) -> bool:
        """Take it as a lock of the system; False: there are none here."""
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
            self._held.close()  # its holder has just removed it
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
        self._held.renewing = threading.Thread(target=self._held.renew, name="hydra-pipe lease", daemon=True)
        self._held.renewing.start()

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
