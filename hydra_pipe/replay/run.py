"""`reduce --method hydra-exact`: which pipeline is replayed, and what must be there before."""

import os
from collections.abc import Callable
from dataclasses import replace

from hydra_pipe.errors import RunError
from hydra_pipe.loading import load_pipeline, recorded_assignments
from hydra_pipe.progress import Progress
from hydra_pipe.recording.pipeline import Pipeline, described
from hydra_pipe.recording.settings import json_settings
from hydra_pipe.reduction.request import Options, Request, requested
from hydra_pipe.reduction.run import plan_request, reduce_request
from hydra_pipe.replay.engine import LowRankReplay, Replay
from hydra_pipe.store.run import RECORD

# The method that answers for what `--rank` leaves over.
APPROXIMATION = "hydra-fisher"


def reduce_exact(
    run: str | os.PathLike[str], options: Options, pipeline: "str | Pipeline | None", *, overwrite: bool, progress: Progress
) -> bool:
    """As `hydra_pipe.reduce`, for a method that trains again.

    Args:
        run: directory of the run.
        options: as given.
        pipeline: of the run, newly built, or the file that builds it; None: as it was recorded.
        overwrite, progress: see `hydra_pipe.reduce`.
    """
    request = requested(run, options)
    if options.rank is not None:
        approximate = _approximate(request)
        if reduce_request(approximate, progress=progress):
            progress.say(f"{approximate.name} is there: it answers for what {options.rank} directions leave over")
    return reduce_request(_with_engine(request, pipeline), overwrite=overwrite, progress=progress)


def plan_exact(run: str | os.PathLike[str], options: Options, pipeline: "str | Pipeline | None") -> str:
    """What `reduce_exact` would do, in lines for people. Builds the pipeline, and tries a step."""
    return plan_request(_with_engine(requested(run, options), pipeline))


def _with_engine(request: Request, pipeline: "str | Pipeline | None") -> Request:
    load = _loader(request, pipeline)
    if request.options.rank is None:
        return replace(request, engine=Replay(request, load))
    return replace(request, engine=LowRankReplay(request, load, request.options.rank, _approximate(request).name))


def _approximate(request: Request) -> Request:
    return requested(request.directory.path, replace(request.options, method=APPROXIMATION, rank=None))


def _loader(request: Request, given: "str | Pipeline | None") -> Callable[[], Pipeline]:
    """Builds the pipeline of a run. Raises: RunError: it is not known."""
    path, settings = request.directory.path, request.directory.stages[RECORD].settings
    recorded = settings.get("pipeline")
    spec = given if given is not None else recorded
    if not isinstance(spec, str | Pipeline):
        raise RunError(
            f"{path} was recorded by a loop of one's own, or from a Pipeline object: hydra-exact trains again, and needs that. "
            f"Give it as hydra_pipe.reduce(run, method='hydra-exact', pipeline=...), newly built"
        )

    def load() -> Pipeline:
        built = spec if isinstance(spec, Pipeline) else load_pipeline(spec, recorded_assignments(settings)).build()
        for name, value in json_settings(described(built)).items():
            if name in settings and settings[name] != value:
                raise RunError(f"{path} was recorded with {name} {settings[name]}, and the pipeline has {value}: it is another one")
        return built

    return load
