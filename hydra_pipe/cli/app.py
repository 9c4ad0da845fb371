"""The commands. Each one parses its options, calls the API and prints the result."""

import json
import os
from typing import Annotated, Any

import typer

from hydra_pipe import api
from hydra_pipe.cli.endings import say_recorded, say_worst
from hydra_pipe.cli.failures import explained
from hydra_pipe.cli.options import (
    Blocks,
    By,
    Cautious,
    CheckpointEvery,
    Chunks,
    CleanMethod,
    CleanPipeline,
    CleanSeeds,
    CombinedMethod,
    DatasetSpec,
    Debug,
    DecisionsFile,
    Dim,
    DiscardUnfinished,
    Drop,
    DryRun,
    Dtype,
    Encoding,
    Full,
    Into,
    Json,
    Keep,
    KeptTop,
    Kind,
    LeftOut,
    Lowest,
    Mean,
    Memory,
    Method,
    Methods,
    MovedPipeline,
    OfFunction,
    OfPipeline,
    Overwrite,
    PipelineSpec,
    Probe,
    ProbeName,
    Queries,
    QueriesBy,
    Rank,
    RecordSeeds,
    Repair,
    ReportMethod,
    Retrain,
    Retrainings,
    Rounds,
    RunPath,
    RunPaths,
    Samples,
    Scheduler,
    Seeds,
    Set,
    Shown,
    ShownTests,
    TestEvery,
    Tests,
    Threshold,
    Top,
    Undecided,
    UpToStep,
)
from hydra_pipe.cli.rewind import rewind
from hydra_pipe.cli.streams import settled_streams
from hydra_pipe.errors import UsageError, printable
from hydra_pipe.progress import ConsoleProgress
from hydra_pipe.store.run.results import DEFAULT_METHOD
from hydra_pipe.units import format_bytes

# Number of rows of a proposal that are printed.
SHOWN = 10

app = typer.Typer(
    name="hydra-pipe",
    help="Which training samples made a prediction: record a PyTorch run, reduce it out of core, "
    "rank its data.\n\n"
    "Example: hydra-pipe run pipelines/digits.py runs/digits --set noise=0.1",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # takes as long to import as NumPy

        print(f"hydra-pipe {version('hydra-pipe')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@explained
def record(
    pipeline: PipelineSpec,
    run: RunPath,
    set_: Set = [],  # noqa: B006 - Typer makes a new list each time
    encoding: Encoding = "auto",
    dim: Dim = 4096,
    dtype: Dtype = None,
    checkpoint_every: CheckpointEvery = None,
    test_every: TestEvery = None,
    seeds: RecordSeeds = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a pipeline and record every step's per-sample gradients.

    After an interrupt or a kill, the same command resumes from the last checkpoint, to the same
    bytes.

    Example: hydra-pipe record pipelines/digits.py runs/digits --set noise=0.1 --set epochs=30
    """
    done = api.record(
        pipeline,
        run,
        settings=set_,
        encoding=encoding,
        dim=dim,
        dtype=dtype,
        checkpoint_every=checkpoint_every,
        test_every=test_every,
        seeds=seeds,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    if seeds is not None:
        _say(
            done,
            run,
            f"{seeds} runs recorded",
            f"next: hydra-pipe reduce each of {run}/seed-*, then hydra-pipe combine {run}/seed-* "
            f"--into {run}/combined",
        )
        return
    _say(done, run, "recorded", f"next: hydra-pipe reduce {run}")
    if done:
        say_recorded(run)


@app.command()
@explained
def reduce(
    run: RunPath,
    method: Method = DEFAULT_METHOD,
    chunks: Chunks = "auto",
    memory: Memory = "4GiB",
    scheduler: Scheduler = "threads",
    tests: Tests = None,
    by: By = None,
    mean: Mean = False,
    keep_hypergradients: Keep = False,
    up_to_step: UpToStep = None,
    rank: Rank = None,
    probe: Probe = None,
    top: KeptTop = None,
    pipeline: OfPipeline = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Reduce a recording, out of core, to the relevance of each training sample for each test
    sample.

    Example: hydra-pipe reduce runs/digits --memory 2GiB --chunks 2048x4096
    """
    from hydra_pipe.store.run.results import ResultName, parse_rank

    if mean and by is not None:
        raise UsageError("--mean and --by: choose one of them")
    grouping = "mean" if mean else by
    options: dict[str, Any] = {
        "method": method,
        "chunks": chunks,
        "memory": memory,
        "scheduler": scheduler,
        "tests": tests,
        "by": grouping,
        "keep_hypergradients": keep_hypergradients,
        "up_to_step": up_to_step,
        "rank": None if rank is None else parse_rank(rank),
        "probe": probe,
        "top": top,
        "pipeline": pipeline,
    }
    if dry_run:
        print(api.plan_reduction(run, **options))
        return
    done = api.reduce(run, **options, overwrite=overwrite, progress=ConsoleProgress())
    result = ResultName(method, grouping, up_to_step, options["rank"], probe, top is not None)
    which = "" if str(result) == DEFAULT_METHOD else f" --method {result}"
    which += "" if top is None else f" --top {top}"
    if result.is_of_itself:
        whose = ResultName(DEFAULT_METHOD, up_to_step=up_to_step)
        which = (
            f" --method {whose}, or another method: its samples.parquet gets the column "
            "self_relevance"
        )
    _say(done, run, "reduced", f"next: hydra-pipe export {run}{which}")


@app.command()
@explained
def combine(
    runs: RunPaths,
    into: Into,
    method: CombinedMethod = DEFAULT_METHOD,
    memory: Memory = "4GiB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Combine the relevance of several runs, such as of several seeds: mean, standard error,
    and how many runs agree. Samples are matched by their keys, or else by their numbers.

    After an interrupt or a kill, the same command resumes.

    Example: hydra-pipe combine runs/fashion/seed-* --into runs/fashion/combined
    """
    from hydra_pipe.combining.run import combine_runs

    done = combine_runs(
        runs,
        into,
        method=method,
        memory=memory,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    which = "" if method == DEFAULT_METHOD else f" --method {method}"
    _say(done, into, f"{len(runs)} runs combined", f"next: hydra-pipe report {into}{which}")


@app.command()
@explained
def export(
    run: RunPath,
    method: Method = DEFAULT_METHOD,
    probe: Probe = None,
    top: Top = 100,
    full: Full = False,
    memory: Memory = "4GiB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write Parquet rankings: by test sample, by training sample, by class.

    Example: hydra-pipe export runs/digits --top 20
    """
    from hydra_pipe.exporting.run import export_run
    from hydra_pipe.store.run.results import result_of
    from hydra_pipe.store.run.stages import EXPORT

    done = export_run(
        run,
        method=method,
        probe=probe,
        top=top,
        full=full,
        memory=memory,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    _say(
        done,
        run,
        "exported",
        f"rankings: {run.rstrip('/')}/{EXPORT.of(result_of(method, probe)).area}",
    )


@app.command()
@explained
def report(
    run: RunPath,
    method: ReportMethod = None,
    probe: Probe = None,
    tests: ShownTests = None,
    top: Shown = 5,
    memory: Memory = "4GiB",
    pipeline: MovedPipeline = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run: labels that look wrong, predictions, and after reduce the
    training samples that made them.

    The pipeline of the recording is built again, to draw samples.

    Example: hydra-pipe report runs/digits --tests 0-19
    """
    from hydra_pipe.reporting.run import report_run, reported
    from hydra_pipe.store.run.manifest import RunDirectory
    from hydra_pipe.store.run.stages import REPORT

    done = report_run(
        run,
        method=method,
        probe=probe,
        tests=tests,
        top=top,
        memory=memory,
        pipeline=pipeline,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    result = reported(RunDirectory.open(run), method, probe)
    _say(done, run, "reported", f"open {run.rstrip('/')}/{REPORT.of(result).area}")


@app.command()
@explained
def clean(
    run: RunPath,
    method: CleanMethod = "dynamics",
    lowest: Lowest = None,
    cautious: Cautious = False,
    threshold: Threshold = None,
    rounds: Rounds = None,
    decisions: DecisionsFile = None,
    undecided: Undecided = None,
    retrain: Retrain = False,
    seeds: CleanSeeds = None,
    pipeline: CleanPipeline = None,
    memory: Memory = "4GiB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Propose training samples to relabel or drop, and measure what helps.

    Labels are judged by what the network thought of each sample while it trained. No test samples
    and no reduce are needed. With --method, the relevance of a reduction judges.

    After an interrupt or a kill, the same command resumes with the trainings that are left.

    Example: hydra-pipe clean runs/digits --retrain --seeds 3

    Example: hydra-pipe clean runs/digits --decisions decisions.csv
    """
    from hydra_pipe.cleaning.run import clean_run
    from hydra_pipe.cli.show import show_cleaning
    from hydra_pipe.store.run.stages import CLEAN

    found = clean_run(
        run,
        method=method,
        lowest=lowest,
        threshold=threshold,
        cautious=cautious,
        rounds=rounds,
        decisions=decisions,
        undecided=undecided,
        retrain=retrain,
        seeds=seeds,
        pipeline=pipeline,
        memory=memory,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    place = f"{run.rstrip('/')}/{CLEAN.of(method).area}"
    show_cleaning(
        found.drop.slice(0, SHOWN).to_pylist(), found.drop.num_rows, found.retraining, found.summary
    )
    _say(found.is_new, run, "proposed", f"keep.txt, drop.parquet and relabel.parquet: {place}")
    of_method = "" if method == "dynamics" else f", method={method!r}"
    print(f"to train on the rest: hydra_pipe.cleaned(train, {run.rstrip('/')!r}{of_method})")


@app.command(name="run")
@explained
def run_all(
    pipeline: PipelineSpec,
    run: RunPath,
    set_: Set = [],  # noqa: B006 - Typer makes a new list each time
    encoding: Encoding = "auto",
    dim: Dim = 4096,
    dtype: Dtype = None,
    checkpoint_every: CheckpointEvery = None,
    test_every: TestEvery = None,
    method: Method = DEFAULT_METHOD,
    chunks: Chunks = "auto",
    memory: Memory = "4GiB",
    scheduler: Scheduler = "threads",
    top: Top = 100,
    full: Full = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Record, reduce and export, one after the other. Finished stages are not run again.

    At the end stand the training samples that harm the tests most.

    Example: hydra-pipe run pipelines/digits.py runs/digits --set noise=0.1
    """
    record(
        pipeline,
        run,
        set_,
        encoding,
        dim,
        dtype,
        checkpoint_every,
        test_every,
        overwrite=overwrite,
        debug=debug,
    )
    reduce(run, method, chunks, memory, scheduler, overwrite=overwrite, debug=debug)
    export(run, method, None, top, full, memory, overwrite, debug=debug)
    say_worst(run, method)


@app.command()
@explained
def probe(
    run: RunPath,
    dataset: DatasetSpec,
    name: ProbeName,
    set_: OfFunction = [],  # noqa: B006 - Typer makes a new list each time
    pipeline: MovedPipeline = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Take the test gradients of new inputs on a finished run. reduce, export and report --probe
    NAME then answer for these inputs.

    Example: hydra-pipe probe runs/digits mistakes.py:wrong --name wrong --set day=monday
    """
    from hydra_pipe.probing import probe as take

    done = take(
        run,
        dataset,
        name=name,
        settings=set_,
        pipeline=pipeline,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    _say(done, run, f"probe {name} taken", f"next: hydra-pipe reduce {run} --probe {name}")


@app.command()
@explained
def evaluate(
    pipeline: PipelineSpec,
    run: RunPath,
    kind: Kind,
    set_: Set = [],  # noqa: B006 - Typer makes a new list each time
    samples: Samples = None,
    retrainings: Retrainings = None,
    seeds: Seeds = None,
    methods: Methods = None,
    left_out: LeftOut = None,
    drop: Drop = None,
    tests: Queries = None,
    by: QueriesBy = None,
    memory: Memory = "4GiB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compare relevance with the truth: train again without some of the samples, and score the
    predictions.

    After an interrupt or a kill, the same command resumes with the retrainings that are left.

    Example: hydra-pipe evaluate pipelines/digits.py runs/digits lds --set noise=0.1
    """
    from hydra_pipe.cli.show import show_evaluation
    from hydra_pipe.evaluation.run import evaluate_run
    from hydra_pipe.store.run.stages import EVALUATE

    found = evaluate_run(
        pipeline,
        run,
        kind,
        settings=set_,
        samples=samples,
        retrainings=retrainings,
        seeds=seeds,
        methods=methods,
        left_out=left_out,
        drop=drop,
        tests=tests,
        by=by,
        memory=memory,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show_evaluation(found.rows, found.summary["says"])
    _say(
        found.is_new,
        run,
        "evaluated",
        f"table and summary: {run.rstrip('/')}/{EVALUATE.of(kind).area}",
    )


app.command()(rewind)


@app.command()
@explained
def info(run: RunPath, blocks: Blocks = False, json_: Json = False, debug: Debug = False) -> None:
    """Show what is in a run, on one screen: sizes, encodings, progress of every stage, settings.

    Example: hydra-pipe info runs/digits --json
    """
    from hydra_pipe.cli.info import show_info
    from hydra_pipe.view import open_run

    found = open_run(run).info()
    if json_:
        print(json.dumps(found, indent=2))
    else:
        show_info(found, blocks=blocks)


@app.command()
@explained
def verify(run: RunPath, repair: Repair = False, json_: Json = False, debug: Debug = False) -> None:
    """Read everything in a run and report each difference from what was written.

    The exit code is 1 if there is any difference.

    Example: hydra-pipe verify runs/digits --repair
    """
    faults = api.verify(run, ConsoleProgress(), repair=repair)
    if json_:
        print(
            json.dumps(
                {
                    "healthy": not faults,
                    "faults": [{"where": f.where, "what": f.what} for f in faults],
                },
                indent=2,
            )
        )
    else:
        for fault in faults:
            print(printable(f"{fault.where}: {fault.what}"))
        print(
            f"{run}: {len(faults)} faults"
            if faults
            else f"{run}: {'in order' if repair else 'healthy'}"
        )
    if faults:
        raise typer.Exit(1)


@app.command()
@explained
def prune(
    run: RunPath, discard_unfinished: DiscardUnfinished = False, debug: Debug = False
) -> None:
    """Delete the recorded rows of a run that keeps its hypergradients, once these have been read
    and checked.

    Test samples are still answered by the methods whose hypergradients are kept, and by
    hydra-exact. Other methods need the rows.

    Example: hydra-pipe prune runs/digits, after hydra-pipe reduce runs/digits --keep-hypergradients
    """
    freed = api.prune(run, ConsoleProgress(), discard_unfinished=discard_unfinished)
    print(
        f"{run}: {format_bytes(freed)} deleted"
        if freed
        else f"{run}: pruned already, nothing to do"
    )


def _say(done: bool, run: str, what: str, more: str) -> None:
    print(f"{run}: {what if done else f'{what} already, nothing to do'}; {more}")


def main() -> None:
    """Run the `hydra-pipe` command."""
    # OpenMP's threads wait busily for 10 ms or more. With a writer beside them on few cores,
    # each parallel region of torch then waits for the scheduler: steps of 1 ms were seen to take
    # 100. The variable is read when torch is loaded, which is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with settled_streams():
        app()


if __name__ == "__main__":
    main()
