"""Rows of several parts counted as one, against lists of every row."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.plan.rank_rows import ends_of, rows_of_shards, shard_start, shards_of, split

PARTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def every_row(part_rows: list[int]) -> list[tuple[int, int]]:
    """(part, row within it) of every row, in order."""
    return [(part, row) for part, n_rows in enumerate(part_rows) for row in range(n_rows)]


@given(PARTS, st.integers(0, 60), st.integers(0, 60))
def test_a_run_splits_into_the_same_rows_of_parts(
    part_rows: list[int], first: int, last: int
) -> None:
    found = [
        (part, row)
        for part, low, high in split((first, last), ends_of(part_rows))
        for row in range(low, high)
    ]
    assert found == every_row(part_rows)[first:last]


@given(PARTS, st.integers(1, 5))
def test_shards_begin_anew_with_each_part_and_cover_every_row(
    part_rows: list[int], shard_rows: int
) -> None:
    rows = every_row(part_rows)
    n_shards = sum(-(-n_rows // shard_rows) for n_rows in part_rows)
    starts = [shard_start(shard, part_rows, shard_rows) for shard in range(n_shards)]
    assert starts[0] == 0
    for first, last in pairwise([*starts, len(rows)]):
        assert rows[first][1] % shard_rows == 0
        assert 0 < last - first <= shard_rows
        assert len({part for part, _ in rows[first:last]}) == 1


@given(
    part_rows=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    shard_rows=st.integers(1, 9),
    data=st.data(),
)
def test_shards_of_rows_are_those_that_hold_them(
    part_rows: list[int], shard_rows: int, data: st.DataObject
) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, sum(part_rows) - 1), min_size=1)))
    bounds = [
        (start + low, start + min(low + shard_rows, n))
        for start, n in zip([0, *ends_of(part_rows)], part_rows, strict=False)
        for low in range(0, n, shard_rows)
    ]
    expected = [
        i for i, (first, last) in enumerate(bounds) if any(first <= row < last for row in rows)
    ]
    assert list(shards_of(rows, part_rows, shard_rows)) == expected
    assert rows_of_shards(expected, part_rows, shard_rows) == sum(
        last - first for first, last in (bounds[i] for i in expected)
    )
