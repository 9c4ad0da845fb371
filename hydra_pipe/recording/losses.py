"""Losses per sample, from a loss function with any usual reduction."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydra_pipe.errors import PipelineError
from hydra_pipe.recording.datasets import size_of


def per_sample_losses(loss: Any, output: Any, target: Any) -> Tensor:
    """Return the loss of each sample, shape (batch,).

    Args:
        loss: function of output and target. It returns the losses, their mean or their sum.
        output: output of the model for the batch.
        target: targets of the batch.

    Raises:
        PipelineError: `loss` returns neither a scalar nor one loss per sample.
    """
    value = loss(output, target)
    batch = size_of(target)
    if isinstance(value, Tensor) and value.shape == (batch,):
        return value
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PipelineError(
            f"the loss has shape {shape} for a batch of {batch}: return one loss per sample, "
            f"shape ({batch},)"
        )
    # A scalar hides the losses of the samples, and whether it is a mean or a sum. For one sample
    # the scalar is the sample's loss in both cases.
    return torch.stack(
        [loss(_only(output, i, batch), _only(target, i, batch)) for i in range(batch)]
    )


def _only(values: Any, sample: int, batch: int) -> Any:
    """Return `values` for one sample of a batch.

    Each tensor with `batch` lines becomes the sample's line. All other values stay.
    """

    def line(value: Any) -> Any:
        of_samples = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        return value[sample : sample + 1] if of_samples else value

    return tree_map(line, values)
