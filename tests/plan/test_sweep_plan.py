"""Plans of sweeps: within the budget, every column once, in whole chunks, and not slower with more
memory.
"""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sweep_inputs import EVERY, MIB, input_of, inputs

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import MOST_CHUNK, chunk_columns
from hydra_pipe.plan.costs import BASE_BYTES
from hydra_pipe.plan.sweep import SweepInput, SweepPlan, plan_sweep, sweep_peak_bytes


def planned(what: SweepInput, done: int = 0) -> SweepPlan:
    try:
        return plan_sweep(what, done)
    except BudgetError:
        assume(False)
        raise


@EVERY
@given(inputs())
def test_a_plan_fits_and_has_every_column_once_in_whole_chunks(what: SweepInput) -> None:
    plan = planned(what)
    width = plan.columns[0][1]
    assert (
        plan.peak_bytes
        == sweep_peak_bytes(what, width, plan.workers)
        <= what.recording.memory_bytes
    )
    assert [first for first, _ in plan.columns] == list(range(0, what.recording.n_columns, width))
    assert [last for _, last in plan.columns[:-1]] == [first for first, _ in plan.columns[1:]]
    assert plan.columns[-1][1] == what.recording.n_columns
    if len(plan.columns) > 1:
        assert width % chunk_columns(width) == 0
    assert chunk_columns(width) <= MOST_CHUNK


@EVERY
@given(inputs(), st.integers(1, 4096))
def test_more_memory_never_takes_more_passes_of_the_same_workers(
    what: SweepInput, more: int
) -> None:
    plan = planned(what)
    larger = replace(
        what,
        recording=replace(what.recording, memory_bytes=what.recording.memory_bytes + more * MIB),
    )
    again = planned(larger)
    assert again.workers != plan.workers or again.passes <= plan.passes


@EVERY
@given(inputs(), st.integers(0, 100))
def test_what_goes_on_divides_the_columns_as_what_was_interrupted(
    what: SweepInput, number: int
) -> None:
    whole = planned(what)
    number = min(number, len(whole.columns) - 1)
    left = plan_sweep(what, whole.columns[number][0])
    assert left.columns == whole.columns[number:]
    assert left.workers == whole.workers


def test_one_worker_takes_many_columns_where_two_would_take_few() -> None:
    what = input_of(n_tests=40, n_columns=40)
    few = sweep_peak_bytes(what, 2, 2)
    assert sweep_peak_bytes(what, 20, 2) > few > sweep_peak_bytes(what, 40, 1)
    plan = plan_sweep(input_of(n_tests=40, n_columns=40, memory_bytes=few))
    assert (plan.workers, plan.passes) == (1, 1)
    assert plan_sweep(input_of()).columns == ((0, 100), (100, 200))
    with pytest.raises(
        BudgetError,
        match=r"a sweep of one column over 44,426 features needs .* raise --memory to \d+MiB",
    ):
        plan_sweep(input_of(memory_bytes=BASE_BYTES))


def test_more_blocks_than_a_plan_can_list_are_refused() -> None:
    """A manifest may say anything."""
    with pytest.raises(BudgetError, match=r"at most 1,048,576 are planned: raise --memory"):
        plan_sweep(input_of(n_tests=2**50, n_columns=2**50, n_samples=10, memory_bytes=400 * MIB))
