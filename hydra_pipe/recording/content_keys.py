"""Keys of samples from what the samples hold, for datasets that name their samples by nothing."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hydra_pipe.errors import DataError
from hydra_pipe.recording.datasets import pair_of
from hydra_pipe.recording.user_code import user_code

_DIGITS = 32


def content_keys(dataset: Any) -> list[str]:
    """Return a key for each sample: the first 32 hex digits of the SHA-256 of its input.

    The keys stay the same where a dataset is put into another order, or gets other targets. Of
    equal inputs the second has the key with "-2" behind, the third with "-3". A dataset that
    augments its inputs at random has other keys each time: give the dataset without.

    Args:
        dataset: map-style dataset of (input, target), or of mappings with targets. An input is of
            tensors, arrays, numbers and strings.

    Returns:
        Keys for `Recorder`, `Pipeline` and `cleaned`, in the order of `dataset`.

    Raises:
        DataError: an item is no sample, or holds something else.
        UserCodeError: the dataset raised.
    """
    keys: list[str] = []
    seen: Counter[str] = Counter()
    for index in range(len(dataset)):
        with user_code(f"the dataset raised at sample {index}"):
            item = dataset[index]
        key = _digest(pair_of(item, "the dataset")[0], index)
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys


def _digest(inputs: Any, index: int) -> str:
    found = hashlib.sha256()
    for value in tree_leaves(inputs):
        tensor = value if isinstance(value, Tensor) else _as_tensor(value)
        if tensor is not None:
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, str):
            found.update(f"str {len(value)}\n{value}".encode())
        else:
            raise DataError(
                f"the input of sample {index} holds a {type(value).__name__}, of which no key can "
                "be made: give keys of your own"
            )
    return found.hexdigest()[:_DIGITS]


def _as_tensor(value: Any) -> Tensor | None:
    """Return a number or an array of numbers as a tensor, None for anything else."""
    array = np.asarray(value) if isinstance(value, int | float | np.generic | np.ndarray) else None
    return None if array is None or array.dtype.kind not in "biufc" else torch.from_numpy(array)
