"""The commands. Each one parses its options, calls the API and prints the result."""

import json
import os
from typing import Annotated, Any

import typer

from hydra_pipe import api
from hydra_pipe.cli.failures import explained
from hydra_pipe.cli.streams import settled_streams
from hydra_pipe.errors import UsageError, printable
from hydra_pipe.progress import ConsoleProgress
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

PipelineSpec = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE",
        help="path/to/file.py or path/to/file.py:function, which returns a Pipeline",
    ),
]
RunPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="directory of the run, or its URL in an object store, such as s3://bucket/run",
    ),
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="a setting of the pipeline function; may be repeated"
    ),
]
Encoding = Annotated[
    str,
    typer.Option(
        help="auto: lossless where it fits --dim; exact: lossless; projected: --dim columns in all"
    ),
]
Dim = Annotated[int, typer.Option(help="budget in columns for auto and projected")]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float16|int8|float32",
        help="data type of the rows; default: float16, or int8 with twice --dim columns if auto "
        "loses less that way",
    ),
]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        metavar="STEPS|TIME",
        help="steps or time between checkpoints, such as 500 or 10min; default: a minute, or 40 "
        "times as long as one takes",
    ),
]
TestEvery = Annotated[
    str | None,
    typer.Option(
        metavar="epoch|STEPS",
        help="also take test gradients on the way, for reduce --up-to-step and --method tracin",
    ),
]
UpToStep = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        help="relevance of the first steps only, named hydra-upto-STEP; also of an unfinished "
        "recording (record --test-every)",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="how to compute relevance: hydra; hydra-fisher, with curvature; hydra-exact, trained "
        "again; tracin, grad-dot, grad-cos or influence, for comparison; self, of training "
        "samples for themselves (docs/methods.md)"
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help=(
            "replay only K directions of the test gradients by hydra-exact, and leave the rest to "
            "hydra-fisher"
        ),
    ),
]
OfPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="PIPELINE",
        help="new path of the pipeline's file if it has moved, for hydra-exact",
    ),
]
MovedPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline", metavar="PIPELINE", help="new path of the pipeline's file if it has moved"
    ),
]
DatasetSpec = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:FUNCTION",
        help="a function that returns a map-style dataset of (input, target)",
    ),
]
OfFunction = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="a setting of the function; may be repeated"),
]
ProbeName = Annotated[
    str, typer.Option("--name", metavar="NAME", help="name of the probe: letters, digits and _")
]
Probe = Annotated[
    str | None,
    typer.Option(
        "--probe",
        metavar="NAME",
        help=(
            "answer for the samples of this probe (hydra-pipe probe) in place of the run's test "
            "samples"
        ),
    ),
]
Chunks = Annotated[
    str,
    typer.Option(
        metavar="ROWSxFEATURES|auto", help="rows and features that a worker reads at once"
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="memory budget of the whole process, or of each worker process, such as 4GiB"
    ),
]
Tests = Annotated[
    str | None, typer.Option(metavar="SELECTION", help="only these test samples, such as 0-99,150")
]
By = Annotated[
    str | None,
    typer.Option(
        metavar="label",
        help="compute the mean over the test samples of each label, named hydra-by-label",
    ),
]
Mean = Annotated[
    bool, typer.Option("--mean", help="compute the mean over all test samples, named hydra-mean")
]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep-hypergradients",
        help="hydra, hydra-fisher: also keep hypergradients, which answer other test samples "
        "later by one product, without the rows; --dry-run says what they cost",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="print the plan (passes, tasks, bytes, operations, memory) and do nothing"
    ),
]
Scheduler = Annotated[
    str,
    typer.Option(
        metavar="threads|processes|ADDRESS",
        help="threads or processes, one for each core of this machine; or the address of a Dask "
        "scheduler, such as tcp://host:8786 (docs/cluster.md)",
    ),
]
Top = Annotated[
    int,
    typer.Option(
        help="number of training samples on each side (helpful, harmful) of each test sample"
    ),
]
ShownTests = Annotated[
    str | None,
    typer.Option(
        "--tests",
        metavar="SELECTION",
        help="test samples to show, such as 0-99,150; default: those that tell most",
    ),
]
Shown = Annotated[
    int,
    typer.Option(
        "--top",
        help="number of training samples to show on each side (helpful, harmful) of each test "
        "sample",
    ),
]
Full = Annotated[bool, typer.Option("--full", help="also write every pair, to matrix/")]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="set the run back to its last good state: keep whole results, and name the commands "
        "that must run again",
    ),
]
Kind = Annotated[
    str,
    typer.Argument(
        metavar="KIND", help="loo, lds, noise, smoothness or approximation (docs/evaluating.md)"
    ),
]
Samples = Annotated[
    str | None,
    typer.Option(
        metavar="SELECTION",
        help="loo: training samples to leave out, such as 0-99,150; default: the first 1,000",
    ),
]
Retrainings = Annotated[
    int | None, typer.Option(help="lds: number of random halves to train on; default: 100")
]
Seeds = Annotated[
    int | None,
    typer.Option(
        help="lds: number of initial weights and orders to train each half from; default: 1"
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=(
            "loo, lds, noise: methods to score, such as hydra,hydra-fisher; default: all that were "
            "reduced"
        ),
    ),
]
LeftOut = Annotated[
    str | None,
    typer.Option(
        metavar="SHARES",
        help="noise: shares of the number of wrong labels to train without; 0: none; default: "
        "0.5,1,2",
    ),
]
Lowest = Annotated[int | None, typer.Option(metavar="K", help="number of samples to propose")]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="propose samples that score below X, in robust standard deviations from the samples "
        "with the same label; default: fitted, unless --lowest is given",
    ),
]
Retrain = Annotated[
    bool,
    typer.Option(
        "--retrain",
        help="train again with all samples, without the proposed and without as many at random, "
        "and compare accuracy and loss",
    ),
]
CleanSeeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        help="for --retrain: number of initial weights and orders of each training; default: 3",
    ),
]
CleanPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="PIPELINE",
        help="new path of the pipeline's file if it has moved, for --retrain",
    ),
]
DiscardUnfinished = Annotated[
    bool,
    typer.Option(
        "--discard-unfinished",
        help="give up hypergradients whose keeping was interrupted, if others are kept",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="discard the results of an earlier call of this stage")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the whole traceback of a failure")]
Json = Annotated[bool, typer.Option("print JSON, for programs", help="for programs")]


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
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    _say(done, run, "recorded", f"next: hydra-pipe reduce {run}")


@app.command()
@explained
def reduce(
    run: RunPath,
    method: Method = "hydra",
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
    pipeline: OfPipeline = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Reduce a recording, out of core, to the relevance of each training sample for each test
    sample.

    Example: hydra-pipe reduce runs/digits --memory 2GiB --chunks 2048x4096
    """
    from hydra_pipe.store.run.results import DEFAULT_METHOD, ResultName

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
        "rank": rank,
        "probe": probe,
        "pipeline": pipeline,
    }
    if dry_run:
        print(api.plan_reduction(run, **options))
        return
    done = api.reduce(run, **options, overwrite=overwrite, progress=ConsoleProgress())
    result = ResultName(method, grouping, up_to_step, rank, probe)
    which = "" if str(result) == DEFAULT_METHOD else f" --method {result}"
    if result.is_of_itself:
        whose = ResultName(DEFAULT_METHOD, up_to_step=up_to_step)
        which = (
            f" --method {whose}, or another method: its samples.parquet gets the column "
            "self_relevance"
        )
    _say(done, run, "reduced", f"next: hydra-pipe export {run}{which}")


@app.command()
@explained
def export(
    run: RunPath,
    method: Method = "hydra",
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
    method: Method = "hydra",
    probe: Probe = None,
    tests: ShownTests = None,
    top: Shown = 5,
    memory: Memory = "4GiB",
    pipeline: MovedPipeline = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a reduced run: predictions, the training samples that made them,
    and those to check first.

    The pipeline of the recording is built again, to draw samples.

    Example: hydra-pipe report runs/digits --tests 0-19
    """
    from hydra_pipe.reporting.run import report_run
    from hydra_pipe.store.run.results import result_of
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
    _say(
        done, run, "reported", f"open {run.rstrip('/')}/{REPORT.of(result_of(method, probe)).area}"
    )


@app.command()
@explained
def clean(
    run: RunPath,
    method: Method = "hydra",
    lowest: Lowest = None,
    threshold: Threshold = None,
    retrain: Retrain = False,
    seeds: CleanSeeds = None,
    pipeline: CleanPipeline = None,
    memory: Memory = "4GiB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Propose training samples to relabel or drop, by their relevance, and measure training
    without them.

    After an interrupt or a kill, the same command resumes with the retrainings that are left.

    Example: hydra-pipe clean runs/digits --lowest 100 --retrain
    """
    from hydra_pipe.cleaning.run import clean_run
    from hydra_pipe.cli.show import show_cleaning
    from hydra_pipe.store.run.stages import CLEAN

    found = clean_run(
        run,
        method=method,
        lowest=lowest,
        threshold=threshold,
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
    _say(found.is_new, run, "proposed", f"keep.txt, drop.parquet and summary.json: {place}")
    print(
        "to train on the rest: torch.utils.data.Subset(train, [int(i) for i in "
        f"open('{place}/keep.txt')])"
    )


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
    method: Method = "hydra",
    chunks: Chunks = "auto",
    memory: Memory = "4GiB",
    scheduler: Scheduler = "threads",
    top: Top = 100,
    full: Full = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Record, reduce and export, one after the other. Finished stages are not run again.

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
        overwrite,
        debug=debug,
    )
    reduce(run, method, chunks, memory, scheduler, overwrite=overwrite, debug=debug)
    export(run, method, None, top, full, memory, overwrite, debug=debug)


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


@app.command()
@explained
def info(run: RunPath, json_: Json = False, debug: Debug = False) -> None:
    """Show what is in a run: sizes, encodings, progress of every stage, settings.

    Example: hydra-pipe info runs/digits --json
    """
    from hydra_pipe.cli.show import show_info
    from hydra_pipe.view import open_run

    found = open_run(run).info()
    if json_:
        print(json.dumps(found, indent=2))
    else:
        show_info(found)


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
