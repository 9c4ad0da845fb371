"""The plot of benchmarks/fidelity.py: bytes a row, on a logarithmic axis, against rank correlation."""

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
        path: of the PNG.
    """
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, panels = plt.subplots(1, len(results), figsize=(5.6 * len(results), 4.7), sharey=True, squeeze=False)
    least = min(point.spearman for points in results.values() for point in points)
    for axes, (title, points) in zip(panels[0], results.items(), strict=True):
        draw_panel(axes, title, points)
        axes.set_ylim(max(-1.0, least - 0.08), 1.04)
    panels[0][0].set_ylabel("Spearman with exact float32 relevance")
    handles = [Line2D([], [], color=colour, linewidth=2, label=encoding) for encoding, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color=MUTED, marker=marker, linestyle="", markersize=6, label=dtype) for dtype, marker in MARKERS.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, handlelength=1.4)
    figure.suptitle("What fewer bytes cost", x=0.065, y=0.975, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout(rect=(0, 0.07, 1, 0.96), w_pad=2.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_panel(axes: Any, title: str, points: Sequence[Any]) -> None:
    for encoding, colour in COLOURS.items():
        for dtype, marker in MARKERS.items():
            line = sorted((p for p in points if (p.encoding, p.dtype) == (encoding, dtype)), key=lambda p: p.bytes_a_row)
            if not line:
                continue
            xs, ys = [p.bytes_a_row for p in line], [p.spearman for p in line]
            dashes = (0, (3, 2)) if dtype == "int8" else "-"
            axes.plot(xs, ys, color=colour, linewidth=1.6, linestyle=dashes, alpha=0.8, zorder=2)
            axes.scatter(xs, ys, s=46, marker=marker, color=colour, edgecolor="white", linewidth=1.1, zorder=3)
    for point in points:
        label_point(axes, point)
    axes.set_xscale("log")
    low, high = min(p.bytes_a_row for p in points), max(p.bytes_a_row for p in points)
    axes.set_xlim(low / 1.7, high * 1.9)
    axes.set_xticks([t for t in decades() if low / 1.7 <= t <= high * 1.9])
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


def label_point(axes: Any, point: Any) -> None:
    """The dim beside each float16 point, and the dtype above each exact one; the rest is in the legend."""
    if point.encoding == "exact":
        axes.annotate(point.dtype, (point.bytes_a_row, point.spearman), (0, 8), textcoords="offset points", ha="center", **SMALL)
    elif point.dtype == "float16" and not point.exact:
        below = point.encoding == "projected"
        axes.annotate(
            f"{point.dim:,}",
            (point.bytes_a_row, point.spearman),
            (7, -11) if below else (5, 5),
            textcoords="offset points",
            ha="left",
            **SMALL | {"color": COLOURS[point.encoding]},
        )


SMALL = {"fontsize": 8, "color": MUTED}


def decades() -> list[float]:
    return [m * 10.0**e for e in range(1, 8) for m in (1, 3)]
