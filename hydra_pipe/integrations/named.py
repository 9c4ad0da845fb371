"""Samples that know their number in the dataset, all the way into the model's call."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hydra_pipe.errors import DataError, RecordError
from hydra_pipe.recording.collating import checked_collate

#: under which a batch carries the ids of its samples
SAMPLE_IDS = "hydra_pipe_sample_ids"


@dataclass(frozen=True, slots=True)
class _Named:
    """One sample, and its number in the dataset."""

    sample_id: int
    sample: Any


class NamedDataset:
    """`dataset` again, each sample with its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Named:
        return _Named(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[_Named]:
        """A whole batch, as a loader draws it: at once from a dataset that can do that."""
        drawn = getattr(self.dataset, "__getitems__", None)
        samples = drawn(indices) if drawn is not None else [self.dataset[i] for i in indices]
        return [_Named(int(i), sample) for i, sample in zip(indices, samples, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.dataset, name)


class NamingCollator:
    """`collate` again, of named samples: the batch holds their ids as `SAMPLE_IDS`, int64, shape (batch,)."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate, self._checked = collate, checked_collate(collate)

    def __call__(self, samples: Sequence[_Named]) -> Any:
        batch = checked_batch(self._checked([named.sample for named in samples]))
        batch[SAMPLE_IDS] = torch.tensor([named.sample_id for named in samples])
        return batch


def checked_batch(batch: Any) -> MutableMapping[str, Any]:
    """`batch`, which must be a mapping. Raises: DataError."""
    if not isinstance(batch, MutableMapping):
        raise DataError(
            f"the data collator returned {type(batch).__name__}, and its samples cannot be told: return a mapping of what the "
            f"model is called with"
        )
    return batch


def named_batches(loader: DataLoader[Any]) -> Any:
    """Make `loader` put the ids of its samples into each batch; its order and its random numbers stay as they were.

    Args:
        loader: over a map-style dataset, not iterated yet. Changed in place: who iterates it holds it already.

    Returns:
        The dataset.

    Raises:
        RecordError: an iterable dataset, whose samples have no numbers.
    """
    own = getattr(loader, "base_dataloader", loader)  # which Accelerate wraps
    dataset = own.dataset
    if isinstance(dataset, NamedDataset):  # by an earlier call
        return dataset.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise RecordError(
            f"{type(dataset).__name__} is an iterable dataset, whose samples have no numbers: train on a map-style dataset"
        )
    own.__dict__["dataset"] = NamedDataset(dataset)  # the attribute itself forbids it
    own.collate_fn = NamingCollator(own.collate_fn)
    return dataset
