"""How a backward sweep goes over the store: which columns are carried together, and the memory and the work that is.

A sweep reads the rows from the last step to the first and carries, for each column of the result and each form
of the curvature, an adjoint and a momentum adjoint as long as a row. Blocks of columns do not depend on each other: each worker
takes one, and reads the rows for itself. Where not all of them fit the budget at once, they come one after the other, in passes.
"""

from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.costs import COSTS, suggested
from hydra_pipe.plan.geometry import MOST_CHUNK, even_width
from hydra_pipe.plan.records import ColumnPlan, Reading, ReadingPlan, ReductionInput, common_bytes, spans
from hydra_pipe.units import format_bytes

# arrays that are carried: the adjoint, that of the momentum, and what is written of them when they are kept
_STATES = 4
# of a worker, tiles of them that it is at
_TILE_BYTES = 2**23


@dataclass(frozen=True)
class SweepInput:
    """What a sweep works on.

    Args:
        recording: sizes, budget and workers.
        width: features that are carried: those of factored blocks multiplied out.
        most_rows: of a step.
        n_values: of each column of the result.
        order: of the steps.
        most_chunk: columns of a chunk of the result, at most.
    """

    recording: ReductionInput
    width: int
    most_rows: int
    n_values: int
    order: str = "backward"
    most_chunk: int = MOST_CHUNK


@dataclass(frozen=True, kw_only=True)
class SweepPlan(ColumnPlan, ReadingPlan):
    """How columns are swept: each worker carries a block of them."""

    @property
    def passes(self) -> int:
        return -(-len(self.columns) // self.workers)

    @property
    def tasks(self) -> int:
        return len(self.columns)

    @property
    def compared_picoseconds(self) -> float:
        """Time, for comparison. Of the last pass a worker may have no block: whole passes count."""
        return self.picoseconds * self.passes / len(self.columns)


def plan_sweep(what: SweepInput, done: int = 0) -> SweepPlan:
    """The plan that takes least time of those that fit the budget; after the first `done` columns.

    Raises:
        BudgetError: not even one column fits.
    """
    given = what.recording
    most = min(given.workers, given.n_columns)
    # each worker carries columns of its own: fewer of them may take fewer passes
    ways = [(width, n) for n in range(most, 0, -1) if (width := _widest(what, n)) is not None]
    if ways:
        # as if nothing was done yet: going on divides the columns as the interrupted reduction did
        width, workers = min(ways, key=lambda way: _plan(what, way[0], way[1], 0).compared_picoseconds)
        return _plan(what, width, workers, done)
    peak = sweep_peak_bytes(what, 1, 1)
    raise BudgetError(
        f"a sweep of one column over {what.width:,} features needs {format_bytes(peak)}, --memory is "
        f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(peak)}"
    )


def _widest(what: SweepInput, workers: int) -> int | None:
    """Columns of each worker's block, in as few passes as fit; None: not even one column does."""
    n_columns = what.recording.n_columns
    least, second = (sweep_peak_bytes(what, columns, workers) for columns in (1, 2))
    if least > what.recording.memory_bytes:
        return None
    # bytes grow evenly with the columns: no wider block than this fits, and so no fewer passes do
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
    operations = (4 * len(FORMS) * (given.n_columns - done) + 2 * what.most_rows * len(blocks)) * values
    read = len(blocks) * given.n_rows * given.n_features * given.item_bytes
    # once over the adjoints each step, there and back
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
        reading=Reading(what.most_rows, given.n_features),
        peak_bytes=sweep_peak_bytes(what, width, workers),
        read_bytes=read,
        written_bytes=what.n_values * given.n_columns * 4,
        operations=operations,
        picoseconds=picoseconds,
    )


def sweep_peak_bytes(what: SweepInput, columns: int, workers: int) -> int:
    """Upper bound of a process's memory while each of its workers carries `columns` columns."""
    given = what.recording
    threads = min(given.threads, workers) if given.processes else workers
    # test gradients as stored and multiplied out, for means all of them
    tests = given.n_tests if given.grouped else columns
    start = tests * (given.n_features * given.test_item_bytes + what.width * 4 + given.n_blocks * 4)
    carried = _STATES * len(FORMS) * columns * what.width * 4 + _TILE_BYTES
    # sums, what is written of them, and its bytes
    sums = what.n_values * columns * 4 * 3
    # three files of rows, and one on its way there: as stored twice, scale, sample and curvature
    file = given.shard_rows * (2 * given.n_features * given.item_bytes + given.n_blocks * 4 * 2 + 32)
    files = (3 + what.most_rows // given.shard_rows) * file * max(1, len(given.part_rows))
    # a step: as stored, multiplied out, and that of the step after it; products in float64 and float32
    step = what.most_rows * (given.n_features * (given.item_bytes + 8) + 3 * what.width * 4 + 8 * 4 * columns * len(FORMS))
    gram = (6 + len(FORMS)) * what.most_rows**2 * 8
    return common_bytes(given, 0) + threads * (start + carried + sums + files + step + gram)
