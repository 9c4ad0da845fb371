"""Plans of exports: within the budget, every pair once, and tables that do not depend on the
budget.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.exporting import (
    GROUP_ROWS,
    MOST_WHOLE,
    ExportInput,
    ExportPlan,
    blocks_to_add,
    plan_export,
)

MIB = 2**20
EVERY = settings(max_examples=100, deadline=None)
LARGE = ExportInput(50_000_000, 10_000, 100, True, 100, 64, 160 * MIB, 4096 * MIB)


@st.composite
def inputs(draw: st.DrawFn) -> ExportInput:
    n_samples = draw(st.one_of(st.integers(1, 10_000), st.integers(1, 10**8)))
    n_tests = draw(st.integers(1, 100_000))
    top, memory = draw(st.integers(1, 1000)), draw(st.integers(200, 16_384))
    return ExportInput(
        n_samples, n_tests, top, draw(st.booleans()), 100, min(64, n_tests), 160 * MIB, memory * MIB
    )


def planned(what: ExportInput) -> ExportPlan:
    try:
        return plan_export(what)
    except BudgetError:
        assume(False)
        raise


@EVERY
@given(inputs())
def test_plans_fit_the_budget_and_more_of_it_never_makes_blocks_narrower(what: ExportInput) -> None:
    plan = planned(what)
    assert plan.peak_bytes <= what.memory_bytes
    assert (
        planned(replace(what, memory_bytes=2 * what.memory_bytes)).block_tests >= plan.block_tests
    )


@EVERY
@given(inputs())
def test_tables_are_divided_alike_whatever_the_budget(what: ExportInput) -> None:
    def division(plan: ExportPlan) -> ExportPlan:
        return replace(plan, block_tests=0, dynamics_samples=0, peak_bytes=0)

    assert division(planned(what)) == division(planned(replace(what, memory_bytes=2**60)))


@EVERY
@given(inputs())
def test_blocks_have_whole_row_groups_and_files_too(what: ExportInput) -> None:
    plan = planned(what)
    assert plan.block_tests % plan.group_tests == plan.file_tests % plan.group_tests == 0
    assert plan.ranking_file_tests % plan.ranking_group_tests == 0
    assert plan.group_tests == 1 or plan.group_tests * what.n_samples <= GROUP_ROWS
    assert plan.slab_samples == what.n_samples or (
        what.n_samples > MOST_WHOLE and plan.file_tests == 1
    )


@EVERY
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_blocks_have_every_pair_once_in_order(
    n_samples: int, n_tests: int, slab: int, width: int
) -> None:
    plan = ExportPlan(slab, width, 1, 1, 1, 1, 1, 0)
    seen = np.zeros((n_tests, n_samples), int)
    spans = list(plan.blocks(n_samples, n_tests))
    for tests, samples in spans:
        seen[tests, samples] += 1
    assert (seen == 1).all()
    assert [(t.start, s.start) for t, s in spans] == sorted((t.start, s.start) for t, s in spans)


@EVERY
@given(inputs())
def test_blocks_to_add_have_the_slabs_of_an_export_and_a_bound(what: ExportInput) -> None:
    n_samples, n_tests, slab = what.n_samples, min(what.n_tests, 200), planned(what).slab_samples
    blocks = list(blocks_to_add(n_samples, n_tests, min(what.chunk_tests, n_tests)))
    slabs = sorted({(samples.start, samples.stop) for _, samples in blocks})
    assert slabs == [(low, min(low + slab, n_samples)) for low in range(0, n_samples, slab)]
    assert sum((t.stop - t.start) * (s.stop - s.start) for t, s in blocks) == n_samples * n_tests
    assert max(4 * (t.stop - t.start) * (s.stop - s.start) for t, s in blocks) <= 256 * MIB
    assert all(t.start % 64 == 0 for t, _ in blocks)  # whole chunks


def test_memory_grows_by_a_few_numbers_a_sample_beyond_what_is_held_whole() -> None:
    larger = replace(LARGE, n_samples=2 * LARGE.n_samples, memory_bytes=2**60)
    assert (
        plan_export(larger).peak_bytes - plan_export(replace(LARGE, memory_bytes=2**60)).peak_bytes
        < 64 * LARGE.n_samples
    )


def test_a_budget_that_is_too_small_is_refused_with_both_numbers_and_a_way_out() -> None:
    with pytest.raises(
        BudgetError, match=r"needs 2\.8\d GiB, --memory is 2 GiB: raise --memory to (\d+)MiB"
    ) as refused:
        plan_export(replace(LARGE, memory_bytes=2048 * MIB))
    enough = int(str(refused.value).rsplit(" ", 1)[1].removesuffix("MiB"))
    assert plan_export(replace(LARGE, memory_bytes=enough * MIB)).peak_bytes <= enough * MIB
