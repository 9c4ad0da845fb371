"""What the tests of the trainers look at: weights, and what is in a recording."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import nn

from hydra_pipe.store import names


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def arrays(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every array of the recording; those by row and by step by their last name."""
    store = zarr.open_group(run / names.GRADIENTS, mode="r")
    return {name: np.asarray(found[:]) for name, found in store.members(max_depth=None) if isinstance(found, zarr.Array)}


def assert_same_run(run: Path, other: Path) -> None:
    """All arrays of two recordings, bit for bit."""
    one, two = arrays(run), arrays(other)
    assert sorted(one) == sorted(two)
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


def steps_of(run: Path) -> list[np.ndarray[Any, Any]]:
    """The sample ids of each step."""
    found = arrays(run)
    return [found[names.SAMPLE][found[names.STEP] == step] for step in range(found[names.STEP].max() + 1)]
