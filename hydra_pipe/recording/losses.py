"""One loss per sample, from a loss function of any usual reduction."""

from typing import Any

import torch
from torch import Tensor

from hydra_pipe.errors import PipelineError


def per_sample_losses(loss: Any, output: Any, target: Tensor) -> Tensor:
    """Losses of shape (batch,) from `loss(output, target)`, which may return them, their mean or their sum.

    Raises:
        PipelineError: it returns neither.
    """
    value = loss(output, target)
    batch = len(target)
    if isinstance(value, Tensor) and value.shape == (batch,):
        return value
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PipelineError(f"the loss has shape {shape} for a batch of {batch}: return one loss per sample, shape ({batch},)")
    # A scalar hides which samples it is of: taken one by one they add up to a mean or to a sum, and it is known which.
    return torch.stack([loss(output[i : i + 1], target[i : i + 1]) for i in range(batch)])
