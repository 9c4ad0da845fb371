"""Standard streams as a shell may leave them: closed, full, no longer read, or in an encoding that lacks characters."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_NUMBERS = (0, 1, 2)


@contextmanager
def settled_streams() -> Iterator[None]:
    """A block in which printing fails no work. When it ends, what was printed has been written, or the exit code is 1."""
    _occupy()
    sys.stdout, sys.stderr = _printable(sys.stdout), _printable(sys.stderr)
    try:
        yield
    finally:
        _flush()


def _occupy() -> None:
    """Put nothing in the place of closed streams: the next file to be opened would be taken for one, and printed into."""
    for number in _NUMBERS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free


def _printable(stream: TextIO | None) -> TextIO:
    if stream is None:  # as Python has a closed one
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure") and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return stream


def _flush() -> None:
    """Write what is printed now, for Python would tell of a failure only after its end, with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # what is left of it must go somewhere when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError):
                    print(f"hydra-pipe: the output cannot be written ({error.strerror}); what was done is kept", file=sys.stderr)
                sys.exit(1)
