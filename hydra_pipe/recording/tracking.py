"""A DataLoader that says which samples each batch is of, without being asked and without drawing anything differently."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from hydra_pipe.errors import DataError, RecordError, UsageError
from hydra_pipe.recording.portions import Portion
from hydra_pipe.recording.settings import checked_ids

# (ids of a batch, the batch that the same iteration gave before it) -> the batch, if it counts
HandOver = Callable[[NDArray[np.int64], Portion | None], Portion | None]

NAME_THEM = "use recorder.step(ids) instead"


class TrackedLoader:
    """Iterates as `loader` does, and tells of each batch just before it hands it over. Everything else is the loader's own.

    Args:
        loader: over a map-style dataset.
        n_samples: that the dataset must have.
        hand_over: called with the ids of each batch.
        heeding: a block that hears of what is raised in it.

    Raises:
        UsageError: not a DataLoader.
        RecordError: one whose batches cannot be told by their samples.
        DataError: the dataset has another number of samples.
    """

    def __init__(
        self, loader: DataLoader[Any], n_samples: int, hand_over: HandOver, heeding: Callable[[], AbstractContextManager[None]]
    ) -> None:
        _check(loader, n_samples)
        self._loader, self._n_samples = loader, n_samples
        self._hand_over, self._heeding = hand_over, heeding
        # What a loader draws ahead of what it gives, for its workers.
        self._ahead = loader.num_workers * (loader.prefetch_factor or 0)
        self._watched = copy.copy(loader)
        which = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._spy = _Spy(getattr(loader, which))
        self._watched.__dict__[which] = self._spy  # the attribute itself forbids it

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._spy.drawn = None
        # at once: a loader draws from the random generator when its iterator is made
        iterator = iter(self._watched)
        return self._batches(iterator, self._spy.drawn)

    def _batches(self, iterator: Iterator[Any], drawn: deque[NDArray[Any]] | None) -> Iterator[Any]:
        portion: Portion | None = None
        for batch in iterator:
            drawn = self._spy.drawn if drawn is None else drawn
            with self._heeding():
                portion = self._hand_over(self._next_ids(drawn), portion)
            yield batch

    def _next_ids(self, drawn: deque[NDArray[Any]] | None) -> NDArray[np.int64]:
        if not drawn or len(drawn) > self._ahead + 1:
            raise RecordError(
                f"{type(self._loader).__name__} gave one batch when its sampler had drawn {len(drawn or ())}, where a DataLoader "
                f"draws at most {self._ahead} ahead: its batches cannot be paired with their samples; {NAME_THEM}"
            )
        return checked_ids(drawn.popleft(), self._n_samples)


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

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type] # as the loader's own: a sampler may have no length

    def __iter__(self) -> Iterator[Any]:
        drawn: deque[NDArray[Any]] = deque()
        self.drawn = drawn

        def seen(index: Any) -> Any:
            drawn.append(np.atleast_1d(np.asarray(index)).copy())
            return index

        return map(seen, self._sampler)  # which asks the sampler for its iterator now, and for nothing more


def _check(loader: Any, n_samples: int) -> None:
    if not isinstance(loader, DataLoader):
        raise UsageError(f"recorder.track takes a torch.utils.data.DataLoader, not a {type(loader).__name__}; {NAME_THEM}")
    if isinstance(loader.dataset, IterableDataset):
        raise RecordError(f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no numbers: {NAME_THEM}")
    if not getattr(loader, "in_order", True):  # torch before 2.6 knows no other order
        raise RecordError(f"the loader has in_order=False, so that batches come in another order than drawn: {NAME_THEM}")
    if loader._iterator is not None:
        raise RecordError("the loader's persistent workers are running already: track it before it is first iterated")
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"{type(loader.dataset).__name__} has no length, and so no sample numbers: {NAME_THEM}") from error
    if length != n_samples:
        raise DataError(
            f"the loader's dataset has {length} samples, the recorder's n_samples is {n_samples}: give Recorder "
            f"n_samples={length}, or track the loader of the training set"
        )
