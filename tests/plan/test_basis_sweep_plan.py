"""Plans of sweeps in a basis: within the budget, with the basis counted, and the default rank."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sweep_inputs import EVERY, MIB, input_of, inputs

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.basis_sweep import (
    BasisInput,
    basis_bytes,
    default_rank,
    finding_peak_bytes,
    plan_basis_sweep,
)
from hydra_pipe.plan.sweep import SweepInput, plan_sweep, sweep_peak_bytes

LENET = ((16, 400), (120, 84), (2590,))


def in_basis(what: SweepInput, rank: int, n_series: int = 1) -> BasisInput:
    sized = replace(what, width=min(rank, what.width))
    return BasisInput(**vars(sized), sides=LENET, n_series=n_series)


@EVERY
@given(inputs(), st.integers(1, 5000), st.integers(1, 9))
def test_a_plan_fits_and_counts_the_basis(what: SweepInput, rank: int, n_series: int) -> None:
    sized = in_basis(what, rank, n_series)
    try:
        plan = plan_basis_sweep(sized)
    except BudgetError:
        assume(False)
        raise
    assert plan.peak_bytes <= what.recording.memory_bytes
    width = plan.columns[0][1]
    assert plan.peak_bytes == max(
        sweep_peak_bytes(sized, width, plan.workers), finding_peak_bytes(sized)
    )
    few = replace(what, width=sized.width)
    assert sweep_peak_bytes(sized, width, 1) >= sweep_peak_bytes(few, width, 1) + plan.basis_bytes
    assert plan.rank == sized.width
    assert plan.tasks == len(plan.columns) + 1


def test_directions_are_bounded_by_rows_columns_and_boxes() -> None:
    sized = in_basis(input_of(), 100)
    # sixteen times as many columns in the largest box; a vector is in the core only
    assert sized.directions == ((16, 400), (120, 84), (100,))
    assert basis_bytes(sized) == 4 * (16**2 + 400**2 + 120**2 + 84**2 + 2590 * 100)
    assert in_basis(input_of(), 5000).directions == ((16, 400), (120, 84), (1536,))
    # many series have one shell each, and no larger box
    assert in_basis(input_of(), 20, 9).directions == ((16, 20), (20, 20), (20,))
    assert [in_basis(input_of(), 20, n).n_shells for n in (1, 4, 9)] == [3, 12, 9]


def test_a_basis_takes_far_fewer_operations_than_all_features() -> None:
    full = plan_sweep(input_of(width=61_706))
    few = plan_basis_sweep(in_basis(input_of(width=61_706), 512))
    assert few.operations < full.operations / 12
    assert few.picoseconds < full.picoseconds / 8


def test_a_budget_without_room_for_the_basis_is_refused() -> None:
    what = input_of(memory_bytes=230 * MIB, n_tests=1, n_columns=1)
    with pytest.raises(BudgetError, match=r"finding the basis .* raise --memory to \d+MiB"):
        plan_basis_sweep(in_basis(what, 8))


def test_fewer_rows_leave_time_for_more_columns() -> None:
    ranks = [default_rank(n_rows, 10**9) for n_rows in (0, 1000, 4800, 18_000, 25_000, 10**6)]
    assert ranks == [16384, 16384, 13824, 3584, 2560, 512]
    # a basis that saves less than half is none
    assert default_rank(25_000, 5120) is None
    assert default_rank(25_000, 5121) == 2560
