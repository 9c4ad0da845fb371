"""Arguments and options of the commands, each written once."""

from typing import Annotated

import typer

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
        help="of the rows; if not given: float16, or int8 with twice --dim columns where auto "
        "would lose more with --dim",
    ),
]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        metavar="STEPS|TIME",
        help="between checkpoints, such as 500 or 10min; if not given: a minute, or 40 times as "
        "long as one takes",
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
        help="only the first steps, as hydra-upto-STEP; of a recording that goes on too (record "
        "--test-every)",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="how relevance is computed: hydra; hydra-fisher, with curvature; hydra-exact, "
        "trained again; tracin, grad-dot, "
        "grad-cos or influence, to compare; self, of training samples for themselves "
        "(docs/methods.md)"
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="hydra-exact of K directions of the test gradients only, the rest by hydra-fisher",
    ),
]
OfPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="PIPELINE",
        help="for hydra-exact, where the pipeline's file has moved",
    ),
]
MovedPipeline = Annotated[
    str | None,
    typer.Option("--pipeline", metavar="PIPELINE", help="where the pipeline's file has moved"),
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
    str, typer.Option("--name", metavar="NAME", help="of the probe: letters, digits and _")
]
Probe = Annotated[
    str | None,
    typer.Option(
        "--probe",
        metavar="NAME",
        help="the samples of this probe (hydra-pipe probe), in place of the run's test samples",
    ),
]
Chunks = Annotated[
    str, typer.Option(metavar="ROWSxFEATURES|auto", help="what a worker reads at once")
]
Memory = Annotated[
    str, typer.Option(help="budget for the whole process, or for each worker process, such as 4GiB")
]
Tests = Annotated[
    str | None, typer.Option(metavar="SELECTION", help="only these test samples, such as 0-99,150")
]
By = Annotated[
    str | None,
    typer.Option(
        metavar="label", help="mean over the test samples of each label, as hydra-by-label"
    ),
]
Mean = Annotated[bool, typer.Option("--mean", help="mean over all test samples, as hydra-mean")]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep-hypergradients",
        help="hydra, hydra-fisher: also keep what answers other test samples later, by one "
        "product and without the rows: sums of "
        "rows by sample, or a sweep of every feature or sample, which costs that of as many "
        "tests (see --dry-run)",
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
        help="threads or processes, one for each core of this machine; or a Dask scheduler "
        "elsewhere, such as tcp://host:8786 "
        "(docs/cluster.md)",
    ),
]
Top = Annotated[
    int, typer.Option(help="training samples a side (helpful, harmful) for each test sample")
]
ShownTests = Annotated[
    str | None,
    typer.Option(
        "--tests",
        metavar="SELECTION",
        help="show these test samples, such as 0-99,150; else those that tell most",
    ),
]
Shown = Annotated[
    int,
    typer.Option(
        "--top", help="training samples a side (helpful, harmful) to show for each test sample"
    ),
]
Full = Annotated[bool, typer.Option("--full", help="also write every pair, to matrix/")]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="set the run back to its last good state: keep what is whole, say what must be "
        "computed again",
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
        help="loo: leave out these training samples, such as 0-99,150; else the first 1,000",
    ),
]
Retrainings = Annotated[
    int | None, typer.Option(help="lds: on how many random halves to train; if not given: 100")
]
Seeds = Annotated[
    int | None,
    typer.Option(
        help="lds: initial weights and orders that each half is trained from; if not given: 1"
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="loo, lds, noise: only these, such as hydra,hydra-fisher; else all that were reduced",
    ),
]
LeftOut = Annotated[
    str | None,
    typer.Option(
        metavar="SHARES",
        help="noise: of the number of wrong labels, how many to train without; 0: none; if not "
        "given: 0.5,1,2",
    ),
]
CleanMethod = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="dynamics; or a result of reduce whose relevance judges, such as hydra",
    ),
]
Cautious = Annotated[
    bool, typer.Option("--cautious", help="only labels that are likelier wrong than right")
]
Lowest = Annotated[int | None, typer.Option(metavar="K", help="propose so many")]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="propose what scores below X, in robust standard deviations from the samples with "
        "the same label; if neither: fitted",
    ),
]
Retrain = Annotated[
    bool,
    typer.Option(
        "--retrain",
        help="train again with all samples, without the proposed and without as many at random: "
        "accuracy and loss",
    ),
]
CleanSeeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        help="for --retrain: initial weights and orders of each; if not given: 3",
    ),
]
CleanPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline", metavar="PIPELINE", help="for --retrain, where the pipeline's file has moved"
    ),
]
DiscardUnfinished = Annotated[
    bool,
    typer.Option(
        "--discard-unfinished",
        help="where keeping some hypergradients was interrupted, and others are kept: discard "
        "the former",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="discard what an earlier call of this stage left")
]
Debug = Annotated[bool, typer.Option("--debug", help="on failure show the whole traceback")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]
