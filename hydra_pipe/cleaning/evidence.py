"""What a relevance array says of each training sample, read block by block."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Progress
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.relevance import read_relevance

# columns of the matrix that are in memory at once, as bytes
BLOCK_BYTES = 64 * 2**20
Floats = NDArray[np.float64]


def sums_over(array: Array, chosen: NDArray[np.bool_], progress: Progress) -> Floats:
    """Relevance summed over sets of columns.

    Args:
        array: relevance, shape (sample, column).
        chosen: the columns of each set, shape (set, column).
        progress: where to show progress.

    Returns:
        Shape (set, sample).

    Raises:
        StoreError: it is damaged.
    """
    found = np.zeros((len(chosen), array.shape[0]))
    with progress.task("sum", array.shape[1], "tests") as task:
        for columns, block in _blocks(array):
            for own, mask in zip(found, chosen[:, columns], strict=True):
                own += block[:, mask].sum(axis=1, dtype=np.float64)
            task.advance(block.shape[1])
    return found


def means_by(array: Array, samples: NDArray[np.int64], groups: NDArray[np.int64], n_groups: int) -> Floats:
    """Mean relevance of some samples over the columns of each group.

    Args:
        array: relevance, shape (sample, column).
        samples: their ids.
        groups: number of the group of each column, shape (column,).
        n_groups: how many there are, each with a column at least.

    Returns:
        Shape (len(samples), group).

    Raises:
        StoreError: it is damaged.
    """
    found = np.zeros((n_groups, len(samples)))
    for columns, block in _blocks(array):
        np.add.at(found, groups[columns], block[samples].T.astype(np.float64))
    means: Floats = (found / np.bincount(groups, minlength=n_groups)[:, None]).T
    return means


def _blocks(array: Array) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    n_samples, n_columns = array.shape
    chunk = array.chunks[1]
    width = max(chunk, BLOCK_BYTES // (n_samples * 4) // chunk * chunk)
    for first in range(0, n_columns, width):
        columns = slice(first, min(first + width, n_columns))
        yield columns, read_relevance(array, columns)
