"""How much of the relevance a report reads at once. Integers only."""

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import suggested
from hydra_pipe.units import format_bytes

# More at once is not faster.
BLOCK_BYTES = 64 * 2**20
# Of a pair: it, it by columns, it in order of class, and that in float64.
PAIR_BYTES = 4 + 4 + 4 + 8
# Of a training sample: its sum, visits, label and class, and what ranking one column takes.
SAMPLE_BYTES = 120


def block_columns(n_samples: int, n_columns: int, base_bytes: int, memory_bytes: int) -> int:
    """Columns of the relevance, shape (sample, column), that are read at once.

    Args:
        n_samples, n_columns: of the relevance.
        base_bytes: that the process takes without it, the pipeline and its data among them.
        memory_bytes: budget of the process.

    Raises:
        BudgetError: there is no room for one column.
    """
    least = base_bytes + n_samples * (SAMPLE_BYTES + PAIR_BYTES)
    if least > memory_bytes:
        raise BudgetError(
            f"a report on {n_samples:,} training samples needs {format_bytes(least)}, {format_bytes(base_bytes)} of them for the "
            f"program and the pipeline's data, the budget is {format_bytes(memory_bytes)}: raise --memory to {suggested(least)}"
        )
    room = memory_bytes - base_bytes - n_samples * SAMPLE_BYTES
    return max(1, min(n_columns, room // (n_samples * PAIR_BYTES), BLOCK_BYTES // (n_samples * 4)))
