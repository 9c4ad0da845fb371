"""How a reduction goes through the store: in which order it works, what it takes at once, and the memory and the work that is.

R(i, j) = sum_t w(t) <r(i, t), h_j>, a weighted sum over rows, can be taken in two orders.

- *Score first*: the product of every row with every test sample, then sums by sample. A *pass* reads every row once and answers one
  block of test samples. 2 x rows x features x tests operations.
- *Fold first*: sums of weighted rows by sample, the *hypergradients*, then one product. A pass reads every row once and folds the
  rows of one block of samples; it answers all test samples. As many times fewer operations as a sample has rows. What is factored
  cannot be summed as factors, and is scored first also then.

Hypergradients that were kept answer other test samples by the product alone, *from hypergradients*; what is factored was kept row
by row, and is scored.

In a pass each worker goes through a run of whole shards and adds to a partial sum of its own. Which order, and in how many passes,
is chosen by the time that bytes and operations take (`COSTS`), among those that fit the budget.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from hydra_pipe.errors import BudgetError, UsageError
from hydra_pipe.plan.costs import BASE_BYTES, COSTS
from hydra_pipe.plan.parts import rows_of_shards, shard_start
from hydra_pipe.units import format_bytes

# those after the first three are of sweeps, of what they have kept, and of linear systems: see plan/sweeping.py, plan/answering.py
# and plan/solving.py
Order = Literal[
    "score first", "fold first", "from hypergradients", "backward", "forward", "from the matrix", "by samples", "by features"
]
BACKWARD: Literal["backward"] = "backward"
FORWARD: Literal["forward"] = "forward"
FROM_MATRIX: Literal["from the matrix"] = "from the matrix"
BY_SAMPLES: Literal["by samples"] = "by samples"
BY_FEATURES: Literal["by features"] = "by features"
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
# Over the store, of folding: nobody waits for more.
MOST_PASSES = 2**16


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
        keeping: whether hypergradients are to be kept, which folds them first.
        kept: whether there are kept ones, from which it can be answered without the rows.
        processes: whether they are in processes of their own; the budget is that of each then.
        threads: workers in one of these, at most.
        base_bytes: what the process takes before and beside all that is counted here.
        part_rows: rows of each part, where several processes recorded one each; they come one after the other.
        shards: numbers of the shards that are read, counted over all parts, ascending; None: all of them.
        folds: whether sums of rows by sample answer it.
        norms: whether norms of rows are taken too.
        checkpoints: of how many the test gradients are used.
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
    keeping: bool = False
    kept: bool = False
    processes: bool = False
    threads: int = 1
    base_bytes: int = BASE_BYTES
    part_rows: tuple[int, ...] = ()
    shards: tuple[int, ...] | None = None
    folds: bool = True
    norms: bool = False
    checkpoints: int = 1

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

    order: Order
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


@dataclass(frozen=True)
class ReductionPlan:
    """The plan, as a value.

    Args:
        order: of the work.
        test_blocks: first and one past the last test sample that are answered together. Score first: one pass each.
        sample_blocks: first and one past the last sample that are summed together. Fold first: one pass each; else one block.
        row_runs: first and one past the last row of each worker's run, whole shards, of one part or more.
        reading: what a worker decodes at a time.
        peak_bytes: an upper bound of the memory that the process takes, of each where there are several.
        read_bytes: decoded bytes that go through the workers, over all passes.
        written_bytes: of the result, before compression.
        moved_bytes: of partial sums, at most, that go from one worker to another.
        operations: of matrix products: two for each pair of values.
        folded_values: added to sums by sample.
        picoseconds: of one worker's time that all of it is worth, see `Costs`.
    """

    order: Order
    test_blocks: tuple[Span, ...]
    sample_blocks: tuple[Span, ...]
    row_runs: tuple[Span, ...]
    reading: Reading
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    moved_bytes: int
    operations: int
    folded_values: int
    picoseconds: int

    @property
    def lasting_picoseconds(self) -> int:
        """Until all workers are done."""
        return self.picoseconds // len(self.row_runs) + self.read_bytes * COSTS.fetched_byte

    @property
    def passes(self) -> int:
        """Times that the store is read, by all workers together."""
        if self.order in (BACKWARD, FORWARD):
            return -(-len(self.test_blocks) // len(self.row_runs))
        if self.order == BY_SAMPLES:
            return len(self.sample_blocks) + len(self.test_blocks)
        if self.order == BY_FEATURES:
            return 1 + len(self.test_blocks)
        return len(self.sample_blocks) if self.order == "fold first" else len(self.test_blocks)

    @property
    def tasks(self) -> int:
        """Of the Dask graphs of all passes, those that read or write: a run of rows each, or a share of the samples."""
        if self.order in (BACKWARD, FORWARD):
            return len(self.test_blocks)
        if self.order == FROM_MATRIX:
            return self.passes * len(self.row_runs)
        if self.order in (BY_SAMPLES, BY_FEATURES):
            return 1
        runs = len(self.row_runs)
        shares = (min(runs, -(-(last - first) // SAMPLE_MULTIPLE)) for first, last in self.sample_blocks)
        of_blocks = sum(runs + n_shares for n_shares in shares)
        return of_blocks if self.order == "fold first" else self.passes * of_blocks


def parse_chunks(text: str) -> tuple[int, int] | None:
    """(rows, features) of "ROWSxFEATURES"; None for "auto".

    Raises:
        UsageError: neither.
    """
    if text == "auto":
        return None
    rows, x, features = text.partition("x")
    if not (x and rows.isdecimal() and features.isdecimal() and int(rows) > 0 and int(features) > 0):
        raise UsageError(f"--chunks {text} is not ROWSxFEATURES: write two positive numbers such as 2048x4096, or auto")
    return int(rows), int(features)


def plan_reduction(given: ReductionInput, chunks: tuple[int, int] | None, answered: Answered | None = None) -> ReductionPlan:
    """The plan that takes least time of those that fit the budget.

    Args:
        given: sizes and budget.
        chunks: rows and features to decode at once, rounded up to whole stored chunks; None: chosen.
        answered: go on after that, in that order.

    Raises:
        BudgetError: not even one block of test samples fits; the message has both numbers and a way out.
    """
    candidates = _as_asked(chunks, given) if chunks else readings(given)
    orders: dict[Order, Callable[[ReductionInput, Sequence[Reading], int], ReductionPlan | None]]
    orders = {"score first": _scoring, "fold first": _folding}
    if given.kept or given.keeping:
        orders = {"from hypergradients": _from_kept} if given.kept else {"fold first": _folding}
    chosen = [plan for order, plan in orders.items() if answered is None or order == answered.order]
    # each worker has sums of its own: fewer of them may take fewer passes
    ways = [(plan, replace(given, workers=n)) for n in _worker_counts(given) for plan in chosen]
    found = [(plan(few, candidates, 0), plan, few) for plan, few in ways]
    fitting = [(whole, plan, few) for whole, plan, few in found if whole is not None]
    if fitting:
        # as if nothing was done yet: going on divides the work as the interrupted reduction did, or sums would be rounded otherwise
        whole, plan, few = min(fitting, key=lambda way: way[0].lasting_picoseconds)
        left = plan(few, candidates, answered.done) if answered is not None else None
        return left or whole
    alone = replace(given, workers=1)
    needed = _least_bytes(alone, candidates[-1])
    smallest = readings(given)[-1]
    least = _least_bytes(alone, smallest)
    advice = f"raise --memory to {suggested(needed)}"
    if least <= given.memory_bytes:
        advice = f"lower --chunks to {smallest.rows}x{smallest.features} or {advice}"
    raise BudgetError(
        f"decoding {candidates[-1].rows}x{candidates[-1].features} (rows x features) at once with one worker needs "
        f"{format_bytes(needed)}, --memory is {format_bytes(given.memory_bytes)}: {advice}"
    )


def scoring_peak_bytes(given: ReductionInput, reading: Reading, tests: int) -> int:
    """Upper bound of a process's memory, score first, with blocks of `tests` test samples."""
    columns = given.n_columns if given.grouped else tests
    # a worker has the test gradients of one checkpoint: others may have those of others
    others = min(given.checkpoints, _threads(given)) - 1
    sums = given.n_samples * columns * 4
    # the scores, a product, one of groups, what is added to the sums, and the two factors of a block that is not complete yet
    scores = reading.rows * (4 * tests + 2 * columns) * 4
    # one more sum: the block of the relevance array that is being written
    return (
        common_bytes(given, tests)
        + others * _test_bytes(given, tests)
        + _threads(given) * (sums + scores + worker_bytes(given, reading))
        + sums
        + _merging_bytes(given, sums)
    )


def folding_peak_bytes(given: ReductionInput, reading: Reading, samples: int, tests: int) -> int:
    """Upper bound of a process's memory, fold first, blocks of `samples` samples, answered for `tests` test samples at once."""
    scored = given.n_columns if given.n_factored else 0
    sums = samples * (given.n_folding + scored) * 4
    # a tile of rows beside its sums; scores of what is factored as above, for every test sample
    at_once = reading.rows * (4 * given.n_folding + (4 * given.n_tests + 2 * scored if given.n_factored else 0)) * 4
    # what is answered at a time, and the same compressed; the test block where it is not the one of the pass
    answers = min(SAMPLE_MULTIPLE, samples) * tests * 4 * 2
    tests_held = given.n_tests if given.n_factored else tests
    # a shard of what is factored, in pieces, together, and compressed
    keeping = 3 * given.shard_rows * (given.n_factored * given.item_bytes + given.n_blocks * 4 + 8) if given.keeping else 0
    return (
        common_bytes(given, tests_held)
        + _threads(given) * (sums + at_once + answers + keeping + worker_bytes(given, reading))
        + _merging_bytes(given, sums)
    )


def kept_peak_bytes(given: ReductionInput, reading: Reading, tests: int) -> int:
    """Upper bound of a process's memory, from hypergradients, with blocks of `tests` test samples."""
    # a file of sums as it is read: its bytes and its values, and what comes of them
    folded = min(given.n_samples, SAMPLE_MULTIPLE) * (2 * given.n_folding + tests) * 4
    return scoring_peak_bytes(given, reading, tests) + folded


def _least_bytes(given: ReductionInput, reading: Reading) -> int:
    """What no plan that reads so can do without."""
    tests, samples = test_widths(given)[-1], min(given.n_samples, SAMPLE_MULTIPLE)
    if given.kept:
        return kept_peak_bytes(given, reading, tests)
    if given.keeping:
        return folding_peak_bytes(given, reading, samples, tests)
    least = scoring_peak_bytes(given, reading, tests)
    return min(least, folding_peak_bytes(given, reading, samples, tests)) if given.n_folding and given.folds else least


def _threads(given: ReductionInput) -> int:
    """Workers in one process."""
    return given.threads if given.processes else given.workers


def _merging_bytes(given: ReductionInput, sums: int) -> int:
    """Of a process while sums are added up: what comes from others, and what it adds up to, beside the sums of its own."""
    return 2 * given.threads * sums if given.processes else 0


def common_bytes(given: ReductionInput, tests: int) -> int:
    """Of a process, whatever its threads are."""
    # flags of each block twice, settings of each group and of each series, weights: all blocks may differ
    steps = given.n_steps * (given.n_blocks * (10 + 8 * 8 + 2 * 8) + given.n_groups * 6 * 8 + _STEP_OBJECT_BYTES)
    # the last row of each sample, and while these are looked for their steps; a million samples and steps at a time
    last = 0 if given.shards is None else given.n_samples * 3 * 8 + min(given.n_rows, 2**20) * 5 * 8
    return given.base_bytes + steps + last + _test_bytes(given, tests)


def _test_bytes(given: ReductionInput, tests: int) -> int:
    """Test gradients as stored, and decoded; groups."""
    return tests * (given.n_features * (given.test_item_bytes + 2 * 4) + given.grouped * given.n_columns * 4)


def worker_bytes(given: ReductionInput, reading: Reading) -> int:
    """Of a thread that reads and decodes."""
    features = min(reading.features, given.n_features)
    whole_features = -(-given.n_features // given.chunk_features) * given.chunk_features
    # two files, of bytes that do not compress; a stored value may take a little more then
    files = 2 * (given.shard_rows * whole_features * given.item_bytes * 17 // 16 + 2**16)
    # one chunk apart from the rows, where they are not whole chunks
    decoded = (reading.rows * features + given.chunk_rows * given.chunk_features) * given.item_bytes
    converted = reading.rows * features * 4 * (1 + given.norms)
    # some of the rows, apart from the others
    decoded += 0 if given.shards is None else reading.rows * features * given.item_bytes
    # of a whole file: scales and weights of each block, these in float64 on the way; sample, step and order of each row
    scales = given.shard_rows * (given.n_blocks * (4 + 8 + 8 + 4) + 32) + reading.rows * 32
    return files + decoded + converted + scales


def _scoring(given: ReductionInput, candidates: Sequence[Reading], done: int) -> ReductionPlan | None:
    """Score first, in as few passes as fit: a pass decodes the whole store, so that comes before the better way of reading."""
    for width in test_widths(given):
        for reading in candidates:
            peak = scoring_peak_bytes(given, reading, width)
            if peak <= given.memory_bytes:
                blocks = _spans(done, given.n_tests, width)
                sums = given.n_samples * (given.n_columns if given.grouped else given.n_tests) * 4
                operations = 2 * given.n_read * given.n_tests * (given.n_features + given.grouped * given.n_columns)
                return _plan(given, "score first", blocks, ((0, given.n_samples),), reading, peak, sums, operations, 0)
    return None


def _folding(given: ReductionInput, candidates: Sequence[Reading], done: int) -> ReductionPlan | None:
    """Fold first, in as few passes as fit."""
    if not given.folds or (not given.n_folding and not given.keeping):
        return None
    scored = given.n_columns if given.n_factored else 0
    for samples in _sample_widths(given.n_samples):
        if given.n_samples > samples * MOST_PASSES:
            return None
        for reading in candidates:
            for tests in test_widths(given):
                peak = folding_peak_bytes(given, reading, samples, tests)
                if peak <= given.memory_bytes:
                    operations = 2 * given.n_rows * given.n_tests * (given.n_factored + (scored if given.grouped else 0))
                    operations += 2 * given.n_samples * given.n_folding * given.n_columns
                    sums = given.n_samples * (given.n_folding + scored) * 4
                    folded = given.n_rows * given.n_folding
                    blocks = _spans(0, given.n_tests, tests)
                    return _plan(
                        given, "fold first", blocks, _spans(done, given.n_samples, samples), reading, peak, sums, operations, folded
                    )
    return None


def _from_kept(given: ReductionInput, candidates: Sequence[Reading], done: int) -> ReductionPlan | None:
    """From kept hypergradients, in as few passes over them as fit."""
    for width in test_widths(given):
        for reading in candidates:
            peak = kept_peak_bytes(given, reading, width)
            if peak <= given.memory_bytes:
                sums = given.n_samples * (given.n_columns if given.grouped else given.n_tests) * 4
                operations = 2 * given.n_rows * given.n_tests * (given.n_factored + given.grouped * given.n_columns)
                operations += 2 * given.n_samples * given.n_folding * given.n_columns
                blocks = _spans(done, given.n_tests, width)
                return _plan(given, "from hypergradients", blocks, ((0, given.n_samples),), reading, peak, sums, operations, 0)
    return None


def _plan(
    given: ReductionInput,
    order: Order,
    test_blocks: tuple[Span, ...],
    sample_blocks: tuple[Span, ...],
    reading: Reading,
    peak: int,
    sums: int,
    operations: int,
    folded: int,
) -> ReductionPlan:
    runs = _row_runs(given)
    passes = len(sample_blocks) if order == "fold first" else len(test_blocks)
    values = passes * given.n_read * (given.n_factored if order == "from hypergradients" else given.n_features)
    read = values * given.item_bytes
    if order == "from hypergradients":
        read += passes * given.n_samples * given.n_folding * 4
    # fold first: rows of other samples are decoded, but not converted
    converted = given.n_rows * given.n_features if order == "fold first" else values
    moved = sums * (len(runs) - 1) if given.processes else 0
    kept = given.n_samples * given.n_folding * 4 + given.n_rows * given.n_factored * given.item_bytes if given.keeping else 0
    picoseconds = (
        read * COSTS.decoded_byte
        + converted * COSTS.converted_value
        + folded * COSTS.folded_value
        + operations * COSTS.operation
        + moved * COSTS.moved_byte
        + sums * len(runs) * COSTS.touched_byte
    )
    return ReductionPlan(
        order=order,
        test_blocks=test_blocks,
        sample_blocks=sample_blocks,
        row_runs=runs,
        reading=reading,
        peak_bytes=peak,
        read_bytes=read,
        written_bytes=given.n_samples * given.n_columns * 4 + kept,
        moved_bytes=moved,
        operations=operations,
        folded_values=folded,
        picoseconds=picoseconds,
    )


def _row_runs(given: ReductionInput) -> tuple[Span, ...]:
    parts, n_shards = given.part_rows or (given.n_rows,), _n_shards(given)
    firsts = [i * n_shards // given.workers for i in range(given.workers)]
    shards = firsts if given.shards is None else [given.shards[first] for first in firsts]
    return tuple(pairwise([*(shard_start(shard, parts, given.shard_rows) for shard in shards), given.n_rows]))


def _n_shards(given: ReductionInput) -> int:
    if given.shards is not None:
        return len(given.shards)
    return sum(-(-n_rows // given.shard_rows) for n_rows in given.part_rows or (given.n_rows,))


def _worker_counts(given: ReductionInput) -> Iterator[int]:
    """All that have a shard to read, then half as many each time."""
    workers = min(given.workers, _n_shards(given))
    while workers:
        yield workers
        workers //= 2


def _spans(start: int, end: int, width: int) -> tuple[Span, ...]:
    return tuple((first, min(first + width, end)) for first in range(start, end, width))


def _as_asked(chunks: tuple[int, int], given: ReductionInput) -> list[Reading]:
    rows, features = chunks
    whole_features = min(-(-features // given.chunk_features) * given.chunk_features, given.n_features)
    return [Reading(min(-(-rows // given.chunk_rows) * given.chunk_rows, given.shard_rows), whole_features)]


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


def _sample_widths(n_samples: int) -> Iterator[int]:
    """Samples folded at once, the preferred first: all, then even shares in whole multiples, of twice as many blocks each time."""
    blocks = 1
    while True:
        width = -(-n_samples // blocks)
        width = min(n_samples, -(-width // SAMPLE_MULTIPLE) * SAMPLE_MULTIPLE)
        yield width
        if width <= SAMPLE_MULTIPLE:
            return
        blocks *= 2


def suggested(n_bytes: int) -> str:
    """A budget, as an option takes it."""
    return f"{-(-n_bytes // 2**20)}MiB"
