"""Batches of a dataset or a loader: their inputs and targets, and the model's arguments."""

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

#: number of samples that go through the model at once, if the caller gives no number
BATCH = 64
# names under which a mapping may hold its targets; the first one present counts
_TARGETS = ("labels", "label", "label_ids", "targets", "target")
_NUMBERS = (int, float, np.generic)


def called(model: nn.Module, inputs: Any) -> Any:
    """Return the result of `model` for `inputs`."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for a call of a model with `inputs`.

    Args:
        inputs: one tensor, a tuple or a list of arguments, or a mapping of keyword arguments.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def on_device(values: Any, device: torch.device) -> Any:
    """Return `values` with all tensors moved to `device`. Mappings become dicts."""
    if isinstance(values, Mapping):
        return {name: on_device(value, device) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(on_device(value, device) for value in values)
    return values.to(device) if isinstance(values, Tensor) else values


def size_of(values: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor.

    Raises:
        DataError: the batch has no tensor.
    """
    first = next((x for x in tree_leaves(values) if isinstance(x, Tensor) and x.dim() > 0), None)
    if first is None:
        raise DataError(
            f"the targets of a batch are a {type(values).__name__}: give a tensor, one target "
            "for each sample"
        )
    return len(first)


def pair_of(item: Any, what: str) -> tuple[Any, Any]:
    """Return the inputs and the targets of a sample or of a batch.

    Args:
        item: (inputs, targets), (inputs, targets, anything), or a mapping of the model's arguments
            and the targets.
        what: name of the dataset or loader, for messages.

    Raises:
        DataError: `item` is neither a pair nor a mapping with targets.
    """
    if isinstance(item, Mapping):
        name = next((name for name in _TARGETS if item.get(name) is not None), None)
        if name is None:
            raise DataError(
                f"{what} yields a mapping of {', '.join(map(str, item))}: it must hold its "
                f"targets as {_TARGETS[0]!r}"
            )
        return {key: value for key, value in item.items() if key != name}, item[name]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(
            f"{what} yields {type(item).__name__}: it must yield pairs (input, target), or "
            "mappings with labels"
        )
    return item[0], item[1]


def is_dataset(given: Any) -> bool:
    """Tell whether `given` yields samples by number, not batches."""
    if isinstance(given, list | tuple):
        return bool(given) and not _is_batch(given) and _is_sample(given[0])
    is_numbered = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    return is_numbered and not isinstance(given, (DataLoader, IterableDataset, Mapping, Tensor))


def _is_batch(given: Any) -> bool:
    """Tell whether `given` is one batch, not several."""
    return isinstance(given, Mapping) or (
        isinstance(given, tuple) and len(given) > 1 and isinstance(given[0], Tensor)
    )


def _is_sample(item: Any) -> bool:
    """Tell whether an item of a list is one sample.

    The target of a sample is a number, or its values are not tensors yet.
    """
    if isinstance(item, Mapping):
        return not any(isinstance(x, Tensor) and x.dim() > 0 for x in tree_leaves(dict(item)))
    if not isinstance(item, tuple | list) or len(item) < 2:
        return True  # neither a sample nor a batch: the error is raised as for a dataset
    return isinstance(item[1], _NUMBERS) or (isinstance(item[1], Tensor) and item[1].dim() == 0)


def batches_of(ids: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Split `ids` into batches of `size`. The last batch may be smaller."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def dataset_batches(
    dataset: Any, name: str, seed: int, batch_size: int
) -> Iterator[tuple[Any, Any]]:
    """Yield the samples of a dataset in order, as (inputs, targets).

    The random numbers are the same as for a pipeline's test set with this seed.

    Args:
        dataset: map-style dataset of (input, target) or of mappings.
        name: name of the dataset, for messages.
        seed: seed of the dataset's random numbers.
        batch_size: largest number of samples in a batch. A batch also ends before a sample of
            another shape.
    """
    order = batches_of(np.arange(len(dataset)), batch_size)
    # there are no worker processes, so there is nothing to close
    for _, inputs, targets in Batches(dataset, name, (seed, 0), alike=False).batches(order):
        yield inputs, targets


def given_batches(given: Any, seed: int, batch_size: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets) of the test samples that a user gives.

    Args:
        given: a dataset, an iterable of batches, or one batch.
        seed: seed of a dataset's random numbers.
        batch_size: largest number of samples in a batch of a dataset.

    Raises:
        DataError: `given` is none of these, or a batch has no targets.
    """
    if _is_batch(given):
        given = [given]
    if is_dataset(given):
        yield from dataset_batches(given, "test", seed, batch_size)
        return
    if not isinstance(given, Iterable):
        raise DataError(
            f"the test samples are a {type(given).__name__}: give a dataset, a loader, or an "
            "iterable of batches"
        )
    for batch in given:
        yield pair_of(batch, "the iterable of test batches")


class _Seeded:
    """A dataset with random numbers that depend on the seed, the epoch and the batch alone.

    Numbers that were drawn before do not matter, nor does the worker.

    Args:
        dataset: map-style dataset.
        key: key of the random numbers. The number of the batch is appended.
    """

    def __init__(self, dataset: Any, key: tuple[int, ...]) -> None:
        self._dataset, self._key = dataset, key

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        number, ids = batch
        if type(self._dataset) is TensorDataset:  # draws nothing, and seeding would double the time
            return [self._dataset[i] for i in ids]
        with seeded(*self._key, number):
            many = getattr(self._dataset, "__getitems__", None)
            return list(many(ids)) if callable(many) else [self._dataset[i] for i in ids]


class Batches:
    """Batches of a dataset.

    Args:
        dataset: map-style dataset of (input, target), or of mappings that hold their targets too.
        name: name of the dataset, for messages.
        key: key of the dataset's random numbers.
        workers: number of processes that fetch samples; 0 if this process fetches them.
        alike: True to refuse samples of unlike shapes. Otherwise a batch is split between samples
            of different shapes.
    """

    def __init__(
        self, dataset: Any, name: str, key: tuple[int, int], workers: int = 0, *, alike: bool = True
    ) -> None:
        self._dataset, self._name, self._key, self._workers = dataset, name, key, workers
        self._alike = alike
        self._shapes: str | None = None

    def batches(
        self, order: list[NDArray[np.int64]], epoch: int = 0, first: int = 0
    ) -> Stream[Batch]:
        """Return the batches of an epoch.

        The caller has to close the stream, which may have processes that fetch samples.

        Args:
            order: ids of the samples of each batch, each of shape (batch,), int64.
            epoch: number of the epoch.
            first: number of the first batch to fetch.
        """
        ends = ExitStack()
        return Stream(self._fetched(order, epoch, first, ends), ends.close)

    def _fetched(
        self, order: list[NDArray[np.int64]], epoch: int, first: int, ends: ExitStack
    ) -> Iterator[Batch]:
        # A generator for the loader alone. Otherwise the loader draws from the global generator,
        # which the model's dropout uses.
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
        """Return the shapes, inputs and targets of each run of samples with equal shapes."""
        samples = [
            tuple(
                _as_tensors(part, self._name) for part in pair_of(item, f"the {self._name} dataset")
            )
            for item in items
        ]
        found = []
        for shapes, group in groupby(
            samples, key=lambda sample: " and ".join(map(_shapes, sample))
        ):
            self._check_shapes(shapes)
            inputs, targets = (_collated(parts) for parts in zip(*group, strict=True))
            found.append((shapes, inputs, targets))
        return found

    def _check_shapes(self, shapes: str) -> None:
        if not self._alike:
            return
        # a worker of the loader compares its own batches; this process compares all batches
        if self._shapes not in (None, shapes):
            raise DataError(
                f"the {self._name} dataset yields an (input, target) of shapes {shapes} after "
                f"{self._shapes}: "
                f"pad or crop its samples to one shape"
            )
        self._shapes = shapes


def _as_tensors(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tensors(part, name) for key, part in value.items()}
    if isinstance(value, list | tuple) and not (
        value and all(isinstance(part, _NUMBERS) for part in value)
    ):
        return tuple(_as_tensors(part, name) for part in value)
    if not isinstance(value, (Tensor, np.ndarray, list, tuple, *_NUMBERS)):
        raise DataError(
            f"the {name} dataset yields a pair with a {type(value).__name__}: inputs and targets "
            "must be tensors, arrays or numbers"
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
