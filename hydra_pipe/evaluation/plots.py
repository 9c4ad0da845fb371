"""Pictures of results, drawn with matplotlib, which is optional."""

import io
from typing import Any

from hydra_pipe.evaluation.result import Plot


def drawn(plot: Plot, title: str) -> bytes | None:
    """Return `plot` as SVG, or None if matplotlib is not installed.

    The same result always gives the same bytes.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # A bare Figure needs no backend, and so no display. Without the salt, names in the file are
    # random.
    with rc_context({"svg.hashsalt": "hydra-pipe"}):
        figure: Any = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_title(title)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
