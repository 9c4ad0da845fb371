"""The commands that are struck, on a tiny run: arguments, how a reduction is planned (see
`commands.py`), and what comes before.
"""

from pathlib import Path

PIPELINE = str(Path(__file__).with_name("tiny.py"))
RECORD = ["record", PIPELINE, "RUN", "--encoding", "exact"]
PROBE = ["probe", "RUN", f"{PIPELINE}:mistakes", "--name", "wrong"]
Stages = dict[str, tuple[list[str], str | None, list[str]]]

# of each of these a call of each kind is struck by the tests
STAGES: Stages = {
    "record": ([*RECORD, "--checkpoint-every", "2"], None, []),
    "reduce, score first": (["reduce", "RUN", "--method", "hydra"], "score first", ["record"]),
    "reduce, fold first": (
        ["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"],
        "fold first",
        ["record"],
    ),
    "export": (
        ["export", "RUN", "--method", "hydra", "--full", "--top", "5"],
        None,
        ["record", "reduce, score first"],
    ),
    "prune": (["prune", "RUN"], None, ["record", "reduce, fold first"]),
}
# with test gradients on the way, for tracin
TESTED: Stages = {
    "tested": ([*RECORD, "--checkpoint-every", "2", "--test-every", "epoch"], None, [])
}
# of each of these a few calls, and all by benchmarks/crash.py
LATER: Stages = {
    "fisher": (["reduce", "RUN"], "narrow", ["tested"]),
    "basis": (["reduce", "RUN", "--rank", "5"], "narrow", ["tested"]),
    "exact": (["reduce", "RUN", "--method", "hydra-exact"], "narrow", ["tested"]),
    "rank": (["reduce", "RUN", "--method", "hydra-exact", "--rank", "3"], "narrow", ["tested"]),
    "influence": (["reduce", "RUN", "--method", "influence"], "narrow", ["tested"]),
    "tracin": (["reduce", "RUN", "--method", "tracin"], "score first", ["tested"]),
    "self": (["reduce", "RUN", "--method", "self"], None, ["tested"]),
    "top": (["reduce", "RUN", "--top", "2"], "narrow", ["tested"]),
    "top of sums": (
        ["reduce", "RUN", "--method", "tracin", "--top", "2"],
        "score first",
        ["tested"],
    ),
    "top, exported": (
        ["export", "RUN", "--method", "tracin-top", "--top", "2"],
        None,
        ["tested", "top of sums"],
    ),
    "loo": (["evaluate", PIPELINE, "RUN", "loo", "--samples", "0-5"], None, ["tested", "fisher"]),
    "lds": (
        ["evaluate", PIPELINE, "RUN", "lds", "--retrainings", "10"],
        None,
        ["tested", "fisher"],
    ),
    "qld": (
        ["evaluate", PIPELINE, "RUN", "qld", "--tests", "0-1", "--methods", "hydra-fisher"],
        None,
        ["tested", "fisher"],
    ),
    "subset": (
        ["evaluate", PIPELINE, "RUN", "subset", "--methods", "hydra-fisher"],
        None,
        ["tested", "fisher"],
    ),
    "noise": (
        ["evaluate", PIPELINE, "RUN", "noise", "--left-out", "1"],
        None,
        ["tested", "fisher"],
    ),
    "smoothness": (["evaluate", PIPELINE, "RUN", "smoothness"], None, ["tested"]),
    "probe": (PROBE, None, ["record"]),
    "reduce of a probe": (
        ["reduce", "RUN", "--method", "hydra", "--probe", "wrong"],
        "score first",
        ["record", "probe"],
    ),
    "probe anew": ([*PROBE, "--overwrite"], None, ["record", "probe", "reduce of a probe"]),
    "keep": (
        ["reduce", "RUN", "--keep-hypergradients"],
        "narrow",
        ["tested"],
    ),
    "report": (["report", "RUN", "--method", "hydra"], None, ["record", "reduce, score first"]),
    "clean": (
        ["clean", "RUN", "--method", "hydra", "--lowest", "4", "--retrain"],
        None,
        ["record", "reduce, score first"],
    ),
}
ALL = STAGES | TESTED | LATER
# of two runs: FIRST and SECOND in its arguments
TOGETHER: Stages = {
    "second record": (["record", f"{PIPELINE}:second", "RUN", "--encoding", "exact"], None, []),
    "second": (["reduce", "RUN", "--method", "hydra"], "score first", ["second record"]),
    "combine": (["combine", "FIRST", "SECOND", "--into", "RUN", "--method", "hydra"], "narrow", []),
}
