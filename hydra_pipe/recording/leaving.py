"""How a loop was left: by its end or `break`, or by an exception."""

import gc
import inspect
import sys
from types import FrameType, TracebackType


def left_by_exception(frame: FrameType | None) -> bool:
    """Tell whether an exception is ending the loop that has just let go of its iterator.

    The interpreter drops the iterator of a loop before any handler runs, and shows the exception to nobody meanwhile. But a
    traceback says at which instruction the frame raised. A loop that is left by `break` has come to another one.

    Args:
        frame: in which the iterator was dropped: that of the loop, or of generators around the iterator.
    """
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
    if frame is None:
        return False
    return any(
        isinstance(found, TracebackType) and found.tb_frame is frame and found.tb_lasti == frame.f_lasti
        for found in gc.get_referrers(frame)
    )


def last_uncaught() -> BaseException | None:
    """The last exception that came to a prompt, or ended a notebook's cell; None: there was none."""
    return getattr(sys, "last_value", None)
