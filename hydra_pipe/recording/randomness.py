"""The random generators of a process: their states saved and restored, and a seed for a block."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of the random generators, as tensors and plain values.

    The generators are Python's, NumPy's global one, and torch's on the CPU and on every CUDA device
    in use.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the generators from the value of `random_state`.

    Raises:
        KeyError: `state` is something else. Other errors are possible then, too.
    """
    version, numbers, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (on the CPU) from `key` alone within a block.

    The former states of the generators are restored after the block.

    Args:
        key: integers, 0 or larger.
    """
    kept = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
