"""The page itself: findings in words and numbers, put into templates, and kept below a size."""

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from hydra_pipe.reporting.charts import distribution_chart, loss_chart
from hydra_pipe.reporting.content import Content, Suspect
from hydra_pipe.reporting.drawing import Cells, Drawn, Picture, Text, clean
from hydra_pipe.reporting.findings import Classes, Distribution
from hydra_pipe.reporting.words import METHODS, sign_in_words

MOST_BYTES = 10_000_000
# Share of `MOST_BYTES` that the most harmful training samples may take.
_SUSPECTS_SHARE = 0.3
_LONG_LABEL = 18
# Most bytes of a label to choose from: 40 characters, escaped.
_OPTION_BYTES = 400
_KINDS = {Picture: "picture", Text: "text", Cells: "cells"}
_PARTS = (
    ("summary", "In short"),
    ("tests", "Predictions"),
    ("harmful", "Most harmful"),
    ("classes", "Class by class"),
    ("charts", "Charts"),
    ("trust", "How far to trust it"),
    ("recorded", "What was recorded"),
)


@dataclass(frozen=True)
class Page:
    """A page, with the parts that did and did not fit on it.

    Args:
        html: content of the file.
        n_columns, n_suspects: numbers of test samples, and of harmful training samples, that are
            shown.
        left_out: parts that are left out for their size, in words.
    """

    html: bytes
    n_columns: int
    n_suspects: int
    left_out: list[str]


def page_of(content: Content, most_bytes: int = MOST_BYTES) -> Page:
    """Return the page.

    It takes at most `most_bytes`, unless the parts beside samples and rankings alone take more.
    """
    cards, suspects = _Labels(), _Labels()
    fixed, missing = _fixed(content), list(content.missing)
    # The fixed parts, with room for the words about the parts that are left out.
    room = most_bytes - len(_page(fixed, ["x"], ["x"], ([], []), [*missing, "x" * 1000]))
    harmful = _fitting(_suspects(content, suspects), int(room * _SUSPECTS_SHARE))
    shown = _fitting(_cards(content, cards), room - _size(harmful))
    left_out = []
    if len(shown) < len(content.columns):
        left_out.append(
            f"{len(content.columns) - len(shown):,} of {len(content.columns):,} "
            f"{content.columns_are}"
        )
    if len(harmful) < len(content.suspects):
        left_out.append(
            f"{len(content.suspects) - len(harmful):,} of the {len(content.suspects):,} most "
            "harmful training samples"
        )
    if left_out:
        missing.append(
            f"To keep the page below {MOST_BYTES / 1e6:.0f} MB it leaves out "
            f"{' and '.join(left_out)}."
        )
    html = _page(
        fixed, shown, harmful, ([] if content.grouped else cards.names, suspects.names), missing
    )
    return Page(html, len(shown), len(harmful), left_out)


class _Labels:
    """Numbers for labels, given as the labels come, so that a page can name each label once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, label: Any) -> int | str:
        """Return the number of a label, or an empty string for None."""
        return (
            "" if label is None else self._numbers.setdefault(clean(str(label)), len(self._numbers))
        )

    @property
    def names(self) -> list[str]:
        """Labels in the order of their numbers."""
        return list(self._numbers)


def _fitting(pieces: Iterable[str], n_bytes: int) -> list[str]:
    """Return the first pieces, as many as fit."""
    kept: list[str] = []
    for piece in pieces:
        n_bytes -= _size([piece])
        if n_bytes < 0:
            break
        kept.append(piece)
    return kept


def _size(pieces: Sequence[str]) -> int:
    """Return the bytes of pieces on the page, each with a label to choose from."""
    return sum(len(piece.encode()) + _OPTION_BYTES for piece in pieces)


def _cards(content: Content, labels: _Labels) -> Iterable[str]:
    template = _templates().get_template("card.html")
    for order, column in enumerate(content.columns):
        largest = max(
            [
                abs(float(side.relevance[0]))
                for side in (column.helpful, column.harmful)
                if len(side.ids)
            ],
            default=1.0,
        )
        sides = {
            name: [
                {
                    "id": int(sample),
                    "label": _label_of(content.train_labels, int(sample)),
                    "value": signed(float(value)),
                    "share": abs(float(value)) / largest,
                    "content": _shown(content.train_drawn.get(int(sample))),
                }
                for sample, value in zip(side.ids, side.relevance, strict=True)
            ]
            for name, side in (("helpful", column.helpful), ("harmful", column.harmful))
        }
        is_class = column.right is not None and column.is_class
        card = {
            "id": column.id,
            "kind": "Group" if content.grouped else "Test",
            "order": order,
            "train_ids": [item["id"] for side in sides.values() for item in side],
            "label": _cleaned(column.label),
            "has_label": column.label is not None or column.target is None,
            "label_number": labels.number(column.label),
            "target": _cleaned(column.target),
            "predicted": _cleaned(column.predicted),
            "outcome": "" if not is_class else "right" if column.right else "wrong",
            "share_right": None if is_class else column.right,
            "loss": column.loss,
            "content": _shown(column.drawn),
        } | sides
        yield template.render(card=card)


def _suspects(content: Content, labels: _Labels) -> Iterable[str]:
    template = _templates().get_template("harmful.html")
    for rank, suspect in enumerate(content.suspects, start=1):
        label = _label_of(content.train_labels, suspect.id)
        item = {
            "id": suspect.id,
            "rank": rank,
            "label": label,
            "label_number": labels.number(label),
            "share": suspect.relevance_sum / content.suspects[0].relevance_sum,
            "value": signed(suspect.relevance_sum),
            "content": _shown(content.train_drawn.get(suspect.id)),
        }
        yield template.render(item=item)


def _fixed(content: Content) -> dict[str, Any]:
    """Return the values that the page's template always needs, whatever else fits."""
    script, style = _static("script.js"), _static("style.css")
    drawn = {
        type(content.train_drawn[suspect.id])
        for suspect in content.suspects
        if suspect.id in content.train_drawn
    }
    return {
        "title": f"{clean(content.name)}: hydra-pipe report, {content.result}",
        "name": clean(content.name),
        "run_id": clean(content.run_id),
        "result": content.result,
        "method": content.method,
        "about_method": METHODS.get(
            content.method, "is none that this version of hydra-pipe knows."
        ),
        "sign": clean(sign_in_words(content.unit)),
        "n_samples": content.n_samples,
        "parts": _PARTS,
        "tiles": content.tiles,
        "warnings": content.warnings,
        "columns_are": content.columns_are,
        "cards_are": "groups" if content.grouped else "test samples",
        "cards_title": "Groups of test samples"
        if content.grouped
        else "Predictions, and what made them",
        "cards_about": content.n_chosen,
        "outcomes": any(column.right is not None and column.is_class for column in content.columns),
        "has_losses": any(column.loss is not None for column in content.columns),
        "wall_kind": "wide" if drawn & {Text, Cells} else "",
        "n_suspects": f"{len(content.suspects):,}",
        "csv": _csv(content.suspects),
        "csv_name": f"most-harmful-{content.result}.csv",
        "classes": None if content.classes is None else _classes(content.classes),
        "no_classes": (
            f"Labels of the training samples or of the {content.columns_are} are not known: "
            "there is no class by class."
        ),
        "distribution": _distribution(content.distribution),
        "loss": _loss(content.losses, content.test_losses),
        "evaluations": [
            (kind, [clean(line) for line in lines]) for kind, lines in content.evaluations
        ],
        "evaluate_command": clean(content.evaluate_command),
        "recorded": _recorded(content.recording),
        "settings": [(clean(name), clean(value)) for name, value in content.settings],
        "style": Markup(style),  # text of this package, so not escaped
        "script": Markup(script),
        "script_hash": "sha256-"
        + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _page(
    fixed: Mapping[str, Any],
    cards: Sequence[str],
    suspects: Sequence[str],
    labels: tuple[list[str], list[str]],
    missing: list[str],
) -> bytes:
    """Render the page with these pieces, which have been rendered already, and so escaped.

    `labels` are the labels of the two lists, to filter by.
    """
    page = (
        _templates()
        .get_template("report.html")
        .render(
            fixed,
            cards=Markup("\n".join(cards)),
            suspects=Markup("\n".join(suspects)),
            card_labels=labels[0],
            suspect_labels=labels[1],
            missing=[clean(text) for text in missing],
        )
    )
    return page.encode()


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("hydra_pipe.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def _static(name: str) -> str:
    return (
        files("hydra_pipe.reporting")
        .joinpath("templates", name)
        .read_text(encoding="utf-8")
        .strip()
    )


def _label_of(labels: NDArray[Any] | None, sample: int) -> str | None:
    return None if labels is None else clean(str(labels[sample]))


def _cleaned(text: Any) -> str | None:
    return None if text is None else clean(str(text))


def _shown(drawn: Drawn | None) -> dict[str, Any] | None:
    """Return the values that templates need: the name of the kind, and the fields."""
    if drawn is None:
        return None
    found = vars(drawn) | {"kind": _KINDS[type(drawn)]}
    return found | {"is_small": drawn.is_small} if isinstance(drawn, Picture) else found


def signed(value: float) -> str:
    """Format a relevance with its sign and three digits, zeros at the end included.

    A negative sign is a real minus.
    """
    digits, e, exponent = f"{value:+#.3g}".partition("e")
    text = digits.rstrip(".") + (f"e{int(exponent)}" if e else "")
    return text.replace("-", "\N{MINUS SIGN}")


def _csv(suspects: Sequence[Suspect]) -> str:
    """Return a table as a data URL.

    It has numbers only, so that a spreadsheet finds no formula in it.
    """
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["rank", "train_id", "relevance_sum", "relevance_mean", "visits"])
    for rank, s in enumerate(suspects, start=1):
        writer.writerow([rank, s.id, f"{s.relevance_sum:.9g}", f"{s.relevance_mean:.9g}", s.visits])
    return (
        "data:text/csv;charset=utf-8;base64," + base64.b64encode(table.getvalue().encode()).decode()
    )


def _classes(classes: Classes) -> dict[str, Any]:
    finite = np.abs(classes.means[np.isfinite(classes.means)])
    largest = float(finite.max(initial=0.0))
    # A common power of ten keeps the cells short.
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    scale = 10.0**power if abs(power) > 1 else 1.0
    train, test = ([clean(str(name)) for name in names] for names in (classes.train, classes.test))

    def cell(mean: float) -> dict[str, Any]:
        if not np.isfinite(mean):
            return {"value": "", "share": 0.0, "side": "none"}
        side = "helpful" if mean > 0 else "harmful" if mean < 0 else "none"
        text = f"{mean / scale:+.2f}".replace("-", "\N{MINUS SIGN}")
        return {"value": text, "share": abs(mean) / largest if largest else 0.0, "side": side}

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


def _distribution(distribution: Distribution) -> dict[str, Any]:
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


def _loss(losses: NDArray[np.float64], tests: list[tuple[int, float]]) -> dict[str, Any]:
    known = losses[np.isfinite(losses)]
    at_end = (
        f"the mean test loss was {tests[-1][1]:.3g} at the end"
        if tests
        else "no test loss is known"
    )
    if not len(known):
        return {"words": f"The training loop did not tell its loss; {at_end}.", "svg": None}
    tenth = max(1, len(known) // 10)
    words = (
        f"Mean training loss {known[:tenth].mean():.3g} over the first tenth of {len(losses):,} "
        "steps, "
        f"{known[-tenth:].mean():.3g} over the last; {at_end}."
    )
    return {"words": words, "svg": Markup(loss_chart(losses, tests))}


def _recorded(recording: Mapping[str, Any]) -> dict[str, Any]:
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
