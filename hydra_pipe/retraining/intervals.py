"""Means over test samples, with intervals that show how much other test samples might move them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.rank_statistics import bootstrap_interval

INTERVAL = (
    "mean over test samples; interval of 95 % by drawing as many test samples anew, 2,000 times "
    "(not the retrainings)"
)
ONE_TEST = (
    "there is only one test sample, or one mean: it does not show how others would come out, so "
    "no interval is given"
)


def with_interval(name: str, per_test: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean over test samples and its interval of 95 %, as columns of a table.

    Args:
        name: name of the column.
        per_test: values to average, shape (test,).

    Returns:
        `name`, `name_low` and `name_high`. The bounds are not a number if there is only one test
        sample.
    """
    low, high = bootstrap_interval(per_test) if len(per_test) > 1 else (np.nan, np.nan)
    return {name: float(per_test.mean()), f"{name}_low": low, f"{name}_high": high}
