"""A picture of the loss over the steps with its spikes marked, drawn with matplotlib."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hydra_pipe.errors import UsageError
from hydra_pipe.notebook.extras import imported
from hydra_pipe.rewinding.spikes import LOSS, Spikes
from hydra_pipe.store.files import local_path, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS: Final = ("png", "svg")
_LINE, _SPIKE = "#3b6fb6", "#c23b3b"
# A series whose largest value is so many times its median is drawn on a logarithmic axis.
_STEEP = 20


def draw_spikes(spikes: Spikes, axes: "Axes", step: int | None = None) -> None:
    """Draw the series of `spikes`, what was expected, and the spikes. Mark one step.

    Args:
        spikes: spikes of a run.
        axes: axes to draw on.
        step: step to mark. None: none.
    """
    steps = np.arange(len(spikes.values))
    what = "loss" if spikes.by == LOSS else "norm of the gradient"
    axes.plot(steps, spikes.values, color="grey", linewidth=0.8, label=f"{what} of each step")
    axes.plot(steps, spikes.expected, color=_LINE, linewidth=1, label="expected")
    axes.plot(steps, spikes.line, color=_LINE, linewidth=0.8, linestyle=":", label="spikes above")
    if spikes.table.num_rows:
        highest = spikes.table["highest_step"].to_numpy()
        n = f"{len(highest):,} spike{'s' * (len(highest) > 1)}"
        axes.plot(highest, spikes.values[highest], "v", color=_SPIKE, markersize=6, label=n)
    if step is not None:
        axes.axvline(step, color=_SPIKE, linewidth=0.8, linestyle="--", label=f"step {step:,}")
    known = spikes.values[np.isfinite(spikes.values)]
    if known.size and known.min() > 0 and known.max() > _STEEP * np.median(known):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=what)
    axes.legend(frameon=False)


def picture_format(path: str | os.PathLike[str]) -> str:
    """Return the format of a picture by the end of its name. Raises: UsageError: another one."""
    found = Path(path).suffix.removeprefix(".").lower()
    if found not in FORMATS:
        raise UsageError(f"--picture {path}: give a name that ends in .png or .svg")
    return found


def write_picture(
    path: str | os.PathLike[str], spikes: Spikes, title: str, step: int | None = None
) -> None:
    """Write the picture of `draw_spikes`. The file appears whole.

    Args:
        path: file on this machine, .png or .svg.
        spikes: spikes of a run.
        title: title of the picture.
        step: step to mark. None: none.

    Raises:
        UsageError: the file has another ending.
        ExtraError: matplotlib is not installed.
    """
    kind = picture_format(path)
    # A bare Figure needs no backend, and so no display. Without the salt, names in an SVG are
    # random.
    rc_context = imported("matplotlib", "a picture").rc_context
    figure_class = imported("matplotlib.figure", "a picture").Figure
    with rc_context({"svg.hashsalt": "hydra-pipe"}):
        figure: Any = figure_class(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        draw_spikes(spikes, axes, step)
        axes.set_title(title)
        content = io.BytesIO()
        no_date = {"Date": None} if kind == "svg" else {}
        figure.savefig(content, format=kind, dpi=150, metadata=no_date)
    replace_file(local_path(os.fspath(path), "the picture"), [content.getvalue()])
