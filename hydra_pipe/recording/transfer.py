"""From the training's device to the writer's buffers. On CUDA without a wait of the training; untried there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def buffers_for(device: torch.device) -> Callable[[tuple[int, ...], str], NDArray[Any]]:
    """Makes arrays of zeros that `device` can copy to while the processor goes on: pinned ones for CUDA."""
    if device.type != "cuda":
        return np.zeros

    def pinned(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        array: NDArray[Any] = torch.zeros(shape, dtype=getattr(torch, dtype), pin_memory=True).numpy()
        return array

    return pinned


class Transfer:
    """Copies rows into the writer's buffers.

    On CUDA they are converted where they are, and copied by a stream of their own, beside the training: what comes next in the
    training's stream waits for the copy, the processor does not.

    Args:
        device: that the rows are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, rows: Tensor, out: NDArray[Any], wait_for: Callable[[Callable[[], None]], None]) -> None:
        """Copy `rows`, rounding to the dtype of `out`.

        Args:
            rows: any float dtype; may be changed as soon as this returns.
            out: of the same shape, made by `buffers_for`.
            wait_for: is given what waits until `out` is there; not called if it is there when this returns.
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
