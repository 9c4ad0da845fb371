"""Which test samples a report shows where nobody says which. Arrays in, arrays out."""

import numpy as np
from numpy.typing import NDArray

# test samples, and training samples on the wall, unless asked for others
SHOWN_TESTS, SHOWN_HARMFUL = 24, 60


def interesting(losses: NDArray[np.float64], wrong: NDArray[np.bool_] | None, count: int = SHOWN_TESTS) -> NDArray[np.int64]:
    """Places of the test samples that tell most: half of them predicted wrongly, a quarter of high loss, a quarter like the rest.

    Where one kind has too few, the others make up for it.

    Args:
        losses: of the test samples, shape (test,).
        wrong: which were predicted wrongly, shape (test,); None: not known.
        count: how many.

    Returns:
        At most `count` places: wrong ones first, then the others, each by falling loss; ties go to the smaller place.
    """
    by_loss = np.argsort(-losses, kind="stable")
    is_wrong = np.zeros(len(losses), bool) if wrong is None else wrong
    wrong_ones, right_ones = by_loss[is_wrong[by_loss]], by_loss[~is_wrong[by_loss]]
    n_wrong = min(len(wrong_ones), max(count // 2, count - len(right_ones)))
    n_right = min(len(right_ones), count - n_wrong)
    # of those that are right the first half by loss, then as many spread over all the others
    n_high = (n_right + 1) // 2
    others = right_ones[n_high:]
    spread = np.linspace(0, max(len(others) - 1, 0), n_right - n_high).round().astype(np.int64)
    return np.concatenate([wrong_ones[:n_wrong], right_ones[:n_high], others[spread]])
