"""Packages that are not needed until someone asks for what they make."""

import importlib
from typing import Any

from hydra_pipe.errors import ExtraError

EXTRA = "notebook"


def imported(module: str, what: str) -> Any:
    """The module, which is of a package that hydra-pipe does not depend on.

    Args:
        module: its name.
        what: needs it, in words for the message.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ExtraError(f"{what} needs {package}, which is not installed: pip install 'hydra-pipe[{EXTRA}]'") from error
