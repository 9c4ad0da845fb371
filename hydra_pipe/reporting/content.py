"""What is on a page, as values: found before, and put into words and templates after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.drawing import Drawn
from hydra_pipe.reporting.findings import Classes, Distribution, Side


@dataclass(frozen=True)
class Column:
    """A test sample, or a group of them, with what is to be shown of it.

    Args:
        id: of the test sample, or number of the group.
        label: as the recording has it, or name of the group; None: not known.
        target: what was to be predicted, where that is not the label.
        predicted: in words; None: not known.
        right: share of the prediction that is right; None: there is no right and wrong.
        is_class: whether it is right or wrong as a whole.
        loss: at the end; None: not known.
        drawn: what a person sees of it.
        helpful, harmful: rankings.
    """

    id: int
    label: Any
    target: str | None
    predicted: str | None
    right: float | None
    is_class: bool
    loss: float | None
    drawn: Drawn | None
    helpful: Side
    harmful: Side


@dataclass(frozen=True)
class Suspect:
    """One of the most harmful training samples.

    Args:
        id: of it.
        relevance_sum, relevance_mean: over all columns.
        visits: steps that used it.
    """

    id: int
    relevance_sum: float
    relevance_mean: float
    visits: int


@dataclass(frozen=True)
class Content:
    """Everything that is on the page.

    Args:
        name: of the run.
        run_id, result, method, unit: as the store has them.
        n_samples: training samples.
        columns_are: what columns are, in words.
        grouped: whether they are groups of test samples.
        n_columns: of the relevance.
        columns: those to show, the most telling first.
        n_chosen: how they came to be chosen, in words.
        suspects: the most harmful first.
        train_labels: shape (sample,); None: not known.
        train_drawn: what a person sees of a training sample.
        tiles: figures and what they are.
        warnings, missing: what to keep in mind, and what is not there and why.
        classes: None: labels are not known.
        distribution: of all pairs.
        losses: of each step, shape (step,).
        test_losses: steps, and the mean test loss after them.
        evaluations: kind, and what it says.
        evaluate_command: that would say something.
        recording: as `Run.info` has it.
        settings: names and values.
    """

    name: str
    run_id: str
    result: str
    method: str
    unit: str
    n_samples: int
    columns_are: str
    grouped: bool
    columns: Sequence[Column]
    n_chosen: str
    suspects: Sequence[Suspect]
    train_labels: NDArray[Any] | None
    train_drawn: Mapping[int, Drawn]
    tiles: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    missing: Sequence[str]
    classes: Classes | None
    distribution: Distribution
    losses: NDArray[np.float64]
    test_losses: list[tuple[int, float]]
    evaluations: Sequence[tuple[str, list[str]]]
    evaluate_command: str
    recording: Mapping[str, Any]
    settings: Sequence[tuple[str, str]]
