"""Chunks and shards of any number of features."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.plan.chunking import (
    CHUNK_BYTES,
    CHUNK_FEATURES,
    MAX_SHARD_ROWS,
    SHARD_BYTES,
    Geometry,
    store_geometry,
)

FEATURES = st.one_of(st.integers(1, 20_000), st.integers(1, 10_000_000))
ITEM_BYTES = st.sampled_from([1, 2, 4])
EVERY = settings(max_examples=200, deadline=None)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@EVERY
@given(FEATURES, ITEM_BYTES)
def test_a_shard_holds_whole_chunks_and_whole_rows(n_features: int, item_bytes: int) -> None:
    g = store_geometry(n_features, item_bytes)
    assert g.shard_rows % g.chunk_rows == 0
    assert g.shard_features % g.chunk_features == 0
    assert g.shard_features >= n_features


@EVERY
@given(FEATURES, ITEM_BYTES)
def test_rows_come_in_powers_of_two(n_features: int, item_bytes: int) -> None:
    g = store_geometry(n_features, item_bytes)
    assert is_power_of_two(g.chunk_rows)
    assert is_power_of_two(g.shard_rows)


@EVERY
@given(FEATURES, ITEM_BYTES)
def test_no_chunk_lies_beyond_the_last_feature(n_features: int, item_bytes: int) -> None:
    g = store_geometry(n_features, item_bytes)
    assert g.shard_features - g.chunk_features < n_features


@EVERY
@given(FEATURES, ITEM_BYTES)
def test_chunks_and_shards_keep_to_their_bytes_unless_one_row_is_more(
    n_features: int, item_bytes: int
) -> None:
    g = store_geometry(n_features, item_bytes)
    assert g.chunk_features <= CHUNK_FEATURES
    assert g.chunk_rows * g.chunk_features * item_bytes <= CHUNK_BYTES
    assert g.shard_rows <= MAX_SHARD_ROWS
    assert g.shard_rows == 1 or g.shard_rows * n_features * item_bytes <= SHARD_BYTES


@EVERY
@given(FEATURES, ITEM_BYTES)
def test_shards_are_no_smaller_than_they_need_be(n_features: int, item_bytes: int) -> None:
    g = store_geometry(n_features, item_bytes)
    assert (
        g.shard_rows == MAX_SHARD_ROWS or 2 * g.shard_rows * n_features * item_bytes > SHARD_BYTES
    )


def test_the_shapes_of_lenet5_are_these() -> None:
    assert store_geometry(3390, 2) == Geometry(
        chunk_rows=128, chunk_features=3390, shard_rows=2048, shard_features=3390
    )


def test_one_feature_too_many_makes_two_equal_chunks() -> None:
    assert store_geometry(CHUNK_FEATURES, 2).chunk_features == CHUNK_FEATURES
    g = store_geometry(CHUNK_FEATURES + 1, 2)
    assert (g.chunk_features, g.shard_features) == (CHUNK_FEATURES // 2 + 1, CHUNK_FEATURES + 2)
