"""Memory for intermediate results, used again and again.

Fresh memory of some MiB comes from the system page by page, each cleared first, and is given back when it is freed: measured at
more than the arithmetic on it. What is here is in the cache instead.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Buffers by role, each as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, role: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory of dtype and device of `like`, good until the same role is taken again."""
        key = (role, like.dtype, like.device)
        size = prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(*shape)
