"""Brittleness: how few samples must be left out for a right prediction to become wrong?

Ilyas et al., "Datamodels", ICML 2022, and Park et al., "TRAK", ICML 2023. Samples are left out in
the order of their relevance for the prediction, the most helpful first, and the model is trained
again: weight 0, mean over the samples kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydra_pipe.errors import DataError, RunError
from hydra_pipe.evaluation.bisection import Bisection, Order, Trainings, sizes_up_to
from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.queries import (
    MOST_QUERIES,
    Query,
    ids_of,
    relevance_for,
    selection_of,
)
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.evaluation.subsets import n_dropped, random_order
from hydra_pipe.maths.rank_statistics import median_interval
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Campaign, Retraining
from hydra_pipe.retraining.intervals import with_interval
from hydra_pipe.retraining.retrainer import HIT
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store import names
from hydra_pipe.types import F64, I64

# Largest share of the samples to leave out.
DEFAULT_DROP = 0.2
# Number of random orders.
RANDOM_DRAWS = 3
RANDOM = "(random)"
_SEED = 0x737562


class SmallestSubset(Evaluator):
    """Find the smallest number of samples without which each prediction is wrong.

    The numbers that are tried grow geometrically from 1 to a share of the samples. Bisection
    finds a number whose removal flips the prediction, while the next smaller one that is tried
    does not. So the answer is the smallest number if leaving out more never flips back.

    Each row of the table is one method, and one row is of random orders:

        flipped        share of the predictions that flip within the largest number
        median         median of the smallest numbers; none if fewer than half flip
        beats_random   share of the random orders that need more samples; equal numbers count half
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the largest share to leave out, and the selection of test samples, if given."""
        drop = options.drop or DEFAULT_DROP
        n_dropped(drop, subject.n_samples)
        tests = None if options.tests is None else selection_of(subject, options.tests)
        return {"drop": drop, names.TESTS: tests}

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return relevance for each test sample that is looked at, at least one result."""
        return subject.required_relevance(methods, tests=settings[names.TESTS])

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train without ever other numbers of samples; see the class.

        Raises:
            DataError: predictions are not classes.
            RunError: no prediction is right.
        """
        subject = request.subject
        relevance = self.scored(subject, request.methods, request.settings)
        campaign = Campaign(subject, "weights", request.memory, request.progress)
        queries, n_wrong = _right(campaign, request)
        sizes = sizes_up_to(n_dropped(request.settings["drop"], subject.n_samples))
        orders = [_ranked(found, queries, sizes[-1]) for found in relevance.values()]
        orders += [
            _drawn(subject.n_samples, draw, len(queries), sizes[-1]) for draw in range(RANDOM_DRAWS)
        ]
        _say_count(request.progress, len(relevance), len(queries), sizes)
        found = _searched(campaign, request, orders, queries, sizes)
        smallest = np.append(sizes, np.inf)[found.high]
        rows = rows_of(list(relevance), smallest)
        summary = {
            "sizes": sizes.tolist(),
            "draws": RANDOM_DRAWS,
            "diverged": found.diverged,
            "queries": [query.name for query in queries],
            "smallest": _listed(list(relevance), smallest),
        }
        says = _says(subject, sizes, len(queries), n_wrong, found.diverged)
        return Result(rows, summary, says, _plot(list(relevance), smallest, sizes))


def _searched(
    campaign: Campaign,
    request: EvaluationRequest,
    orders: Sequence[Order],
    queries: Sequence[Query],
    sizes: I64,
) -> Bisection:
    """Return the place in `sizes` at which each order flips each query, after all rounds."""
    subject, n_rounds = request.subject, len(sizes).bit_length()
    found = Bisection(len(sizes), (len(orders), len(queries)))
    for number in range(1, n_rounds + 1):
        request.progress.say(f"round {number} of {n_rounds}")
        trainings = Trainings.of(orders, sizes, found.middle)
        job = Retraining.without(
            len(trainings.left_out),
            trainings.left_out.__getitem__,
            subject.n_samples,
            (subject.pipeline.seed,),
        )
        outcome = campaign.outcome(job, request.retrained.of_round(number))[0]
        found.halve(trainings.flipped(outcome, queries), trainings.diverged(outcome))
    return found


def _right(campaign: Campaign, request: EvaluationRequest) -> tuple[list[Query], int]:
    """Return the predictions that are right after training with all samples, and how many of the
    test samples that were looked at are not.
    """
    subject, chosen = request.subject, request.settings[names.TESTS]
    seeds = (subject.pipeline.seed,)
    whole = Retraining.without(1, lambda number: np.arange(0), subject.n_samples, seeds)
    hits = campaign.outcome(whole, request.retrained)[0, 0, HIT]
    if np.isnan(hits).any():
        raise DataError(
            "predictions of this pipeline are not classes, one of them for each test sample, so "
            "none can flip: evaluate qld and evaluate lds take any loss"
        )
    tests = np.arange(subject.n_tests) if chosen is None else ids_of(subject, chosen)
    right = tests[hits[tests] == 1.0]
    if not len(right):
        raise RunError(
            f"none of the {len(tests):,} test samples is predicted right, so none can flip: "
            "choose others by --tests, or train longer"
        )
    asked = right[:MOST_QUERIES] if chosen is None else right
    if len(asked) < len(right):
        request.progress.say(
            f"the first {len(asked)} of {len(right):,} right predictions are the queries; --tests "
            "chooses others"
        )
    return [Query(int(test), np.array([test])) for test in asked], len(tests) - len(right)


def _ranked(found: Relevance, queries: Sequence[Query], most: int) -> Order:
    """Return the `most` samples of highest relevance for each query, the most helpful first."""
    values = relevance_for(found, queries)
    first = [np.argsort(-column, kind="stable")[:most] for column in values.T]
    return Order(np.stack(first), np.arange(len(queries)))


def _drawn(n_samples: int, draw: int, n_queries: int, most: int) -> Order:
    """Return a random order, the same for all queries."""
    return Order(random_order(n_samples, _SEED, draw)[None, :most], np.zeros(n_queries, np.int64))


def _say_count(progress: Progress, n_methods: int, n_queries: int, sizes: I64) -> None:
    """Say how many retrainings there will be at most, before they begin."""
    n_rounds = len(sizes).bit_length()
    of_random = sum(min(n_queries, 2**number) for number in range(n_rounds))
    n = n_rounds * n_methods * n_queries + RANDOM_DRAWS * of_random
    progress.say(
        f"{n:,} retrainings at most, in {n_rounds} rounds: {n_queries} predictions, "
        f"{n_methods} methods and {RANDOM_DRAWS} random orders, {len(sizes)} sizes from "
        f"{sizes[0]:,} to {sizes[-1]:,}"
    )


def rows_of(methods: Sequence[str], smallest: F64) -> list[Row]:
    """Return a row for each method, the lowest median first, and one of the random orders.

    Args:
        methods: names of the methods.
        smallest: smallest number that flips each query, infinite where none does, shape (order,
            query). The first orders are those of the methods, the others are random.
    """
    n = len(methods)
    drawn = smallest[n:]
    rows = []
    for method, own in zip(methods, smallest[:n], strict=True):
        beaten = ((own < drawn) + 0.5 * (own == drawn)).mean(axis=0)
        rows.append(_row(method, own[None]) | with_interval("beats_random", beaten))
    rows.sort(key=lambda row: (row["median"] is None, row["median"] or 0.0, -row["flipped"]))
    unknown = dict.fromkeys(("beats_random", "beats_random_low", "beats_random_high"))
    return [*rows, _row(RANDOM, drawn) | unknown]


def _row(method: str, smallest: F64) -> Row:
    """Return the columns of a method from the smallest numbers, shape (order, query)."""
    row: Row = {"method": method}
    row |= with_interval("flipped", np.isfinite(smallest).mean(axis=0))
    # A random prediction needs the median of its orders.
    of_query = np.median(smallest, axis=0)
    low, high = median_interval(of_query) if len(of_query) > 1 else (np.nan, np.nan)
    for name, value in (
        ("median", float(np.median(of_query))),
        ("median_low", low),
        ("median_high", high),
    ):
        row[name] = None if np.isinf(value) else value
    return row


def _listed(methods: Sequence[str], smallest: F64) -> dict[str, Any]:
    """Return the smallest number of each query, null where none flips it, by method."""
    listed = [[None if np.isinf(value) else int(value) for value in own] for own in smallest]
    n = len(methods)
    return dict(zip(methods, listed[:n], strict=True)) | {RANDOM: listed[n:]}


def _says(subject: Subject, sizes: I64, n_queries: int, n_wrong: int, diverged: int) -> list[str]:
    """Return lines for a person: what was tried, and what the columns are."""
    says = [
        f"smallest number of samples, the most helpful first, without which a right prediction is "
        f"wrong (weight 0, mean over those kept); {n_queries} predictions, sizes from "
        f"{sizes[0]:,} to {sizes[-1]:,} of {subject.n_samples:,} samples, each about "
        f"{(sizes[-1] / sizes[0]) ** (1 / max(1, len(sizes) - 1)):.2f} times the one before, by "
        "bisection",
        f"flipped: within {sizes[-1]:,} samples; median: of the smallest numbers, - if fewer than "
        f"half flip; beats_random: share of {RANDOM_DRAWS} random orders that need more; intervals "
        "of 95 % by drawing as many predictions anew, 2,000 times (not the retrainings)",
    ]
    if n_wrong:
        says.append(f"{n_wrong:,} predictions are wrong with all samples, and are not asked about")
    if diverged:
        says.append(f"{diverged} retrainings diverged, and count as if nothing had flipped")
    return says


def _plot(methods: Sequence[str], smallest: F64, sizes: I64) -> Plot:
    def draw(axes: Any) -> None:
        n = len(methods)
        series = dict(zip(methods, smallest[:n, None], strict=True)) | {RANDOM: smallest[n:]}
        for method, own in series.items():
            share = [float((own <= size).mean()) for size in sizes]
            axes.step(sizes, share, where="post", marker=".", label=method)
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("samples left out, the most helpful first")
        axes.set_ylabel("share of right predictions that flip")
        axes.legend()

    return draw
