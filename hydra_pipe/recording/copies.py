"""Copies of a model that is being recorded: made by `copy`, `pickle` or `torch.save`, they have no hooks of hydra-pipe."""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn

_PACKAGE = __name__.partition(".")[0]
_GETSTATE = "__getstate__"


class CleanCopies:
    """While it lasts, copies of the modules of `model` leave out hooks that belong to hydra-pipe. The modules keep them.

    Args:
        model: whose modules get a `__getstate__` of their own, which goes away with `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._given: list[tuple[nn.Module, Callable[[], Any]]] = []
        for module in model.modules():
            own = vars(module)
            # a module that says itself what its copies hold, or that another recorder looks after
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
    assert found is not None  # it is being copied
    of_class = getattr(type(found), _GETSTATE, None)  # Python before 3.11 has none that every class inherits
    state = vars(found) if of_class is None else of_class(found)
    if isinstance(state, tuple) and state and isinstance(state[0], dict):  # of a class with slots
        return (_cleaned(state[0]), *state[1:])
    return _cleaned(state) if isinstance(state, dict) else state


def _cleaned(state: dict[str, Any]) -> dict[str, Any]:
    ours: set[int] = set()
    hooks = [name for name, value in state.items() if name.endswith("_hooks") and isinstance(value, dict)]
    for name in hooks:
        ours |= {number for number, hook in state[name].items() if _is_ours(hook)}
    cleaned = {name: value for name, value in state.items() if name != _GETSTATE}
    if ours:
        # beside the hooks themselves, dictionaries say of some that they take keywords, or are always called
        for name in state:
            if "_hooks" in name and isinstance(state[name], dict):
                kept = {number: value for number, value in state[name].items() if number not in ours}
                cleaned[name] = type(state[name])(kept)
    return cleaned


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] == _PACKAGE
