"""Standard streams in any state: closed, full, unread, or in an encoding that lacks characters."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_NUMBERS = (0, 1, 2)


@contextmanager
def settled_streams() -> Iterator[None]:
    """Run a block in which printing fails no work.

    When the block ends, all output has been written, or the exit code is 1.
    """
    _occupy()
    sys.stdout, sys.stderr = _printable(sys.stdout), _printable(sys.stderr)
    try:
        yield
    finally:
        _flush()


def _occupy() -> None:
    """Replace closed streams by the null device.

    Otherwise the next file to be opened would take a stream's number, and be printed into.
    """
    for number in _NUMBERS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _printable(stream: TextIO | None) -> TextIO:
    if stream is None:  # Python has None for a closed stream
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure") and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return stream


def _flush() -> None:
    """Write the remaining output now.

    Python itself would report a failure only at its end, with a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # The rest of the output must go somewhere when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError):
                    print(
                        f"hydra-pipe: the output cannot be written ({error.strerror}); what was "
                        "done is kept",
                        file=sys.stderr,
                    )
                sys.exit(1)
