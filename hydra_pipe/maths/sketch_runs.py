"""Runs into which a sketch cuts a row. Integers only: the layout is chosen without torch."""

import math

LONGEST_RUN = 16


def run_length(numel: int, columns: int) -> int:
    """Return the number of neighbours that a sketch puts in order together.

    It is the largest number up to `LONGEST_RUN` that divides the row, is coprime to the columns and
    leaves four runs or more for each column. Then the chance that two coordinates meet is 1.02 /
    columns at most.
    """
    lengths = (
        r
        for r in range(LONGEST_RUN, 1, -1)
        if numel % r == 0 and math.gcd(r, columns) == 1 and numel >= 4 * r * columns
    )
    return next(lengths, 1)
