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
RunPaths = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="directories of the runs, two or more, or their URLs"),
]
Into = Annotated[
    str, typer.Option("--into", metavar="OUT", help="directory of the combination, of its own")
]
CombinedMethod = Annotated[
    str,
    typer.Option(metavar="RESULT", help="result of reduce that each run has, such as hydra-fisher"),
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
RecordSeeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        help="record N runs, with the settings seed=0 to seed=N-1, in RUN/seed-0 and so on "
        "(hydra-pipe combine)",
    ),
]
UpToStep = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        help="relevance of the first steps only, named METHOD-upto-STEP; also of an unfinished "
        "recording (record --test-every)",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="how to compute relevance: hydra-fisher, with curvature; hydra, the paper's fast "
        "form; hydra-exact, trained again; tracin, grad-dot, grad-cos or influence, for "
        "comparison; self, of training samples for themselves (docs/methods.md)"
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="K|full",
        help=(
            "hydra-fisher: columns that the sweep carries, or `full` for all features; default: "
            "512 to 16,384, more where there are fewer rows. hydra-exact: replay K directions of "
            "the test gradients, and leave the rest to hydra-fisher"
        ),
    ),
]
KeptTop = Annotated[
    int | None,
    typer.Option(
        "--top",
        metavar="K",
        help="keep only the K most helpful and the K most harmful samples of each test, named "
        "METHOD-top; default: every pair",
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
        help="compute the mean over the test samples of each label, named METHOD-by-label",
    ),
]
Mean = Annotated[
    bool, typer.Option("--mean", help="compute the mean over all test samples, named METHOD-mean")
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
ReportMethod = Annotated[
    str | None,
    typer.Option(
        metavar="RESULT",
        help="a result of reduce, such as hydra-fisher; or dynamics, for the recording alone; "
        "default: hydra if it was reduced, else dynamics",
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
        metavar="KIND",
        help="loo, lds, qld, subset, noise, smoothness or approximation (docs/evaluating.md)",
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
    int | None, typer.Option(help="lds: number of random subsets to train on; default: 100")
]
Seeds = Annotated[
    int | None,
    typer.Option(
        help="lds, qld: number of initial weights and orders to train each subset from, the run's "
        "own and others; lds scores both; default: 1"
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=(
            "loo, lds, qld, subset, noise: methods to score, such as hydra,hydra-fisher; default: "
            "all that were reduced"
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
Drop = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="share of the training samples to leave out: lds: at random, default 0.5; qld: the "
        "most helpful, the most harmful, default 0.01; subset: at most, default 0.2",
    ),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--tests",
        metavar="SELECTION",
        help="qld, subset: test samples to ask about, such as 0-99,150; default: the first 20; "
        "subset: the first 20 that are predicted right",
    ),
]
QueriesBy = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="label|mean",
        help="qld: ask about the mean loss of each label's test samples, or of all",
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
        help="train again as given, without the proposed samples, with the suggested labels, with "
        "both, and weighted, each beside as many at random; say which helps",
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
Rounds = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="2: train on the cleaned labels, recorded in RUN-round-2, and judge the given labels "
        "again; default: 1",
    ),
]
DecisionsFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="CSV file of sample,decision,label (keep, relabel or drop; a class for relabel), as "
        "the page of the report saves; decisions replace proposals",
    ),
]
Undecided = Annotated[
    str | None,
    typer.Option(
        metavar="proposed|keep",
        help="for --decisions: leave the other proposals as they are, or keep their samples; "
        "default: proposed",
    ),
]
CleanPipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="PIPELINE",
        help="new path of the pipeline's file if it has moved, for --retrain and --rounds",
    ),
]
Blocks = Annotated[bool, typer.Option("--blocks", help="also show the encoding of each parameter")]
Step = Annotated[int | None, typer.Option("--step", metavar="N", help="step to look at, from 0")]
FindSpikes = Annotated[
    bool, typer.Option("--spikes", help="find the steps whose loss stands out from those before")
]
SpikesBy = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="loss|gradient",
        help="for --spikes: loss, or gradient for the norm of the gradient, which reads all rows; "
        "default: loss if it is known",
    ),
]
ShownSamples = Annotated[
    int, typer.Option("--top", help="number of samples, tests or spikes to print")
]
Picture = Annotated[
    str | None,
    typer.Option(
        "--picture",
        metavar="FILE",
        help="also draw the loss over the steps, with spikes marked, as .png or .svg",
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
Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
