"""Plan of answers from a matrix of hypergradients that a sweep has kept: R = H h.

No row is read. A pass holds the test gradients of some columns, multiplied out. It goes over the
whole matrix, tile by tile. Each worker takes a share of the samples.
"""

from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import MOST_FEATURES, even_width
from hydra_pipe.plan.costs import COSTS, suggested
from hydra_pipe.plan.records import (
    SAMPLE_MULTIPLE,
    TESTS_AT_ONCE,
    ColumnPlan,
    Reading,
    ReadingPlan,
    ReductionInput,
    ranking_bytes,
    spans,
)
from hydra_pipe.units import format_bytes


@dataclass(frozen=True)
class AnswerInput:
    """Sizes and budget of the answers.

    Args:
        recording: sizes, budget and workers.
        width: features of the matrix.
    """

    recording: ReductionInput
    width: int


@dataclass(frozen=True, kw_only=True)
class FromMatrixPlan(ColumnPlan, ReadingPlan):
    """Plan of the columns of each pass. In a pass every worker goes over a share of the samples."""

    @property
    def passes(self) -> int:
        return len(self.columns)

    @property
    def tasks(self) -> int:
        return self.passes * self.workers


def plan_answers(what: AnswerInput, done: int = 0) -> FromMatrixPlan:
    """Return the plan with the fewest passes that fit the budget, after the first `done` columns.

    Raises:
        BudgetError: not even one column fits.
    """
    given = what.recording
    for passes in range(1, given.n_columns + 1):
        width = min(even_width(given.n_columns, passes), given.n_columns)
        if answer_peak_bytes(what, width, 1) <= given.memory_bytes:
            workers = next(
                n
                for n in range(_most_workers(given), 0, -1)
                if answer_peak_bytes(what, width, n) <= given.memory_bytes
            )
            return _plan(what, width, workers, done)
    peak = answer_peak_bytes(what, 1, 1)
    raise BudgetError(
        f"answering one column from hypergradients of {what.width:,} features needs "
        f"{format_bytes(peak)}, --memory is "
        f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(peak)}"
    )


def _most_workers(given: ReductionInput) -> int:
    return min(given.workers, -(-given.n_samples // SAMPLE_MULTIPLE))


def _plan(what: AnswerInput, width: int, workers: int, done: int) -> FromMatrixPlan:
    given = what.recording
    blocks = spans(done, given.n_columns, width)
    read = len(blocks) * given.n_samples * what.width * 4
    operations = 2 * given.n_samples * what.width * (given.n_columns - done)
    converted = given.n_tests * what.width
    return FromMatrixPlan(
        order="from the matrix",
        columns=blocks,
        workers=workers,
        reading=Reading(min(SAMPLE_MULTIPLE, given.n_samples), min(MOST_FEATURES, what.width)),
        peak_bytes=answer_peak_bytes(what, width, workers),
        read_bytes=read,
        written_bytes=given.result_bytes(given.n_samples),
        operations=operations,
        picoseconds=read * COSTS.decoded_byte
        + operations * COSTS.operation
        + converted * COSTS.converted_value,
    )


def answer_peak_bytes(what: AnswerInput, columns: int, workers: int) -> int:
    """Return an upper bound of a process's memory while each worker answers `columns` columns."""
    given = what.recording
    threads = min(given.threads, workers) if given.processes else workers
    samples = min(SAMPLE_MULTIPLE, given.n_samples)
    # The test gradients that are held, and the groups. On the way there, some test gradients as
    # stored and multiplied out.
    tests = columns * what.width * 4 + given.grouped * given.n_tests * given.n_columns * 4
    tests += TESTS_AT_ONCE * (
        given.n_features * (given.test_item_bytes + 4) + 2 * what.width * 4 + given.n_blocks * 4
    )
    # A tile as stored, and decoded. It is decoded twice where the request is not whole chunks.
    tile = 3 * samples * min(MOST_FEATURES, what.width) * 4
    # Sums, a product, and the values to write, plain and compressed.
    answers = 4 * samples * columns * 4
    ranked = ranking_bytes(given, columns)
    # The rankings of all workers meet in one process.
    meeting = given.processes * workers * ranked
    return given.base_bytes + tests + threads * (tile + answers + ranked) + meeting
