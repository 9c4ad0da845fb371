"""The result of `clean`, however the samples were found."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hydra_pipe.store.data.clean_result import KEEP
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.rankings import with_keys


@dataclass(frozen=True)
class Cleaning:
    """Result of `clean`.

    Args:
        is_new: False if the proposal was there already, so that nothing was done.
        keep: ids of the samples that stay, ascending, shape (kept,).
        drop: table of `drop.parquet`, the most suspicious sample first: samples to relabel or drop.
        judged: table of `judged.parquet`: all judged samples as proposed, in the same order.
        retraining: rows of the table of retrainings, empty if nothing was trained.
        summary: findings as plain values. Its `says` holds lines for a person. After retrainings
            its `retraining` is a summary of them.
    """

    is_new: bool
    keep: NDArray[np.int64]
    drop: pa.Table
    judged: pa.Table
    retraining: list[dict[str, Any]]
    summary: dict[str, Any]


def as_proposed(
    judged: pa.Table, keys: Keys | None, n_samples: int, summary: dict[str, Any]
) -> Cleaning:
    """Return a new proposal.

    Args:
        judged: all judged samples, with an action for each.
        keys: keys of all samples. None: they have none.
        n_samples: number of training samples.
        summary: findings.
    """
    judged = with_keys(judged, keys, judged.column("train_id").to_numpy())
    keep, drop = divided(judged, n_samples)
    return Cleaning(True, keep, drop, judged, [], summary)


def divided(judged: pa.Table, n_samples: int) -> tuple[NDArray[np.int64], pa.Table]:
    """Return the ids that stay, ascending, and the samples to relabel or drop.

    Args:
        judged: all judged samples, with an action for each. Other samples stay.
        n_samples: number of training samples.
    """
    drop = judged.filter(pc.not_equal(judged.column("action"), KEEP))
    return np.setdiff1d(np.arange(n_samples), drop.column("train_id").to_numpy()), drop
