"""A block that leaves a model and all random generators as they were."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hydra_pipe.recording.randomness import random_state, restore_random_state

# how deep a dataset or a loader is searched for generators of its own (subsets, transforms, samplers), and how far a list
_LEVELS = 6
_MOST_ITEMS = 100


@contextmanager
def untouched(model: nn.Module, *sources: Any) -> Iterator[None]:
    """A block after which parameters, buffers and random generators have the values from before it.

    Args:
        model: forward passes may change it even in eval mode: an embedding with `max_norm` scales the rows that it meets. Of
            the parameters that are not trained only these are looked after, for they may be the bulk of a large model.
        sources: datasets or loaders, whose own generators (of torch, NumPy or random) are put back too.
    """
    kept, of_sources = random_state(), _restoring(sources)
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _may_change(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                if not torch.equal(tensor, there := values.to(tensor.device)):
                    tensor.copy_(there)
        restore_random_state(kept)
        for restore in of_sources:
            restore()


def _may_change(model: nn.Module) -> list[Tensor]:
    scaled = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(dict.fromkeys([*scaled, *trained, *model.buffers()]))


def _restoring(sources: tuple[Any, ...]) -> list[Callable[[], object]]:
    """What puts back the generators that `sources` hold in attributes, lists and mappings of theirs."""
    found: list[Callable[[], object]] = []
    seen: set[int] = set()
    level = list(sources)
    for _ in range(_LEVELS):
        following: list[Any] = []
        for value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if (restore := _restorer(value)) is not None:
                found.append(restore)
            elif isinstance(value, Mapping):
                following += list(value.values())[:_MOST_ITEMS]
            elif isinstance(value, list | tuple):
                following += value[:_MOST_ITEMS]
            elif not isinstance(value, Tensor | np.ndarray | nn.Module | ModuleType | type):
                following += vars(value).values() if hasattr(value, "__dict__") else []
        level = following
    return found


def _restorer(value: Any) -> Callable[[], object] | None:
    """What puts a generator back into its present state; None: `value` is no generator."""
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return lambda: value.setstate(numbers)
    if isinstance(value, np.random.Generator):
        bits, state = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(value, torch.Generator | np.random.RandomState):
        own = value.get_state()
        return partial(value.set_state, own)  # type: ignore[arg-type] # of the same object
    return None
