"""Test gradients of whole parameters, where training has come to its end."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.plan.selection import Span
from hydra_pipe.recording.datasets import batches_of, called, on_device
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.recording.modes import evaluating
from hydra_pipe.replay.products import gradients_of_each
from hydra_pipe.training.batches import Samples
from hydra_pipe.training.pipeline import Pipeline


@dataclass(frozen=True)
class TestGradients:
    """Gradients of test losses, or of averages of them.

    Args:
        gradients: one tensor (column, ...) for each parameter.
        losses: of the test samples, shape (test,), float64.
    """

    __test__ = False  # it is no test of pytest's

    gradients: list[Tensor]
    losses: NDArray[np.float64]


def test_gradients(
    pipeline: Pipeline,
    parameters: list[torch.nn.Parameter],
    test_ids: NDArray[np.int64],
    averages: NDArray[np.float32] | None,
    columns: Span,
    at_once: int,
) -> TestGradients:
    """h_j at the model's parameters as they are, in eval mode.

    Args:
        pipeline: of the model and the test samples.
        parameters: to differentiate in.
        test_ids: of the test samples, ascending.
        averages: of them, shape (test, column); None: each is a column.
        columns: first and one past the last that is wanted.
        at_once: columns that are taken together.

    Raises:
        UserCodeError, DataError: see `train`.
    """
    first, last = columns
    found = [torch.zeros(last - first, *p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    losses = np.zeros(len(test_ids))
    device = parameters[0].device
    # in the batches in which they were recorded, by which a dataset may draw
    order = batches_of(np.arange(len(pipeline.test)), pipeline.batch_size)
    with evaluating(pipeline.model), closing(Samples(pipeline, "test").batches(order)) as batches:
        for ids, inputs, targets in batches:
            places = np.searchsorted(test_ids, ids[np.isin(ids, test_ids)])
            if not len(places):
                continue
            own = torch.from_numpy(test_ids[places] - ids[0]).to(device)
            each = per_sample_losses(pipeline.loss, called(pipeline.model, on_device(inputs, device)), on_device(targets, device))[
                own
            ]
            losses[places] = each.detach().cpu().double().numpy()
            if averages is None:
                wanted = np.flatnonzero((places >= first) & (places < last))
                for low in range(0, len(wanted), at_once):
                    part = wanted[low : low + at_once]
                    for to, g in zip(found, gradients_of_each(each[part], parameters), strict=True):
                        to[places[part] - first] = g
            else:
                shares = torch.from_numpy(averages[places, first:last].T).to(each)
                for low in range(0, last - first, at_once):
                    for to, g in zip(found, gradients_of_each(each, parameters, shares[low : low + at_once]), strict=True):
                        to[low : low + at_once] += g
    return TestGradients(found, losses)
