"""How an export goes over the relevance: what is in memory at once, how the tables are divided, and the memory that is.

How tables are divided into row groups and files depends on the sizes alone, never on the budget: the same relevance gives the same
bytes. The budget decides how many columns are read at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import suggested
from hydra_pipe.units import format_bytes

# Rows of a row group, where whole test samples make so many: DuckDB's unit of work has 122,880, and a row group is what
# any tool can skip.
GROUP_ROWS = 2**17
FILE_ROWS = 2**24
# Up to so many samples columns are held whole; beyond, a test sample of matrix/ is a file of its own, in row groups of a slab.
MOST_WHOLE, SLAB_SAMPLES = 2**20, 2**18
# Of the relevance in one piece, where the budget has room: more makes nothing faster.
BLOCK_BYTES = 64 * 2**20
# Two blocks: one is ranked and written while the next is read.
_BLOCKS = 2
# a sample: its sum, its rank and what sorting takes, visits, class and relevance for itself; a cell of the table of classes
_SAMPLE_BYTES, _CELL_BYTES = 56, 80
# a ranked pair while it is found, sorted, and put into a table; a row of matrix/ that is encoded
_RANKED_BYTES, _PAIR_BYTES = 120, 48
# a value of a column that is ranked, were all of them the same
_TIED_BYTES = 40
# of the relevance array: a file and its content, decoded
_SCRATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ExportInput:
    """What an export works on.

    Args:
        n_samples, n_tests: of the relevance array.
        top: ranked pairs a side.
        full: whether every pair is written.
        n_cells: of the table of classes.
        chunk_tests: columns of a chunk of the array.
        base_bytes: of the process, before.
        memory_bytes: the budget.
    """

    n_samples: int
    n_tests: int
    top: int
    full: bool
    n_cells: int
    chunk_tests: int
    base_bytes: int
    memory_bytes: int

    @property
    def ranked(self) -> int:
        """Pairs of one test sample that are ranked, at most."""
        return 2 * min(self.top, self.n_samples)


@dataclass(frozen=True)
class ExportPlan:
    """How it is done.

    Args:
        slab_samples: samples of a block; all of them, but where these are very many.
        block_tests: test samples of a block.
        group_tests, file_tests: of a row group and of a file of matrix/. A block has whole row groups.
        ranking_group_tests, ranking_file_tests: likewise of the rankings.
        peak_bytes: upper bound of the process's memory.
    """

    slab_samples: int
    block_tests: int
    group_tests: int
    file_tests: int
    ranking_group_tests: int
    ranking_file_tests: int
    peak_bytes: int

    def blocks(self, n_samples: int, n_tests: int) -> Iterator[tuple[slice, slice]]:
        """Test samples and training samples of each block, in order: all slabs of some test samples, then the next."""
        return _divided(n_samples, n_tests, self.slab_samples, self.block_tests)


def plan_export(given: ExportInput) -> ExportPlan:
    """The plan with the largest blocks that fit the budget.

    Raises:
        BudgetError: not even the smallest do; the message has both numbers and a way out.
    """
    slab = _slab(given.n_samples)
    group = power_of_two(GROUP_ROWS // given.n_samples)
    column_bytes = 4 * slab + given.ranked * _RANKED_BYTES
    width = _widest(slab == given.n_samples, max(given.chunk_tests, group), column_bytes)
    while (peak := _peak_bytes(given, slab, width, group)) > given.memory_bytes:
        if width == group:
            raise BudgetError(
                f"exporting {given.n_samples:,} samples x {given.n_tests:,} tests, {given.top:,} ranked a side, needs "
                f"{format_bytes(peak)}, --memory is {format_bytes(given.memory_bytes)}: raise --memory to {suggested(peak)}"
            )
        # fewer columns than a chunk of the array has: the others are read again
        width = max(group, width // 2)
    ranking_group = power_of_two(GROUP_ROWS // given.ranked)
    return ExportPlan(
        slab_samples=slab,
        block_tests=width,
        group_tests=group,
        file_tests=group * max(1, FILE_ROWS // (group * given.n_samples)) if slab == given.n_samples else 1,
        ranking_group_tests=ranking_group,
        ranking_file_tests=ranking_group * max(1, FILE_ROWS // (ranking_group * given.ranked)),
        peak_bytes=peak,
    )


def blocks_to_add(n_samples: int, n_tests: int, chunk_tests: int) -> Iterator[tuple[slice, slice]]:
    """Blocks for whoever adds up the relevance, ranks nothing and has no budget: an export's slabs, so its sums, in whole chunks.

    Two of them, one that is added up while the next is read, take 512 MiB at most.

    Args:
        n_samples, n_tests: of the relevance array.
        chunk_tests: columns of a chunk of it.

    Returns:
        As `ExportPlan.blocks`.
    """
    slab = _slab(n_samples)
    return _divided(n_samples, n_tests, slab, _widest(slab == n_samples, chunk_tests, 4 * slab))


def _divided(n_samples: int, n_tests: int, slab_samples: int, block_tests: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, n_tests, block_tests):
        for low in range(0, n_samples, slab_samples):
            yield slice(first, min(first + block_tests, n_tests)), slice(low, min(low + slab_samples, n_samples))


def _slab(n_samples: int) -> int:
    return n_samples if n_samples <= MOST_WHOLE else SLAB_SAMPLES


def power_of_two(n: int) -> int:
    """The largest up to `n`; 1 where there is none."""
    return 1 << max(0, n.bit_length() - 1)


def _widest(whole: bool, least: int, column_bytes: int) -> int:
    """Test samples of a block where memory is no object: a power of two, so whole row groups of matrix/ and chunks of the array.

    Args:
        whole: a block has whole columns.
        least: test samples, at least.
        column_bytes: of a block, for each of them.
    """
    least = 1 << (least - 1).bit_length()
    return max(least, power_of_two(BLOCK_BYTES // column_bytes)) if whole else least


def _peak_bytes(given: ExportInput, slab: int, width: int, group: int) -> int:
    tests = min(width, given.n_tests)
    blocks = _BLOCKS * 4 * slab * tests + _TIED_BYTES * slab + _SCRATCH_BYTES
    ranked = (tests + power_of_two(GROUP_ROWS // given.ranked)) * given.ranked * _RANKED_BYTES
    encoded = min(group, given.n_tests) * slab * _PAIR_BYTES if given.full else 0
    kept = given.n_samples * _SAMPLE_BYTES + given.n_cells * _CELL_BYTES
    return given.base_bytes + blocks + ranked + encoded + kept
