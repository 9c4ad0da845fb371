"""Plan of a sweep in a basis: that of a sweep of few features, and what the basis takes beside it.

First one task finds the basis from some rows and test gradients. Then each worker holds the basis,
the parts of its test gradients, and the products of a step's rows with them in each shell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from hydra_pipe.errors import BudgetError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.costs import suggested
from hydra_pipe.plan.records import common_bytes
from hydra_pipe.plan.sweep import SweepInput, SweepPlan, plan_sweep
from hydra_pipe.units import format_bytes

# Columns of the core times rows, where the user gives no rank: fewer rows leave time for more
# columns, and long trainings on little data need them (docs/methods.md).
_COLUMNS_TIMES_ROWS = 2**26
_LEAST_RANK, _MOST_RANK, _RANK_MULTIPLE = 512, 16384, 256
# Columns of each box, over those of the core. Two shells more than one gain where rows have much
# outside of the core (docs/methods.md).
BOXES = (1, 4, 16)
# With more series than this each has one shell: shells of all series act on each other.
_MOST_SERIES = 4
# Numbers of rows and of test gradients that the basis is found from.
BASIS_ROWS, BASIS_TESTS = 1024, 512


def default_rank(n_rows: int, width: int) -> int | None:
    """Return the number of columns of the core where the user gives none.

    Args:
        n_rows: number of rows of the recording.
        width: number of features, with factored blocks multiplied out.

    Returns:
        The number, or None if a basis would save less than half of the columns.
    """
    wanted = _COLUMNS_TIMES_ROWS // max(1, n_rows) // _RANK_MULTIPLE * _RANK_MULTIPLE
    rank = min(max(wanted, _LEAST_RANK), _MOST_RANK)
    return None if width <= 2 * rank else rank


def boxes_of(n_series: int) -> tuple[int, ...]:
    """Return the columns of each box, over those of the core."""
    return BOXES if n_series <= _MOST_SERIES else BOXES[:1]


@dataclass(frozen=True, kw_only=True)
class BasisInput(SweepInput):
    """Sizes and budget of a sweep in a basis. `width` is the number of columns of the core.

    Args:
        sides: number of columns of each side of each part of a row.
        n_series: number of series.
    """

    sides: tuple[tuple[int, ...], ...]
    n_series: int

    @property
    def n_shells(self) -> int:
        """Number of shells of all series."""
        return self.n_series * len(boxes_of(self.n_series))

    @property
    def side_values(self) -> int:
        """Number of values of all sides of a row."""
        return sum(map(sum, self.sides))

    @property
    def directions(self) -> tuple[tuple[int, ...], ...]:
        """Upper bounds of the directions of each side of each part."""
        largest = boxes_of(self.n_series)[-1] * self.width
        most = BASIS_ROWS + BASIS_TESTS
        return tuple(
            tuple(min(side, most, self.width if len(sides) == 1 else largest) for side in sides)
            for sides in self.sides
        )

    def beside_bytes(self, columns: int) -> int:
        """See `SweepInput`."""
        given, along = self.recording, sum(map(sum, self.directions))
        tests = given.n_tests if given.grouped else columns
        # Parts as decoded, multiplied by D, and along the directions, of the tests and of a step.
        held = (tests * (3 * self.side_values + along)) * 4
        step = self.most_rows * (self.side_values + 2 * along) * 4
        # Products in each shell, those of the box inside, and both once more on their way.
        scores = (4 * self.n_shells + 4) * self.most_rows * tests * 4
        shells = tests * self.n_shells * (3 * self.n_shells + 4 * len(FORMS)) * 4
        return held + step + scores + shells + basis_bytes(self)

    def beside_operations(self, columns: int, blocks: int) -> int:
        """See `SweepInput`."""
        given = self.recording
        tests = given.n_tests if given.grouped else columns
        n_boxes = len(boxes_of(self.n_series)) + 1
        turned = sum(
            2 * side * own
            for sides, directions in zip(self.sides, self.directions, strict=True)
            for side, own in zip(sides, directions, strict=True)
        )
        shells = 2 * self.n_shells * (1 + len(FORMS) * self.n_shells)
        return given.n_rows * (blocks * turned + tests * (2 * n_boxes * self.side_values + shells))


@dataclass(frozen=True, kw_only=True)
class BasisSweepPlan(SweepPlan):
    """Plan of a sweep in a basis.

    Args:
        rank: number of columns of the core.
        basis_bytes: upper bound of the bytes of the basis.
    """

    rank: int
    basis_bytes: int

    @property
    def tasks(self) -> int:
        return super().tasks + 1


def plan_basis_sweep(what: BasisInput, done: int = 0) -> BasisSweepPlan:
    """Return the plan that takes least time of the plans that fit the budget.

    Args:
        what: sizes and budget.
        done: number of first columns that are done.

    Raises:
        BudgetError: not even one column fits, or the basis does not.
    """
    given = what.recording
    plan, finding = plan_sweep(what, done), finding_peak_bytes(what)
    if finding > given.memory_bytes:
        raise BudgetError(
            f"finding the basis of a sweep needs {format_bytes(finding)}, --memory is "
            f"{format_bytes(given.memory_bytes)}: raise --memory to {suggested(finding)}"
        )
    return BasisSweepPlan(
        **vars(replace(plan, peak_bytes=max(plan.peak_bytes, finding))),
        rank=what.width,
        basis_bytes=basis_bytes(what),
    )


def basis_bytes(what: BasisInput) -> int:
    """Return an upper bound of the bytes of the directions of a basis."""
    return 4 * sum(
        map(prod, zip(_joined(what.sides), _joined(what.directions), strict=True)),
    )


def _joined(of_parts: Sequence[Sequence[int]]) -> list[int]:
    return [of_side for part in of_parts for of_side in part]


def finding_peak_bytes(what: BasisInput) -> int:
    """Return an upper bound of the memory of a process that finds a basis."""
    given = what.recording
    n = min(given.n_rows, BASIS_ROWS) + min(given.n_tests, BASIS_TESTS)
    # As stored, decoded, and times D^(1/2).
    stored = given.n_features * max(given.item_bytes, given.test_item_bytes) + given.n_blocks * 4
    read = n * (stored + 2 * what.side_values * 4)
    # A side as long as its part, the product of the smaller side, its vectors, the directions of
    # all sides, and those of the largest one on their way.
    widest = max(_joined(what.sides), default=0)
    smaller = min(n, widest)
    solving = (2 * n * widest + 6 * smaller**2 + 3 * widest * smaller) * 4
    found = 4 * sum(side * min(side, n) for side in _joined(what.sides))
    return common_bytes(given, 0) + read + solving + found
