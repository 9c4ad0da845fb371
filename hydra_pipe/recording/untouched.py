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

# levels to which a dataset or a loader is searched for its own generators (subsets, transforms,
# samplers), and most items searched in a list
_LEVELS = 6
_MOST_ITEMS = 100


@contextmanager
def untouched(*things: Any) -> Iterator[None]:
    """Enter a block after which models and random generators are as they were before it.

    Restored are parameters, buffers, attributes of modules and random generators.

    Args:
        things: models; losses that are modules; datasets or loaders. Forward passes may change
            models and losses even in eval mode: an embedding with `max_norm` scales the rows that
            it meets. Among untrained parameters only those of such embeddings are restored, because
            the others may be the bulk of a large model. The own generators of datasets and loaders
            (of torch, NumPy or random) are restored too.
    """
    modules = [thing for thing in things if isinstance(thing, nn.Module)]
    kept, of_sources = random_state(), _restoring(things)
    attributes = [pair for module in modules for pair in _attributes(module)]
    before = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for module in modules
        for tensor in _may_change(module)
    ]
    try:
        yield
    finally:
        for own, was in attributes:
            _put_in(own, was)
        with torch.no_grad():
            for tensor, values in before:
                if not torch.equal(tensor, there := values.to(tensor.device)):
                    tensor.copy_(there)
        restore_random_state(kept)
        for restore in of_sources:
            restore()


def _may_change(model: nn.Module) -> list[Tensor]:
    scaled = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(dict.fromkeys([*scaled, *trained, *model.buffers()]))


def _attributes(model: nn.Module) -> list[tuple[dict[Any, Any] | list[Any], Any]]:
    """Return the modules' attributes, and the dictionaries and lists among them, with copies.

    Dictionaries and lists may hold counters and caches, for example.
    """
    found: list[tuple[dict[Any, Any] | list[Any], Any]] = []
    for module in model.modules():
        own = vars(module)
        found += [
            (own, dict(own)),
            *((value, value.copy()) for value in own.values() if type(value) in (dict, list)),
        ]
    return found


def _put_in(own: dict[Any, Any] | list[Any], was: Any) -> None:
    """Restore the contents of `own`. Attributes that did not change are not touched."""
    if isinstance(own, list):
        own[:] = was
        return
    for name in [name for name in own if name not in was]:
        del own[name]
    for name, value in was.items():
        if name not in own or own[name] is not value:
            own[name] = value


def _restoring(sources: tuple[Any, ...]) -> list[Callable[[], object]]:
    """Return functions that restore the generators in `sources`.

    Generators are searched in attributes, lists and mappings.
    """
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
    """Return a function that restores a generator's present state; None: not a generator."""
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
