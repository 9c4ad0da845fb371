"""A DataLoader that tells the sample ids of each batch.

It needs no help from the loop, and draws nothing differently.
"""

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from hydra_pipe.errors import DataError, RecordError, UsageError
from hydra_pipe.recording.abandoned_loops import left_by_exception
from hydra_pipe.recording.collating import checked_collate, is_looked_at
from hydra_pipe.recording.micro_batches import MicroBatch
from hydra_pipe.recording.settings import checked_ids
from hydra_pipe.recording.targets import TargetCheck

# (ids of a batch, the batch that the same iteration gave before it) -> the batch, if it counts
HandOver = Callable[[NDArray[np.int64], MicroBatch | None], MicroBatch | None]

NAME_THEM = "use recorder.step(ids) instead"


class WatchedLoader:
    """A copy of `loader` that draws the same batches, and keeps the ids of drawn batches.

    The ids are kept until their batch is given out.

    Args:
        loader: loader over a map-style dataset; also one that Accelerate has prepared.
        n_samples: required size of the dataset; None: any size.
        instead: advice for a loader whose batches cannot be told by their samples, for messages.
        ahead: number of batches that the caller draws ahead of the batch whose ids it asks for.

    Raises:
        UsageError: not a DataLoader.
        RecordError: a loader whose batches cannot be told by their samples.
        DataError: the dataset has another number of samples.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        n_samples: int | None,
        instead: str = NAME_THEM,
        ahead: int = 0,
    ) -> None:
        base = getattr(loader, "base_dataloader", loader)  # the loader inside Accelerate's wrapper
        self.n_samples, self._instead = _checked(base, n_samples, instead), instead
        # batches that a loader draws ahead: for its workers, and one more if Accelerate has to know
        # the last batch
        self._ahead = base.num_workers * (base.prefetch_factor or 0) + (base is not loader) + ahead
        self._name = type(loader).__name__
        #: name of the loader's attribute that is replaced
        self.replaced = "sampler" if base.batch_sampler is None else "batch_sampler"
        self._spy = _Spy(getattr(base, self.replaced))
        watched = _copied(base)
        watched.__dict__[self.replaced] = self._spy  # DataLoader forbids setting the attribute
        if base.batch_sampler is not None:
            watched.collate_fn = checked_collate(base.collate_fn)
        #: the loader to iterate
        self.loader = watched
        if base is not loader:
            self.loader = _copied(loader)
            self.loader.__dict__["base_dataloader"] = watched

    @property
    def drawn(self) -> deque[NDArray[Any]] | None:
        """Batches of the newest iteration that were drawn but not given out.

        None if the iteration has not begun to draw.
        """
        return self._spy.drawn

    def begin(self) -> Iterator[Any]:
        """Return an iterator over the batches, made at once.

        A loader draws from the random generator when its iterator is made.
        """
        self._spy.drawn = None
        return iter(self.loader)

    def next_ids(self, drawn: deque[NDArray[Any]] | None) -> NDArray[np.int64]:
        """Return the ids of the batch that an iteration has just given, shape (batch,).

        Args:
            drawn: batches of this iteration that were drawn but not given out.

        Raises:
            RecordError: the batch cannot be paired with its samples.
        """
        if not drawn or len(drawn) > self._ahead + 1:
            raise RecordError(
                f"{self._name} gave one batch when its sampler had drawn {len(drawn or ())}, "
                "where a DataLoader draws at most "
                f"{self._ahead} ahead: its batches cannot be paired with their samples; "
                f"{self._instead}"
            )
        return checked_ids(drawn.popleft(), self.n_samples)


class TrackedLoader:
    """Iterates as `loader` does, and reports each batch just before giving it to the loop.

    Everything else is the loader's own.

    Args:
        loader, n_samples: arguments of `WatchedLoader`.
        hand_over: function called with the ids of each batch.
        heeding: context manager that hears of errors raised in its block.
        targets: check of the batches' integer targets against the labels.
        left: function called if an exception ends the loop.

    Raises:
        UsageError, RecordError, DataError: the reasons given at `WatchedLoader`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        n_samples: int,
        hand_over: HandOver,
        heeding: Callable[[], AbstractContextManager[None]],
        targets: TargetCheck,
        left: Callable[[], None],
    ) -> None:
        self._targets = targets
        self._n_batches = 0
        self._watched = WatchedLoader(loader, n_samples)
        self._loader, self._hand_over, self._heeding, self._left = loader, hand_over, heeding, left

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "_watched"):  # not set yet, such as in the middle of a copy
            raise AttributeError(name)
        return getattr(
            self._loader
            if name in (self._watched.replaced, "collate_fn")
            else self._watched.loader,
            name,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._watched.begin()
        return self._batches(iterator, self._watched.drawn)

    def _batches(self, iterator: Iterator[Any], drawn: deque[NDArray[Any]] | None) -> Iterator[Any]:
        micro_batch: MicroBatch | None = None
        while True:
            try:
                batch = next(iterator)
                drawn = self._watched.drawn if drawn is None else drawn
                with self._heeding():
                    ids = self._watched.next_ids(drawn)
                    self._check_targets(ids, batch)
                    micro_batch = self._hand_over(ids, micro_batch)
                    self._note_tensors(micro_batch, batch)
            except StopIteration:
                return
            except BaseException:  # drawing a batch failed
                self._left()
                raise
            try:
                yield batch
            except GeneratorExit:
                if left_by_exception(sys._getframe(1)):
                    self._left()
                raise

    def _note_tensors(self, micro_batch: MicroBatch | None, batch: Any) -> None:
        """Note tensors of a batch now and then, to compare them with the model's inputs."""
        self._n_batches += 1
        if micro_batch is not None and is_looked_at(self._n_batches):
            floats = [
                x
                for x in tree_leaves(batch)
                if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
            ]
            micro_batch.tensors = [
                weakref.ref(x) for x in floats if len(x) == len(micro_batch.samples)
            ]

    def _check_targets(self, ids: NDArray[np.int64], batch: Any) -> None:
        if not self._targets.is_on:
            return
        leaves = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.shape == ids.shape]
        integers = [
            x
            for x in leaves
            if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        ]
        if len(integers) == 1:  # among several, the targets are not known
            self._targets.check(ids, integers[0].cpu().numpy())


class _Spy:
    """A sampler that yields the items of `sampler`, at the same moments, and keeps them."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        # batches of the newest iteration that were drawn but not given out
        self.drawn: deque[NDArray[Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_sampler", "drawn"):
            super().__setattr__(name, value)
        else:  # such as when a loader resumes in the middle of an epoch
            setattr(self._sampler, name, value)

    def __len__(self) -> int:
        # raises for a sampler without a length, as the loader does
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        drawn: deque[NDArray[Any]] = deque()
        self.drawn = drawn

        def seen(index: Any) -> Any:
            drawn.append(np.atleast_1d(np.asarray(index)).copy())
            return index

        # map asks the sampler for its iterator now, and for no item yet
        return map(seen, self._sampler)


def _copied(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Copy a loader without copy.copy: Accelerate's loaders pretend to be of another class."""
    copied: DataLoader[Any] = object.__new__(type(loader))
    copied.__dict__.update(loader.__dict__)
    return copied


def _checked(loader: Any, n_samples: int | None, instead: str) -> int:
    """Return the loader's number of samples, after all checks."""
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"only a torch.utils.data.DataLoader can be tracked, not a {type(loader).__name__}: "
            f"{instead}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecordError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no "
            f"numbers: {instead}"
        )
    # torch before 2.6 has no in_order, and always keeps the order
    if not getattr(loader, "in_order", True):
        raise RecordError(
            "the loader has in_order=False, so that batches come in another order than drawn: "
            f"{instead}"
        )
    if loader._iterator is not None:
        raise RecordError(
            "the loader's persistent workers are running already: track it before it is first "
            "iterated"
        )
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise DataError(
            f"{type(loader.dataset).__name__} has no length, and so no sample numbers: {instead}"
        ) from error
    if n_samples is not None and length != n_samples:
        raise DataError(
            f"the loader's dataset has {length} samples, the recorder's n_samples is "
            f"{n_samples}: give Recorder "
            f"n_samples={length}, or track the loader of the training set"
        )
    return length
