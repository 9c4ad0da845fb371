"""Leave-one-out: changes of test losses when one sample has weight 0, as predicted by relevance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.result import Result, Row, bars
from hydra_pipe.maths.rank_statistics import spearmans
from hydra_pipe.plan.id_ranges import parse_selection, write_selection
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store import names
from hydra_pipe.store.data.keys import selected
from hydra_pipe.types import Span

# Number of samples to leave out unless `--samples` chooses: the first ones, or all if there are
# fewer.
MOST_LEFT_OUT = 1000
# With fewer samples a rank correlation is 1, -1 or undefined, whatever is compared.
FEWEST = 3


class LeaveOneOut(Evaluator):
    """Train once without each of some samples, and compare every method.

    Training keeps the run's seed and order. The truth is l_j(without i) - l_j(with i), in units
    of the test loss, shape (left out, test). Relevance predicts the truth to first order. The
    truth is kept as `truth.npy`, rows in the order of the samples.
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the ids of the samples to leave out."""
        spans: tuple[Span, ...] = ((0, min(subject.n_samples, MOST_LEFT_OUT)),)
        if options.samples is not None:
            spans = selected(
                options.samples,
                subject.n_samples,
                subject.gradients.keys(names.TRAIN_KEYS),
                "--samples",
            )
        elif subject.n_samples > MOST_LEFT_OUT:
            progress.say(
                f"the first {MOST_LEFT_OUT:,} of {subject.n_samples:,} samples are left out; "
                "--samples chooses others"
            )
        return {"samples": write_selection(spans)}

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return relevance for each test sample, or nothing if none was computed."""
        return subject.relevance(methods)

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train without each sample and compare every method; see the class."""
        subject = request.subject
        samples = parse_selection(request.settings["samples"], subject.n_samples, "--samples")
        relevance = subject.relevance(request.methods)
        ids = np.concatenate([np.arange(*span) for span in samples])

        def weights(first: int, end: int) -> NDArray[np.float32]:
            # Retraining 0 leaves nothing out. It is computed like the others, so that rounding
            # is the same.
            own = np.ones((end - first, subject.n_samples), np.float32)
            for row in range(max(first, 1), end):
                own[row - first, ids[row - 1]] = 0.0
            return own

        job = Retraining(1 + len(ids), weights, (subject.pipeline.seed,), "batch")
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)[
            0, :, LOSS
        ]
        truth = losses[1:] - losses[0]
        rows = compared(relevance, ids, truth)
        says = [
            f"spearman: correlation of relevance with the change of the loss, over {len(ids)} "
            f"samples left out one at a time, {INTERVAL}",
            "norm: norm of relevance over the norm of the change; 1 is right",
        ]
        finite = np.isfinite(truth).all(axis=1)
        if finite.sum() < FEWEST:
            says.append(
                f"{finite.sum()} samples are too few for Spearman's correlation, which is left "
                f"out: leave out {FEWEST} or more, by --samples"
            )
        if not rows:
            says = [
                f"there is no relevance to compare with: hydra-pipe reduce {subject.run.path} "
                "--method hydra-fisher computes one"
            ]
        if not finite.all():
            says.append(f"{(~finite).sum()} retrainings diverged, and are not compared")
        summary = {
            "n_left_out": len(ids),
            "diverged": int((~finite).sum()),
            "n_tests": subject.n_tests,
        }
        plot = (
            bars(rows, "spearman", "Spearman with leave-one-out")
            if rows and finite.sum() >= FEWEST
            else None
        )
        return Result(rows, summary, says, plot, truth.astype(np.float32))


def compared(
    relevance: Mapping[str, Relevance], ids: NDArray[np.int64], truth: NDArray[np.float64]
) -> list[Row]:
    """Return a row for each method, the highest correlation first.

    Args:
        relevance: relevance by name.
        ids: ids of the samples left out, shape (left out,).
        truth: change of each test loss without each sample, shape (left out, test).
    """
    rows: list[Row] = []
    finite = np.isfinite(truth).all(axis=1)
    size = float(np.linalg.norm(truth[finite])) or 1.0
    for name, found in relevance.items():
        values = found.values()[ids].astype(np.float64)[finite]
        told = (
            spearmans(values, truth[finite])
            if finite.sum() >= FEWEST
            else np.full(truth.shape[1], np.nan)
        )
        row: Row = {"method": name} | with_interval("spearman", told)
        rows.append(row | {"norm": float(np.linalg.norm(values)) / size})
    return sorted(rows, key=lambda row: -row["spearman"] if np.isfinite(row["spearman"]) else 0.0)
