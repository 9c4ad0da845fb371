"""Copies from the training's device to the host: rows for the writer, values for the checks.

On CUDA this is untried.
"""

from collections.abc import Callable, Sequence
from functools import partial
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


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return the values of `tensors`, of one device. The host waits for the device once.

    Args:
        tensors: values of dtypes that NumPy has.
    """
    if all(x.device.type == "cpu" for x in tensors):
        return [x.detach().numpy() for x in tensors]
    # the widest dtype first, so that each array begins at a multiple of its item
    order = sorted(range(len(tensors)), key=lambda k: -tensors[k].element_size())
    flat = [tensors[k].detach().contiguous().view(-1).view(torch.uint8) for k in order]
    packed = torch.cat(flat).cpu().numpy()
    found: dict[int, NDArray[Any]] = {}
    first = 0
    for k, part in zip(order, flat, strict=True):
        values = packed[first : first + len(part)].view(_numpy_dtype(tensors[k].dtype))
        found[k] = values.reshape(tensors[k].shape)
        first += len(part)
    return [found[k] for k in range(len(tensors))]


def copy_rows(
    rows: Tensor, out: NDArray[Any], wait_for: Callable[[Callable[[], None]], None]
) -> None:
    """Copy `rows` to a buffer of the writer, rounding to its dtype.

    Rows of an accelerator are converted there, and copied in the training's stream. Only the
    writer waits for the copy.

    Args:
        rows: rows of any float dtype; they may be changed as soon as this returns.
        out: array of the same shape, made by `buffers_for`.
        wait_for: function that receives a callable, which waits until `out` is filled. It is not
            called if `out` is filled when this returns.
    """
    to = torch.from_numpy(out)
    if rows.device.type == "cpu" or not hasattr(torch, "accelerator"):
        to.copy_(rows)
        return
    converted = rows.to(to.dtype)
    to.copy_(converted, non_blocking=True)
    wait_for(_copied(converted))


def _copied(source: Tensor) -> Callable[[], None]:
    """Return a function that waits until the present copy of `source` is done, and keeps it."""
    device = source.device
    if device.type != "cuda":
        return partial(_wait, source, partial(_synchronize, device))
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return partial(_wait, source, event.synchronize)


def _wait(source: Tensor, synchronize: Callable[[], None]) -> None:
    # in the writer's thread, whose device would be the first one, and get a context there
    with torch.accelerator.device_index(source.device.index):
        synchronize()


def _synchronize(device: torch.device) -> None:
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError as error:
        # a device without streams has copied already
        if "support synchronizing" not in str(error):
            raise


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))
