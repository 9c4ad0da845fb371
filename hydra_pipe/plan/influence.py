"""Plan of a linear system over the last rows. Its size is the number of samples or of features.

The smaller of the two numbers decides. *By samples*, the matrix has the product of each pair of
rows. Rows are held block by block. For each block, all rows from its first row on are read once.
All rows are read once more for each block of test samples. *By features*, the matrix is a sum
over the rows. The rows are read once for the matrix, and once more for each block of test
samples. One worker does all of it, with all threads of BLAS.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import COSTS, suggested
from hydra_pipe.plan.records import (
    TESTS_AT_ONCE,
    Reading,
    ReductionInput,
    RowPlan,
    common_bytes,
    ranking_bytes,
    readings,
    spans,
    test_widths,
    worker_bytes,
)
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes

# Least number of rows that are held at a time.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class SolveInput:
    """Sizes and budget of a linear system.

    Args:
        recording: sizes, budget and workers.
        width: number of features, with factored blocks multiplied out.
        n_last: number of samples that have a row. The last row of each sample counts.
    """

    recording: ReductionInput
    width: int
    n_last: int

    @property
    def by_features(self) -> bool:
        """True if the matrix is features by features."""
        return self.width <= self.n_last

    @property
    def size(self) -> int:
        """Number of lines of the matrix."""
        return min(self.width, self.n_last)


@dataclass(frozen=True, kw_only=True)
class InfluencePlan(RowPlan):
    """Plan to make and solve the linear system.

    Args:
        by_features: True if the matrix is features by features, False if samples by samples.
        held_blocks: first and one past the last row that are held together. Unused by features.
    """

    by_features: bool
    held_blocks: tuple[Span, ...]

    @property
    def blocks(self) -> tuple[Span, ...]:
        return self.test_blocks if self.by_features else self.held_blocks

    @property
    def noun(self) -> str:
        return "test samples" if self.by_features else "samples"

    @property
    def passes(self) -> int:
        return (1 if self.by_features else len(self.held_blocks)) + len(self.test_blocks)

    @property
    def tasks(self) -> int:
        return 1

    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        aligned = all(first % chunks[0] == 0 for first, _ in self.held_blocks)
        return aligned and super().fills(chunks, grouped=grouped)


def plan_solve(what: SolveInput) -> InfluencePlan:
    """Return the plan with the fewest passes that fits the budget.

    Raises:
        BudgetError: the matrix does not fit together with one test sample.
    """
    given = what.recording
    plans = (
        _plan(what, reading, held, tests)
        for tests in test_widths(given)
        for held in _held_widths(what)
        for reading in readings(given)
        if solving_peak_bytes(what, reading, held, tests) <= given.memory_bytes
    )
    found = next(plans, None)
    if found is not None:
        return found
    least = solving_peak_bytes(
        what, readings(given)[-1], list(_held_widths(what))[-1], test_widths(given)[-1]
    )
    kind = "features" if what.by_features else "samples"
    raise BudgetError(
        f"a matrix of {what.size:,} x {what.size:,} {kind} needs {format_bytes(least)} while it "
        f"is solved, --memory is {format_bytes(given.memory_bytes)}: raise --memory to "
        f"{suggested(least)}, or use --method hydra-fisher"
    )


def solving_peak_bytes(what: SolveInput, reading: Reading, held: int, tests: int) -> int:
    """Return an upper bound of a process's memory.

    Args:
        what: sizes and budget.
        reading: rows and features that are decoded at a time.
        held: rows that are held at a time.
        tests: test samples of a block.
    """
    given = what.recording
    columns = given.n_columns if given.grouped else tests
    matrix = what.size**2 * 8
    # Scores, a product, two factors of a block that is not complete yet, means. All of it once
    # more in float64 on its way into the matrix.
    scores = reading.rows * (6 * max(held, tests) + 2 * columns) * 4
    # A copy of the matrix. Right sides: as made, in float64, in LAPACK's order, solved.
    solving = 2 * matrix + what.size * columns * (4 + 4 * 8)
    if what.by_features:
        expanded = reading.rows * what.width * 4 * 3
        # A product in float32, on its way into the matrix.
        building = matrix + matrix // 2 + expanded
        multiplied_out = TESTS_AT_ONCE * (
            given.n_features * given.test_item_bytes + what.width * 4 + given.n_blocks * 8
        )
        solving += multiplied_out
        answering = matrix + what.width * columns * 4 + expanded
    else:
        building = matrix + held * (
            given.n_features * (given.item_bytes + 2 * 4) + given.n_blocks * 4 * 4
        )
        answering = matrix
    # Answers of all samples, and the copy that is written.
    answers = 2 * given.n_samples * columns * 4
    return (
        common_bytes(given, tests)
        + worker_bytes(given, reading)
        + scores
        + answers
        + ranking_bytes(given, columns)
        + max(building, solving, answering)
    )


def _held_widths(what: SolveInput) -> Iterator[int]:
    """Yield numbers of rows to hold at a time, the preferred first. Unused by features."""
    width = what.n_last
    while width > _LEAST_ROWS and not what.by_features:
        yield width
        width = -(-width // 2)
    yield max(1, width)


def _plan(what: SolveInput, reading: Reading, held: int, tests: int) -> InfluencePlan:
    given = what.recording
    test_blocks, n = spans(0, given.n_tests, tests), what.size
    columns = given.n_columns * len(test_blocks)
    if what.by_features:
        held_blocks: tuple[Span, ...] = ((0, what.n_last),)
        building, answering = what.n_last * n**2 * 2, 2 * what.n_last * n * given.n_columns
        read_rows = (1 + len(test_blocks)) * given.n_read
    else:
        held_blocks = spans(0, what.n_last, held)
        # Each block is multiplied with the rows from its first row on.
        building, answering = (
            n**2 * given.n_features,
            2 * given.n_read * given.n_tests * given.n_features,
        )
        read_rows = (len(held_blocks) + 2 * len(test_blocks) + 1) * given.n_read // 2
    operations = building + answering + 2 * n**3 // 3 * len(test_blocks) + 2 * n**2 * columns
    values = read_rows * given.n_features
    read = values * given.item_bytes
    return InfluencePlan(
        order="by features" if what.by_features else "by samples",
        workers=1,
        by_features=what.by_features,
        test_blocks=test_blocks,
        held_blocks=held_blocks,
        reading=reading,
        peak_bytes=solving_peak_bytes(what, reading, held, tests),
        read_bytes=read,
        written_bytes=given.result_bytes(given.n_samples),
        operations=operations,
        picoseconds=read * COSTS.decoded_byte
        + values * COSTS.converted_value
        + operations * COSTS.operation,
    )
