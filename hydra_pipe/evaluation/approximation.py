"""How far relevance without the Hessian is from that with it, as training goes on: the study of the HYDRA paper (AAAI 2021)."""

from typing import Any

import numpy as np

from hydra_pipe.errors import RunError
from hydra_pipe.evaluation.result import INTERVAL, Plot, Result, Row, with_interval
from hydra_pipe.evaluation.subject import Relevance, Subject
from hydra_pipe.maths.ranks import spearmans
from hydra_pipe.store.relevance import result_name
from hydra_pipe.store.run import UPTO, reduce_stage

EXACT = "hydra-exact"
METHODS = ("hydra", "hydra-fisher", "influence")
_TINY = 1e-30


def approximation(subject: Subject) -> Result:
    """Hold `METHODS` against `EXACT` at the end, and after each number of steps for which both were reduced. Trains nothing.

    By method and step, over all samples and tests: `distance`, the Euclidean norm of the difference, in units of the test loss;
    `relative_error`, that over the norm of the exact one; `wrong_signs`, the share of pairs in which one says helpful and the other
    harmful; `spearman`, over samples, mean over tests.

    Args:
        subject: what is evaluated.

    Raises:
        RunError: there is no exact relevance, or nothing to hold against it at the same steps; the message says what to reduce.
        StoreError: relevance is damaged.
    """
    pairs = pairs_of(subject)
    rows: list[Row] = []
    for step, method, approximate, exact in pairs:
        found, truth = (relevance.values().astype(np.float64) for relevance in (approximate, exact))
        distance, size = float(np.linalg.norm(found - truth)), float(np.linalg.norm(truth))
        row: Row = {"method": method, "steps": step, "distance": distance, "relative_error": distance / max(size, _TINY)}
        row["wrong_signs"] = float((found * truth < 0).mean())
        rows.append(row | with_interval("spearman", spearmans(found, truth)))
    says = [f"against {EXACT} after as many steps; wrong_signs: share of all pairs; spearman: over samples, {INTERVAL}"]
    says += [f"more to compare: run {command}" for command in missing(subject)]
    return Result(rows, {"n_tests": subject.n_tests}, says, _plot(rows))


def pairs_of(subject: Subject) -> list[tuple[int, str, Relevance, Relevance]]:
    """Steps, method, its relevance, and the exact one. Raises: RunError: there is none."""
    there, run = subject.all_relevance(), subject.run.path
    stages = [subject.run.stages[reduce_stage(name)] for name in there]
    uptos = {stage.count(UPTO, least=1) for stage in stages if UPTO in stage.settings}
    # the end comes last, and its arrays have no number in their names
    ends: list[tuple[int, int | None]] = [*((step, step) for step in sorted(uptos)), (subject.n_steps, None)]
    exact = {upto: there.get(result_name(EXACT, None, upto)) for _, upto in ends}
    if not any(exact.values()):
        raise RunError(f"{run} has no {EXACT} to hold others against: run hydra-pipe reduce {run} --method {EXACT} first")
    found = []
    for step, upto in ends:
        of_step, truth = [(m, there.get(result_name(m, None, upto))) for m in METHODS], exact[upto]
        if truth is not None:
            found += [(step, m, own, truth) for m, own in of_step if own is not None and own.n_tests == truth.n_tests]
    if not found:
        raise RunError(f"{run} has only {EXACT}, and nothing to compare: run {missing(subject)[0]} first")
    return sorted(found, key=lambda pair: METHODS.index(pair[1]))


def missing(subject: Subject) -> list[str]:
    """Commands that would make the table fuller: after these steps one was reduced, and not the other."""
    there, run = subject.all_relevance(), subject.run.path
    commands = []
    for name in there:
        method, _, upto = name.partition("-upto-")
        other = EXACT if method in METHODS else METHODS[0] if method == EXACT else None
        if other is not None and result_name(other, None, int(upto) if upto else None) not in there:
            commands.append(f"hydra-pipe reduce {run} --method {other}" + (f" --upto {upto}" if upto else ""))
    return list(dict.fromkeys(commands))


def _plot(rows: list[Row]) -> Plot:
    def draw(axes: Any) -> None:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axes.semilogy([row["steps"] for row in own], [row["relative_error"] for row in own], marker="o", label=method)
        axes.set_xlabel("steps")
        axes.set_ylabel(f"error relative to {EXACT}")
        axes.legend()

    return draw
