"""What meets in one operation is on one device: held on the meta device, which needs no
accelerator.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_pipe.plan.layout import Block, Encoding, Layout
from hydra_pipe.recording.encoder import RowEncoder
from hydra_pipe.recording.encodings import Given


class OneDevice(TorchDispatchMode):
    """Raises where CUDA would: an operation on tensors of several devices, other than a copy."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        if len({x.device for x in tensors}) > 1 and "copy" not in func.__name__:
            raise AssertionError(
                f"{func.__name__} of tensors on {[str(x.device) for x in tensors]}"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("encoding", ["dense", "grids", "kron", "sketch"])
def test_the_first_rows_are_encoded_on_their_own_device(encoding: Encoding) -> None:
    columns = 64 if encoding == "dense" else 8
    block = Block(
        "weight",
        (8, 8),
        0,
        encoding,
        (0, columns),
        kron=(8, 8, 2, 4) if encoding == "kron" else None,
        grids=(8, 8, 2, 4) if encoding == "grids" else None,
    )
    encoder = RowEncoder(Layout((block,), columns, 0))
    with OneDevice():
        reduced = encoder.encodings[0].reduce(Given(torch.empty(3, 64, device="meta"), 0))
    assert isinstance(reduced.value, Tensor)
    assert (reduced.value.shape, reduced.value.device.type) == ((3, columns), "meta")
