"""Samples that carry their number in the dataset all the way into the model's call."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hydra_pipe.errors import DataError, RecordError
from hydra_pipe.recording.collating import checked_collate

#: key under which a batch carries the ids of its samples
SAMPLE_IDS = "hydra_pipe_sample_ids"


@dataclass(frozen=True, slots=True)
class _Named:
    """One sample, and its number in the dataset."""

    sample_id: int
    sample: Any


class NamedDataset:
    """A wrapper of `dataset` that gives each sample its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Named:
        return _Named(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[_Named]:
        """Return a whole batch, as a loader draws it.

        The dataset draws it at once, if it can.
        """
        drawn = getattr(self.dataset, "__getitems__", None)
        samples = drawn(indices) if drawn is not None else [self.dataset[i] for i in indices]
        return [_Named(int(i), sample) for i, sample in zip(indices, samples, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, such as in the middle of a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)


class NamingCollator:
    """A wrapper of `collate` for named samples: the batch holds their ids.

    The ids are under `SAMPLE_IDS`, int64, shape (batch,).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate, self._checked = collate, checked_collate(collate)

    def __call__(self, samples: Sequence[_Named]) -> Any:
        batch = checked_batch(self._checked([named.sample for named in samples]))
        batch[SAMPLE_IDS] = torch.tensor([named.sample_id for named in samples])
        return batch


def checked_batch(batch: Any) -> MutableMapping[str, Any]:
    """Return `batch`, which must be a mapping. Raises: DataError."""
    if not isinstance(batch, MutableMapping):
        raise DataError(
            f"the data collator returned {type(batch).__name__}, which does not show its samples: "
            "return a mapping of the model's arguments"
        )
    return batch


def named_batches(loader: DataLoader[Any]) -> Any:
    """Make `loader` put the ids of its samples into each batch.

    Its order and its random numbers stay as they were.

    Args:
        loader: loader over a map-style dataset, not iterated yet. It is changed in place, because
            the trainer holds it already.

    Returns:
        The dataset.

    Raises:
        RecordError: an iterable dataset, whose samples have no numbers.
    """
    own = getattr(loader, "base_dataloader", loader)  # the loader inside Accelerate's wrapper
    dataset = own.dataset
    if isinstance(dataset, NamedDataset):  # wrapped by an earlier call
        return dataset.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise RecordError(
            f"{type(dataset).__name__} is an iterable dataset, whose samples have no numbers: "
            "train on a map-style dataset"
        )
    own.__dict__["dataset"] = NamedDataset(dataset)  # DataLoader forbids setting the attribute
    own.collate_fn = NamingCollator(own.collate_fn)
    return dataset
