"""Input and output of every plan of a reduction: sizes, a budget, work done before, the plan."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hydra_pipe.plan.chunking import chunk_columns
from hydra_pipe.plan.costs import BASE_BYTES, COSTS
from hydra_pipe.plan.rank_rows import rows_of_shards
from hydra_pipe.types import Span

# Results of a pass for the manifest, by name.
Found = dict[str, float]

# Bytes of a step while its weights are computed: eight settings as Python objects, and their
# entries in lists.
_STEP_OBJECT_BYTES = 8 * (32 + 8) + 40
# Bytes of float32 rows that are decoded at a time: enough for a fast matrix product, few enough
# to stay in the cache.
GOOD_BYTES = 8 * 2**20
# A block of test samples is a multiple of TEST_MULTIPLE. So it fills whole chunks of the
# relevance array.
TEST_MULTIPLE = 64
# A block of samples is a multiple of SAMPLE_MULTIPLE, for the same reason.
SAMPLE_MULTIPLE = 4096
# Samples that are ranked at a time. Bytes of a pair of the result, and of a pair while it is
# ranked, joined with others and written. Bytes of the lists of a column, and of a value of a
# column that is ranked, if all values are the same.
RANKED_SAMPLES = 2**14
PAIR_BYTES, _RANKED_BYTES, _LISTS_BYTES, _TIED_BYTES = 12, 72, 1024, 40
# Number of test samples that are multiplied out at a time.
TESTS_AT_ONCE = 64


@dataclass(frozen=True)
class ReductionInput:
    """Sizes of a recording, and the budget and workers of a reduction.

    Args:
        n_rows, n_features, n_samples, n_tests, n_steps, n_blocks, n_groups: sizes of the recording.
        n_columns: columns of the result: the test samples, or groups of test samples.
        grouped: True if the columns are groups of test samples.
        n_folding: number of features that can be summed by sample: features of blocks that are not
            factored.
        item_bytes, test_item_bytes: bytes of one stored value of a row, and of a test gradient.
        shard_rows, chunk_rows, chunk_features: shapes of the stored rows.
        memory_bytes: the budget. With `processes`, each process has this budget.
        workers: number of workers that compute at once.
        processes: True if the workers are in processes of their own.
        threads: most workers in one process.
        base_bytes: memory that the process takes before and beside everything that a plan counts.
        part_rows: rows of each part, if several processes recorded one part each. The parts come
            one after the other.
        shards: numbers of the shards that are read, counted over all parts, ascending. None: all.
        top: number of samples on each side that the result has of each column. None: all samples.
    """

    n_rows: int
    n_features: int
    n_folding: int
    n_samples: int
    n_tests: int
    n_columns: int
    n_steps: int
    n_blocks: int
    n_groups: int
    item_bytes: int
    test_item_bytes: int
    shard_rows: int
    chunk_rows: int
    chunk_features: int
    memory_bytes: int
    workers: int
    grouped: bool = False
    processes: bool = False
    threads: int = 1
    base_bytes: int = BASE_BYTES
    part_rows: tuple[int, ...] = ()
    shards: tuple[int, ...] | None = None
    top: int | None = None

    def result_bytes(self, n_values: int) -> int:
        """Return the bytes of the result, before compression.

        Args:
            n_values: number of values of each column, if all of them are written.
        """
        if self.top is None:
            return n_values * self.n_columns * 4
        return 2 * self.top * self.n_columns * PAIR_BYTES

    @property
    def n_read(self) -> int:
        """Number of rows of the shards that are read."""
        if self.shards is None:
            return self.n_rows
        return rows_of_shards(self.shards, self.part_rows or (self.n_rows,), self.shard_rows)

    @property
    def n_factored(self) -> int:
        """Number of features of factored blocks."""
        return self.n_features - self.n_folding


@dataclass(frozen=True)
class Answered:
    """Work that an interrupted reduction has done.

    Args:
        order: order in which it worked.
        done: number of test samples, from the first on. Fold first: number of training samples.
        base_bytes: memory of its process, as in `ReductionInput`. It decided the division of work.
        found: results of each pass, by name.
    """

    order: str
    done: int
    base_bytes: int
    found: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Rows and features that a worker decodes at a time, in whole stored chunks.

    Args:
        rows, features: size of the piece.
    """

    rows: int
    features: int


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """A plan of a reduction, as a value. Each solver has a plan class of its own.

    Args:
        order: order of the work, in words.
        workers: workers that compute at once.
        peak_bytes: upper bound of the memory of the process. Several processes have it each.
        read_bytes: decoded bytes that go through the workers, over all passes.
        written_bytes: size of the result, before compression.
        moved_bytes: upper bound of the partial sums that go from one worker to another.
        operations: operations of matrix products: two for each pair of values.
        folded_values: values that are added to sums by sample.
        picoseconds: time that one worker would take for all of the work, see `Costs`.
    """

    order: str
    workers: int
    peak_bytes: int
    read_bytes: int = 0
    written_bytes: int
    moved_bytes: int = 0
    operations: int = 0
    folded_values: int = 0
    picoseconds: int = 0

    @property
    @abstractmethod
    def blocks(self) -> tuple[Span, ...]:
        """Spans of the items that are done together: the first, and one past the last."""

    @property
    def width(self) -> int:
        """Size of the first block."""
        first, last = self.blocks[0]
        return last - first

    @property
    def noun(self) -> str:
        """Word for the items of `blocks`."""
        return "test samples"

    @property
    @abstractmethod
    def passes(self) -> int:
        """Number of times that the store is read, by all workers together."""

    @property
    @abstractmethod
    def tasks(self) -> int:
        """Number of tasks that read or write, in the Dask graphs of all passes."""

    @abstractmethod
    def chunk_width(self, n_groups: int | None) -> int:
        """Return the columns of a chunk of the result.

        Args:
            n_groups: number of columns if groups of test samples are asked for, else None.
        """

    @abstractmethod
    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        """Tell whether blocks begin where chunks of the result begin."""

    @property
    def lasting_picoseconds(self) -> int:
        """Time until all workers are done."""
        return self.picoseconds // self.workers + self.read_bytes * COSTS.fetched_byte

    def facts(self) -> dict[str, Any]:
        """Return the plan for the manifest. A tuple of spans is given as its length."""
        found = {
            name: len(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return found | {"passes": self.passes, "tasks": self.tasks}


@dataclass(frozen=True, kw_only=True)
class ReadingPlan(Plan):
    """A plan that decodes stored values.

    Args:
        reading: size of the piece that a worker decodes at a time.
    """

    reading: Reading


@dataclass(frozen=True, kw_only=True)
class RowPlan(ReadingPlan):
    """A plan that goes over rows and answers blocks of test samples.

    Args:
        test_blocks: first and one past the last test sample that are answered together.
    """

    test_blocks: tuple[Span, ...]

    def chunk_width(self, n_groups: int | None) -> int:
        return self.test_blocks[0][1] if n_groups is None else n_groups

    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        return grouped or all(first % chunks[1] == 0 for first, _ in self.test_blocks)


@dataclass(frozen=True, kw_only=True)
class ColumnPlan(Plan):
    """A plan whose passes answer blocks of columns of the result.

    Args:
        columns: first and one past the last column of each block.
    """

    columns: tuple[Span, ...]

    @property
    def blocks(self) -> tuple[Span, ...]:
        return self.columns

    def chunk_width(self, n_groups: int | None) -> int:
        return chunk_columns(self.columns[0][1])

    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        return all(first % chunks[1] == 0 for first, _ in self.columns)


def common_bytes(given: ReductionInput, tests: int) -> int:
    """Return the bytes of a process, whatever its threads do.

    Args:
        given: sizes of the recording.
        tests: number of test samples whose gradients are held.
    """
    # Flags of each block twice, settings of each group and of each series, weights. The worst
    # case: every block is a series of its own.
    steps = given.n_steps * (
        given.n_blocks * (10 + 8 * 8 + 2 * 8) + given.n_groups * 6 * 8 + _STEP_OBJECT_BYTES
    )
    # The last row of each sample. While last rows are looked for, the steps of a million rows at
    # a time.
    last = 0 if given.shards is None else given.n_samples * 3 * 8 + min(given.n_rows, 2**20) * 5 * 8
    return given.base_bytes + steps + last + bytes_of_tests(given, tests)


def bytes_of_tests(given: ReductionInput, tests: int) -> int:
    """Return the bytes of `tests` test gradients, stored and decoded, and of the groups."""
    return tests * (
        given.n_features * (given.test_item_bytes + 2 * 4) + given.grouped * given.n_columns * 4
    )


def ranking_bytes(given: ReductionInput, columns: int) -> int:
    """Return the bytes of a thread that ranks the samples of `columns` columns.

    0 if all samples are written.
    """
    if given.top is None:
        return 0
    slab = min(given.n_samples, RANKED_SAMPLES) * (4 * columns + _TIED_BYTES)
    return slab + columns * (2 * given.top * _RANKED_BYTES + _LISTS_BYTES)


def worker_bytes(given: ReductionInput, reading: Reading, *, norms: bool = False) -> int:
    """Return the bytes of a thread that reads and decodes rows.

    Args:
        given: sizes of the recording.
        reading: rows and features that are decoded at a time.
        norms: True if the thread also takes norms of the rows.
    """
    features = min(reading.features, given.n_features)
    whole_features = -(-given.n_features // given.chunk_features) * given.chunk_features
    # Two files, in the worst case that the values do not compress. A stored value may then take
    # a little more.
    files = 2 * (given.shard_rows * whole_features * given.item_bytes * 17 // 16 + 2**16)
    # One more chunk, in case the rows are not whole chunks.
    decoded = (reading.rows * features + given.chunk_rows * given.chunk_features) * given.item_bytes
    converted = reading.rows * features * 4 * (1 + norms)
    # A copy of the rows that count, if not all rows count.
    decoded += 0 if given.shards is None else reading.rows * features * given.item_bytes
    # For a whole file: scales and weights of each block, weights also in float64 on the way, and
    # sample, step and order of each row.
    scales = given.shard_rows * (given.n_blocks * (4 + 8 + 8 + 4) + 32) + reading.rows * 32
    return files + decoded + converted + scales


def readings(given: ReductionInput) -> list[Reading]:
    """Return the readings to try, the preferred first.

    As many rows as stay in the cache come first, then fewer rows, then the width of a chunk.
    """
    narrow = min(given.chunk_features, given.n_features)
    widths = [given.n_features] if narrow == given.n_features else [given.n_features, narrow]
    return [Reading(rows, width) for width in widths for rows in _row_counts(given, width)]


def _row_counts(given: ReductionInput, width: int) -> Iterator[int]:
    rows = given.shard_rows
    while rows > given.chunk_rows and rows * width * 4 > GOOD_BYTES:
        rows //= 2
    while rows >= given.chunk_rows:
        yield rows
        rows //= 2


def test_widths(given: ReductionInput) -> list[int]:
    """Return numbers of test samples at once, the preferred first.

    All come first, then fewer in whole multiples of `TEST_MULTIPLE`, then 32, 16, ... 1.
    """
    n_tests = given.n_tests
    if given.grouped:  # groups are answered together
        return [n_tests]
    multiples = range(n_tests // TEST_MULTIPLE * TEST_MULTIPLE, 0, -TEST_MULTIPLE)
    few = [w for w in (32, 16, 8, 4, 2, 1) if w < min(n_tests, TEST_MULTIPLE)]
    return [n_tests, *(w for w in multiples if w < n_tests), *few]


def spans(start: int, end: int, width: int) -> tuple[Span, ...]:
    """Return the blocks of `width` that together are [start, end)."""
    return tuple((first, min(first + width, end)) for first in range(start, end, width))
