"""The batches that a pipeline is trained on: which samples, in which order, and what their datasets draw for them."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from hydra_pipe.errors import DataError
from hydra_pipe.progress import Task
from hydra_pipe.recording.checkpointing import Checkpoints
from hydra_pipe.recording.pipeline import Pipeline
from hydra_pipe.recording.randomness import seeded
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.streams import Stream

# ids, inputs and targets of the samples
Batch = tuple[NDArray[np.int64], Tensor, Tensor]


def epoch_order(pipeline: Pipeline, epoch: int) -> list[NDArray[np.int64]]:
    """Batches of sample ids of one epoch: a function of (seed, epoch) alone, so that any epoch can be found again."""
    generator = np.random.default_rng([pipeline.seed, epoch])
    return batches_of(generator.permutation(len(pipeline.train)), pipeline.batch_size)


def batches_of(ids: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`ids` in batches of `size`, the last one of what is left."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def test_batches(pipeline: Pipeline, task: Task, checkpoints: Checkpoints | None) -> Stream[tuple[Tensor, Tensor]]:
    """The test set in order, in batches of the pipeline's size. Close it.

    Raises:
        InterruptedRunError: when it is iterated: `checkpoints` tells to stop.
    """
    batches = Samples(pipeline, "test").batches(batches_of(np.arange(len(pipeline.test)), pipeline.batch_size))
    return Stream(_heeding(batches, task, checkpoints), batches.close)


def _heeding(batches: Stream[Batch], task: Task, checkpoints: Checkpoints | None) -> Iterator[tuple[Tensor, Tensor]]:
    for ids, inputs, targets in batches:
        if checkpoints is not None:
            checkpoints.heed()
        yield inputs, targets
        task.advance(len(ids))


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
    """Batches of a dataset, whose samples all have one shape, which is checked.

    Args:
        dataset: map-style, of (input, target).
        name: of it, for messages.
        key: of what it draws.
        workers: processes that fetch; 0: this one.
    """

    def __init__(self, dataset: Any, name: str, key: tuple[int, int], workers: int = 0) -> None:
        self._dataset, self._name, self._key, self._workers = dataset, name, key, workers
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

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
                inputs, targets = next(iterator)
            self._check_shapes({(tuple(inputs.shape[1:]), tuple(targets.shape[1:]))})
            yield ids, inputs, targets

    def _collate(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        for item in items:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise DataError(f"the {self._name} dataset yields {type(item).__name__}: it must yield pairs (input, target)")
            for part in item:
                if not isinstance(part, Tensor | np.ndarray | np.generic | int | float):
                    raise DataError(
                        f"the {self._name} dataset yields a pair with a {type(part).__name__}: inputs and targets must be tensors, "
                        f"arrays or numbers"
                    )
        self._check_shapes({(np.shape(i), np.shape(t)) for i, t in items})
        inputs, targets = default_collate(items)
        return inputs, targets

    def _check_shapes(self, found: set[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        # in a worker of the loader, those of its own batches; in this process, of all
        shapes = found | ({self._shapes} - {None})
        if len(shapes) > 1:
            first, other = sorted(shapes, key=lambda s: s != self._shapes)[:2]
            raise DataError(
                f"the {self._name} dataset yields an (input, target) of shapes {_shapes(other)} after {_shapes(first)}: "
                f"pad or crop its samples to one shape"
            )
        (self._shapes,) = shapes


class Samples(Batches):
    """Batches of one of a pipeline's datasets, "train" or "test"."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        is_train = name == "train"
        super().__init__(pipeline.train if is_train else pipeline.test, name, (pipeline.seed, int(is_train)), pipeline.num_workers)


def probe_batches(dataset: Any, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of a probe in order: as those of a test set, of a pipeline with this seed and size of a batch, are taken."""
    order = batches_of(np.arange(len(dataset)), batch_size)
    # without processes: there is nothing to close
    for _, inputs, targets in Batches(dataset, "probe", (seed, 0)).batches(order):
        yield inputs, targets


def _shapes(pair: Any) -> str:
    return " and ".join(str(tuple(shape)) for shape in pair)


def _range(ids: NDArray[np.int64]) -> str:
    return ", ".join(map(str, ids[:5])) + (" ..." if len(ids) > 5 else "")
