"""`gradients.zarr`, for reading: rows of the training steps, per-step tables, test gradients, labels."""

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
from hydra_pipe.plan.parts import ends_of
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array, Group, damage_named
from hydra_pipe.store.parsing import is_count
from hydra_pipe.store.rows import ROWS_UNREADABLE, Rows, check_kind, check_within, joined, read_array

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
# per-step tables
STEP_COLUMNS = {names.GRADIENT_SCALE: "float64", names.LOSS: "float64", names.IMBALANCE: "float32"}
# per-step tables of each process: which of its rows are the step's
ROWS_OF_STEP = {names.FIRST_ROW: "int64", names.N_ROWS: "int64"}
# arrays of rows
ROW_COLUMNS = (names.GRADIENT, names.SCALE, names.SAMPLE, names.STEP, names.CURVATURE)

_GROUP_TABLES = {f"{names.STEPS}/{name}": dtype for name, dtype in GROUP_COLUMNS.items()}
_BLOCK_TABLES = {f"{names.STEPS}/{name}": dtype for name, dtype in BLOCK_COLUMNS.items()}
_DTYPES = {
    names.SAMPLE: "int64",
    names.STEP: "int64",
    names.CURVATURE: "float32",
    **_GROUP_TABLES,
    **_BLOCK_TABLES,
    **{f"{names.STEPS}/{name}": dtype for name, dtype in (STEP_COLUMNS | ROWS_OF_STEP).items()},
}


@dataclass(frozen=True)
class Kept:
    """What is kept of a recording that is gone on with.

    Args:
        part_rows: the first rows of each process's part.
        n_steps: the first steps.
        tests: steps after which test gradients were taken.
        labels: arrays of labels.
    """

    part_rows: Sequence[int]
    n_steps: int
    tests: Sequence[int]
    labels: Sequence[str]


@dataclass(frozen=True)
class Prefix:
    """The first steps of a recording.

    Args:
        n_steps: of it.
        part_rows: rows of these steps in each process's part.
    """

    n_steps: int
    part_rows: tuple[int, ...]


class Gradients:
    """`gradients.zarr`, opened for reading. What several processes recorded is one run: the rows of rank 0 first, then those of 1.

    Args:
        path: of the store.
        prefix: read only these steps, as if there were no others: a recording may be adding some. None: all.
        listed: whether a group or an array is of the recording, by its name (`store/listing.py`); None: all that are there.

    Raises:
        StoreError: it is missing, damaged, shorter than `prefix`, or not what this project writes.
    """

    def __init__(self, path: Path, prefix: Prefix | None = None, listed: Callable[[str], bool] | None = None) -> None:
        self.path = path
        self._prefix = prefix
        self._root = Group.open(path, ROWS_UNREADABLE, listed)
        if self._root.attributes.get(names.KIND) != "gradients":
            raise StoreError(f"{path} is a Zarr store, but not one that hydra-pipe wrote")
        layout = self._root.attributes.get(names.LAYOUT)
        if not isinstance(layout, dict):
            raise StoreError(f"{path} has no block directory: {ROWS_UNREADABLE}")
        self.layout = Layout.from_json(layout)
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
        # up to the first that is not there, however many it says
        while is_count(n_ranks) and len(found) < n_ranks and (group := self._root.group(names.rank_name(len(found)))) is not None:
            found.append(group)
        if not found or len(found) != n_ranks:
            raise StoreError(f"{self.path} has the rows of {len(found)} processes, {shown(n_ranks)} recorded: {ROWS_UNREADABLE}")
        return found

    @property
    def n_ranks(self) -> int:
        """Processes that recorded together."""
        return len(self._parts)

    @property
    def run_id(self) -> str:
        """Of the run that wrote it."""
        return str(self._root.attributes.get(names.RUN_ID))

    @property
    def n_groups(self) -> int:
        """Parameter groups of the optimiser."""
        return self._array(f"{names.STEPS}/{next(iter(GROUP_COLUMNS))}").shape[1]

    def check_kept(self, kept: Kept) -> None:
        """Refuse to go on where something of `kept` is not there. Raises: StoreError."""
        for name, count in self.expected_rows(kept.part_rows, kept.n_steps, 0).items():
            array = self._root.array(name)
            if array.shape[0] < count:
                raise StoreError(f"{self.path}/{name} has {array.shape[0]} rows, the state counts {count}: {NO_GOING_ON}")
            if n := array.missing_files():
                raise StoreError(f"{self.path}/{name} lacks {n} chunk files: {NO_GOING_ON}")
        if lost := set(kept.tests) - set(self.test_steps()):
            raise StoreError(f"{self.path} lacks the test gradients of step {min(lost)}, which the state counts: {NO_GOING_ON}")

    def samples(self, rows: slice) -> NDArray[np.int64]:
        """Training sample of each of some rows. Raises: StoreError: damaged."""
        return self._row_column(names.SAMPLE, rows)

    def step_of_rows(self, rows: slice) -> NDArray[np.int64]:
        """Step of each of some rows. Raises: StoreError: damaged."""
        return self._row_column(names.STEP, rows)

    def curvature(self, rows: slice) -> NDArray[np.float32]:
        """Curvature weight of each of some rows, not a number where it is not known. Raises: StoreError: damaged."""
        return self._row_column(names.CURVATURE, rows)

    def step_table(self, name: str) -> NDArray[Any]:
        """One per-step table, whole: (step,), (step, group) or (step, block). Raises: StoreError: damaged."""
        return read_array(self._array(f"{names.STEPS}/{name}"), self._steps)

    def rows_of_steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First row and number of rows of each step in each process's part, both (step, rank). Raises: StoreError: damaged."""
        starts = [0, *ends_of(self.rows.part_rows)][:-1]
        arrays = [[self._array(f"{names.STEPS}/{name}", part) for part in range(self.n_ranks)] for name in ROWS_OF_STEP]
        if len(lengths := {len(range(array.shape[0])[self._steps]) for of_parts in arrays for array in of_parts}) > 1:
            raise StoreError(f"{self.path}/{names.STEPS} has tables of {sorted(lengths)} steps: {ROWS_UNREADABLE}")
        first, counts = (np.stack([read_array(array, self._steps) for array in of_parts], axis=1) for of_parts in arrays)
        return first + np.array(starts), counts

    def _row_column(self, name: str, rows: slice) -> NDArray[Any]:
        return joined(lambda part, own: read_array(self._array(name, part), own), rows, self.rows.part_rows)

    def _array(self, name: str, part: int | None = None) -> Array:
        """Array `name` of the store, or of one part of it, opened once."""
        group = self._root if part is None else self._parts[part]
        key = str(group.path / name)
        array = self._columns.get(key)
        if array is None:
            array = group.array(name)
            if name in _DTYPES:
                check_kind(array, (_DTYPES[name],), self._width(name, array))
            self._columns[key] = array
        return array

    def _width(self, name: str, array: Array) -> int | None:
        """That array `name` must have; None: it has one value a row."""
        if name in _BLOCK_TABLES:
            return len(self.layout.blocks)
        if name not in _GROUP_TABLES:
            return None
        # of groups that no block is in nothing else tells
        return max([1 + max(block.group for block in self.layout.blocks), *array.shape[1:2]])

    @property
    def prefix(self) -> Prefix | None:
        """The steps that are read; None: all."""
        return self._prefix

    @property
    def _steps(self) -> slice:
        return slice(None if self._prefix is None else self._prefix.n_steps)

    @property
    def n_steps(self) -> int:
        return len(range(self._array(f"{names.STEPS}/{names.LOSS}").shape[0])[self._steps])

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
        return bool(self._root.attributes.get(names.PRECONDITIONED, False))

    def test_steps(self) -> list[int]:
        """Steps at which test gradients were taken, in order."""
        group = self._root.group(names.TEST)
        found = group.group_names() if group is not None else []
        if strange := [name for name in found if not (name.isascii() and name.isdecimal())]:
            raise StoreError(f"{self.path}/{names.TEST} has {shown(strange[0])}, which is no number of steps: {ROWS_UNREADABLE}")
        return sorted(map(int, found))

    def test_rows(self, step: int) -> Rows:
        """Test gradients taken after `step` steps. Raises: StoreError: there are none."""
        return Rows([self._test_group(step)], self.layout.n_features, len(self.layout.blocks))

    def test_losses(self, step: int) -> NDArray[np.float32]:
        """Loss of each test sample after `step` steps."""
        array = self._test_group(step).array(names.LOSS)
        check_kind(array, ("float32",), None)
        return read_array(array, slice(None))

    def state_at(self, step: int) -> dict[str, str]:
        """Digests of the parameters and buffers, by name, that the test gradients of `step` were taken at; empty: not known."""
        found = self._test_group(step).attributes.get(names.STATE)
        if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
            return {}
        return dict(found)

    def preconditioner(self, step: int) -> list[NDArray[np.float32]] | None:
        """D^(1/2) of each block, flattened, as the test gradients of `step` are times it; None: it is not kept.

        Raises:
            StoreError: damaged.
        """
        if not self._root.has(names.PRECONDITIONER):
            return None
        array = self._root.array(names.PRECONDITIONER)
        if array.attributes.get(names.STEP) != step:
            return None
        check_kind(array, ("float32",), None)
        ends = np.cumsum([block.numel for block in self.layout.blocks])
        if array.shape != (ends[-1],):
            raise StoreError(f"{array.path} has {array.shape[0]} values, the model {ends[-1]} parameters: {ROWS_UNREADABLE}")
        return np.split(read_array(array), ends[:-1])

    def _test_group(self, step: int) -> Group:
        group = self._root.group(f"{names.TEST}/{names.checkpoint_name(step)}")
        if group is None:
            raise StoreError(f"{self.path} has no test gradients of step {step}: it has those of {self.test_steps()}")
        return group

    def labels(self, which: str) -> NDArray[Any] | None:
        """Labels of the samples or test samples: int64, or str objects where they were named; None where unknown.

        Raises:
            StoreError: damaged.
        """
        group = self._root.group(names.LABELS)
        if group is None or not group.has(which):
            return None
        return read_labels(group.array(which))

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Every array of the store with its name, for those who check or measure all of it."""
        if self._names is None:
            self._names = self._root.array_names()
        for name in self._names:
            yield name, self._array(name)

    def lengths(self, checkpoint: int) -> dict[str, int]:
        """Rows of every array, by its name, once it is of the dtype and width that it is read as. Reads metadata only.

        Args:
            checkpoint: step of the test gradients that are to be read, which must be as rows are.

        Raises:
            StoreError: damaged.
        """
        found = dict(self.arrays())
        for part in range(self.n_ranks):
            for name in (*ROW_COLUMNS[2:], *(f"{names.STEPS}/{name}" for name in ROWS_OF_STEP)):
                self._array(name, part)
        for which in (names.TRAIN_LABELS, names.TEST_LABELS):
            if (labels := found.get(f"{names.LABELS}/{which}")) is not None:
                check_kind(labels, ("int64",), None)
        self.test_rows(checkpoint)
        return {name: array.shape[0] for name, array in found.items()}

    def expected_rows(self, part_rows: Sequence[int], n_steps: int, n_tests: int) -> dict[str, int]:
        """Every array that a finished recording must have, and its length."""
        expected: dict[str, int] = {}
        for rank, n_rows in enumerate(part_rows):
            part = "" if len(part_rows) == 1 else f"{names.rank_name(rank)}/"
            expected |= {f"{part}{name}": n_rows for name in ROW_COLUMNS}
            expected |= {f"{part}{names.STEPS}/{name}": n_steps for name in ROWS_OF_STEP}
        expected |= {f"{names.STEPS}/{name}": n_steps for name in (*STEP_COLUMNS, *GROUP_COLUMNS, *BLOCK_COLUMNS)}
        if n_tests:
            checkpoint = f"{names.TEST}/{names.checkpoint_name(n_steps)}"
            expected |= {f"{checkpoint}/{name}": n_tests for name in (names.GRADIENT, names.SCALE, names.LOSS)}
        return expected

    def pruned_arrays(self) -> list[str]:
        """Arrays that hold nothing any more once the run is pruned: what only the rows themselves need."""
        parts = [""] if self.n_ranks == 1 else [f"{names.rank_name(rank)}/" for rank in range(self.n_ranks)]
        return [f"{part}{name}" for part in parts for name in (names.GRADIENT, names.SCALE, names.CURVATURE)]

    def missing(self, *, pruned: bool = False) -> list[str]:
        """Arrays of which chunks are not there, or cannot hold what the array says."""
        gone = self.pruned_arrays() if pruned else []
        arrays = ((name, array) for name, array in self.arrays() if name not in gone)
        return [f"{name} {fault}" for name, array in arrays if (fault := array.shortfall())]


def read_labels(array: Array) -> NDArray[Any]:
    """Labels: int64, or str objects where they were named. Raises: StoreError: damaged."""
    check_kind(array, ("int64",), None)
    with damage_named(array.path, "labels are not readable"):
        codes = array.read()
    label_names = array.attributes.get(names.LABEL_NAMES)
    if label_names is None:
        return codes
    found = label_objects(label_names)
    if found is None:
        raise StoreError(f"{array.path} is damaged: its names are not a list of strings: labels are not readable")
    check_within(codes, len(found), f"labels of {array.path}")
    labels: NDArray[Any] = found[codes]
    return labels


def label_objects(label_names: Any) -> NDArray[Any] | None:
    """Names of labels as NumPy holds them: as objects, for as fixed-width strings one long name would be paid for by all.

    None where `label_names`, from JSON, is not a list of strings.
    """
    if not isinstance(label_names, list) or not all(isinstance(name, str) for name in label_names):
        return None
    return np.array(label_names, object)
