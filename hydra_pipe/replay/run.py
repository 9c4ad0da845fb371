"""`reduce --method hydra-exact`: which pipeline is replayed, for which test samples, and what must be there before."""

import os
from dataclasses import replace
from typing import Any

from hydra_pipe.loading import pipeline_of, with_probe
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.checks import requested
from hydra_pipe.reduction.request import Options, Request
from hydra_pipe.reduction.run import described, reduce_request, solve
from hydra_pipe.replay.solver import LowRankReplay, Replay
from hydra_pipe.training.pipeline import Pipeline

# The method that answers for what `--rank` leaves over.
APPROXIMATION = "hydra-fisher"
_ADVICE = (
    "hydra-exact trains again, and needs that. Give it as hydra_pipe.reduce(run, method='hydra-exact', pipeline=...), newly built"
)


def reduce_exact(
    run: str | os.PathLike[str],
    options: Options,
    pipeline: "str | Pipeline | None",
    dataset: Any,
    *,
    overwrite: bool,
    progress: Progress,
) -> bool:
    """As `hydra_pipe.reduce`, for a method that trains again.

    Args:
        run: directory of the run.
        options: as given.
        pipeline: of the run, newly built, or the file that builds it; None: as it was recorded.
        dataset: of the probe that the test samples are of; None: as it was taken.
        overwrite, progress: see `hydra_pipe.reduce`.
    """
    request = requested(run, options)
    if options.rank is not None:
        approximate = _approximate(request)
        if reduce_request(approximate, progress=progress):
            progress.say(f"{approximate.name} is there: it answers for what {options.rank} directions leave over")
    return solve([_solver(request, pipeline, dataset)], overwrite=overwrite, progress=progress)


def plan_exact(run: str | os.PathLike[str], options: Options, pipeline: "str | Pipeline | None", dataset: Any) -> str:
    """What `reduce_exact` would do, in lines for people. Builds the pipeline, and tries a step."""
    return described([_solver(requested(run, options), pipeline, dataset)])


def _solver(request: Request, pipeline: "str | Pipeline | None", dataset: Any) -> Replay:
    load = pipeline_of(request.directory, pipeline, _ADVICE)
    if request.options.test is not None:
        load = with_probe(request.directory, load, request.options.test, dataset)
    if request.options.rank is None:
        return Replay(request, load)
    return LowRankReplay(request, load, request.options.rank, _approximate(request).name)


def _approximate(request: Request) -> Request:
    return requested(request.directory.path, replace(request.options, method=APPROXIMATION, rank=None))
