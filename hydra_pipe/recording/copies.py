"""Copies of a recorded model without the hooks of hydra-pipe.

Copies are made by `copy`, `pickle` or `torch.save`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn

_PACKAGE = __name__.partition(".")[0]
_GETSTATE = "__getstate__"


class CleanCopies:
    """A change of the modules of `model`: their copies leave out the hooks of hydra-pipe.

    The modules themselves keep the hooks. `remove` undoes the change.

    Args:
        model: the model. Each module gets its own `__getstate__` until `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._given: list[tuple[nn.Module, Callable[[], Any]]] = []
        for module in model.modules():
            own = vars(module)
            # the module defines its own copies, or another recorder has changed it already
            if isinstance(module, torch.jit.ScriptModule) or _GETSTATE in own:
                continue
            own[_GETSTATE] = state_of = partial(_state_of, ref(module))
            self._given.append((module, state_of))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module, state_of in self._given:
            if vars(module).get(_GETSTATE) is state_of:
                del vars(module)[_GETSTATE]
        self._given = []


def _state_of(module: "ref[nn.Module]") -> Any:
    found = module()
    assert found is not None  # the module is being copied, so it is alive
    of_class = getattr(type(found), _GETSTATE, None)  # object has none before Python 3.11
    state = vars(found) if of_class is None else of_class(found)
    if isinstance(state, tuple) and state and isinstance(state[0], dict):  # a class with slots
        return (_cleaned(state[0]), *state[1:])
    return _cleaned(state) if isinstance(state, dict) else state


def _cleaned(state: dict[str, Any]) -> dict[str, Any]:
    ours: set[int] = set()
    hooks = [
        name for name, value in state.items() if name.endswith("_hooks") and isinstance(value, dict)
    ]
    for name in hooks:
        ours |= {number for number, hook in state[name].items() if _is_ours(hook)}
    cleaned = {name: value for name, value in state.items() if name != _GETSTATE}
    if ours:
        # further dictionaries mark hooks that take keywords, or that are always called
        for name in state:
            if "_hooks" in name and isinstance(state[name], dict):
                kept = {
                    number: value for number, value in state[name].items() if number not in ours
                }
                cleaned[name] = type(state[name])(kept)
    return cleaned


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] == _PACKAGE
