"""Sums and means of a relevance array for each training sample, read block by block."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Progress
from hydra_pipe.store.data.relevance import read_relevance
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.types import F64

# Bytes of the matrix's columns that are in memory at once.
BLOCK_BYTES = 64 * 2**20


def sums_over(array: Array, chosen: NDArray[np.bool_], progress: Progress) -> F64:
    """Sum relevance over sets of columns.

    Args:
        array: relevance, shape (sample, column).
        chosen: masks of the columns in each set, shape (set, column).
        progress: place to show progress.

    Returns:
        The sums, shape (set, sample).

    Raises:
        StoreError: the array is damaged.
    """
    found = np.zeros((len(chosen), array.shape[0]))
    with progress.task("sum", array.shape[1], "tests") as task:
        for columns, block in blocks_of(array):
            for own, mask in zip(found, chosen[:, columns], strict=True):
                own += block[:, mask].sum(axis=1, dtype=np.float64)
            task.advance(block.shape[1])
    return found


def means_by(
    array: Array, samples: NDArray[np.int64], groups: NDArray[np.int64], n_groups: int
) -> F64:
    """Return the mean relevance of some samples over the columns of each group.

    Args:
        array: relevance, shape (sample, column).
        samples: ids of the samples.
        groups: index of each column's group, shape (column,).
        n_groups: number of groups. The mean of a group without columns is 0.

    Returns:
        The means, shape (len(samples), group).

    Raises:
        StoreError: the array is damaged.
    """
    found = np.zeros((n_groups, len(samples)))
    for columns, block in blocks_of(array):
        np.add.at(found, groups[columns], block[samples].T.astype(np.float64))
    counts = np.maximum(np.bincount(groups, minlength=n_groups), 1)
    means: F64 = (found / counts[:, None]).T
    return means


def blocks_of(array: Array) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield columns of a relevance array, and their values, shape (sample, column).

    Raises:
        StoreError: the array is damaged.
    """
    n_samples, n_columns = array.shape
    chunk = array.chunks[1]
    width = max(chunk, BLOCK_BYTES // (n_samples * 4) // chunk * chunk)
    for first in range(0, n_columns, width):
        columns = slice(first, min(first + width, n_columns))
        yield columns, read_relevance(array, columns)
