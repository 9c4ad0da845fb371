"""Rows of several parts counted as one, against lists of every row."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.plan.parts import ends_of, shard_start, split

PARTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def every_row(part_rows: list[int]) -> list[tuple[int, int]]:
    """(part, row within it) of every row, in order."""
    return [(part, row) for part, n_rows in enumerate(part_rows) for row in range(n_rows)]


@given(PARTS, st.integers(0, 60), st.integers(0, 60))
def test_a_run_splits_into_the_same_rows_of_parts(part_rows: list[int], first: int, last: int) -> None:
    found = [(part, row) for part, low, high in split((first, last), ends_of(part_rows)) for row in range(low, high)]
    assert found == every_row(part_rows)[first:last]


@given(PARTS, st.integers(1, 5))
def test_shards_begin_anew_with_each_part_and_cover_every_row(part_rows: list[int], shard_rows: int) -> None:
    rows = every_row(part_rows)
    n_shards = sum(-(-n_rows // shard_rows) for n_rows in part_rows)
    starts = [shard_start(shard, part_rows, shard_rows) for shard in range(n_shards)]
    assert starts[0] == 0
    for first, last in pairwise([*starts, len(rows)]):
        assert rows[first][1] % shard_rows == 0
        assert 0 < last - first <= shard_rows
        assert len({part for part, _ in rows[first:last]}) == 1
