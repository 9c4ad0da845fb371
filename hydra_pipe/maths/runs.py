"""How a sketch cuts a row into runs. Integers only: the layout is chosen without torch."""

import math

LONGEST_RUN = 16


def run_length(numel: int, columns: int) -> int:
    """Neighbours that are put in order together: the most, up to `LONGEST_RUN`, that divide the row, are coprime to the columns and
    leave four runs or more for each column: then the chance that two coordinates meet is 1.02 / columns at most.
    """
    lengths = (r for r in range(LONGEST_RUN, 1, -1) if numel % r == 0 and math.gcd(r, columns) == 1 and numel >= 4 * r * columns)
    return next(lengths, 1)
