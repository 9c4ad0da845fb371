"""Training samples that the test samples cannot judge: one test only, or none with their label."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.store.data.reduced_run import ReducedRun

# Least number of test samples that can judge training samples.
FEWEST_TESTS = 2
# Most labels that a line names.
_LISTED = 5


def unjudged(found: ReducedRun, labels: NDArray[Any] | None) -> tuple[NDArray[np.bool_], list[str]]:
    """Return the training samples that the test samples cannot judge, and the reasons.

    Returns:
        A mask of shape (sample,), and lines for a person.
    """
    n_samples, n_tests = found.samples.n_samples, found.columns.n_tests
    asked = "unless --lowest or --threshold asks for them"
    if n_tests < FEWEST_TESTS:
        return np.ones(n_samples, bool), [
            "there is only one test sample. Relevance to one sample says little about wrong "
            f"labels, so no sample is proposed {asked}; record with more test samples"
        ]
    of_tests = found.samples.test_labels()
    if labels is None or of_tests is None or (labels.dtype == object) != (of_tests.dtype == object):
        return np.zeros(n_samples, bool), []
    lacking = np.setdiff1d(labels, of_tests[found.columns.test_ids])
    of_lacking = np.isin(labels, lacking)
    # If every sample lacks tests, the labels of tests are of another kind.
    if not len(lacking) or of_lacking.all():
        return np.zeros(n_samples, bool), []
    listed = ", ".join(map(str, lacking[:_LISTED])) + (" ..." if len(lacking) > _LISTED else "")
    n = int(of_lacking.sum())
    return of_lacking, [
        f"no test sample has the label {listed}, so nothing is known of the {n:,} training "
        f"samples with such a label. None of them is proposed {asked}; record test samples of "
        "every label"
    ]
