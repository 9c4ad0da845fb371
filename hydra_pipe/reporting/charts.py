"""Charts as SVG with the colours and the font of the page around it. This file needs Matplotlib."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hydra_pipe.reporting.findings import Distribution

# Placeholders until the SVG is written: then the page's colours replace them, in the light and
# in the dark.
INK, MUTED, LINE, HELPFUL, HARMFUL = "#010101", "#020202", "#030303", "#040404", "#050505"
_OF_PAGE = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    HELPFUL: "--helpful",
    HARMFUL: "--harmful",
}
# Most points of a curve: more than a page has pixels for.
MOST_POINTS = 150
# Share of the largest bar. Smaller bars at both ends are left out.
_LEAST_BAR = 1 / 500
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def distribution_chart(distribution: Distribution) -> str:
    """Draw the number of pairs by size of relevance: helpful ones up, harmful ones down."""
    edges, helpful, harmful = distribution.bins()
    tall = np.flatnonzero(
        np.maximum(helpful, harmful) >= max(helpful.max(), harmful.max()) * _LEAST_BAR
    )
    span = slice(tall[0], tall[-1] + 1)
    edges, helpful, harmful = edges[span], helpful[span], harmful[span]

    def draw(axes: Any) -> None:
        axes.bar(edges, helpful, width=edges, align="edge", color=HELPFUL, edgecolor="none")
        # Harmful bars differ by more than colour: they are below the line, and hatched.
        axes.bar(
            edges,
            -harmful,
            width=edges,
            align="edge",
            color="none",
            edgecolor=HARMFUL,
            hatch="////",
            linewidth=0.6,
        )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: power_of_ten(value))
        axes.set_xlabel("size of relevance |R|")
        axes.set_ylabel("pairs: harmful below, helpful above")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")

    return _svg(draw, "distribution", "Numbers of helpful and harmful pairs by size of relevance")


def loss_chart(losses: NDArray[np.float64], tests: list[tuple[int, float]]) -> str:
    """Draw the loss by step.

    The curve is the mean of neighbouring steps, with a band from their least to their largest
    loss. Mean test losses are points at the steps where they were taken.

    Args:
        losses: loss of each step, not a number if unknown. Shape (step,).
        tests: pairs of a step and the mean test loss there.
    """
    steps, low, mean, high = thinned(losses)

    def draw(axes: Any) -> None:
        axes.fill_between(steps, low, high, color=MUTED, alpha=0.25, linewidth=0)
        axes.plot(steps, mean, color=INK, linewidth=1.2, label="training, batch by batch")
        if tests:
            axes.plot(
                *zip(*tests, strict=True),
                color=HELPFUL,
                marker="o",
                markersize=5,
                linewidth=1,
                linestyle="--",
                label="test",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("mean loss")
        axes.set_ylim(
            float(np.min(low, initial=0.0)), max([*high, *(loss for _, loss in tests)]) * 1.1 or 1.0
        )
        axes.legend(frameon=False, labelcolor=INK)

    return _svg(draw, "loss", "Training loss by step, and test loss")


def thinned(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Join neighbouring values into at most `MOST_POINTS` runs.

    Returns:
        Middle index, least, mean and largest value of each run. Runs without a finite value are
        left out.
    """
    runs = np.array_split(np.arange(len(values)), min(MOST_POINTS, max(1, len(values))))
    kept = [
        (run.mean(), values[run][np.isfinite(values[run])])
        for run in runs
        if np.isfinite(values[run]).any()
    ]
    found = [(middle, own.min(), own.mean(), own.max()) for middle, own in kept]
    return (
        tuple(np.array(column) for column in zip(*found, strict=True))
        if found
        else (np.zeros(0),) * 4
    )


def power_of_ten(value: float) -> str:
    """Return 1e-3 as "10⁻³".

    Matplotlib's own formatter typesets a formula, which takes longer than drawing the bars.
    """
    return "10" + str(round(np.log10(value))).translate(_RAISED)


def _svg(draw: Callable[[Any], None], salt: str, label: str) -> str:
    """Return the drawing of `draw` as SVG.

    The same drawing always gives the same bytes. No backend is used, so no display is needed.
    """
    style = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "hatch.linewidth": 0.8,
    }
    with rc_context(style):
        figure: Any = Figure(figsize=(4.8, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw(axes)
        content = io.StringIO()
        figure.savefig(
            content,
            format="svg",
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Remove a style rule that would apply to the whole page, and names that two charts would
    # share.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for colour, name in _OF_PAGE.items():
        svg = svg.replace(colour, f"var({name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
