"""Hooks of modules that copies and pickles of the modules do not take along."""

from collections.abc import Callable
from typing import Any


def do_nothing(*_: Any, **__: Any) -> None:
    """Do nothing: the hook of a copied or unpickled module."""


def _nothing() -> Callable[..., None]:
    return do_nothing


class Hook:
    """A hook that stays with its module. Copies and pickles of the module get an idle hook."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _nothing, ()
