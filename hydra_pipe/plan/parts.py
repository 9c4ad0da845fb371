"""Rows of several parts, one part after the other, counted as one. Integers only."""

from collections.abc import Iterator, Sequence
from itertools import pairwise


def ends_of(part_rows: Sequence[int]) -> list[int]:
    """One past the last row of each part."""
    ends, end = [], 0
    for n_rows in part_rows:
        end += n_rows
        ends.append(end)
    return ends


def split(run: tuple[int, int], ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(part, first, one past the last row within the part) of what `run` has of each part that it has anything of."""
    for part, (start, end) in enumerate(pairwise([0, *ends])):
        first, last = max(run[0], start), min(run[1], end)
        if first < last:
            yield part, first - start, last - start


def shard_start(shard: int, part_rows: Sequence[int], shard_rows: int) -> int:
    """First row of shard number `shard`, counted over all parts; each part begins with a shard of its own."""
    start = 0
    for n_rows in part_rows:
        n_shards = -(-n_rows // shard_rows)
        if shard < n_shards:
            return start + shard * shard_rows
        shard -= n_shards
        start += n_rows
    return start
