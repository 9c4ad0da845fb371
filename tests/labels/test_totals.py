"""Statistics added up from rows, held against those of visits in memory."""

import numpy as np
import pytest

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import Visits, statistics_of, visits_of
from hydra_pipe.labels.totals import VisitTotals

EPOCHS, N, K = 5, 40, 6


def visits() -> Visits:
    """Visits of which some did not happen, and a sample that was never visited."""
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(EPOCHS, N, K)).astype(np.float32)
    z[rng.random((EPOCHS, N)) < 0.3] = np.nan
    z[:, 7] = np.nan
    return visits_of(Dynamics(rng.integers(0, K, N), z))


@pytest.mark.parametrize("height", [1, 7, EPOCHS * N])
def test_rows_in_any_order_and_blocks_of_any_height_give_the_same_statistics(height: int) -> None:
    seen = visits()
    steps, samples = np.nonzero(np.isfinite(seen.loss))
    order = np.random.default_rng(1).permutation(len(steps))
    steps, samples = steps[order], samples[order]
    totals = VisitTotals(N)
    blocks = [slice(first, first + height) for first in range(0, len(steps), height)]
    for rows in blocks:
        at = steps[rows], samples[rows]
        own = (values[at][None] for values in (seen.loss, seen.margin, seen.error, seen.hit))
        totals.add(samples[rows], steps[rows], Visits(*own))
    for rows in blocks:
        totals.add_order(samples[rows], steps[rows])
    found, expected = totals.statistics(slice(0, N)), statistics_of(seen)
    for name in ("mean_loss", "mean_margin", "mean_error", "wrong_epochs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    np.testing.assert_allclose(found.last_loss, expected.last_loss, rtol=1e-6)
    np.testing.assert_array_equal(totals.statistics(slice(5, 9)).mean_loss, found.mean_loss[5:9])
    np.testing.assert_allclose(found.variability, expected.variability, atol=1e-7)
    # the first epoch is counted over the visits that happened
    for sample, first in enumerate(found.first_learnt):
        hits = seen.hit[np.isfinite(seen.loss[:, sample]), sample]
        assert first == (hits.argmax() if hits.any() else -1)


def test_kept_logits_give_the_numbers_that_the_spread_ones_give() -> None:
    rng = np.random.default_rng(0)
    z, labels = 3 * rng.normal(size=(2, N, 90)), rng.integers(0, 90, N)
    classes = np.argsort(-z, axis=2)[..., :8]
    largest = np.take_along_axis(z, classes, axis=2)
    own = np.take_along_axis(z, labels[None, :, None], axis=2)[..., 0]
    top = TopLogits(own, largest, classes, np.log(np.exp(z).sum(axis=2)), 90)
    dynamics = Dynamics(labels, top)
    found = visits_of(dynamics)
    for epoch in range(2):
        log_p = dynamics.centred(epoch)
        p, others = np.exp(log_p), log_p.copy()
        others[np.arange(N), labels] = -np.inf
        target = np.eye(90)[labels]
        np.testing.assert_allclose(found.loss[epoch], -log_p[np.arange(N), labels])
        margin = log_p[np.arange(N), labels] - others.max(axis=1)
        np.testing.assert_allclose(found.margin[epoch], margin, atol=1e-12)
        np.testing.assert_allclose(found.error[epoch], np.linalg.norm(p - target, axis=1))
