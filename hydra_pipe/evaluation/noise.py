"""Known wrong labels: does a ranking put them first, and does the model gain without its first?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import PipelineError, UsageError, shown
from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.maths.rank_statistics import roc_auc
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.retrainer import HIT
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store.run.results import ITSELF, MEAN

# Shares of the number of wrong labels: how many samples to look at for precision, and how many
# to leave out before training again.
LOOKED_AT = (0.1, 0.5, 1.0)
LEFT_OUT = (0.5, 1.0, 2.0)
# Number of random choices whose accuracy is averaged.
RANDOM_DRAWS = 3
# Groupings of results that are ranked beside those of each test sample.
_ALSO = (MEAN, ITSELF)
RANDOM, WRONG = "(random)", "(the wrong ones)"
_SEED = 0x6E6F69


@dataclass(frozen=True)
class Order:
    """Samples, the most suspicious first.

    Args:
        method: name of the method that gives the order.
        scores: suspicion of each sample, higher is more suspicious, shape (sample,). None if no
            method gives the order.
        first: ids of the samples in order, as far as the order is known.
    """

    method: str
    scores: NDArray[np.float64] | None
    first: NDArray[np.int64]


def wrong_labels(subject: Subject) -> NDArray[np.bool_]:
    """Tell which training samples have a label that is not their true one. Shape (sample,).

    Raises:
        PipelineError: no label is wrong, or all are; also any error of `Subject.true_labels`.
    """
    wrong = np.asarray(subject.sample_labels() != subject.true_labels(), bool)
    if wrong.all() or not wrong.any():
        raise PipelineError(
            f"by true_labels {int(wrong.sum())} of {len(wrong)} labels are wrong: some must be "
            "wrong, and some right"
        )
    return wrong


def parse_left_out(given: str | None) -> tuple[float, ...]:
    """Return how many samples to leave out, as ascending shares of the number of wrong labels.

    Args:
        given: shares with commas between them. "0" alone means that nothing is left out or
            trained. None means `LEFT_OUT`.

    Raises:
        UsageError: `given` is not a list of positive shares.
    """
    if given is None:
        return LEFT_OUT
    try:
        shares = sorted({float(word) for word in given.split(",")})
    except ValueError:
        shares = [math.nan]
    if shares == [0.0]:
        return ()
    if not all(0.0 < share < math.inf for share in shares):
        raise UsageError(
            f"--left-out {shown(given)}: give shares of the number of wrong labels, such as "
            "0.5,1,2, or 0 for none"
        )
    return tuple(shares)


def order_of(relevance: Relevance) -> Order:
    """Rank the training samples by mean relevance, the lowest first.

    Relevance of samples to themselves is ranked the other way round, the highest first.
    """
    mean = relevance.values().mean(axis=1, dtype=np.float64)
    scores = mean if relevance.columns.by == ITSELF else -mean
    return Order(relevance.name, scores, np.argsort(-scores, kind="stable"))


class WrongLabels(Evaluator):
    """Score every method's ranking of the training samples against the known wrong labels.

    A ranking is by mean relevance over all tests, the most harmful first. The ranking of `self`
    is by relevance to themselves, the highest first: a sample that only its own steps can teach
    is odd.

    Each method has:

    - ROC-AUC;
    - precision among the first k, with k wrong labels in all and some smaller k;
    - accuracy on the test samples after training without the first k, at the run's seed and
      order (weight 0, mean over the samples that are kept).
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the shares of wrong labels to leave out, if they are not `LEFT_OUT`."""
        if options.left_out is None:
            return {}
        parse_left_out(options.left_out)
        return {"left_out": options.left_out}

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return relevance for each test sample, or as a mean.

        Raises:
            PipelineError: any error of `wrong_labels`.
        """
        wrong_labels(subject)
        return subject.required_relevance(methods, _ALSO)

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Score every ranking, and train without its first samples; see the class."""
        subject, left_out = request.subject, parse_left_out(request.settings.get("left_out"))
        wrong = wrong_labels(subject)
        n_wrong = int(wrong.sum())
        orders = [
            order_of(found) for found in subject.required_relevance(request.methods, _ALSO).values()
        ]
        says = [
            f"{n_wrong:,} of {len(wrong):,} labels are wrong; rankings: mean relevance over "
            f"{subject.n_tests:,} tests, lowest first; {ITSELF}: highest first"
        ]
        if not left_out:
            rows = sorted((_row(order, wrong) for order in orders), key=lambda row: -row["roc_auc"])
            return Result(rows, {"wrong": n_wrong}, says)
        # The random draws and the wrong labels have no ranking of their own, so a random order
        # serves.
        rng = np.random.default_rng(_SEED)
        draws = [
            Order(RANDOM, None, rng.permutation(subject.n_samples)) for _ in range(RANDOM_DRAWS)
        ]
        ideal = Order(WRONG, None, rng.permutation(np.flatnonzero(wrong)))
        sizes = [min(max(1, round(share * n_wrong)), subject.n_samples - 1) for share in left_out]
        everything = [*orders, *draws, ideal]
        without = [
            everything[0].first[:0],
            *(order.first[:size] for order in everything for size in sizes),
        ]
        job = Retraining.without(
            len(without), without.__getitem__, subject.n_samples, (subject.pipeline.seed,)
        )
        hits = retrain(subject, job, request.retrained, request.memory, request.progress)[
            0, :, HIT
        ].mean(axis=1)
        accuracies = hits[1:].reshape(len(everything), len(sizes))
        n = len(orders)
        by_order = [
            *zip(orders, accuracies[:n], strict=True),
            (draws[0], accuracies[n:-1].mean(axis=0)),
            (ideal, accuracies[-1]),
        ]
        rows = [_row(order, wrong) | _without(own, sizes) for order, own in by_order]
        rows = sorted(rows[:n], key=lambda row: -row["roc_auc"]) + rows[n:]
        says += [
            f"accuracy with all samples {hits[0]:.3f}, and trained again without the first K of "
            "a ranking: without_K",
            f"random: mean of {RANDOM_DRAWS} draws; the wrong ones: there are no more than "
            f"{n_wrong} to leave out",
        ]
        summary: dict[str, Any] = {"wrong": n_wrong, "accuracy": _plain(hits[0])}
        return Result(rows, summary, says, _plot(rows, sizes, float(hits[0])))


def _row(order: Order, wrong: NDArray[np.bool_]) -> Row:
    row: Row = {
        "method": order.method,
        "roc_auc": None if order.scores is None else roc_auc(order.scores, wrong),
    }
    for share in LOOKED_AT:
        k = max(1, round(share * wrong.sum()))
        row[f"precision_{k}"] = (
            None if order.scores is None else float(wrong[order.first[:k]].mean())
        )
    return row


def _without(accuracies: NDArray[np.float64], sizes: list[int]) -> Row:
    return {f"without_{k}": _plain(found) for k, found in zip(sizes, accuracies, strict=True)}


def _plain(accuracy: float) -> float | None:
    """Return the accuracy, or None if it is unknown because outputs or targets are not classes."""
    return None if np.isnan(accuracy) else float(accuracy)


def _plot(rows: list[Row], sizes: list[int], accuracy: float) -> Plot | None:
    if np.isnan(accuracy):
        return None

    def draw(axes: Any) -> None:
        for row in rows:
            axes.plot(
                [0, *sizes],
                [accuracy, *(row[f"without_{k}"] for k in sizes)],
                marker="o",
                label=row["method"],
            )
        axes.set_xlabel("samples left out, the most harmful first")
        axes.set_ylabel("accuracy on the test samples")
        axes.legend()

    return draw
