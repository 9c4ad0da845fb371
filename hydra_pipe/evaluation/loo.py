"""Leave-one-out: how the test losses change where one sample has weight 0, and how well relevance predicted that."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.evaluation.campaign import Job, retrain
from hydra_pipe.evaluation.result import INTERVAL, Result, Row, bars, with_interval
from hydra_pipe.evaluation.retraining import LOSS
from hydra_pipe.evaluation.subject import Relevance, Subject
from hydra_pipe.maths.ranks import spearmans
from hydra_pipe.plan.selection import Span
from hydra_pipe.progress import Progress
from hydra_pipe.store.evaluations import Retrained

# samples that are ranked, below which a rank correlation is 1, -1 or nothing whatever is compared
FEWEST = 3


def loo(
    subject: Subject, directory: Retrained, progress: Progress, *, samples: tuple[Span, ...], methods: str | None, memory: str
) -> Result:
    """Train once without each of some samples, at the run's seed and order, and compare with every method.

    The truth is l_j(without i) - l_j(with i), in units of the test loss, shape (left out, test); relevance predicts it to first
    order. It is kept as `truth.npy`, rows in the order of `samples`.

    Args:
        subject: what is evaluated.
        directory: of retrainings.
        progress: where to show progress.
        samples: that are left out, one at a time.
        methods: see `Subject.relevance`.
        memory: see `retrain`.

    Raises:
        HydraError: see `retrain` and `Subject`.
    """
    relevance = subject.relevance(methods)
    ids = np.concatenate([np.arange(*span) for span in samples])

    def weights(first: int, end: int) -> NDArray[np.float32]:
        # number 0 leaves nothing out: it is computed as the others are, rounding included
        own = np.ones((end - first, subject.n_samples), np.float32)
        for row in range(max(first, 1), end):
            own[row - first, ids[row - 1]] = 0.0
        return own

    job = Job(1 + len(ids), weights, (subject.pipeline.seed,), "batch")
    losses = retrain(subject, job, directory, memory, progress)[0, :, LOSS]
    truth = losses[1:] - losses[0]
    rows = compared(relevance, ids, truth)
    says = [
        f"spearman: of relevance and the change of the loss, over {len(ids)} samples left out one at a time, {INTERVAL}",
        "norm: of relevance over that of the change; 1 is right",
    ]
    finite = np.isfinite(truth).all(axis=1)
    if finite.sum() < FEWEST:
        says.append(
            f"Spearman's correlation over {finite.sum()} samples tells nothing, and is left out: leave out {FEWEST} or more, by "
            f"--samples"
        )
    if not rows:
        says = [f"there is no relevance to compare with: hydra-pipe reduce {subject.run.path} --method hydra-fisher computes one"]
    if not finite.all():
        says.append(f"{(~finite).sum()} retrainings diverged, and are not compared")
    summary = {"n_left_out": len(ids), "diverged": int((~finite).sum()), "n_tests": subject.n_tests}
    plot = bars(rows, "spearman", "Spearman with leave-one-out") if rows and finite.sum() >= FEWEST else None
    return Result(rows, summary, says, plot, truth.astype(np.float32))


def compared(relevance: Mapping[str, Relevance], ids: NDArray[np.int64], truth: NDArray[np.float64]) -> list[Row]:
    """A row for each method.

    Args:
        relevance: by name.
        ids: of the samples, shape (left out,).
        truth: shape (left out, test).
    """
    rows: list[Row] = []
    finite = np.isfinite(truth).all(axis=1)
    size = float(np.linalg.norm(truth[finite])) or 1.0
    for name, found in relevance.items():
        values = found.values()[ids].astype(np.float64)[finite]
        told = spearmans(values, truth[finite]) if finite.sum() >= FEWEST else np.full(truth.shape[1], np.nan)
        row: Row = {"method": name} | with_interval("spearman", told)
        rows.append(row | {"norm": float(np.linalg.norm(values)) / size})
    return sorted(rows, key=lambda row: -row["spearman"] if np.isfinite(row["spearman"]) else 0.0)
