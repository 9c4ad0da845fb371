"""Chunk and shard shapes of the gradient store, and of what is computed from it."""

from dataclasses import dataclass

# A shard is one file and one write. Two of them are in memory while one is on its way to the disk.
SHARD_BYTES = 16 * 2**20
# A chunk is what is decoded at once: large enough for the codec, small enough to stay in the cache.
CHUNK_BYTES = 2**20
# Rows up to this width are stored unbroken: whole files are what is read fastest.
CHUNK_FEATURES = 65536
MAX_SHARD_ROWS = 16384
# columns of a chunk of the relevance array; samples and features of a file of the matrix of hypergradients
MOST_CHUNK, MOST_SAMPLES, MOST_FEATURES = 64, 4096, 1024


@dataclass(frozen=True)
class Geometry:
    """Rows and features of a chunk, and of the shard that holds whole chunks.

    Args:
        chunk_rows: divides `shard_rows`.
        chunk_features: the last chunk of a row may reach past the last feature.
        shard_rows: rows in one file.
        shard_features: a multiple of `chunk_features`, no less than the features: a shard holds whole rows.
    """

    chunk_rows: int
    chunk_features: int
    shard_rows: int
    shard_features: int


def store_geometry(n_features: int, item_bytes: int) -> Geometry:
    """Chunk and shard shapes for rows of `n_features` values of `item_bytes` each. Powers of two in rows."""
    n_chunks = -(-n_features // CHUNK_FEATURES)
    chunk_features = -(-n_features // n_chunks)
    shard_rows = _power_of_two(SHARD_BYTES // (n_features * item_bytes), MAX_SHARD_ROWS)
    chunk_rows = _power_of_two(CHUNK_BYTES // (chunk_features * item_bytes), shard_rows)
    return Geometry(chunk_rows, chunk_features, shard_rows, chunk_features * n_chunks)


def _power_of_two(n: int, most: int) -> int:
    """The largest power of two that is at most `n` and `most`, and at least 1."""
    return 1 << (max(1, min(n, most)).bit_length() - 1)


def even_width(n_columns: int, blocks: int, most: int = MOST_CHUNK) -> int:
    """Columns of each of so many blocks, that fill whole chunks of the result, of `most` columns at most."""
    width = -(-n_columns // blocks)
    return chunk_columns(width, most) * -(-width // most)


def chunk_columns(width: int, most: int = MOST_CHUNK) -> int:
    """Columns of a chunk of the result, of which there is a whole number in blocks of `width` columns."""
    return -(-width // -(-width // most))
