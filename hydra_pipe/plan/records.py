"""What every plan of a reduction is made from, and what it says: sizes, a budget, what was done before."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hydra_pipe.plan.costs import BASE_BYTES, COSTS
from hydra_pipe.plan.geometry import chunk_columns
from hydra_pipe.plan.parts import rows_of_shards

Span = tuple[int, int]
# what a pass has found, for the manifest: by name
Found = dict[str, float]

# of one step while its weights are computed: eight settings as Python objects, and the list that holds each
_STEP_OBJECT_BYTES = 8 * (32 + 8) + 40
# Decoded float32 rows at a time: enough to make the matrix product worth its name, few enough to stay in the cache.
GOOD_BYTES = 8 * 2**20
# Blocks of test samples are a multiple of this, so that each fills whole chunks of the relevance array.
TEST_MULTIPLE = 64
# Blocks of samples, likewise.
SAMPLE_MULTIPLE = 4096
# Test samples that are multiplied out at a time.
TESTS_AT_ONCE = 64


@dataclass(frozen=True)
class ReductionInput:
    """What a reduction works on.

    Args:
        n_rows, n_features, n_samples, n_tests, n_steps, n_blocks, n_groups: sizes of the recording.
        n_columns: of the result: the test samples, or groups of them.
        grouped: whether they are groups.
        n_folding: features that can be summed by sample: those of blocks that are not factored.
        item_bytes, test_item_bytes: of one stored value of a row, and of a test gradient.
        shard_rows, chunk_rows, chunk_features: as the rows are stored.
        memory_bytes: the budget.
        workers: that compute at once.
        processes: whether they are in processes of their own; the budget is that of each then.
        threads: workers in one of these, at most.
        base_bytes: what the process takes before and beside all that is counted here.
        part_rows: rows of each part, where several processes recorded one each; they come one after the other.
        shards: numbers of the shards that are read, counted over all parts, ascending; None: all of them.
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

    @property
    def n_read(self) -> int:
        """Rows of the shards that are read."""
        if self.shards is None:
            return self.n_rows
        return rows_of_shards(self.shards, self.part_rows or (self.n_rows,), self.shard_rows)

    @property
    def n_factored(self) -> int:
        """Features of factored blocks."""
        return self.n_features - self.n_folding


@dataclass(frozen=True)
class Answered:
    """What an interrupted reduction has done.

    Args:
        order: in which it worked.
        done: test samples or, fold first, samples, from the first on.
        base_bytes: of its process, as `ReductionInput` has it: by it the work was divided.
        found: what each pass has found, by name.
    """

    order: str
    done: int
    base_bytes: int
    found: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a worker decodes at a time, in whole stored chunks.

    Args:
        rows, features: at once.
    """

    rows: int
    features: int


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """How a reduction is computed, as a value. Each solver has a plan of its own kind.

    Args:
        order: order of the work, in words.
        workers: workers that compute at once.
        peak_bytes: upper bound of the memory of the process, of each where there are several.
        read_bytes: decoded bytes that go through the workers, over all passes.
        written_bytes: size of the result, before compression.
        moved_bytes: partial sums, at most, that go from one worker to another.
        operations: operations of matrix products: two for each pair of values.
        folded_values: values that are added to sums by sample.
        picoseconds: time of one worker that all of it is worth, see `Costs`.
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
        """The first and one past the last of what is done together."""

    @property
    def width(self) -> int:
        """Size of the first block."""
        first, last = self.blocks[0]
        return last - first

    @property
    def noun(self) -> str:
        """The word for what is in `blocks`."""
        return "test samples"

    @property
    @abstractmethod
    def passes(self) -> int:
        """Times that the store is read, by all workers together."""

    @property
    @abstractmethod
    def tasks(self) -> int:
        """Tasks of the Dask graphs of all passes that read or write."""

    @abstractmethod
    def chunk_width(self, n_groups: int | None) -> int:
        """Columns of a chunk of the result; `n_groups` columns are groups of test samples, where groups are asked for."""

    @abstractmethod
    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        """Whether blocks begin where chunks of the result do."""

    @property
    def lasting_picoseconds(self) -> int:
        """Time until all workers are done."""
        return self.picoseconds // self.workers + self.read_bytes * COSTS.fetched_byte

    def facts(self) -> dict[str, Any]:
        """The plan, for the manifest: of spans, their number."""
        found = {name: len(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return found | {"passes": self.passes, "tasks": self.tasks}


@dataclass(frozen=True, kw_only=True)
class ReadingPlan(Plan):
    """A plan that decodes what is stored.

    Args:
        reading: what a worker decodes at a time.
    """

    reading: Reading


@dataclass(frozen=True, kw_only=True)
class RowPlan(ReadingPlan):
    """A plan that goes over rows, and answers blocks of test samples.

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
    """Of a process, whatever its threads are."""
    # flags of each block twice, settings of each group and of each series, weights: all blocks may differ
    steps = given.n_steps * (given.n_blocks * (10 + 8 * 8 + 2 * 8) + given.n_groups * 6 * 8 + _STEP_OBJECT_BYTES)
    # the last row of each sample, and while these are looked for their steps; a million samples and steps at a time
    last = 0 if given.shards is None else given.n_samples * 3 * 8 + min(given.n_rows, 2**20) * 5 * 8
    return given.base_bytes + steps + last + bytes_of_tests(given, tests)


def bytes_of_tests(given: ReductionInput, tests: int) -> int:
    """Test gradients as stored, and decoded; groups."""
    return tests * (given.n_features * (given.test_item_bytes + 2 * 4) + given.grouped * given.n_columns * 4)


def worker_bytes(given: ReductionInput, reading: Reading, *, norms: bool = False) -> int:
    """Of a thread that reads and decodes, and takes norms of what it has read."""
    features = min(reading.features, given.n_features)
    whole_features = -(-given.n_features // given.chunk_features) * given.chunk_features
    # two files, of bytes that do not compress; a stored value may take a little more then
    files = 2 * (given.shard_rows * whole_features * given.item_bytes * 17 // 16 + 2**16)
    # one chunk apart from the rows, where they are not whole chunks
    decoded = (reading.rows * features + given.chunk_rows * given.chunk_features) * given.item_bytes
    converted = reading.rows * features * 4 * (1 + norms)
    # some of the rows, apart from the others
    decoded += 0 if given.shards is None else reading.rows * features * given.item_bytes
    # of a whole file: scales and weights of each block, these in float64 on the way; sample, step and order of each row
    scales = given.shard_rows * (given.n_blocks * (4 + 8 + 8 + 4) + 32) + reading.rows * 32
    return files + decoded + converted + scales


def readings(given: ReductionInput) -> list[Reading]:
    """The preferred first: as many rows as stay in the cache; then fewer; then a chunk's width."""
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
    """Test samples at once, the preferred first: all, then fewer in whole multiples, then as few as need be."""
    n_tests = given.n_tests
    if given.grouped:  # groups are answered together
        return [n_tests]
    multiples = range(n_tests // TEST_MULTIPLE * TEST_MULTIPLE, 0, -TEST_MULTIPLE)
    few = [w for w in (32, 16, 8, 4, 2, 1) if w < min(n_tests, TEST_MULTIPLE)]
    return [n_tests, *(w for w in multiples if w < n_tests), *few]


def spans(start: int, end: int, width: int) -> tuple[Span, ...]:
    """Blocks of `width` that together are [start, end)."""
    return tuple((first, min(first + width, end)) for first in range(start, end, width))
