"""The page itself: findings in words and numbers, put into templates, and kept below a size."""

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from hydra_pipe.reporting.content import Content, LabelPart, NoRelevance, RelevancePart, Suspect
from hydra_pipe.reporting.drawing import Cells, Text, clean
from hydra_pipe.reporting.duplicates import Duplicates
from hydra_pipe.reporting.pieces import (
    LabelNumbers,
    card_pieces,
    doubt_pieces,
    pair_pieces,
    suspect_pieces,
    templates,
)
from hydra_pipe.reporting.tables import (
    class_table,
    confusion_table,
    count_table,
    distribution_figure,
    loss_figure,
    map_of,
    recorded_table,
)
from hydra_pipe.reporting.words import (
    METHODS,
    about_labels,
    alike_in_words,
    labels_title,
    sign_in_words,
)

MOST_BYTES = 10_000_000
# Most bytes of a label to choose from: 40 characters, escaped.
_OPTION_BYTES = 400
# Classes that a label can be changed to, at most.
_MOST_CHOICES = 1000
# Pieces of each kind that are shown before the reader asks for more.
_FIRST = {"labels": 12, "tests": 6, "harmful": 12}
_SCRIPTS = ("lists.js", "labels.js", "map.js")


@dataclass(frozen=True)
class Page:
    """A page, with the parts that did and did not fit on it.

    Args:
        html: content of the file.
        n_labels, n_columns: numbers of labels that look wrong, and of test samples, that are
            shown.
        left_out: parts that are left out for their size, in words.
    """

    html: bytes
    n_labels: int
    n_columns: int
    left_out: list[str]


def page_of(content: Content, most_bytes: int = MOST_BYTES) -> Page:
    """Return the page.

    It takes at most `most_bytes`, unless the parts beside samples and rankings alone take more.
    """
    labels = {"cards": LabelNumbers(), "suspects": LabelNumbers()}
    fixed, missing = _fixed(content), list(content.missing)
    pieces = _pieces(content, labels)
    # The fixed parts, with room for the words about the parts that are left out.
    some = {kind: ["x"] for kind in pieces}
    room = most_bytes - len(_page(fixed, some, labels, [*missing, "x" * 1000]))
    left, fitting, left_out = room, {}, []
    for kind, (all_of_it, n, what, share) in pieces.items():
        fitting[kind] = _fitting(all_of_it, min(left, int(room * share)))
        left -= _size(fitting[kind])
        if len(fitting[kind]) < n:
            left_out.append(f"{n - len(fitting[kind]):,} of the {n:,} {what}")
    if left_out:
        missing.append(
            f"To keep the page below {MOST_BYTES / 1e6:.0f} MB it leaves out "
            f"{' and '.join(left_out)}."
        )
    html = _page(fixed, fitting, labels, missing)
    return Page(html, len(fitting["doubts"]), len(fitting["cards"]), left_out)


def _pieces(
    content: Content, labels: Mapping[str, LabelNumbers]
) -> dict[str, tuple[Iterable[str], int, str, float]]:
    """Return the pieces of each kind, their number, their name, and their share of the page.

    The kinds that come first are the first to have room.
    """
    part = content.labels
    doubts = doubt_pieces(content, part) if isinstance(part, LabelPart) else []
    n_doubts = len(part.judged.doubts) if isinstance(part, LabelPart) else 0
    pairs = content.duplicates.pairs if isinstance(content.duplicates, Duplicates) else []
    relevance = content.relevance
    suspects = list(relevance.suspects) if isinstance(relevance, RelevancePart) else []
    harmful = suspect_pieces(content, suspects, labels["suspects"])
    cards = card_pieces(content, labels["cards"])
    return {
        "doubts": (doubts, n_doubts, "most suspicious labels", 0.3),
        "pairs": (pair_pieces(content, pairs), len(pairs), "pairs that are alike", 0.1),
        "suspects": (harmful, len(suspects), "most harmful training samples", 0.2),
        "cards": (cards, len(content.columns), content.columns_are, 1.0),
    }


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


def _fixed(content: Content) -> dict[str, Any]:
    """Return the values that the page's template always needs, whatever else fits."""
    style = _static("style.css")
    script = "\n".join(map(_static, _SCRIPTS))
    return {
        "title": f"{clean(content.name)}: hydra-pipe report, {content.result}",
        "name": clean(content.name),
        "run_id": clean(content.run_id),
        "result": content.result,
        "n_samples": content.n_samples,
        "parts": _parts(content),
        "first": _FIRST,
        "has_keys": bool(content.train_keys or content.test_keys),
        "tiles": content.tiles,
        "warnings": content.warnings,
        "columns_are": content.columns_are,
        "cards_are": "groups" if content.grouped else "test samples",
        "cards_title": _cards_title(content),
        "cards_about": content.n_chosen,
        "outcomes": any(column.right is not None and column.is_class for column in content.columns),
        "has_losses": any(column.loss is not None for column in content.columns),
        "labels": _labels(content),
        "confusions": [confusion_table(heading, found) for heading, found in content.confusions],
        "alike": clean(alike_in_words(content.duplicates)),
        "relevance": _relevance(content),
        "loss": loss_figure(content.losses, content.test_losses),
        "evaluations": [
            (kind, [clean(line) for line in lines]) for kind, lines in content.evaluations
        ],
        "evaluate_command": None
        if content.evaluate_command is None
        else clean(content.evaluate_command),
        "recorded": None if content.recording is None else recorded_table(content.recording),
        "settings": [(clean(name), clean(value)) for name, value in content.settings],
        "style": Markup(style),  # text of this package, so not escaped
        "script": Markup(script),
        "script_hash": "sha256-"
        + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _parts(content: Content) -> list[tuple[str, str]]:
    """Return the parts of the page, each an anchor and a name."""
    has_labels = isinstance(content.labels, LabelPart)
    has_relevance = isinstance(content.relevance, RelevancePart)
    has_map = isinstance(content.labels, LabelPart) and content.labels.judged.scatter is not None
    found = [
        ("labels", "Labels to check", has_labels),
        ("summary", "In short", True),
        ("tests", "Predictions", bool(content.columns)),
        ("confusion", "Confusions", has_labels or bool(content.confusions)),
        ("map", "Map", has_map),
        ("alike", "Near-duplicates", True),
        ("harmful", "Most harmful", has_relevance),
        ("classes", "Class by class", has_relevance),
        ("charts", "Charts", True),
        ("trust", "How far to trust it", has_relevance),
        (
            "recorded",
            "What was combined" if content.recording is None else "What was recorded",
            True,
        ),
    ]
    return [(anchor, name) for anchor, name, is_there in found if is_there]


def _cards_title(content: Content) -> str:
    if content.grouped:
        return "Groups of test samples"
    made = isinstance(content.relevance, RelevancePart)
    return "Predictions, and what made them" if made else "Predictions"


def _labels(content: Content) -> dict[str, Any]:
    """Return the values of the part about labels."""
    part = content.labels
    if not isinstance(part, LabelPart):
        return {"is_judged": False, "reason": clean(part)}
    judged = part.judged
    drawn = {
        type(content.train_drawn[doubt.id])
        for doubt in judged.doubts
        if doubt.id in content.train_drawn
    }
    return {
        "is_judged": True,
        "title": clean(labels_title(judged, _FIRST["labels"])),
        "about": [clean(text) for text in about_labels(judged)],
        "warnings": [clean(text) for text in judged.warnings],
        "command": clean(part.command),
        "kind": "wide" if drawn & {Text, Cells} else "",
        "choices": [clean(name) for name in judged.classes[:_MOST_CHOICES]],
        "counts": count_table(part.classes, len(judged.classes)),
        "map": map_of(judged),
    }


def _relevance(content: Content) -> dict[str, Any]:
    """Return the values of the parts about relevance."""
    part = content.relevance
    if isinstance(part, NoRelevance):
        return {"is_there": False, "words": clean(part.words), "command": clean(part.command)}
    drawn = {
        type(content.train_drawn[suspect.id])
        for suspect in part.suspects
        if suspect.id in content.train_drawn
    }
    return {
        "is_there": True,
        "method": content.method,
        "about_method": METHODS.get(
            content.method, "is none that this version of hydra-pipe knows."
        ),
        "sign": clean(sign_in_words(part.unit)),
        "wall_kind": "wide" if drawn & {Text, Cells} else "",
        "n_suspects": f"{len(part.suspects):,}",
        "csv": _csv(part.suspects),
        "csv_name": f"most-harmful-{content.result}.csv",
        "classes": None if part.classes is None else class_table(part.classes),
        "no_classes": (
            f"Labels of the training samples or of the {content.columns_are} are not known: "
            "there is no class by class."
        ),
        "distribution": distribution_figure(part.distribution),
    }


def _page(
    fixed: Mapping[str, Any],
    pieces: Mapping[str, Sequence[str]],
    labels: Mapping[str, LabelNumbers],
    missing: list[str],
) -> bytes:
    """Render the page with these pieces, which have been rendered already, and so escaped.

    `labels` are the labels of the test samples and of the most harmful training samples, to
    filter by.
    """
    page = (
        templates()
        .get_template("report.html")
        .render(
            fixed,
            **{kind: Markup("\n".join(own)) for kind, own in pieces.items()},
            n_doubts=len(pieces["doubts"]),
            card_labels=[] if fixed["cards_are"] == "groups" else labels["cards"].names,
            suspect_labels=labels["suspects"].names,
            missing=[clean(text) for text in missing],
        )
    )
    return page.encode()


def _static(name: str) -> str:
    return (
        files("hydra_pipe.reporting")
        .joinpath("templates", name)
        .read_text(encoding="utf-8")
        .strip()
    )


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
