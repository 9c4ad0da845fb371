"""Statistics of each sample's visits, and which epochs to listen to.

An epoch is worth listening to if the network has learnt, and has not yet memorised wrong labels.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from hydra_pipe.labels.dynamics import DEEPEST, Dynamics, TopLogits, blocks_of
from hydra_pipe.types import F64, I64, Bools

# Share of the trusted samples that the network predicts right when it has learnt.
_LEARNT = 0.95


@dataclass(frozen=True)
class Visits:
    """One number for each visit. A visit that did not happen is not a number.

    Attributes:
        loss: cross-entropy of the given label, shape (epoch, sample).
        margin: logit of the given label less the largest other one, shape (epoch, sample).
        error: length of the difference between probabilities and the given label (EL2N), shape
            (epoch, sample).
        hit: 1 if the given label is predicted, else 0, shape (epoch, sample).
    """

    loss: F64
    margin: F64
    error: F64
    hit: F64


@dataclass(frozen=True)
class Statistics:
    """One number for each sample, from all its visits. Not a number without a visit.

    Attributes:
        mean_loss: mean of the losses, shape (sample,).
        last_loss: loss at the last visit, shape (sample,).
        mean_margin: mean of the margins (area under the margin, AUM), shape (sample,).
        mean_error: mean of EL2N, shape (sample,).
        variability: standard deviation of the label's probability, shape (sample,).
        wrong_epochs: number of visits at which another class was predicted, shape (sample,).
        first_learnt: first epoch that predicted the label, or -1, int64, shape (sample,).
    """

    mean_loss: F64
    last_loss: F64
    mean_margin: F64
    mean_error: F64
    variability: F64
    wrong_epochs: F64
    first_learnt: I64


def visits_of(dynamics: Dynamics) -> Visits:
    """Return loss, margin, EL2N and hit of each visit."""
    shape = (dynamics.n_epochs, len(dynamics.labels))
    loss, margin, error = (np.full(shape, np.nan) for _ in range(3))
    top = dynamics.logits if isinstance(dynamics.logits, TopLogits) else None
    n_numbers = dynamics.n_classes if top is None else top.largest.shape[2]
    for epoch, samples in product(range(shape[0]), blocks_of(shape[1], n_numbers)):
        labels = dynamics.labels[samples]
        if top is None:
            found = _of_all(dynamics.centred(epoch, samples), labels)
        else:
            found = _of_kept(top, labels, epoch, samples)
        loss[epoch, samples], margin[epoch, samples], error[epoch, samples] = found
    hit = np.where(np.isfinite(margin), margin > 0, np.nan)
    return Visits(loss, margin, error, hit)


def _of_all(log_p: F64, labels: I64) -> tuple[F64, F64, F64]:
    """Return loss, margin and EL2N from the log-probabilities of all classes."""
    rows = np.arange(len(labels))
    own = log_p[rows, labels]
    p = np.exp(log_p)
    squared = (p**2).sum(axis=1) - p[rows, labels] ** 2
    error = np.sqrt(squared + (1 - p[rows, labels]) ** 2)
    log_p[rows, labels] = -np.inf
    return -own, own - log_p.max(axis=1), error


def _of_kept(top: TopLogits, labels: I64, epoch: int, samples: slice) -> tuple[F64, F64, F64]:
    """Return the same from the logits that are kept. The other classes share the rest evenly."""
    total = top.log_sum[epoch, samples].astype(np.float64)
    others = top.largest[epoch, samples] - total[:, None]
    others[top.classes[epoch, samples] == labels[:, None]] = -np.inf
    own = top.own[epoch, samples] - total
    is_kept = ~np.isnan(own)
    mass = np.exp(np.where(is_kept, own, -np.inf)) + np.exp(others).sum(axis=1)
    n_left = top.n_classes - np.isfinite(others).sum(axis=1) - is_kept
    share = np.maximum(np.maximum(1 - mass, 0) / np.maximum(n_left, 1), np.exp(DEEPEST))
    scale = np.log(mass + share * n_left)
    log_share = np.log(share) - scale
    own, others = np.where(is_kept, own - scale, log_share), others - scale[:, None]
    n_rest = n_left - ~is_kept
    squared = np.exp(2 * others).sum(axis=1) + n_rest * np.exp(2 * log_share)
    largest = np.maximum(others.max(axis=1), np.where(n_rest > 0, log_share, -np.inf))
    return -own, own - largest, np.sqrt(squared + (1 - np.exp(own)) ** 2)


def mean_over_visits(values: F64, weights: F64 | None = None) -> F64:
    """Return each sample's weighted mean over the visits that happened.

    A sample whose visits have no weight has their plain mean.

    Args:
        values: one number for each visit, shape (epoch, sample).
        weights: weight of each epoch, shape (epoch,). None: all alike.

    Returns:
        Shape (sample,). Not a number without a visit.
    """
    happened = np.isfinite(values)
    filled = np.where(happened, values, 0.0)
    w = np.ones(len(values)) if weights is None else weights
    total = w @ happened
    count = happened.sum(axis=0)
    plain = np.divide(filled.sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0)
    found: F64 = np.divide(w @ filled, total, out=plain, where=total > 0)
    return found


def statistics_of(visits: Visits) -> Statistics:
    """Return what is known of each sample from its visits."""
    happened = np.isfinite(visits.loss)
    probability = np.exp(-visits.loss)
    mean_p = mean_over_visits(probability)
    spread = mean_over_visits((probability - mean_p) ** 2)
    last = len(visits.loss) - 1 - happened[::-1].argmax(axis=0)
    hits = visits.hit == 1
    wrong = np.where(happened.any(axis=0), (visits.hit == 0).sum(axis=0), np.nan)
    return Statistics(
        mean_loss=mean_over_visits(visits.loss),
        last_loss=np.take_along_axis(visits.loss, last[None], axis=0)[0],
        mean_margin=mean_over_visits(visits.margin),
        mean_error=mean_over_visits(visits.error),
        variability=np.sqrt(spread),
        wrong_epochs=wrong,
        first_learnt=np.where(hits.any(axis=0), hits.argmax(axis=0), -1),
    )


@dataclass(frozen=True)
class EpochWeights:
    """Weight of each epoch.

    Attributes:
        learnt: share of the trusted samples predicted right, above chance, in [0, 1], shape
            (epoch,).
        memorised: share of the samples that were predicted wrong when the network had learnt, and
            are predicted right by now, shape (epoch,).
        weight: weight of each epoch in the order of the labels, sum 1, shape (epoch,).
        unmemorised: weight of each epoch in the fit of the noise, sum 1, shape (epoch,).
    """

    learnt: F64
    memorised: F64
    weight: F64
    unmemorised: F64


def epoch_weights(visits: Visits, n_classes: int) -> EpochWeights:
    """Weigh epochs by what the network has learnt and has not yet memorised.

    The trusted samples are the half with the lowest mean loss; then, once more, the half with the
    lowest weighted mean loss.

        learnt_e = max(0, (share of trusted samples hit at e - 1/K) / (1 - 1/K))
        e* = the first epoch with that share of at least 0.95, else the one with the largest
        memorised_e = share hit at e of the samples missed at e* - 1 and e*; 0 up to e*
        weight_e ~ learnt_e^2 (1 - memorised_e)^2
        unmemorised_e ~ learnt_e^8 (1 - memorised_e)^16

    The order of the labels gains from many epochs. Their noise is underestimated by epochs that
    know wrong labels already, and overestimated by epochs that know little: few epochs tell it.

    Args:
        visits: shape (epoch, sample).
        n_classes: number of classes.
    """
    found = _weights(visits, mean_over_visits(visits.loss), n_classes)
    return _weights(visits, mean_over_visits(visits.loss, found.weight), n_classes)


def _weights(visits: Visits, loss: F64, n_classes: int) -> EpochWeights:
    trusted = loss <= np.nanmedian(loss) if np.isfinite(loss).any() else np.ones(len(loss), bool)
    share = _shares(visits.hit, trusted)
    learnt = np.maximum(0.0, (share - 1 / n_classes) / max(1 - 1 / n_classes, 1e-9))
    enough = share >= _LEARNT
    turn = int(enough.argmax()) if enough.any() else int(share.argmax())
    missed = (visits.hit[max(turn - 1, 0) : turn + 1] == 0).all(axis=0)
    memorised = _shares(visits.hit, missed)
    memorised[: turn + 1] = 0.0
    weight = _shared(learnt**2 * (1 - memorised) ** 2)
    unmemorised = _shared(learnt**8 * (1 - memorised) ** 16)
    return EpochWeights(learnt, memorised, weight, unmemorised)


def _shared(weights: F64) -> F64:
    """Weights that sum to 1; even ones if all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


def _shares(hit: F64, chosen: Bools) -> F64:
    """Share of the chosen samples hit at each epoch; 0 without a visit. Shape (epoch,)."""
    own = hit[:, chosen]
    happened = np.isfinite(own).sum(axis=1)
    return np.asarray(np.nansum(own, axis=1) / np.maximum(happened, 1))
