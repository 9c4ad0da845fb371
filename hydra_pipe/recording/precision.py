"""Full precision for the work of the recorder, also where the loop casts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Turn autocast off while the block runs.

    Rows made in half precision would be wrong, and their norms infinite.
    """
    kind = like.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            yield
    else:
        yield
