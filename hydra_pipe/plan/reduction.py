"""How a reduction goes through the store: which test samples at once, which rows at once, and the memory that takes.

A *pass* reads every row once and answers one block of test samples. In a pass each worker goes through a run of whole
shards. It reads some rows, by choice a whole shard, scores a few of them at a time, and adds to a partial sum of its own,
shape (sample, test of the block).
"""

from dataclasses import dataclass
from itertools import pairwise

from hydra_pipe.errors import BudgetError, UsageError
from hydra_pipe.plan.parts import shard_start
from hydra_pipe.units import format_bytes

# Python with NumPy, Zarr and Dask loaded, the codecs' own buffers, and what the allocator keeps: measured, rounded up.
BASE_BYTES = 192 * 2**20
# The same without Python and its modules, for a process that holds other things already (torch, a data set).
OVERHEAD_BYTES = 96 * 2**20
# of one step while its weights are computed: eight settings as Python objects, and the list that holds each
_STEP_OBJECT_BYTES = 8 * (32 + 8) + 40
# Rows enough to make the matrix product worth its name; more only take memory.
GOOD_ROWS = 2048
# Blocks of test samples are a multiple of this, so that each fills whole chunks of the relevance array.
TEST_MULTIPLE = 64


@dataclass(frozen=True)
class ReductionInput:
    """What a reduction works on.

    Args:
        n_rows, n_features, n_samples, n_tests, n_steps, n_blocks, n_groups: sizes of the recording.
        item_bytes, test_item_bytes: of one stored value of a row, and of a test gradient.
        shard_rows, chunk_rows, chunk_features: as the rows are stored.
        memory_bytes: the budget.
        workers: threads that compute at once.
        base_bytes: what the process takes before and beside all that is counted here.
        part_rows: rows of each part, where several processes recorded one each; they come one after the other.
    """

    n_rows: int
    n_features: int
    n_samples: int
    n_tests: int
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
    base_bytes: int = BASE_BYTES
    part_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a worker has in its hands.

    Args:
        read_rows, read_features: read at a time, in whole stored chunks; a whole shard is read fastest.
        score_rows: of these, decoded to float32 and multiplied at a time.
    """

    read_rows: int
    read_features: int
    score_rows: int


@dataclass(frozen=True)
class ReductionPlan:
    """The plan, as a value.

    Args:
        test_blocks: first and one past the last test sample of each pass.
        row_runs: first and one past the last row of each worker's run, whole shards, of one part or more.
        reading: what a worker reads and scores at a time.
        peak_bytes: an upper bound of the memory that the process takes.
        read_bytes: decoded bytes that go through the workers, over all passes.
    """

    test_blocks: tuple[tuple[int, int], ...]
    row_runs: tuple[tuple[int, int], ...]
    reading: "Reading"
    peak_bytes: int
    read_bytes: int


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


def plan_reduction(given: ReductionInput, chunks: tuple[int, int] | None) -> ReductionPlan:
    """Choose passes and chunks that fit the budget: as few passes as possible, then the preferred way of reading.

    Args:
        given: sizes and budget.
        chunks: rows and features to read at once, rounded up to whole stored chunks; None: chosen.

    Raises:
        BudgetError: not even one block of test samples fits; the message has both numbers and a way out.
    """
    candidates = _as_asked(chunks, given) if chunks else _readings(given)
    # a pass decodes the whole store: fewer passes come before the better way of reading
    for width in _test_widths(given.n_tests):
        for reading in candidates:
            if peak_bytes(given, reading, width) <= given.memory_bytes:
                return _plan(given, reading, width)
    needed = peak_bytes(given, candidates[-1], 1)
    smallest = _readings(given)[-1]
    least = peak_bytes(given, smallest, 1)
    advice = f"raise --memory to {_suggested(needed)}"
    if least <= given.memory_bytes:
        advice = f"lower --chunks to {smallest.read_rows}x{smallest.read_features} or {advice}"
    raise BudgetError(
        f"reading {candidates[-1].read_rows}x{candidates[-1].read_features} (rows x features) at once with {given.workers} "
        f"workers needs {format_bytes(needed)}, --memory is {format_bytes(given.memory_bytes)}: {advice}"
    )


def peak_bytes(given: ReductionInput, reading: Reading, tests: int) -> int:
    """Upper bound of the process's memory with blocks of `tests` test samples."""
    sums = given.n_samples * tests * 4
    features = min(reading.read_features, given.n_features)
    # as the caller gets it, and in the codec's hands the file's bytes and what comes of them
    stored = 3 * reading.read_rows * features * given.item_bytes
    decoded = reading.score_rows * features * 4
    # the scores, one product, and the two factors of a block that is not complete yet
    scores = 4 * reading.score_rows * tests * 4
    # scales and weights of each block; sample, step and order of each row
    scales = reading.read_rows * (given.n_blocks * (4 + 8 + 4) + 32)
    # test gradients as stored, and decoded
    test_block = tests * given.n_features * (given.test_item_bytes + 2 * 4)
    # flags of each block twice, settings of each group and of each series, weights: all blocks may differ
    steps = given.n_steps * (given.n_blocks * (10 + 8 * 8 + 2 * 8) + given.n_groups * 6 * 8 + _STEP_OBJECT_BYTES)
    # one more sum: the block of the relevance array that is being written
    return given.base_bytes + steps + test_block + given.workers * (sums + stored + decoded + scores + scales) + sums


def _plan(given: ReductionInput, reading: Reading, width: int) -> ReductionPlan:
    blocks = tuple((first, min(first + width, given.n_tests)) for first in range(0, given.n_tests, width))
    parts = given.part_rows or (given.n_rows,)
    n_shards = sum(-(-n_rows // given.shard_rows) for n_rows in parts)
    runs = min(given.workers, n_shards)
    bounds = [shard_start(i * n_shards // runs, parts, given.shard_rows) for i in range(runs)] + [given.n_rows]
    return ReductionPlan(
        test_blocks=blocks,
        row_runs=tuple(pairwise(bounds)),
        reading=reading,
        peak_bytes=peak_bytes(given, reading, width),
        read_bytes=len(blocks) * given.n_rows * given.n_features * given.item_bytes,
    )


def _as_asked(chunks: tuple[int, int], given: ReductionInput) -> list[Reading]:
    rows, features = chunks
    whole_features = min(-(-features // given.chunk_features) * given.chunk_features, given.n_features)
    whole_rows = min(-(-rows // given.chunk_rows) * given.chunk_rows, given.shard_rows)
    return _scored(whole_rows, whole_features)


def _readings(given: ReductionInput) -> list[Reading]:
    """The preferred first: whole shards; then fewer rows; then a chunk's width."""
    narrow = min(given.chunk_features, given.n_features)
    halves = []
    rows = given.shard_rows
    while rows >= given.chunk_rows:
        halves.append(rows)
        rows //= 2
    widths = [given.n_features] if narrow == given.n_features else [given.n_features, narrow]
    return [reading for width in widths for r in halves for reading in _scored(r, width)]


def _scored(rows: int, features: int) -> list[Reading]:
    """What is read at a time, scored in fewer and fewer rows."""
    return [Reading(rows, features, r) for r in dict.fromkeys(min(rows, n) for n in (GOOD_ROWS, GOOD_ROWS // 4, GOOD_ROWS // 16))]


def _test_widths(n_tests: int) -> list[int]:
    """Test samples at once, the preferred first: all, then fewer in whole multiples, then as few as need be."""
    multiples = range(n_tests // TEST_MULTIPLE * TEST_MULTIPLE, 0, -TEST_MULTIPLE)
    few = [w for w in (32, 16, 8, 4, 2, 1) if w < min(n_tests, TEST_MULTIPLE)]
    return [n_tests, *(w for w in multiples if w < n_tests), *few]


def _suggested(n_bytes: int) -> str:
    return f"{-(-n_bytes // 2**20)}MiB"
