"""Steps of a row buffer while they are checked: what waits, what the host knows, what is good."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import GradientMismatchError, NonFiniteError
from hydra_pipe.maths.gradient_check import Balance
from hydra_pipe.store import names
from hydra_pipe.types import Floating

# Smallest difference between rows and gradient that rounding cannot explain, relative to the summed
# norms of the rows.
IMBALANCE_LIMIT = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

# Limits for float32 when the loop lets matrix products have fewer bits: those of TF32
# (set_float32_matmul_precision("high"), or allow_tf32) or of bfloat16 ("medium"). Rows and
# gradients are then rounded differently.
_FLOAT32_LIMIT = {"highest": IMBALANCE_LIMIT[torch.float32], "high": 1e-3, "medium": 1e-2}


def imbalance_limit(dtype: torch.dtype) -> float:
    """Return the limit for gradients of `dtype`, at the loop's precision of matrix products."""
    if dtype != torch.float32:
        return IMBALANCE_LIMIT[dtype]
    try:
        return _FLOAT32_LIMIT[torch.get_float32_matmul_precision()]
    except RuntimeError:
        # set by torch's newer options: some product has fewer bits, and the old getter raises
        return _FLOAT32_LIMIT["high"]


@dataclass(frozen=True)
class Entry:
    """One step of a row buffer.

    Args:
        rows: place of the step's rows.
        columns: further columns of each row, by name, each of shape (batch,).
        when: moment in words, such as "at step 3".
        limit: limit for the imbalance of the step's books.
        present: True for each block that got a gradient, shape (block,).
        norms: known upper bounds of summed norms, by block.
    """

    rows: slice
    columns: Mapping[str, NDArray[np.generic]]
    when: str
    limit: float
    present: NDArray[np.bool_]
    norms: Mapping[int, Tensor]


@dataclass(frozen=True)
class OnHost:
    """The values that a check needs, on the host.

    Args:
        largest: largest magnitude in each row of each part, shape (row, part).
        sums, actual: both sides of the gradient's check, shape (step, column).
        norms: known norms, in the order of the steps and of their blocks; None if there are none.
    """

    largest: Floating
    sums: Floating
    actual: Floating
    norms: Floating | None = None


@dataclass(frozen=True)
class Finite:
    """The result of `RowBuffer.check_finite`.

    Args:
        entries: the steps before the first step with a row that is not finite.
        largest: largest magnitude in each row of each part, shape (row, part).
        per_part: values of `largest` as a NumPy array, float64.
        error: error of the first step with a row that is not finite; None: all rows are finite.
    """

    entries: Sequence[Entry]
    largest: Floating
    per_part: NDArray[np.float64]
    error: NonFiniteError | None

    @property
    def limits(self) -> list[float]:
        """Limit of the imbalance of each step."""
        return [entry.limit for entry in self.entries]

    def with_limits(self, limits: Sequence[float]) -> "Finite":
        """Return the result with the first of `limits` in place of its own."""
        return replace(
            self,
            entries=[
                replace(e, limit=limit) for e, limit in zip(self.entries, limits, strict=False)
            ],
        )

    @property
    def largest_batch(self) -> int:
        """Number of rows of the largest step."""
        return max(len(entry.columns[names.STEP]) for entry in self.entries)


@dataclass(frozen=True)
class Checked:
    """The result of `RowBuffer.check`.

    Args:
        entries: the steps before the first step that cannot be recorded.
        largest: largest magnitude in each row of each part, shape (row, part).
        books: balance of these steps.
        error: reason why the next step cannot be recorded; None: all steps can be.
    """

    entries: Sequence[Entry]
    largest: Floating
    books: Balance
    error: NonFiniteError | GradientMismatchError | None
