"""Pieces of a page that may be many, rendered one by one: labels, test samples, pairs."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from hydra_pipe.reporting.content import Content, LabelPart, Suspect, TestColumn
from hydra_pipe.reporting.drawing import Cells, Drawn, Picture, Text, clean
from hydra_pipe.reporting.duplicates import Pair
from hydra_pipe.reporting.labels import Doubt
from hydra_pipe.reporting.likeness import WORD, common_words, differing_columns, shared_words
from hydra_pipe.store.data.combined import PairSpread
from hydra_pipe.types import F64

_KINDS = {Picture: "picture", Text: "text", Cells: "cells"}
# Columns in which two rows differ that are named at most.
_MOST_DIFFERING = 4
# No estimate is certain: a larger chance is written as larger than 99 %.
_NEARLY_SURE = 0.995
# Size of the small line of confidences, in pixels.
_LINE_WIDTH, _LINE_HEIGHT, _LINE_MARGIN = 96, 28, 3


class LabelNumbers:
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


@cache
def templates() -> Environment:
    """Return the templates of the page. They escape everything that comes from data."""
    environment = Environment(
        loader=PackageLoader("hydra_pipe.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters["marked"] = marked
    return environment


def marked(text: str, words: frozenset[str]) -> Markup:
    """Return a text as HTML in which some words are marked."""
    found, end = Markup(), 0
    if words:
        for match in WORD.finditer(text):
            if match[0].lower() in words:
                found += escape(text[end : match.start()])
                found += Markup("<mark>{}</mark>").format(match[0])
                end = match.end()
    return found + escape(text[end:])


def doubt_pieces(content: Content, part: LabelPart) -> Iterable[str]:
    """Yield the labels that look wrong, the most suspicious first."""
    template = templates().get_template("doubt.html")
    classes = [clean(name) for name in part.judged.classes]
    on_page = {column.id for column in content.columns}
    for rank, doubt in enumerate(part.judged.doubts, start=1):
        hurts = part.hurts.get(doubt.id, []) if part.hurts is not None else None
        item = {
            "id": doubt.id,
            "key": cleaned(content.train_keys.get(doubt.id)),
            "rank": rank,
            "given": classes[doubt.given],
            "suggested": classes[doubt.suggested],
            "class": doubt.suggested,
            "chance": f"{doubt.chance:.0%}" if doubt.chance < _NEARLY_SURE else "> 99%",
            "measure": "score" if part.judged.warnings else "chance",
            "line": confidence_line(doubt, classes),
            "hurts": None
            if hurts is None
            else [
                {
                    "id": hurt.id,
                    "kind": "group" if content.grouped else "test",
                    "label": cleaned(hurt.label),
                    "is_shown": hurt.id in on_page,
                }
                for hurt in hurts
            ],
            "content": shown(content.train_drawn.get(doubt.id)),
        }
        yield template.render(item=item)


def confidence_line(doubt: Doubt, classes: list[str]) -> dict[str, str]:
    """Return the paths of both confidences over the visits, and a sentence about them."""
    own, other = doubt.confidence, doubt.suggested_confidence
    there = np.flatnonzero(np.isfinite(own))
    if not len(there):
        return {"own": "", "other": "", "words": "never visited"}
    words = "; ".join(
        f"{classes[number]} {values[there[0]]:.0%} at first, {values[there[-1]]:.0%} at last"
        for number, values in ((doubt.given, own), (doubt.suggested, other))
    )
    return {
        "own": _path(own, there),
        "other": _path(other, there),
        "words": f"confidence over {len(there)} visits: {words}",
    }


def _path(values: F64, there: NDArray[np.int64]) -> str:
    width, height = _LINE_WIDTH - 2 * _LINE_MARGIN, _LINE_HEIGHT - 2 * _LINE_MARGIN
    span = max(len(values) - 1, 1)
    points = [
        f"{_LINE_MARGIN + width * i / span:.0f} {_LINE_MARGIN + height * (1 - values[i]):.0f}"
        for i in there.tolist()
    ]
    return f"M{'L'.join(points)}" if len(points) > 1 else f"M{points[0]}h1"


def card_pieces(content: Content, labels: LabelNumbers) -> Iterable[str]:
    """Yield the test samples, the most telling first."""
    template = templates().get_template("card.html")
    common = common_words([*content.train_drawn.values(), *content.test_drawn.values()])
    for order, column in enumerate(content.columns):
        is_class = column.right is not None and column.is_class
        sides = _sides(content, column, common)
        card = {
            "id": column.id,
            "key": cleaned(content.test_keys.get(column.id)),
            "kind": "Group" if content.grouped else "Test",
            "order": order,
            "train_ids": [item["id"] for side in sides.values() for item in side],
            "label": cleaned(column.label),
            "has_label": column.label is not None or column.target is None,
            "label_number": labels.number(column.label),
            "target": cleaned(column.target),
            "predicted": cleaned(column.predicted),
            "confidence": None if column.confidence is None else f"{column.confidence:.0%}",
            "outcome": "" if not is_class else "right" if column.right else "wrong",
            "share_right": None if is_class else column.right,
            "loss": column.loss,
            "content": shown(column.drawn),
            "sides": sides,
        }
        yield template.render(card=card)


def _sides(
    content: Content, column: TestColumn, common: frozenset[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the training samples that help and that harm a test sample. Empty: none is known."""
    if column.sides is None:
        return {}
    largest = max(
        [abs(float(side.relevance[0])) for side in column.sides if len(side.ids)], default=1.0
    )
    return {
        name: [
            {
                "id": int(sample),
                "key": cleaned(content.train_keys.get(int(sample))),
                "label": label_of(content.train_labels, int(sample)),
                "value": signed(float(value)),
                "share": abs(float(value)) / largest,
                "spread": None if spread is None else spread_in_words(spread, place),
                "content": shown(content.train_drawn.get(int(sample))),
            }
            | compared(content.train_drawn.get(int(sample)), column.drawn, common)
            for place, (sample, value) in enumerate(zip(side.ids, side.relevance, strict=True))
        ]
        for name, side, spread in zip(
            ("helpful", "harmful"), column.sides, column.spreads or (None, None), strict=True
        )
    }


def spread_in_words(spread: PairSpread, place: int) -> str:
    """Return how the runs spread about the value at `place`, and how many agree on its sign."""
    error, runs = float(spread.standard_error[place]), int(spread.runs[place])
    agreeing = f"{int(spread.agreeing[place])} of {runs} runs"
    return agreeing if np.isnan(error) else f"± {error:.2g}, stable in {agreeing}"


def suspect_pieces(
    content: Content, suspects: list[Suspect], labels: LabelNumbers
) -> Iterable[str]:
    """Yield the most harmful training samples, the most harmful first."""
    template = templates().get_template("harmful.html")
    for rank, suspect in enumerate(suspects, start=1):
        label = label_of(content.train_labels, suspect.id)
        item = {
            "id": suspect.id,
            "key": cleaned(content.train_keys.get(suspect.id)),
            "rank": rank,
            "label": label,
            "label_number": labels.number(label),
            "share": suspect.relevance_sum / suspects[0].relevance_sum,
            "value": signed(suspect.relevance_sum),
            "content": shown(content.train_drawn.get(suspect.id)),
        }
        yield template.render(item=item)


def pair_pieces(content: Content, pairs: list[Pair]) -> Iterable[str]:
    """Yield the pairs of inputs that are alike, those whose labels differ first."""
    template = templates().get_template("pair.html")
    for pair in pairs:
        one = content.train_drawn.get(pair.one)
        other = (content.test_drawn if pair.is_test else content.train_drawn).get(pair.other)
        other_keys = content.test_keys if pair.is_test else content.train_keys
        other_label = (
            cleaned(content.test_labels.get(pair.other))
            if pair.is_test
            else label_of(content.train_labels, pair.other)
        )
        both = [
            {
                "kind": "training",
                "id": pair.one,
                "key": cleaned(content.train_keys.get(pair.one)),
                "label": label_of(content.train_labels, pair.one),
                "content": shown(one),
            },
            {
                "kind": "test" if pair.is_test else "training",
                "id": pair.other,
                "key": cleaned(other_keys.get(pair.other)),
                "label": other_label,
                "content": shown(other),
            },
        ]
        how = "the same" if pair.is_exact else f"cosine {min(pair.cosine, 0.9999):.4f}"
        item = {"both": both, "how": how, "differ": pair.differ, "is_test": pair.is_test}
        marks = compared(one, other, frozenset())
        if pair.is_exact:  # then every word is shared
            marks["words"] = frozenset()
        yield template.render(item=item | marks)


def compared(one: Drawn | None, other: Drawn | None, common: frozenset[str]) -> dict[str, Any]:
    """Return what two inputs have in common: words of texts, or columns that differ."""
    differing = differing_columns(one, other)
    return {
        "words": shared_words(one, other, common),
        "differing": None
        if differing is None
        else {
            "n": len(differing),
            "n_columns": len(one.cells) if isinstance(one, Cells) else 0,
            "first": differing[:_MOST_DIFFERING],
        },
    }


def label_of(labels: NDArray[Any] | None, sample: int) -> str | None:
    """Return the label of a training sample, or None if it is unknown."""
    return None if labels is None else clean(str(labels[sample]))


def cleaned(text: Any) -> str | None:
    """Return a value as text that HTML can hold, or None for None."""
    return None if text is None else clean(str(text))


def shown(drawn: Drawn | None) -> dict[str, Any] | None:
    """Return the values that templates need: the name of the kind, and the fields."""
    if drawn is None:
        return None
    found: Mapping[str, Any] = vars(drawn)
    more = {"is_small": drawn.is_small} if isinstance(drawn, Picture) else {}
    return {**found, **more, "kind": _KINDS[type(drawn)]}


def signed(value: float) -> str:
    """Format a relevance with its sign and three digits, zeros at the end included.

    A negative sign is a real minus.
    """
    digits, e, exponent = f"{value:+#.3g}".partition("e")
    text = digits.rstrip(".") + (f"e{int(exponent)}" if e else "")
    return text.replace("-", "\N{MINUS SIGN}")
