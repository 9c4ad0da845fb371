"""Inputs of plans of a sweep."""

from hypothesis import settings
from hypothesis import strategies as st

from hydra_pipe.plan.records import ReductionInput
from hydra_pipe.plan.sweep import SweepInput

MIB = 2**20


EVERY = settings(max_examples=200, deadline=None)


def input_of(width: int = 44_426, most_rows: int = 64, **changes: object) -> SweepInput:
    """LeNet-5 on 5,000 pictures, five epochs, 200 tests, but for `changes`."""
    sizes = {
        "n_rows": 25_000,
        "n_features": 3390,
        "n_folding": 2572,
        "n_samples": 5000,
        "n_tests": 200,
        "n_columns": 200,
        "n_steps": 395,
        "n_blocks": 10,
        "n_groups": 1,
        "item_bytes": 2,
        "test_item_bytes": 2,
        "shard_rows": 1024,
        "chunk_rows": 64,
        "chunk_features": 3390,
        "memory_bytes": 4096 * MIB,
        "workers": 2,
    }
    given = ReductionInput(**(sizes | changes))  # type: ignore[arg-type]
    return SweepInput(given, width, given.shard_rows, most_rows, given.n_samples)


@st.composite
def inputs(draw: st.DrawFn) -> SweepInput:
    columns = draw(st.integers(1, 2000))
    return input_of(
        draw(st.integers(1, 200_000)),
        draw(st.integers(1, 2000)),
        n_tests=columns,
        n_columns=columns,
        n_samples=draw(st.integers(1, 100_000)),
        workers=draw(st.integers(1, 16)),
        memory_bytes=draw(st.integers(200, 16_384)) * MIB,
    )
