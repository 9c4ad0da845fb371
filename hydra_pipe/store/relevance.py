"""`relevance.zarr`: one array (sample, test) for each method."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from hydra_pipe.store import names
from hydra_pipe.store.arrays import create_array, damage_named, get_array, open_group

RELEVANCE_UNREADABLE = "the relevance is not readable: compute it again with hydra-pipe reduce --overwrite"
CHUNK_SAMPLES, CHUNK_TESTS = 4096, 64


def create_relevance(path: Path, method: str, n_samples: int, n_tests: int, run_id: str) -> zarr.Array[Any]:
    """A new array for `method`, float32, dimensions (sample, test); sign and unit stand in its attributes."""
    root = zarr.open_group(LocalStore(path), mode="a", zarr_format=3)
    root.attrs.update({names.KIND: "relevance", names.RUN_ID: run_id})
    chunks = (min(CHUNK_SAMPLES, n_samples), min(CHUNK_TESTS, n_tests))
    dimensions = (names.SAMPLE_DIM, names.TEST_DIM)
    array = create_array(root, method, (n_samples, n_tests), "float32", dimensions, chunks)
    array.attrs.update({names.METHOD: method, names.SIGN: names.SIGN_TEXT, names.UNIT: names.UNIT_TEXT})
    return array


def open_relevance(path: Path, method: str) -> zarr.Array[Any]:
    """The array of `method`, for reading. Raises: StoreError: missing or damaged."""
    return get_array(open_group(path, RELEVANCE_UNREADABLE), method)


def open_for_writing(path: Path, method: str) -> zarr.Array[Any]:
    """The array of `method`, made by `create_relevance`, to be filled block by block."""
    return get_array(zarr.open_group(LocalStore(path), mode="r+", zarr_format=3), method, fast=True)


def read_relevance(array: zarr.Array[Any], tests: slice) -> NDArray[np.float32]:
    """Columns of some test samples, shape (sample, test). Raises: StoreError: damaged."""
    with damage_named(array.store_path, RELEVANCE_UNREADABLE):
        return np.asarray(array[:, tests])
