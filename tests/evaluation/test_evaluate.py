"""evaluate from end to end, on small runs."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.evaluated import files_of, put
from support.pipelines import cross_entropy
from support.processes import forked
from support.smooth import TESTS, N, net
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.cli.app import app
from hydra_pipe.errors import HydraError, PipelineError, RunError, UsageError
from hydra_pipe.evaluation.lds import half
from hydra_pipe.progress import Progress, Task
from hydra_pipe.retraining import campaign
from hydra_pipe.retraining.retrainer import LOSS, Retrainer
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EVALUATE


def test_loo_is_what_leaving_out_one_sample_does(case: tuple[str, Path]) -> None:
    found = hydra_pipe.evaluate(*case, "loo", samples="0-2,17")
    assert found.is_new
    truth = np.load(case[1] / "evaluation" / "loo" / "truth.npy")
    weights = np.ones((2, N), np.float32)
    weights[1, 17] = 0.0
    losses = Retrainer(net(), Progress()).train(weights, Task())[:, LOSS]
    np.testing.assert_allclose(truth[3], losses[1] - losses[0], rtol=1e-3, atol=1e-6)
    by_method = {row["method"]: row for row in found.rows}
    # 4 samples order little, but the size of what a sample does is right within the method's own
    # error
    assert 0.5 < by_method["hydra-fisher"]["norm"] < 2.0
    assert not hydra_pipe.evaluate(*case, "loo", samples="17,0-2").is_new
    assert hydra_pipe.verify(case[1]) == []


def test_lds_of_the_truth_is_one_and_results_are_files(
    case: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses that a sum over the kept samples gives exactly are scored 1, and their negative -1."""
    halves = np.stack([half(i, N) for i in range(12)])
    retrainer = Retrainer(net(), Progress(), "weights")
    losses = retrainer.train(halves, Task())[:, LOSS]
    # as many unknowns as retrainings, or more: there is a relevance that explains them all
    exact = -np.linalg.pinv(halves.astype(np.float64)) @ losses
    put(case[1], "right", exact)
    put(case[1], "wrong", -exact)
    result = CliRunner().invoke(app, ["evaluate", *map(str, case), "lds", "--retrainings", "12"])
    assert result.exit_code == 0, result.output
    place = case[1] / "evaluation" / "lds"
    table = {row["method"]: row for row in pq.read_table(place / "table.parquet").to_pylist()}
    assert set(table) == {"hydra", "hydra-fisher", "right", "wrong"}
    assert table["right"]["lds"] > 0.99
    assert table["wrong"]["lds"] < -0.99
    assert table["hydra"]["lds_low"] <= table["hydra"]["lds"] <= table["hydra"]["lds_high"]
    assert next(iter(table)) == "right", "the best one comes first"
    assert "right" in result.output
    assert json.loads((place / "summary.json").read_text())["retrainings"] == 12
    assert b"<svg" in (place / "plot.svg").read_bytes()


def test_a_relevance_that_came_later_is_scored_without_training_again(
    case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra_pipe.evaluate(*case, "lds", retrainings=10, methods="hydra")
    monkeypatch.setattr(campaign, "Retrainer", None)
    assert [
        row["method"]
        for row in hydra_pipe.evaluate(*case, "lds", retrainings=10, methods="hydra").rows
    ] == ["hydra"]
    assert len(hydra_pipe.evaluate(*case, "lds", retrainings=10).rows) == 2


def test_seeds_are_other_initial_weights_on_the_same_data(case: tuple[str, Path]) -> None:
    hydra_pipe.evaluate(*case, "lds", retrainings=10, seeds=2)
    pieces = sorted((case[1] / "evaluation" / "lds" / "retrained").glob("*.npy"))
    losses = np.concatenate([np.load(piece) for piece in pieces])[:, LOSS]
    start = {name: p.detach() for name, p in net(seed=1).model.named_parameters()}
    weights = np.stack([half(i, N) for i in range(10)])
    again = Retrainer(net(), Progress(), "weights").train(weights, Task(), seed=1, start=start)[
        :, LOSS
    ]
    np.testing.assert_allclose(losses[10:], again, rtol=1e-5)
    assert np.abs(losses[:10] - losses[10:]).max() > 1e-3


def test_several_seeds_score_the_own_training_and_the_mean_of_the_others(
    case: tuple[str, Path],
) -> None:
    hydra_pipe.evaluate(*case, "lds", retrainings=10, seeds=3)
    pieces = sorted((case[1] / "evaluation" / "lds" / "retrained").glob("*.npy"))
    losses = np.concatenate([np.load(piece) for piece in pieces])[:, LOSS].reshape(3, 10, -1)
    inverse = -np.linalg.pinv(np.stack([half(i, N) for i in range(10)]).astype(np.float64))
    put(case[1], "own", inverse @ losses[0])
    put(case[1], "others", inverse @ losses[1:].mean(axis=0))
    found = hydra_pipe.evaluate(*case, "lds", retrainings=10, seeds=3)
    rows = {row["method"]: row for row in found.rows}
    assert rows["own"]["lds"] > 0.99 > rows["own"]["lds_other_seeds"]
    assert rows["others"]["lds_other_seeds"] > 0.99 > rows["others"]["lds"]
    assert "mean over 2 other seeds" in " ".join(found.summary["says"])


def evaluate_until_killed(pipeline: str, run: Path, kind: str, options: dict[str, Any]) -> None:
    """What a process does that has kept two pieces when it is killed."""
    write, left = Retrained.write, [2]

    def writes(*args: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    Retrained.write = writes
    campaign.MOST_MODELS = 4
    hydra_pipe.evaluate(pipeline, run, kind, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lds", {"retrainings": 12}),
        ("qld", {"tests": "0-3", "methods": "hydra", "seeds": 2}),
        ("subset", {"tests": "0-3", "methods": "hydra"}),
    ],
)
def test_killed_and_run_again_it_goes_on_to_the_same_bytes(
    case: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, Any],
) -> None:
    other = shutil.copytree(case[1], tmp_path / "other")
    killed = forked(evaluate_until_killed, *case, kind, options)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    done = files_of(case[1] / "evaluation" / kind)
    assert len(done) == 2
    monkeypatch.setattr(campaign, "MOST_MODELS", 4)
    for run in (case[1], other):
        hydra_pipe.evaluate(case[0], run, kind, **options)
    assert files_of(case[1] / "evaluation") == files_of(other / "evaluation")
    assert done.items() <= files_of(case[1] / "evaluation" / kind).items()
    assert hydra_pipe.verify(case[1]) == []


def test_noise_ranks_wrong_labels_and_leaves_them_out(case: tuple[str, Path]) -> None:
    wrong = np.arange(N) < 12
    put(case[1], "oracle", np.repeat(np.where(wrong, -1.0, 1.0)[:, None], TESTS, axis=1))
    found = hydra_pipe.evaluate(*case, "noise")
    rows = {row["method"]: row for row in found.rows}
    assert rows["oracle"]["roc_auc"] == 1.0
    assert rows["oracle"]["precision_12"] == 1.0
    assert rows["oracle"]["without_12"] == rows["(the wrong ones)"]["without_12"]
    assert rows["(random)"]["roc_auc"] is None
    assert found.summary["wrong"] == 12


def test_noise_ranks_means_and_what_is_relevant_to_itself(
    case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "Retrainer", None)  # rankings alone need no training
    hydra_pipe.reduce(case[1], by="mean", method="hydra")
    hydra_pipe.reduce(case[1], method="self")
    hydra_pipe.reduce(case[1], by="label", method="hydra")
    hydra_pipe.reduce(case[1], method="hydra-fisher", by="mean", tests="0-3")
    put(
        case[1],
        "oracle-mean",
        np.where(np.arange(N) < 12, -1.0, 1.0)[:, None],
        ResultColumns(((0, TESTS),), "mean", ("mean",)),
    )
    found = hydra_pipe.evaluate(*case, "noise", left_out="0")
    rows = {row["method"]: row for row in found.rows}
    # neither means by label nor that of some test samples
    assert set(rows) == {"hydra", "hydra-fisher", "hydra-mean", "oracle-mean", "self"}
    assert rows["hydra-mean"] == rows["hydra"] | {"method": "hydra-mean"}
    assert rows["oracle-mean"]["roc_auc"] == 1.0
    assert not any(name.startswith("without") for name in found.rows[0])
    values = np.asarray(hydra_pipe.open_run(case[1]).relevance("self"))[:, 0]
    above = values[:12, None] > values[None, 12:]
    assert rows["self"]["roc_auc"] == pytest.approx(above.mean()), (
        "the most relevant to itself comes first"
    )
    assert [
        row["method"]
        for row in hydra_pipe.evaluate(*case, "noise", left_out="0", methods="self").rows
    ] == ["self"]
    with pytest.raises(RunError, match=r"hydra-pipe reduce .* --method tracin --mean first"):
        hydra_pipe.evaluate(*case, "noise", left_out="0", methods="tracin-mean")


def test_noise_trains_without_as_many_as_asked_for(case: tuple[str, Path]) -> None:
    found = hydra_pipe.evaluate(*case, "noise", left_out="1", methods="hydra")
    assert [name for name in found.rows[0] if name.startswith("without")] == ["without_12"]
    assert not hydra_pipe.evaluate(*case, "noise", left_out="1", methods="hydra").is_new


def test_smoothness_tells_a_smooth_run_from_a_rough_one(
    case: tuple[str, Path], tmp_path: Path
) -> None:
    found = hydra_pipe.evaluate(*case, "smoothness")
    assert found.summary["verdict"].startswith("trust exact")
    assert [row["step"] for row in found.rows][-1] == 1.0
    rough = net(2.0)
    rough.optimizer = torch.optim.SGD(rough.model.parameters(), lr=2.0, momentum=0.9)
    hydra_pipe.record(rough, tmp_path / "rough")
    again = net(2.0)
    again.optimizer = torch.optim.SGD(again.model.parameters(), lr=2.0, momentum=0.9)
    assert (
        not hydra_pipe.evaluate(again, tmp_path / "rough", "smoothness")
        .summary["verdict"]
        .startswith("trust exact")
    )


def test_approximation_compares_step_by_step(case: tuple[str, Path]) -> None:
    with pytest.raises(RunError, match=r"hydra-pipe reduce .* --method hydra-exact first"):
        hydra_pipe.evaluate(*case, "approximation")
    exact = np.random.default_rng(0).normal(size=(N, TESTS))
    put(case[1], "hydra-exact", exact)
    put(case[1], "hydra-exact-upto-8", exact)
    put(case[1], "hydra-upto-8", -2 * exact)
    found = hydra_pipe.evaluate(*case, "approximation")
    rows = {(row["method"], row["steps"]): row for row in found.rows}
    assert set(rows) == {("hydra", 8), ("hydra", 20), ("hydra-fisher", 20)}
    early = rows["hydra", 8]
    assert early["wrong_signs"] == 1.0
    assert early["relative_error"] == pytest.approx(3.0)
    assert early["distance"] == pytest.approx(3 * np.linalg.norm(exact), rel=1e-6)
    assert early["spearman"] == pytest.approx(-1.0)


def test_approximation_compares_the_test_samples_and_means_that_both_have(
    case: tuple[str, Path],
) -> None:
    whole = np.asarray(hydra_pipe.open_run(case[1]).relevance("hydra"), np.float64)
    hydra_pipe.reduce(case[1], by="mean", method="hydra")
    hydra_pipe.reduce(case[1], method="influence", tests="9-11")
    put(case[1], "hydra-exact", whole[:, [2, 3, 9]], ResultColumns(((2, 4), (9, 10))))
    put(
        case[1],
        "hydra-exact-mean",
        2 * whole.mean(axis=1, keepdims=True),
        ResultColumns(((0, TESTS),), "mean", ("mean",)),
    )
    put(
        case[1], "hydra-exact-by-label", whole[:, :2], ResultColumns(((0, TESTS),), "label", (0, 1))
    )
    found = hydra_pipe.evaluate(*case, "approximation")
    rows = {row["method"]: row for row in found.rows}
    assert {name: row["columns"] for name, row in rows.items()} == {
        "hydra": 3,
        "hydra-mean": 1,
        "hydra-fisher": 3,
        "influence": 1,
    }
    assert rows["hydra"]["distance"] == 0.0
    assert rows["hydra-mean"]["relative_error"] == pytest.approx(0.5, rel=1e-5)
    assert any("--method hydra --by label" in line for line in found.summary["says"])
    put(case[1], "hydra-exact-mean", whole[:, :1], ResultColumns(((0, 3),), "mean", ("mean",)))
    assert "hydra-mean" not in {
        row["method"] for row in hydra_pipe.evaluate(*case, "approximation").rows
    }, "of other test samples"


def other_data(lr: float = 0.1) -> Pipeline:
    pipeline = net(lr)
    pipeline.train = TensorDataset(pipeline.train.tensors[0], pipeline.train.tensors[1].flip(0))
    return pipeline


def no_truth() -> Pipeline:
    pipeline = net()
    pipeline.true_labels = None
    return pipeline


@pytest.mark.parametrize(
    ("change", "kind", "options", "error", "message"),
    [
        (
            net,
            "guess",
            {},
            UsageError,
            "choose one of loo, lds, qld, subset, noise, smoothness, approximation",
        ),
        (net, "lds", {"samples": "0"}, UsageError, "--samples is no option of evaluate lds"),
        (net, "loo", {"samples": "0-60"}, UsageError, "not within the 60 training samples"),
        (net, "lds", {"retrainings": 2}, UsageError, "give 10 or more"),
        (net, "lds", {"left_out": "1"}, UsageError, "--left-out is no option of evaluate lds"),
        (net, "noise", {"left_out": "half"}, UsageError, "--left-out 'half': give shares"),
        (net, "noise", {"left_out": "0,1"}, UsageError, "--left-out '0,1': give shares"),
        (net, "lds", {"seeds": 2}, UsageError, "setting `seed`"),
        (net, "lds", {"drop": 1.0}, UsageError, "--drop 1: give a share .* between 0 and 1"),
        (net, "lds", {"drop": 0.001}, UsageError, "--drop 0.001 of 60 samples is 0 samples"),
        (net, "qld", {"drop": 0.999}, UsageError, "--drop 0.999 of 60 samples is 60 samples"),
        (net, "qld", {"seeds": 2}, UsageError, "setting `seed`"),
        (net, "qld", {"by": "class"}, UsageError, "--by 'class': give label or mean"),
        (net, "qld", {"by": "mean", "tests": "0"}, UsageError, "--by and --tests"),
        (net, "qld", {"tests": "0-12"}, UsageError, "not within the 12 test samples"),
        (
            net,
            "qld",
            {"methods": "hydra-mean"},
            RunError,
            "reduce .* --method hydra --tests 0-11 first",
        ),
        (
            net,
            "qld",
            {"methods": "tracin-mean", "by": "mean"},
            RunError,
            "reduce .* --method tracin --mean first",
        ),
        (net, "subset", {"seeds": 2}, UsageError, "--seeds is no option of evaluate subset"),
        (net, "lds", {"methods": "tracin"}, RunError, "hydra-pipe reduce .* --method tracin first"),
        (net, "lds", {"memory": "1MiB"}, HydraError, "raise --memory to"),
        (lambda: net(0.2), "lds", {}, RunError, "was recorded with optimizer="),
        (other_data, "lds", {}, PipelineError, "other test losses than"),
        (no_truth, "noise", {}, PipelineError, "no true_labels"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    made: tuple[str, Path],
    change: Any,
    kind: str,
    options: dict[str, Any],
    error: type[HydraError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        hydra_pipe.evaluate(change(), made[1], kind, **options)
    assert "\n" not in str(raised.value)


def test_a_run_without_relevance_says_what_to_reduce_first(tmp_path: Path) -> None:
    hydra_pipe.record(net(), tmp_path / "run")
    with pytest.raises(RunError, match=r"hydra-pipe reduce .* --method hydra-fisher first"):
        hydra_pipe.evaluate(net(), tmp_path / "run", "lds")
    assert EVALUATE.of("lds") not in RunDirectory.open(tmp_path / "run").stages
    # the truth is of use without: for relevance that somebody else has computed
    assert hydra_pipe.evaluate(net(), tmp_path / "run", "loo", samples="3").rows == []
    assert np.load(tmp_path / "run" / "evaluation" / "loo" / "truth.npy").shape == (1, TESTS)
    assert not hydra_pipe.evaluate(net(), tmp_path / "run", "loo", samples="3").is_new


def test_a_run_of_a_loop_of_ones_own_cannot_be_trained_again(tmp_path: Path) -> None:
    pipeline = net()
    recorder = hydra_pipe.Recorder(
        pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=N
    )
    inputs, targets = pipeline.train.tensors
    with recorder.step(range(8)):
        cross_entropy(pipeline.model(inputs[:8]), targets[:8]).mean().backward()
        pipeline.optimizer.step()
    recorder.record_test([pipeline.test.tensors], cross_entropy)
    recorder.close()
    with pytest.raises(RunError, match="in a loop of your own"):
        hydra_pipe.evaluate(net(), tmp_path / "run", "smoothness")


def test_without_matplotlib_only_the_plot_is_missing(
    case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    hydra_pipe.evaluate(*case, "lds", retrainings=10, progress=progress)
    assert any("pip install 'hydra-pipe[plots]'" in line for line in said)
    assert sorted(f.name for f in (case[1] / "evaluation" / "lds").iterdir()) == [
        "retrained",
        "summary.json",
        "table.parquet",
    ]


def test_other_settings_are_refused_unless_overwritten(case: tuple[str, Path]) -> None:
    hydra_pipe.evaluate(*case, "lds", retrainings=10, methods="hydra")
    with pytest.raises(
        RunError, match="evaluate lds was run with retrainings=10, now retrainings=11"
    ):
        hydra_pipe.evaluate(*case, "lds", retrainings=11)
    assert hydra_pipe.evaluate(*case, "lds", retrainings=11, overwrite=True).is_new
    (case[1] / "evaluation" / "lds" / "table.parquet").write_bytes(b"")
    faults = hydra_pipe.verify(case[1])
    assert [fault.where for fault in faults] == ["evaluation/lds/table.parquet"]
    command = (
        f"hydra-pipe evaluate {case[0]}:pipeline {case[1]} lds --set lr=0.1 --set seed=0 "
        "--retrainings 11 --seeds 1"
    )
    assert command in faults[0].consequence
    assert hydra_pipe.verify(case[1], repair=True) == []
    assert hydra_pipe.evaluate(*case, "lds", retrainings=10).is_new
