"""Distance between relevance without the Hessian and relevance with it, as training goes on.

This is the study of the HYDRA paper (AAAI 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError
from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.maths.rank_statistics import spearmans
from hydra_pipe.plan.id_ranges import write_selection
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.subject import Relevance, Subject, reducing
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.results import GROUPINGS, ResultName

EXACT = "hydra-exact"
METHODS = ("hydra", "hydra-fisher", "influence")
_TINY = 1e-30


@dataclass(frozen=True)
class Pair:
    """An approximate result and the exact one.

    Args:
        steps: number of steps that both results cover.
        approximate, exact: the two results to compare.
        columns: columns of each result that belong to the same test samples, or to the same
            groups of test samples. Shape (column,).
    """

    steps: int
    approximate: Relevance
    exact: Relevance
    columns: tuple[NDArray[np.int64], NDArray[np.int64]]

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of both results, shape (sample, column).

        Raises:
            StoreError: a result is damaged.
        """
        found, truth = (
            r.values()[:, ids]
            for r, ids in zip((self.approximate, self.exact), self.columns, strict=True)
        )
        return found.astype(np.float64), truth.astype(np.float64)


class Approximation(Evaluator):
    """Compare `METHODS` with `EXACT`, without any training.

    The comparison is made at the end, and after each number of steps for which both were
    reduced. It covers the test samples that both results have, or means over the same test
    samples.

    Each row of the table is one method after one number of steps, over all samples and columns:

        distance         Euclidean norm of the difference, in units of the test loss
        relative_error   `distance` over the norm of the exact result
        wrong_signs      share of the pairs that one result calls helpful and the other harmful
        spearman         correlation over samples, mean over columns
    """

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return both results of each pair, by name.

        Raises:
            RunError: there is no pair to compare.
        """
        return {r.name: r for pair in pairs_of(subject) for r in (pair.approximate, pair.exact)}

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Compare the results of each pair; see the class.

        Raises:
            StoreError: relevance is damaged.
        """
        subject = request.subject
        rows: list[Row] = []
        for pair in pairs_of(subject):
            found, truth = pair.values()
            distance, size = float(np.linalg.norm(found - truth)), float(np.linalg.norm(truth))
            result = ResultName.parse(pair.approximate.name)
            row: Row = {
                "method": str(ResultName(result.method, result.by)),
                "steps": pair.steps,
                "columns": found.shape[1],
            }
            row |= {"distance": distance, "relative_error": distance / max(size, _TINY)}
            row["wrong_signs"] = float((found * truth < 0).mean())
            rows.append(row | with_interval("spearman", spearmans(found, truth)))
        says = [
            f"against {EXACT} after as many steps; wrong_signs: share of all pairs; spearman: "
            f"over samples, {INTERVAL}"
        ]
        says += [f"more to compare: run {command}" for command in missing(subject)]
        return Result(rows, {"n_tests": subject.n_tests}, says, _plot(rows))


def pairs_of(subject: Subject) -> list[Pair]:
    """Return the pairs to compare, in order of method, grouping of test samples, and steps.

    Raises:
        RunError: there is no pair to compare.
    """
    there, run = _by_result(subject), subject.run
    if not any(result.method == EXACT for result in there):
        needed = reducing(run, ResultName(EXACT))
        raise RunError(f"{run.path} has no {EXACT} to compare others with: run {needed} first")
    found = []
    for result, own in there.items():
        truth = there.get(replace(result, method=EXACT))
        if result.method not in METHODS or truth is None:
            continue
        columns = _shared(own.columns, truth.columns)
        if len(columns[0]):
            found.append(
                Pair(
                    subject.n_steps if result.up_to_step is None else result.up_to_step,
                    own,
                    truth,
                    columns,
                )
            )
    if not found:
        raise RunError(
            f"{run.path} has only {EXACT}, and nothing to compare it with: run "
            f"{missing(subject)[0]} first"
        )

    def place(pair: Pair) -> tuple[int, int, int]:
        result = ResultName.parse(pair.approximate.name)
        return METHODS.index(result.method), (None, *GROUPINGS).index(result.by), pair.steps

    return sorted(found, key=place)


def missing(subject: Subject) -> list[str]:
    """Return the commands that would add rows to the table.

    A command is missing if one result of a pair was reduced, and the other was not reduced for
    the same steps and test samples.
    """
    there = _by_result(subject)
    commands = []
    for result, own in there.items():
        other = replace(result, method=EXACT if result.method in METHODS else METHODS[0])
        known = there.get(other)
        if known is None or not len(_shared(own.columns, known.columns)[0]):
            tests = (
                None
                if own.columns.n_tests == subject.n_tests
                else write_selection(own.columns.tests)
            )
            commands.append(reducing(subject.run, other, tests))
    return list(dict.fromkeys(commands))


def _by_result(subject: Subject) -> dict[ResultName, Relevance]:
    """Return the results of `METHODS` and of `EXACT`, without those of a limited rank."""
    found = {
        ResultName.parse(name): relevance for name, relevance in subject.all_relevance().items()
    }
    return {
        result: r
        for result, r in found.items()
        if result.method in (*METHODS, EXACT) and result.rank is None
    }


def _shared(a: ResultColumns, b: ResultColumns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the columns of `a`, and those of `b`, that both have.

    Two columns match if they belong to the same test sample, or are means over the same test
    samples.
    """
    if a.by is None:
        _, of_a, of_b = np.intersect1d(
            a.test_ids, b.test_ids, assume_unique=True, return_indices=True
        )
        return of_a, of_b
    same = np.arange(a.n_columns if a == b else 0)
    return same, same


def _plot(rows: list[Row]) -> Plot:
    def draw(axes: Any) -> None:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axes.semilogy(
                [row["steps"] for row in own],
                [row["relative_error"] for row in own],
                marker="o",
                label=method,
            )
        axes.set_xlabel("steps")
        axes.set_ylabel(f"error relative to {EXACT}")
        axes.legend()

    return draw
