"""How much a report reads at once, against its budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.reporting import BLOCK_BYTES, PAIR_BYTES, SAMPLE_BYTES, block_columns

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
