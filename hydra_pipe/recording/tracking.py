"""A DataLoader that says which samples each batch is of, without being asked and without drawing anything differently."""

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
from hydra_pipe.recording.collating import checked_collate, is_looked_at
from hydra_pipe.recording.leaving import left_by_exception
from hydra_pipe.recording.portions import Portion
from hydra_pipe.recording.settings import checked_ids
from hydra_pipe.recording.targets import TargetCheck

# (ids of a batch, the batch that the same iteration gave before it) -> the batch, if it counts
HandOver = Callable[[NDArray[np.int64], Portion | None], Portion | None]

NAME_THEM = "use recorder.step(ids) instead"


class WatchedLoader:
    """A copy of `loader` that draws and gives what `loader` does, and keeps the ids of what it has drawn and not given yet.

    Args:
        loader: over a map-style dataset; one that Accelerate has prepared, too.
        n_samples: that the dataset must have; None: as many as it has.
        instead: what to do about a loader whose batches cannot be told by their samples, for messages.
        ahead: batches that who iterates it draws ahead of the one whose ids are asked for.

    Raises:
        UsageError: not a DataLoader.
        RecordError: one whose batches cannot be told by their samples.
        DataError: the dataset has another number of samples.
    """

    def __init__(self, loader: DataLoader[Any], n_samples: int | None, instead: str = NAME_THEM, ahead: int = 0) -> None:
        base = getattr(loader, "base_dataloader", loader)  # which Accelerate wraps
        self.n_samples, self._instead = _checked(base, n_samples, instead), instead
        # what a loader draws ahead of what it gives: for its workers, and Accelerate to know the last batch
        self._ahead = base.num_workers * (base.prefetch_factor or 0) + (base is not loader) + ahead
        self._name = type(loader).__name__
        #: which of a loader's attributes is another one here
        self.replaced = "sampler" if base.batch_sampler is None else "batch_sampler"
        self._spy = _Spy(getattr(base, self.replaced))
        watched = _copied(base)
        watched.__dict__[self.replaced] = self._spy  # the attribute itself forbids it
        if base.batch_sampler is not None:
            watched.collate_fn = checked_collate(base.collate_fn)
        #: what to iterate
        self.loader = watched
        if base is not loader:
            self.loader = _copied(loader)
            self.loader.__dict__["base_dataloader"] = watched

    @property
    def drawn(self) -> deque[NDArray[Any]] | None:
        """Of the newest iteration, the batches that were drawn and not given yet; None where it has not begun to draw."""
        return self._spy.drawn

    def begin(self) -> Iterator[Any]:
        """An iterator of the batches, made at once: a loader draws from the random generator when its iterator is made."""
        self._spy.drawn = None
        return iter(self.loader)

    def next_ids(self, drawn: deque[NDArray[Any]] | None) -> NDArray[np.int64]:
        """Ids of the batch that an iteration, whose batches are `drawn`, has just given, shape (batch,). Raises: RecordError."""
        if not drawn or len(drawn) > self._ahead + 1:
            raise RecordError(
                f"{self._name} gave one batch when its sampler had drawn {len(drawn or ())}, where a DataLoader draws at most "
                f"{self._ahead} ahead: its batches cannot be paired with their samples; {self._instead}"
            )
        return checked_ids(drawn.popleft(), self.n_samples)


class TrackedLoader:
    """Iterates as `loader` does, and tells of each batch just before it hands it over. Everything else is the loader's own.

    Args:
        loader, n_samples: see `WatchedLoader`.
        hand_over: called with the ids of each batch.
        heeding: a block that hears of what is raised in it.
        targets: holds the batches' integer targets against the labels.
        left: called where an exception ends the loop.

    Raises:
        UsageError, RecordError, DataError: see `WatchedLoader`.
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
        if name in ("_loader", "_watched"):  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._loader if name in (self._watched.replaced, "collate_fn") else self._watched.loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._watched.begin()
        return self._batches(iterator, self._watched.drawn)

    def _batches(self, iterator: Iterator[Any], drawn: deque[NDArray[Any]] | None) -> Iterator[Any]:
        portion: Portion | None = None
        while True:
            try:
                batch = next(iterator)
                drawn = self._watched.drawn if drawn is None else drawn
                with self._heeding():
                    ids = self._watched.next_ids(drawn)
                    self._check_targets(ids, batch)
                    portion = self._hand_over(ids, portion)
                    self._note_tensors(portion, batch)
            except StopIteration:
                return
            except BaseException:  # where a batch is drawn
                self._left()
                raise
            try:
                yield batch
            except GeneratorExit:
                if left_by_exception(sys._getframe(1)):
                    self._left()
                raise

    def _note_tensors(self, portion: Portion | None, batch: Any) -> None:
        """Let the batch be held against what the model is given, now and then."""
        self._n_batches += 1
        if portion is not None and is_looked_at(self._n_batches):
            floats = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
            portion.tensors = [weakref.ref(x) for x in floats if len(x) == len(portion.samples)]

    def _check_targets(self, ids: NDArray[np.int64], batch: Any) -> None:
        if not self._targets.is_on:
            return
        leaves = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.shape == ids.shape]
        integers = [x for x in leaves if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)]
        if len(integers) == 1:  # of several, which are the targets is not known
            self._targets.check(ids, integers[0].cpu().numpy())


class _Spy:
    """Yields what `sampler` does, when it does, and keeps it."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        # of the newest iteration, the batches that were drawn and not handed over yet
        self.drawn: deque[NDArray[Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_sampler", "drawn"):
            super().__setattr__(name, value)
        else:  # as where a loader goes on in the middle of an epoch
            setattr(self._sampler, name, value)

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type] # as the loader's own: a sampler may have no length

    def __iter__(self) -> Iterator[Any]:
        drawn: deque[NDArray[Any]] = deque()
        self.drawn = drawn

        def seen(index: Any) -> Any:
            drawn.append(np.atleast_1d(np.asarray(index)).copy())
            return index

        return map(seen, self._sampler)  # which asks the sampler for its iterator now, and for nothing more


def _copied(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Not by copy.copy: the loaders of Accelerate say that they are of another class than they are."""
    copied: DataLoader[Any] = object.__new__(type(loader))
    copied.__dict__.update(loader.__dict__)
    return copied


def _checked(loader: Any, n_samples: int | None, instead: str) -> int:
    """How many samples it has."""
    if not isinstance(loader, DataLoader):
        raise UsageError(f"only a torch.utils.data.DataLoader can be tracked, not a {type(loader).__name__}: {instead}")
    if isinstance(loader.dataset, IterableDataset):
        raise RecordError(f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no numbers: {instead}")
    if not getattr(loader, "in_order", True):  # torch before 2.6 knows no other order
        raise RecordError(f"the loader has in_order=False, so that batches come in another order than drawn: {instead}")
    if loader._iterator is not None:
        raise RecordError("the loader's persistent workers are running already: track it before it is first iterated")
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"{type(loader.dataset).__name__} has no length, and so no sample numbers: {instead}") from error
    if n_samples is not None and length != n_samples:
        raise DataError(
            f"the loader's dataset has {length} samples, the recorder's n_samples is {n_samples}: give Recorder "
            f"n_samples={length}, or track the loader of the training set"
        )
    return length
