"""The train or eval mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode within a block. Afterwards each module has its former mode.

    cuDNN cannot differentiate a recurrent module in eval mode, and is left out where there is one.
    """
    was_training = [module for module in model.modules() if module.training]
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    model.eval()
    try:
        with torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext():
            yield
    finally:
        for module in was_training:
            module.training = True
