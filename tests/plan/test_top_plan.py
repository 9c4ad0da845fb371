"""Plans of top samples count the rankings beside the sums, and their bytes in place of a matrix."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from sums_inputs import given_of

from hydra_pipe.plan.from_matrix import AnswerInput, plan_answers
from hydra_pipe.plan.influence import SolveInput, plan_solve
from hydra_pipe.plan.records import Plan
from hydra_pipe.plan.sums import SCORE_FIRST, SumInput, plan_sums
from hydra_pipe.plan.sweep import SweepInput, plan_sweep

PLANS: dict[str, Callable[[SumInput], Plan]] = {
    "sums": lambda given: plan_sums(replace(given, folds=False), None),
    "kept": lambda given: plan_sums(replace(given, kept=True), None),
    "sweep": lambda given: plan_sweep(SweepInput(given, 1000, 1024, 64, given.n_samples)),
    "matrix": lambda given: plan_answers(AnswerInput(given, 1000)),
    "influence": lambda given: plan_solve(SolveInput(given, 1000, given.n_samples)),
}
TOPS = (1, 100, 10_000)


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_more_top_samples_take_more_memory_and_more_bytes(name: str, processes: bool) -> None:
    given = given_of(
        n_tests=64, n_columns=64, memory_bytes=64 * 2**30, processes=processes, threads=1
    )
    whole = PLANS[name](given)
    plans = [PLANS[name](replace(given, top=top)) for top in TOPS]
    for less, more in pairwise([whole, *plans]):
        assert less.order == more.order
        assert less.passes == more.passes
        assert less.peak_bytes < more.peak_bytes
    # of each pair a float32 and an int64
    assert [plan.written_bytes for plan in plans] == [64 * 2 * top * (4 + 8) for top in TOPS]
    assert plans[0].read_bytes == whole.read_bytes


def test_many_top_samples_are_divided_into_more_passes() -> None:
    given = given_of(folds=False, top=30_000)
    plan = plan_sums(given, None)
    assert plan.order == SCORE_FIRST
    assert plan.peak_bytes <= given.memory_bytes
    assert plan.passes > plan_sums(replace(given, top=None), None).passes
