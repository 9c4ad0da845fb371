"""Plan of combining runs: how many columns of all runs are in memory at once."""

from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import suggested
from hydra_pipe.plan.records import spans
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes

# Bytes of a sample while samples are matched by keys: two digests, their order, and ids.
_MATCHED_BYTES = 64
# Bytes of a sample: labels, visits, and the sums of one column with what is computed from them.
_SAMPLE_BYTES = 160
# Bytes of a pair: its sums over the runs, and then its mean, error and count, before and after
# they are rounded. Bytes of a pair that are written: mean and standard error in float32, a count.
_PAIR_BYTES, _WRITTEN_BYTES = 48, 9
# Bytes of a value that is read from a run, as stored and in the order of the combination.
_VALUE_BYTES = 8
# One file of a relevance array, as stored and decoded.
_SCRATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class CombiningInput:
    """Sizes and budget of a combination.

    Args:
        rows: number of samples of each run.
        n_samples, n_columns: numbers of samples and columns of all runs together.
        chunk_tests: columns of a chunk of the result, at most.
        base_bytes: memory of the process before the combination.
        memory_bytes: the budget.
    """

    rows: tuple[int, ...]
    n_samples: int
    n_columns: int
    chunk_tests: int
    base_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class CombiningPlan:
    """Columns of all runs that are combined together.

    Args:
        n_columns: number of columns.
        width: number of columns at once.
        peak_bytes: upper bound of the memory of the process.
        read_bytes, written_bytes: decoded bytes that are read and written.
    """

    n_columns: int
    width: int
    peak_bytes: int
    read_bytes: int
    written_bytes: int

    def blocks(self, done: int) -> tuple[Span, ...]:
        """Return the columns of each block that is left after the first `done` columns."""
        return spans(done, self.n_columns, self.width)


def plan_combining(what: CombiningInput) -> CombiningPlan:
    """Plan a combination.

    Raises:
        BudgetError: not even one column fits the budget.
    """
    kept = what.base_bytes + _SCRATCH_BYTES
    kept += what.n_samples * (_SAMPLE_BYTES + 8 * len(what.rows))
    matching = what.base_bytes + _MATCHED_BYTES * (what.n_samples + max(what.rows))
    of_column = what.n_samples * _PAIR_BYTES + max(what.rows) * _VALUE_BYTES
    least = max(kept + of_column, matching)
    if least > what.memory_bytes:
        raise BudgetError(
            f"combining {what.n_samples:,} samples of {len(what.rows)} runs needs "
            f"{format_bytes(least)}, the budget is {format_bytes(what.memory_bytes)}: raise "
            f"--memory to {suggested(least)}"
        )
    width = min(what.n_columns, (what.memory_bytes - kept) // of_column)
    if what.chunk_tests < width < what.n_columns:
        width -= width % what.chunk_tests
    return CombiningPlan(
        what.n_columns,
        width,
        max(kept + width * of_column, matching),
        4 * sum(what.rows) * what.n_columns,
        _WRITTEN_BYTES * what.n_samples * what.n_columns,
    )
