"""`gradients.zarr`, for reading.

It holds the rows of the training steps, tables of the steps, test gradients and labels.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.plan.layout import Layout
from hydra_pipe.plan.rank_rows import ends_of
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import DynamicsShape
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.preconditioner import Preconditioner, read_preconditioner
from hydra_pipe.store.data.rows import (
    ROWS_UNREADABLE,
    Rows,
    check_kind,
    check_within,
    joined,
    read_array,
)
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.zarr.arrays import Array, Group, damage_named
from hydra_pipe.store.zarr.table import TableColumn

NO_GOING_ON = "load an earlier state, or record the run again"

# Tables by step and parameter group: array name -> dtype. The names are those of `Schedule`.
GROUP_COLUMNS = {
    "learning_rate": "float64",
    "momentum": "float64",
    "dampening": "float64",
    "weight_decay": "float64",
    "decoupled_decay": "float64",
    "nesterov": "uint8",
}
# Tables by step and block.
BLOCK_COLUMNS = {"updated": "uint8", "momentum_started": "uint8", "step_factor": "float64"}
# Further tables by step and block, of an optimiser whose momentum differs by step.
PACE_COLUMNS = {"momentum_factor": "float64", "gain_factor": "float64"}
# Tables by step.
STEP_COLUMNS = {names.GRADIENT_SCALE: "float64", names.LOSS: "float64", names.IMBALANCE: "float32"}
# Tables by step, for each process: which of its rows belong to the step.
ROWS_OF_STEP = {names.FIRST_ROW: "int64", names.N_ROWS: "int64"}
# Arrays of rows.
ROW_COLUMNS = (names.GRADIENT, names.SCALE, names.SAMPLE, names.STEP, names.CURVATURE)
# Arrays of rows that a recording may have.
DYNAMICS_COLUMNS = (names.LOSS, names.TARGET, names.LOGITS, names.TOP_CLASSES, names.LAST_INPUT)

_GROUP_TABLES = {f"{names.STEPS}/{name}": dtype for name, dtype in GROUP_COLUMNS.items()}
_BLOCK_TABLES = {
    f"{names.STEPS}/{name}": dtype for name, dtype in (BLOCK_COLUMNS | PACE_COLUMNS).items()
}
_DTYPES = {
    names.SAMPLE: "int64",
    names.STEP: "int64",
    names.CURVATURE: "float32",
    **_GROUP_TABLES,
    **_BLOCK_TABLES,
    **{f"{names.STEPS}/{name}": dtype for name, dtype in (STEP_COLUMNS | ROWS_OF_STEP).items()},
}


@dataclass(frozen=True)
class ResumePoint:
    """The part of a recording that stays when the recording is resumed.

    Args:
        part_rows: number of rows that stay in each process's part, from the first.
        n_steps: number of steps that stay, from the first.
        tests: steps after which test gradients were taken.
        labels: names of arrays of labels and keys.
    """

    part_rows: Sequence[int]
    n_steps: int
    tests: Sequence[int]
    labels: Sequence[str]


@dataclass(frozen=True)
class Prefix:
    """The first steps of a recording.

    Args:
        n_steps: number of the steps.
        part_rows: number of rows of these steps in each process's part.
    """

    n_steps: int
    part_rows: tuple[int, ...]


class Gradients:
    """`gradients.zarr`, opened for reading.

    A recording of several processes is one run: the rows of rank 0 come first, then the rows of
    rank 1, and so on.

    Args:
        path: path of the store.
        prefix: the steps to read, as if there were no others. A recording may be adding steps
            meanwhile. None: all steps.
        listed: function that tells by its name whether a group or an array belongs to the
            recording (`store/run/listing.py`). None: every one that exists belongs.

    Raises:
        StoreError: the store is missing, damaged or shorter than `prefix`, or this project
            does not write such stores.
    """

    def __init__(
        self, path: Path, prefix: Prefix | None = None, listed: Callable[[str], bool] | None = None
    ) -> None:
        self.path = path
        self._prefix = prefix
        self._root = Group.open(path, ROWS_UNREADABLE, listed)
        if self._root.attributes.get(names.KIND) != "gradients":
            raise StoreError(f"{path} is a Zarr store, but not one that hydra-pipe wrote")
        layout = self._root.attributes.get(names.LAYOUT)
        if not isinstance(layout, dict):
            raise StoreError(f"{path} has no block directory: {ROWS_UNREADABLE}")
        self.layout = Layout.from_json(layout)
        try:
            self.dynamics_shape = DynamicsShape.from_json(self._root.attributes.get(names.DYNAMICS))
        except ValueError as error:
            raise StoreError(f"{path} has {error}: {ROWS_UNREADABLE}") from error
        self._columns: dict[str, Array] = {}
        self._names: list[str] | None = None
        self._parts = self._groups_of_parts()
        part_rows = None if prefix is None else prefix.part_rows
        self.rows = Rows(self._parts, self.layout.n_features, len(self.layout.blocks), part_rows)

    def _groups_of_parts(self) -> list[Group]:
        n_ranks = self._root.attributes.get(names.N_RANKS)
        if n_ranks is None:
            return [self._root]
        found: list[Group] = []
        # The loop ends at the first missing group, whatever number the attribute claims.
        while (
            is_count(n_ranks)
            and len(found) < n_ranks
            and (group := self._root.group(names.rank_name(len(found)))) is not None
        ):
            found.append(group)
        if not found or len(found) != n_ranks:
            raise StoreError(
                f"{self.path} has the rows of {len(found)} processes, {shown(n_ranks)} recorded: "
                f"{ROWS_UNREADABLE}"
            )
        return found

    @property
    def _dynamics(self) -> dict[str, TableColumn]:
        return {column.name: column for column in self.dynamics_shape.columns}

    @property
    def n_ranks(self) -> int:
        """Number of processes that recorded together."""
        return len(self._parts)

    @property
    def run_id(self) -> str:
        """Id of the run that wrote the store."""
        return str(self._root.attributes.get(names.RUN_ID))

    @property
    def n_groups(self) -> int:
        """Number of parameter groups of the optimiser."""
        return self._array(f"{names.STEPS}/{next(iter(GROUP_COLUMNS))}").shape[1]

    def check_kept(self, kept: ResumePoint) -> None:
        """Refuse to resume where a part of `kept` is missing. Raises: StoreError."""
        for name, count in self.expected_rows(kept.part_rows, kept.n_steps, 0).items():
            array = self._root.array(name)
            if array.shape[0] < count:
                raise StoreError(
                    f"{self.path}/{name} has {array.shape[0]} rows, the state counts {count}: "
                    f"{NO_GOING_ON}"
                )
            if n := array.missing_files():
                raise StoreError(f"{self.path}/{name} lacks {n} chunk files: {NO_GOING_ON}")
        if lost := set(kept.tests) - set(self.test_steps()):
            raise StoreError(
                f"{self.path} lacks the test gradients of step {min(lost)}, which the state "
                f"counts: {NO_GOING_ON}"
            )

    def samples(self, rows: slice) -> NDArray[np.int64]:
        """Return the training sample of each row in `rows`. Raises: StoreError: damaged."""
        return self._row_column(names.SAMPLE, rows)

    def step_of_rows(self, rows: slice) -> NDArray[np.int64]:
        """Return the step of each row in `rows`. Raises: StoreError: damaged."""
        return self._row_column(names.STEP, rows)

    def curvature(self, rows: slice) -> NDArray[np.float32]:
        """Return the curvature weight of each row in `rows`, NaN where it is unknown.

        Raises:
            StoreError: damaged.
        """
        return self._row_column(names.CURVATURE, rows)

    def row_dynamics(self, name: str, rows: slice) -> NDArray[Any]:
        """Return an array of the dynamics for each row in `rows`.

        Args:
            name: name of a column of `dynamics_shape`.
            rows: the rows.

        Raises:
            StoreError: damaged.
        """
        return self._row_column(name, rows)

    def step_table(self, name: str) -> NDArray[Any]:
        """Return one table of the steps, whole: (step,), (step, group) or (step, block).

        Raises:
            StoreError: damaged.
        """
        return read_array(self._array(f"{names.STEPS}/{name}"), self._steps)

    def rows_of_steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first row and the number of rows of each step, by process.

        Returns:
            Two arrays, both of shape (step, rank).

        Raises:
            StoreError: damaged.
        """
        starts = [0, *ends_of(self.rows.part_rows)][:-1]
        arrays = [
            [self._array(f"{names.STEPS}/{name}", part) for part in range(self.n_ranks)]
            for name in ROWS_OF_STEP
        ]
        if (
            len(
                lengths := {
                    len(range(array.shape[0])[self._steps])
                    for of_parts in arrays
                    for array in of_parts
                }
            )
            > 1
        ):
            raise StoreError(
                f"{self.path}/{names.STEPS} has tables of {sorted(lengths)} steps: "
                f"{ROWS_UNREADABLE}"
            )
        first, counts = (
            np.stack([read_array(array, self._steps) for array in of_parts], axis=1)
            for of_parts in arrays
        )
        return first + np.array(starts), counts

    def _row_column(self, name: str, rows: slice) -> NDArray[Any]:
        return joined(
            lambda part, own: read_array(self._array(name, part), own), rows, self.rows.part_rows
        )

    def _array(self, name: str, part: int | None = None) -> Array:
        """Return array `name` of the store, or of one part of it. Each array is opened once."""
        group = self._root if part is None else self._parts[part]
        key = str(group.path / name)
        array = self._columns.get(key)
        if array is None:
            array = group.array(name)
            if name in _DTYPES:
                check_kind(array, (_DTYPES[name],), self._width(name, array))
            elif (column := self._dynamics.get(name)) is not None:
                check_kind(
                    array, (column.dtype,), None if column.width is None else column.width[0]
                )
            self._columns[key] = array
        return array

    def _width(self, name: str, array: Array) -> int | None:
        """Return the width that array `name` must have. None: it has one value a row."""
        if name in _BLOCK_TABLES:
            return len(self.layout.blocks)
        if name not in _GROUP_TABLES:
            return None
        # Groups that no block is in are counted by nothing else than the array.
        return max([1 + max(block.group for block in self.layout.blocks), *array.shape[1:2]])

    @property
    def prefix(self) -> Prefix | None:
        """Steps that are read. None: all."""
        return self._prefix

    @property
    def _steps(self) -> slice:
        return slice(None if self._prefix is None else self._prefix.n_steps)

    @property
    def n_steps(self) -> int:
        return len(range(self._array(f"{names.STEPS}/{names.LOSS}").shape[0])[self._steps])

    def schedules(self) -> tuple[Schedule, NDArray[np.int64]]:
        """Return the optimiser's settings, one series for each distinct history.

        Returns:
            The schedule, shape (step, series), and the series of each block, shape (block,).

        Raises:
            StoreError: damaged.
            ScheduleError: the settings have values that no optimiser has.
        """
        tables = {name: self.step_table(name) for name in self.block_columns}
        series: dict[tuple[object, ...], int] = {}
        of_block: list[int] = []
        first_block: list[int] = []
        for index, block in enumerate(self.layout.blocks):
            history = tuple(
                hashlib.sha256(table[:, index].tobytes()).digest() for table in tables.values()
            )
            number = series.setdefault((block.group, *history), len(series))
            if number == len(first_block):
                first_block.append(index)
            of_block.append(number)
        groups = [self.layout.blocks[index].group for index in first_block]
        settings = {name: self.step_table(name)[:, groups] for name in GROUP_COLUMNS}
        settings["nesterov"] = settings["nesterov"].astype(bool)
        settings["learning_rate"] = (
            settings["learning_rate"] * tables["step_factor"][:, first_block]
        )
        if self.paced:
            momentum, gain = (tables[name][:, first_block] for name in PACE_COLUMNS)
            settings["momentum"] = settings["momentum"] * momentum
            settings["dampening"] = 1.0 - (1.0 - settings["dampening"]) * gain
        flags = {
            name: tables[name][:, first_block].astype(bool)
            for name in ("updated", "momentum_started")
        }
        return Schedule(**settings, **flags), np.array(of_block)

    @property
    def preconditioned(self) -> bool:
        """True if the optimiser has a preconditioner D: reductions multiply by it."""
        return bool(self._root.attributes.get(names.PRECONDITIONED, False))

    @property
    def paced(self) -> bool:
        """True if the momentum of a block differs by step: further tables have its factors."""
        return bool(self._root.attributes.get(names.PACED, False))

    @property
    def block_columns(self) -> dict[str, str]:
        """Names and dtypes of the tables by step and block."""
        return BLOCK_COLUMNS | (PACE_COLUMNS if self.paced else {})

    def test_steps(self) -> list[int]:
        """Return the steps at which test gradients were taken, in order."""
        group = self._root.group(names.TEST)
        found = group.group_names() if group is not None else []
        if strange := [name for name in found if not (name.isascii() and name.isdecimal())]:
            raise StoreError(
                f"{self.path}/{names.TEST} has {shown(strange[0])}, which is no number of steps: "
                f"{ROWS_UNREADABLE}"
            )
        return sorted(map(int, found))

    def test_rows(self, step: int) -> Rows:
        """Return the test gradients of `step` steps. Raises: StoreError: there are none."""
        return Rows([self._test_group(step)], self.layout.n_features, len(self.layout.blocks))

    def test_losses(self, step: int) -> NDArray[np.float32]:
        """Return the loss of each test sample after `step` steps."""
        array = self._test_group(step).array(names.LOSS)
        check_kind(array, ("float32",), None)
        return read_array(array, slice(None))

    def state_at(self, step: int) -> dict[str, str]:
        """Return digests of the parameters and buffers at which test gradients were taken.

        Args:
            step: number of steps before the test gradients.

        Returns:
            Digests by name. Empty if they are unknown.
        """
        found = self._test_group(step).attributes.get(names.STATE)
        if not isinstance(found, dict) or not all(
            isinstance(digest, str) for digest in found.values()
        ):
            return {}
        return dict(found)

    def preconditioner(self, step: int) -> Preconditioner | None:
        """Return D^(1/2) as it was after `step` steps, when test gradients were taken.

        None if the optimiser has no preconditioner.

        Raises:
            StoreError: damaged.
        """
        if not self.preconditioned:
            return None
        return read_preconditioner(self._test_group(step), self.layout)

    def _test_group(self, step: int) -> Group:
        group = self._root.group(f"{names.TEST}/{names.checkpoint_name(step)}")
        if group is None:
            raise StoreError(
                f"{self.path} has no test gradients of step {step}, only of {self.test_steps()}"
            )
        return group

    def labels(self, which: str) -> NDArray[Any] | None:
        """Return labels of the samples or test samples. None where they are unknown.

        Labels are int64, or str objects if they are names.

        Raises:
            StoreError: damaged.
        """
        group = self._root.group(names.LABELS)
        if group is None or not group.has(which):
            return None
        return read_labels(group.array(which))

    def keys(self, which: str) -> Keys | None:
        """Return the keys of the samples or test samples. None where they have none.

        Raises:
            StoreError: damaged.
        """
        group = self._root.group(names.LABELS)
        return Keys(group.array(which)) if group is not None and group.has(which) else None

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Yield every array of the store with its name, to check or measure the whole store."""
        if self._names is None:
            self._names = self._root.array_names()
        for name in self._names:
            yield name, self._array(name)

    def lengths(self, checkpoint: int) -> dict[str, int]:
        """Return the number of rows of every array, by name. Reads only metadata.

        The dtypes and widths of the arrays are checked first.

        Args:
            checkpoint: step of the test gradients to be read, which must have the form of rows.

        Raises:
            StoreError: damaged.
        """
        found = dict(self.arrays())
        for part in range(self.n_ranks):
            of_rows = (*ROW_COLUMNS[2:], *self._dynamics)
            for name in (*of_rows, *(f"{names.STEPS}/{name}" for name in ROWS_OF_STEP)):
                self._array(name, part)
        for which in (names.TRAIN_LABELS, names.TEST_LABELS):
            if (labels := found.get(f"{names.LABELS}/{which}")) is not None:
                check_kind(labels, ("int64",), None)
        for which in (names.TRAIN_KEYS, names.TEST_KEYS):
            if (keys := found.get(f"{names.LABELS}/{which}")) is not None:
                Keys(keys)
        self.test_rows(checkpoint)
        return {name: array.shape[0] for name, array in found.items()}

    def expected_rows(self, part_rows: Sequence[int], n_steps: int, n_tests: int) -> dict[str, int]:
        """Return every array that a finished recording must have, with its length."""
        expected: dict[str, int] = {}
        for rank, n_rows in enumerate(part_rows):
            part = "" if len(part_rows) == 1 else f"{names.rank_name(rank)}/"
            expected |= {f"{part}{name}": n_rows for name in (*ROW_COLUMNS, *self._dynamics)}
            expected |= {f"{part}{names.STEPS}/{name}": n_steps for name in ROWS_OF_STEP}
        expected |= {
            f"{names.STEPS}/{name}": n_steps
            for name in (*STEP_COLUMNS, *GROUP_COLUMNS, *self.block_columns)
        }
        if n_tests:
            checkpoint = f"{names.TEST}/{names.checkpoint_name(n_steps)}"
            expected |= {
                f"{checkpoint}/{name}": n_tests
                for name in (names.GRADIENT, names.SCALE, names.LOSS)
            }
        return expected

    def pruned_arrays(self) -> list[str]:
        """Return the arrays that are empty in a pruned run: only work on the rows needs them."""
        parts = (
            [""]
            if self.n_ranks == 1
            else [f"{names.rank_name(rank)}/" for rank in range(self.n_ranks)]
        )
        return [
            f"{part}{name}"
            for part in parts
            for name in (names.GRADIENT, names.SCALE, names.CURVATURE)
        ]

    def missing(self, *, pruned: bool = False) -> list[str]:
        """Return the arrays with missing chunks, or with fewer bytes than their shapes call for."""
        gone = self.pruned_arrays() if pruned else []
        arrays = ((name, array) for name, array in self.arrays() if name not in gone)
        return [f"{name} {fault}" for name, array in arrays if (fault := array.shortfall())]


def read_labels(array: Array) -> NDArray[Any]:
    """Return labels: int64, or str objects if they are names. Raises: StoreError: damaged."""
    check_kind(array, ("int64",), None)
    with damage_named(array.path, "labels are not readable"):
        codes = array.read()
    label_names = array.attributes.get(names.LABEL_NAMES)
    if label_names is None:
        return codes
    found = label_objects(label_names)
    if found is None:
        raise StoreError(
            f"{array.path} is damaged: its names are not a list of strings: labels are not readable"
        )
    check_within(codes, len(found), f"labels of {array.path}")
    labels: NDArray[Any] = found[codes]
    return labels


def label_objects(label_names: Any) -> NDArray[Any] | None:
    """Return names of labels as NumPy objects, or None if they are not a list of strings.

    In an array of fixed-width strings, one long name would make every element as long.

    Args:
        label_names: value from JSON.
    """
    if not isinstance(label_names, list) or not all(isinstance(name, str) for name in label_names):
        return None
    return np.array(label_names, object)
