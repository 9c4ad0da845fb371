"""`gradients.zarr`: rows of the training steps, per-step tables, test gradients, labels."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.plan.geometry import Geometry, store_geometry
from hydra_pipe.plan.layout import Layout
from hydra_pipe.store import names
from hydra_pipe.store.arrays import (
    create_array,
    create_group,
    damage_named,
    get_array,
    get_group,
    missing_chunks,
    open_group,
    read_checked,
    reopen_group,
)
from hydra_pipe.store.run import remove, sync, sync_tree
from hydra_pipe.store.table import BackgroundWriter, Column, Stalls, TableWriter

STEP_SHARD_ROWS = 4096
ROWS_UNREADABLE = "the recording is not readable: record the run again with --overwrite"
NO_GOING_ON = "load an earlier state, or record the run again"

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


@dataclass(frozen=True)
class Kept:
    """What is kept of a recording that is gone on with.

    Args:
        n_rows, n_steps: the first ones.
        tests: steps after which test gradients were taken.
        labels: arrays of labels.
    """

    n_rows: int
    n_steps: int
    tests: Sequence[int]
    labels: Sequence[str]


class GradientsWriter:
    """Creates `gradients.zarr`, or goes on with it, and streams rows into it.

    Args:
        path: of the store; what is there is replaced.
        layout: the block directory.
        dtype: of the rows: float16, int8 or float32.
        n_groups: parameter groups of the optimiser.
        run_id: kept in the attributes.
        preconditioned: whether rows and test gradients are times the root of the optimiser's preconditioner.
        kept: go on after these; what is past them is removed. The rest must be as it was, see `Gradients.check_kept`.
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
        kept: Kept | None = None,
    ) -> None:
        self._path = path
        if kept is None:
            self._root = create_group(path)
            self._root.attrs.update(
                {
                    names.KIND: "gradients",
                    names.RUN_ID: run_id,
                    names.LAYOUT: layout.to_json(),
                    names.PRECONDITIONED: preconditioned,
                }
            )
            steps = self._root.create_group(names.STEPS)
        else:
            self._root = reopen_group(path)
            steps = self._root.require_group(names.STEPS)
        self.layout = layout
        self.dtype = dtype
        self._writer = BackgroundWriter()
        geometry = store_geometry(layout.n_features, np.dtype(dtype).itemsize)
        self.rows = TableWriter(
            self._root,
            [
                *_gradient_columns(layout, dtype, geometry),
                Column(names.SAMPLE, "int64"),
                Column(names.STEP, "int64"),
                Column(names.CURVATURE, "float32"),
            ],
            names.ROW_DIM,
            geometry.shard_rows,
            self._writer,
            kept.n_rows if kept else None,
        )
        per_group = [Column(name, dtype, (n_groups, names.GROUP_DIM)) for name, dtype in GROUP_COLUMNS.items()]
        per_block = [Column(name, dtype, (len(layout.blocks), names.BLOCK_DIM)) for name, dtype in BLOCK_COLUMNS.items()]
        per_step = [
            Column(names.FIRST_ROW, "int64"),
            Column(names.N_ROWS, "int64"),
            Column(names.GRADIENT_SCALE, "float64"),
            Column(names.LOSS, "float64"),
            Column(names.IMBALANCE, "float32"),
        ]
        self.steps = TableWriter(
            steps,
            [*per_group, *per_block, *per_step],
            names.STEP_DIM,
            STEP_SHARD_ROWS,
            self._writer,
            kept.n_steps if kept else None,
        )
        if kept:
            _remove_past(path, kept)

    def test_rows(self, step: int) -> TableWriter:
        """Where the test gradients taken after `step` steps go: gradient, scale and loss of each test sample."""
        dtype = "float32" if self.dtype == "float32" else "float16"
        geometry = store_geometry(self.layout.n_features, np.dtype(dtype).itemsize)
        group = self._root.require_group(names.TEST).create_group(names.checkpoint_name(step), overwrite=True)
        group.attrs.update({names.STEP: step})
        columns = [*_gradient_columns(self.layout, dtype, geometry), Column(names.LOSS, "float32")]
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

    @property
    def stalls(self) -> Stalls:
        """How often and how long the training has waited for the disk."""
        return self._writer.stalls

    def sync(self) -> None:
        """Put everything on the disk that was written so far, and return when it is safe there. Raises: StoreError: as `close`."""
        self.rows.sync()
        self.steps.sync()
        self._writer.drain()
        try:
            for part in (names.TEST, names.LABELS):
                sync_tree(self._path / part)
            for group in (self._path / names.STEPS, self._path):
                sync(group / "zarr.json")
                sync(group)
            sync(self._path.parent)
            sync(self._path.parent.parent)
        except OSError as error:
            raise StoreError(f"writing failed ({error}): make room or mend the disk, then record again") from error

    def close(self) -> None:
        """Write what is still in the buffers. Raises: StoreError: writing failed."""
        try:
            self.rows.flush()
            self.steps.flush()
        finally:
            self._writer.close()

    def flush_test(self, table: TableWriter) -> None:
        """Write the end of a table of test gradients and wait for it."""
        table.flush()
        self._writer.drain()


def _remove_past(path: Path, kept: Kept) -> None:
    """Remove test gradients and labels that are not kept."""
    for part, wanted in ((names.TEST, set(map(names.checkpoint_name, kept.tests))), (names.LABELS, set(kept.labels))):
        found = [entry for entry in (path / part).glob("*") if entry.is_dir() and entry.name not in wanted]
        for entry in found if wanted else [path / part]:
            remove(entry)


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


@dataclass(frozen=True)
class Rows:
    """Stored rows of one kind: training rows, or the test gradients of one checkpoint. Reads nothing before it is asked.

    Args:
        gradient: array (row, feature) as stored.
        gradient_fast: the same, see `read_checked`.
        scale: array (row, block), float32.
    """

    gradient: zarr.Array[Any]
    gradient_fast: zarr.Array[Any]
    scale: zarr.Array[Any]

    @property
    def n_rows(self) -> int:
        return int(self.gradient.shape[0])

    @property
    def shard_rows(self) -> int:
        return int((self.gradient.shards or self.gradient.chunks)[0])

    @property
    def chunk_rows(self) -> int:
        return int(self.gradient.chunks[0])

    @property
    def chunk_features(self) -> int:
        return int(self.gradient.chunks[1])

    def features(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Stored values of some rows and columns, in the stored dtype. Raises: StoreError: damaged."""
        with damage_named(self.gradient.store_path, ROWS_UNREADABLE):
            return read_checked(self.gradient_fast, self.gradient, rows, columns)

    def scales(self, rows: slice) -> NDArray[np.float32]:
        """Scales of some rows, shape (row, block). Raises: StoreError: damaged."""
        with damage_named(self.scale.store_path, ROWS_UNREADABLE):
            return np.asarray(self.scale[rows])


class Gradients:
    """`gradients.zarr`, opened for reading.

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
        self.rows = self._rows(self._root)
        if len(self.rows.gradient.shape) != 2 or self.rows.gradient.shape[1] != self.layout.n_features:
            raise StoreError(f"{path}/gradient has shape {self.rows.gradient.shape}, not (row, {self.layout.n_features})")

    @property
    def run_id(self) -> str:
        """Of the run that wrote it."""
        return str(self._root.attrs.get(names.RUN_ID))

    @property
    def n_groups(self) -> int:
        """Parameter groups of the optimiser."""
        return int(get_array(self._root, f"{names.STEPS}/{next(iter(GROUP_COLUMNS))}").shape[1])

    def check_kept(self, kept: Kept) -> None:
        """Refuse to go on where something of `kept` is not there. Raises: StoreError."""
        for name, count in self.expected_rows(kept.n_rows, kept.n_steps, 0).items():
            array = get_array(self._root, name)
            if array.shape[0] < count:
                raise StoreError(f"{self.path}/{name} has {array.shape[0]} rows, the state counts {count}: {NO_GOING_ON}")
            if n := missing_chunks(array):
                raise StoreError(f"{self.path}/{name} lacks {n} chunk files: {NO_GOING_ON}")
        if lost := set(kept.tests) - set(self.test_steps()):
            raise StoreError(f"{self.path} lacks the test gradients of step {min(lost)}, which the state counts: {NO_GOING_ON}")

    def _rows(self, group: zarr.Group) -> Rows:
        gradient = get_array(group, names.GRADIENT)
        return Rows(gradient, get_array(group, names.GRADIENT, fast=True), get_array(group, names.SCALE))

    def samples(self, rows: slice) -> NDArray[np.int64]:
        """Training sample of each of some rows. Raises: StoreError: damaged."""
        return self._column(names.SAMPLE, rows)

    def step_of_rows(self, rows: slice) -> NDArray[np.int64]:
        """Step of each of some rows. Raises: StoreError: damaged."""
        return self._column(names.STEP, rows)

    def curvature(self, rows: slice) -> NDArray[np.float32]:
        """Curvature weight of each of some rows, not a number where it is not known. Raises: StoreError: damaged."""
        return self._column(names.CURVATURE, rows)

    def step_table(self, name: str) -> NDArray[Any]:
        """One per-step table, whole: (step,), (step, group) or (step, block). Raises: StoreError: damaged."""
        return self._column(f"{names.STEPS}/{name}", slice(None))

    def _column(self, name: str, rows: slice) -> NDArray[Any]:
        array = self._columns.get(name)
        if array is None:
            array = self._columns[name] = get_array(self._root, name)
        with damage_named(array.store_path, ROWS_UNREADABLE):
            return np.asarray(array[rows])

    @property
    def n_steps(self) -> int:
        return int(get_array(self._root, f"{names.STEPS}/{names.FIRST_ROW}").shape[0])

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
        return self._rows(self._test_group(step))

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

    def expected_rows(self, n_rows: int, n_steps: int, n_tests: int) -> dict[str, int]:
        """Every array that a finished recording must have, and its length."""
        tables = (names.FIRST_ROW, names.N_ROWS, names.GRADIENT_SCALE, names.LOSS, names.IMBALANCE, *GROUP_COLUMNS, *BLOCK_COLUMNS)
        expected = dict.fromkeys((names.GRADIENT, names.SCALE, names.SAMPLE, names.STEP, names.CURVATURE), n_rows)
        expected |= {f"{names.STEPS}/{name}": n_steps for name in tables}
        if n_tests:
            checkpoint = f"{names.TEST}/{names.checkpoint_name(n_steps)}"
            expected |= {f"{checkpoint}/{name}": n_tests for name in (names.GRADIENT, names.SCALE, names.LOSS)}
        return expected

    def missing(self) -> list[str]:
        """Arrays of which chunks are not there."""
        return [f"{name} lacks {n} chunk files" for name, array in self.arrays() if (n := missing_chunks(array)) > 0]
