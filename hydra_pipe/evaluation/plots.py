"""Pictures of results, with matplotlib, which is optional."""

import io
from typing import Any

from hydra_pipe.evaluation.result import Plot


def drawn(plot: Plot, title: str) -> bytes | None:
    """`plot` as SVG, always the same bytes for the same result; None where matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # without a backend, and so without a display; names in the file would be random otherwise
    with rc_context({"svg.hashsalt": "hydra-pipe"}):
        figure: Any = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_title(title)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
