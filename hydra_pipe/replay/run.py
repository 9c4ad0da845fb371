"""`reduce --method hydra-exact`: its pipeline, test samples, and the approximation of `--rank`."""

import os
from dataclasses import replace
from typing import Any

from hydra_pipe.loading import pipeline_of, with_probe
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.checks import requested
from hydra_pipe.reduction.request import Options, ReductionRequest
from hydra_pipe.reduction.run import ReductionPlan, planned, reduce_request, solve
from hydra_pipe.replay.solver import LowRankReplay, Replay
from hydra_pipe.training.pipeline import Pipeline

# Method that answers for the part of the test gradients outside the `--rank` directions.
APPROXIMATION = "hydra-fisher"
_ADVICE = (
    "hydra-exact trains the pipeline again. Build the pipeline anew, and give it as "
    "hydra_pipe.reduce(run, method='hydra-exact', pipeline=...)"
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
    """Do what `hydra_pipe.reduce` does, for a method that trains again.

    Args:
        run: directory of the run.
        options: options, as given.
        pipeline: pipeline of the run, newly built, or the file that builds it. None: the file that
            the recording names.
        dataset: dataset of the probe that has the test samples. None: the dataset that the probe
            names.
        overwrite: same as in `hydra_pipe.reduce`.
        progress: same as in `hydra_pipe.reduce`.

    Returns:
        Whether there was anything to do.
    """
    request = requested(run, options)
    if options.rank is not None:
        approximate = _approximate(request)
        if reduce_request(approximate, progress=progress):
            progress.say(
                f"{approximate.name} is there, and answers for the rest beside {options.rank} "
                "directions"
            )
    return solve([_solver(request, pipeline, dataset)], overwrite=overwrite, progress=progress)


def plan_exact(
    run: str | os.PathLike[str], options: Options, pipeline: "str | Pipeline | None", dataset: Any
) -> ReductionPlan:
    """Plan the work of `reduce_exact`. Builds the pipeline, and tries a step."""
    return planned([_solver(requested(run, options), pipeline, dataset)])


def _solver(request: ReductionRequest, pipeline: "str | Pipeline | None", dataset: Any) -> Replay:
    load = pipeline_of(request.directory, pipeline, _ADVICE)
    if request.options.probe is not None:
        load = with_probe(request.directory, load, request.options.probe, dataset)
    if not isinstance(request.options.rank, int):
        return Replay(request, load)
    return LowRankReplay(request, load, request.options.rank, _approximate(request).name)


def _approximate(request: ReductionRequest) -> ReductionRequest:
    return requested(
        request.directory.path, replace(request.options, method=APPROXIMATION, rank=None)
    )
