"""A whole report: what there is to tell is gathered, and the page takes its place."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.reporting.source import Source, evaluations_of
from hydra_pipe.store import names
from hydra_pipe.store.files import remove_partials_of, replace_file, sync
from hydra_pipe.store.results import ResultName, result_of
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stage_runner import Work, running, taken_up
from hydra_pipe.store.stages import REDUCE, REPORT, Settings, StageId
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.reporting.content import Content
    from hydra_pipe.reporting.gathering import Gathering
    from hydra_pipe.training.pipeline import Pipeline

# facts: the evaluations that a report tells of, by stage; and why it shows no samples
_EVALUATIONS, _NO_SAMPLES = "of_evaluations", "no_samples"
# packages of the extra "report", as they are imported
_NEEDED = ("jinja2", "matplotlib", "PIL")


def report_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    test: str | None = None,
    tests: str | None = None,
    top: int = 5,
    memory: str = "4GiB",
    pipeline: "str | Pipeline | None" = None,
    samples: ShownSamples | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write a page about a reduced run, one HTML file that needs nothing else: `report.html`, or `report-METHOD.html` of a result
    other than "hydra". docs/report.md tells what is on it.

    Samples are drawn, and predictions made, by the pipeline that the recording names, which is built anew. Where that is not known,
    or cannot be built any more, the page has ids and labels, and says why.

    Args:
        run: directory of the run.
        method: whose relevance.
        test: for the samples of this probe, instead of the run's own test samples.
        tests: which test samples to show, such as "0-99,150"; if absent those that tell most: wrongly predicted, and of high loss.
        top: training samples a side ("helpful", "harmful") for each of them.
        memory: budget for the whole process, such as "4GiB".
        pipeline: "path/to/file.py:function" where the file has moved; a newly built Pipeline where such an object was recorded,
            whose model gets the final parameters.
        samples: to be drawn where there is no pipeline, as of a loop of one's own; of a probe, its own as `test`.
        overwrite: write it again though it is there.
        progress: where to show progress; nowhere if absent.

    Where an evaluation of the run was made since, the page is written anew.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, or it has no relevance of that method.
        StoreError: it is damaged.
        BudgetError: the budget is too small.
        UsageError: `top` or `tests` cannot be, both a pipeline and samples are given, or a package is missing; the message says
            what to install.
    """
    method = result_of(method, test)
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if pipeline is not None and samples is not None:
        raise UsageError("give a pipeline, which has its samples, or samples, not both")
    if ResultName.parse(method).is_of_itself:
        raise UsageError(f"--method {method} is of no test samples, and no report: export puts it into samples.parquet")
    memory_bytes = parse_bytes(memory)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a report needs Jinja2, Matplotlib and Pillow, and there is no {missing[0]}: pip install 'hydra-pipe[report]'"
        )
    directory = RunDirectory.open(run)
    directory.require(REDUCE.of(method), f"hydra-pipe reduce {directory.path} --method {method}")
    source = Source.open(directory, method)
    selected = source.selected(tests)
    stage, settings = REPORT.of(method), {names.TESTS: selected, "top": top}
    progress = progress or Progress()

    def has_work() -> bool:
        return overwrite or _has_work(directory, stage, settings, pipeline or samples)

    with taken_up(directory, stage, has_work=has_work, progress=progress) as is_needed:
        if is_needed:
            with running(directory, stage, settings) as work:
                # of the packages that may be missing
                from hydra_pipe.reporting.gathering import Gathering

                gathering = Gathering(source, selected, top, memory_bytes, progress)
                _write(work, gathering, gathering.content(pipeline, samples), progress)
    return is_needed


def _write(work: Work, gathering: "Gathering", content: "Content", progress: Progress) -> None:
    """Put the page in its place, safe on the disk."""
    from hydra_pipe.reporting.page import page_of

    page = page_of(content)
    for text in page.left_out:
        progress.say(f"to stay small the report leaves out {text}")
    remove_partials_of(work.place)
    replace_file(work.place, [page.html])
    sync(work.place.parent)
    work.facts |= {
        "n_bytes": len(page.html),
        "n_shown": page.n_columns,
        "left_out": page.left_out,
        _NO_SAMPLES: gathering.no_samples,
        _EVALUATIONS: evaluations_of(work.run),
    }


def _has_work(directory: RunDirectory, stage: StageId, settings: Settings, given: "str | Pipeline | ShownSamples | None") -> bool:
    """Tell whether there is no page, or one that lacks what there is now: evaluations, or samples where it could draw none."""
    if directory.has_work(stage, settings):
        return True
    facts = directory.stages[stage].facts
    return facts.get(_EVALUATIONS) != evaluations_of(directory) or (given is not None and facts.get(_NO_SAMPLES) is not None)
