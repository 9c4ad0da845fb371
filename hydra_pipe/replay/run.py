"""`reduce --method hydra-exact`: which pipeline is replayed, for which test samples, and what must be there before."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hydra_pipe.errors import RunError
from hydra_pipe.loading import load_dataset, pipeline_of, recorded_assignments
from hydra_pipe.progress import Progress
from hydra_pipe.recording.batches import probe_batches
from hydra_pipe.recording.pipeline import Pipeline, check_dataset
from hydra_pipe.recording.testing import digest_of
from hydra_pipe.reduction.request import Options, Request, requested
from hydra_pipe.reduction.run import plan_request, reduce_request
from hydra_pipe.replay.engine import LowRankReplay, Replay
from hydra_pipe.store.commands import DATASET
from hydra_pipe.store.probes import SAMPLES
from hydra_pipe.store.run import probe_stage

# The method that answers for what `--rank` leaves over.
APPROXIMATION = "hydra-fisher"


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
    return reduce_request(_with_engine(request, pipeline, dataset), overwrite=overwrite, progress=progress)


def plan_exact(run: str | os.PathLike[str], options: Options, pipeline: "str | Pipeline | None", dataset: Any) -> str:
    """What `reduce_exact` would do, in lines for people. Builds the pipeline, and tries a step."""
    return plan_request(_with_engine(requested(run, options), pipeline, dataset))


def _with_engine(request: Request, pipeline: "str | Pipeline | None", dataset: Any) -> Request:
    advice = (
        "hydra-exact trains again, and needs that. Give it as hydra_pipe.reduce(run, method='hydra-exact', pipeline=...), newly "
        "built"
    )
    load = pipeline_of(request.directory, pipeline, advice)
    if request.options.test is not None:
        load = _probed(request, load, request.options.test, dataset)
    if request.options.rank is None:
        return replace(request, engine=Replay(request, load))
    return replace(request, engine=LowRankReplay(request, load, request.options.rank, _approximate(request).name))


def _approximate(request: Request) -> Request:
    return requested(request.directory.path, replace(request.options, method=APPROXIMATION, rank=None))


def _probed(request: Request, load: Callable[[], Pipeline], name: str, given: Any) -> Callable[[], Pipeline]:
    """Builds the pipeline, with the samples of probe `name` as its tests. Raises: RunError: these are not known, or others now."""
    path, settings = request.directory.path, request.directory.stages[probe_stage(name)].settings
    spec = settings.get(DATASET)
    if given is None and not isinstance(spec, str):
        raise RunError(
            f"{path}: probe {name} is of a dataset that was given as an object, and hydra-exact needs its samples: give it again, "
            f"as hydra_pipe.reduce(run, method='hydra-exact', test='{name}', dataset=...)"
        )

    def probed() -> Pipeline:
        pipeline = load()
        dataset = load_dataset(str(spec), recorded_assignments(settings)).build() if given is None else given
        check_dataset(f"the dataset of probe {name}", dataset)
        if digest_of(probe_batches(dataset, pipeline.seed, pipeline.batch_size)) != settings.get(SAMPLES):
            raise RunError(
                f"{path}: the samples of probe {name} are others than those that it was taken of: give these, or take it again "
                f"with hydra-pipe probe --overwrite"
            )
        return replace(pipeline, test=dataset, test_labels=None)

    return probed
