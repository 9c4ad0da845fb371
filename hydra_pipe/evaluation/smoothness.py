"""Smoothness of a training in its data weights: does a derivative tell what removing data does?

Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025, call a training
*metasmooth* if its finite differences keep their sign over the size of change that one means to
make. Here the change is to leave out a random half m. The weights are 1 - s m, with s from 1/64,
a small nudge, to 1, the whole removal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.lds import half
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.maths.rank_statistics import spearmans
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject

# Shares of a half to leave out. Metasmoothness is measured at a step if twice the step is in the
# list too.
STEPS = (1 / 64, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)
DIRECTIONS = 16
# The step whose agreement tells what `hydra-exact` scores in `lds`: on eight runs, smooth to
# rough, the two were within 0.05 of each other (docs/methods.md). Smaller steps look worse than
# the derivative is. The gradient of a ReLU network jumps, and the end of training jumps with it,
# by an amount that does not shrink with the step. Autograd finds the slope between the jumps.
TELLING_STEP = 1 / 2
# Least agreement at `TELLING_STEP` to trust `hydra-exact`. Below it, `hydra-fisher` has scored
# more.
EXACT_AGREEMENT = 0.6
# Least ceiling to trust `hydra-fisher`. Below it, no sum of relevance can score enough for a
# method that smooths the curvature to be worth its while.
FISHER_CEILING = 0.6
_SEED = 0x736D6F
_TINY = 1e-30


class Smoothness(Evaluator):
    """Measure smoothness, and say which methods to trust.

    For test sample j, direction m and step s let d(s) = l_j(1 - s m) - l_j(1). Each step has:

        agreement        Spearman over directions of d(s) and d(1), mean over test samples.
                         At `TELLING_STEP` it is about the `lds` score of `hydra-exact`.
        metasmoothness   sum_j |a_j| sign(a_j b_j) / sum_j |a_j|, mean over directions,
                         with a = d(s) and b = d(2 s) - d(s). 1 if the second step goes on as
                         the first did, 0 if the second step has nothing to do with the first.
        growth           |d(s) / s| over |d(1)|. 1 if the change is in proportion to the step.

    The *ceiling* covers all steps. Write l_j = linear part + rest, after training without m and
    after training without all but m. The correlation of the two losses is minus the share of the
    linear part in the variance. The root of the share is the best `lds` score that any sum over
    samples can reach, whatever the method.
    """

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return nothing, because no relevance is looked at."""
        return {}

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train again and measure smoothness; see the class."""
        subject = request.subject
        n = subject.n_samples
        # Each job is a share, the number of a half, and whether the share is left out of the
        # other half instead.
        halves = range(DIRECTIONS)
        jobs = [
            (0.0, 0, False),
            *((s, d, False) for s in STEPS for d in halves),
            *((1.0, d, True) for d in halves),
        ]

        def weights(first: int, end: int) -> NDArray[np.float32]:
            rows = []
            for step, direction, others in jobs[first:end]:
                removed = half(direction, n, _SEED)
                rows.append(1.0 - step * (1.0 - removed if others else removed))
            return np.stack(rows).astype(np.float32)

        job = Retraining(len(jobs), weights, (subject.pipeline.seed,), "weights")
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)[
            0, :, LOSS
        ]
        changes = losses[1:].reshape(len(STEPS) + 1, DIRECTIONS, -1) - losses[0]
        # A retraining that diverged counts as very far from all others.
        changes = np.nan_to_num(changes, nan=1e30, posinf=1e30)
        found = measured(changes[:-1], changes[-1])
        summary = {"verdict": found.verdict, "ceiling": found.ceiling, "directions": DIRECTIONS}
        expected = min(found.agreement, found.ceiling)
        says = [
            f"agreement: Spearman over {DIRECTIONS} halves, of the change at this step and the "
            f"change of leaving the half out, {INTERVAL}",
            f"expected lds: {expected:.2f} for hydra-exact, {found.ceiling:.2f} at most for any "
            "method (ceiling)",
            found.verdict,
        ]
        return Result(found.rows, summary, says, _plot(found.rows))


@dataclass(frozen=True)
class Measured:
    """Result of `measured`.

    Args:
        rows: rows of the table, one for each step.
        agreement: agreement at `TELLING_STEP`.
        ceiling: best `lds` score that a sum over samples can reach, see `Smoothness`.
    """

    rows: list[Row]
    agreement: float
    ceiling: float

    @property
    def verdict(self) -> str:
        if self.agreement >= EXACT_AGREEMENT:
            return (
                "trust exact: the effect of a small change of the weights predicts the effect of "
                "leaving out half of the data"
            )
        if self.ceiling >= FISHER_CEILING:
            return (
                "trust fisher: the derivative says little about leaving out half of the data, "
                "but the effect is nearly a sum over samples. hydra-fisher, whose curvature is "
                "smoother, predicts it better than hydra-exact"
            )
        return (
            "trust neither: the effect of leaving out half of the data is no sum over samples. "
            "Train more smoothly (a lower learning rate or momentum, fewer epochs), or use "
            "rankings to find wrong labels only"
        )


def measured(changes: NDArray[np.float64], of_others: NDArray[np.float64]) -> Measured:
    """Measure smoothness from changes of test losses.

    Args:
        changes: changes at each of `STEPS` along each direction, shape (step, direction, test).
        of_others: changes after leaving out exactly the samples that otherwise stay, shape
            (direction, test).
    """
    whole = changes[-1]
    rows: list[Row] = []
    for index, step in enumerate(STEPS):
        row: Row = {"step": step} | with_interval("agreement", spearmans(changes[index], whole))
        meta = (
            metasmoothness(changes[index], changes[STEPS.index(2 * step)])
            if 2 * step in STEPS
            else None
        )
        growth = float(
            np.linalg.norm(changes[index]) / step / max(float(np.linalg.norm(whole)), _TINY)
        )
        rows.append(row | {"metasmoothness": meta, "growth": growth})
    share = float(spearmans(whole, -of_others).mean())
    return Measured(rows, rows[STEPS.index(TELLING_STEP)]["agreement"], max(share, 0.0) ** 0.5)


def metasmoothness(first: NDArray[np.float64], both: NDArray[np.float64]) -> float:
    """Return how well a step agrees in sign with the next one, weighted by size, from -1 to 1.

    See `Smoothness` for the equation.

    Args:
        first: changes by the first step, shape (direction, test).
        both: changes by both steps together, shape (direction, test).
    """
    size = np.abs(first)
    per_direction = (size * np.sign(first) * np.sign(both - first)).sum(axis=1) / np.maximum(
        size.sum(axis=1), _TINY
    )
    return float(per_direction.mean())


def _plot(rows: list[Row]) -> Plot:
    def draw(axes: Any) -> None:
        for name in ("agreement", "metasmoothness"):
            there = [row for row in rows if row[name] is not None]
            axes.semilogx(
                [row["step"] for row in there], [row[name] for row in there], marker="o", label=name
            )
        axes.set_xlabel("share of a half that is left out (1: all of it)")
        axes.set_ylim(-1.05, 1.05)
        axes.legend()

    return draw
