"""Copies from the training's device to the writer's buffers.

On CUDA the training does not wait for a copy; this is untried there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def buffers_for(device: torch.device) -> Callable[[tuple[int, ...], str], NDArray[Any]]:
    """Return a function that makes arrays of zeros that `device` can copy to.

    For CUDA the arrays are pinned, so that the processor goes on during the copy.
    """
    if device.type != "cuda":
        return np.zeros

    def pinned(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        array: NDArray[Any] = torch.zeros(
            shape, dtype=getattr(torch, dtype), pin_memory=True
        ).numpy()
        return array

    return pinned


class Transfer:
    """Copies rows into the writer's buffers.

    On CUDA the rows are converted on the device, and copied by a stream of their own, beside the
    training. Later work in the training's stream waits for the copy; the processor does not.

    Args:
        device: device of the rows.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(
        self, rows: Tensor, out: NDArray[Any], wait_for: Callable[[Callable[[], None]], None]
    ) -> None:
        """Copy `rows`, rounding to the dtype of `out`.

        Args:
            rows: rows of any float dtype; they may be changed as soon as this returns.
            out: array of the same shape, made by `buffers_for`.
            wait_for: function that receives a callable, which waits until `out` is filled. It is
                not called if `out` is filled when this returns.
        """
        to = torch.from_numpy(out)
        if self._stream is None:
            to.copy_(rows)
            return
        present = torch.cuda.current_stream(rows.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            to.copy_(rows.to(to.dtype), non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        present.wait_stream(self._stream)
        wait_for(copied.synchronize)
