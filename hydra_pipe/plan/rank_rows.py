"""Rows of several parts, one part after the other, counted as one. Integers only."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise


def ends_of(part_rows: Sequence[int]) -> list[int]:
    """Return one past the last row of each part."""
    ends, end = [], 0
    for n_rows in part_rows:
        end += n_rows
        ends.append(end)
    return ends


def split(run: tuple[int, int], ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Divide `run` among the parts that it has rows of.

    Yields:
        (part, first, one past the last row), with rows counted within the part.
    """
    for part, (start, end) in enumerate(pairwise([0, *ends])):
        first, last = max(run[0], start), min(run[1], end)
        if first < last:
            yield part, first - start, last - start


def shard_start(shard: int, part_rows: Sequence[int], shard_rows: int) -> int:
    """Return the first row of shard number `shard`, counted over all parts.

    Each part begins with a new shard.
    """
    start = 0
    for n_rows in part_rows:
        n_shards = -(-n_rows // shard_rows)
        if shard < n_shards:
            return start + shard * shard_rows
        shard -= n_shards
        start += n_rows
    return start


def shards_of(rows: Iterable[int], part_rows: Sequence[int], shard_rows: int) -> Iterator[int]:
    """Yield the numbers of the shards that have any of `rows`, ascending, each once.

    Shards are counted over all parts.

    Args:
        rows: numbers of rows, ascending.
        part_rows: number of rows of each part.
        shard_rows: number of rows of a full shard.
    """
    ends = ends_of(part_rows)
    start = before = part = 0
    last = -1
    for row in rows:
        while row >= ends[part]:
            before += -(-part_rows[part] // shard_rows)
            start, part = ends[part], part + 1
        shard = before + (row - start) // shard_rows
        if shard != last:
            yield shard
        last = shard


def rows_of_shards(shards: Sequence[int], part_rows: Sequence[int], shard_rows: int) -> int:
    """Return the number of rows that some shards have together.

    Args:
        shards: numbers of the shards, counted over all parts, ascending.
        part_rows: number of rows of each part.
        shard_rows: number of rows of a full shard.
    """
    n_rows = len(shards) * shard_rows
    last = -1
    for part in part_rows:
        last += -(-part // shard_rows)
        if part % shard_rows and last in shards:  # the last shard of a part may have fewer
            n_rows -= shard_rows - part % shard_rows
    return n_rows
