"""`relevance.zarr`: one array (sample, test) for each method."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array, Group, damage_named
from hydra_pipe.store.files import remove

RELEVANCE_UNREADABLE = "the relevance is not readable: compute it again with hydra-pipe reduce --overwrite"
CHUNK_SAMPLES, CHUNK_TESTS = 4096, 64


def create_relevance(path: Path, method: str, shape: tuple[int, int], tests_at_once: int, run_id: str) -> Array:
    """A new array for `method`, float32, dimensions (sample, test); sign and unit stand in its attributes.

    Args:
        path: of the store.
        method: name of the array.
        shape: samples and test samples.
        tests_at_once: that are written together, so that no chunk is written in two pieces.
        run_id: of the run.
    """
    n_samples, n_tests = shape
    Group.create(path, {names.KIND: "relevance", names.RUN_ID: run_id})
    remove(path / method)
    attributes = {names.METHOD: method, names.SIGN: names.SIGN_TEXT, names.UNIT: names.UNIT_TEXT}
    chunks = (min(CHUNK_SAMPLES, n_samples), min(CHUNK_TESTS, tests_at_once))
    dimensions = (names.SAMPLE_DIM, names.TEST_DIM)
    return Array.create(path / method, (n_samples, n_tests), "float32", dimensions, chunks, attributes=attributes)


def open_relevance(path: Path, method: str) -> Array:
    """The array of `method`. Raises: StoreError: missing or damaged."""
    return Group.open(path, RELEVANCE_UNREADABLE).array(method)


def write_relevance(array: Array, first_sample: int, first_test: int, values: NDArray[np.float32]) -> None:
    """Write a block that begins chunks and, but at the array's edges, ends them."""
    rows, columns = array.chunks
    for low in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            at = ((first_sample + low) // rows, (first_test + left) // columns)
            array.write_file(at, values[low : low + rows, left : left + columns])


def read_relevance(array: Array, tests: slice) -> NDArray[np.float32]:
    """Columns of some test samples, shape (sample, test). Raises: StoreError: damaged."""
    with damage_named(array.path, RELEVANCE_UNREADABLE):
        return array.read(slice(None), tests)
