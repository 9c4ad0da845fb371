"""Tell whether a batch holds its samples in the order in which they were drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.collate import default_collate, default_convert

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.addresses import address_of

# Values of a long sample that are compared.
_MOST_VALUES = 64
# Samples that are compared with each other at the most, number of values that is few for a column,
# and columns that are compared at the least.
_MOST_ROWS, _FEW_VALUES, _LEAST_COLUMNS = 4096, 3, 3
# First batches that are all compared; later ones are compared at ever larger distances.
_AT_FIRST = 4


class CheckedCollate:
    """A collate function that compares the batches of `collate` with their samples.

    Args:
        collate: collate function of the loader.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate
        self._n_batches = 0

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch of `samples`.

        Raises:
            RecordError: the batch holds its samples in another order.
        """
        self._n_batches += 1
        if not is_looked_at(self._n_batches):
            return self.collate(samples)
        drawn = list(samples)  # many functions sort the list that they are given
        batch = self.collate(samples)
        check_order(drawn, batch)
        return batch


def is_looked_at(number: int) -> bool:
    """Tell whether batch `number`, counted from 1, is compared with its samples.

    The first batches are, and later ones at ever larger distances.
    """
    return number <= _AT_FIRST or number & (number - 1) == 0


def checked_collate(collate: Any) -> Any:
    """Return `collate` with a check of the order; unchanged if it is known to keep the order."""
    return collate if collate in (default_collate, default_convert) else CheckedCollate(collate)


def check_order(samples: Sequence[Any], batch: Any) -> None:
    """Refuse a batch whose rows are its samples in another order.

    A row belongs to a sample if the two have the same values, or if the row begins or ends with the
    sample's values, as rows of padded samples do. If rows match no sample (a collate function that
    draws or changes values), nothing is known and nothing is raised.

    Raises:
        RecordError: the rows are in another order. The message names the sample of row 0.
    """
    n = len(samples)
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    of_samples = [[_values(x) for x in tree_leaves(sample)] for sample in samples]
    if n < 2 or len({len(leaves) for leaves in of_samples}) != 1:
        return
    rows = [
        x
        for x in tree_leaves(batch)
        if isinstance(x, Tensor | np.ndarray) and x.ndim > 0 and len(x) == n
    ]
    for of_batch in rows:
        values = [_values(of_batch[i]) for i in range(n)]
        for leaf in range(len(of_samples[0])):
            order = _order([leaves[leaf] for leaves in of_samples], values)
            if order is None:
                continue
            if order == list(range(n)):
                return
            raise RecordError(
                "the collate function gives the batch in another order than its samples were "
                "drawn in: row 0 is sample "
                f"number {order[0]} "
                "of those drawn. Let it keep the order, or put the ids into the batch and name "
                "them by recorder.step(ids)"
            )


def check_arrangement(given: Tensor, batch: Tensor, ids: NDArray[np.int64]) -> None:
    """Refuse an input of the model that is the loader's batch, permuted or mixed with itself.

    A permutation is found by rows that are equal, or equal once each column has mean 0 and variance
    1: so also behind a normalisation. A mixture takes more values a sample than there are samples.

    Args:
        given: input of the model, shape (B, ...).
        batch: batch of the loader, with as many samples and values.
        ids: ids of the samples in the batch, shape (B,), for the message.

    Raises:
        RecordError: samples were permuted, or mixed as mixup and cutmix do, and the recorder was
            not told.
    """
    n = len(batch)
    if n < 2 or address_of(given) == address_of(batch):
        return
    order = _permutation(given, batch)
    if order is not None:
        if order != list(range(n)):
            _refuse_arrangement(torch.eye(n)[order], ids)
        return
    if not given.is_floating_point() or given.shape != batch.shape:
        return
    # one channel only: each channel of a picture is normalised by itself
    ours, theirs = (
        x.detach().reshape(n, x.shape[1] if x.dim() > 2 else 1, -1)[:, 0].double().cpu()
        for x in (given, batch)
    )
    if ours.shape[1] < 2 * (n + 1):
        return
    every = max(1, ours.shape[1] // 4096)
    ours, theirs = ours[:, ::every], theirs[:, ::every]
    regressors = torch.cat([theirs, torch.ones(1, theirs.shape[1], dtype=theirs.dtype)])
    if int(torch.linalg.matrix_rank(regressors)) == n + 1:
        found = torch.linalg.lstsq(regressors.T, ours.T).solution.T[:, :n]
        left = torch.linalg.vector_norm(
            found @ theirs + (ours - found @ theirs).mean(1, keepdim=True) - ours
        )
        if float(left) <= 1e-3 * float(torch.linalg.vector_norm(ours)):
            weights = found.abs() / found.abs().sum(1, keepdim=True)
            if float(weights.diagonal().min()) < 0.99:
                _refuse_arrangement(weights, ids)
            return
    _check_cut(ours, theirs, ids)


def _permutation(ours: Tensor, theirs: Tensor) -> list[int] | None:
    """Return the row of `theirs` that each row of `ours` is; None if some row is none or several.

    Args:
        ours, theirs: values of the samples, shape (B, ...), as many of both.
    """
    every = max(1, ours[0].numel() // _MOST_VALUES)
    # only the columns that are compared leave their device
    x, y = (
        values.detach().reshape(len(values), -1)[:, ::every].cpu().double()
        for values in (ours, theirs)
    )
    # one column may be turned round, as by 1 - t, and few integers are equal by chance
    if len(x) > _MOST_ROWS or x.shape[1] < (2 if ours.is_floating_point() else _LEAST_COLUMNS):
        return None
    order = _matches(x, y, 0.0)
    if order is not None or not ours.is_floating_point():
        return order
    # with few values in a column, or few columns, what is turned round could seem permuted
    kept = [len(column.unique()) > _FEW_VALUES for column in y.T]
    if sum(kept) < _LEAST_COLUMNS:
        return None
    return _matches(_standardized(x[:, kept]), _standardized(y[:, kept]), 1e-3)


def _matches(x: Tensor, y: Tensor, limit: float) -> list[int] | None:
    alike = torch.cdist(x, y, p=math.inf) <= limit
    if not bool((alike.sum(0) == 1).all() and (alike.sum(1) == 1).all()):
        return None
    found: list[int] = alike.int().argmax(1).tolist()
    return found


def _standardized(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0)


def _check_cut(ours: Tensor, theirs: Tensor, ids: NDArray[np.int64]) -> None:
    """Refuse pictures with a part that was cut from another picture of the batch."""
    n = len(ours)
    weights = torch.zeros(n, n, dtype=ours.dtype)
    for i in range(n):
        own = ours[i] == theirs[i]
        rest = ~own
        others = [
            j
            for j in range(n)
            if j != i and bool(rest.any()) and bool((ours[i][rest] == theirs[j][rest]).all())
        ]
        if not bool(rest.any()) or not others:
            weights[i, i] = 1.0
            continue
        weights[i, i], weights[i, others[0]] = own.double().mean(), rest.double().mean()
    distinct = (theirs[:, None] != theirs[None]).any(2).sum() == n * (n - 1)
    if bool(distinct) and float(weights.diagonal().min()) < 0.99:
        _refuse_arrangement(weights, ids)


def _refuse_arrangement(weights: Tensor, ids: NDArray[np.int64]) -> None:
    row = int(weights.diagonal().argmin())
    other = int(torch.where(torch.arange(len(weights)) == row, -1.0, weights[row]).argmax())
    share = float(weights[row, other])
    raise RecordError(
        f"what the model is given in place of sample {ids[row]} is {share:.0%} sample "
        f"{ids[other]}: the batch is "
        + ("permuted" if share > 0.99 else "mixed (mixup, cutmix)")
        + " between the loader and the model. Tell the recorder by recorder.mixed(order, "
        "weight), or name the "
        "samples in their order by "
        "recorder.step(ids)"
    )


def _order(
    samples: Sequence[NDArray[Any] | None], rows: Sequence[NDArray[Any] | None]
) -> list[int] | None:
    """Return the sample of each row; None if some row is like no sample, or like several."""
    found = []
    for row in rows:
        like = [
            k
            for k, sample in enumerate(samples)
            if row is not None and sample is not None and _is_like(row, sample)
        ]
        if len(like) != 1:
            return None
        found.append(like[0])
    return found if len(set(found)) == len(found) else None


def _is_like(row: NDArray[Any], sample: NDArray[Any]) -> bool:
    n = len(sample)
    if n > len(row) or n == 0:
        return False
    return bool(np.array_equal(row[:n], sample) or np.array_equal(row[len(row) - n :], sample))


def _values(value: Any) -> NDArray[Any] | None:
    """Return some values of a part of a sample, flattened; None if the part holds no numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, bool | int | float | np.ndarray | np.number | list):
        found = np.asarray(value)
        if found.dtype.kind in "biuf":
            flat = found.reshape(-1)
            # all values of a short part, which may be padded; every so many-th value of a long one
            return flat if len(flat) <= 16 * _MOST_VALUES else flat[:: len(flat) // _MOST_VALUES]
    return None
