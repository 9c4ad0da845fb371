"""How a linear system over the last rows is made and solved: as large as the samples, or as the features, whichever are fewer.

*By samples* the matrix has the products of each two rows. Rows are held block by block, for each of which the rows from there on
are read once; then once more for each block of test samples. *By features* the matrix is a sum over the rows, which are read once
for it, and once more for each block of test samples. One worker does it all, with all threads of BLAS.
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
    Span,
    common_bytes,
    readings,
    spans,
    test_widths,
    worker_bytes,
)
from hydra_pipe.units import format_bytes

# rows that are held at a time, at least
_LEAST_ROWS = 64


@dataclass(frozen=True)
class SolveInput:
    """What a linear system is made of.

    Args:
        recording: sizes, budget and workers.
        width: features, those of factored blocks multiplied out.
        n_last: samples that have a row, of which the last one counts.
    """

    recording: ReductionInput
    width: int
    n_last: int

    @property
    def by_features(self) -> bool:
        """Whether the matrix is of features by features."""
        return self.width <= self.n_last

    @property
    def size(self) -> int:
        """Lines of the matrix."""
        return min(self.width, self.n_last)


@dataclass(frozen=True, kw_only=True)
class InfluencePlan(RowPlan):
    """How the linear system is made and solved.

    Args:
        by_features: whether the matrix is of features by features, or of samples by samples.
        held_blocks: first and one past the last row that are held together; of no meaning by features.
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
    """The plan with the fewest passes that fits the budget.

    Raises:
        BudgetError: the matrix does not fit, with one test sample.
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
    least = solving_peak_bytes(what, readings(given)[-1], list(_held_widths(what))[-1], test_widths(given)[-1])
    kind = "features" if what.by_features else "samples"
    raise BudgetError(
        f"a matrix of {what.size:,} x {what.size:,} {kind} needs {format_bytes(least)} until it is solved, --memory is "
        f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(least)}, or use --method hydra-fisher"
    )


def solving_peak_bytes(what: SolveInput, reading: Reading, held: int, tests: int) -> int:
    """Upper bound of a process's memory, with `held` rows held at a time, and blocks of `tests` test samples."""
    given = what.recording
    columns = given.n_columns if given.grouped else tests
    matrix = what.size**2 * 8
    # scores, a product, two factors of a block that is not complete yet, means; all of it in float64 on its way into the matrix
    scores = reading.rows * (6 * max(held, tests) + 2 * columns) * 4
    # its copy, and right sides: as they are made, in float64, in the order that LAPACK wants, solved
    solving = 2 * matrix + what.size * columns * (4 + 4 * 8)
    if what.by_features:
        expanded = reading.rows * what.width * 4 * 3
        # a product in float32, on its way into the matrix
        building = matrix + matrix // 2 + expanded
        multiplied_out = TESTS_AT_ONCE * (given.n_features * given.test_item_bytes + what.width * 4 + given.n_blocks * 8)
        solving += multiplied_out
        answering = matrix + what.width * columns * 4 + expanded
    else:
        building = matrix + held * (given.n_features * (given.item_bytes + 2 * 4) + given.n_blocks * 4 * 4)
        answering = matrix
    # of all samples, and what is written of it
    answers = 2 * given.n_samples * columns * 4
    return common_bytes(given, tests) + worker_bytes(given, reading) + scores + answers + max(building, solving, answering)


def _held_widths(what: SolveInput) -> Iterator[int]:
    """Rows held at a time, the preferred first; of no meaning where the matrix is of features."""
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
        # each block with the rows from it on
        building, answering = n**2 * given.n_features, 2 * given.n_read * given.n_tests * given.n_features
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
        written_bytes=given.n_samples * given.n_columns * 4,
        operations=operations,
        picoseconds=read * COSTS.decoded_byte + values * COSTS.converted_value + operations * COSTS.operation,
    )
