"""Test gradients of whole parameters, at the end of training."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.recording.datasets import batches_of, called, on_device
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.replay.products import gradients_of_each
from hydra_pipe.training.batches import Samples
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.types import Span


@dataclass(frozen=True)
class TestGradients:
    """Gradients of test losses, or of their averages.

    Args:
        gradients: one tensor (column, ...) for each parameter.
        losses: losses of the test samples, shape (test,), float64.
    """

    __test__ = False  # pytest would collect the class by its name

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
    """Return the test gradients h_j at the model's current parameters, in eval mode.

    Args:
        pipeline: pipeline with the model and the test samples.
        parameters: parameters to differentiate in.
        test_ids: ids of the test samples, ascending, shape (test,), int64.
        averages: weight of each test sample in each column, shape (test, column). None: each test
            sample is a column.
        columns: the first wanted column and one past the last.
        at_once: number of columns that are differentiated together.

    Raises:
        UserCodeError, DataError: the same as in `train`.
    """
    first, last = columns
    found = [
        torch.zeros(last - first, *p.shape, dtype=p.dtype, device=p.device) for p in parameters
    ]
    losses = np.zeros(len(test_ids))
    device = parameters[0].device
    # the same batches as in the recording: what a dataset draws at random may depend on them
    order = batches_of(np.arange(len(pipeline.test)), pipeline.batch_size)
    with eval_mode(pipeline.model), closing(Samples(pipeline, "test").batches(order)) as batches:
        for ids, inputs, targets in batches:
            places = np.searchsorted(test_ids, ids[np.isin(ids, test_ids)])
            if not len(places):
                continue
            own = torch.from_numpy(test_ids[places] - ids[0]).to(device)
            each = per_sample_losses(
                pipeline.loss,
                called(pipeline.model, on_device(inputs, device)),
                on_device(targets, device),
            )[own]
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
                    for to, g in zip(
                        found,
                        gradients_of_each(each, parameters, shares[low : low + at_once]),
                        strict=True,
                    ):
                        to[low : low + at_once] += g
    return TestGradients(found, losses)
