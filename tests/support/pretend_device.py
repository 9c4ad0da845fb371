"""A pretend accelerator for tests without one: device "pretend", whose tensors wrap CPU tensors.

It raises where an accelerator would: a host tensor meets a device tensor. It counts what costs time
there: reads of device values by the host, and operators launched, views included. It has no streams
and no events. A process that imports this module has the device for the rest of its life.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"
backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(f"{NAME}:0")

#: reads and copies between the device and the host, by what they are
crossings: Counter[str] = Counter()
#: operators on the device, by name
operators: Counter[str] = Counter()
_WAITS = ("item", "to host", "shape from data")
_ATEN = torch.ops.aten


def reads() -> int:
    """How often the host has waited for a value of the device."""
    return sum(crossings[what] for what in _WAITS)


def forget() -> None:
    """Count anew."""
    crossings.clear()
    operators.clear()


class Pretend(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "Pretend":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Within it, operators on tensors of the device, and factories that name it, go there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_ours = any(isinstance(leaf, Pretend) for leaf in tree_leaves((args, kwargs)))
        if is_ours or _is_pretend(kwargs.get("device")):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretend) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is _ATEN._local_scalar_dense.default:
        crossings["item"] += 1
        return func(_raw(args[0]))
    if func is _ATEN._to_copy.default:
        return _converted(args[0], dict(kwargs))
    if func is _ATEN.copy_.default:
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        _count_copy(args[1], isinstance(args[0], Pretend), waits)
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if func in (_ATEN.nonzero.default, _ATEN.masked_select.default):
        crossings["shape from data"] += 1
    operators[str(func)] += 1
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Pretend)]
    strangers = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretend) and leaf.dim() > 0
    ]
    if ours and strangers and "index" not in str(func):
        shapes = [tuple(leaf.shape) for leaf in strangers]
        raise RuntimeError(f"{func}: expected all tensors on one device, host tensors {shapes}")
    raw_kwargs = dict(tree_map(_raw, kwargs))
    on_device = bool(ours)
    if "device" in raw_kwargs:
        on_device = _is_pretend(raw_kwargs["device"])
        raw_kwargs |= {"device": "cpu", "pin_memory": False}
    result = func(*tree_map(_raw, args), **raw_kwargs)
    if not on_device:
        return result
    # an operator in place gives back what it was given
    same = {id(leaf.raw): leaf for leaf in ours}
    return tree_map_only(
        torch.Tensor, lambda t: same[id(t)] if id(t) in same else Pretend(t), result
    )


def _converted(source: Any, kwargs: dict[str, Any]) -> Any:
    device = kwargs.pop("device", None)
    to_device = isinstance(source, Pretend) if device is None else _is_pretend(device)
    _count_copy(source, to_device, not kwargs.pop("non_blocking", False))
    kwargs.pop("pin_memory", None)
    copied = _ATEN._to_copy.default(_raw(source), device="cpu", **kwargs)
    return Pretend(copied) if to_device else copied


def _count_copy(source: Any, to_device: bool, waits: bool) -> None:
    if isinstance(source, Pretend) and not to_device:
        crossings["to host" if waits else "to host, not waited for"] += 1
