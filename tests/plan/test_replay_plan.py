"""Plans of replays: within the budget, every column once, in whole chunks; more levels only where
states are large.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import MOST_CHUNK, chunk_columns
from hydra_pipe.plan.costs import BASE_BYTES
from hydra_pipe.plan.records import ReductionInput
from hydra_pipe.plan.replay import ReplayInput, plan_replay

MIB = 2**20


def input_of(memory_mib: int = 4096, **changes: int) -> ReplayInput:
    """LeNet-5 on 5,000 pictures, five epochs, 200 tests, but for `changes`."""
    sizes = {
        "n_rows": 25_000,
        "n_features": 3390,
        "n_folding": 2572,
        "n_samples": 5000,
        "n_tests": 200,
        "n_columns": 200,
    }
    sizes |= {
        "n_steps": 395,
        "n_blocks": 10,
        "n_groups": 1,
        "item_bytes": 2,
        "test_item_bytes": 2,
        "shard_rows": 1024,
    }
    sizes |= {
        "chunk_rows": 64,
        "chunk_features": 3390,
        "memory_bytes": memory_mib * MIB,
        "workers": 2,
    }
    of_recording = {name: n for name, n in changes.items() if name in sizes}
    own = {
        "n_steps": 395,
        "parameter_bytes": 246_824,
        "n_states": 1,
        "state_bytes": 530_000,
        "batch_bytes": 200_000,
    }
    own |= {"graph_bytes": 4_600_000, "cache_bytes": 64 * MIB}
    recording = ReductionInput(**(sizes | of_recording))  # type: ignore[arg-type]
    return ReplayInput(recording, **(own | {name: n for name, n in changes.items() if name in own}))


@given(
    st.integers(200, 20_000),
    st.integers(1, 3000),
    st.integers(1, 100_000),
    st.integers(1, 10**9),
    st.integers(1, 10**9),
)
@settings(max_examples=200, deadline=None)
def test_every_plan_fits_and_answers_every_column_once(
    mib: int, columns: int, steps: int, parameters: int, graph: int
) -> None:
    what = input_of(
        mib,
        n_columns=columns,
        n_steps=steps,
        parameter_bytes=parameters,
        state_bytes=2 * parameters,
        graph_bytes=graph,
    )
    try:
        plan = plan_replay(what)
    except BudgetError:
        return
    assert BASE_BYTES < plan.peak_bytes <= mib * MIB
    assert plan.columns[0][0] == 0
    assert plan.columns[-1][1] == columns
    assert all(
        last == first for (_, last), (first, _) in zip(plan.columns, plan.columns[1:], strict=False)
    )
    width = plan.columns[0][1]
    assert width == columns or width % chunk_columns(width) == 0 or width <= MOST_CHUNK
    assert plan.most_states**plan.levels >= steps
    assert 1 <= plan.at_once <= width


def test_states_of_a_long_run_of_a_large_model_take_more_levels() -> None:
    large = {"parameter_bytes": 20 * MIB, "state_bytes": 40 * MIB, "n_columns": 10}
    few, many = (plan_replay(input_of(n_steps=n, **large)) for n in (100, 10_000))
    assert (few.levels, few.most_states) == (2, 10)
    assert many.levels > 2
    assert many.most_states**many.levels >= 10_000
    assert many.levels * many.most_states * 40 * MIB < 0.4 * 4096 * MIB


def test_where_not_one_column_fits_both_numbers_are_told() -> None:
    with pytest.raises(
        BudgetError,
        match=(
            r"hydra-exact of one column, 395 steps .* needs .*, --memory is 200 MiB: raise "
            r"--memory to"
        ),
    ):
        plan_replay(input_of(200))
    advised = int(str(_refused(input_of(200))).rsplit(" ", 1)[1].removesuffix("MiB"))
    plan_replay(input_of(advised))


def _refused(what: ReplayInput) -> BudgetError:
    with pytest.raises(BudgetError) as raised:
        plan_replay(what)
    return raised.value


def test_more_memory_takes_no_more_passes() -> None:
    passes = [len(plan_replay(input_of(mib)).columns) for mib in (300, 600, 1000, 4000)]
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 1
