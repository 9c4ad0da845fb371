"""Memory for intermediate results, used again and again.

Fresh memory of some MiB comes from the system page by page. Each page is cleared first, and is
given back when the memory is freed. This was measured to cost more than the arithmetic on the
memory. A scratch buffer stays in the cache instead.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Buffers by role, each as large as the largest size that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, role: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return uninitialised memory with dtype and device of `like`.

        It is good until the same role is taken again.
        """
        key = (role, like.dtype, like.device)
        size = prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(*shape)
