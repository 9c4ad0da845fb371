"""`Recorder.state_dict`: a recording that was killed and goes on is that of an uninterrupted run,
byte for byte.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.pipelines import conv_net, cross_entropy, images
from support.processes import forked
from support.recordings import assert_same_run, contents
from support.small_files import make_files_small
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import GradientMismatchError, HydraError, RecordError, RunError, StoreError
from hydra_pipe.recording import row_buffer
from hydra_pipe.store.data import gradients

N_SAMPLES, BATCH, EPOCHS, EVERY = 22, 8, 7, 3
TRAIN, TEST = images(N_SAMPLES, 1), images(5, 2)
BUILDERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@pytest.fixture(scope="module", autouse=True)
def _small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_files_small(patch.setattr)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of an uninterrupted run, once for each set of options: `run` and `state.pt`."""
    made: dict[str, Path] = {}

    def of(**options: object) -> Path:
        if str(options) not in made:
            made[str(options)] = directory = tmp_path_factory.mktemp("whole")
            train(directory / "run", directory / "state.pt", **options)
        return made[str(options)]

    return of


def train(
    run: Path,
    checkpoint: Path,
    *,
    optimizer: str = "sgd",
    dtype: str = "float16",
    resume: bool = False,
    kill_at: int | None = None,
    wait: bool = False,
    tests_at: tuple[int, ...] = (5, 6, 8),
) -> None:
    """A loop with checkpoints, as a user writes it.

    It dies at `kill_at`, after everything is on the disk if it is to `wait`.
    """
    model = conv_net()
    optim = BUILDERS[optimizer](model)
    recorder = Recorder(
        model, optim, run, n_samples=N_SAMPLES, dtype=dtype, dim=200, sample_labels=["a", "b"] * 11
    )
    loader = recorder.track(
        DataLoader(TRAIN, batch_size=BATCH, sampler=DistributedSampler(TRAIN, 1, 0), drop_last=True)
    )
    done = 0
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optim.load_state_dict(saved["optimizer"])
        recorder.load_state_dict(saved["recorder"])
        done = saved["done"]
    at = 0
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            at += 1
            if at <= done:
                continue
            cross_entropy(model(x), y).mean().backward()
            optim.step()
            optim.zero_grad()
            if at in tests_at:
                recorder.record_test(DataLoader(TEST, batch_size=3), cross_entropy)
            if at % EVERY == 0:
                own = {"model": model.state_dict(), "optimizer": optim.state_dict(), "done": at}
                torch.save(own | {"recorder": recorder.state_dict()}, checkpoint)
            if at == kill_at:
                if wait:
                    recorder._output.writer._writer.drain()
                os._exit(7)
    recorder.record_test(DataLoader(TEST, batch_size=3), cross_entropy)
    recorder.close()


def killed(run: Path, checkpoint: Path, **options: object) -> None:
    """`train` in another process, which dies."""
    process = forked(train, run, checkpoint, **options)
    process.join()
    assert process.exitcode == 7


CASES = [
    # a state of an unfinished shard, with one step, or more and test gradients, past it
    {"kill_at": 4},
    {"kill_at": 5, "dtype": "int8", "wait": True},
    {"kill_at": 5, "optimizer": "adamw", "wait": True},
    # of whole shards of rows, at once and later; with test gradients taken at the same step
    {"kill_at": 6, "dtype": "int8", "optimizer": "adamw"},
    {"kill_at": 8, "wait": True},
    # of whole shards of rows and of steps
    {"kill_at": 12, "wait": True},
    {"kill_at": 14, "optimizer": "adamw", "wait": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_run_that_was_killed_and_goes_on_is_that_of_an_uninterrupted_one(
    tmp_path: Path, whole, case: dict[str, object]
) -> None:
    killed(tmp_path / "run", tmp_path / "state.pt", **case)
    options = {name: value for name, value in case.items() if name not in ("kill_at", "wait")}
    train(tmp_path / "run", tmp_path / "state.pt", resume=True, **options)
    other = whole(**options)
    assert_same_run(tmp_path / "run", other / "run")
    ours, others = (torch.load(path / "state.pt", weights_only=True) for path in (tmp_path, other))
    assert ours["recorder"] == others["recorder"] | {"run_id": ours["recorder"]["run_id"]}
    assert all(map(torch.equal, ours["model"].values(), others["model"].values()))


def test_an_earlier_state_discards_what_later_ones_counted(tmp_path: Path, whole) -> None:
    killed(tmp_path / "run", tmp_path / "state.pt", kill_at=4)
    shutil.copy(tmp_path / "state.pt", tmp_path / "early.pt")
    train_until(tmp_path / "run", tmp_path / "state.pt")
    train(tmp_path / "run", tmp_path / "early.pt", resume=True)
    assert_same_run(tmp_path / "run", whole() / "run")


def train_until(run: Path, checkpoint: Path) -> None:
    """Goes on to the end with other test gradients, but is not closed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "close", lambda recorder: recorder.state_dict())
        train(run, checkpoint, resume=True, tests_at=(7, 9, 13))


def started(
    run: Path, n_steps: int = 3, **options: object
) -> tuple[Recorder, nn.Module, torch.optim.Optimizer]:
    model = conv_net()
    optimizer = BUILDERS["sgd"](model)
    recorder = Recorder(model, optimizer, run, **({"n_samples": N_SAMPLES, "dim": 200} | options))
    for _ in range(n_steps):
        one_step(recorder, model, optimizer)
    return recorder, model, optimizer


def one_step(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with recorder.step(range(BATCH)):
        cross_entropy(model(TRAIN.tensors[0][:BATCH]), TRAIN.tensors[1][:BATCH]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_state_loads_as_weights_only_and_says_what_there_is(tmp_path: Path) -> None:
    recorder, _, _ = started(tmp_path / "run")
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["n_steps"], state["part_rows"], state["n_skipped"], state["tests"]) == (
        3,
        [24],
        0,
        [],
    )
    store = gradients.Gradients(tmp_path / "run" / "gradients.zarr")
    assert store.rows.n_rows == 24
    assert store.n_steps == 3
    assert store.missing() == []


def test_a_state_from_before_the_first_step_begins_anew(tmp_path: Path) -> None:
    state = started(tmp_path / "run", 0)[0].state_dict()
    assert state["run_id"] is None
    started(tmp_path / "run", 2)[0].state_dict()
    recorder, model, optimizer = started(tmp_path / "run", 0)
    recorder.load_state_dict(state)
    one_step(recorder, model, optimizer)
    recorder.close()
    started(tmp_path / "whole", 1)[0].close()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_which_steps_are_checked_together_does_not_depend_on_batches_before_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or sums over them might be rounded otherwise."""
    together: list[int] = []
    check = row_buffer.RowBuffer.check
    monkeypatch.setattr(
        row_buffer.RowBuffer,
        "check",
        lambda s, *ids: together.append(len(s._entries)) or check(s, *ids),
    )

    def steps(
        recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, sizes: list[int]
    ) -> dict[str, object]:
        for size in sizes:
            with recorder.step(range(size)):
                cross_entropy(
                    model(TRAIN.tensors[0][:size]), TRAIN.tensors[1][:size]
                ).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return recorder.state_dict()

    recorder, model, optimizer = started(tmp_path / "run", 0)
    state = steps(recorder, model, optimizer, [6])
    weights, moments = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
    steps(recorder, model, optimizer, [8] * 6)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    recorder, model, optimizer = started(tmp_path / "run", 0)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    recorder.load_state_dict(state)
    steps(recorder, model, optimizer, [8] * 6)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert together == [1, *[2] * 3, *[2] * 3]


def test_skipped_steps_are_counted_on(tmp_path: Path) -> None:
    recorder, model, optimizer = started(tmp_path / "run", 0)
    for clear in (True, False, True):
        x, y = next(iter(recorder.track(DataLoader(TRAIN, batch_size=11))))
        (cross_entropy(model(x), y).mean() * (1.0 if clear else float("inf"))).backward()
        if clear:
            optimizer.zero_grad()
        # the gradients are cleared, or cannot be used: nothing waits
        assert recorder.state_dict()["n_steps"] == 0
        optimizer.zero_grad()
    state = recorder.state_dict()
    assert state["n_skipped"] == 3
    other, _, _ = started(tmp_path / "run", 0)
    other.load_state_dict(state)
    assert other.n_skipped == 3


def test_a_recording_that_failed_goes_on_from_its_last_state(tmp_path: Path) -> None:
    recorder, _, _ = started(tmp_path / "run")
    state = recorder.state_dict()
    recorder.fail(RuntimeError("the power went"))
    assert "failed" in (tmp_path / "run" / "run.json").read_text()
    other, model, optimizer = started(tmp_path / "run", 0)
    other.load_state_dict(state)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["record"]
    committed = {name: state[name] for name in ("n_steps", "part_rows", "tests", "n_tests")} | {
        "labels": []
    }
    assert (record["state"], record["facts"]) == ("running", {"committed": committed})
    one_step(other, model, optimizer)
    other.close()
    assert hydra_pipe.verify(tmp_path / "run") == []


class TestWhatCannotGoOn:
    def test_inside_of_a_step(self, tmp_path: Path) -> None:
        recorder, _, _ = started(tmp_path / "run")
        with (
            pytest.raises(RecordError, match=r"state_dict\(\) in the middle of step 3: call it"),
            recorder.step(range(8)),
        ):
            recorder.state_dict()

    def test_batches_that_are_accumulated(self, tmp_path: Path) -> None:
        recorder, model, optimizer = started(tmp_path / "run")
        for k, (x, y) in enumerate(recorder.track(DataLoader(TRAIN, batch_size=8))):
            cross_entropy(model(x), y).mean().div(2).backward()
            if k == 0:
                with pytest.raises(RecordError, match="of which 1 batches wait for optimizer"):
                    recorder.state_dict()
            if k == 1:
                optimizer.step()
                optimizer.zero_grad()
                assert recorder.state_dict()["part_rows"] == [40]  # the refusal has lost nothing
        optimizer.zero_grad()
        assert recorder.state_dict()["n_steps"] == 4

    def test_a_closed_recorder(self, tmp_path: Path) -> None:
        recorder, _, _ = started(tmp_path / "run")
        recorder.close()
        for call in (recorder.state_dict, lambda: recorder.load_state_dict({})):
            with pytest.raises(RecordError, match="this recorder is closed"):
                call()

    def test_a_step_that_the_books_refuse(self, tmp_path: Path) -> None:
        recorder, model, optimizer = started(tmp_path / "run")
        with recorder.step(range(8)):
            cross_entropy(model(TRAIN.tensors[0][:8]), TRAIN.tensors[1][:8]).mean().backward()
            model[0].weight.grad += 1.0
            optimizer.step()
        with pytest.raises(GradientMismatchError, match="at step 3"):
            recorder.state_dict()

    def test_something_else(self, tmp_path: Path) -> None:
        recorder, _, _ = started(tmp_path / "run", 0)
        for other in ({}, [1], {"hydra_pipe_state": 1, "n_steps": 3}):
            with pytest.raises(RecordError, match="this is no value of"):
                recorder.load_state_dict(other)
        with pytest.raises(RecordError, match="the state is of version 2, this hydra-pipe reads 1"):
            recorder.load_state_dict({"hydra_pipe_state": 2})

    def test_after_the_first_step(self, tmp_path: Path) -> None:
        recorder, _, _ = started(tmp_path / "run")
        state = recorder.state_dict()
        with pytest.raises(
            RecordError,
            match=r"load_state_dict\(\) in step 3: load the state before the first step",
        ):
            recorder.load_state_dict(state)

    @staticmethod
    def refused(
        run: Path,
        state: dict[str, object],
        error: type[HydraError],
        message: str,
        **options: object,
    ) -> None:
        recorder, _, _ = started(run, 0, **options)
        before = contents(run) if (run / "run.json").exists() else None
        with pytest.raises(error, match=message):
            recorder.load_state_dict(state)
        assert before is None or contents(run) == before

    def test_a_run_that_is_not_there(self, tmp_path: Path) -> None:
        self.refused(
            tmp_path / "other",
            started(tmp_path / "run")[0].state_dict(),
            RunError,
            "there is no run at",
        )

    def test_another_run(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        started(tmp_path / "other")[0].state_dict()
        self.refused(
            tmp_path / "other",
            state,
            RunError,
            f"the state is of run {state['run_id']}: the directory was recorded again",
        )

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_run_that_was_begun_again(self, tmp_path: Path, overwrite: bool) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        started(tmp_path / "run", overwrite=overwrite)[0].state_dict()
        self.refused(tmp_path / "run", state, RunError, "was recorded again since")

    def test_a_complete_run(self, tmp_path: Path) -> None:
        recorder, _, _ = started(tmp_path / "run")
        state = recorder.state_dict()
        recorder.close()
        with pytest.raises(RunError, match="is recorded already"):
            started(tmp_path / "run", 0)
        self.refused(tmp_path / "run", state, RunError, "is recorded completely", overwrite=True)

    def test_other_settings(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        with pytest.raises(RunError, match="record was run with dim=200, now dim=300"):
            started(tmp_path / "run", 0, dim=300)
        self.refused(
            tmp_path / "run",
            state,
            RunError,
            "record was run with dim=200, now dim=300",
            dim=300,
            overwrite=True,
        )

    def test_another_model(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 4))
        recorder = Recorder(
            model, BUILDERS["sgd"](model), tmp_path / "run", n_samples=N_SAMPLES, dim=200
        )
        with pytest.raises(
            RunError,
            match=(
                r"has 2\.weight \(4, 3, 3, 3\) in group 0 where the optimizer now has 2\.weight "
                r"\(4, 108\)"
            ),
        ):
            recorder.load_state_dict(state)

    def test_another_optimizer(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        model = conv_net()
        recorder = Recorder(
            model, BUILDERS["adamw"](model), tmp_path / "run", n_samples=N_SAMPLES, dim=200
        )
        with pytest.raises(
            RunError,
            match="without a preconditioner; the optimizer has 1 parameter groups, with a",
        ):
            recorder.load_state_dict(state)

    def test_rows_that_are_not_there(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        self.refused(
            tmp_path / "run",
            state | {"part_rows": [32]},
            StoreError,
            "has 24 rows, the state counts 32",
        )
        self.refused(
            tmp_path / "run",
            state | {"tests": [2]},
            StoreError,
            "lacks the test gradients of step 2",
        )
        shutil.rmtree(tmp_path / "run" / "gradients.zarr" / "gradient" / "c" / "0")
        self.refused(tmp_path / "run", state, StoreError, "gradient lacks 1 chunk files")

    def test_rotten_rows(self, tmp_path: Path) -> None:
        state = started(tmp_path / "run")[0].state_dict()
        file = tmp_path / "run" / "gradients.zarr" / "gradient" / "c" / "1" / "0"
        rotten = bytearray(file.read_bytes())
        rotten[9] ^= 1
        file.write_bytes(rotten)
        self.refused(tmp_path / "run", state, StoreError, "gradient cannot be read")
