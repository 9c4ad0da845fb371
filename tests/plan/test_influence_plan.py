"""Plans of linear systems: within the budget, complete, and refused with advice that works."""

import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from sums_inputs import given_of

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.influence import SolveInput, plan_solve, solving_peak_bytes
from hydra_pipe.units import parse_bytes


@settings(max_examples=60, deadline=None)
@given(
    n_last=st.integers(1, 30_000),
    width=st.integers(1, 30_000),
    n_tests=st.integers(1, 3000),
    memory=st.integers(200, 8000),
    grouped=st.booleans(),
)
def test_a_plan_fits_or_is_refused_with_a_budget_that_it_fits(
    n_last: int, width: int, n_tests: int, memory: int, grouped: bool
) -> None:
    recording = given_of(
        n_tests=n_tests, n_columns=10 if grouped else n_tests, memory_bytes=memory * 2**20
    )
    what = SolveInput(replace(recording, grouped=grouped), width, n_last)
    try:
        plan = plan_solve(what)
    except BudgetError as error:
        found = re.search(r"raise --memory to (\d+MiB)", str(error))
        assert found is not None
        what = replace(what, recording=replace(what.recording, memory_bytes=parse_bytes(found[1])))
        plan = plan_solve(what)
    assert plan.peak_bytes <= what.recording.memory_bytes
    assert plan.peak_bytes >= 2 * 8 * min(width, n_last) ** 2
    for blocks, end in ((plan.test_blocks, n_tests), (plan.held_blocks, n_last)):
        assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
        assert blocks[-1][1] == end
    assert plan.passes == (1 if width <= n_last else len(plan.held_blocks)) + len(plan.test_blocks)
    assert plan.order == ("by features" if width <= n_last else "by samples")


def test_what_is_held_and_answered_at_once_costs_memory() -> None:
    what = SolveInput(given_of(), 50_000, 10_000)
    reading = plan_solve(what).reading
    least = solving_peak_bytes(what, reading, 64, 64)
    assert solving_peak_bytes(what, reading, 64, 1000) > least
    assert solving_peak_bytes(what, reading, 200_000, 64) > least
