"""The comparison of a run's inputs with each other: which of them are read, and their labels."""

from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Progress
from hydra_pipe.reporting.duplicates import (
    MOST_TEST,
    MOST_TRAIN,
    Contents,
    Duplicates,
    duplicates,
)
from hydra_pipe.types import I64

if TYPE_CHECKING:
    from hydra_pipe.reporting.inputs import Shown

_Labels = NDArray[Any] | None


def alike_inputs(
    shown: "Shown", first: I64, labels: tuple[_Labels, _Labels], progress: Progress
) -> Duplicates:
    """Read inputs, and return those that are the same, or nearly.

    Args:
        shown: samples of the run.
        first: ids of training samples to compare in any case.
        labels: labels of all training samples, and of all test samples. None: unknown.
        progress: place to show progress.

    Raises:
        HydraError: a dataset raised.
    """
    train = _chosen(shown.n_samples("train"), first)
    test = np.arange(min(shown.n_samples("test"), MOST_TEST))
    contents = Contents()
    with progress.task("compare samples", len(train) + len(test), "samples") as task:
        for which, ids in (("train", train), ("test", test)):
            with closing(shown.values(which, ids, task)) as values:
                for _, value in values:
                    contents.add(value)
    texts = np.concatenate(
        [_texts(own, ids) for own, ids in zip(labels, (train, test), strict=True)]
    )
    return duplicates(contents, train, test, texts)


def _chosen(n: int, first: I64) -> I64:
    """Return the training samples to compare, ascending. The draw is always the same."""
    if n <= MOST_TRAIN:
        return np.arange(n)
    first = first[first < n][: MOST_TRAIN // 2]
    others = np.setdiff1d(np.arange(n), first)
    drawn = np.random.default_rng(0).choice(others, MOST_TRAIN - len(first), replace=False)
    return np.sort(np.concatenate([first, drawn]))


def _texts(labels: _Labels, ids: I64) -> NDArray[Any]:
    """Return the labels of some samples as texts, empty where they are unknown."""
    if labels is None or not len(ids) or len(labels) <= ids[-1]:
        return np.full(len(ids), "", object)
    return np.array([str(label) for label in labels[ids].tolist()], object)
