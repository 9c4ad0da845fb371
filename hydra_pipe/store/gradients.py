"""`gradients.zarr`: rows of the training steps, per-step tables, test gradients, labels."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from hydra_pipe.errors import StoreError
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.plan.geometry import Geometry, store_geometry
from hydra_pipe.plan.layout import Layout
from hydra_pipe.plan.parts import ends_of
from hydra_pipe.store import names
from hydra_pipe.store.arrays import (
    create_array,
    create_group,
    damage_named,
    get_array,
    get_group,
    missing_chunks,
    open_group,
)
from hydra_pipe.store.rows import ROWS_UNREADABLE, Rows, joined, read_array
from hydra_pipe.store.table import BackgroundWriter, Column, TableWriter

STEP_SHARD_ROWS = 4096

# per-step, per-parameter-group tables: array name -> dtype. Names are those of `Schedule`.
GROUP_COLUMNS = {
    "learning_rate": "float64",
    "momentum": "float64",
    "dampening": "float64",
    "weight_decay": "float64",
    "decoupled_decay": "float64",
    "nesterov": "uint8",
}
# per-step, per-block tables
BLOCK_COLUMNS = {"updated": "uint8", "momentum_started": "uint8", "step_factor": "float64"}
# per-step tables
STEP_COLUMNS = {names.GRADIENT_SCALE: "float64", names.LOSS: "float64", names.IMBALANCE: "float32"}
# per-step tables of each process: which of its rows are the step's
_OF_ROWS = {names.FIRST_ROW: "int64", names.N_ROWS: "int64"}


class GradientsWriter:
    """Creates `gradients.zarr` and streams rows into it.

    Args:
        path: of the store; what is there is replaced.
        layout: the block directory.
        dtype: of the rows: float16, int8 or float32.
        n_groups: parameter groups of the optimiser.
        run_id: kept in the attributes.
        preconditioned: whether rows and test gradients are times the root of the optimiser's preconditioner.
        rank, n_ranks: this process and how many record together. Rank 0 makes the store, and the others open it after that.

    Raises:
        StoreError: there is no store of this run at `path` for a further rank to open.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        dtype: str,
        n_groups: int,
        run_id: str,
        *,
        preconditioned: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        if rank == 0:
            self._root = create_group(path)
            self._root.attrs.update(
                {
                    names.KIND: "gradients",
                    names.RUN_ID: run_id,
                    names.LAYOUT: layout.to_json(),
                    names.PRECONDITIONED: preconditioned,
                }
            )
        else:
            self._root = _open_shared(path, run_id)
        self._layout = layout
        self.dtype = dtype
        self._writer = BackgroundWriter()
        geometry = store_geometry(layout.n_features, np.dtype(dtype).itemsize)
        part = self._root if n_ranks == 1 else self._part(rank, n_ranks)
        self.rows = TableWriter(
            part,
            [*_gradient_columns(layout, dtype, geometry), Column(names.SAMPLE, "int64"), Column(names.STEP, "int64")],
            names.ROW_DIM,
            geometry.shard_rows,
            self._writer,
        )
        per_group = [Column(name, dtype, (n_groups, names.GROUP_DIM)) for name, dtype in GROUP_COLUMNS.items()]
        per_block = [Column(name, dtype, (len(layout.blocks), names.BLOCK_DIM)) for name, dtype in BLOCK_COLUMNS.items()]
        own = [Column(name, dtype) for name, dtype in _OF_ROWS.items()]
        shared = [*per_group, *per_block, *(Column(name, dtype) for name, dtype in STEP_COLUMNS.items())]
        tables = [(part, [*own, *shared])]
        if n_ranks > 1:  # what all ranks have in common is written once
            tables = [(part, own), (self._root, shared)] if rank == 0 else [(part, own)]
        self._steps = [
            TableWriter(group.create_group(names.STEPS), columns, names.STEP_DIM, STEP_SHARD_ROWS, self._writer)
            for group, columns in tables
        ]

    def _part(self, rank: int, n_ranks: int) -> zarr.Group:
        if rank == 0:
            self._root.attrs.update({names.N_RANKS: n_ranks})
            for number in range(n_ranks):
                self._root.create_group(names.rank_name(number))
        return cast("zarr.Group", self._root[names.rank_name(rank)])

    def append_step(self, values: dict[str, Any]) -> None:
        """Add a line to the step tables, of which this process keeps its own. `values` has one for each column."""
        for table in self._steps:
            table.append({name: values[name] for name in table.names})

    @property
    def n_steps_written(self) -> int:
        """Steps whose lines are on disk."""
        return self._steps[-1].n_written

    def test_rows(self, step: int) -> TableWriter:
        """Where the test gradients taken after `step` steps go: gradient, scale and loss of each test sample."""
        dtype = "float32" if self.dtype == "float32" else "float16"
        geometry = store_geometry(self._layout.n_features, np.dtype(dtype).itemsize)
        group = self._root.require_group(names.TEST).create_group(names.checkpoint_name(step), overwrite=True)
        group.attrs.update({names.STEP: step})
        columns = [*_gradient_columns(self._layout, dtype, geometry), Column(names.LOSS, "float32")]
        return TableWriter(group, columns, names.TEST_DIM, geometry.shard_rows, self._writer)

    def write_labels(self, which: str, labels: Sequence[int] | Sequence[str] | NDArray[Any]) -> None:
        """Keep one label for each sample (`names.TRAIN_LABELS`) or test sample (`names.TEST_LABELS`).

        Integers are kept as they are; strings as codes, with their names in the attributes.
        """
        group = self._root.require_group(names.LABELS)
        values = np.asarray(labels)
        dimension = names.SAMPLE_DIM if which == names.TRAIN_LABELS else names.TEST_DIM
        label_names: list[str] | None = None
        if values.dtype.kind not in "iu":
            unique, values = np.unique(values.astype(str), return_inverse=True)
            label_names = unique.tolist()
        array = create_array(group, which, values.shape, "int64", (dimension,), (max(1, len(values)),))
        array[:] = values.astype(np.int64)
        if label_names is not None:
            array.attrs.update({names.LABEL_NAMES: label_names})

    def close(self) -> None:
        """Write what is still in the buffers. Raises: StoreError: writing failed."""
        try:
            self.rows.flush()
            for table in self._steps:
                table.flush()
        finally:
            self._writer.close()

    def flush_test(self, table: TableWriter) -> None:
        """Write the end of a table of test gradients and wait for it."""
        table.flush()
        self._writer.drain()


def _open_shared(path: Path, run_id: str) -> zarr.Group:
    try:
        root = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3)
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        root = None
    if root is None or root.attrs.get(names.RUN_ID) != run_id:
        raise StoreError(
            f"{path} is not the store that rank 0 has made: give every rank the same run directory, on a file system that all share"
        )
    return root


def _gradient_columns(layout: Layout, dtype: str, geometry: Geometry) -> list[Column]:
    return [
        Column(
            names.GRADIENT,
            dtype,
            (layout.n_features, names.FEATURE_DIM),
            geometry.chunk_rows,
            geometry.chunk_features,
            shuffle=False,  # they have zeros to find and no order in their bytes (benchmarks/RESULTS.md)
        ),
        Column(names.SCALE, "float32", (len(layout.blocks), names.BLOCK_DIM)),
    ]


class Gradients:
    """`gradients.zarr`, opened for reading. What several processes recorded is one run: the rows of rank 0 first, then those of 1.

    Args:
        path: of the store.

    Raises:
        StoreError: it is missing, damaged, or not what this project writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = open_group(path, ROWS_UNREADABLE)
        if self._root.attrs.get(names.KIND) != "gradients":
            raise StoreError(f"{path} is a Zarr store, but not one that hydra-pipe wrote")
        layout = self._root.attrs.get(names.LAYOUT)
        if not isinstance(layout, dict):
            raise StoreError(f"{path} has no block directory: {ROWS_UNREADABLE}")
        self.layout = Layout.from_json(layout)
        self._columns: dict[str, zarr.Array[Any]] = {}
        self._parts = self._groups_of_parts()
        self.rows = Rows(self._parts)
        if self.rows.widths != {self.layout.n_features}:
            raise StoreError(
                f"rows of {path} have {sorted(self.rows.widths)} features, not {self.layout.n_features}: {ROWS_UNREADABLE}"
            )

    def _groups_of_parts(self) -> list[zarr.Group]:
        n_ranks = self._root.attrs.get(names.N_RANKS)
        if n_ranks is None:
            return [self._root]
        groups = [get_group(self._root, names.rank_name(rank)) for rank in range(n_ranks)] if isinstance(n_ranks, int) else []
        found = [group for group in groups if group is not None]
        if not found or len(found) != n_ranks:
            raise StoreError(f"{self.path} has the rows of {len(found)} processes, {n_ranks} recorded: {ROWS_UNREADABLE}")
        return found

    @property
    def n_ranks(self) -> int:
        """Processes that recorded together."""
        return len(self._parts)

    def samples(self, rows: slice) -> NDArray[np.int64]:
        """Training sample of each of some rows. Raises: StoreError: damaged."""
        return self._row_column(names.SAMPLE, rows)

    def step_of_rows(self, rows: slice) -> NDArray[np.int64]:
        """Step of each of some rows. Raises: StoreError: damaged."""
        return self._row_column(names.STEP, rows)

    def step_table(self, name: str) -> NDArray[Any]:
        """One per-step table, whole: (step,), (step, group) or (step, block). Raises: StoreError: damaged."""
        return read_array(self._array(f"{names.STEPS}/{name}"), slice(None))

    def rows_of_steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First row and number of rows of each step in each process's part, both (step, rank). Raises: StoreError: damaged."""
        starts = [0, *ends_of(self.rows.part_rows)][:-1]
        first, counts = (
            np.stack([read_array(self._array(f"{names.STEPS}/{name}", part), slice(None)) for part in range(self.n_ranks)], axis=1)
            for name in _OF_ROWS
        )
        return first + np.array(starts), counts

    def _row_column(self, name: str, rows: slice) -> NDArray[Any]:
        return joined(lambda part, own: read_array(self._array(name, part), own), rows, self.rows.part_rows)

    def _array(self, name: str, part: int | None = None) -> zarr.Array[Any]:
        """Array `name` of the store, or of one part of it, opened once."""
        group = self._root if part is None else self._parts[part]
        key = f"{group.path}/{name}"
        array = self._columns.get(key)
        if array is None:
            array = self._columns[key] = get_array(group, name)
        return array

    @property
    def n_steps(self) -> int:
        return int(self._array(f"{names.STEPS}/{names.LOSS}").shape[0])

    def schedules(self) -> tuple[Schedule, NDArray[np.int64]]:
        """The optimiser's settings, one series for each distinct history.

        Returns:
            The schedule, shape (step, series), and the series of each block, shape (block,).

        Raises:
            StoreError: damaged. ScheduleError: values that no optimiser has.
        """
        tables = {name: self.step_table(name) for name in BLOCK_COLUMNS}
        series: dict[tuple[object, ...], int] = {}
        of_block: list[int] = []
        first_block: list[int] = []
        for index, block in enumerate(self.layout.blocks):
            history = tuple(hashlib.sha256(table[:, index].tobytes()).digest() for table in tables.values())
            number = series.setdefault((block.group, *history), len(series))
            if number == len(first_block):
                first_block.append(index)
            of_block.append(number)
        groups = [self.layout.blocks[index].group for index in first_block]
        settings = {name: self.step_table(name)[:, groups] for name in GROUP_COLUMNS}
        settings["nesterov"] = settings["nesterov"].astype(bool)
        settings["learning_rate"] = settings["learning_rate"] * tables["step_factor"][:, first_block]
        flags = {name: tables[name][:, first_block].astype(bool) for name in ("updated", "momentum_started")}
        return Schedule(**settings, **flags), np.array(of_block)

    @property
    def preconditioned(self) -> bool:
        """Whether rows and test gradients are times the root of the optimiser's preconditioner."""
        return bool(self._root.attrs.get(names.PRECONDITIONED, False))

    def test_steps(self) -> list[int]:
        """Steps at which test gradients were taken, in order."""
        group = get_group(self._root, names.TEST)
        return sorted(int(name) for name in group.group_keys()) if group is not None else []

    def test_rows(self, step: int) -> Rows:
        """Test gradients taken after `step` steps. Raises: StoreError: there are none."""
        return Rows([self._test_group(step)])

    def test_losses(self, step: int) -> NDArray[np.float32]:
        """Loss of each test sample after `step` steps."""
        return np.asarray(get_array(self._test_group(step), names.LOSS)[:])

    def _test_group(self, step: int) -> zarr.Group:
        group = get_group(self._root, f"{names.TEST}/{names.checkpoint_name(step)}")
        if group is None:
            raise StoreError(f"{self.path} has no test gradients of step {step}: it has those of {self.test_steps()}")
        return group

    def labels(self, which: str) -> NDArray[Any] | None:
        """Labels of the samples or test samples: int64, or str where they were named; None where unknown."""
        group = get_group(self._root, names.LABELS)
        if group is None or which not in group:
            return None
        array = get_array(group, which)
        with damage_named(array.store_path, "labels are not readable"):
            codes = np.asarray(array[:])
        label_names = array.attrs.get(names.LABEL_NAMES)
        return codes if label_names is None else np.asarray(label_names)[codes]

    def arrays(self) -> Iterator[tuple[str, zarr.Array[Any]]]:
        """Every array of the store with its name, for those who check or measure all of it."""
        with damage_named(self.path, ROWS_UNREADABLE):
            members = sorted(name for name, found in self._root.members(max_depth=None) if isinstance(found, zarr.Array))
        for name in members:
            yield name, get_array(self._root, name)

    def expected_rows(self, part_rows: Sequence[int], n_steps: int, n_tests: int) -> dict[str, int]:
        """Every array that a finished recording must have, and its length."""
        expected: dict[str, int] = {}
        for rank, n_rows in enumerate(part_rows):
            part = "" if len(part_rows) == 1 else f"{names.rank_name(rank)}/"
            expected |= {f"{part}{name}": n_rows for name in (names.GRADIENT, names.SCALE, names.SAMPLE, names.STEP)}
            expected |= {f"{part}{names.STEPS}/{name}": n_steps for name in _OF_ROWS}
        expected |= {f"{names.STEPS}/{name}": n_steps for name in (*STEP_COLUMNS, *GROUP_COLUMNS, *BLOCK_COLUMNS)}
        if n_tests:
            checkpoint = f"{names.TEST}/{names.checkpoint_name(n_steps)}"
            expected |= {f"{checkpoint}/{name}": n_tests for name in (names.GRADIENT, names.SCALE, names.LOSS)}
        return expected

    def missing(self) -> list[str]:
        """Arrays of which chunks are not there."""
        return [f"{name} lacks {n} chunk files" for name, array in self.arrays() if (n := missing_chunks(array)) > 0]
