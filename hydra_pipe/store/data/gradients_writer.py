"""`gradients.zarr`, for writing: a recording begins or resumes, and its rows stream in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.chunking import Geometry, store_geometry
from hydra_pipe.plan.layout import Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import DynamicsShape
from hydra_pipe.store.data.gradients import (
    BLOCK_COLUMNS,
    DYNAMICS_COLUMNS,
    GROUP_COLUMNS,
    PACE_COLUMNS,
    ROW_COLUMNS,
    ROWS_OF_STEP,
    STEP_COLUMNS,
    ResumePoint,
)
from hydra_pipe.store.data.keys import put_keys
from hydra_pipe.store.data.preconditioner import Preconditioner, write_preconditioner
from hydra_pipe.store.data.rows import ROWS_UNREADABLE
from hydra_pipe.store.files import PARTIAL, move, remove, sync, sync_tree
from hydra_pipe.store.zarr.arrays import METADATA, Array, Group
from hydra_pipe.store.zarr.table import (
    Allocate,
    BackgroundWriter,
    Stalls,
    TableColumn,
    TableWriter,
    writing_failed,
)

STEP_SHARD_ROWS = 4096
# Metadata of a store: some thirty files, and the block directory.
_METADATA_BYTES = 2**20


class GradientsWriter:
    """Writer of a new or resumed `gradients.zarr`.

    Args:
        path: path of the store. An existing store is replaced.
        layout: block directory.
        dtype: dtype of the rows: float16, int8 or float32.
        n_groups: number of parameter groups of the optimiser.
        run_id: id of the run, for the attributes.
        dynamics: sizes of the dynamics of a row. Default: no logits and no inputs.
        preconditioned: True if the optimiser has a preconditioner, whose root is beside the test
            gradients.
        paced: True if the momentum differs by step and block, which further tables then tell.
        rank, n_ranks: number of this process, and number of processes that record together.
            Rank 0 makes the store. The others open it after that.
        kept: rows, steps, test gradients and labels to resume after. Everything later is
            removed. All other data must be as they were (`Gradients.check_kept`).
        allocate: function that makes a buffer of zeros for rows, of a shape and dtype.

    Raises:
        StoreError: a further rank finds no store of this run at `path`.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        dtype: str,
        n_groups: int,
        run_id: str,
        *,
        dynamics: DynamicsShape = DynamicsShape(),  # noqa: B008 - a value
        preconditioned: bool = False,
        paced: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
        kept: ResumePoint | None = None,
        allocate: Allocate = np.zeros,
    ) -> None:
        self.layout, self.dtype, self._n_groups = layout, dtype, n_groups
        self.dynamics = dynamics
        if rank == 0 and kept is None:
            attributes = {
                names.RUN_ID: run_id,
                names.LAYOUT: layout.to_json(),
                names.PRECONDITIONED: preconditioned,
                names.DYNAMICS: dynamics.to_json(),
            } | ({names.PACED: True} if paced else {})
            self._root = _create(path, attributes, n_ranks)
        else:
            self._root = _open_shared(path, run_id)
        part_name = names.rank_name(rank) if n_ranks > 1 else ""
        part = self._root.require_group(part_name) if part_name else self._root
        self._paths = list(dict.fromkeys((path / part_name, path)))
        self._is_first = rank == 0
        self._writer = BackgroundWriter()
        # The place of the test gradients that are being taken, and their place once all exist.
        self._taking: tuple[Path, Path] | None = None
        geometry = store_geometry(layout.n_features, np.dtype(dtype).itemsize)
        self.rows = TableWriter(
            part,
            [
                *_gradient_columns(layout, dtype, geometry),
                TableColumn(names.SAMPLE, "int64"),
                TableColumn(names.STEP, "int64"),
                TableColumn(names.CURVATURE, "float32"),
                *dynamics.columns,
            ],
            names.ROW_DIM,
            geometry.shard_rows,
            self._writer,
            kept.part_rows[rank] if kept else None,
            allocate,
        )
        own = [TableColumn(name, dtype) for name, dtype in ROWS_OF_STEP.items()]
        shared = _shared_step_columns(n_groups, len(layout.blocks), paced=paced)
        tables = [(part, [*own, *shared])]
        if n_ranks > 1:  # tables that all ranks share are written once
            tables = [(part, own), (self._root, shared)] if rank == 0 else [(part, own)]
        n_steps = kept.n_steps if kept else None
        self._steps = [
            TableWriter(
                group.require_group(names.STEPS),
                columns,
                names.STEP_DIM,
                STEP_SHARD_ROWS,
                self._writer,
                n_steps,
            )
            for group, columns in tables
        ]
        if kept and rank == 0:
            _remove_past(path, kept)

    def most_bytes(self, n_rows: int, n_steps: int, n_tests: int, n_test_steps: int) -> int:
        """Return the most bytes that further rows, steps and test gradients can take.

        The number holds if nothing can be compressed. It includes the chunks' headers, their
        indices and metadata.

        Args:
            n_rows: number of further rows.
            n_steps: number of further steps.
            n_tests: number of further test gradients.
            n_test_steps: number of steps after which these are taken. The preconditioner's root
                is beside the test gradients of each.
        """
        beside = 4 * len(self.layout.blocks) + 8 + 8 + 4  # scales; sample, step and curvature
        seen = sum(map(_bytes_of, self.dynamics.columns))
        row_bytes = self.layout.n_features * np.dtype(self.dtype).itemsize + beside + seen
        test_bytes = self.layout.n_features * np.dtype(test_dtype(self.dtype)).itemsize + beside
        n_of_root = (
            self.layout.whole_width + self.layout.n_features + len(self.layout.blocks)
            if self._root.attributes[names.PRECONDITIONED]
            else 0
        )
        columns = [
            *_shared_step_columns(
                self._n_groups,
                len(self.layout.blocks),
                paced=bool(self._root.attributes.get(names.PACED)),
            ),
            *(TableColumn(*c) for c in ROWS_OF_STEP.items()),
        ]
        step_bytes = sum(map(_bytes_of, columns))
        values_bytes = (
            n_rows * row_bytes
            + n_steps * step_bytes
            + n_tests * test_bytes
            + n_test_steps * n_of_root * 4
        )
        return values_bytes * 17 // 16 + _METADATA_BYTES

    def append_step(self, values: dict[str, Any]) -> None:
        """Append a line to the step tables that this process keeps.

        Args:
            values: one value for each column, by name.
        """
        for table in self._steps:
            table.append({name: values[name] for name in table.names})

    @property
    def n_steps_written(self) -> int:
        """Number of steps whose lines are on the disk."""
        return self._steps[-1].n_written

    def test_rows(self, step: int, state: Mapping[str, str] | None = None) -> TableWriter:
        """Return a table for the test gradients that are taken after `step` steps.

        The table has the gradient, the scale and the loss of each test sample.

        Args:
            step: number of steps that were taken.
            state: digests of the model's parameters and buffers, by name. None: unknown.
        """
        path = self._root.require_group(names.TEST).path / names.checkpoint_name(step)
        # Hidden: meanwhile readers, and later a new attempt, find either none of them or all.
        partial = path.with_name(f".{path.name}{PARTIAL}")
        remove(partial)
        group = Group.create(
            partial, {names.STEP: step} | ({} if state is None else {names.STATE: dict(state)})
        )
        self._taking = partial, path
        return test_table(group, self.layout, self.dtype, self._writer)

    def write_preconditioner(self, value: Preconditioner) -> None:
        """Write D^(1/2) beside the test gradients that are being taken (`test_rows`)."""
        assert self._taking is not None
        write_preconditioner(Group.open(self._taking[0], ROWS_UNREADABLE), value)

    def write_labels(
        self, which: str, labels: Sequence[int] | Sequence[str] | NDArray[Any]
    ) -> None:
        """Write one label for each sample (`names.TRAIN_LABELS`) or test sample.

        Args:
            which: `names.TRAIN_LABELS` or `names.TEST_LABELS`.
            labels: labels in the order of the samples.
        """
        dimension = names.SAMPLE_DIM if which == names.TRAIN_LABELS else names.TEST_LABEL_DIM
        put_labels(self._root.require_group(names.LABELS).path / which, labels, dimension)

    def write_keys(self, which: str, keys: Sequence[str]) -> None:
        """Write one key for each sample (`names.TRAIN_KEYS`) or test sample.

        Args:
            which: `names.TRAIN_KEYS` or `names.TEST_KEYS`.
            keys: keys in the order of the samples, checked by `keys.check_keys`.
        """
        dimension = names.SAMPLE_DIM if which == names.TRAIN_KEYS else names.TEST_LABEL_DIM
        put_keys(self._root.require_group(names.LABELS).path / which, keys, dimension)

    @property
    def stalls(self) -> Stalls:
        """The training's waits for the disk."""
        return self._writer.stalls

    def sync(self) -> None:
        """Put everything written so far on the disk, and return when it is safe there.

        Raises:
            StoreError: writing failed.
        """
        for table in (self.rows, *self._steps):
            table.sync()
        self._writer.drain()
        try:
            root = self._paths[-1]
            # other ranks might see files that come and go
            for part in (names.TEST, names.LABELS) if self._is_first else ():
                sync_tree(root / part)
            for group in [
                g for path in self._paths for g in (path / names.STEPS, path) if g.exists()
            ]:
                sync(group / METADATA)
                sync(group)
            sync(root.parent)
            sync(root.parent.parent)
        except OSError as error:
            raise writing_failed(error) from error

    def close(self) -> None:
        """Write what is left in the buffers, and return when all is safe on the disk.

        Raises:
            StoreError: writing failed.
        """
        try:
            for table in (self.rows, *self._steps):
                table.flush()
            self.sync()
        finally:
            self._writer.close()

    def flush_test(self, table: TableWriter) -> None:
        """Write the end of a table of test gradients, and replace one of the same step."""
        table.flush()
        self._writer.drain()
        assert self._taking is not None
        partial, path = self._taking
        remove(path)
        move(partial, path)
        self._taking = None

    def drop_test(self) -> None:
        """Remove an unfinished table of test gradients, if there is one.

        Raises:
            StoreError: writing failed.
        """
        if self._taking is not None:
            self._writer.drain()
            remove(self._taking[0])
            self._taking = None


def _bytes_of(column: TableColumn) -> int:
    """Return the bytes of one row of a column."""
    return column.row_bytes


def test_dtype(dtype: str) -> str:
    """Return the dtype of test gradients beside rows of `dtype`."""
    return "float32" if dtype == "float32" else "float16"


def test_table(group: Group, layout: Layout, dtype: str, writer: BackgroundWriter) -> TableWriter:
    """Return a table of test gradients in `group`, for a recording with rows of `dtype`.

    The table has the gradient, the scale and the loss of each test sample.
    """
    own = test_dtype(dtype)
    geometry = store_geometry(layout.n_features, np.dtype(own).itemsize)
    columns = [*_gradient_columns(layout, own, geometry), TableColumn(names.LOSS, "float32")]
    return TableWriter(group, columns, names.TEST_DIM, geometry.shard_rows, writer)


def put_labels(
    path: Path, labels: Sequence[int] | Sequence[str] | NDArray[Any], dimension: str
) -> None:
    """Write an array of labels.

    Integers stay as they are. Strings become codes, with the names in the attributes.
    """
    values = np.asarray(labels)
    attributes = {}
    if values.dtype.kind not in "iu":
        unique, values = np.unique(values.astype(str), return_inverse=True)
        attributes[names.LABEL_NAMES] = unique.tolist()
    remove(path)
    array = Array.create(
        path, values.shape, "int64", (dimension,), (max(1, len(values)),), attributes=attributes
    )
    if len(values):
        array.write_file((0,), values.astype(np.int64))


def _create(path: Path, attributes: dict[str, Any], n_ranks: int) -> Group:
    remove(path)
    ranks = {names.N_RANKS: n_ranks} if n_ranks > 1 else {}
    root = Group.create(path, {names.KIND: "gradients"} | attributes | ranks)
    if ranks:
        for rank in range(n_ranks):
            root.require_group(names.RANK).require_group(str(rank))
    return root


def _open_shared(path: Path, run_id: str) -> Group:
    try:
        root = Group.open(path, "")
    except StoreError:
        root = None
    if root is None or root.attributes.get(names.RUN_ID) != run_id:
        raise StoreError(
            f"{path} is not the store that rank 0 has made: give every rank the same run "
            "directory, on a file system that all share"
        )
    return root


def _remove_past(path: Path, kept: ResumePoint) -> None:
    """Remove what is past `kept`.

    Test gradients and labels that are not kept are removed, and rows of another run.
    """
    for name in (names.RANK,) if len(kept.part_rows) == 1 else (*ROW_COLUMNS, *DYNAMICS_COLUMNS):
        remove(path / name)
    for part, wanted in (
        (names.TEST, set(map(names.checkpoint_name, kept.tests))),
        (names.LABELS, set(kept.labels)),
    ):
        there = (path / part).is_dir()
        found = (
            [
                entry
                for entry in (path / part).iterdir()
                if entry.is_dir() and entry.name not in wanted
            ]
            if there
            else []
        )
        for entry in found if wanted else [path / part]:
            remove(entry)


def _gradient_columns(layout: Layout, dtype: str, geometry: Geometry) -> list[TableColumn]:
    return [
        TableColumn(
            names.GRADIENT,
            dtype,
            (layout.n_features, names.FEATURE_DIM),
            geometry.chunk_rows,
            geometry.chunk_features,
            shuffle=False,  # rows have zeros but no order in their bytes (benchmarks/RESULTS.md)
        ),
        TableColumn(names.SCALE, "float32", (len(layout.blocks), names.BLOCK_DIM)),
    ]


def _shared_step_columns(n_groups: int, n_blocks: int, *, paced: bool) -> list[TableColumn]:
    of_blocks = BLOCK_COLUMNS | (PACE_COLUMNS if paced else {})
    return [
        *(
            TableColumn(name, dtype, (n_groups, names.GROUP_DIM))
            for name, dtype in GROUP_COLUMNS.items()
        ),
        *(
            TableColumn(name, dtype, (n_blocks, names.BLOCK_DIM))
            for name, dtype in of_blocks.items()
        ),
        *(TableColumn(name, dtype) for name, dtype in STEP_COLUMNS.items()),
    ]
