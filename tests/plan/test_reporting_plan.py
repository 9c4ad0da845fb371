"""How much a report reads at once, against its budget."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.errors import BudgetError
from hydra_pipe.labels import Dynamics, judge
from hydra_pipe.plan.reporting import (
    BLOCK_BYTES,
    PAIR_BYTES,
    SAMPLE_BYTES,
    block_columns,
    judging_bytes,
)

MIB = 2**20


@given(
    n_samples=st.integers(1, 10**7),
    n_columns=st.integers(1, 10**5),
    base_bytes=st.integers(0, 2**32),
    memory_bytes=st.integers(1, 2**36),
)
def test_what_is_read_at_once_fits_and_no_more_would(
    n_samples: int, n_columns: int, base_bytes: int, memory_bytes: int
) -> None:
    def needed(width: int) -> int:
        return base_bytes + n_samples * (SAMPLE_BYTES + width * PAIR_BYTES)

    try:
        width = block_columns(n_samples, n_columns, base_bytes, memory_bytes)
    except BudgetError:
        assert needed(1) > memory_bytes
        return
    assert 1 <= width <= n_columns
    assert needed(width) <= memory_bytes
    full = width == n_columns or (width + 1) * n_samples * 4 > BLOCK_BYTES
    assert full or needed(width + 1) > memory_bytes


def test_too_small_a_budget_is_refused_with_both_numbers_and_one_that_is_enough() -> None:
    with pytest.raises(
        BudgetError,
        match=(
            r"1,000,000 training samples needs 334 MiB.*budget is 200 MiB: raise --memory to "
            r"334MiB"
        ),
    ):
        block_columns(10**6, 10, 200 * MIB, 200 * MIB)
    assert block_columns(10**6, 10, 200 * MIB, 334 * MIB) == 1


@pytest.mark.parametrize(("n", "n_classes", "n_visits"), [(3000, 3, 3), (300, 60, 20)])
def test_judging_labels_takes_no_more_than_is_planned(
    n: int, n_classes: int, n_visits: int
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n_visits, n, n_classes)).astype(np.float16)
    inputs = rng.normal(size=(n_visits, n, 32)).astype(np.float16)
    tracemalloc.start()
    try:
        judge(Dynamics(labels, logits, inputs))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= judging_bytes(n, n_visits, n_classes, n_classes + 34)
