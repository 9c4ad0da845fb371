"""The recorder on real training: nothing is changed, everything is accounted for, loops that go
wrong are told.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from oracles import one_by_one_gradients
from support.pipelines import conv_net, conv_pipeline, cross_entropy, mlp_pipeline
from support.recordings import assert_same_arrays, decoded, decoded_tests
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.errors import (
    DataError,
    GradientMismatchError,
    LayerError,
    NonFiniteError,
    OptimizerError,
    RecordError,
    RunError,
    UsageError,
)
from hydra_pipe.plan import chunking
from hydra_pipe.recording import optimizers
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.names import TEST_LABELS, TRAIN_LABELS
from hydra_pipe.store.zarr.appender import Appender


class Mixed(nn.Module):
    """Modules that meet a sample once, twice or at several positions, a shared weight, a frozen
    one, one that is not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 2)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = F.relu(self.twice(x), inplace=True) + x
        x = self.frozen(torch.tanh(self.twice(x)))
        return self.head(self.norm(x)).mean(1)


def mixed_pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = Mixed()
    generator = torch.Generator().manual_seed(1)
    trained = [p for n, p in model.named_parameters() if n != "gain"]

    def dataset(n: int) -> TensorDataset:
        return TensorDataset(
            torch.randint(0, 11, (n, 5), generator=generator),
            torch.randint(0, 11, (n,), generator=generator),
        )

    optimizer = torch.optim.SGD(trained, lr=0.3, momentum=0.5)
    return Pipeline(
        model, optimizer, cross_entropy, dataset(20), dataset(4), batch_size=6, epochs=2
    )


@pytest.mark.parametrize("build", [conv_pipeline, mlp_pipeline, mixed_pipeline])
def test_rows_are_each_samples_share_of_the_batch_gradient(tmp_path: Path, build) -> None:
    pipeline = build()
    hydra_pipe.record(pipeline, tmp_path / "run", encoding="exact", dtype="float32")
    store = zarr.open_group(tmp_path / "run" / "gradients.zarr", mode="r")
    first_step = slice(0, int(store["steps/n_rows"][0]))
    samples = store["sample"][first_step]
    new = build()
    inputs, targets = new.train.tensors
    recorded = decoded(tmp_path / "run", first_step)
    truth = one_by_one_gradients(
        new.model, new.loss, inputs[samples], targets[samples], list(recorded)
    )
    for name, rows in recorded.items():
        expected = np.stack([row[name].flatten().numpy() for row in truth]) / len(samples)
        np.testing.assert_allclose(
            rows, expected, atol=1e-6 * (1e-3 + np.abs(expected).max()), err_msg=name
        )


def test_test_gradients_are_taken_one_by_one_at_the_final_parameters(tmp_path: Path) -> None:
    pipeline = conv_pipeline()
    hydra_pipe.record(pipeline, tmp_path / "run", encoding="exact", dtype="float32")
    recorded = decoded_tests(tmp_path / "run")
    truth = one_by_one_gradients(
        pipeline.model, pipeline.loss, *pipeline.test.tensors, list(recorded)
    )
    for name, rows in recorded.items():
        expected = np.stack([row[name].flatten().numpy() for row in truth])
        np.testing.assert_allclose(rows, expected, atol=2e-6 * np.abs(expected).max(), err_msg=name)


class Dropping(nn.Module):
    """Draws random numbers in every pass, and has a module without a layer rule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()
        self.shift = Shift()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shift(F.dropout(self.net(x), 0.3, self.training))


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def dropping_pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = Dropping()
    return conv_pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        scheduler=None,
    )


@pytest.mark.parametrize("build", [conv_pipeline, mlp_pipeline, mixed_pipeline, dropping_pipeline])
@pytest.mark.parametrize("encoding", ["exact", "projected"])
def test_weights_are_those_of_training_without_recording_bit_for_bit(
    tmp_path: Path, build, encoding: str
) -> None:
    plain, recorded = build(), build()
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run", encoding=encoding, dim=100)
    for (name, a), b in zip(
        plain.model.state_dict().items(), recorded.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def hooks_of(model: nn.Module) -> list[object]:
    return [
        hook
        for module in model.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
        for hook in getattr(module, kind).values()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_leave_no_trace(tmp_path: Path, fails: bool) -> None:
    pipeline = mlp_pipeline()
    if fails:
        pipeline.loss = lambda output, target: cross_entropy(output, target) * float("nan")
        with pytest.raises(hydra_pipe.HydraError):
            hydra_pipe.record(pipeline, tmp_path / "run")
    else:
        hydra_pipe.record(pipeline, tmp_path / "run")
    assert hooks_of(pipeline.model) == []
    assert not pipeline.optimizer._optimizer_step_pre_hooks
    assert pipeline.model.training


def own_loop(
    run: Path, *, epochs: int = 2, **options: object
) -> tuple[Recorder, nn.Module, TensorDataset]:
    """The loop of the README, as a user writes it."""
    pipeline = mlp_pipeline()
    model, optimizer = pipeline.model, pipeline.optimizer
    inputs, targets = pipeline.train.tensors
    loader = DataLoader(TensorDataset(inputs, targets, torch.arange(len(inputs))), batch_size=8)
    loss_fn = nn.CrossEntropyLoss()
    recorder = Recorder(model, optimizer, run, n_samples=len(inputs), **options)
    for _ in range(epochs):
        for x, y, sample_ids in loader:
            with recorder.step(sample_ids):
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return recorder, model, pipeline.test


def test_ones_own_loop_gives_a_run_that_reduces(tmp_path: Path) -> None:
    recorder, model, test = own_loop(
        tmp_path / "run", encoding="exact", dtype="float32", sample_labels=["a", "b"] * 20
    )
    recorder.record_test(DataLoader(test, batch_size=4), nn.CrossEntropyLoss())
    recorder.close()
    truth = one_by_one_gradients(
        model, cross_entropy, *test.tensors, list(decoded_tests(tmp_path / "run"))
    )
    for name, rows in decoded_tests(tmp_path / "run").items():
        np.testing.assert_allclose(
            rows, np.stack([t[name].flatten().numpy() for t in truth]), atol=1e-6, err_msg=name
        )
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    assert hydra_pipe.open_run(tmp_path / "run").relevance("hydra").shape == (40, 9)
    store = Gradients(tmp_path / "run" / "gradients.zarr")
    assert store.labels(TRAIN_LABELS).tolist() == ["a", "b"] * 20
    assert store.labels(TEST_LABELS).tolist() == test.tensors[1].tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_test_gradients_of_a_scalar_loss_are_each_samples_own(
    tmp_path: Path, reduction: str
) -> None:
    recorder, model, test = own_loop(tmp_path / "run", encoding="exact", dtype="float32")
    recorder.record_test(DataLoader(test, batch_size=4), nn.CrossEntropyLoss(reduction=reduction))
    recorder.close()
    (truth, *_) = one_by_one_gradients(model, cross_entropy, *test.tensors, ["1.weight"])
    np.testing.assert_allclose(
        decoded_tests(tmp_path / "run")["1.weight"][0], truth["1.weight"].flatten(), atol=1e-6
    )


def test_record_test_touches_neither_gradients_nor_modes(tmp_path: Path) -> None:
    recorder, model, test = own_loop(tmp_path / "run")
    model[1].eval()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    recorder.record_test(DataLoader(test, batch_size=4), cross_entropy)
    recorder.close()
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[1].weight.grad is None


def test_a_parameter_without_gradient_in_some_steps_is_left_out_of_them_only(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"always": nn.Linear(3, 3), "sometimes": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=4, encoding="exact")
    for step in range(4):
        with recorder.step(np.arange(4)):
            x = model["always"](torch.ones(4, 3))
            (model["sometimes"](x) if step % 2 else x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    schedule, series = Gradients(tmp_path / "run" / "gradients.zarr").schedules()
    assert series.tolist() == [0, 0, 1, 1]
    assert schedule.updated.tolist() == [[True, s % 2 == 1] for s in range(4)]
    assert schedule.momentum_started.tolist() == [[s == 0, s == 1] for s in range(4)]


def test_clipping_is_recorded_as_the_steps_scale(tmp_path: Path) -> None:
    pipeline = conv_pipeline(max_grad_norm=0.1)
    hydra_pipe.record(pipeline, tmp_path / "run", encoding="exact", dtype="float32")
    steps = hydra_pipe.open_run(tmp_path / "run").steps
    rows = decoded(tmp_path / "run")
    for first, count, scale in zip(
        steps["first_row"], steps["n_rows"], steps["gradient_scale"], strict=True
    ):
        batch = [block[first : first + count].sum(0) for block in rows.values()]
        norm = np.sqrt(sum((b**2).sum() for b in batch))
        assert scale == pytest.approx(min(1.0, 0.1 / (norm + 1e-6)), rel=1e-4)


def closure_of(model, x, y) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = cross_entropy(model(x), y).mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("form", ["positional", "keyword"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_whose_closure_makes_the_gradients_is_one_whose_loop_does(
    tmp_path: Path, form: str, optimizer
) -> None:
    def train(how: str, run: Path | None) -> dict[str, torch.Tensor]:
        pipeline = mlp_pipeline()
        model = pipeline.model
        inputs, targets = pipeline.train.tensors
        acting = optimizer(model.parameters(), lr=0.1)
        recorder = Recorder(model, acting, run, n_samples=40, dtype="float32") if run else None
        for first in range(0, 40, 8):
            closure = closure_of(model, inputs[first : first + 8], targets[first : first + 8])
            with recorder.step(range(first, first + 8)) if recorder else nullcontext():
                if how == "positional":
                    assert acting.step(closure).item() > 0
                elif how == "keyword":
                    acting.step(closure=closure)
                else:
                    closure()
                    acting.step()
        if recorder:
            recorder.close()
        return model.state_dict()

    plain = train(form, None)
    recorded = train(form, tmp_path / form)
    train("before", tmp_path / "before")
    assert all(torch.equal(value, recorded[name]) for name, value in plain.items())
    assert_same_arrays(tmp_path / "before", tmp_path / form)


def test_a_closure_that_makes_no_gradient_leaves_no_step(tmp_path: Path) -> None:
    pipeline = mlp_pipeline()
    recorder = Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40)
    inputs, targets = pipeline.train.tensors
    for k in range(4):
        recorder.next_batch(range(8))
        pipeline.optimizer.zero_grad()
        pipeline.optimizer.step(
            closure_of(pipeline.model, inputs[:8], targets[:8]) if k != 2 else lambda: None
        )
        recorder.end_batch()
    recorder.close()
    assert recorder.n_steps == 3


class TestLoopsThatGoWrong:
    def step(self, tmp_path: Path, body, ids=range(8), **options: object) -> None:
        pipeline = mlp_pipeline()
        recorder = Recorder(
            pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40, **options
        )
        inputs, targets = pipeline.train.tensors
        with recorder.step(torch.as_tensor(ids)):
            body(pipeline.model, pipeline.optimizer, inputs[:8], targets[:8])

    @staticmethod
    def right(model, optimizer, x, y) -> None:
        cross_entropy(model(x), y).mean().backward()
        optimizer.step()

    def test_no_optimizer_step(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"step 0 ended without optimizer\.step\(\)"):
            self.step(tmp_path, lambda model, optimizer, x, y: model(x).sum().backward())

    def test_a_step_outside(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40)
        with pytest.raises(
            RecordError, match=r"optimizer\.step\(\) is outside of recorder\.step\(\)"
        ):
            self.right(pipeline.model, pipeline.optimizer, *(t[:8] for t in pipeline.train.tensors))

    def test_a_closure_that_is_called_twice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Twice(torch.optim.SGD):
            def step(self, closure) -> None:
                closure()
                closure()

        monkeypatch.setitem(optimizers._RULES, Twice, optimizers.SgdRule())
        pipeline = mlp_pipeline()
        optimizer = Twice(pipeline.model.parameters(), lr=0.1)
        recorder = Recorder(pipeline.model, optimizer, tmp_path / "run", n_samples=40)
        inputs, targets = pipeline.train.tensors
        with (
            pytest.raises(RecordError, match="Twice called the closure of step 1 twice"),
            recorder.step(range(8)),
        ):
            optimizer.step(closure_of(pipeline.model, inputs[:8], targets[:8]))

    def test_no_backward_pass(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"no parameter has a gradient at step 0"):
            self.step(tmp_path, lambda model, optimizer, x, y: optimizer.step())

    def test_a_setting_that_json_cannot_hold(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="a setting cannot be kept"):
            own_loop(tmp_path / "run", settings={"layers": torch.ones(2)})

    def test_a_new_parameter_group(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        recorder = Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40)
        pipeline.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        with (
            pytest.raises(RecordError, match="new parameter group at step 0"),
            recorder.step(range(8)),
        ):
            self.right(pipeline.model, pipeline.optimizer, *(t[:8] for t in pipeline.train.tensors))

    def test_ids_of_another_batch(self, tmp_path: Path) -> None:
        with pytest.raises(
            RecordError,
            match=r"the passes at step 0 took 8 samples, sample_ids names 7: give the ids",
        ):
            self.step(tmp_path, self.right, ids=range(7))

    def test_ids_that_do_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"sample id 40 is not among the 40 training samples"):
            self.step(tmp_path, self.right, ids=range(34, 42))

    def test_ids_that_are_no_integers(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"dtype float32: give one integer for each sample"):
            self.step(tmp_path, self.right, ids=[0.5] * 8)

    def test_a_gradient_changed_by_hand(self, tmp_path: Path) -> None:
        def body(model, optimizer, x, y) -> None:
            cross_entropy(model(x), y).mean().backward()
            model[3].weight.grad += 0.1
            optimizer.step()

        with pytest.raises(
            GradientMismatchError, match=r"the recorded rows of 3\.weight miss .*% of its gradient"
        ):
            self.step(tmp_path, body)

    def test_an_old_gradient_that_was_not_cleared(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        x, y = (t[:8] for t in pipeline.train.tensors)
        cross_entropy(pipeline.model(x), y).mean().backward()
        recorder = Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40)
        with pytest.raises(GradientMismatchError), recorder.step(range(8)):
            self.right(pipeline.model, pipeline.optimizer, 1 - x, y)

    def test_a_layer_that_begins_to_train(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        pipeline.model[3].requires_grad_(False)
        recorder = Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40)
        x, y = (t[:8] for t in pipeline.train.tensors)
        with recorder.step(range(8)):
            self.right(pipeline.model, pipeline.optimizer, x, y)
        pipeline.model[3].requires_grad_(True)
        with (
            pytest.raises(RecordError, match="began to train at step 1"),
            recorder.step(range(8)),
        ):
            self.right(pipeline.model, pipeline.optimizer, x, y)

    def test_a_factored_layer_that_meets_more_positions_later(self, tmp_path: Path) -> None:
        layer = nn.Linear(20, 20)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        recorder = Recorder(layer, optimizer, tmp_path / "run", n_samples=4)

        def step(x: torch.Tensor) -> None:
            with recorder.step(range(4)):
                layer(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        step(torch.ones(4, 20))
        with pytest.raises(LayerError, match="weight was recorded as factored"):
            step(torch.ones(4, 3, 20))

    def test_closing_without_a_step(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        with pytest.raises(RecordError, match="nothing was recorded"):
            Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", n_samples=40).close()
        assert not (tmp_path / "run").exists()

    def test_recording_over_a_finished_run(self, tmp_path: Path) -> None:
        recorder, _, _ = own_loop(tmp_path / "run")
        recorder.close()
        with pytest.raises(RunError, match="is recorded already"):
            own_loop(tmp_path / "run")
        own_loop(tmp_path / "run", overwrite=True)[0].close()

    def test_labels_that_do_not_fit(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        with pytest.raises(DataError, match="sample_labels has 2 entries for 40"):
            Recorder(
                pipeline.model,
                pipeline.optimizer,
                tmp_path / "run",
                n_samples=40,
                sample_labels=[1, 2],
            )

    def test_an_optimizer_that_is_not_handled(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(OptimizerError, match="Adadelta is not handled"):
            Recorder(model, torch.optim.Adadelta(model.parameters()), tmp_path / "run", n_samples=4)


def test_the_manifest_says_what_was_recorded(tmp_path: Path) -> None:
    hydra_pipe.record(mlp_pipeline(), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["record"]
    assert record["state"] == "complete"
    assert {k: record["facts"][k] for k in ("n_steps", "n_rows", "n_tests")} == {
        "n_steps": 10,
        "n_rows": 80,
        "n_tests": 9,
    }
    assert record["facts"]["worst_imbalance"] < 1e-6
    # nothing filled a buffer
    assert (record["facts"]["stalls"], record["facts"]["stalled_seconds"]) == (0, 0.0)


def test_the_manifest_says_how_often_training_waited_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Appender.write

    def write_slowly(appender: Appender, first: int, rows: np.ndarray) -> None:
        time.sleep(0.005)
        write(appender, first, rows)

    monkeypatch.setattr(Appender, "write", write_slowly)
    monkeypatch.setattr(chunking, "SHARD_BYTES", 1)  # a file for each row
    hydra_pipe.record(mlp_pipeline(epochs=1), tmp_path / "run")
    facts = hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]["facts"]
    assert facts["stalls"] > 20  # 40 rows, of which two fit the buffers and two the queue
    assert facts["stalled_seconds"] > 20 * 0.005


class Positions(nn.Module):
    """Owns a parameter beside a child, as a transformer owns its position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.head, self.passes = (
            nn.Parameter(torch.randn(1, 64)),
            nn.Linear(64, 4),
            0,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.last = self.head(x.flatten(1) + self.position)
        return self.last


def test_a_module_with_parameters_and_children_leaves_no_trace_of_its_replay(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Positions()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    pipeline = mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    hydra_pipe.record(pipeline, tmp_path / "run", encoding="exact", dtype="float32")
    assert model.passes == 2 * 5 + 2  # steps, accuracy: what test gradients count is put back
    assert len(seen) == 1 + 2 * 5 + 2 + 2  # and the first test samples, before training
    assert model.last.shape == (1, 4)
    truth = one_by_one_gradients(model, cross_entropy, *pipeline.test.tensors, ["position"])
    expected = np.stack([t["position"].flatten().numpy() for t in truth])
    np.testing.assert_allclose(decoded_tests(tmp_path / "run")["position"], expected, atol=1e-6)


def test_a_test_gradient_that_is_not_a_number_is_refused_by_id(tmp_path: Path) -> None:
    recorder, _, test = own_loop(tmp_path / "run")
    inputs, targets = test.tensors

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output[:, 0] - output[:, 0].detach()).abs().sqrt() * (
            target == targets[5]
        ) + cross_entropy(output, target)

    with pytest.raises(
        NonFiniteError, match=r"not finite in the test gradients after 10 steps for samples"
    ):
        recorder.record_test([(inputs, targets)], loss)


def test_gradients_that_cancel_do_not_unbalance_the_books(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    pipeline = mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    hydra_pipe.record(pipeline, tmp_path / "run")


def test_a_gradient_that_nearly_vanishes_is_not_taken_for_a_clipped_one(tmp_path: Path) -> None:
    """Full batches to the optimum: what the rows sum to is rounding, and so is any scalar fitted to
    it.
    """
    model = nn.Linear(64, 4)
    pipeline = mlp_pipeline(
        model=nn.Sequential(nn.Flatten(), model),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
    )
    pipeline.batch_size, pipeline.epochs = 40, 400
    pipeline.loss = lambda output, target: (output - F.one_hot(target, 4)).square().sum(1)
    hydra_pipe.record(pipeline, tmp_path / "run", dtype="float32")
    assert (hydra_pipe.open_run(tmp_path / "run").steps["gradient_scale"] == 1.0).all()


def test_a_layer_frozen_at_the_end_keeps_its_earlier_relevance(tmp_path: Path) -> None:
    recorder, model, test = own_loop(tmp_path / "run", encoding="exact", dtype="float32")
    model[1].requires_grad_(False)
    recorder.record_test(DataLoader(test, batch_size=4), cross_entropy)
    recorder.close()
    assert not model[1].weight.requires_grad
    model[1].requires_grad_(True)
    truth = one_by_one_gradients(model, cross_entropy, *test.tensors, ["1.weight"])
    expected = np.stack([t["1.weight"].flatten().numpy() for t in truth])
    np.testing.assert_allclose(decoded_tests(tmp_path / "run")["1.weight"], expected, atol=1e-6)


def test_a_factored_bias_frozen_in_mid_run_has_no_rows_from_then_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=4, encoding="exact")
    for step in range(2):
        model.bias.requires_grad_(step == 0)
        with recorder.step(range(4)):
            model(torch.ones(4, 30)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    rows = decoded(tmp_path / "run")["bias"]
    assert np.abs(rows[:4]).min() > 0
    assert (rows[4:] == 0).all()


def test_test_gradients_in_mid_run_do_not_change_training(tmp_path: Path) -> None:
    def final_weights(with_test: bool) -> list[torch.Tensor]:
        pipeline = dropping_pipeline()
        torch.manual_seed(5)
        recorder = Recorder(
            pipeline.model, pipeline.optimizer, tmp_path / str(with_test), n_samples=26
        )
        inputs, targets = pipeline.train.tensors
        for step in range(4):
            with recorder.step(range(8)):
                cross_entropy(pipeline.model(inputs[:8]), targets[:8]).mean().backward()
                pipeline.optimizer.step()
                pipeline.optimizer.zero_grad()
            if with_test and step == 1:
                recorder.record_test(DataLoader(pipeline.test, batch_size=4), cross_entropy)
        return list(pipeline.model.parameters())

    assert all(map(torch.equal, final_weights(False), final_weights(True)))


class Gate(nn.Module):
    """Gives back a view of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 2, 8)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(64, 16), Gate(), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x.flatten(1))) * 2
        self.gate(hidden).mul_(3.0)
        return self.last(hidden)


def test_a_view_of_a_modules_input_stays_a_view(tmp_path: Path) -> None:
    def built() -> Pipeline:
        torch.manual_seed(0)
        model = Viewing()
        return mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    plain, recorded = built(), built()
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run")
    assert all(map(torch.equal, plain.model.parameters(), recorded.model.parameters()))


def test_another_pipeline_on_the_same_run_is_refused(tmp_path: Path) -> None:
    assert hydra_pipe.record(mlp_pipeline(), tmp_path / "run") is True
    assert hydra_pipe.record(mlp_pipeline(), tmp_path / "run") is False
    with pytest.raises(RunError, match="was run with epochs=2, now epochs=3"):
        hydra_pipe.record(mlp_pipeline(epochs=3), tmp_path / "run")


class Mixing(nn.Module):
    """Mixes the samples of a batch without a layer of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x.flatten(1))
        return hidden - hidden.mean(0)


def test_a_model_that_mixes_samples_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixing()
    pipeline = mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        LayerError, match="depends on other rows of layer: the model mixes the samples"
    ):
        hydra_pipe.record(pipeline, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def batch_norm_pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(36, 4),
    )
    return mlp_pipeline(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )


def test_batch_norm_in_training_is_recorded_by_shares_and_training_is_not_changed(
    tmp_path: Path,
) -> None:
    plain, recorded = batch_norm_pipeline(), batch_norm_pipeline()
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run")
    for (name, a), b in zip(
        plain.model.state_dict().items(), recorded.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert hydra_pipe.open_run(tmp_path / "run").steps["imbalance"].max() < 1e-5
