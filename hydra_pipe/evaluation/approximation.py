"""How far relevance without the Hessian is from that with it, as training goes on: the study of the HYDRA paper (AAAI 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError
from hydra_pipe.evaluation.evaluator import Evaluator, Request
from hydra_pipe.evaluation.result import Plot, Result, Row
from hydra_pipe.maths.ranks import spearmans
from hydra_pipe.plan.selection import write_selection
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.subject import Relevance, Subject, reducing
from hydra_pipe.store.relevance import Columns
from hydra_pipe.store.results import GROUPINGS, ResultName

EXACT = "hydra-exact"
METHODS = ("hydra", "hydra-fisher", "influence")
_TINY = 1e-30


@dataclass(frozen=True)
class Pair:
    """An approximate result and the exact one.

    Args:
        steps: that both are of.
        approximate, exact: what is compared.
        columns: of either that are of the same test samples, or groups of them. Shape (column,).
    """

    steps: int
    approximate: Relevance
    exact: Relevance
    columns: tuple[NDArray[np.int64], NDArray[np.int64]]

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of both, shape (sample, column). Raises: StoreError: damaged."""
        found, truth = (r.values()[:, ids] for r, ids in zip((self.approximate, self.exact), self.columns, strict=True))
        return found.astype(np.float64), truth.astype(np.float64)


class Approximation(Evaluator):
    """Hold `METHODS` against `EXACT` at the end, and after each number of steps for which both were reduced, for the test samples
    that both have; or for means over the same ones. Trains nothing.

    By method and step, over all samples and columns: `distance`, the Euclidean norm of the difference, in units of the test loss;
    `relative_error`, that over the norm of the exact one; `wrong_signs`, the share of pairs in which one says helpful and the other
    harmful; `spearman`, over samples, mean over columns.
    """

    def scored(self, subject: Subject, methods: str | None) -> Mapping[str, Relevance]:
        """Both of each pair. Raises: RunError: see `pairs_of`."""
        return {r.name: r for pair in pairs_of(subject) for r in (pair.approximate, pair.exact)}

    def evaluate(self, request: Request) -> Result:
        """See the class. Raises: StoreError: relevance is damaged."""
        subject = request.subject
        rows: list[Row] = []
        for pair in pairs_of(subject):
            found, truth = pair.values()
            distance, size = float(np.linalg.norm(found - truth)), float(np.linalg.norm(truth))
            result = ResultName.parse(pair.approximate.name)
            row: Row = {"method": str(ResultName(result.method, result.by)), "steps": pair.steps, "columns": found.shape[1]}
            row |= {"distance": distance, "relative_error": distance / max(size, _TINY)}
            row["wrong_signs"] = float((found * truth < 0).mean())
            rows.append(row | with_interval("spearman", spearmans(found, truth)))
        says = [f"against {EXACT} after as many steps; wrong_signs: share of all pairs; spearman: over samples, {INTERVAL}"]
        says += [f"more to compare: run {command}" for command in missing(subject)]
        return Result(rows, {"n_tests": subject.n_tests}, says, _plot(rows))


def pairs_of(subject: Subject) -> list[Pair]:
    """What can be compared, by method, grouping of the test samples and steps. Raises: RunError: nothing can be."""
    there, run = _by_result(subject), subject.run
    if not any(result.method == EXACT for result in there):
        needed = reducing(run, ResultName(EXACT))
        raise RunError(f"{run.path} has no {EXACT} to hold others against: run {needed} first")
    found = []
    for result, own in there.items():
        truth = there.get(replace(result, method=EXACT))
        if result.method not in METHODS or truth is None:
            continue
        columns = _shared(own.columns, truth.columns)
        if len(columns[0]):
            found.append(Pair(subject.n_steps if result.upto is None else result.upto, own, truth, columns))
    if not found:
        raise RunError(f"{run.path} has only {EXACT}, and nothing to compare: run {missing(subject)[0]} first")

    def place(pair: Pair) -> tuple[int, int, int]:
        result = ResultName.parse(pair.approximate.name)
        return METHODS.index(result.method), (None, *GROUPINGS).index(result.by), pair.steps

    return sorted(found, key=place)


def missing(subject: Subject) -> list[str]:
    """Commands that would make the table fuller: one was reduced, and the other was not, of these steps and test samples."""
    there = _by_result(subject)
    commands = []
    for result, own in there.items():
        other = replace(result, method=EXACT if result.method in METHODS else METHODS[0])
        known = there.get(other)
        if known is None or not len(_shared(own.columns, known.columns)[0]):
            tests = None if own.columns.n_tests == subject.n_tests else write_selection(own.columns.tests)
            commands.append(reducing(subject.run, other, tests))
    return list(dict.fromkeys(commands))


def _by_result(subject: Subject) -> dict[ResultName, Relevance]:
    """The results of `METHODS`, and `EXACT`, of all directions."""
    found = {ResultName.parse(name): relevance for name, relevance in subject.all_relevance().items()}
    return {result: r for result, r in found.items() if result.method in (*METHODS, EXACT) and result.rank is None}


def _shared(a: Columns, b: Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which columns of `a`, and of `b`, are of the same: test samples, or means over the same ones."""
    if a.by is None:
        _, of_a, of_b = np.intersect1d(a.test_ids, b.test_ids, assume_unique=True, return_indices=True)
        return of_a, of_b
    same = np.arange(a.n_columns if a == b else 0)
    return same, same


def _plot(rows: list[Row]) -> Plot:
    def draw(axes: Any) -> None:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axes.semilogy([row["steps"] for row in own], [row["relative_error"] for row in own], marker="o", label=method)
        axes.set_xlabel("steps")
        axes.set_ylabel(f"error relative to {EXACT}")
        axes.legend()

    return draw
