"""Detection of loops that were left by an exception, not by their end or by `break`."""

import gc
import inspect
import sys
from types import FrameType, TracebackType


def left_by_exception(frame: FrameType | None) -> bool:
    """Tell whether an exception is ending the loop that has just let go of its iterator.

    The interpreter drops the iterator of a loop before any handler runs. At this moment no code can
    see the exception. But a traceback holds the instruction at which the frame raised. A loop that
    was left by `break` has reached another instruction.

    Args:
        frame: frame in which the iterator was dropped, which is the frame of the loop, or of a
            generator around the iterator.
    """
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
    if frame is None:
        return False
    return any(
        isinstance(found, TracebackType)
        and found.tb_frame is frame
        and found.tb_lasti == frame.f_lasti
        for found in gc.get_referrers(frame)
    )


def last_uncaught() -> BaseException | None:
    """Return the last exception that reached a prompt or ended a notebook cell, or None."""
    return getattr(sys, "last_value", None)
