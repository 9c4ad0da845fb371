"""Tables, charts and the map of a page, as values for its templates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hydra_pipe.reporting.charts import distribution_chart, loss_chart
from hydra_pipe.reporting.counting import ClassCount, Confusion
from hydra_pipe.reporting.drawing import clean
from hydra_pipe.reporting.findings import Classes, Distribution
from hydra_pipe.reporting.labels import JudgedLabels
from hydra_pipe.reporting.words import number

_LONG_LABEL = 18
# Size of the map, in units of its own.
_MAP_WIDTH, _MAP_HEIGHT = 1000, 640
# Classes that have a colour of their own on the map.
_COLOURS = 10


def class_table(classes: Classes) -> dict[str, Any]:
    """Return the table of mean relevance by class.

    Colours are scaled to the largest mean of two different labels. A mean of equal labels is
    often far larger, and would leave all others without colour.
    """
    finite = np.where(np.isfinite(classes.means), np.abs(classes.means), 0.0)
    largest = float(finite.max(initial=0.0))
    own = np.array([[a == b for b in classes.test] for a in classes.train], bool)
    between = float(finite[~own].max(initial=0.0)) or largest
    # A common power of ten keeps the cells short.
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    scale = 10.0**power if abs(power) > 1 else 1.0
    train, test = ([clean(str(name)) for name in names] for names in (classes.train, classes.test))

    def cell(mean: float) -> dict[str, Any]:
        if not np.isfinite(mean):
            return {"value": "", "share": 0.0, "side": "none"}
        side = "helpful" if mean > 0 else "harmful" if mean < 0 else "none"
        text = f"{mean / scale:+.2f}".replace("-", "\N{MINUS SIGN}")
        share = min(1.0, abs(mean) / between) if between else 0.0
        return {"value": text, "share": share, "side": side}

    cut = []
    for which, kept, n in (("training", train, classes.n_train), ("test", test, classes.n_test)):
        if n > len(kept):
            cut.append(f"the {len(kept)} of {n:,} {which} labels that most samples have")
    return {
        "train": train,
        "test": test,
        "rows": [
            (name, [cell(float(mean)) for mean in row])
            for name, row in zip(train, classes.means, strict=True)
        ],
        "unit": "the unit above"
        if scale == 1.0
        else Markup("units of 10<sup>{}</sup>").format(_exponent(power)),
        "cut": f"Shown: {' and '.join(cut)}." if cut else "",
        "long": [name for name in dict.fromkeys([*train, *test]) if len(name) > _LONG_LABEL],
    }


def _exponent(power: int) -> str:
    return str(power).replace("-", "\N{MINUS SIGN}")


def confusion_table(heading: str, found: Confusion) -> dict[str, Any]:
    """Return a table of predictions by label. Colours are scaled to the most frequent mistake."""
    mistakes = found.counts.copy()
    np.fill_diagonal(mistakes, 0)
    largest = int(mistakes.max(initial=0))
    names = [clean(name) for name in found.classes]

    def cell(i: int, j: int) -> dict[str, Any]:
        n = int(found.counts[i, j])
        if i == j:
            return {"value": f"{n:,}", "share": 0.0, "side": "same"}
        return {"value": f"{n:,}" if n else "", "share": n / largest if n else 0, "side": "harmful"}

    n_samples = max(found.n_samples, 1)
    words = f"{found.n_right:,} of {found.n_samples:,} are right ({found.n_right / n_samples:.1%})."
    if found.n_classes > len(names):
        words += f" Shown: the {len(names)} of {found.n_classes:,} classes with the most samples."
    return {
        "heading": heading,
        "words": words,
        "names": names,
        "rows": [(name, [cell(i, j) for j in range(len(names))]) for i, name in enumerate(names)],
    }


def count_table(counts: Sequence[ClassCount], n_classes: int) -> dict[str, Any]:
    """Return the table of numbers of samples by class."""
    largest = max((count.n_train for count in counts), default=0)
    return {
        "rows": [
            {
                "name": clean(count.name),
                "n_train": f"{count.n_train:,}",
                "share": count.n_train / largest if largest else 0.0,
                "n_doubted": f"{count.n_doubted:,}",
                "n_test": "" if count.n_test is None else f"{count.n_test:,}",
                "right": f"{(count.n_right or 0) / count.n_test:.0%}" if count.n_test else "",
            }
            for count in counts
        ],
        "has_tests": any(count.n_test is not None for count in counts),
        "cut": f"Shown: the {len(counts)} of {n_classes:,} classes with the most training samples."
        if n_classes > len(counts)
        else "",
    }


def map_of(judged: JudgedLabels) -> dict[str, Any] | None:
    """Return the map of the training samples: a path of points for each class."""
    found = judged.scatter
    if found is None:
        return None
    labels, ids = judged.labels[found.rows], judged.ids[found.rows]
    doubted = np.isin(ids, judged.proposed)
    frequent = np.argsort(-np.bincount(labels, minlength=len(judged.classes)), kind="stable")
    coloured = np.sort(frequent[:_COLOURS]).tolist()
    x = np.round(15 + found.places[:, 0] * (_MAP_WIDTH - 30)).astype(int)
    y = np.round(_MAP_HEIGHT - 15 - found.places[:, 1] * (_MAP_HEIGHT - 30)).astype(int)
    paths = []
    for is_doubted in (False, True):
        for number_of_class in np.unique(labels):
            own = np.flatnonzero((labels == number_of_class) & (doubted == is_doubted))
            if not len(own):
                continue
            colour = coloured.index(number_of_class) if number_of_class in coloured else "other"
            paths.append(
                {
                    "points": "".join(f"M{x[i]} {y[i]}h0" for i in own),
                    "ids": " ".join(map(str, ids[own].tolist())),
                    "name": clean(judged.classes[number_of_class]),
                    "colour": colour,
                    "is_doubted": is_doubted,
                }
            )
    legend: list[tuple[str, int | str]] = [
        (clean(judged.classes[n]), colour) for colour, n in enumerate(coloured)
    ]
    if len(np.unique(labels)) > len(coloured):
        legend.append(("others", "other"))
    n, n_doubted = len(ids), int(doubted.sum())
    words = (
        f"{n:,} of {judged.n_samples:,} training samples by {found.space}, along the two "
        f"directions in which they differ most ({found.explained:.0%} of the variance). Colours "
        f"are given labels. {number(n_doubted).capitalize()} with a ring look wrong."
    )
    return {
        "words": words,
        "paths": paths,
        "legend": legend,
        "width": _MAP_WIDTH,
        "height": _MAP_HEIGHT,
    }


def distribution_figure(distribution: Distribution) -> dict[str, Any]:
    """Return the chart of the distribution, with words about it."""
    n = int(distribution.counts.sum())
    words = (
        f"Of {n:,} pairs {distribution.helpful / n:.1%} help, {distribution.harmful / n:.1%} harm"
        + (f", {distribution.zeros / n:.1%} are 0" if distribution.zeros else "")
        + (
            ". Each bar is of pairs whose relevance is within a factor of two; bars too small to "
            "be seen are left out at both ends."
        )
    )
    some = distribution.helpful + distribution.harmful > 0
    # numbers only, so not escaped
    return {"words": words, "svg": Markup(distribution_chart(distribution)) if some else None}


def loss_figure(losses: NDArray[np.float64], tests: list[tuple[int, float]]) -> dict[str, Any]:
    """Return the chart of the loss, with words about it."""
    known = losses[np.isfinite(losses)]
    at_end = (
        f"the mean test loss was {tests[-1][1]:.3g} at the end"
        if tests
        else "no test loss is known"
    )
    if not len(losses):
        return {"words": "Each of the runs has losses of its own.", "svg": None}
    if not len(known):
        return {"words": f"The training loop did not tell its loss; {at_end}.", "svg": None}
    tenth = max(1, len(known) // 10)
    words = (
        f"Mean training loss {known[:tenth].mean():.3g} over the first tenth of {len(losses):,} "
        "steps, "
        f"{known[-tenth:].mean():.3g} over the last; {at_end}."
    )
    return {"words": words, "svg": Markup(loss_chart(losses, tests))}


def recorded_table(recording: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the recorded parameters, with words about the recording."""
    blocks = [
        block | {"shape": " x ".join(map(str, block["shape"])) or "1"}
        for block in recording["blocks"]
    ]
    for block in blocks:
        block["name"] = clean(block["name"])
    exact = sum(block["exact"] for block in blocks)
    parameters = int(recording["parameters"])
    words = (
        f"{recording['rows']:,} gradients, one for each training sample at each of "
        f"{recording['steps']:,} steps, of "
        f"{parameters:,} parameters in {recording['features']:,} columns of {recording['dtype']}: "
        f"{recording['bytes']} on disk. "
        + (
            "All parameters were recorded exactly, but for the rounding of that type."
            if exact == len(blocks)
            else (
                f"{exact} of {len(blocks)} parameters were recorded exactly, the others by "
                "random projection."
            )
        )
    )
    return {"words": words, "blocks": blocks}
