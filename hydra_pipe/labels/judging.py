"""The verdict: labels that look wrong, and the labels that they should have."""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.errors import DataError
from hydra_pipe.labels.cut import Estimate, cautious_cut, number_wrong, recommended_cut
from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import (
    EpochWeights,
    Statistics,
    epoch_weights,
    statistics_of,
    visits_of,
)
from hydra_pipe.labels.transition import Model, fit, halfway, log_odds, shares_of_suggested
from hydra_pipe.labels.views import heaviest, predictions, ridge_side_by_side, votes_over
from hydra_pipe.types import F64, I64

# Epochs whose inputs order the labels, and epochs that the noise is fitted to.
_ORDERING, _FITTING = 5, 2
# Below this share of trusted samples predicted right, above chance, little has been learnt.
_HARDLY_LEARNT = 0.5
# A class of two with less than this share is rare.
_RARE = 1 / 3
# Fewer samples for each class say little.
_FEW = 20
# A class with fewer samples, or with less than this share of an even one, is hardly compared.
_SCARCE, _UNEVEN = 10, 0.1


@dataclass(frozen=True)
class Evidence:
    """Chances and numbers that a verdict rests on.

    Attributes:
        predictions: P, shape (sample, class).
        ridge: R, shape (sample, class). None without inputs of the last layer and with few logits.
        votes: V, as R.
        weights: epochs that the views listened to.
        statistics: numbers of each sample's visits.
        model: how wrong labels came about.
    """

    predictions: F64
    ridge: F64 | None
    votes: F64 | None
    weights: EpochWeights
    statistics: Statistics
    model: Model


@dataclass(frozen=True)
class Verdict:
    """Labels that look wrong.

    Attributes:
        score: log-odds that another class is right, shape (sample,). The higher, the more
            suspicious.
        suggested: the likeliest class other than the given label, int64, shape (sample,).
        chance: estimated chance that the label is wrong, shape (sample,). It falls along `order`.
        suggested_chance: estimated chance that the suggested class is right, shape (sample,).
        order: samples by falling score, int64, shape (sample,).
        n_proposed: how many of `order` are proposed by the recommended cut.
        n_cautious: how many are likelier wrong than right.
        n_wrong: how many labels are wrong.
        precision: expected share of the proposed labels that are wrong. 0 if none is proposed.
        evidence: what the verdict rests on.
        warnings: reasons not to trust the verdict, one sentence each.
    """

    score: F64
    suggested: I64
    chance: F64
    suggested_chance: F64
    order: I64
    n_proposed: int
    n_cautious: int
    n_wrong: Estimate
    precision: float
    evidence: Evidence
    warnings: tuple[str, ...]

    @property
    def proposed(self) -> I64:
        """Samples whose labels look wrong, the most suspicious first."""
        return self.order[: self.n_proposed]


@dataclass(frozen=True)
class _Views:
    """Views of all samples, and their mean."""

    predictions: F64
    ridge: F64 | None
    votes: F64 | None
    log_mean: F64


def judge(dynamics: Dynamics) -> Verdict:
    """Find labels that look wrong from what a network thought of them while it trained.

    Three views of each sample (`views`) are averaged over the epochs that have learnt and have not
    yet memorised (`epochs`). A model of the noise (`transition`) turns the mean of the views into
    log-odds, which order the labels. The model is fitted to the views of the few epochs that have
    memorised least, without the network's own predictions. The chances of these views say how many
    labels are wrong, and how many to propose (`cut`). No true label is needed.

    Arrays of 8 bytes for each sample and class are held, a dozen of them. The chances agree with
    the share of wrong labels on average over data sets. For one data set they can be off: too high
    where the network is weak, too low where it memorises.

    Args:
        dynamics: visits of all samples.

    Raises:
        DataError: the logits have fewer than two classes.
    """
    if dynamics.n_classes < 2:
        raise DataError(f"{dynamics.n_classes} class: there is no other class to suggest")
    labels = dynamics.labels
    visits = visits_of(dynamics)
    weights = epoch_weights(visits, dynamics.n_classes)
    views, unmemorised = _views_of(dynamics, weights)
    model = fit(unmemorised, labels)
    score, suggested = log_odds(halfway(model), views.log_mean, labels)
    order = np.argsort(-score, kind="stable").astype(np.int64)
    level, _ = log_odds(model, unmemorised, labels)
    falling = np.sort(1 / (1 + np.exp(-level)))[::-1]
    if len(np.unique(labels)) < 2:
        falling = np.zeros(len(labels))
    chance = np.empty(len(labels))
    chance[order] = falling
    n_proposed = recommended_cut(falling)
    return Verdict(
        score=score,
        suggested=suggested,
        chance=chance,
        suggested_chance=chance * shares_of_suggested(halfway(model), views.log_mean, labels),
        order=order,
        n_proposed=n_proposed,
        n_cautious=cautious_cut(falling),
        n_wrong=number_wrong(falling),
        precision=float(falling[:n_proposed].mean()) if n_proposed else 0.0,
        evidence=Evidence(
            views.predictions, views.ridge, views.votes, weights, statistics_of(visits), model
        ),
        warnings=tuple(_warnings(dynamics, weights)),
    )


def _views_of(dynamics: Dynamics, weights: EpochWeights) -> tuple[_Views, F64]:
    """Views that order the labels; logarithms of the chances that the noise is fitted to."""
    p = predictions(dynamics, weights.weight)
    if dynamics.inputs is None and isinstance(dynamics.logits, TopLogits):
        alone = np.log(predictions(dynamics, weights.unmemorised))
        return _Views(p, None, None, np.log(p)), alone
    many = heaviest(weights.weight, _ORDERING)
    few = heaviest(weights.unmemorised, _FITTING)
    v, v_of_few = votes_over(dynamics, [many, few])
    r, r_of_few = (ridge_side_by_side(dynamics, chosen) for chosen in (many, few))
    return _Views(p, r, v, np.log((p + r + v) / 3)), np.log((r_of_few + v_of_few) / 2)


def _warnings(dynamics: Dynamics, weights: EpochWeights) -> list[str]:
    counts = np.bincount(dynamics.labels, minlength=dynamics.n_classes)
    found = []
    if dynamics.inputs is None:
        found.append(
            "inputs of the last layer were not recorded: the logits stand in for them"
            if isinstance(dynamics.logits, np.ndarray)
            else "neither inputs of the last layer nor all logits were recorded: only the "
            "network's own predictions are used"
        )
    learnt = float(weights.weight @ weights.learnt)
    if learnt < _HARDLY_LEARNT:
        found.append(
            f"the network has hardly learnt: of the samples with the lowest loss it predicts "
            f"{learnt:.0%} above chance; train longer"
        )
    if (counts > 0).sum() == 1:
        found.append("all labels are the same: nothing can be compared")
    elif dynamics.n_classes == 2 and counts.min() < _RARE * counts.sum():
        found.append(
            f"two classes, and the rarer one has {counts.min()} of {counts.sum()} samples: wrong "
            f"labels of one kind are hard to tell from samples that are hard to learn"
        )
    there = counts[counts > 0]
    scarce = int((there < _SCARCE).sum())
    if scarce:
        found.append(
            f"{scarce:,} of {len(there):,} classes have fewer than {_SCARCE} samples (the rarest "
            f"{there.min()}): there is little to compare their labels with"
        )
    elif dynamics.n_classes > 2 and there.min() < _UNEVEN * counts.sum() / len(there):
        found.append(
            f"classes are unbalanced: the rarest has {there.min():,} of {counts.sum():,} samples, "
            "and its labels look wrong sooner than those of the others"
        )
    if len(dynamics.labels) < _FEW * dynamics.n_classes:
        found.append(
            f"{len(dynamics.labels)} samples of {dynamics.n_classes} classes are too few to say "
            f"much"
        )
    return found
