"""The background writer and the tables it writes."""

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.errors import StoreError
from hydra_pipe.store.zarr import table as table_module
from hydra_pipe.store.zarr.arrays import ROTTEN, Array, Group
from hydra_pipe.store.zarr.table import BackgroundWriter, Stalls, TableColumn, TableWriter

COLUMNS = [
    TableColumn("wide", "float32", (6, "feature"), chunk_rows=2, chunk_width=4),
    TableColumn("even", "float32", (6, "feature"), chunk_rows=2, chunk_width=3, shuffle=False),
    TableColumn("narrow", "int64"),
]


def write(path: Path, batches: list[int], shard_rows: int = 8) -> np.ndarray:
    group = Group.create(path)
    writer = BackgroundWriter()
    table = TableWriter(group, COLUMNS, "row", shard_rows, writer)
    values = np.arange(sum(batches) * 6, dtype=np.float32).reshape(-1, 6)
    done = 0
    for n in batches:
        for rows, views in table.reserve(n):
            views["even"][:] = views["wide"][:] = values[done + rows.start : done + rows.stop]
            views["narrow"][:] = np.arange(done + rows.start, done + rows.stop)
        done += n
        assert table.n_rows == done
    table.flush()
    writer.close()
    return values


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_what_is_reserved_in_any_batches_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, batches: list[int]
) -> None:
    path = tmp_path_factory.mktemp("table")
    values = write(path, batches)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["wide"][:], values)
    np.testing.assert_array_equal(group["even"][:], values)
    np.testing.assert_array_equal(group["narrow"][:], np.arange(len(values)))
    assert all(Array.open(path / column.name).missing_files() == 0 for column in COLUMNS)


def test_arrays_name_their_dimensions_and_open_in_plain_zarr(tmp_path: Path) -> None:
    write(tmp_path, [20])
    array = zarr.open_array(tmp_path / "wide", mode="r")
    assert array.metadata.dimension_names == ("row", "feature")
    assert (array.shards, array.chunks) == ((8, 8), (2, 4))


@pytest.mark.parametrize("name", ["wide", "even"])
@pytest.mark.parametrize(
    "rows", [slice(0, 19), slice(0, 8), slice(3, 9), slice(16, 19), slice(2, 18), slice(0, 16)]
)
@pytest.mark.parametrize("columns", [slice(0, 6), slice(0, 4), slice(4, 6), slice(1, 5)])
def test_reads_give_the_values_of_any_window(
    tmp_path: Path, name: str, rows: slice, columns: slice
) -> None:
    values = write(tmp_path, [19])
    np.testing.assert_array_equal(
        Array.open(tmp_path / name).read(rows, columns), values[rows, columns]
    )


@pytest.mark.parametrize("name", ["wide", "even"])
@pytest.mark.parametrize(
    "window", [(slice(0, 19), slice(0, 6)), (slice(0, 2), slice(0, 6)), (slice(0, 8), slice(0, 3))]
)
def test_reads_find_every_flipped_bit_of_what_they_read(
    tmp_path: Path, name: str, window: tuple[slice, slice]
) -> None:
    write(tmp_path, [19])
    truth = zarr.open_array(tmp_path / name, mode="r")[window]
    missed = []
    for file in sorted(f for f in (tmp_path / name / "c").rglob("*") if f.is_file()):
        healthy = file.read_bytes()
        for at in range(0, len(healthy), 29):
            damaged = bytearray(healthy)
            damaged[at] ^= 1 << (at % 8)
            file.write_bytes(damaged)
            try:
                read = Array.open(tmp_path / name).read(*window)
                if not np.array_equal(read, truth):
                    missed.append((str(file.relative_to(tmp_path)), at))
            except ROTTEN:
                pass
        file.write_bytes(healthy)
    assert missed == []


def test_a_chunk_of_values_like_none_is_still_written(tmp_path: Path) -> None:
    group = Group.create(tmp_path)
    writer = BackgroundWriter()
    table = TableWriter(
        group, [TableColumn("flag", "uint8"), TableColumn("x", "float32")], "row", 4, writer
    )
    for _, views in table.reserve(8):
        views["flag"][:] = 255
        views["x"][:] = np.nan
    table.flush()
    writer.close()
    assert Array.open(tmp_path / "flag").missing_files() == 0
    assert Array.open(tmp_path / "x").missing_files() == 0


@pytest.mark.parametrize("kept", [3, 8, 11, 16, 20])
@pytest.mark.parametrize("more", [0, 3, 9])
@pytest.mark.parametrize("synced", [0, 5])
def test_a_table_that_goes_on_is_one_that_never_stopped(
    tmp_path: Path, kept: int, more: int, synced: int
) -> None:
    values = write(tmp_path / "longer", [20])
    writer = BackgroundWriter()
    table = TableWriter(Group.open(tmp_path / "longer", ""), COLUMNS, "row", 4, writer, kept)
    assert table.n_rows == table.n_written == kept
    for at in range(kept, kept + more):
        row = np.arange(at * 6, at * 6 + 6)
        table.append({"wide": row, "even": row, "narrow": at})
        if at - kept < synced:
            table.sync()
            writer.drain()
            assert zarr.open_array(tmp_path / "longer" / "narrow", mode="r")[:].tolist() == [
                *range(at + 1)
            ]
    table.flush()
    writer.close()
    assert (write(tmp_path / "whole", [kept + more])[:kept] == values[:kept]).all()
    ours, others = (
        {f.relative_to(p): f for f in p.rglob("*")}
        for p in (tmp_path / "longer", tmp_path / "whole")
    )
    assert ours.keys() == others.keys()
    for name, file in ours.items():
        assert file.is_dir() or file.read_bytes() == others[name].read_bytes(), name


def test_missing_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [30])
    (tmp_path / "wide" / "c" / "1" / "0").unlink()
    assert Array.open(tmp_path / "wide").missing_files() == 1


def test_a_slow_disk_holds_the_training_back_instead_of_filling_memory(tmp_path: Path) -> None:
    writer = BackgroundWriter(depth=2)
    release = threading.Event()
    submitted = []

    def submit_all() -> None:
        for i in range(10):
            writer.submit(lambda: release.wait(10))
            submitted.append(i)

    thread = threading.Thread(target=submit_all)
    thread.start()
    time.sleep(0.3)
    waiting = len(submitted)
    release.set()
    thread.join()
    writer.close()
    assert waiting == 3  # one under way, two in the queue
    assert len(submitted) == 10


class Clock:
    """Lets the writer go on as soon as somebody begins to wait for it, and says that the wait took
    7 seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writer_may_go_on = threading.Event()
        self._readings = 0
        monkeypatch.setattr(table_module, "time", SimpleNamespace(perf_counter=self.read))

    def read(self) -> float:
        self.writer_may_go_on.set()
        self._readings += 1
        return 7.0 * self._readings

    def hold(self, writer: BackgroundWriter) -> None:
        """Returns once `writer` is at a job that lasts until somebody waits."""
        begun = threading.Event()

        def job() -> None:
            begun.set()
            self.writer_may_go_on.wait(10)

        writer.submit(job)
        assert begun.wait(10)


def test_waits_for_a_place_in_the_queue_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, clock = BackgroundWriter(depth=1), Clock(monkeypatch)
    clock.hold(writer)
    writer.submit(lambda: None)  # there is a place for it
    assert writer.stalls == Stalls(0, 0.0)
    writer.submit(lambda: None)
    assert writer.stalls == Stalls(1, 7.0)
    writer.close()


def test_waits_for_an_empty_buffer_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, clock = BackgroundWriter(depth=2), Clock(monkeypatch)
    table = TableWriter(Group.create(tmp_path), [TableColumn("narrow", "int64")], "row", 2, writer)
    clock.hold(writer)
    counts = []
    for first in range(0, 4, 2):
        for rows, views in table.reserve(2):
            views["narrow"][:] = np.arange(2)[rows] + first
        counts.append(writer.stalls.count)
    # the second shard fills the last buffer, with a place in the queue
    assert (counts, writer.stalls.seconds) == ([0, 1], 7.0)
    writer.close()
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "narrow", mode="r")[:], np.arange(4))


def test_a_failed_write_reaches_the_training_thread_and_nothing_hangs(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    table = TableWriter(Group.create(tmp_path), COLUMNS, "row", 2, writer)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer.submit(fail)

    def append_many() -> None:
        for _ in range(100):
            for _rows, views in table.reserve(2):
                views["wide"][:] = 0

    with pytest.raises(StoreError, match="No space left on device"):
        append_many()
    with pytest.raises(StoreError, match="No space left on device"):
        writer.close()


def test_nothing_is_written_before_it_is_there(tmp_path: Path) -> None:
    """As where a device copies into the buffers while the training goes on."""
    writer = BackgroundWriter()
    table = TableWriter(Group.create(tmp_path), [TableColumn("narrow", "int64")], "row", 4, writer)
    values = np.arange(10)
    for first in range(0, 10, 2):
        for rows, views in table.reserve(2):
            copy, arrived = views["narrow"], values[first : first + 2][rows]
            table.wait_for(
                lambda copy=copy, arrived=arrived: (time.sleep(0.01), np.copyto(copy, arrived))
            )
    table.flush()
    writer.close()
    np.testing.assert_array_equal(zarr.open_group(tmp_path, mode="r")["narrow"][:], values)


def test_a_state_of_a_table_waits_for_what_is_in_it_too(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    table = TableWriter(Group.create(tmp_path), [TableColumn("narrow", "int64")], "row", 4, writer)
    for _, views in table.reserve(3):
        table.wait_for(lambda copy=views["narrow"]: (time.sleep(0.01), np.copyto(copy, [5, 6, 7])))
    table.sync()
    writer.drain()
    np.testing.assert_array_equal(zarr.open_group(tmp_path, mode="r")["narrow"][:], [5, 6, 7])
    writer.close()


def test_a_table_without_rows_is_synced_and_goes_on(tmp_path: Path) -> None:
    """Of a process that has recorded nothing yet."""
    writer = BackgroundWriter()
    TableWriter(Group.create(tmp_path / "t"), COLUMNS, "row", 8, writer).sync()
    writer.drain()
    TableWriter(Group.open(tmp_path / "t", ""), COLUMNS, "row", 8, writer, n_rows=0)
    writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_writer_gives_way_to_the_training() -> None:
    seen: list[int] = []
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    writer = BackgroundWriter()
    writer.submit(lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    writer.close()
    assert seen == [max(before, 10)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
