"""Chunk and shard shapes of the gradient store and of results."""

from dataclasses import dataclass

# A shard is one file and one write. Two shards are in memory while one is written to the disk.
SHARD_BYTES = 16 * 2**20
# A chunk is decoded at once: large enough for the codec, small enough to stay in the cache.
CHUNK_BYTES = 2**20
# Rows up to this width are stored unbroken, since whole files are read fastest.
CHUNK_FEATURES = 65536
MAX_SHARD_ROWS = 16384
# Columns of a chunk of the relevance array. Samples and features of a file of the matrix of
# hypergradients.
MOST_CHUNK, MOST_SAMPLES, MOST_FEATURES = 64, 4096, 1024


@dataclass(frozen=True)
class Geometry:
    """Rows and features of a chunk, and of the shard that holds whole chunks.

    Args:
        chunk_rows: rows of a chunk, a divisor of `shard_rows`.
        chunk_features: features of a chunk. The last chunk of a row may reach past the last
            feature.
        shard_rows: rows in one file.
        shard_features: features in one file, a multiple of `chunk_features` and no less than the
            features of a row. A shard holds whole rows.
    """

    chunk_rows: int
    chunk_features: int
    shard_rows: int
    shard_features: int


def store_geometry(n_features: int, item_bytes: int) -> Geometry:
    """Return chunk and shard shapes for rows of `n_features` values of `item_bytes` each.

    The numbers of rows are powers of two.
    """
    n_chunks = -(-n_features // CHUNK_FEATURES)
    chunk_features = -(-n_features // n_chunks)
    shard_rows = _power_of_two(SHARD_BYTES // (n_features * item_bytes), MAX_SHARD_ROWS)
    chunk_rows = _power_of_two(CHUNK_BYTES // (chunk_features * item_bytes), shard_rows)
    return Geometry(chunk_rows, chunk_features, shard_rows, chunk_features * n_chunks)


def _power_of_two(n: int, most: int) -> int:
    """Return the largest power of two that is at most `n` and `most`, and at least 1."""
    return 1 << (max(1, min(n, most)).bit_length() - 1)


def even_width(n_columns: int, blocks: int, most: int = MOST_CHUNK) -> int:
    """Return the columns of each of `blocks` blocks, in whole chunks of the result.

    A chunk has `most` columns at most.
    """
    width = -(-n_columns // blocks)
    return chunk_columns(width, most) * -(-width // most)


def chunk_columns(width: int, most: int = MOST_CHUNK) -> int:
    """Return the columns of a chunk of the result, `most` at most.

    A block of `width` columns has whole chunks, if `even_width` made `width`.
    """
    return -(-width // -(-width // most))
