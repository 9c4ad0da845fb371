"""Full precision for the work of the recorder, also where the loop casts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a block in which autocast is off, on the device of `like`.

    Rows made in half precision would be wrong, and their norms infinite.
    """
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def without_gradients() -> AbstractContextManager[Any]:
    """Return a block in which nothing is differentiated.

    In a backward pass gradients are on only if the loop will differentiate the pass again.
    """
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING
