"""Loops as users write them: accumulation, mixed precision, gradient scaling, evaluation in
between.
"""

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pipelines import conv_net, cross_entropy, images
from support.recordings import decoded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import GradientMismatchError, RecordError

N = 8
INPUTS, TARGETS = images(24, 1).tensors


def record(
    run: Path, model: nn.Module, body: Callable[..., None], steps: int = 3
) -> torch.optim.Optimizer:
    """Train `model` for some steps; `body(model, optimizer, inputs, targets)` is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = Recorder(model, optimizer, run, n_samples=24, encoding="exact", dtype="float32")
    for step in range(steps):
        ids = np.arange(step * N, (step + 1) * N) % 24
        with recorder.step(ids):
            body(model, optimizer, INPUTS[ids], TARGETS[ids])
            optimizer.zero_grad()
    recorder.close()
    return optimizer


def plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> None:
    cross_entropy(model(x), y).mean().backward()
    optimizer.step()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def assert_same_rows(a: Path, b: Path, tolerance: float) -> None:
    rows, others = decoded(a), decoded(b)
    for name in rows:
        np.testing.assert_allclose(
            rows[name], others[name], atol=tolerance * np.abs(rows[name]).max(), err_msg=name
        )


@pytest.mark.parametrize("build", [mlp, conv_net])
@pytest.mark.parametrize("parts", [[(0, 4), (4, 8)], [(0, 3), (3, 6), (6, 8)], [(0, 1), (1, 8)]])
def test_accumulated_passes_give_the_rows_of_one_pass(
    tmp_path: Path, build: Callable[[], nn.Module], parts: list[tuple[int, int]]
) -> None:
    def accumulated(model, optimizer, x, y) -> None:
        for first, last in parts:
            (cross_entropy(model(x[first:last]), y[first:last]).sum() / N).backward()
        optimizer.step()

    record(tmp_path / "one", build(), plain)
    record(tmp_path / "many", build(), accumulated)
    assert_same_rows(tmp_path / "one", tmp_path / "many", 1e-4)
    names = [
        block.encoding for block in hydra_pipe.open_run(tmp_path / "many").gradients.layout.blocks
    ]
    assert "factored" in names


def test_passes_that_leave_samples_out_are_told(tmp_path: Path) -> None:
    def half(model, optimizer, x, y) -> None:
        cross_entropy(model(x[:4]), y[:4]).mean().backward()
        optimizer.step()

    with pytest.raises(
        RecordError, match="the passes at step 0 took 4 samples, sample_ids names 8"
    ):
        record(tmp_path / "run", mlp(), half)


def test_two_passes_over_the_same_samples_add_up(tmp_path: Path) -> None:
    def twice(model, optimizer, x, y) -> None:
        (cross_entropy(model(x), y) + cross_entropy(model(x), y)).mean().div(2).backward()
        optimizer.step()

    record(tmp_path / "one", mlp(), plain)
    record(tmp_path / "two", mlp(), twice)
    assert_same_rows(tmp_path / "one", tmp_path / "two", 1e-5)


def test_evaluation_in_between_is_not_recorded(tmp_path: Path) -> None:
    def eval_mode(model, optimizer, x, y) -> None:
        model.eval()
        with torch.no_grad():
            model(INPUTS)
        model.train()
        plain(model, optimizer, x, y)
        with torch.inference_mode():
            model(INPUTS[:3])

    record(tmp_path / "one", conv_net(), plain)
    record(tmp_path / "two", conv_net(), eval_mode)
    assert_same_rows(tmp_path / "one", tmp_path / "two", 0.0)


@pytest.mark.parametrize("build", [mlp, conv_net])
def test_autocast_gives_the_rows_of_full_precision_to_its_rounding(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    def autocast(model, optimizer, x, y) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y).mean()
        loss.backward()
        optimizer.step()

    record(tmp_path / "full", build(), plain, steps=1)
    record(tmp_path / "half", build(), autocast, steps=1)
    assert_same_rows(tmp_path / "full", tmp_path / "half", 0.1)


def test_a_gradient_scaler_scales_the_step_and_what_it_skips_is_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    calls = iter(range(10))

    def scaled(model, optimizer, x, y) -> None:
        overflow = float("inf") if next(calls) == 1 else 1.0
        scaler.scale(cross_entropy(model(x), y).mean() * overflow).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()

    model = mlp()
    record(tmp_path / "run", model, scaled)
    run = hydra_pipe.open_run(tmp_path / "run")
    facts = run.info()["stages"]["record"]["facts"]
    assert (facts["n_steps"], facts["n_skipped"], facts["n_rows"]) == (2, 1, 16)
    assert facts["worst_imbalance"] < 1e-6
    rows = decoded(tmp_path / "run")
    for first, scale in zip(run.steps["first_row"], run.steps["gradient_scale"], strict=True):
        norm = np.sqrt(
            sum(((block[first : first + N].sum(0) * scale) ** 2).sum() for block in rows.values())
        )
        # scaled up by 1024 or 512, scaled down, clipped
        assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_that_unscales_by_itself_gives_the_run_of_one_that_does_not(
    tmp_path: Path, kind: type[torch.optim.Optimizer], tracked: bool
) -> None:
    def train(run: Path, *, fused: bool) -> None:
        model, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = kind(model.parameters(), lr=0.01, fused=fused)
        recorder = Recorder(model, optimizer, run, n_samples=24, encoding="exact", dtype="float32")
        loader = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=N)
        for step, (x, y) in enumerate(recorder.track(loader) if tracked else loader):
            with nullcontext() if tracked else recorder.step(np.arange(step * N, (step + 1) * N)):
                optimizer.zero_grad()
                scaler.scale(
                    cross_entropy(model(x), y).mean() * (float("inf") if step == 1 else 1.0)
                ).backward()
                scaler.step(optimizer)
                scaler.update()
        recorder.close()

    train(tmp_path / "fused", fused=True)
    train(tmp_path / "plain", fused=False)
    runs = [hydra_pipe.open_run(tmp_path / name) for name in ("fused", "plain")]
    for key in ("n_steps", "n_skipped", "n_rows"):
        assert len({run.info()["stages"]["record"]["facts"][key] for run in runs}) == 1
    np.testing.assert_allclose(runs[0].steps["gradient_scale"], [1 / 1024, 1 / 512], rtol=1e-6)
    np.testing.assert_allclose(*(run.steps["gradient_scale"] for run in runs), rtol=1e-6)
    assert_same_rows(tmp_path / "fused", tmp_path / "plain", 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_are_shares_of_whatever_loss_is_taken(tmp_path: Path, reduction: str) -> None:
    def reduced(model, optimizer, x, y) -> None:
        getattr(cross_entropy(model(x), y), reduction)().backward()
        optimizer.step()

    record(tmp_path / "run", mlp(), reduced, steps=1)
    record(tmp_path / "mean", mlp(), plain, steps=1)
    factor = N if reduction == "sum" else 1
    for name, rows in decoded(tmp_path / "run").items():
        np.testing.assert_allclose(
            rows, decoded(tmp_path / "mean")[name] * factor, rtol=1e-4, atol=1e-7
        )


class MeanOverPositions(nn.Module):
    """Sums over many positions: the gradient of a weight overflows in half precision where no
    output's gradient does.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))).mean(1)


@pytest.mark.parametrize("clear", ["after", "before", "within", "within, to zero"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_that_only_a_weight_gradient_makes_a_scaler_leave_out_is_skipped(
    tmp_path: Path, clear: str, passes: int
) -> None:
    model, x = (
        MeanOverPositions(),
        40 * torch.rand(8, 512, 8, generator=torch.Generator().manual_seed(1)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=8)
    n_taken = 0
    for _ in range(8):
        if clear == "before":
            optimizer.zero_grad()
        with recorder.step(np.arange(8)):
            for part in x.chunk(passes):
                with torch.autocast("cpu", torch.float16):
                    loss = model(part).float().mean() / passes
                scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            n_taken += scaler.get_scale() >= scale
            if clear.startswith("within"):
                optimizer.zero_grad(set_to_none=clear == "within")
        optimizer.zero_grad()
    recorder.close()
    assert 0 < n_taken < 8  # so that there is something to be tested
    assert (recorder.n_steps, recorder.n_skipped) == (n_taken, 8 - n_taken)


def test_a_step_whose_gradients_the_loop_clears_is_skipped_and_one_that_it_forgets_is_refused(
    tmp_path: Path,
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=24)
    for step in range(3):
        with recorder.step(np.arange(8)):
            cross_entropy(model(INPUTS[:8]), TARGETS[:8]).mean().backward()
            if step != 1:  # as where the loss has jumped
                optimizer.step()
            optimizer.zero_grad()
    assert (recorder.n_steps, recorder.n_skipped) == (2, 1)

    def forgotten(recorder: Recorder, *, clear: bool) -> None:
        with recorder.step(np.arange(8)):
            cross_entropy(model(INPUTS[:8]), TARGETS[:8]).mean().backward()
            if clear:
                optimizer.zero_grad()

    said = r"ended without optimizer\.step\(\): put it inside.*call zero_grad\(\) there"
    with pytest.raises(RecordError, match=said):
        forgotten(recorder, clear=False)
    with pytest.raises(RecordError, match=said):  # by a loop that takes no step at all
        forgotten(Recorder(model, optimizer, tmp_path / "other", n_samples=24), clear=True)


class UsedTwice(nn.Module):
    """Its first weight is used by a function too, which no hook sees, from the second pass on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.calls = nn.Linear(64, 64), nn.Linear(64, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h = h + nn.functional.linear(x, self.a.weight) if self.calls else h
        self.calls += 1
        return self.b(torch.relu(h)).mean(1)


@pytest.mark.parametrize("inside", [False, True])
def test_books_see_what_is_missed_where_backward_is_called_within_autocast(
    tmp_path: Path, inside: bool
) -> None:
    model = UsedTwice()
    x, y = (
        30 * torch.rand(8, 128, 64, generator=torch.Generator().manual_seed(0)),
        torch.arange(8) % 4,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=8, encoding="exact")

    def train() -> None:
        for _ in range(3):
            with recorder.step(np.arange(8)):
                with torch.autocast("cpu", torch.float16):
                    loss = nn.functional.cross_entropy(model(x), y)
                    if inside:
                        loss.backward()
                if not inside:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()

    with pytest.raises(GradientMismatchError, match=r"a\.weight"):
        train()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tracked", [False, True])
def test_autocast_accumulation_clipping_and_a_skipped_step_together_balance(
    tmp_path: Path, half: torch.dtype, tracked: bool
) -> None:
    def train(run: Path | None) -> nn.Module:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 3)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=half == torch.float16)
        recorder = Recorder(model, optimizer, run, n_samples=24) if run else None
        loader = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4)
        if recorder and tracked:
            loader = recorder.track(loader)
        for epoch in range(2):
            step = nullcontext()
            for k, (inputs, targets) in enumerate(loader):
                if k % 2 == 0 and recorder and not tracked:
                    step = recorder.step(range(4 * k, 4 * k + 8))
                    step.__enter__()
                with torch.autocast("cpu", half):
                    loss = cross_entropy(model(inputs), targets).mean() / 2
                overflow = float("inf") if half == torch.float16 and (epoch, k) == (1, 2) else 1.0
                scaler.scale(loss * overflow).backward()
                if k % 2 == 0:
                    continue
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                if recorder and not tracked:
                    step.__exit__(None, None, None)
                optimizer.zero_grad()
        if recorder:
            recorder.close()
        return model

    # the schedule counts the step that the scaler left out, and torch warns of it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        recorded, plain = train(tmp_path / "run"), train(None)
    for a, b in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    run = hydra_pipe.open_run(tmp_path / "run")
    facts = run.info()["stages"]["record"]["facts"]
    skipped = half == torch.float16
    assert (facts["n_steps"], facts["n_skipped"], facts["n_rows"]) == (
        6 - skipped,
        skipped,
        8 * (6 - skipped),
    )
    assert facts["worst_imbalance"] < 5e-2
    assert facts["n_curved_rows"] == facts["n_rows"]
    assert np.unique(run.steps["learning_rate"]).size > 2


def test_batches_of_ever_other_sizes_leave_nothing_behind(tmp_path: Path) -> None:
    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    model, sizes = mlp(), np.random.default_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=24, encoding="exact")
    seen = []
    for step in range(600):
        ids = np.arange(sizes.integers(1, 24))
        with recorder.step(ids):
            plain(model, optimizer, INPUTS[ids], TARGETS[ids])
            optimizer.zero_grad()
        if step in (299, 599):
            seen.append(live_tensors())
    recorder.close()
    assert seen[1] < seen[0] + 300


@pytest.mark.parametrize("own", [False, True])
def test_a_told_loss_that_raises_hides_no_error_loses_no_step_and_leaves_no_hook(
    tmp_path: Path, own: bool
) -> None:
    def raising(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise TypeError("the loss raised")

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=24)

    def train() -> None:
        for step in range(20):
            with recorder.step(np.arange(N)):
                output = model(INPUTS[:N])
                if step == 3:
                    recorder.set_loss(raising, output, TARGETS[:N])
                output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if own and step == 4:
                    raise KeyError("the loop's own")

    with pytest.raises(KeyError if own else TypeError):
        train()
    assert not any(module._forward_hooks for module in model.modules())
    stage = hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]
    assert stage["state"] == "failed"
    assert stage["facts"]["n_steps"] == (5 if own else 17)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_that_is_the_gradient_itself_is_not_clipped_with_it(
    tmp_path: Path, batch: int
) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(1, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) + self.by

    def clipped(model, optimizer, x, y) -> None:
        cross_entropy(model(x), y).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    model = nn.Sequential(Shift(), nn.Tanh(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(
        model, optimizer, tmp_path / "run", n_samples=24, encoding="exact", dtype="float32"
    )
    for _ in range(2):
        with recorder.step(np.arange(batch)):
            clipped(model, optimizer, INPUTS[:batch], TARGETS[:batch])
            optimizer.zero_grad()
    recorder.close()
    scales = hydra_pipe.open_run(tmp_path / "run").steps["gradient_scale"]
    rows = decoded(tmp_path / "run", slice(0, batch))
    norm = np.sqrt(sum(((block.sum(0) * scales[0]) ** 2).sum() for block in rows.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
