"""Query loss difference: does the loss of a query change without the samples that are relevant?

The most helpful samples of a query are left out, or the most harmful ones, or as many at random.
The model is trained again each time, at the run's steps: weight 0, mean over the samples kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import NonFiniteError, UsageError
from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.queries import (
    MOST_QUERIES,
    Query,
    losses_of,
    queries_of,
    relevance_for,
    selection_of,
)
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.evaluation.subsets import n_dropped, random_order
from hydra_pipe.maths.rank_statistics import crossed_intervals
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store import names
from hydra_pipe.types import F64, I64

DEFAULT_DROP = 0.01
# Number of random choices of samples for each seed.
RANDOM_DRAWS = 10
HELPFUL, HARMFUL = "helpful", "harmful"
# Sign of the relevance of a side's samples.
_SIDES = {HELPFUL: 1.0, HARMFUL: -1.0}
_OVER_RANDOM = "_over_random"
_SEED = 0x716C64


class QueryLoss(Evaluator):
    """Leave out the samples that each method calls most helpful for a query, or most harmful.

    Each row of the table is one method. Its columns are means over queries of the change of the
    query's loss, in units of the test loss:

        helpful               without the most helpful samples; above 0 if relevance is right
        helpful_over_random   the same, less the change without as many samples at random
        harmful               without the most harmful samples; below 0 if relevance is right
        harmful_over_random   the same, less the change without as many samples at random

    The random choices are the same for all methods and queries.
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the share to leave out, the number of seeds, and the queries."""
        fewest = 0.5 / DEFAULT_DROP  # a hundredth of less is no sample: one is left out
        default = DEFAULT_DROP if subject.n_samples >= fewest else 1.0 / subject.n_samples
        drop = options.drop or default
        seeds = options.seeds or 1
        n_dropped(drop, subject.n_samples)
        if seeds > 1:
            subject.check_seeds()
        own: dict[str, Any] = {"drop": drop, "seeds": seeds}
        if options.by is not None:
            if options.tests is not None:
                raise UsageError(
                    "--by and --tests: groups are of all test samples, so choose one of the two"
                )
            own[names.BY] = options.by
            queries_of(subject, own)
            return own
        if options.tests is None and subject.n_tests > MOST_QUERIES:
            progress.say(
                f"the first {MOST_QUERIES} of {subject.n_tests:,} test samples are the queries; "
                "--tests chooses others, --by label or --by mean takes all in groups"
            )
        first = f"0-{min(subject.n_tests, MOST_QUERIES) - 1}"
        return own | {names.TESTS: selection_of(subject, options.tests or first)}

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return relevance for each query, or for each test sample of the groups; one or more."""
        by, tests = settings.get(names.BY), settings.get(names.TESTS)
        return subject.required_relevance(methods, () if by is None else (by,), tests)

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train without the samples that matter, and without others; see the class.

        Raises:
            NonFiniteError: too many retrainings diverged.
        """
        subject, settings = request.subject, request.settings
        relevance = self.scored(subject, request.methods, settings)
        queries = queries_of(subject, settings)
        n = n_dropped(settings["drop"], subject.n_samples)
        removed = [
            ids
            for found in relevance.values()
            for of_query in relevance_for(found, queries).T
            for ids in extremes(of_query, n)
        ]
        job = _job(removed, n, subject, settings["seeds"])
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)
        found = measured(losses_of(queries, losses[:, :, LOSS]), len(relevance))
        rows = rows_of(list(relevance), found)
        summary = {
            "left_out": n,
            "draws": RANDOM_DRAWS,
            "diverged": found.diverged,
            "queries": [query.name for query in queries],
            "changes": _changes(list(relevance), found),
        }
        says = _says(n, subject, found, queries)
        return Result(rows, summary, says, _plot(rows))


def extremes(values: NDArray[np.floating], n: int) -> tuple[I64, I64]:
    """Return the ids of the `n` samples of highest values, and of the `n` of lowest values.

    Args:
        values: relevance of each sample, shape (sample,). Ties are in order of the ids.
        n: number of samples on each side.
    """
    highest, lowest = (np.argsort(-sign * values, kind="stable")[:n] for sign in _SIDES.values())
    return highest, lowest


def _job(removed: Sequence[I64], n: int, subject: Subject, seeds: int) -> Retraining:
    """Return the retrainings of each seed: with all samples, without random ones, and without
    each of `removed`.
    """
    n_each = 1 + RANDOM_DRAWS + len(removed)

    def left_out(number: int) -> I64:
        index = number % n_each
        if index == 0:
            return np.arange(0)
        if index <= RANDOM_DRAWS:
            # Each seed draws other samples. So seeds differ by their draws too.
            draw = number // n_each * RANDOM_DRAWS + index
            return random_order(subject.n_samples, _SEED, draw)[:n]
        return removed[index - 1 - RANDOM_DRAWS]

    own = subject.pipeline.seed
    return Retraining.without(
        n_each, left_out, subject.n_samples, tuple(own + s for s in range(seeds))
    )


@dataclass(frozen=True)
class Measured:
    """Changes of the loss of each query whose retrainings all came to an end.

    Args:
        sides: change without the samples of each method and side, shape (method, side, seed,
            query).
        random: change without samples drawn at random, shape (draw, seed, query).
        kept: True for each query that is among them, shape (all queries,).
        diverged: number of retrainings that diverged.
    """

    sides: F64
    random: F64
    kept: NDArray[np.bool_]
    diverged: int

    @property
    def n_seeds(self) -> int:
        return int(self.random.shape[1])

    def over_random(self) -> F64:
        """Return how far each side is from random, shape (method, side, repeat, query).

        With several seeds a repeat is a seed, whose draws are averaged. With one seed a repeat is
        a draw.
        """
        random: F64 = self.random.mean(axis=0) if self.n_seeds > 1 else self.random[:, 0]
        found: F64 = self.sides - random
        return found


def measured(losses: F64, n_methods: int) -> Measured:
    """Return the changes of the losses against training with all samples.

    Args:
        losses: loss of each query after each retraining of `_job`, shape (seed, retraining,
            query).
        n_methods: number of methods.

    Raises:
        NonFiniteError: a training with all samples diverged, or all draws did, or a retraining of
            each query.
    """
    n_seeds, _, n_queries = losses.shape
    finite = np.isfinite(losses)
    diverged = int((~finite.all(axis=2)).sum())
    changes = losses[:, 1:] - np.where(finite[:, :1], losses[:, :1], np.nan)
    drawn = changes[:, :RANDOM_DRAWS]
    of_queries = changes[:, RANDOM_DRAWS:].reshape(n_seeds, n_methods, n_queries, 2, n_queries)
    own = np.einsum("smqhq->mhsq", of_queries)
    # A query whose loss is infinite with all samples has no change after any retraining.
    kept = np.isfinite(own).all(axis=(0, 1, 2))
    whole = np.isfinite(drawn[..., kept]).all(axis=(0, 2))
    if not whole.any() or not kept.any():
        raise NonFiniteError(
            f"{diverged} of {finite.shape[0] * finite.shape[1]} retrainings diverged: this "
            "training is too unstable to tell what leaving out samples does"
        )
    return Measured(own[..., kept], drawn[:, whole][..., kept].transpose(1, 0, 2), kept, diverged)


def rows_of(methods: Sequence[str], found: Measured) -> list[Row]:
    """Return a row for each method, the one first whose two sides are farthest apart."""
    sides, over = found.sides, found.over_random()
    rows: list[Row] = []
    for index, method in enumerate(methods):
        row: Row = {"method": method}
        for side, name in enumerate(_SIDES):
            row |= _with_interval(name, sides[index, side])
            row |= _with_interval(name + _OVER_RANDOM, over[index, side])
        rows.append(row)
    return sorted(rows, key=lambda row: row[HARMFUL] - row[HELPFUL])


def _with_interval(name: str, values: F64) -> Row:
    """Return the mean and its interval of 95 % as columns of a table.

    Args:
        name: name of the column.
        values: values, shape (repeat, query). The interval is not a number if there is one query.
    """
    low, high = (np.nan, np.nan) if values.shape[1] < 2 else crossed_intervals(values[None])[0]
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _changes(methods: Sequence[str], found: Measured) -> dict[str, Any]:
    """Return the change of each query, mean over seeds; null for a query that is left out."""

    def listed(values: F64) -> list[float | None]:
        whole = np.full(len(found.kept), np.nan)
        whole[found.kept] = values
        return [None if np.isnan(value) else float(value) for value in whole]

    by_method = {
        method: {side: listed(own.mean(axis=0)) for side, own in zip(_SIDES, sides, strict=True)}
        for method, sides in zip(methods, found.sides, strict=True)
    }
    return by_method | {"(random)": listed(found.random.mean(axis=(0, 1)))}


def _says(n: int, subject: Subject, found: Measured, queries: Sequence[Query]) -> list[str]:
    """Return lines for a person: what the columns are, and what is random."""
    repeats = "seeds" if found.n_seeds > 1 else "random draws"
    n_draws = found.random.shape[0]
    # The draws of one seed differ by the samples that are left out, and by nothing else.
    chance = found.random.std(axis=0).mean()
    says = [
        f"change of a query's loss without {n:,} of {subject.n_samples:,} samples (weight 0, mean "
        f"over those kept), mean over {int(found.kept.sum())} queries; intervals of 95 % by "
        f"drawing queries and {repeats} anew, 2,000 times",
        "helpful: without the samples that relevance calls most helpful, right if above 0; "
        "harmful: without the most harmful, right if below 0",
        f"as many at random: {found.random.mean():+.4g}, mean of {n_draws} draws for each seed; "
        f"one draw differs from another by {chance:.2g} (standard deviation, mean over queries)",
    ]
    if found.n_seeds == 1:
        says.append(
            "with one seed intervals do not show how another training would come out: add --seeds 3"
        )
    if found.diverged:
        says.append(
            f"{found.diverged} retrainings diverged: {int((~found.kept).sum())} of {len(queries)} "
            f"queries and {RANDOM_DRAWS - n_draws} of {RANDOM_DRAWS} draws are left out"
        )
    return says


def _plot(rows: Sequence[Row]) -> Plot:
    def draw(axes: Any) -> None:
        places = np.arange(len(rows))
        for side, shift in zip(_SIDES, (-0.2, 0.2), strict=True):
            name = side + _OVER_RANDOM
            values = np.array([row[name] for row in rows])
            bounds = np.array([[row[f"{name}_low"], row[f"{name}_high"]] for row in rows])
            around = np.nan_to_num(np.abs(bounds - values[:, None]))
            axes.barh(places + shift, values, 0.4, xerr=around.T, capsize=3, label=side)
        axes.set_yticks(places, [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel("change of the query's loss, against as many at random")
        axes.legend()

    return draw
