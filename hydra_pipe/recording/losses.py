"""One loss per sample, from a loss function of any usual reduction."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydra_pipe.errors import PipelineError
from hydra_pipe.recording.datasets import size_of


def per_sample_losses(loss: Any, output: Any, target: Any) -> Tensor:
    """Losses of shape (batch,) from `loss(output, target)`, which may return them, their mean or their sum.

    Raises:
        PipelineError: it returns neither.
    """
    value = loss(output, target)
    batch = size_of(target)
    if isinstance(value, Tensor) and value.shape == (batch,):
        return value
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PipelineError(f"the loss has shape {shape} for a batch of {batch}: return one loss per sample, shape ({batch},)")
    # A scalar hides which samples it is of: taken one by one they add up to a mean or to a sum, and it is known which.
    return torch.stack([loss(_only(output, i, batch), _only(target, i, batch)) for i in range(batch)])


def _only(values: Any, sample: int, batch: int) -> Any:
    """`values` of one sample of a batch: of a tensor its line, of several each one's; what is of no sample stays as it is."""

    def line(value: Any) -> Any:
        of_samples = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        return value[sample : sample + 1] if of_samples else value

    return tree_map(line, values)
