"""A pipeline's recording that was killed, at any step and as often as one likes, and goes on: the
same bytes.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.optimizers import CASES, pipeline_of
from support.pipelines import conv_pipeline, cross_entropy, images
from support.processes import forked, record_and_die
from support.recordings import contents, stages
from support.small_files import make_files_small
from torch import nn
from torch.utils.data import Dataset

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.cli.app import app
from hydra_pipe.errors import InterruptedRunError, UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.checkpoints import KEPT, checkpoints_in
from hydra_pipe.training import trainer
from hydra_pipe.training.checkpointing import Interval
from hydra_pipe.training.interruption import stop_requested


@pytest.fixture(scope="module", autouse=True)
def _small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_files_small(patch.setattr)
        yield


class Augmented(Dataset[Any]):
    """Images with noise of all three global generators, which differs from epoch to epoch."""

    def __init__(self, n: int) -> None:
        self._images = images(n, 1)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self._images[index]
        return image + 0.1 * torch.rand(1) + 0.1 * random.random() + float(
            np.random.normal(0, 0.1)
        ), label


def dropout_pipeline(num_workers: int = 0) -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=cross_entropy,
        train=Augmented(22),
        test=images(5, 2),
        batch_size=8,
        epochs=5,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=15),
        num_workers=num_workers,
    )


BUILDERS: dict[str, Callable[[], Pipeline]] = {
    "SGD, clipped, two groups, cosine": lambda: conv_pipeline(epochs=4),
    "AdamW, dropout, augmented": dropout_pipeline,
    "AdamW, dropout, augmented, two workers": lambda: dropout_pipeline(2),
} | {
    case: partial(pipeline_of, case, epochs=4)
    for case in CASES
    if case.split()[0] not in ("Lion", "LARS")
}


def facts(run: Path) -> object:
    found = stages(run)
    for name in ("train_seconds", "test_seconds", "checkpoint_seconds"):
        found["record"]["facts"].pop(name)  # type: ignore[index]
    return found


def assert_same(a: Path, b: Path) -> None:
    ours, others = contents(a), contents(b)
    assert sorted(ours) == sorted(others)
    assert [name for name in ours if ours[name] != others[name]] == []
    assert (a / "checkpoints" / "final.pt").read_bytes() == (
        b / "checkpoints" / "final.pt"
    ).read_bytes()
    assert facts(a) == facts(b)
    assert [path.name for path in (a / "checkpoints").iterdir()] == ["final.pt"]
    assert hydra_pipe.verify(a) == []


@pytest.mark.filterwarnings("ignore:the optimizer has maximize=True")
@pytest.mark.parametrize("name", BUILDERS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, name: str
) -> None:
    build = BUILDERS[name]
    hydra_pipe.record(build(), tmp_path / "whole")
    for kill_at in (4, 3, 5):
        record_and_die(kill_at, build, tmp_path / "run", checkpoint_every="2")
    assert len(checkpoints_in(tmp_path / "run" / "checkpoints")) == KEPT
    hydra_pipe.record(build(), tmp_path / "run", checkpoint_every="3")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("every", ["epoch", "2"])
def test_gradients_taken_on_the_way_are_the_same_after_a_kill(tmp_path: Path, every: str) -> None:
    build = BUILDERS["AdamW, dropout, augmented"]
    hydra_pipe.record(build(), tmp_path / "whole", test_every=every)
    expected = {"epoch": [3, 6, 9, 12, 15], "2": [2, 4, 6, 8, 10, 12, 14, 15]}
    assert hydra_pipe.open_run(tmp_path / "whole").gradients.test_steps() == expected[every]
    for kill_at in (4, 3, 5):
        record_and_die(kill_at, build, tmp_path / "run", checkpoint_every="3", test_every=every)
    hydra_pipe.record(build(), tmp_path / "run", checkpoint_every="1", test_every=every)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_what_a_dataset_draws_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        hydra_pipe.record(dropout_pipeline(workers), tmp_path / f"{workers}")
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of another run"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "whole")
    record_and_die(11, conv_pipeline, tmp_path / "run", checkpoint_every="2")
    newest, before, *_ = checkpoints_in(tmp_path / "run" / "checkpoints")
    content = bytearray(newest.path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "of another run":
        record_and_die(11, conv_pipeline, tmp_path / "other", checkpoint_every="2")
        newest.path.unlink()
        other = checkpoints_in(tmp_path / "other" / "checkpoints")[0].path
        (newest.path.parent / other.name).write_bytes(other.read_bytes())
    else:
        newest.path.write_bytes(
            {"flipped": bytes(content), "cut": bytes(content[:1000]), "empty": b""}[damage]
        )
    said = Said()
    hydra_pipe.record(conv_pipeline(), tmp_path / "run", progress=said)
    assert said.lines[0].startswith("passed over: ")
    assert said.lines[1] == f"resuming after step {before.step} (epoch {before.step // 4 + 1})"
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_checkpoints_starts_again(tmp_path: Path) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "whole")
    record_and_die(7, conv_pipeline, tmp_path / "run")
    hydra_pipe.record(conv_pipeline(), tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_overwriting_does_not_go_on(tmp_path: Path) -> None:
    record_and_die(7, conv_pipeline, tmp_path / "run", checkpoint_every="2")
    said = Said()
    hydra_pipe.record(conv_pipeline(), tmp_path / "run", overwrite=True, progress=said)
    assert not any("resuming after" in line for line in said.lines)


class Unkept(nn.Linear):
    """A layer whose state is not made of tensors and plain values."""

    def get_extra_state(self) -> object:
        return Unkept

    def set_extra_state(self, state: object) -> None:
        pass


def unkept_pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Unkept(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = images(16, 1)
    return Pipeline(model, optimizer, cross_entropy, data, images(3, 2), batch_size=4, epochs=3)


def test_a_state_that_cannot_be_read_without_executing_it_is_said_and_not_kept(
    tmp_path: Path,
) -> None:
    said = Said()
    hydra_pipe.record(unkept_pipeline(), tmp_path / "run", checkpoint_every="1", progress=said)
    assert sum("no checkpoints are taken" in line for line in said.lines) == 1
    assert checkpoints_in(tmp_path / "run" / "checkpoints") == []


def _command(arguments: list[str], errors: Path) -> None:
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    app(arguments)


LONG = """
from support.pipelines import mlp_pipeline

def pipeline():
    return mlp_pipeline(epochs=2000)
"""


def started(run: Path, errors: Path) -> BaseProcess:
    """The command that records, in a process of its own, which says in the file `errors` what it
    says.
    """
    long = run.with_name("long.py")
    long.write_text(LONG)
    return forked(_command, ["record", str(long), str(run)], errors)


def wait_until(process: BaseProcess, errors: Path, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.is_alive(), errors.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run, errors = tmp_path / "run", tmp_path / "errors"
    process = started(run, errors)
    wait_until(process, errors, (run / "run.json").exists)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code
    said = errors.read_text()
    assert f"hydra-pipe: stopped by {number.name} after step" in said
    assert "run the same command again to resume after step" in said
    assert "Traceback" not in said
    (checkpoint,) = checkpoints_in(run / "checkpoints")
    assert json.loads((run / "run.json").read_text())["stages"]["record"]["state"] == "failed"
    again = started(run, errors)
    heard = re.compile(r"^resuming after step ([\d,]+) \(epoch", flags=re.MULTILINE)
    wait_until(again, errors, lambda: heard.search(errors.read_text()) is not None)
    again.kill()
    again.join()
    (step,) = heard.findall(errors.read_text())
    assert int(step.replace(",", "")) == checkpoint.step


@pytest.fixture
def _heard() -> Iterator[None]:
    """Both signals have Python's own handlers: a shell that has put the tests into the background
    has SIGINT ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_ends_it_at_once(
    number: signal.Signals, error: type[BaseException]
) -> None:
    with stop_requested() as stop:
        signal.raise_signal(number)
        assert stop.name == number.name
        with pytest.raises(error):
            signal.raise_signal(number)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_heard")
def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requested() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_among_the_test_gradients_keeps_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "whole")
    real = trainer.test_batches

    def interrupted(*args: Any) -> Iterator[Any]:
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "test_batches", interrupted)
        with pytest.raises(
            InterruptedRunError, match=r"while taking test gradients: .* resume after step 10"
        ) as raised:
            hydra_pipe.record(conv_pipeline(), tmp_path / "run", checkpoint_every="9")
    assert raised.value.exit_code == 143
    hydra_pipe.record(conv_pipeline(), tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_intervals_are_steps_or_times() -> None:
    assert Interval.parse("500") == Interval(steps=500)
    assert Interval.parse("10min") == Interval(seconds=600)
    assert Interval.parse("1.5h") == Interval(seconds=5400)
    for text in ("0", "-1", "soon", "10 parsecs", ""):
        with pytest.raises(UsageError, match="checkpoint-every"):
            Interval.parse(text)


def test_by_default_checkpoints_take_a_fortieth_of_the_time_at_most() -> None:
    assert Interval().due(1, 61, 0.1)
    assert not Interval().due(10**6, 59, 0.1)
    assert not Interval().due(1, 399, 10.0)
    assert Interval().due(1, 400, 10.0)
