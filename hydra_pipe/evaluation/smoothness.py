"""Is this training smooth in its data weights, so that a derivative tells what leaving out half of the data does?

Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025, call a training *metasmooth* where its finite differences
keep their sign over the size of change that one means to make. Here the change that a user means is leaving out a random half, m:
weights 1 - s m, with s from 1/64, a small nudge, to 1, the whole removal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.evaluation.evaluator import Evaluator, Request
from hydra_pipe.evaluation.lds import half
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.maths.ranks import spearmans
from hydra_pipe.retraining.campaign import Job, retrain
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject

# How much of a half is left out. Where twice as much is there too, metasmoothness is measured.
STEPS = (1 / 64, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)
DIRECTIONS = 16
# The step whose agreement tells what `hydra-exact` scores in `lds`: on eight runs, smooth to rough, the two were within 0.05 of
# each other (docs/methods.md). Smaller steps look worse than the derivative is: the gradient of a ReLU network jumps, and with
# it where training ends, by an amount that does not shrink with the step; what autograd finds is the slope between the jumps.
TELLING_STEP = 1 / 2
# What that agreement must be, at least, for `hydra-exact` to be trusted: below it, `hydra-fisher` has scored more.
EXACT_AGREEMENT = 0.6
# What sums of relevance can score at most, at least, for a method that smooths the curvature to be worth its while.
FISHER_CEILING = 0.6
_SEED = 0x736D6F
_TINY = 1e-30


class Smoothness(Evaluator):
    """Measure smoothness, and say which methods to trust.

    For test sample j, direction m and step s let d(s) = l_j(1 - s m) - l_j(1). By step:

        agreement        Spearman over directions of d(s) and d(1), mean over test samples. At `TELLING_STEP` it is about
                         what `hydra-exact` scores in `lds`.
        metasmoothness   sum_j |a_j| sign(a_j b_j) / sum_j |a_j| with a = d(s), b = d(2 s) - d(s), mean over directions: 1 where the
                         second step goes on as the first one did, 0 where it has nothing to do with it
        growth           |d(s) / s| over |d(1)|: 1 where the change is in proportion to the step

    and for all of them the *ceiling*: with l_j = linear part + rest after training without m, and after training without all but
    m, the correlation of the two losses is minus the share of the linear part in the variance; its root is the best score that any
    sum over samples, whatever the method, can reach in `lds`.
    """

    def scored(self, subject: Subject, methods: str | None) -> Mapping[str, Relevance]:
        """No relevance is looked at."""
        return {}

    def evaluate(self, request: Request) -> Result:
        """See the class."""
        subject = request.subject
        n = subject.n_samples
        # how much of which half is left out, or of all but that half
        halves = range(DIRECTIONS)
        jobs = [(0.0, 0, False), *((s, d, False) for s in STEPS for d in halves), *((1.0, d, True) for d in halves)]

        def weights(first: int, end: int) -> NDArray[np.float32]:
            rows = []
            for step, direction, others in jobs[first:end]:
                removed = half(direction, n, _SEED)
                rows.append(1.0 - step * (1.0 - removed if others else removed))
            return np.stack(rows).astype(np.float32)

        job = Job(len(jobs), weights, (subject.pipeline.seed,), "weights")
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)[0, :, LOSS]
        changes = losses[1:].reshape(len(STEPS) + 1, DIRECTIONS, -1) - losses[0]
        # a retraining that diverged is as far from any other as can be
        changes = np.nan_to_num(changes, nan=1e30, posinf=1e30)
        found = measured(changes[:-1], changes[-1])
        summary = {"verdict": found.verdict, "ceiling": found.ceiling, "directions": DIRECTIONS}
        expected = min(found.agreement, found.ceiling)
        says = [
            f"agreement: Spearman over {DIRECTIONS} halves of the change at this step with that of "
            f"leaving the half out, {INTERVAL}",
            f"lds to expect: {expected:.2f} of hydra-exact, {found.ceiling:.2f} at most of any method (ceiling)",
            found.verdict,
        ]
        return Result(found.rows, summary, says, _plot(found.rows))


@dataclass(frozen=True)
class Measured:
    """What `measured` found.

    Args:
        rows: of the table, one for each step.
        agreement: at `TELLING_STEP`.
        ceiling: see `Smoothness`.
    """

    rows: list[Row]
    agreement: float
    ceiling: float

    @property
    def verdict(self) -> str:
        if self.agreement >= EXACT_AGREEMENT:
            return "trust exact: what a small change of the weights does tells what leaving out half of the data does"
        if self.ceiling >= FISHER_CEILING:
            return (
                "trust fisher: the derivative tells little of what leaving out half of the data does, but that is nearly a sum "
                "over samples: hydra-fisher, whose curvature is smoother, predicts it better than hydra-exact"
            )
        return (
            "trust neither: what leaving out half of the data does is no sum over samples: train more smoothly (a lower learning "
            "rate or momentum, fewer epochs), or use rankings to find wrong labels only"
        )


def measured(changes: NDArray[np.float64], of_others: NDArray[np.float64]) -> Measured:
    """What changes of test losses tell.

    Args:
        changes: at each of `STEPS` along each direction, shape (step, direction, test).
        of_others: where all the samples were left out that stay otherwise, shape (direction, test).
    """
    whole = changes[-1]
    rows: list[Row] = []
    for index, step in enumerate(STEPS):
        row: Row = {"step": step} | with_interval("agreement", spearmans(changes[index], whole))
        meta = metasmoothness(changes[index], changes[STEPS.index(2 * step)]) if 2 * step in STEPS else None
        growth = float(np.linalg.norm(changes[index]) / step / max(float(np.linalg.norm(whole)), _TINY))
        rows.append(row | {"metasmoothness": meta, "growth": growth})
    share = float(spearmans(whole, -of_others).mean())
    return Measured(rows, rows[STEPS.index(TELLING_STEP)]["agreement"], max(share, 0.0) ** 0.5)


def metasmoothness(first: NDArray[np.float64], both: NDArray[np.float64]) -> float:
    """Weighted agreement in sign of a step with the one after it, from -1 to 1; see `Smoothness`.

    Args:
        first: changes by the first step, shape (direction, test).
        both: by both of them.
    """
    size = np.abs(first)
    per_direction = (size * np.sign(first) * np.sign(both - first)).sum(axis=1) / np.maximum(size.sum(axis=1), _TINY)
    return float(per_direction.mean())


def _plot(rows: list[Row]) -> Plot:
    def draw(axes: Any) -> None:
        for name in ("agreement", "metasmoothness"):
            there = [row for row in rows if row[name] is not None]
            axes.semilogx([row["step"] for row in there], [row[name] for row in there], marker="o", label=name)
        axes.set_xlabel("share of a half that is left out (1: all of it)")
        axes.set_ylim(-1.05, 1.05)
        axes.legend()

    return draw
