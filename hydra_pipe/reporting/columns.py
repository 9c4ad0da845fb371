"""Test samples with predictions and rankings, in the names that people gave the classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.content import TestColumn
from hydra_pipe.reporting.counting import Confusion, confusion
from hydra_pipe.reporting.findings import Findings, Side
from hydra_pipe.reporting.labels import JudgedLabels
from hydra_pipe.store.data.combined import Combined, PairSpread
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.results import MEAN
from hydra_pipe.types import F64, I64

if TYPE_CHECKING:
    from hydra_pipe.reporting.drawing import Drawn
    from hydra_pipe.reporting.inputs import Predictions

OF_TESTS, OF_TRAINING = "Test samples", "Training samples, at their last visit"


@dataclass(frozen=True)
class Naming:
    """Names of classes and of test samples.

    Args:
        labels: labels of the columns, shape (column,). None: unknown.
        classes: names of the classes that the model predicts, by number. A class without a name
            is called by its number.
    """

    labels: NDArray[Any] | None
    classes: Mapping[int, str]

    @classmethod
    def of(
        cls,
        judged: JudgedLabels | str,
        predictions: "Predictions | None",
        labels: NDArray[Any] | None,
    ) -> "Naming":
        """Name the classes as the training labels do, or else as the test labels do.

        A class has the label of the test samples that have the class as target.
        """
        if not isinstance(judged, str):
            return cls(labels, dict(enumerate(judged.classes)))
        if (
            predictions is None
            or predictions.targets is None
            or labels is None
            or labels.dtype != object
        ):
            return cls(labels, {})
        found: dict[int, set[str]] = {}
        for target, label in zip(predictions.targets, labels, strict=True):
            if np.ndim(target) == 0 and np.issubdtype(np.asarray(target).dtype, np.integer):
                found.setdefault(int(target), set()).add(str(label))
        known = {target: next(iter(called)) for target, called in found.items() if len(called) == 1}
        return cls(labels, known)

    def label(self, columns: ResultColumns, place: int) -> Any:
        """Return the label of a column, or None if it is unknown."""
        if columns.by == MEAN:
            return "all test samples"
        return None if self.labels is None else self.labels[place]

    def in_words(self, value: Any, predictions: "Predictions") -> str | None:
        """Return a prediction or a target as text for a person."""
        values = np.asarray(value)
        if values.ndim:
            return predictions.drawn(value)
        if values.dtype.kind in "iub":
            return self.classes.get(int(values), str(int(values)))
        return f"{float(values):.4g}"


def shown_columns(
    columns: ResultColumns,
    chosen: I64,
    found: Findings | None,
    losses: F64,
    naming: Naming,
    predictions: "Predictions | None",
    drawn: "Mapping[int, Drawn]",
    combined: Combined | None,
) -> list[TestColumn]:
    """Return the chosen columns with everything to show of them.

    Args:
        columns: meaning of all columns.
        chosen: columns to show, in order.
        found: rankings of these columns. None without relevance.
        losses: loss of each column, shape (column,).
        naming: names of classes and columns.
        predictions: predictions for all columns, if they are known.
        drawn: views of test samples, by id.
        combined: the combination of runs whose mean is shown. None: it is of one run.
    """
    shown = []
    for n, place in enumerate(chosen.tolist()):
        test = int(columns.ids[place])
        loss = float(losses[place]) if np.isfinite(losses[place]) else None
        target, predicted, right, confidence = _predicted(place, naming, predictions)
        shown.append(
            TestColumn(
                id=test,
                label=naming.label(columns, place),
                target=target,
                predicted=predicted,
                right=right,
                is_class=predictions is not None and predictions.are_classes,
                confidence=confidence,
                loss=loss,
                drawn=drawn.get(test),
                sides=None if found is None else found.sides[n],
                spreads=None if found is None else _spreads(combined, found.sides[n], place),
            )
        )
    return shown


def _spreads(
    combined: Combined | None, sides: tuple[Side, Side], place: int
) -> tuple[PairSpread, PairSpread] | None:
    """Return the spread of the runs about each value of the rankings of a column."""
    if combined is None:
        return None
    helpful, harmful = (
        combined.spread_of(side.ids, np.full(len(side.ids), place)) for side in sides
    )
    return helpful, harmful


def _predicted(
    place: int, naming: Naming, predictions: "Predictions | None"
) -> tuple[str | None, str | None, float | None, float | None]:
    """Return target, prediction, share that is right, and confidence, as far as known."""
    if predictions is None:
        return None, None, None, None
    right, confidence = (
        None if np.isnan(values[place]) else float(values[place])
        for values in (predictions.right, predictions.confidence)
    )
    if predictions.values is None or predictions.targets is None:
        return None, None, right, confidence
    predicted = naming.in_words(predictions.values[place], predictions)
    target = None
    if naming.labels is None:
        target = naming.in_words(predictions.targets[place], predictions)
    return target, predicted, right, confidence


def confusions_of(
    judged: JudgedLabels | str, predictions: "Predictions | None", naming: Naming
) -> dict[str, Confusion]:
    """Return the numbers of predictions by label, of test samples and of training samples."""
    found = {}
    if predictions is not None and predictions.are_classes and predictions.values is not None:
        targets, values = (
            np.array(own, np.int64) for own in (predictions.targets, predictions.values)
        )
        n = max(len(naming.classes), int(max(targets.max(), values.max())) + 1)
        if targets.min() >= 0:
            called = [naming.classes.get(i, str(i)) for i in range(n)]
            found[OF_TESTS] = confusion(targets, values, called)
    if not isinstance(judged, str):
        found[OF_TRAINING] = confusion(judged.labels, judged.predicted, judged.classes)
    return found
