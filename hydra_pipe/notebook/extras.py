"""Imports of packages that are needed for some results only."""

import importlib
from typing import Any

from hydra_pipe.errors import ExtraError

EXTRA = "notebook"


def imported(module: str, what: str) -> Any:
    """Import a module of a package that hydra-pipe does not depend on.

    Args:
        module: name of the module.
        what: name of the thing that needs it, for the message.

    Raises:
        ExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ExtraError(
            f"{what} needs {package}, which is not installed: pip install 'hydra-pipe[{EXTRA}]'"
        ) from error
