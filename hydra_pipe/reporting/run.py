"""A whole report: its content is gathered, and the page is put in its place."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.shown import ShownSamples
from hydra_pipe.reporting.source import ReportSource, cleaning_of, evaluations_of
from hydra_pipe.store import names
from hydra_pipe.store.files import remove_partials_of, replace_file, sync
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, DYNAMICS, ResultName, result_of
from hydra_pipe.store.run.stage_runner import Work, running, taken_up
from hydra_pipe.store.run.stages import COMBINE, REDUCE, REPORT, Settings, StageId
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.reporting.content import Content
    from hydra_pipe.reporting.gathering import Gathering
    from hydra_pipe.training.pipeline import Pipeline

# Facts of the stage: checksums of the evaluations on the page, by stage; checksums of the
# proposal of labels; and why the page shows no samples.
_EVALUATIONS, _CLEANING, _NO_SAMPLES = "of_evaluations", "of_clean", "no_samples"
# Packages of the extra "report", by the names they are imported with.
_NEEDED = ("jinja2", "matplotlib", "PIL")


def report_run(
    run: str | os.PathLike[str],
    *,
    method: str | None = None,
    probe: str | None = None,
    tests: str | None = None,
    top: int = 5,
    memory: str = "4GiB",
    pipeline: "str | Pipeline | None" = None,
    samples: ShownSamples | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write a page about a run, as one HTML file that needs nothing else.

    The page begins with the labels that look wrong. With relevance it also shows which training
    samples made the predictions. The file is `report.html` for the result "hydra-fisher", else
    `report-METHOD.html`. docs/report.md describes the page.

    The pipeline named in the recording is built anew, to draw samples and make predictions. If
    it is not known, or can no longer be built, the page has ids and labels, and says why. If the
    run was evaluated since, or `clean` has proposed other labels, the page is written anew.

    Args:
        run: directory of the run.
        method: name of the result to report on, or "dynamics" for the recording alone. Default:
            "hydra-fisher" if it was reduced; else the first result that combines runs, or
            "dynamics".
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
        RunError: there is no run, its recording is not complete, or it has no relevance of this
            method.
        StoreError: the run is damaged.
        BudgetError: the budget is too small.
        UsageError: `top` or `tests` has an impossible value, both a pipeline and samples are
            given, or a package is missing. The message says what to install.
    """
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if pipeline is not None and samples is not None:
        raise UsageError("give a pipeline or samples, not both: a pipeline has samples of its own")
    memory_bytes = parse_bytes(memory)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a report needs Jinja2, Matplotlib and Pillow, and {missing[0]} is not installed: "
            "pip install 'hydra-pipe[report]'"
        )
    directory = RunDirectory.open(run)
    method = reported(directory, method, probe)
    if method == DYNAMICS:
        directory.require_recording()
    else:
        directory.require(
            REDUCE.of(method), f"hydra-pipe reduce {directory.path} --method {method}"
        )
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


def reported(directory: RunDirectory, method: str | None, probe: str | None) -> str:
    """Return the result that `--method METHOD --probe NAME` asks a report about.

    Raises:
        UsageError: there can be no report about it.
    """
    if method is None:
        is_reduced = probe is not None or REDUCE.of(DEFAULT_METHOD) in directory.stages
        combined = directory.complete(COMBINE)
        method = DEFAULT_METHOD if is_reduced else next(iter(combined), DYNAMICS)
    if method == DYNAMICS and probe is not None:
        raise UsageError(
            f"--method {method} --probe {probe}: only relevance is about a probe: leave out "
            "--method"
        )
    method = result_of(method, probe)
    if ResultName.parse(method).is_of_itself:
        raise UsageError(
            f"--method {method} has no test samples, so there is no report about it: export puts "
            "it into samples.parquet"
        )
    return method


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
        "n_labels": page.n_labels,
        "left_out": page.left_out,
        _NO_SAMPLES: gathering.no_samples,
        _EVALUATIONS: evaluations_of(work.run),
        _CLEANING: cleaning_of(work.run),
    }


def _has_work(
    directory: RunDirectory,
    stage: StageId,
    settings: Settings,
    given: "str | Pipeline | ShownSamples | None",
) -> bool:
    """Tell whether the page is missing, or lacks what is available now.

    It may lack evaluations, samples, or the labels that `clean` proposes.
    """
    if directory.has_work(stage, settings):
        return True
    facts = directory.stages[stage].facts
    return (
        facts.get(_EVALUATIONS) != evaluations_of(directory)
        or (_CLEANING in facts and facts[_CLEANING] != cleaning_of(directory))
        or (given is not None and facts.get(_NO_SAMPLES) is not None)
    )
