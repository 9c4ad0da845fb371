"""The result of an evaluation: a table, a summary in plain values, and a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
# Function that draws into the matplotlib axes it is given.
Plot = Callable[[Any], None]


@dataclass(frozen=True)
class Result:
    """Result of one kind of evaluation.

    Args:
        rows: rows of the table, all with the same columns.
        summary: findings as plain values.
        says: lines for a person, printed below the table.
        plot: picture of the table, or None if there is nothing to draw.
        truth: values that relevance was compared with, stored as `truth.npy`. None if the kind
            has none of its own.
    """

    rows: Sequence[Row]
    summary: Mapping[str, Any]
    says: Sequence[str]
    plot: Plot | None = None
    truth: NDArray[np.float32] | None = field(default=None, repr=False)


def bars(rows: Sequence[Row], name: str, title: str) -> Plot:
    """Return a plot with a bar for each method, and its interval."""

    def draw(axes: Any) -> None:
        values = np.array([row[name] for row in rows])
        around = np.array(
            [[row[name] - row[f"{name}_low"], row[f"{name}_high"] - row[name]] for row in rows]
        )
        around = np.nan_to_num(around).clip(min=0.0)
        axes.barh([row["method"] for row in rows], values, xerr=around.T, capsize=3)
        axes.invert_yaxis()
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel(title)

    return draw
