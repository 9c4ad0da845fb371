"""Samples as batches: what a dataset or a loader gives, taken apart into inputs and targets, and what the model is called with."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from hydra_pipe.errors import DataError
from hydra_pipe.recording.randomness import seeded
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.streams import Stream

# ids, inputs and targets of the samples
Batch = tuple[NDArray[np.int64], Any, Any]

#: samples that go through the model at once, where nothing says how many
BATCH = 64
# under which a mapping holds its targets, the first that is there
_TARGETS = ("labels", "label", "label_ids", "targets", "target")
_NUMBERS = (int, float, np.generic)


def called(model: nn.Module, inputs: Any) -> Any:
    """What `model` returns for `inputs`."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for `inputs`: a tensor, several arguments in a tuple or a list, or a mapping of arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def on_device(values: Any, device: torch.device) -> Any:
    """`values` with each tensor among them on `device`; mappings become dicts."""
    if isinstance(values, Mapping):
        return {name: on_device(value, device) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(on_device(value, device) for value in values)
    return values.to(device) if isinstance(values, Tensor) else values


def size_of(values: Any) -> int:
    """Samples in a batch: the length of its first tensor. Raises: DataError: it has none."""
    first = next((x for x in tree_leaves(values) if isinstance(x, Tensor) and x.dim() > 0), None)
    if first is None:
        raise DataError(f"the targets of a batch are a {type(values).__name__}: give a tensor, one target for each sample")
    return len(first)


def pair_of(item: Any, what: str) -> tuple[Any, Any]:
    """Inputs and targets of a sample or of a batch.

    Args:
        item: (inputs, targets) or (inputs, targets, anything), or a mapping of what the model is called with and the targets.
        what: it is called, for messages.

    Raises:
        DataError: neither.
    """
    if isinstance(item, Mapping):
        name = next((name for name in _TARGETS if item.get(name) is not None), None)
        if name is None:
            raise DataError(f"{what} yields a mapping of {', '.join(map(str, item))}: it must hold its targets as {_TARGETS[0]!r}")
        return {key: value for key, value in item.items() if key != name}, item[name]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"{what} yields {type(item).__name__}: it must yield pairs (input, target), or mappings with labels")
    return item[0], item[1]


def is_dataset(given: Any) -> bool:
    """Tell whether `given` yields samples by their number, and not batches."""
    if isinstance(given, list | tuple):
        return bool(given) and not _is_batch(given) and _is_sample(given[0])
    is_numbered = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    return is_numbered and not isinstance(given, (DataLoader, IterableDataset, Mapping, Tensor))


def _is_batch(given: Any) -> bool:
    """Tell whether `given` is one batch, and not several."""
    return isinstance(given, Mapping) or (isinstance(given, tuple) and len(given) > 1 and isinstance(given[0], Tensor))


def _is_sample(item: Any) -> bool:
    """Tell whether an item of a list is one sample: its target is a number, or its values are not tensors yet."""
    if isinstance(item, Mapping):
        return not any(isinstance(x, Tensor) and x.dim() > 0 for x in tree_leaves(dict(item)))
    if not isinstance(item, tuple | list) or len(item) < 2:
        return True  # which neither can be: it is told as of a dataset
    return isinstance(item[1], _NUMBERS) or (isinstance(item[1], Tensor) and item[1].dim() == 0)


def batches_of(ids: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`ids` in batches of `size`, the last one of what is left."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def dataset_batches(dataset: Any, name: str, seed: int, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """The samples of a dataset in order, as (inputs, targets): as those of a pipeline's test set, with this seed, are taken.

    Args:
        dataset: map-style, of (input, target) or mappings.
        name: of it, for messages.
        seed: of what it draws.
        batch_size: samples at once. Where shapes differ a batch ends.
    """
    order = batches_of(np.arange(len(dataset)), batch_size)
    # without processes: there is nothing to close
    for _, inputs, targets in Batches(dataset, name, (seed, 0), alike=False).batches(order):
        yield inputs, targets


def given_batches(given: Any, seed: int, batch_size: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) of what somebody gives as test samples: a dataset, an iterable of batches, or one. Raises: DataError."""
    if _is_batch(given):
        given = [given]
    if is_dataset(given):
        yield from dataset_batches(given, "test", seed, batch_size)
        return
    if not isinstance(given, Iterable):
        raise DataError(f"the test samples are a {type(given).__name__}: give a dataset, a loader, or an iterable of batches")
    for batch in given:
        yield pair_of(batch, "the iterable of test batches")


class _Seeded:
    """A dataset whose randomness is a function of the seed, the epoch and the batch: whatever was drawn before, in any worker.

    Args:
        dataset: map-style.
        key: of what is drawn.
    """

    def __init__(self, dataset: Any, key: tuple[int, ...]) -> None:
        self._dataset, self._key = dataset, key

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        number, ids = batch
        if type(self._dataset) is TensorDataset:  # draws nothing, and seeding takes as long as it does
            return [self._dataset[i] for i in ids]
        with seeded(*self._key, number):
            many = getattr(self._dataset, "__getitems__", None)
            return list(many(ids)) if callable(many) else [self._dataset[i] for i in ids]


class Batches:
    """Batches of a dataset.

    Args:
        dataset: map-style, of (input, target) or of mappings that hold their targets too.
        name: of it, for messages.
        key: of what it draws.
        workers: processes that fetch; 0: this one.
        alike: refuse samples of unlike shapes. Else a batch is cut where shapes differ.
    """

    def __init__(self, dataset: Any, name: str, key: tuple[int, int], workers: int = 0, *, alike: bool = True) -> None:
        self._dataset, self._name, self._key, self._workers = dataset, name, key, workers
        self._alike = alike
        self._shapes: str | None = None

    def batches(self, order: list[NDArray[np.int64]], epoch: int = 0, first: int = 0) -> Stream[Batch]:
        """The batches of an epoch, from number `first` on. Close it: there may be processes that fetch."""
        ends = ExitStack()
        return Stream(self._fetched(order, epoch, first, ends), ends.close)

    def _fetched(self, order: list[NDArray[np.int64]], epoch: int, first: int, ends: ExitStack) -> Iterator[Batch]:
        # a generator of its own: the loader draws from the global one otherwise, which the model's dropout uses
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self._dataset, (*self._key, epoch)),  # type: ignore[arg-type] # what it yields is what is fetched from it
            batch_sampler=[(number, ids.tolist()) for number, ids in enumerate(order)][first:],  # type: ignore[arg-type]
            collate_fn=self._collate,
            generator=torch.Generator(),
            num_workers=self._workers,
        )
        iterator = iter(loader)
        if self._workers:
            ends.callback(iterator._shutdown_workers)  # type: ignore[attr-defined] # otherwise they end when the collector comes
        for ids in order[first:]:
            with user_code(f"the {self._name} dataset raised at samples {_range(ids)}"):
                parts = next(iterator)
            start = 0
            for shapes, inputs, targets in parts:
                self._check_shapes(shapes)
                stop = start + size_of(targets)
                yield ids[start:stop], inputs, targets
                start = stop

    def _collate(self, items: list[Any]) -> list[tuple[str, Any, Any]]:
        """Shapes, inputs and targets of each run of samples of like shapes."""
        samples = [tuple(_as_tensors(part, self._name) for part in pair_of(item, f"the {self._name} dataset")) for item in items]
        found = []
        for shapes, group in groupby(samples, key=lambda sample: " and ".join(map(_shapes, sample))):
            self._check_shapes(shapes)
            inputs, targets = (_collated(parts) for parts in zip(*group, strict=True))
            found.append((shapes, inputs, targets))
        return found

    def _check_shapes(self, shapes: str) -> None:
        if not self._alike:
            return
        # in a worker of the loader, those of its own batches; in this process, of all
        if self._shapes not in (None, shapes):
            raise DataError(
                f"the {self._name} dataset yields an (input, target) of shapes {shapes} after {self._shapes}: "
                f"pad or crop its samples to one shape"
            )
        self._shapes = shapes


def _as_tensors(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tensors(part, name) for key, part in value.items()}
    if isinstance(value, list | tuple) and not (value and all(isinstance(part, _NUMBERS) for part in value)):
        return tuple(_as_tensors(part, name) for part in value)
    if not isinstance(value, (Tensor, np.ndarray, list, tuple, *_NUMBERS)):
        raise DataError(
            f"the {name} dataset yields a pair with a {type(value).__name__}: inputs and targets must be tensors, arrays or numbers"
        )
    return torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))


def _collated(values: tuple[Any, ...]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _collated(tuple(value[key] for value in values)) for key in first}
    if isinstance(first, tuple):
        return tuple(map(_collated, zip(*values, strict=True)))
    return default_collate(list(values))


def _shapes(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shapes(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shapes, value))}]"
    return str(tuple(value.shape))


def _range(ids: NDArray[np.int64]) -> str:
    return ", ".join(map(str, ids[:5])) + (" ..." if len(ids) > 5 else "")
