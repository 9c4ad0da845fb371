"""Errors in the user's code: the model, the loss, a dataset, the pipeline's file."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_pipe.errors import HydraError, UserCodeError, extra_of

_PACKAGE = Path(__file__).parents[1]


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Enter a block of the user's code, and turn its exceptions into errors of this package.

    Raises:
        UserCodeError: the block raised an exception; the message begins with `what`.
    """
    try:
        yield
    except HydraError:
        raise
    except Exception as error:
        raise user_code_error(what, error) from error


def user_code_error(what: str, error: BaseException) -> UserCodeError:
    """Return an error of this package around one of the user's.

    Its traceback is cut down to the frames of the user's own files.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(Path(f.filename))]
    excerpt = "".join(traceback.format_list(frames))
    message = str(error).strip().split("\n")[0]
    extra = extra_of(error)
    install = f": pip install 'hydra-pipe[{extra}]'" if extra is not None else ""
    return UserCodeError(f"{what}: {type(error).__name__}: {message}{install}", excerpt)


def _is_users(file: Path) -> bool:
    return (
        _PACKAGE not in file.parents
        and "site-packages" not in file.parts
        and "importlib" not in str(file)
    )
