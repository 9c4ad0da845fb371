"""The result of `clean`, however the samples were found."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cleaning:
    """Result of `clean`.

    Args:
        is_new: False if the proposal was there already, so that nothing was done.
        keep: ids of the samples that stay, ascending, shape (kept,).
        drop: table of `drop.parquet`, the most suspicious sample first.
        retraining: rows of the table of retrainings, empty if nothing was trained.
        summary: findings as plain values. Its `says` holds lines for a person. After retrainings
            its `retraining` is a summary of them.
    """

    is_new: bool
    keep: NDArray[np.int64]
    drop: pa.Table
    retraining: list[dict[str, Any]]
    summary: dict[str, Any]
