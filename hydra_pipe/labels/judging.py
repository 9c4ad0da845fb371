"""The verdict: labels that look wrong, and the labels that they should have."""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.errors import DataError
from hydra_pipe.labels.cut import cautious_cut, expected_f1_cut
from hydra_pipe.labels.dynamics import Dynamics
from hydra_pipe.labels.epochs import (
    EpochWeights,
    Statistics,
    epoch_weights,
    statistics_of,
    visits_of,
)
from hydra_pipe.labels.transition import Model, fit, log_odds
from hydra_pipe.labels.views import predictions, ridge_and_votes
from hydra_pipe.types import F64, I64

# Below this share of trusted samples predicted right, above chance, little has been learnt.
_HARDLY_LEARNT = 0.5
# A class of two with less than this share is rare.
_RARE = 1 / 3
# Fewer samples for each class say little.
_FEW = 20


@dataclass(frozen=True)
class Evidence:
    """Chances and numbers that a verdict rests on.

    Attributes:
        predictions: P, shape (sample, class).
        ridge: R, shape (sample, class). None without inputs of the last layer.
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
        posterior: 1 / (1 + exp(-score)), shape (sample,). A score, and no calibrated chance.
        order: samples by falling score, int64, shape (sample,).
        n_proposed: how many of `order` are proposed by the recommended cut.
        n_cautious: how many are likelier wrong than right.
        evidence: what the verdict rests on.
        warnings: reasons not to trust the verdict, one sentence each.
    """

    score: F64
    suggested: I64
    posterior: F64
    order: I64
    n_proposed: int
    n_cautious: int
    evidence: Evidence
    warnings: tuple[str, ...]

    @property
    def proposed(self) -> I64:
        """Samples whose labels look wrong, the most suspicious first."""
        return self.order[: self.n_proposed]


def judge(dynamics: Dynamics) -> Verdict:
    """Find labels that look wrong from what a network thought of them while it trained.

    Three views of each sample (`views`) are averaged over the epochs that have learnt and not yet
    memorised (`epochs`). A model of the noise (`transition`) turns the mean of the views into
    log-odds. The cut maximises the expected F1 (`cut`). No true label is needed.

    Args:
        dynamics: visits of all samples.

    Raises:
        DataError: the logits have fewer than two classes.
    """
    if dynamics.n_classes < 2:
        raise DataError(f"{dynamics.n_classes} class: there is no other class to suggest")
    visits = visits_of(dynamics)
    weights = epoch_weights(visits, dynamics.n_classes)
    p = predictions(dynamics, weights.weight)
    others = ridge_and_votes(dynamics, weights.weight)
    r, v = (None, None) if others is None else others
    mean = p if r is None or v is None else (p + r + v) / 3
    log_q = np.log(mean)
    model = fit(log_q, dynamics.labels)
    score, suggested = log_odds(model, log_q, dynamics.labels)
    posterior = 1 / (1 + np.exp(-score))
    comparable = len(np.unique(dynamics.labels)) > 1
    return Verdict(
        score=score,
        suggested=suggested,
        posterior=posterior,
        order=np.argsort(-score, kind="stable").astype(np.int64),
        n_proposed=expected_f1_cut(posterior) if comparable else 0,
        n_cautious=cautious_cut(posterior) if comparable else 0,
        evidence=Evidence(p, r, v, weights, statistics_of(visits), model),
        warnings=tuple(_warnings(dynamics, weights)),
    )


def _warnings(dynamics: Dynamics, weights: EpochWeights) -> list[str]:
    counts = np.bincount(dynamics.labels, minlength=dynamics.n_classes)
    found = []
    if dynamics.inputs is None:
        found.append(
            "inputs of the last layer were not recorded: only the network's own predictions "
            "are used"
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
    if len(dynamics.labels) < _FEW * dynamics.n_classes:
        found.append(
            f"{len(dynamics.labels)} samples of {dynamics.n_classes} classes are too few to say "
            f"much"
        )
    return found
