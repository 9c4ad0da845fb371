"""The content of a page, as values: gathered before, put into words and templates after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.counting import ClassCount, Confusion
from hydra_pipe.reporting.drawing import Drawn
from hydra_pipe.reporting.duplicates import Duplicates
from hydra_pipe.reporting.findings import Classes, Distribution, Side
from hydra_pipe.reporting.labels import JudgedLabels
from hydra_pipe.store.data.combined import PairSpread


@dataclass(frozen=True)
class TestColumn:
    """A test sample, or a group of test samples, with everything to show of it.

    Args:
        id: id of the test sample, or number of the group.
        label: label in the recording, or name of the group. None if unknown.
        target: correct prediction, if it is not the label.
        predicted: prediction in words, or None if unknown.
        right: share of the prediction that is right. None if nothing can be right or wrong.
        is_class: True if the prediction is right or wrong as a whole.
        confidence: probability of the predicted class, or None if unknown.
        loss: loss at the end, or None if unknown.
        drawn: picture, text or values that show the sample.
        sides: rankings of the training samples that help and that harm it. None without
            relevance.
        spreads: spread of the runs about each value of `sides`. None where one run is shown.
    """

    id: int
    label: Any
    target: str | None
    predicted: str | None
    right: float | None
    is_class: bool
    confidence: float | None
    loss: float | None
    drawn: Drawn | None
    sides: tuple[Side, Side] | None
    spreads: tuple[PairSpread, PairSpread] | None


@dataclass(frozen=True)
class Suspect:
    """One of the most harmful training samples.

    Args:
        id: id of the sample.
        relevance_sum, relevance_mean: sum and mean over all columns.
        visits: number of steps that used the sample.
    """

    id: int
    relevance_sum: float
    relevance_mean: float
    visits: int


@dataclass(frozen=True)
class Hurt:
    """A test sample, or a group of test samples, that a training sample harms.

    Args:
        id: id of the test sample, or number of the group.
        label: label, or name of the group. None if unknown.
    """

    id: int
    label: Any


@dataclass(frozen=True)
class LabelPart:
    """Labels that look wrong, and the classes.

    Args:
        judged: labels, as the network saw them.
        hurts: test samples that each sample of the queue harms most, by its id. None without
            relevance.
        command: command that takes the decisions.
        classes: numbers of samples by class.
    """

    judged: JudgedLabels
    hurts: Mapping[int, Sequence[Hurt]] | None
    command: str
    classes: Sequence[ClassCount]


@dataclass(frozen=True)
class RelevancePart:
    """Facts of the relevance beside the rankings of test samples.

    Args:
        unit: unit of a value, as in the store.
        suspects: most harmful training samples, the most harmful first.
        classes: mean relevance by label, or None if labels are unknown.
        distribution: distribution of the relevance of all pairs.
    """

    unit: str
    suspects: Sequence[Suspect]
    classes: Classes | None
    distribution: Distribution


@dataclass(frozen=True)
class NoRelevance:
    """A page without relevance: its meaning in words, and the command that leads to relevance."""

    words: str
    command: str


@dataclass(frozen=True)
class Content:
    """Everything that is on the page.

    Args:
        name: name of the run.
        run_id, result, method: values from the store.
        n_samples: number of training samples.
        labels: labels that look wrong. A reason, if they were not judged.
        confusions: pairs of a heading and the numbers of predictions by label.
        columns_are: meaning of the columns, in words.
        grouped: True if columns are groups of test samples.
        columns: columns to show, the most telling first.
        n_chosen: reason for the choice of these columns, in words.
        train_labels: labels of the training samples, shape (sample,). None if unknown.
        train_drawn: picture, text or values of each training sample, by id.
        test_drawn: the same of test samples.
        test_labels: labels of the test samples in `duplicates`, by id.
        train_keys, test_keys: keys of the samples on the page, by id. Empty if they have none.
        duplicates: inputs that are alike. A reason, if they were not compared.
        tiles: pairs of a figure and its meaning.
        warnings: cautions for the reader.
        missing: parts that the page lacks, with the reasons.
        relevance: facts of the relevance, or the way to it.
        losses: loss of each step, shape (step,).
        test_losses: pairs of a step and the mean test loss after it.
        evaluations: pairs of a kind of evaluation and its lines for a person.
        evaluate_command: command for an evaluation worth making. None: the page is of several runs.
        recording: facts of the recording, from `Run.info`. None: the page is of several runs.
        settings: pairs of a name and a value.
    """

    name: str
    run_id: str
    result: str
    method: str
    n_samples: int
    labels: LabelPart | str
    confusions: Sequence[tuple[str, Confusion]]
    columns_are: str
    grouped: bool
    columns: Sequence[TestColumn]
    n_chosen: str
    train_labels: NDArray[Any] | None
    train_drawn: Mapping[int, Drawn]
    test_drawn: Mapping[int, Drawn]
    test_labels: Mapping[int, Any]
    train_keys: Mapping[int, str]
    test_keys: Mapping[int, str]
    duplicates: Duplicates | str
    tiles: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    missing: Sequence[str]
    relevance: RelevancePart | NoRelevance
    losses: NDArray[np.float64]
    test_losses: list[tuple[int, float]]
    evaluations: Sequence[tuple[str, list[str]]]
    evaluate_command: str | None
    recording: Mapping[str, Any] | None
    settings: Sequence[tuple[str, str]]
