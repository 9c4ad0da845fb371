"""A hundred random models and loops: rows that are right, or a refusal. Thousands: `python
tests/recording/random_models.py`.
"""

import numpy as np
import pytest
import random_models
from random_models import BAD, MIXING, RECORDED, Case, Outcome, case_of, run

SEEDS = range(100)
# of the cases in which samples do not meet, that are recorded
LEAST_RECORDED = 0.8


@pytest.fixture(scope="module")
def found() -> list[tuple[Case, Outcome]]:
    cases = [case_of(seed) for seed in SEEDS]
    return [(case, run(case)) for case in cases]


def test_no_random_model_is_recorded_wrongly_or_trained_otherwise(found):
    bad = [
        f"{outcome.verdict}: {case}: {outcome.why}"
        for case, outcome in found
        if outcome.verdict in BAD
    ]
    assert not bad, "\n" + "\n".join(bad)


def test_most_random_models_are_recorded(found):
    alone = [(case, outcome) for case, outcome in found if not MIXING & set(case.blocks)]
    refused = [
        f"{case}: {outcome.why}" for case, outcome in alone if outcome.verdict not in RECORDED
    ]
    assert len(refused) <= (1 - LEAST_RECORDED) * len(alone), "\n" + "\n".join(refused)


def test_rows_of_another_sample_are_found(monkeypatch):
    """The judge itself: the same case with two samples of the store in each other's place."""
    case = Case(0, ("linear",))
    assert run(case).verdict == "right"
    read = random_models.stored_rows

    def swapped(path, step):
        samples, rows = read(path, step)
        return (np.roll(samples, 1), rows)

    monkeypatch.setattr(random_models, "stored_rows", swapped)
    assert run(case).verdict == "wrong"
