"""A whole report: its content is gathered, and the page is put in its place."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.reporting.source import ReportSource, evaluations_of
from hydra_pipe.store import names
from hydra_pipe.store.files import remove_partials_of, replace_file, sync
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName, result_of
from hydra_pipe.store.run.stage_runner import Work, running, taken_up
from hydra_pipe.store.run.stages import REDUCE, REPORT, Settings, StageId
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.reporting.content import Content
    from hydra_pipe.reporting.gathering import Gathering
    from hydra_pipe.training.pipeline import Pipeline

# Facts of the stage: checksums of the evaluations on the page, by stage; and why it shows no
# samples.
_EVALUATIONS, _NO_SAMPLES = "of_evaluations", "no_samples"
# Packages of the extra "report", by the names they are imported with.
_NEEDED = ("jinja2", "matplotlib", "PIL")


def report_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    probe: str | None = None,
    tests: str | None = None,
    top: int = 5,
    memory: str = "4GiB",
    pipeline: "str | Pipeline | None" = None,
    samples: ShownSamples | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write a page about a reduced run, as one HTML file that needs nothing else.

    The file is `report.html`, or `report-METHOD.html` for a result other than "hydra".
    docs/report.md describes the page.

    The pipeline named in the recording is built anew, to draw samples and make predictions. If
    it is not known, or can no longer be built, the page has ids and labels, and says why. If the
    run was evaluated since, the page is written anew.

    Args:
        run: directory of the run.
        method: name of the result to report on.
        probe: name of a probe, whose samples replace the run's own test samples.
        tests: test samples to show, such as "0-99,150". Default: those that tell most, wrongly
            predicted or of high loss.
        top: number of training samples on each side ("helpful", "harmful") of each test sample.
        memory: budget for the whole process, such as "4GiB".
        pipeline: "path/to/file.py:function" if the file has moved, or a newly built Pipeline if
            such an object was recorded. Its model gets the final parameters.
        samples: samples to draw if there is no pipeline, as for a loop of one's own. For a
            probe, its own samples are the `test` ones.
        overwrite: write the page again even if it is there.
        progress: place to show progress. Default: nowhere.

    Returns:
        True if there was anything to do, else False.

    Raises:
        RunError: there is no run, or it has no relevance of this method.
        StoreError: the run is damaged.
        BudgetError: the budget is too small.
        UsageError: `top` or `tests` has an impossible value, both a pipeline and samples are
            given, or a package is missing. The message says what to install.
    """
    method = result_of(method, probe)
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if pipeline is not None and samples is not None:
        raise UsageError("give a pipeline or samples, not both: a pipeline has samples of its own")
    if ResultName.parse(method).is_of_itself:
        raise UsageError(
            f"--method {method} has no test samples, so there is no report about it: export puts "
            "it into samples.parquet"
        )
    memory_bytes = parse_bytes(memory)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a report needs Jinja2, Matplotlib and Pillow, and {missing[0]} is not installed: "
            "pip install 'hydra-pipe[report]'"
        )
    directory = RunDirectory.open(run)
    directory.require(REDUCE.of(method), f"hydra-pipe reduce {directory.path} --method {method}")
    source = ReportSource.open(directory, method)
    selected = source.selected(tests)
    stage, settings = REPORT.of(method), {names.TESTS: selected, "top": top}
    progress = progress or Progress()

    def has_work() -> bool:
        return overwrite or _has_work(directory, stage, settings, pipeline or samples)

    with taken_up(directory, stage, has_work=has_work, progress=progress) as is_needed:
        if is_needed:
            with running(directory, stage, settings) as work:
                # imported here, because it needs packages that may be missing
                from hydra_pipe.reporting.gathering import Gathering

                gathering = Gathering(source, selected, top, memory_bytes, progress)
                _write(work, gathering, gathering.content(pipeline, samples), progress)
    return is_needed


def _write(work: Work, gathering: "Gathering", content: "Content", progress: Progress) -> None:
    """Write the page in its place, and flush it to the disk."""
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


def _has_work(
    directory: RunDirectory,
    stage: StageId,
    settings: Settings,
    given: "str | Pipeline | ShownSamples | None",
) -> bool:
    """Tell whether the page is missing, or lacks evaluations or samples that are available now."""
    if directory.has_work(stage, settings):
        return True
    facts = directory.stages[stage].facts
    return facts.get(_EVALUATIONS) != evaluations_of(directory) or (
        given is not None and facts.get(_NO_SAMPLES) is not None
    )
