"""Sizes of what a report reads at once. Integers only."""

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import suggested
from hydra_pipe.units import format_bytes

# A larger piece is not faster.
BLOCK_BYTES = 64 * 2**20
# Bytes of a pair: as read, by columns, in order of class, and in order of class in float64.
PAIR_BYTES = 4 + 4 + 4 + 8
# Bytes of a training sample: its sum, visits, label and class, and the memory of ranking one
# column.
SAMPLE_BYTES = 120
# Bytes of a row of the dynamics: its sample, step and visit, several times. Bytes of a number of
# it, as read and in order of sample.
ROW_BYTES, NUMBER_BYTES = 64, 8
# Bytes of a pair of sample and class, as many pairs as are held, and of a pair of classes.
CHANCE_BYTES, MOST_CHANCES, CONFUSION_BYTES = 40, 2**23, 40
# Bytes of the similarities and chances of samples that are held at once, and of their order.
BLOCKS_BYTES = 192 * 2**20


def block_columns(n_samples: int, n_columns: int, base_bytes: int, memory_bytes: int) -> int:
    """Return the number of columns of the relevance, shape (sample, column), to read at once.

    Args:
        n_samples, n_columns: shape of the relevance.
        base_bytes: memory of the process without relevance, with the pipeline and its data.
        memory_bytes: budget of the process.

    Raises:
        BudgetError: there is no room for one column.
    """
    least = base_bytes + n_samples * (SAMPLE_BYTES + PAIR_BYTES)
    if least > memory_bytes:
        raise BudgetError(
            f"a report on {n_samples:,} training samples needs {format_bytes(least)}, "
            f"{format_bytes(base_bytes)} of them for the "
            f"program and the pipeline's data, the budget is {format_bytes(memory_bytes)}: raise "
            f"--memory to {suggested(least)}"
        )
    room = memory_bytes - base_bytes - n_samples * SAMPLE_BYTES
    return max(1, min(n_columns, room // (n_samples * PAIR_BYTES), BLOCK_BYTES // (n_samples * 4)))


def judging_bytes(n_samples: int, n_visits: int, n_classes: int, n_numbers: int) -> int:
    """Return the bytes that the judgement of labels needs at most.

    Args:
        n_samples: number of training samples.
        n_visits: number of visits of a sample.
        n_classes: number of classes.
        n_numbers: number of numbers of the dynamics at a visit.
    """
    a_visit = ROW_BYTES + NUMBER_BYTES * n_numbers
    chances = CHANCE_BYTES * min(n_samples * n_classes, MOST_CHANCES)
    return BLOCKS_BYTES + n_samples * n_visits * a_visit + chances + CONFUSION_BYTES * n_classes**2
