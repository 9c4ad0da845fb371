"""The plot of benchmarks/fidelity.py: rank correlation over bytes a row (logarithmic)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
# three hues that are told apart with any colour vision
COLOURS = {"exact": INK, "auto": "#0072b2", "projected": "#d55e00"}
MARKERS = {"float32": "D", "float16": "o", "int8": "s"}


def size_of(n_bytes: float, _: object = None) -> str:
    """A number of bytes for an axis: 4000 is "4 kB"."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:g} {unit}"
    return f"{n_bytes:g} B"


def draw(results: Mapping[str, Sequence[Any]], path: Path) -> None:
    """One panel a model.

    Args:
        results: title of the model -> its points (`fidelity.Point`).
        path: of the picture, .svg or .png.
    """
    plt.rcParams.update(
        {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK}
    )
    figure, panels = plt.subplots(
        1, len(results), figsize=(5.6 * len(results), 4.5), sharey=True, squeeze=False
    )
    least = min(point.spearman for points in results.values() for point in points)
    for axes, (title, points) in zip(panels[0], results.items(), strict=True):
        draw_panel(axes, title, points)
        axes.set_ylim(max(-1.0, least - 0.08), 1.04)
    panels[0][0].set_ylabel("Spearman with exact float32 relevance")
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            linewidth=2,
            label=f"{encoding}, by columns" if encoding != "exact" else encoding,
        )
        for encoding, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color=MUTED, marker=marker, linestyle="", markersize=6, label=dtype)
        for dtype, marker in MARKERS.items()
    ]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, handlelength=1.4
    )
    figure.suptitle(
        "What fewer bytes cost", x=0.065, y=0.965, ha="left", fontsize=13, fontweight="bold"
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1.0), w_pad=2.5)
    # without a date, and with text as text: the same figures give the same file, and a small one
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw_panel(axes: Any, title: str, points: Sequence[Any]) -> None:
    for encoding, colour in COLOURS.items():
        for dtype, marker in MARKERS.items():
            line = sorted(
                (p for p in points if (p.encoding, p.dtype) == (encoding, dtype)),
                key=lambda p: p.bytes_a_row,
            )
            if not line:
                continue
            xs, ys = [p.bytes_a_row for p in line], [p.spearman for p in line]
            dashes = (0, (3, 2)) if dtype == "int8" else "-"
            if encoding == "exact":  # open and larger: what is stored so may lie under it
                axes.scatter(
                    xs,
                    ys,
                    s=110,
                    marker=marker,
                    facecolor="none",
                    edgecolor=colour,
                    linewidth=1.4,
                    zorder=4,
                )
                continue
            axes.plot(xs, ys, color=colour, linewidth=1.6, linestyle=dashes, alpha=0.8, zorder=2)
            axes.scatter(
                xs,
                ys,
                s=46,
                marker=marker,
                color=colour,
                edgecolor="white",
                linewidth=1.1,
                zorder=3,
            )
    label_points(axes, points)
    axes.set_xscale("log")
    low, high = min(p.bytes_a_row for p in points), max(p.bytes_a_row for p in points)
    margin = (high / low) ** 0.12
    axes.set_xlim(low / margin, high * margin)
    axes.set_xticks(ticks_between(low / margin, high * margin))
    axes.xaxis.set_major_formatter(FuncFormatter(size_of))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes a row on disk")
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def label_points(axes: Any, points: Sequence[Any]) -> None:
    """The dims: of the better encoding at each on the left of its int8 point, of the other on the
    right of its float16 one.
    """
    for dim in sorted({point.dim for point in points if point.dim}):
        best = max((p for p in points if p.dim == dim), key=lambda p: p.spearman).encoding
        for point in points:
            better = point.encoding == best
            if point.dim != dim or point.dtype != ("int8" if better else "float16"):
                continue
            text = "lossless" if point.exact else f"{dim:,}"
            offset, side = ((-8, 3), "right") if better else ((8, -11), "left")
            at = (point.bytes_a_row, point.spearman)
            axes.annotate(
                text,
                at,
                offset,
                textcoords="offset points",
                ha=side,
                fontsize=8,
                color=COLOURS[point.encoding],
            )


def ticks_between(low: float, high: float) -> list[float]:
    """Powers of ten, and three times them where there are few."""
    steps = (1, 3) if high / low < 300 else (1,)
    ticks = [step * 10.0**exponent for exponent in range(1, 9) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]
