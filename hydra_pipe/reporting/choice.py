"""The test samples that a report shows unless told which. Arrays in, arrays out."""

import numpy as np
from numpy.typing import NDArray

# Default numbers of test samples, and of the most harmful training samples on the wall.
SHOWN_TESTS, SHOWN_HARMFUL = 24, 60


def interesting(
    losses: NDArray[np.float64], wrong: NDArray[np.bool_] | None, count: int = SHOWN_TESTS
) -> NDArray[np.int64]:
    """Return the places of the test samples that tell most.

    Half of them are predicted wrongly, a quarter has a high loss, and a quarter is like the
    rest. If one kind has too few, the others make up for it.

    Args:
        losses: losses of the test samples, shape (test,).
        wrong: mask of the wrongly predicted ones, shape (test,). None if unknown.
        count: number of places.

    Returns:
        At most `count` places: wrong ones first, then the others, each by falling loss. Ties go
        to the smaller place.
    """
    by_loss = np.argsort(-losses, kind="stable")
    is_wrong = np.zeros(len(losses), bool) if wrong is None else wrong
    wrong_ones, right_ones = by_loss[is_wrong[by_loss]], by_loss[~is_wrong[by_loss]]
    n_wrong = min(len(wrong_ones), max(count // 2, count - len(right_ones)))
    n_right = min(len(right_ones), count - n_wrong)
    # Of the right ones, the first half has the highest losses. The second half is spread over
    # the rest.
    n_high = (n_right + 1) // 2
    others = right_ones[n_high:]
    spread = np.linspace(0, max(len(others) - 1, 0), n_right - n_high).round().astype(np.int64)
    return np.concatenate([wrong_ones[:n_wrong], right_ones[:n_high], others[spread]])
