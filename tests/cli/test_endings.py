"""The last lines of `record` and of `run`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pipelines import conv_pipeline, images, mlp_pipeline
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cleaning import estimate
from hydra_pipe.cleaning.estimate import wrong_labels_line
from hydra_pipe.cli.app import app

N, WRONG = 160, 24
PIPELINE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline


def blobs(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    inputs = 0.5 * torch.randn(n, 6, generator=generator)
    inputs[torch.arange(n), labels] += 2
    return TensorDataset(inputs, labels)


def pipeline(wrong: int = {wrong}):
    torch.manual_seed(0)
    train, model = blobs({n}, 1), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    labels = train.tensors[1].clone()
    labels[:wrong] = (labels[:wrong] + 1) % 4
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(train.tensors[0], labels),
        test=blobs(9, 2),
        batch_size=8,
        epochs=10,
    )
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PIPELINE.format(n=N, wrong=WRONG))
    return "mine.py"


def call(*arguments: str) -> list[str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_record_ends_with_loss_accuracy_and_labels_that_look_wrong(pipeline: str) -> None:
    lines = call("record", pipeline, "run")
    facts = hydra_pipe.open_run("run").info()["stages"]["record"]["facts"]
    assert lines[-2] == (
        f"loss {facts['last_epoch_loss']:.4g} in the last epoch, accuracy "
        f"{facts['test_accuracy']:.1%} on 9 tests"
    )
    said = hydra_pipe.clean("run").summary["says"][0]
    n, low, high = hydra_pipe.clean("run").summary["n_wrong"]
    assert lines[-1] == (
        f"about {n:.0f} labels look wrong ({low:.0f} to {high:.0f}): hydra-pipe clean run"
    )
    assert said.startswith(f"about {n:.0f} of {N} labels look wrong")
    assert WRONG / 2 < n < 2 * WRONG
    assert call("record", pipeline, "run")[-1].startswith("run: recorded already")


def test_labels_that_are_right_alarm_nobody(pipeline: str) -> None:
    lines = call("record", pipeline, "run", "--set", "wrong=0")
    expected = "few labels look wrong, or none: hydra-pipe clean run lists the most suspicious"
    assert lines[-1] == expected


def test_run_ends_with_the_worst_samples_and_two_commands(pipeline: str) -> None:
    lines = call("run", pipeline, "run")
    start = lines.index(
        "training samples that harm the tests most, by relevance summed over the tests:"
    )
    assert lines[start + 1].split() == ["rank", "sample", "label", "relevance"]
    samples = hydra_pipe.open_run("run").samples().nsmallest(12, "rank")
    shown = [line.split() for line in lines[start + 2 : start + 14]]
    assert [int(row[1]) for row in shown] == samples["train_id"].tolist()
    assert [int(row[2]) for row in shown] == samples["label"].tolist()
    assert lines[start + 14 :] == ["next: hydra-pipe report run", "next: hydra-pipe clean run"]
    again = call("run", pipeline, "run", "--method", "tracin")
    assert again[-2:] == [
        "next: hydra-pipe report run --method tracin",
        "next: hydra-pipe clean run",
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("limit", ["MOST_SAMPLES", "MOST_CHANCES", "MOST_LOGITS"])
def test_many_samples_are_not_judged_unasked(
    recorded: Callable[..., Path], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "judge", lambda _: pytest.fail("it was judged"))
    monkeypatch.setattr(estimate, limit, 1)
    run = recorded()
    expected = f"labels that look wrong are found by hydra-pipe clean {run}"
    assert wrong_labels_line(run) == expected


@pytest.mark.parametrize("failure", [ValueError, MemoryError, KeyboardInterrupt])
def test_a_judgement_that_fails_is_left_out(
    recorded: Callable[..., Path], failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise failure

    monkeypatch.setattr(estimate, "judge", fail)
    assert wrong_labels_line(recorded()) is None


def test_what_has_no_classes_or_too_few_samples_says_nothing(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    assert wrong_labels_line(recorded()) is None, "26 samples are too few"
    inputs = images(24, 1).tensors[0]
    data = TensorDataset(inputs, inputs.flatten(1)[:, :4].clone())

    def loss(output: object, target: object) -> object:
        return nn.functional.mse_loss(output, target, reduction="none").mean(1)  # type: ignore[arg-type]

    hydra_pipe.record(mlp_pipeline(loss=loss, train=data, test=data), tmp_path / "run")
    assert wrong_labels_line(tmp_path / "run") is None
    shutil.rmtree(tmp_path / "run" / "gradients.zarr")
    assert wrong_labels_line(tmp_path / "run") is None
    assert conv_pipeline().test is not None
