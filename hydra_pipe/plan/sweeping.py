"""How a backward sweep goes over the store: which columns are carried together, and the memory and the work that is.

A sweep reads the rows from the last step to the first and carries, for each column of the result and each form
of the curvature, an adjoint and a momentum adjoint as long as a row. Blocks of columns do not depend on each other: each worker
takes one, and reads the rows for itself. Where not all of them fit the budget at once, they come one after the other, in passes.
The matrix of hypergradients is the sweep of every feature, as a test gradient; or, of every training sample, one that goes forward.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from hydra_pipe.errors import BudgetError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.costs import COSTS
from hydra_pipe.plan.reduction import (
    BACKWARD,
    FORWARD,
    Answered,
    Reading,
    ReductionInput,
    ReductionPlan,
    common_bytes,
    suggested,
)
from hydra_pipe.units import format_bytes

# arrays that are carried: the adjoint, that of the momentum, and what is written of them when they are kept
_STATES = 4
# of a worker, tiles of them that it is at
_TILE_BYTES = 2**23
# columns of a chunk of the relevance array; samples and features of a file of the matrix
MOST_CHUNK, MOST_SAMPLES, MOST_FEATURES = 64, 4096, 1024


@dataclass(frozen=True)
class SweepInput:
    """What a sweep works on.

    Args:
        recording: sizes, budget and workers.
        width: features that are carried: those of factored blocks multiplied out.
        most_rows: of a step.
        order: of the steps.
        n_values: of each column of the result.
        most_chunk: columns of a chunk of it, at most.
    """

    recording: ReductionInput
    width: int
    most_rows: int
    n_values: int
    order: Literal["backward", "forward"] = BACKWARD
    most_chunk: int = MOST_CHUNK


def of_features(what: SweepInput) -> SweepInput:
    """The sweep of every feature."""
    given = replace(what.recording, n_columns=what.width, n_tests=what.width, grouped=False)
    return replace(what, recording=given, most_chunk=MOST_FEATURES)


def of_samples(what: SweepInput) -> SweepInput:
    """The forward sweep of every training sample."""
    n_samples = what.recording.n_samples
    given = replace(what.recording, n_columns=n_samples, n_tests=n_samples, grouped=False)
    return replace(what, recording=given, n_values=what.width, order=FORWARD, most_chunk=MOST_SAMPLES)


def plan_matrix(what: SweepInput, answered: Answered | None = None) -> tuple[SweepInput, ReductionPlan]:
    """What is swept for the matrix of hypergradients, and how: the cheaper of the two, or what was begun where that still fits.

    Raises:
        BudgetError: not even one column fits.
    """
    fitting = []
    for way in (of_features(what), of_samples(what)):
        with suppress(BudgetError):
            fitting.append((_seconds(plan_sweep(way)), way))
    begun = [found for found in fitting if answered is not None and found[1].order == answered.order]
    _, way = min(begun or fitting, key=lambda found: found[0], default=(0, of_features(what)))
    return way, plan_sweep(way, answered.done if begun and answered is not None else 0)


def plan_sweep(what: SweepInput, done: int = 0) -> ReductionPlan:
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
        width, workers = min(ways, key=lambda way: _seconds(_plan(what, way[0], way[1], 0)))
        return _plan(what, width, workers, done)
    peak = sweep_peak_bytes(what, 1, 1)
    raise BudgetError(
        f"a sweep of one column over {what.width:,} features needs {format_bytes(peak)}, --memory is "
        f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(peak)}"
    )


def _seconds(plan: ReductionPlan) -> float:
    """For comparison. Of the last pass a worker may have no block: whole passes count."""
    return plan.picoseconds * plan.passes / len(plan.test_blocks)


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


def _plan(what: SweepInput, width: int, workers: int, done: int) -> ReductionPlan:
    given = what.recording
    blocks = tuple((first, min(first + width, given.n_columns)) for first in range(done, given.n_columns, width))
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
    return ReductionPlan(
        order=what.order,
        test_blocks=blocks,
        sample_blocks=((0, given.n_samples),),
        row_runs=((0, given.n_rows),) * workers,
        reading=Reading(what.most_rows, given.n_features),
        peak_bytes=sweep_peak_bytes(what, width, workers),
        read_bytes=read,
        written_bytes=what.n_values * given.n_columns * 4,
        moved_bytes=0,
        operations=operations,
        folded_values=0,
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


def even_width(n_columns: int, blocks: int, most: int = MOST_CHUNK) -> int:
    """Columns of each of so many blocks, that fill whole chunks of the result, of `most` columns at most."""
    width = -(-n_columns // blocks)
    return chunk_columns(width, most) * -(-width // most)


def chunk_columns(width: int, most: int = MOST_CHUNK) -> int:
    """Columns of a chunk of the result, of which there is a whole number in blocks of `width` columns."""
    return -(-width // -(-width // most))
