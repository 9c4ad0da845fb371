"""The micro-batches of one optimiser step: their samples, and which of them the model has met."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hydra_pipe.errors import RecordError


@dataclass(eq=False)
class MicroBatch:
    """One micro-batch of a step. A pass may hold all of it, or several passes a part each.

    Args:
        samples: sample ids, shape (batch,), in the order in which they go through the model.
        first: place of the first sample in the step.
        tracked: True if a tracked loader handed it over; False if the loop named it.
        met: True if the model was called since it came, with gradients or without.
        live: True if the model was called with gradients.
        seen: True if a gradient came back.
        tensors: weak references to the tensors of the micro-batch, as the loader handed it over.
        partners: ids of the samples that were mixed in, and weights of the micro-batch's own
            samples, both of shape (batch,); None: not mixed.
    """

    samples: NDArray[np.int64]
    first: int = 0
    tracked: bool = False
    met: bool = False
    live: bool = False
    seen: bool = False
    tensors: Sequence["weakref.ref[Tensor]"] = ()
    partners: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None
    _passed: int = field(default=0, init=False)
    _pass_size: int | None = field(default=None, init=False)

    @property
    def stop(self) -> int:
        """One past the last place in the step."""
        return self.first + len(self.samples)

    def holds(self, place: int) -> bool:
        """Tell whether `place` in the step belongs to one of its samples."""
        return self.first <= place < self.stop

    @property
    def of_pass(self) -> tuple[int, int]:
        """Place in the step of the present pass's first sample, and size of the pass."""
        return self.first + self._passed, len(
            self.samples
        ) if self._pass_size is None else self._pass_size

    @property
    def n_covered(self) -> int:
        """Number of samples in the passes so far.

        It counts all samples if the model was called in parts only.
        """
        return len(self.samples) if self._pass_size is None else self._passed + self._pass_size

    def mix(self, order: ArrayLike | Tensor, weight: float | ArrayLike | Tensor) -> None:
        """Note that the samples were mixed with each other.

        Args:
            order: permutation of the batch, integers of shape (batch,): the partner of each sample.
            weight: weight of the sample itself, between 0 and 1: one number, or one for each
                sample, shape (batch,).

        Raises:
            RecordError: the order or the weights cannot be those of the batch.
        """
        batch = len(self.samples)
        places = np.asarray(order.cpu() if isinstance(order, Tensor) else order)
        weights = np.asarray(weight.cpu() if isinstance(weight, Tensor) else weight, np.float64)
        if places.shape != (batch,) or not np.array_equal(np.sort(places), np.arange(batch)):
            raise RecordError(
                f"the order of recorder.mixed() is no permutation of the {batch} samples of the "
                "batch: name each of its places once"
            )
        if weights.shape not in ((), (batch,)) or not ((weights >= 0) & (weights <= 1)).all():
            raise RecordError(
                "the weights of recorder.mixed() must be one number between 0 and 1, or one for "
                "each sample"
            )
        self.partners = self.samples[places], np.broadcast_to(weights, (batch,)).copy()

    def begin_pass(self, size: int | None) -> None:
        """Begin a call of the model with `size` samples.

        A pass over all samples may be followed by another pass over the same samples.
        """
        if self._pass_size is not None and self._pass_size < len(self.samples):
            self._passed += self._pass_size
        self._pass_size = size

    def correct_pass(self, size: int) -> None:
        """Set the present pass's number of samples to `size`, as its output shows."""
        self._pass_size = size


@dataclass(frozen=True)
class Mixture:
    """Rows of a step that belong to two samples each, by weights.

    Args:
        weights: weights of the step's own samples, shape (batch,).
        places: places of the rows in which other samples have a share, shape (shares,).
        partners: ids of these other samples, shape (shares,).
    """

    weights: NDArray[np.float64]
    places: NDArray[np.int64]
    partners: NDArray[np.int64]

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> "Mixture | None":
        """Return the mixture of a step's micro-batches; None if none is mixed."""
        if all(p.partners is None for p in micro_batches):
            return None
        weights = np.concatenate(
            [
                np.ones(len(p.samples)) if p.partners is None else p.partners[1]
                for p in micro_batches
            ]
        )
        starts = np.cumsum([0, *(len(p.samples) for p in micro_batches)])
        mixed = [
            (start, p.partners[0])
            for start, p in zip(starts, micro_batches, strict=False)
            if p.partners is not None
        ]
        places = np.concatenate([start + np.arange(len(ids)) for start, ids in mixed])
        return cls(weights, places, np.concatenate([ids for _, ids in mixed]))


def check_covered(micro_batches: Sequence[MicroBatch], when: str) -> None:
    """Refuse passes that did not take exactly the samples of `micro_batches`.

    Raises: RecordError.
    """
    for micro_batch in micro_batches:
        if micro_batch.n_covered == len(micro_batch.samples):
            continue
        if micro_batch.tracked:
            raise RecordError(
                f"the tracked loader gave a batch of {len(micro_batch.samples)} samples, and the "
                f"passes {when} took {micro_batch.n_covered}: let each of its samples go through "
                "the model once, or name them with recorder.step(ids)"
            )
        raise RecordError(
            f"the passes {when} took {micro_batch.n_covered} samples, sample_ids names "
            f"{len(micro_batch.samples)}: give the ids of every sample of the step, in the order "
            "in which they go through the model, and twice if both views of a sample are in the "
            "batch"
        )
