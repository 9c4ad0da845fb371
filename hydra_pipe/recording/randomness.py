"""Random generators of a process: kept and put back; and seeded for a while by what is to be drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of Python, NumPy's global generator, and torch's on the CPU and on every CUDA device in use; tensors and plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave. Raises: KeyError and the like: it is something else."""
    version, numbers, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """A block in which Python, NumPy and torch (on the CPU) draw what follows from `key` alone; their states are put back after it.

    Args:
        key: numbers from 0 on.
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
