"""Plans of any reduction: within the budget, complete, aligned; refusals whose advice works."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sums_inputs import given_of

from hydra_pipe.errors import BudgetError, UsageError
from hydra_pipe.plan.chunking import store_geometry
from hydra_pipe.plan.costs import BASE_BYTES, OVERHEAD_BYTES
from hydra_pipe.plan.records import SAMPLE_MULTIPLE, TEST_MULTIPLE, Answered, Reading
from hydra_pipe.plan.sums import (
    SumInput,
    SumPlan,
    folding_peak_bytes,
    parse_chunks,
    plan_sums,
    scoring_peak_bytes,
)
from hydra_pipe.units import format_bytes, parse_bytes

EVERY = settings(max_examples=100, deadline=None)
MIB = 2**20
Chunks = tuple[int, int] | None


@st.composite
def inputs(draw: st.DrawFn) -> SumInput:
    n_features = draw(st.one_of(st.integers(1, 500), st.integers(1, 100_000)))
    item_bytes = draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()):
        geometry = store_geometry(n_features, item_bytes)
        sizes = (geometry.shard_rows, geometry.chunk_rows, geometry.chunk_features)
    else:  # a store in small pieces
        shard_log = draw(st.integers(0, 14))
        n_chunks = draw(st.integers(1, min(20, n_features)))
        sizes = (2**shard_log, 2 ** draw(st.integers(0, shard_log)), -(-n_features // n_chunks))
    n_tests = draw(st.one_of(st.integers(1, 200), st.integers(1, 5000)))
    return SumInput(
        n_rows=draw(st.one_of(st.integers(1, 5000), st.integers(1, 10**7))),
        n_features=n_features,
        n_samples=draw(st.integers(1, 200_000)),
        n_folding=draw(st.sampled_from([0, n_features // 2, n_features])),
        n_tests=n_tests,
        n_columns=n_tests,
        n_steps=draw(st.integers(1, 50_000)),
        n_blocks=draw(st.integers(1, min(60, n_features))),
        n_groups=draw(st.integers(1, 3)),
        item_bytes=item_bytes,
        test_item_bytes=draw(st.sampled_from([2, 4])),
        shard_rows=sizes[0],
        chunk_rows=sizes[1],
        chunk_features=sizes[2],
        memory_bytes=draw(
            st.one_of(st.integers(1, 300), st.integers(200, 2000), st.integers(200, 64 * 1024))
        )
        * MIB,
        workers=draw(st.integers(1, 16)),
        processes=draw(st.booleans()),
        threads=draw(st.integers(1, 4)),
        base_bytes=draw(st.sampled_from([BASE_BYTES, OVERHEAD_BYTES, 1024 * MIB])),
    )


CHUNKS = st.one_of(st.none(), st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))


def refusal(what: SumInput, chunks: Chunks) -> str:
    """The message of the refusal; cases that fit are the business of other tests."""
    try:
        plan_sums(what, chunks)
    except BudgetError as error:
        return str(error)
    assume(False)
    raise AssertionError


def planned(what: SumInput, chunks: Chunks) -> SumPlan:
    """The plan; cases that do not fit are the business of other tests."""
    try:
        return plan_sums(what, chunks)
    except BudgetError:
        assume(False)
        raise


@EVERY
@given(inputs(), CHUNKS)
def test_the_planned_peak_is_within_the_budget(what: SumInput, chunks: Chunks) -> None:
    plan = planned(what, chunks)
    widest = max(last - first for first, last in plan.test_blocks)
    assert plan.peak_bytes <= what.memory_bytes
    # fewer workers than there are may take fewer passes
    what = replace(what, workers=len(plan.row_runs))
    if plan.order == "score first":
        assert plan.peak_bytes == scoring_peak_bytes(what, plan.reading, widest)
    else:
        samples = max(last - first for first, last in plan.sample_blocks)
        assert plan.peak_bytes == folding_peak_bytes(what, plan.reading, samples, widest)


@EVERY
@given(inputs(), CHUNKS)
def test_blocks_cover_every_test_sample_and_every_sample_once(
    what: SumInput, chunks: Chunks
) -> None:
    plan = planned(what, chunks)
    for blocks, n in ((plan.test_blocks, what.n_tests), (plan.sample_blocks, what.n_samples)):
        assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
        assert blocks[-1][1] == n
        assert all(first < last for first, last in blocks)


@EVERY
@given(inputs(), CHUNKS)
def test_blocks_of_samples_fill_whole_chunks(what: SumInput, chunks: Chunks) -> None:
    plan = planned(what, chunks)
    assert all(first % SAMPLE_MULTIPLE == 0 for first, _ in plan.sample_blocks)
    assert len(plan.sample_blocks) == 1 or plan.order == "fold first"


@EVERY
@given(inputs(), CHUNKS)
def test_passes_but_the_last_are_equally_wide_and_fill_chunks_or_divide_one(
    what: SumInput, chunks: Chunks
) -> None:
    *others, _ = [last - first for first, last in planned(what, chunks).test_blocks]
    assert len(set(others)) <= 1
    for width in others:
        assert width % TEST_MULTIPLE == 0 or TEST_MULTIPLE % width == 0


@EVERY
@given(inputs(), CHUNKS)
def test_runs_cover_every_row_once_and_begin_with_a_shard(what: SumInput, chunks: Chunks) -> None:
    runs = planned(what, chunks).row_runs
    assert runs[0][0] == 0
    assert runs[-1][1] == what.n_rows
    assert all(first < last for first, last in runs)
    assert all(before[1] == after[0] for before, after in pairwise(runs))
    assert all(first % what.shard_rows == 0 for first, _ in runs)


@EVERY
@given(inputs(), CHUNKS)
def test_runs_share_the_shards_evenly_among_the_workers(what: SumInput, chunks: Chunks) -> None:
    runs = planned(what, chunks).row_runs
    n_shards = -(-what.n_rows // what.shard_rows)
    most = min(what.workers, n_shards)
    assert len(runs) in {most >> i for i in range(most.bit_length())}
    shards = [-(-last // what.shard_rows) - first // what.shard_rows for first, last in runs]
    assert max(shards) - min(shards) <= 1


@EVERY
@given(inputs(), CHUNKS)
def test_whole_stored_chunks_are_read_at_once(what: SumInput, chunks: Chunks) -> None:
    reading = planned(what, chunks).reading
    assert reading.rows % what.chunk_rows == 0
    assert what.chunk_rows <= reading.rows <= what.shard_rows
    assert reading.features == what.n_features or reading.features % what.chunk_features == 0
    assert 0 < reading.features <= what.n_features


@EVERY
@given(inputs(), st.integers(1, 20_000), st.integers(1, 20_000))
def test_chunks_that_are_asked_for_are_rounded_up_to_stored_ones(
    what: SumInput, rows: int, features: int
) -> None:
    reading = planned(what, (rows, features)).reading
    assert reading.rows >= min(rows, what.shard_rows)
    assert reading.rows - what.chunk_rows < rows
    assert reading.features >= min(features, what.n_features)
    assert reading.features - what.chunk_features < features


@EVERY
@given(inputs(), CHUNKS)
def test_bytes_to_decode_are_the_rows_once_a_pass(what: SumInput, chunks: Chunks) -> None:
    plan = planned(what, chunks)
    assert plan.read_bytes == plan.passes * what.n_rows * what.n_features * what.item_bytes


@EVERY
@given(inputs(), st.integers(1, 1024))
def test_more_memory_never_takes_more_time(what: SumInput, more: int) -> None:
    time = planned(what, None).lasting_picoseconds
    assert (
        planned(
            replace(what, memory_bytes=what.memory_bytes + more * MIB), None
        ).lasting_picoseconds
        <= time
    )


@EVERY
@given(inputs(), st.integers(1, 20_000), st.integers(1, 20_000))
def test_no_chunks_take_less_time_than_the_chosen_ones(
    what: SumInput, rows: int, features: int
) -> None:
    chosen, asked = planned(what, None), planned(what, (rows, features))
    assert chosen.lasting_picoseconds <= asked.lasting_picoseconds


@EVERY
@given(inputs(), CHUNKS, st.integers(0, 1000))
@example(
    given_of(n_tests=64 * 50, n_columns=64 * 50, workers=16, memory_bytes=1200 * MIB), None, 49
)
@example(given_of(workers=16, memory_bytes=1200 * MIB), None, 3)
def test_what_goes_on_divides_the_work_as_what_was_interrupted(
    what: SumInput, chunks: Chunks, passes: int
) -> None:
    """Sums over other runs of rows would be rounded otherwise."""
    whole = planned(what, chunks)
    passes = min(passes, whole.passes - 1)
    blocks = "sample_blocks" if whole.order == "fold first" else "test_blocks"
    done = getattr(whole, blocks)[passes][0]
    left = plan_sums(what, chunks, Answered(whole.order, done, what.base_bytes))
    assert getattr(left, blocks) == getattr(whole, blocks)[passes:]
    assert (left.order, left.row_runs, left.reading) == (whole.order, whole.row_runs, whole.reading)


def test_one_pass_over_whole_rows_is_chosen_where_memory_allows() -> None:
    plan = plan_sums(given_of(), None)
    assert plan.passes == 1
    assert plan.reading == Reading(512, 3390)


def test_rows_are_folded_first_where_there_are_many_tests_and_epochs() -> None:
    dense = {"n_folding": 3390}
    assert plan_sums(given_of(**dense), None).order == "fold first"
    assert plan_sums(given_of(**dense, n_tests=4, n_columns=4), None).order == "score first"
    # one epoch: sums by sample save nothing
    assert plan_sums(given_of(**dense, n_rows=60_000), None).order == "score first"
    # nothing can be folded
    assert plan_sums(given_of(n_folding=0), None).order == "score first"
    # several passes over the store cost more than they save
    few = dense | {
        "n_tests": 64,
        "n_columns": 64,
        "n_samples": 500_000,
        "n_rows": 5_000_000,
        "memory_bytes": 1024 * MIB,
    }
    assert plan_sums(given_of(**few), None).order == "score first"


def test_sums_go_from_process_to_process_and_not_from_thread_to_thread() -> None:
    assert plan_sums(given_of(), None).moved_bytes == 0
    apart = plan_sums(given_of(processes=True, n_folding=0), None)
    assert apart.moved_bytes == 60_000 * 1000 * 4
    # each thread of a process has sums of its own, and adds up others'
    by_threads = [
        scoring_peak_bytes(
            given_of(processes=True, threads=threads, n_folding=0), apart.reading, 1000
        )
        for threads in (1, 2, 3)
    ]
    assert by_threads[2] - by_threads[1] == by_threads[1] - by_threads[0] > 3 * 60_000 * 1000 * 4


READINGS = st.builds(Reading, st.integers(1, 5000), st.integers(1, 5000))


@EVERY
@given(inputs(), READINGS, st.integers(1, 500))
def test_more_of_anything_never_takes_less_memory(
    what: SumInput, reading: Reading, tests: int
) -> None:
    def peaks(what: SumInput, reading: Reading, tests: int) -> tuple[int, int]:
        return scoring_peak_bytes(what, reading, tests), folding_peak_bytes(
            what, reading, what.n_samples, tests
        )

    def never_less(*changed: Any) -> None:
        assert all(more >= less for more, less in zip(peaks(*changed), least, strict=True))

    what = replace(what, n_tests=1000, n_columns=1000)  # no fewer than are answered at once
    least = peaks(what, reading, tests)
    assert min(least) > what.base_bytes
    never_less(what, reading, 2 * tests)
    for name in ("rows", "features"):
        never_less(what, replace(reading, **{name: 2 * getattr(reading, name)}), tests)
    for name in (
        "n_samples",
        "n_features",
        "n_steps",
        "n_blocks",
        "n_groups",
        "item_bytes",
        "test_item_bytes",
        "workers",
    ):
        never_less(replace(what, **{name: 2 * getattr(what, name)}), reading, tests)


@EVERY
@given(inputs(), st.integers(1, 5000), st.integers(1, 500))
# test gradients and little else; schedules and little else
@example(given_of(n_samples=1, n_steps=1, n_blocks=1), 1, 500)
@example(given_of(n_samples=1, n_steps=1_000_000), 1, 1)
def test_the_peak_covers_the_arrays_that_a_reduction_cannot_do_without(
    what: SumInput, rows: int, tests: int
) -> None:
    what = replace(what, n_tests=tests, n_columns=tests)
    sums = what.n_samples * tests * 4
    stored, decoded = rows * what.n_features * what.item_bytes, rows * what.n_features * 4
    scores, weights = rows * tests * 4, rows * what.n_blocks * 4
    test_gradients = tests * what.n_features * 4
    schedule = what.n_steps * what.n_blocks * 8
    threads = 1 if what.processes else what.workers
    arrays = threads * (sums + stored + decoded + scores + weights) + test_gradients + schedule
    reading = Reading(rows, what.n_features)
    assert scoring_peak_bytes(what, reading, tests) >= what.base_bytes + arrays
    folded = what.n_samples * what.n_folding * 4
    arrays = threads * (folded + stored + decoded + weights) + test_gradients + schedule
    assert folding_peak_bytes(what, reading, what.n_samples, tests) >= what.base_bytes + arrays


@EVERY
@given(inputs(), CHUNKS)
@example(given_of(memory_bytes=MIB), None)
@example(given_of(memory_bytes=200 * MIB), (2048, 3390))
def test_a_plan_that_cannot_fit_is_refused_with_both_numbers_and_more_memory_helps(
    what: SumInput, chunks: Chunks
) -> None:
    message = refusal(what, chunks)
    found = re.fullmatch(
        r"decoding \d+x\d+ \(rows x features\) at once with one worker needs ([\d.e+]+ \w+), "
        r"--memory is ([\d.e+]+ \w+): (?:lower --chunks to \d+x\d+ or )?raise --memory to (\d+MiB)",
        message,
    )
    assert found, message
    needed, memory, raised = found.groups()
    assert memory == format_bytes(what.memory_bytes)
    enough = parse_bytes(raised)
    plan_sums(replace(what, memory_bytes=enough), chunks)
    # what it needs is what it needs: the advice is that number, and less is refused
    number, unit = needed.split()
    assert float(number) * parse_bytes(f"1 {unit}") == pytest.approx(enough, rel=0.01, abs=2 * MIB)
    with pytest.raises(BudgetError):
        plan_sums(replace(what, memory_bytes=enough - 2 * MIB), chunks)


@EVERY
@given(inputs(), CHUNKS)
# nothing fits in 1 MiB; and whoever asks for the smallest chunks cannot ask for smaller ones
@example(given_of(memory_bytes=MIB), (2048, 3390))
@example(
    given_of(
        n_features=100,
        shard_rows=16384,
        chunk_rows=4096,
        chunk_features=100,
        memory_bytes=200 * MIB,
        n_steps=4000,
    ),
    (4096, 100),
)
def test_smaller_chunks_are_only_advised_where_they_help(what: SumInput, chunks: Chunks) -> None:
    found = re.search(r"lower --chunks to (\d+x\d+)", refusal(what, chunks))
    if found:
        assert parse_chunks(found[1]) != chunks
        assert plan_sums(what, parse_chunks(found[1]))


def test_sizes_in_a_refusal_are_written_as_one_writes_them() -> None:
    what = given_of(memory_bytes=1000 * MIB, n_samples=150_000_000, n_folding=0)
    with pytest.raises(BudgetError, match=r"--memory is 1000 MiB: "):
        plan_sums(what, None)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [("auto", None), ("2048x4096", (2048, 4096)), ("1x1", (1, 1)), ("010x7", (10, 7))],
)
def test_chunks_are_rows_by_features_or_auto(text: str, chunks: Chunks) -> None:
    assert parse_chunks(text) == chunks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "5",
        "5x",
        "x5",
        "0x5",
        "5x0",
        "-1x5",
        "5x-1",
        "1.5x2",
        "1x2x3",
        "2048X4096",
        "axb",
        " 5x5",
        "5 x 5",
        "Auto",
        "²x5",
    ],
)
def test_other_chunks_are_wrong_usage_and_the_message_says_how_to_write_them(text: str) -> None:
    with pytest.raises(
        UsageError,
        match="is not ROWSxFEATURES: write two positive numbers such as 2048x4096, or auto",
    ) as caught:
        parse_chunks(text)
    assert f"--chunks {text} " in str(caught.value)
