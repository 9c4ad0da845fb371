"""Sentences on retrainings: intervals, and which treatment helps."""

import numpy as np
import pytest

from hydra_pipe.cleaning.effects import Measured, rows_of, says_of
from hydra_pipe.maths.rank_statistics import crossed_intervals

SEEDS, TESTS = 3, 400


def measured(**accuracies: float) -> Measured:
    """Made-up hits: each row hits a test if a number drawn for the test is below its accuracy."""
    drawn = np.random.default_rng(0).random((SEEDS, TESTS))
    values = {
        name: np.stack([drawn + (1 - accuracy), (drawn < accuracy).astype(float)], axis=1)
        for name, accuracy in accuracies.items()
    }
    controls = {name: f"{name}_random" for name in accuracies if f"{name}_random" in accuracies}
    return Measured(values, dict.fromkeys(values, 7), controls, "given")


def test_intervals_are_those_of_a_loop_over_the_same_draws() -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 11))
    rng = np.random.default_rng(0)
    seeds, tests = rng.integers(0, 3, (2000, 3)), rng.integers(0, 11, (2000, 11))
    for series, (low, high) in zip(values, crossed_intervals(values), strict=True):
        means = [series[s][:, t].mean() for s, t in zip(seeds, tests, strict=True)]
        np.testing.assert_allclose((low, high), np.quantile(means, (0.025, 0.975)), rtol=1e-12)


def test_a_treatment_that_is_better_than_given_and_than_random_helps() -> None:
    found = measured(given=0.5, drop=0.52, drop_random=0.4, relabel=0.8, relabel_random=0.5)
    says = says_of(found)
    accuracy, halves, loss, _ = says[1:]
    assert accuracy.startswith("accuracy: relabel helps most, +0.3")
    assert "also drop +0.0" in accuracy
    assert "measured on the other half, gains +0.3" in halves
    assert loss.startswith("loss: relabel helps most, -0.3")
    rows = {row["trained on"]: row for row in rows_of(found)}
    assert rows["given"]["accuracy_over_random"] is None
    drawn = found.values["relabel"][:, 1].mean() - found.values["relabel_random"][:, 1].mean()
    assert rows["relabel"]["accuracy_over_random"] == pytest.approx(drawn)
    assert rows["relabel"]["accuracy_change_low"] > 0.2


def test_a_treatment_that_random_draws_match_does_not_help() -> None:
    says = says_of(measured(given=0.5, drop=0.8, drop_random=0.8))
    assert says[1].startswith("accuracy: no treatment is shown to help; the most is drop +0.3")
    assert len(says) == 3, "nothing was chosen among one"


def test_harm_is_told() -> None:
    says = says_of(measured(given=0.8, drop=0.5, drop_random=0.5, relabel=0.8, relabel_random=0.8))
    assert "worse than training as given: drop -0.3" in says[1]


def test_without_classes_the_loss_decides_and_a_diverged_training_decides_nothing() -> None:
    found = measured(given=0.5, drop=0.8, drop_random=0.5)
    for values in found.values.values():
        values[:, 1] = np.nan
    assert says_of(found)[1].startswith("loss: drop helps most, -0.3")
    assert rows_of(found)[0]["accuracy"] is None
    found.values["drop"][0, 0] = np.inf
    assert "a training diverged" in says_of(found)[1]
    assert rows_of(found)[1]["loss"] is None
