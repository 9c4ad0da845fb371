"""Predictions that the recorded logits of a classifier make."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.types import F32


@dataclass(frozen=True)
class Predictions:
    """Predictions for the samples of some rows, at the steps of these rows.

    Attributes:
        classes: class with the largest logit, int32, -1 where logits are not known, shape (row,).
        confidence: chance of this class, shape (row,).
        label_confidence: chance of the class that the loss compared with, shape (row,).
    """

    classes: NDArray[np.int32]
    confidence: F32
    label_confidence: F32


def read_predictions(gradients: Gradients, rows: slice) -> Predictions | None:
    """Return predictions for some rows. None if the run is not of a classifier of whole samples.

    Raises:
        StoreError: damaged.
    """
    shape = gradients.dynamics_shape
    if shape.n_outputs < 2:
        return None
    target = gradients.row_dynamics(names.TARGET, rows)
    logits = gradients.row_dynamics(names.LOGITS, rows).astype(np.float32)
    if shape.keeps_all:
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        own = np.take_along_axis(log_p, np.maximum(target, 0)[:, None], 1)[:, 0]
        predicted, largest = log_p.argmax(axis=1), log_p.max(axis=1)
    else:
        own, largest = logits[:, 0] - logits[:, 1], logits[:, 2] - logits[:, 1]
        predicted = gradients.row_dynamics(names.TOP_CLASSES, rows)[:, 0]
    unknown = np.isnan(logits).any(axis=1)
    return Predictions(
        np.where(unknown, -1, predicted).astype(np.int32),
        np.exp(largest),
        np.where(target < 0, np.nan, np.exp(own)).astype(np.float32),
    )
