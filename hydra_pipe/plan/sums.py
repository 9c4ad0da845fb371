"""Plan of weighted sums over rows: the order, the pieces taken at once, the memory and the work.

R(i, j) = sum_t w(t) <r(i, t), h_j> is a weighted sum over rows. It can be taken in two orders.

- *Score first*: multiply every row with every test sample, then sum by sample. A *pass* reads
  every row once and answers one block of test samples. It takes
  2 x rows x features x tests operations.
- *Fold first*: sum weighted rows by sample, which gives the *hypergradients*, then multiply once.
  A pass reads every row once and folds the rows of one block of samples. It answers all test
  samples. It takes as many times fewer operations as a sample has rows. Factored blocks cannot be
  summed as factors. They are scored first here too.

Kept hypergradients answer other test samples by the product alone, *from hypergradients*. The
rows of factored blocks were kept one by one, and are scored.

In a pass each worker goes through a run of whole shards and adds to a partial sum of its own.
The time of bytes and operations (`COSTS`) decides the order and the number of passes, among the
plans that fit the budget.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hydra_pipe.errors import BudgetError, UsageError
from hydra_pipe.plan.costs import COSTS, suggested
from hydra_pipe.plan.rank_rows import shard_start
from hydra_pipe.plan.records import (
    SAMPLE_MULTIPLE,
    Answered,
    Reading,
    ReductionInput,
    RowPlan,
    bytes_of_tests,
    common_bytes,
    ranking_bytes,
    readings,
    spans,
    test_widths,
    worker_bytes,
)
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes

SCORE_FIRST, FOLD_FIRST, FROM_HYPERGRADIENTS = "score first", "fold first", "from hypergradients"
# Most passes over the store in fold first. Nobody waits for more.
MOST_PASSES = 2**16


def parse_chunks(text: str) -> tuple[int, int] | None:
    """Return (rows, features) of "ROWSxFEATURES", and None for "auto".

    Raises:
        UsageError: `text` is neither.
    """
    if text == "auto":
        return None
    rows, x, features = text.partition("x")
    if not (
        x and rows.isdecimal() and features.isdecimal() and int(rows) > 0 and int(features) > 0
    ):
        raise UsageError(
            f"--chunks {text} is not ROWSxFEATURES: write two positive numbers such as "
            "2048x4096, or auto"
        )
    return int(rows), int(features)


@dataclass(frozen=True)
class SumInput(ReductionInput):
    """Sizes and budget of a weighted sum.

    Args:
        keeping: True if hypergradients are to be kept. Then rows are folded first.
        kept: True if there are kept hypergradients, which answer without the rows.
        folds: True if sums of rows by sample answer the request.
        norms: True if norms of rows are taken too.
        checkpoints: number of checkpoints whose test gradients are used.
    """

    keeping: bool = False
    kept: bool = False
    folds: bool = True
    norms: bool = False
    checkpoints: int = 1

    @property
    def answer_bytes(self) -> int:
        """Bytes of the scores of all samples, of each test sample or group of test samples."""
        return self.n_samples * (self.n_columns if self.grouped else self.n_tests) * 4


@dataclass(frozen=True, kw_only=True)
class SumPlan(RowPlan):
    """Plan of the sums: each worker goes through a run of rows.

    Args:
        sample_blocks: first and one past the last sample that are summed together. Fold first has
            one pass for each block, the other orders have one block.
        row_runs: first and one past the last row of each worker's run: whole shards, of one part or
            more.
    """

    sample_blocks: tuple[Span, ...]
    row_runs: tuple[Span, ...]

    @property
    def _by_samples(self) -> bool:
        return self.order == FOLD_FIRST

    @property
    def blocks(self) -> tuple[Span, ...]:
        return self.sample_blocks if self._by_samples else self.test_blocks

    @property
    def noun(self) -> str:
        return "samples" if self._by_samples else "test samples"

    @property
    def passes(self) -> int:
        return len(self.blocks)

    @property
    def tasks(self) -> int:
        """Number of tasks: one for each run of rows, and one for each share of the samples."""
        runs = len(self.row_runs)
        shares = (
            min(runs, -(-(last - first) // SAMPLE_MULTIPLE)) for first, last in self.sample_blocks
        )
        of_blocks = sum(runs + n_shares for n_shares in shares)
        return of_blocks if self._by_samples else self.passes * of_blocks

    def fills(self, chunks: tuple[int, ...], *, grouped: bool) -> bool:
        aligned = all(first % chunks[0] == 0 for first, _ in self.sample_blocks)
        return aligned and super().fills(chunks, grouped=grouped)


def plan_sums(
    given: SumInput, chunks: tuple[int, int] | None, answered: Answered | None = None
) -> SumPlan:
    """Return the plan that takes least time of the plans that fit the budget.

    Args:
        given: sizes and budget.
        chunks: rows and features to decode at once, rounded up to whole stored chunks. None: chosen
            here.
        answered: work of an interrupted reduction, which the plan resumes in the same order.

    Raises:
        BudgetError: not even one block of test samples fits. The message has both numbers and a way
            out.
    """
    candidates = _as_asked(chunks, given) if chunks else readings(given)
    orders: dict[str, Callable[[SumInput, Sequence[Reading], int], SumPlan | None]]
    orders = {SCORE_FIRST: _scoring, FOLD_FIRST: _folding}
    if given.kept or given.keeping:
        orders = {FROM_HYPERGRADIENTS: _from_kept} if given.kept else {FOLD_FIRST: _folding}
    # A reduction begun in another order starts anew. Its source is not there any more, or the
    # result to keep needs another order.
    begun = answered if answered is not None and answered.order in orders else None
    chosen = list(orders.values()) if begun is None else [orders[begun.order]]
    # Each worker has sums of its own, so fewer workers may take fewer passes.
    ways = [(plan, replace(given, workers=n)) for n in _worker_counts(given) for plan in chosen]
    found = [(plan(few, candidates, 0), plan, few) for plan, few in ways]
    fitting = [(whole, plan, few) for whole, plan, few in found if whole is not None]
    if fitting:
        # Choose as if nothing was done yet. A resumed reduction must divide the work as before the
        # interruption, or sums would be rounded differently.
        whole, plan, few = min(fitting, key=lambda way: way[0].lasting_picoseconds)
        left = plan(few, candidates, begun.done) if begun is not None else None
        return left or whole
    alone = replace(given, workers=1)
    needed = _least_bytes(alone, candidates[-1])
    smallest = readings(given)[-1]
    least = _least_bytes(alone, smallest)
    advice = f"raise --memory to {suggested(needed)}"
    if least <= given.memory_bytes:
        advice = f"lower --chunks to {smallest.rows}x{smallest.features} or {advice}"
    raise BudgetError(
        f"decoding {candidates[-1].rows}x{candidates[-1].features} (rows x features) at once "
        "with one worker needs "
        f"{format_bytes(needed)}, --memory is {format_bytes(given.memory_bytes)}: {advice}"
    )


def scoring_peak_bytes(given: SumInput, reading: Reading, tests: int) -> int:
    """Return an upper bound of a process's memory, score first.

    Args:
        given: sizes and budget.
        reading: rows and features that are decoded at a time.
        tests: test samples of a block.
    """
    columns = given.n_columns if given.grouped else tests
    # A worker has the test gradients of one checkpoint. Other workers may have other checkpoints.
    others = min(given.checkpoints, _threads(given)) - 1
    sums = given.n_samples * columns * 4
    # The scores, a product, a product of groups, the values to add to the sums, and the two
    # factors of a block that is not complete yet.
    scores = reading.rows * (4 * tests + 2 * columns) * 4
    # One more sum: the block of the relevance array that is being written.
    return (
        common_bytes(given, tests)
        + others * bytes_of_tests(given, tests)
        + _threads(given) * (sums + scores + worker_bytes(given, reading, norms=given.norms))
        + sums
        + _merging_bytes(given, sums)
        + given.workers * ranking_bytes(given, columns)
    )


def folding_peak_bytes(given: SumInput, reading: Reading, samples: int, tests: int) -> int:
    """Return an upper bound of a process's memory, fold first.

    Args:
        given: sizes and budget.
        reading: rows and features that are decoded at a time.
        samples: samples of a block.
        tests: test samples that are answered at once.
    """
    scored = given.n_columns if given.n_factored else 0
    sums = samples * (given.n_folding + scored) * 4
    # A tile of rows beside its sums. Scores of factored blocks as in `scoring_peak_bytes`, for
    # every test sample.
    at_once = (
        reading.rows
        * (4 * given.n_folding + (4 * given.n_tests + 2 * scored if given.n_factored else 0))
        * 4
    )
    # Answers of some samples, plain and compressed. Scores need all test samples at once, folded
    # rows one block of test samples.
    answers = min(SAMPLE_MULTIPLE, samples) * tests * 4 * 2
    tests_held = given.n_tests if given.n_factored else tests
    # A shard of the factored blocks: in pieces, joined, and compressed.
    keeping = (
        3 * given.shard_rows * (given.n_factored * given.item_bytes + given.n_blocks * 4 + 8)
        if given.keeping
        else 0
    )
    return (
        common_bytes(given, tests_held)
        + _threads(given)
        * (sums + at_once + answers + keeping + worker_bytes(given, reading, norms=given.norms))
        + _merging_bytes(given, sums)
    )


def kept_peak_bytes(given: SumInput, reading: Reading, tests: int) -> int:
    """Return an upper bound of a process's memory, from hypergradients.

    Args:
        given: sizes and budget.
        reading: rows and features that are decoded at a time.
        tests: test samples of a block.
    """
    # A file of sums as it is read: its bytes, its values, and their products.
    folded = min(given.n_samples, SAMPLE_MULTIPLE) * (2 * given.n_folding + tests) * 4
    return scoring_peak_bytes(given, reading, tests) + folded


def _least_bytes(given: SumInput, reading: Reading) -> int:
    """Return the least memory of any plan with this `reading`."""
    tests, samples = test_widths(given)[-1], min(given.n_samples, SAMPLE_MULTIPLE)
    if given.kept:
        return kept_peak_bytes(given, reading, tests)
    if given.keeping:
        return folding_peak_bytes(given, reading, samples, tests)
    least = scoring_peak_bytes(given, reading, tests)
    return (
        min(least, folding_peak_bytes(given, reading, samples, tests))
        if given.n_folding and given.folds
        else least
    )


def _threads(given: SumInput) -> int:
    """Return the number of workers in one process."""
    return given.threads if given.processes else given.workers


def _merging_bytes(given: SumInput, sums: int) -> int:
    """Return the extra bytes while partial sums are merged.

    Each thread holds one incoming sum and one result.
    """
    return 2 * given.threads * sums if given.processes else 0


def _scoring(given: SumInput, candidates: Sequence[Reading], done: int) -> SumPlan | None:
    """Return the plan of score first with the fewest passes that fit, or None.

    A pass decodes the whole store. So fewer passes count more than the preferred reading.
    """
    for width in test_widths(given):
        for reading in candidates:
            peak = scoring_peak_bytes(given, reading, width)
            if peak <= given.memory_bytes:
                blocks = spans(done, given.n_tests, width)
                operations = (
                    2
                    * given.n_read
                    * given.n_tests
                    * (given.n_features + given.grouped * given.n_columns)
                )
                values = len(blocks) * given.n_read * given.n_features
                return _plan(
                    given,
                    SCORE_FIRST,
                    blocks,
                    ((0, given.n_samples),),
                    reading,
                    peak,
                    given.answer_bytes,
                    read=values * given.item_bytes,
                    converted=values,
                    operations=operations,
                )
    return None


def _folding(given: SumInput, candidates: Sequence[Reading], done: int) -> SumPlan | None:
    """Return the plan of fold first with the fewest passes that fit, or None."""
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
                    operations = (
                        2
                        * given.n_rows
                        * given.n_tests
                        * (given.n_factored + (scored if given.grouped else 0))
                    )
                    operations += 2 * given.n_samples * given.n_folding * given.n_columns
                    sums = given.n_samples * (given.n_folding + scored) * 4
                    folded = given.n_rows * given.n_folding
                    blocks = spans(done, given.n_samples, samples)
                    return _plan(
                        given,
                        FOLD_FIRST,
                        spans(0, given.n_tests, tests),
                        blocks,
                        reading,
                        peak,
                        sums,
                        read=len(blocks) * given.n_read * given.n_features * given.item_bytes,
                        # Rows of other samples are decoded, but not converted.
                        converted=given.n_rows * given.n_features,
                        operations=operations,
                        folded=folded,
                    )
    return None


def _from_kept(given: SumInput, candidates: Sequence[Reading], done: int) -> SumPlan | None:
    """Return the plan from kept hypergradients with the fewest passes over them, or None."""
    for width in test_widths(given):
        for reading in candidates:
            peak = kept_peak_bytes(given, reading, width)
            if peak <= given.memory_bytes:
                operations = (
                    2
                    * given.n_rows
                    * given.n_tests
                    * (given.n_factored + given.grouped * given.n_columns)
                )
                operations += 2 * given.n_samples * given.n_folding * given.n_columns
                blocks = spans(done, given.n_tests, width)
                values = len(blocks) * given.n_read * given.n_factored
                return _plan(
                    given,
                    FROM_HYPERGRADIENTS,
                    blocks,
                    ((0, given.n_samples),),
                    reading,
                    peak,
                    given.answer_bytes,
                    read=values * given.item_bytes
                    + len(blocks) * given.n_samples * given.n_folding * 4,
                    converted=values,
                    operations=operations,
                )
    return None


def _plan(
    given: SumInput,
    order: str,
    test_blocks: tuple[Span, ...],
    sample_blocks: tuple[Span, ...],
    reading: Reading,
    peak: int,
    sums: int,
    *,
    read: int,
    converted: int,
    operations: int,
    folded: int = 0,
) -> SumPlan:
    runs = _row_runs(given)
    moved = sums * (len(runs) - 1) if given.processes else 0
    kept = (
        given.n_samples * given.n_folding * 4 + given.n_rows * given.n_factored * given.item_bytes
        if given.keeping
        else 0
    )
    picoseconds = (
        read * COSTS.decoded_byte
        + converted * COSTS.converted_value
        + folded * COSTS.folded_value
        + operations * COSTS.operation
        + moved * COSTS.moved_byte
        + sums * len(runs) * COSTS.touched_byte
    )
    return SumPlan(
        order=order,
        workers=len(runs),
        test_blocks=test_blocks,
        sample_blocks=sample_blocks,
        row_runs=runs,
        reading=reading,
        peak_bytes=peak,
        read_bytes=read,
        written_bytes=given.result_bytes(given.n_samples) + kept,
        moved_bytes=moved,
        operations=operations,
        folded_values=folded,
        picoseconds=picoseconds,
    )


def _row_runs(given: SumInput) -> tuple[Span, ...]:
    parts, n_shards = given.part_rows or (given.n_rows,), _n_shards(given)
    firsts = [i * n_shards // given.workers for i in range(given.workers)]
    shards = firsts if given.shards is None else [given.shards[first] for first in firsts]
    return tuple(
        pairwise([*(shard_start(shard, parts, given.shard_rows) for shard in shards), given.n_rows])
    )


def _n_shards(given: SumInput) -> int:
    if given.shards is not None:
        return len(given.shards)
    return sum(-(-n_rows // given.shard_rows) for n_rows in given.part_rows or (given.n_rows,))


def _worker_counts(given: SumInput) -> Iterator[int]:
    """Yield numbers of workers: all that have a shard to read, then half as many each time."""
    workers = min(given.workers, _n_shards(given))
    while workers:
        yield workers
        workers //= 2


def _as_asked(chunks: tuple[int, int], given: SumInput) -> list[Reading]:
    rows, features = chunks
    whole_features = min(
        -(-features // given.chunk_features) * given.chunk_features, given.n_features
    )
    return [
        Reading(
            min(-(-rows // given.chunk_rows) * given.chunk_rows, given.shard_rows), whole_features
        )
    ]


def _sample_widths(n_samples: int) -> Iterator[int]:
    """Yield numbers of samples to fold at once, the preferred first.

    All samples come first. Then the number of blocks doubles each time. Blocks are even shares, in
    whole multiples of `SAMPLE_MULTIPLE`.
    """
    blocks = 1
    while True:
        width = -(-n_samples // blocks)
        width = min(n_samples, -(-width // SAMPLE_MULTIPLE) * SAMPLE_MULTIPLE)
        yield width
        if width <= SAMPLE_MULTIPLE:
            return
        blocks *= 2
