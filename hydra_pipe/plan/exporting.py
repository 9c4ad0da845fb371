"""Plan of an export: blocks of relevance in memory, files of the tables, peak memory.

The sizes alone decide how tables are divided into row groups and files, never the budget. So
the same relevance gives the same bytes. The budget decides how many columns are read at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.costs import suggested
from hydra_pipe.units import format_bytes

# Rows of a row group, if whole test samples fill one. DuckDB's unit of work has 122,880 rows,
# and any tool can skip a row group.
GROUP_ROWS = 2**17
FILE_ROWS = 2**24
# Up to MOST_WHOLE samples, columns are held whole. With more samples, each test sample of
# matrix/ is a file of its own, and each slab is a row group.
MOST_WHOLE, SLAB_SAMPLES = 2**20, 2**18
# Size of one block of the relevance, if the budget has room. A larger block is not faster.
BLOCK_BYTES = 64 * 2**20
# One block is ranked and written while the next block is read.
_BLOCKS = 2
# Bytes of a sample: its sum, its rank, the memory of sorting, visits, class and relevance for
# itself. Bytes of a cell of the table of classes.
_SAMPLE_BYTES, _CELL_BYTES = 56, 80
# Bytes of a sample's dynamics while they are added up, and of the rows that are read for them. No
# block of the relevance is held by then. So many samples at once, at least and at most; the rows
# are read once for each so many.
_DYNAMICS_BYTES, _ROWS_BYTES = 80, 32 * 2**20
_LEAST_DYNAMICS, MOST_DYNAMICS = 2**18, 2**24
# Bytes of a ranked pair while it is found, sorted, and put into a table. Bytes of a row of
# matrix/ that is encoded.
_RANKED_BYTES, _PAIR_BYTES = 120, 48
# Bytes of a value of a column that is ranked, in the worst case that all values are the same.
_TIED_BYTES = 40
# One file of the relevance array, as stored and decoded.
_SCRATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ExportInput:
    """Sizes and budget of an export.

    Args:
        n_samples, n_tests: rows and columns of the relevance array.
        top: number of ranked pairs a side.
        full: True if every pair is written.
        n_cells: number of cells of the table of classes.
        chunk_tests: columns of a chunk of the relevance array.
        base_bytes: memory of the process before the export.
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
        """Largest number of ranked pairs of one test sample."""
        return 2 * min(self.top, self.n_samples)


@dataclass(frozen=True)
class ExportPlan:
    """The division of the relevance into blocks, and of the tables into row groups and files.

    Args:
        slab_samples: samples of a block. A block has all samples unless these are very many.
        block_tests: test samples of a block. A block has whole row groups.
        group_tests, file_tests: test samples of a row group and of a file of matrix/.
        ranking_group_tests, ranking_file_tests: test samples of a row group and of a file of the
            rankings.
        dynamics_samples: samples whose dynamics are added up at once.
        peak_bytes: upper bound of the process's memory.
    """

    slab_samples: int
    block_tests: int
    group_tests: int
    file_tests: int
    ranking_group_tests: int
    ranking_file_tests: int
    dynamics_samples: int
    peak_bytes: int

    def blocks(self, n_samples: int, n_tests: int) -> Iterator[tuple[slice, slice]]:
        """Yield the test samples and the training samples of each block, in order.

        All slabs of some test samples come first, then the slabs of the next test samples.
        """
        return _divided(n_samples, n_tests, self.slab_samples, self.block_tests)


def plan_export(given: ExportInput) -> ExportPlan:
    """Return the plan with the largest blocks that fit the budget.

    Raises:
        BudgetError: the smallest blocks do not fit. The message has both numbers and a way out.
    """
    slab = _slab(given.n_samples)
    group = power_of_two(GROUP_ROWS // given.n_samples)
    column_bytes = 4 * slab + given.ranked * _RANKED_BYTES
    width = _widest(slab == given.n_samples, max(given.chunk_tests, group), column_bytes)
    while (peak := _peak_bytes(given, slab, width, group)) > given.memory_bytes:
        if width == group:
            raise BudgetError(
                f"exporting {given.n_samples:,} samples x {given.n_tests:,} tests, {given.top:,} "
                "ranked a side, needs "
                f"{format_bytes(peak)}, --memory is {format_bytes(given.memory_bytes)}: raise "
                f"--memory to {suggested(peak)}"
            )
        # A block may have fewer columns than a chunk of the array. Then the chunk is read again for
        # its other columns.
        width = max(group, width // 2)
    ranking_group, ranking_file = _ranking_tests(given)
    return ExportPlan(
        slab_samples=slab,
        block_tests=width,
        group_tests=group,
        file_tests=group * max(1, FILE_ROWS // (group * given.n_samples))
        if slab == given.n_samples
        else 1,
        ranking_group_tests=ranking_group,
        ranking_file_tests=ranking_file,
        dynamics_samples=_dynamics_samples(given),
        peak_bytes=peak,
    )


@dataclass(frozen=True)
class TopExportPlan:
    """The division of rankings that are kept as they are into row groups and files.

    Args:
        group_tests, file_tests: test samples of a row group and of a file. A row group is read at
            a time.
        peak_bytes: upper bound of the process's memory.
    """

    group_tests: int
    file_tests: int
    peak_bytes: int


def plan_top_export(given: ExportInput) -> TopExportPlan:
    """Return the plan of an export of top samples. Row groups are those of `plan_export`.

    Raises:
        BudgetError: a row group does not fit.
    """
    group, file = _ranking_tests(given)
    # A row group as it is read and put into a table, and the row group that is being written.
    peak = given.base_bytes + 2 * group * given.ranked * _RANKED_BYTES + _SCRATCH_BYTES
    if peak > given.memory_bytes:
        raise BudgetError(
            f"exporting the top {given.top:,} samples of {group:,} tests at once needs "
            f"{format_bytes(peak)}, --memory is {format_bytes(given.memory_bytes)}: raise --memory "
            f"to {suggested(peak)}"
        )
    return TopExportPlan(group, file, peak)


def _ranking_tests(given: ExportInput) -> tuple[int, int]:
    """Return the test samples of a row group and of a file of the rankings."""
    group = power_of_two(GROUP_ROWS // given.ranked)
    return group, group * max(1, FILE_ROWS // (group * given.ranked))


def blocks_to_add(n_samples: int, n_tests: int, chunk_tests: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks for a caller that adds up the relevance, ranks nothing and has no budget.

    The slabs are those of an export, so the sums are the same. Blocks have whole chunks. Two
    blocks take 512 MiB at most: one is added up while the next is read.

    Args:
        n_samples, n_tests: rows and columns of the relevance array.
        chunk_tests: columns of a chunk of the relevance array.

    Returns:
        Test samples and training samples of each block, in the order of `ExportPlan.blocks`.
    """
    slab = _slab(n_samples)
    return _divided(n_samples, n_tests, slab, _widest(slab == n_samples, chunk_tests, 4 * slab))


def _divided(
    n_samples: int, n_tests: int, slab_samples: int, block_tests: int
) -> Iterator[tuple[slice, slice]]:
    for first in range(0, n_tests, block_tests):
        for low in range(0, n_samples, slab_samples):
            yield (
                slice(first, min(first + block_tests, n_tests)),
                slice(low, min(low + slab_samples, n_samples)),
            )


def _slab(n_samples: int) -> int:
    return n_samples if n_samples <= MOST_WHOLE else SLAB_SAMPLES


def power_of_two(n: int) -> int:
    """Return the largest power of two up to `n`. It is 1 if `n` is less than 1."""
    return 1 << max(0, n.bit_length() - 1)


def _widest(whole: bool, least: int, column_bytes: int) -> int:
    """Return the test samples of a block if memory does not limit them.

    The number is a power of two. So a block has whole row groups of matrix/ and whole chunks of
    the array.

    Args:
        whole: True if a block has whole columns.
        least: least number of test samples.
        column_bytes: bytes of a block for each test sample.
    """
    least = 1 << (least - 1).bit_length()
    return max(least, power_of_two(BLOCK_BYTES // column_bytes)) if whole else least


def _peak_bytes(given: ExportInput, slab: int, width: int, group: int) -> int:
    tests = min(width, given.n_tests)
    blocks = _BLOCKS * 4 * slab * tests + _TIED_BYTES * slab + _SCRATCH_BYTES
    ranked = (tests + power_of_two(GROUP_ROWS // given.ranked)) * given.ranked * _RANKED_BYTES
    encoded = min(group, given.n_tests) * slab * _PAIR_BYTES if given.full else 0
    kept = given.n_samples * _SAMPLE_BYTES + given.n_cells * _CELL_BYTES
    dynamics = min(given.n_samples, _dynamics_samples(given)) * _DYNAMICS_BYTES + _ROWS_BYTES
    return given.base_bytes + kept + max(blocks + ranked + encoded, dynamics)


def _dynamics_samples(given: ExportInput) -> int:
    """Return the samples whose dynamics the budget has room for at once, a power of two."""
    kept = given.n_samples * _SAMPLE_BYTES + given.n_cells * _CELL_BYTES
    room = given.memory_bytes - given.base_bytes - kept - _ROWS_BYTES
    return min(MOST_DYNAMICS, max(_LEAST_DYNAMICS, power_of_two(max(room, 0) // _DYNAMICS_BYTES)))
