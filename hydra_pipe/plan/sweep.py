"""Plan of a backward sweep: the columns that are carried together, the memory and the work.

A sweep reads the rows from the last step to the first. For each column of the result and each
form of the curvature, it carries an adjoint and a momentum adjoint as long as a row. Blocks of
columns do not depend on each other. Each worker takes one block and reads the rows for itself.
If the budget has no room for all blocks at once, the blocks come one after the other, in passes.
"""

from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.chunking import MOST_CHUNK, even_width
from hydra_pipe.plan.costs import COSTS, suggested
from hydra_pipe.plan.records import (
    ColumnPlan,
    Reading,
    ReadingPlan,
    ReductionInput,
    common_bytes,
    ranking_bytes,
    spans,
)
from hydra_pipe.units import format_bytes

# Carried arrays: the adjoint, the momentum's adjoint, and a copy of both, which is written when
# they are kept.
_STATES = 4
# Most blocks of columns. The plan lists each block, and each block reads all rows.
_MOST_BLOCKS = 2**20
# Bytes of the tiles of carried arrays that a worker is at.
_TILE_BYTES = 2**23


@dataclass(frozen=True)
class SweepInput:
    """Sizes and budget of a sweep.

    Args:
        recording: sizes, budget and workers.
        width: number of features that are carried, with factored blocks multiplied out.
        decoded_rows: number of rows that are decoded at once.
        most_rows: largest number of rows of a step.
        n_values: number of values of each column of the result.
        order: order of the steps.
        most_chunk: most columns of a chunk of the result.
        preconditioned: True if rows are multiplied by D^(1/2).
    """

    recording: ReductionInput
    width: int
    decoded_rows: int
    most_rows: int
    n_values: int
    order: str = "backward"
    most_chunk: int = MOST_CHUNK
    preconditioned: bool = False

    def beside_bytes(self, columns: int) -> int:
        """Return the bytes of a worker beside a sweep of so many columns over the features."""
        return 0

    def beside_operations(self, columns: int, blocks: int) -> int:
        """Return the operations beside those of a sweep over the features.

        Args:
            columns: number of columns.
            blocks: number of blocks of columns: each goes over all rows.
        """
        return 0


@dataclass(frozen=True, kw_only=True)
class SweepPlan(ColumnPlan, ReadingPlan):
    """Plan of the columns of a sweep: each worker carries a block of columns."""

    @property
    def passes(self) -> int:
        return -(-len(self.columns) // self.workers)

    @property
    def tasks(self) -> int:
        return len(self.columns)

    @property
    def compared_picoseconds(self) -> float:
        """Time, for comparison. Whole passes count: in the last one, workers may have no block."""
        return self.picoseconds * self.passes / len(self.columns)


def plan_sweep(what: SweepInput, done: int = 0) -> SweepPlan:
    """Return the plan that takes least time of the plans that fit the budget.

    Args:
        what: sizes and budget.
        done: number of first columns that are done.

    Raises:
        BudgetError: not even one column fits, or there are too many blocks.
    """
    given = what.recording
    most = min(given.workers, given.n_columns)
    # Each worker carries columns of its own, so fewer workers may take fewer passes.
    ways = [(width, n) for n in range(most, 0, -1) if (width := _widest(what, n)) is not None]
    blocks = min((-(-given.n_columns // width) for width, _ in ways), default=0)
    if blocks > _MOST_BLOCKS:
        raise BudgetError(
            f"a sweep of {given.n_columns:,} columns over {what.width:,} features goes in "
            f"{blocks:,} blocks within {format_bytes(given.memory_bytes)}, and at most "
            f"{_MOST_BLOCKS:,} are planned: raise --memory"
        )
    if ways:
        # Choose as if nothing was done yet. A resumed reduction must divide the columns as before
        # the interruption.
        width, workers = min(
            ways, key=lambda way: _plan(what, way[0], way[1], 0).compared_picoseconds
        )
        return _plan(what, width, workers, done)
    peak = sweep_peak_bytes(what, 1, 1)
    raise BudgetError(
        f"a sweep of one column over {what.width:,} features needs {format_bytes(peak)}, "
        "--memory is "
        f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(peak)}"
    )


def _widest(what: SweepInput, workers: int) -> int | None:
    """Return the columns of each worker's block, in as few passes as fit.

    None if not even one column fits.
    """
    n_columns = what.recording.n_columns
    least, second = (sweep_peak_bytes(what, columns, workers) for columns in (1, 2))
    if least > what.recording.memory_bytes:
        return None
    # Bytes grow evenly with the columns. So no wider block fits, and no smaller number of passes.
    widest = 1 + (what.recording.memory_bytes - least) // (second - least)
    for passes in range(max(1, -(-n_columns // (workers * widest))), -(-n_columns // workers) + 1):
        width = min(even_width(n_columns, workers * passes, what.most_chunk), n_columns)
        if sweep_peak_bytes(what, width, workers) <= what.recording.memory_bytes:
            return width
    return None


def _plan(what: SweepInput, width: int, workers: int, done: int) -> SweepPlan:
    given = what.recording
    blocks = spans(done, given.n_columns, width)
    values = given.n_rows * what.width
    operations = (
        4 * len(FORMS) * (given.n_columns - done) + 2 * what.most_rows * len(blocks)
    ) * values + what.beside_operations(given.n_columns - done, len(blocks))
    read = len(blocks) * given.n_rows * given.n_features * given.item_bytes
    # Each step reads and writes the adjoints once.
    state = 4 * len(FORMS) * given.n_steps * what.width * (given.n_columns - done)
    picoseconds = (
        read * COSTS.decoded_byte
        + len(blocks) * values * COSTS.converted_value
        + operations * COSTS.operation
        + state * COSTS.converted_value
    )
    return SweepPlan(
        order=what.order,
        columns=blocks,
        workers=workers,
        reading=Reading(what.decoded_rows, given.n_features),
        peak_bytes=sweep_peak_bytes(what, width, workers),
        read_bytes=read,
        written_bytes=given.result_bytes(what.n_values),
        operations=operations,
        picoseconds=picoseconds,
    )


def sweep_peak_bytes(what: SweepInput, columns: int, workers: int) -> int:
    """Return an upper bound of a process's memory while each worker carries `columns` columns."""
    given = what.recording
    threads = min(given.threads, workers) if given.processes else workers
    # Test gradients as stored and multiplied out. Means of groups need all test gradients.
    tests = given.n_tests if given.grouped else columns
    start = tests * (given.n_features * given.test_item_bytes + what.width * 4 + given.n_blocks * 4)
    start += 3 * 4 * what.width if what.preconditioned else 0  # as read, by block, and in order
    carried = _STATES * len(FORMS) * columns * what.width * 4 + _TILE_BYTES
    # Sums, the values to write, and their bytes.
    sums = what.n_values * columns * 4 * 3
    # Three pieces of rows, and one that is being read: stored values twice, scale, sample and
    # curvature.
    file = what.decoded_rows * (
        2 * given.n_features * given.item_bytes + given.n_blocks * 4 * 2 + 32
    )
    files = (3 + what.most_rows // what.decoded_rows) * file * max(1, len(given.part_rows))
    # A step as stored and multiplied out, and the step after it. Products in float64 and float32.
    step = what.most_rows * (
        given.n_features * (given.item_bytes + 8)
        + 3 * what.width * 4
        + 8 * 4 * columns * len(FORMS)
    )
    gram = (6 + len(FORMS)) * what.most_rows**2 * 8
    sums += ranking_bytes(given, columns)
    worker = start + carried + sums + files + step + gram + what.beside_bytes(columns)
    return common_bytes(given, 0) + threads * worker
