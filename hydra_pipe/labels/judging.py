"""The verdict: labels that look wrong, and the labels that they should have."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hydra_pipe.errors import DataError
from hydra_pipe.labels.cut import Estimate, cautious_cut, number_wrong, recommended_cut
from hydra_pipe.labels.dynamics import Dynamics, Samples, TopLogits, blocks_of
from hydra_pipe.labels.epochs import (
    EpochWeights,
    Statistics,
    Visits,
    epoch_weights,
    statistics_of,
    visits_of,
)
from hydra_pipe.labels.transition import (
    Model,
    fit,
    fitted_samples,
    halfway,
    log_odds,
    shares_of_suggested,
)
from hydra_pipe.labels.views import RidgeSideBySide, VotesOver, heaviest, predictions
from hydra_pipe.types import F64, I64
from hydra_pipe.units import format_bytes

# Epochs whose inputs order the labels, and epochs that the noise is fitted to.
_ORDERING, _FITTING = 5, 2
# Below this share of trusted samples predicted right, above chance, little has been learnt.
_HARDLY_LEARNT = 0.5
# Pairs of sample and class whose views are kept rather than made again: 4 numbers of 8 bytes each.
_KEPT = 1 << 23
# Most bytes that a fit may take, and matrices of pairs of classes in it.
_MOST_BYTES, _MATRICES = 4 * 2**30, 5
# A class of two with less than this share is rare.
_RARE = 1 / 3
# Fewer samples for each class say little.
_FEW = 20
# A class with fewer samples, or with less than this share of an even one, is hardly compared.
_SCARCE, _UNEVEN = 10, 0.1


@dataclass(frozen=True)
class View:
    """Chances of two classes by one view of each sample.

    Attributes:
        given: chance of the given label, shape (sample,).
        suggested: chance of the suggested label, shape (sample,).
    """

    given: F64
    suggested: F64


@dataclass(frozen=True)
class Evidence:
    """Chances and numbers that a verdict rests on.

    Attributes:
        predictions: P.
        ridge: R. None without inputs of the last layer and with few logits.
        votes: V, as R.
        weights: epochs that the views listened to.
        statistics: numbers of each sample's visits.
        model: how wrong labels came about.
    """

    predictions: View
    ridge: View | None
    votes: View | None
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
class _Block:
    """Views of some samples.

    Attributes:
        ordering: P, or P, R and V, which order the labels, each of shape (sample, class).
        fitted: chances that the noise is fitted to, shape (sample, class).
    """

    ordering: list[F64]
    fitted: F64


class _Views:
    """Views of all samples, block by block.

    Args:
        dynamics: visits.
        weights: weights of the epochs.
    """

    def __init__(self, dynamics: Dynamics, weights: EpochWeights) -> None:
        self._dynamics, self._weights = dynamics, weights
        self._ridges: tuple[RidgeSideBySide, RidgeSideBySide] | None = None
        self._votes: VotesOver | None = None
        self._kept: dict[int, _Block] = {}
        if dynamics.inputs is not None or not isinstance(dynamics.logits, TopLogits):
            many = heaviest(weights.weight, _ORDERING)
            few = heaviest(weights.unmemorised, _FITTING)
            self._votes = VotesOver(dynamics, [many, few])
            self._ridges = RidgeSideBySide(dynamics, many), RidgeSideBySide(dynamics, few)

    def of(self, samples: Samples) -> _Block:
        """Return the views of some samples."""
        p = predictions(self._dynamics, self._weights.weight, samples)
        if self._votes is None or self._ridges is None:
            return _Block([p], predictions(self._dynamics, self._weights.unmemorised, samples))
        v, v_of_few = self._votes.chances(samples)
        r, r_of_few = (ridge.chances(samples) for ridge in self._ridges)
        return _Block([p, r, v], (r_of_few + v_of_few) / 2)

    def blocks(self) -> Iterator[tuple[slice, _Block]]:
        """Yield the views of all samples. Few chances are kept for the next call."""
        n, k = len(self._dynamics.labels), self._dynamics.n_classes
        for block in blocks_of(n, k):
            found = self._kept.get(block.start)
            if found is None:
                found = self.of(block)
                if n * k <= _KEPT:
                    self._kept[block.start] = found
            yield block, found

    def fitted(self) -> tuple[F64, I64]:
        """Return the chances that the noise is fitted to, of the samples that the fit takes.

        Returns:
            Logarithms of the chances, shape (fitted, class); the samples, shape (fitted,).
        """
        n, k = len(self._dynamics.labels), self._dynamics.n_classes
        samples = fitted_samples(n)
        found = np.empty((len(samples), k))
        if len(samples) == n:
            for block, views in self.blocks():
                found[block] = views.fitted
        else:
            for block in blocks_of(len(samples), k):
                found[block] = self.of(samples[block]).fitted
        return np.log(found, out=found), samples


@dataclass(frozen=True)
class _Judged:
    """Numbers of each sample, filled block by block.

    Attributes:
        score: log-odds that order the labels, shape (sample,).
        level: log-odds that say how many are wrong, shape (sample,).
        suggested: likeliest other class, shape (sample,).
        share: share of the suggested class in the chances of all other classes, shape (sample,).
        chances: chance of the given and of the suggested label by each view, shape (view, 2,
            sample).
    """

    score: F64
    level: F64
    suggested: I64
    share: F64
    chances: F64


def _judged(dynamics: Dynamics, views: _Views, model: Model) -> _Judged:
    n = len(dynamics.labels)
    found = _Judged(
        np.empty(n), np.empty(n), np.empty(n, np.int64), np.empty(n), np.full((3, 2, n), np.nan)
    )
    for block, seen in views.blocks():
        labels = dynamics.labels[block]
        mean = np.log(sum(seen.ordering) / len(seen.ordering))
        score, suggested = log_odds(halfway(model), mean, labels)
        found.score[block], found.suggested[block] = score, suggested
        found.share[block] = shares_of_suggested(halfway(model), mean, labels)
        found.level[block] = log_odds(model, np.log(seen.fitted), labels)[0]
        rows = np.arange(len(labels))
        for number, view in enumerate(seen.ordering):
            found.chances[number, :, block] = view[rows, labels], view[rows, suggested]
    return found


def judge(dynamics: Dynamics) -> Verdict:
    """Find labels that look wrong from what a network thought of them while it trained.

    Three views of each sample (`views`) are averaged over the epochs that have learnt and have not
    yet memorised (`epochs`). A model of the noise (`transition`) turns the mean of the views into
    log-odds, which order the labels. The model is fitted to the views of the few epochs that have
    memorised least, without the network's own predictions. The chances of these views say how many
    labels are wrong, and how many to propose (`cut`). No true label is needed.

    Chances of all classes are held for 2 million pairs of sample and class at once, and for the
    samples that the model is fitted to. For each sample some 200 numbers are held. The chances
    agree with the share of wrong labels on average over data sets. For one data set they can be
    off: too high where the network is weak, too low where it memorises.

    Args:
        dynamics: visits of all samples.

    Raises:
        DataError: the logits have fewer than two classes, or too many to hold their transition
            matrix.
    """
    if dynamics.n_classes < 2:
        raise DataError(f"{dynamics.n_classes} class: there is no other class to suggest")
    labels = dynamics.labels
    _check_room(len(labels), dynamics.n_classes)
    visits = visits_of(dynamics)
    weights = epoch_weights(visits, dynamics.n_classes)
    views = _Views(dynamics, weights)
    log_q, fitted = views.fitted()
    model = fit(log_q, labels[fitted])
    del log_q
    judged = _judged(dynamics, views, model)
    order = np.argsort(-judged.score, kind="stable").astype(np.int64)
    falling = np.sort(1 / (1 + np.exp(-judged.level)))[::-1]
    if len(np.unique(labels)) < 2:
        falling = np.zeros(len(labels))
    chance = np.empty(len(labels))
    chance[order] = falling
    n_proposed = recommended_cut(falling)
    return Verdict(
        score=judged.score,
        suggested=judged.suggested,
        chance=chance,
        suggested_chance=chance * judged.share,
        order=order,
        n_proposed=n_proposed,
        n_cautious=cautious_cut(falling),
        n_wrong=number_wrong(falling),
        precision=float(falling[:n_proposed].mean()) if n_proposed else 0.0,
        evidence=_evidence(judged, visits, weights, model),
        warnings=tuple(_warnings(dynamics, weights)),
    )


def _check_room(n_samples: int, n_classes: int) -> None:
    """Refuse classes whose fit does not fit into memory. Raises: DataError."""
    fitted = len(fitted_samples(n_samples)) * n_classes
    needed = 8 * (fitted + _MATRICES * n_classes**2)
    if needed > _MOST_BYTES:
        raise DataError(
            f"labels of {n_classes:,} classes need {format_bytes(needed)} to be judged by what the "
            f"network thought of them, at most {format_bytes(_MOST_BYTES)} are taken: reduce, and "
            "give --method hydra to judge by relevance"
        )


def _evidence(judged: _Judged, visits: Visits, weights: EpochWeights, model: Model) -> Evidence:
    p, r, v = (View(*chances) for chances in judged.chances)
    has_inputs = bool(np.isfinite(r.given).any())
    statistics = statistics_of(visits)
    return Evidence(
        p, r if has_inputs else None, v if has_inputs else None, weights, statistics, model
    )


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
