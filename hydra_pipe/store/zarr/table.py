"""Rows appended to several arrays at once, a whole shard at a time, by a background thread."""

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.store.zarr.appender import Appender
from hydra_pipe.store.zarr.arrays import Array, Group, damage_named

Buffers = dict[str, NDArray[Any]]
Allocate = Callable[[tuple[int, ...], str], NDArray[Any]]
# Niceness of the writing thread.
_NICENESS = 10


@dataclass
class Stalls:
    """The training's waits for the writer, and so for the disk.

    Args:
        count: number of waits so far.
        seconds: duration of all waits.
    """

    count: int = 0
    seconds: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as one wait. Enter it only when there is something to wait for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count += 1
            self.seconds += time.perf_counter() - start


def writing_failed(error: BaseException) -> StoreError:
    """Return the error that a recording raises for a full or faulty disk."""
    what = str(error).strip().split("\n")[-1]
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return StoreError(f"writing failed ({what}): make room or mend the disk, then record again")


def _give_way() -> None:
    """Let the training's threads run before this one, where threads have priorities of their own.

    The training waits for the writer only if the writer falls far behind.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a container may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class BackgroundWriter:
    """Queue of jobs that run in order, in a thread of its own.

    At most `depth` jobs wait. Then `submit` waits too, which is the back-pressure. The thread
    ends when no job is left, and the next job starts another. So a recording that is left in
    the middle, by an interrupted loop or without `close`, leaves no thread behind. All jobs must
    come from the same thread. `stalls` counts its waits.

    Raises:
        StoreError: a job has failed. `submit`, `drain` and `close` raise it.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        # The last thread that was started, and whether it will look for jobs once more.
        self._thread: threading.Thread | None = None
        self._looks = False
        # Only one thread does jobs at a time. An interrupted start may leave two threads.
        self._turn = threading.Lock()
        self._failure: BaseException | None = None
        self.stalls = Stalls()

    def submit(self, job: Callable[[], None]) -> None:
        self.check()
        with self._changed:
            if not self._has_place():
                with self.stalls.waiting():
                    self._changed.wait_for(self._has_place)
            if not self._looks:
                self._thread = threading.Thread(
                    target=self._run, name="hydra-pipe writer", daemon=True
                )
                self._thread.start()
                self._looks = True
            # Only after the start, which may be interrupted: every job in the queue needs a thread.
            self._jobs.append(job)

    def _has_place(self) -> bool:
        return len(self._jobs) < self._depth

    def drain(self) -> None:
        """Wait until every submitted job is done, and the thread has ended."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def close(self) -> None:
        """Finish all jobs, and end the thread."""
        self.drain()

    def _run(self) -> None:
        _give_way()
        with self._turn:
            while (job := self._next()) is not None:
                try:
                    # After a failure later jobs are dropped: rows past a hole would be unreadable.
                    if self._failure is None:
                        job()
                except BaseException as error:  # noqa: BLE001 - the training thread gets it
                    self._failure = error

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            if not self._jobs:
                self._looks = False
                return None
            job = self._jobs.popleft()
            self._changed.notify_all()
            return job

    def check(self) -> None:
        """Check that no job has failed. Raises: StoreError: one has."""
        if self._failure is not None:
            raise writing_failed(self._failure) from self._failure


@dataclass(frozen=True)
class TableColumn:
    """One array of a table.

    Args:
        name: name of the array.
        dtype: dtype of the elements.
        width: size and name of the second dimension. None: one value a row.
        chunk_rows: number of rows of a chunk in the shard. None: the shard is one chunk.
        chunk_width: number of columns of a chunk. None: all.
        shuffle: the same setting of `Array.create`.
    """

    name: str
    dtype: str
    width: tuple[int, str] | None = None
    chunk_rows: int | None = None
    chunk_width: int | None = None
    shuffle: bool = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width[0])


class TableWriter:
    """Writer that appends rows to arrays with a common first dimension.

    Args:
        group: group of the arrays.
        columns: the arrays.
        dimension: name of the first dimension.
        shard_rows: number of rows in a file, which `writer` writes in one piece.
        writer: the background thread.
        n_rows: number of rows of existing arrays to resume after. Later rows are dropped.
            None: the arrays are new.
        allocate: function that makes a buffer of zeros, of a shape and dtype.

    Raises:
        StoreError: the last of the `n_rows` rows cannot be read.
    """

    def __init__(
        self,
        group: Group,
        columns: Sequence[TableColumn],
        dimension: str,
        shard_rows: int,
        writer: BackgroundWriter,
        n_rows: int | None = None,
        allocate: Allocate = np.zeros,
    ) -> None:
        arrays = {
            c.name: _create(group, c, dimension, shard_rows)
            if n_rows is None
            else group.array(c.name)
            for c in columns
        }
        self._arrays = {name: Appender(array) for name, array in arrays.items()}
        self._dtypes = {c.name: c.dtype for c in columns}
        # Existing arrays keep the shards that they have.
        self._shard_rows = shard_rows = self._arrays[columns[0].name].file_rows
        self._writer = writer
        # Buffers are reused: one is filled while the others wait or are written. So memory stays
        # the same however long the run.
        self._free: queue.Queue[Buffers] = queue.Queue()
        for _ in range(2):
            self._free.put({c.name: _buffer(c, shard_rows, allocate) for c in columns})
        self._current = self._free.get()
        self._filled = 0
        self._flushed = 0
        self.n_written = 0
        self._awaited: list[Callable[[], None]] = []
        if n_rows is not None:
            self._go_on(arrays, n_rows)

    def _go_on(self, arrays: dict[str, Array], n_rows: int) -> None:
        self._filled = n_rows % self._shard_rows
        self._flushed = n_rows - self._filled
        self.n_written = n_rows
        if self._filled:
            for name, array in arrays.items():
                with damage_named(array.path, "the recording cannot go on: record the run again"):
                    self._current[name][: self._filled] = array.read(slice(self._flushed, n_rows))
        for appender in self._arrays.values():
            appender.truncate(n_rows)

    @property
    def n_rows(self) -> int:
        """Number of rows appended so far, written or not."""
        return self._flushed + self._filled

    @property
    def names(self) -> Iterable[str]:
        """Names of the columns."""
        return self._dtypes

    def dtype_of(self, name: str) -> str:
        """Return the dtype of column `name`."""
        return self._dtypes[name]

    def reserve(self, n: int) -> Iterator[tuple[slice, Buffers]]:
        """Reserve space for the next `n` rows, in one piece or more where a shard ends between.

        Yields:
            Positions among the `n` rows, and views of the buffers to fill for them.
        """
        done = 0
        while done < n:
            take = min(n - done, self._shard_rows - self._filled)
            rows = slice(self._filled, self._filled + take)
            yield (
                slice(done, done + take),
                {name: buffer[rows] for name, buffer in self._current.items()},
            )
            done += take
            self._filled += take
            if self._filled == self._shard_rows:
                self.flush()

    def wait_for(self, ready: Callable[[], None]) -> None:
        """Make the writer call `ready` before it writes what is in the buffer now.

        Args:
            ready: function that waits until all data are in the buffer.
        """
        self._awaited.append(ready)

    def append(self, rows: dict[str, Any]) -> None:
        """Append one row, with a value for every column."""
        for _, views in self.reserve(1):
            for name, value in rows.items():
                views[name][0] = value

    def flush(self) -> None:
        """Hand the filled rows to the writer.

        Before the end only whole shards may be flushed, which `reserve` does itself.
        """
        if self._filled == 0:
            return
        buffers, count, first = self._current, self._filled, self._flushed
        self._flushed += count
        self._filled = 0

        awaited, self._awaited = self._awaited, []

        def job() -> None:
            for ready in awaited:
                ready()
            self._write(first, count, buffers)
            self._free.put(buffers)

        self._writer.submit(job)
        self._current = self._next_buffers()

    def sync(self) -> None:
        """Let the writer put all appended rows on the disk, safe. Drain the writer before going on.

        Rows of an unfinished shard stay in the buffer too. The shard is written again when it is
        full.
        """
        buffers, count, first, awaited = (
            self._current,
            self._filled,
            self._flushed,
            list(self._awaited),
        )

        def job() -> None:
            for ready in awaited:
                ready()
            if count:
                self._write(first, count, buffers)
            for array in self._arrays.values():
                array.sync()

        self._writer.submit(job)

    def _write(self, first: int, count: int, buffers: Buffers) -> None:
        for name, array in self._arrays.items():
            array.write(first, buffers[name][:count])
        self.n_written = first + count

    def _next_buffers(self) -> Buffers:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            with self._writer.stalls.waiting():
                return self._wait_for_buffers()

    def _wait_for_buffers(self) -> Buffers:
        while True:
            try:
                return self._free.get(timeout=1.0)
            except queue.Empty:
                self._writer.check()  # a writer that has failed never returns a buffer


def _create(group: Group, column: TableColumn, dimension: str, shard_rows: int) -> Array:
    chunk_rows = column.chunk_rows or shard_rows
    if column.width is None:
        chunks: tuple[int, ...] = (chunk_rows,)
        shape: tuple[int, ...] = (0,)
        dimensions: tuple[str, ...] = (dimension,)
        shards: tuple[int, ...] = (shard_rows,)
    else:
        width, name = column.width
        chunk_width = column.chunk_width or width
        chunks = (chunk_rows, chunk_width)
        shape, dimensions = (0, width), (dimension, name)
        shards = (shard_rows, -(-width // chunk_width) * chunk_width)
    return Array.create(
        group.path / column.name,
        shape,
        column.dtype,
        dimensions,
        chunks,
        shards if shards != chunks else None,
        shuffle=column.shuffle,
    )


def _buffer(column: TableColumn, shard_rows: int, allocate: Allocate) -> NDArray[Any]:
    shape = (shard_rows,) if column.width is None else (shard_rows, column.width[0])
    return allocate(shape, column.dtype)
