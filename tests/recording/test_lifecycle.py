"""From `Recorder(...)` to `close()`: slips at the end, traces of test gradients, pauses,
interrupts, copies.
"""

import copy
import io
import json
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import zarr
from support.pipelines import cross_entropy, mlp_pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.cli.app import app
from hydra_pipe.errors import (
    DataError,
    GradientMismatchError,
    HydraError,
    PipelineError,
    RecordError,
    RecordWarning,
    RunError,
    UsageError,
    UserCodeError,
)
from hydra_pipe.recording.weights import WeightsNote
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients

EXACT: dict[str, Any] = {"encoding": "exact", "dtype": "float32"}
X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X, y: Tensor = Y
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def recorded(
    run: Path, model: nn.Module, steps: int = 2, x: Tensor = X, **options: Any
) -> tuple[Recorder, torch.optim.Optimizer]:
    optimizer = sgd(model)
    recorder = Recorder(model, optimizer, run, len(x), **EXACT | options)
    for _ in range(steps):
        with recorder.step(range(len(x))):
            take_step(model, optimizer, x)
    return recorder, optimizer


def state_of(run: Path) -> dict[str, Any]:
    return json.loads((run / names.MANIFEST).read_text())["stages"]["record"]


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook
        for m in model.modules()
        for name, value in vars(m).items()
        if name.endswith("_hooks") and value
        for hook in value.values()
    ]


def generators() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        random.getstate(),
    ]


def test_arrays(run: Path) -> dict[str, Any]:
    group = zarr.open_group(run / "gradients.zarr/test", mode="r")
    return {
        f"{step}/{name}": group[f"{step}/{name}"][:]
        for step in group.group_keys()
        for name in ("gradient", "scale", "loss")
    }


test_arrays.__test__ = False  # type: ignore[attr-defined]


class Failing(Dataset[Any]):
    """Its last sample cannot be had."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, i: int) -> Any:
        if i == len(self) - 1:
            raise OSError("the file is gone")
        return tuple(values[i] for values in self.tensors)


class TestSlips:
    """What fails in record_test leaves the recording as it was, and open for another try."""

    SLIPS: ClassVar[dict[str, tuple[Any, dict[str, Any]]]] = {
        "inputs that the model does not take": ([({"x": 1}, Y)], {}),
        "a second batch of another shape": ([(X, Y), (X[:, :2], Y)], {}),
        "a dataset that raises": (Failing(X, Y), {}),
        "labels of another number": ([(X, Y)], {"labels": [1, 2]}),
        "labels of another kind": ([(X, Y)], {"labels": [1.5] * 12}),
        "no batches": ([], {}),
        "no pairs": ([1, 2], {}),
        "nothing to iterate": (7, {}),
        "targets that are text": ([(X, "text")], {}),
        "an interrupt": ((pair for pair in [(X, Y)] if exec("raise KeyboardInterrupt")), {}),
    }

    @pytest.mark.parametrize("case", SLIPS)
    def test_the_second_try_gives_the_run_of_one_without_a_slip(
        self, tmp_path: Path, case: str
    ) -> None:
        tests, options = self.SLIPS[case]
        for name in ("slipped", "plain"):
            recorder, _ = recorded(tmp_path / name, net())
            if name == "slipped":
                with pytest.raises((HydraError, KeyboardInterrupt)):
                    recorder.record_test(tests, cross_entropy, **options)
                assert recorder.test_steps == []
            recorder.record_test([(X, Y)], cross_entropy)
            recorder.close()
        assert hydra_pipe.verify(tmp_path / "slipped") == []
        slipped, plain = (test_arrays(tmp_path / name) for name in ("slipped", "plain"))
        assert slipped.keys() == plain.keys()
        for name, values in plain.items():
            np.testing.assert_array_equal(slipped[name], values)

    def test_an_earlier_set_of_the_same_step_is_kept(self, tmp_path: Path) -> None:
        recorder, _ = recorded(tmp_path / "run", net())
        recorder.record_test([(X, Y)], cross_entropy)
        with pytest.raises(UserCodeError):
            recorder.record_test([(X[:, :2], Y)], cross_entropy)
        recorder.close()
        assert hydra_pipe.verify(tmp_path / "run") == []
        assert test_arrays(tmp_path / "run")["0000000002/loss"].shape == (12,)

    def test_training_goes_on_after_a_slip(self, tmp_path: Path) -> None:
        model = net()
        recorder, optimizer = recorded(tmp_path / "run", model)
        with pytest.raises(UserCodeError):
            recorder.record_test([(X[:, :2], Y)], cross_entropy)
        with recorder.step(range(12)):
            take_step(model, optimizer)
        recorder.record_test(TensorDataset(X, Y), cross_entropy)
        recorder.close()
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == 3

    @pytest.mark.parametrize(
        "optimizer", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)]
    )
    def test_a_run_without_test_gradients_gets_some_by_a_probe(
        self, tmp_path: Path, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> None:
        arrays = {}
        for name in ("with", "without"):
            model = net()
            own = optimizer(model)
            with Recorder(model, own, tmp_path / name, 12, **EXACT) as recorder:
                for _ in range(3):
                    with recorder.step(range(12)):
                        take_step(model, own)
                if name == "with":
                    recorder.record_test(TensorDataset(X, Y), cross_entropy)
            assert hydra_pipe.verify(tmp_path / name) == []
            if name == "without":
                with pytest.raises(
                    RunError,
                    match=r"without test gradients: take some .* by hydra-pipe probe .* --probe",
                ):
                    hydra_pipe.reduce(tmp_path / name, method="hydra")
                assert hydra_pipe.reduce(tmp_path / name, method="self")
                hydra_pipe.probe(
                    tmp_path / name,
                    TensorDataset(X, Y),
                    name="late",
                    model=model,
                    loss=cross_entropy,
                )
                assert hydra_pipe.verify(tmp_path / name) == []
            hydra_pipe.reduce(
                tmp_path / name, probe=None if name == "with" else "late", method="hydra"
            )
            result = "hydra" if name == "with" else "hydra-of-late"
            arrays[name] = zarr.open_array(tmp_path / name / "relevance.zarr" / result, mode="r")[:]
        np.testing.assert_array_equal(arrays["with"], arrays["without"])

    def test_test_gradients_on_the_way_are_not_taken_for_those_of_the_end(
        self, tmp_path: Path
    ) -> None:
        model = net()
        recorder, optimizer = recorded(tmp_path / "run", model)
        recorder.record_test([(X, Y)], cross_entropy)
        with recorder.step(range(12)):
            take_step(model, optimizer)
        recorder.close()
        assert hydra_pipe.verify(tmp_path / "run") == []
        with pytest.raises(RunError, match=r"without test gradients: .* answer --up-to-step STEP"):
            hydra_pipe.reduce(tmp_path / "run", method="hydra")
        assert hydra_pipe.reduce(tmp_path / "run", up_to_step=2, method="hydra")
        with pytest.raises(UsageError, match="taken after 2 steps"):
            hydra_pipe.reduce(tmp_path / "run", up_to_step=3, method="hydra")

    def test_labels_that_close_cannot_write_can_be_given_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorder, _ = recorded(tmp_path / "run", net(), sample_labels=Y)
        with monkeypatch.context() as patch:
            patch.setattr(
                type(recorder._output), "write_labels", lambda *_: exec("raise OSError('full')")
            )
            with pytest.raises(OSError, match="full"):
                recorder.close()
        recorder.close()
        assert state_of(tmp_path / "run")["state"] == "complete"
        assert hydra_pipe.verify(tmp_path / "run") == []


LABELS: list[tuple[Any, str]] = [
    (F.one_hot(Y, 3), r"sample_labels has shape \(12, 3\)"),
    (torch.rand(12), "and dtype float32: give one integer or string"),
    ([[0], [1, 2], *[[3]] * 10], "sample_labels cannot be an array"),
    ([None] * 12, "dtype object"),
    (np.zeros((12, 1), int), r"shape \(12, 1\)"),
    ([1.0] * 12, "dtype float64"),
    (Y[:5], "5 entries for 12 training samples"),
    ({1: 2}, r"shape \(\)"),
]


@pytest.mark.parametrize(("labels", "message"), LABELS)
def test_labels_that_cannot_be_are_refused_before_training(
    tmp_path: Path, labels: Any, message: str
) -> None:
    model = net()
    with pytest.raises(DataError, match=message):
        Recorder(model, sgd(model), tmp_path / "run", 12, sample_labels=labels)
    assert not hooks_of(model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "labels",
    [
        Y,
        Y.numpy(),
        Y.tolist(),
        Y.bool(),
        list("abcabcabcabc"),
        np.array(list("abcabcabcabc"), object),
    ],
)
def test_labels_of_either_kind_are_kept(tmp_path: Path, labels: Any) -> None:
    recorder, _ = recorded(tmp_path / "run", net(), sample_labels=labels)
    recorder.close()
    kept = Gradients(tmp_path / "run/gradients.zarr").labels(names.TRAIN_LABELS)
    assert kept is not None
    assert kept.tolist() == (labels.tolist() if hasattr(labels, "tolist") else labels)


class TestWith:
    def test_the_end_of_the_block_closes(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        with Recorder(model, optimizer, tmp_path / "run", 12) as recorder, recorder.step(range(12)):
            take_step(model, optimizer)
        assert state_of(tmp_path / "run")["state"] == "complete"
        assert not hooks_of(model)

    @pytest.mark.parametrize(
        ("error", "words"),
        [(ZeroDivisionError("mine"), "mine"), (KeyboardInterrupt(), "KeyboardInterrupt")],
    )
    def test_an_exception_marks_the_recording_as_failed(
        self, error: BaseException, words: str, tmp_path: Path
    ) -> None:
        model = net()
        optimizer = sgd(model)
        with (  # noqa: PT012
            pytest.raises(type(error)),
            Recorder(model, optimizer, tmp_path / "run", 12) as recorder,
        ):
            with recorder.step(range(12)):
                take_step(model, optimizer)
            raise error
        assert state_of(tmp_path / "run")["state"] == "failed"
        assert state_of(tmp_path / "run")["facts"]["error"] == words
        assert not hooks_of(model)
        with pytest.raises(RecordError, match=rf"recording has failed \({words}\)"):
            recorder.record_test([(X, Y)], cross_entropy)

    def test_a_slip_in_record_test_leaves_it_complete(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        with (  # noqa: PT012
            pytest.raises(UserCodeError),
            Recorder(model, optimizer, tmp_path / "run", 12) as recorder,
        ):
            with recorder.step(range(12)):
                take_step(model, optimizer)
            recorder.record_test([(X[:, :2], Y)], cross_entropy)
        assert state_of(tmp_path / "run")["state"] == "complete"
        assert hydra_pipe.verify(tmp_path / "run") == []

    def test_a_block_without_a_step_leaves_no_run(self, tmp_path: Path) -> None:
        model = net()
        with Recorder(model, sgd(model), tmp_path / "run", 12):
            pass
        assert not (tmp_path / "run").exists()
        assert not hooks_of(model)


def test_a_recording_that_was_never_closed_is_named(tmp_path: Path) -> None:
    recorder, _ = recorded(tmp_path / "run", net())
    recorder.record_test([(X, Y)], cross_entropy)
    for command in (hydra_pipe.reduce, hydra_pipe.prune):
        with pytest.raises(
            RunError, match=r"run was never closed: call recorder.close\(\)"
        ) as told:
            command(tmp_path / "run")
        assert "hydra-pipe record" not in str(told.value)
    recorder.fail(ValueError("mine"))
    with pytest.raises(RunError, match=r"state: failed\), mine: run the training again") as told:
        hydra_pipe.reduce(tmp_path / "run", method="hydra")
    assert "hydra-pipe record" not in str(told.value)


class Pair(nn.Module):
    """A model of two inputs, the second a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(x * mask)


class Pooled(nn.Module):
    """Takes sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).mean(1))


class Listed(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.samples[i]


MASK = (X > 0).float()
TEXTS = [list(range(1, 2 + i % 4)) for i in range(12)]
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "a TensorDataset": (net, lambda: TensorDataset(X, Y)),
    "a loader": (net, lambda: DataLoader(TensorDataset(X, Y), 5)),
    "a list of batches": (net, lambda: [(X[:7], Y[:7]), (X[7:], Y[7:], "more")]),
    "one batch": (net, lambda: (X, Y)),
    "one mapping": (Pair, lambda: {"x": X, "mask": MASK, "labels": Y}),
    "a generator of batches": (
        net,
        lambda: ((x[None], y[None]) for x, y in zip(X, Y, strict=True)),
    ),
    "a list of samples": (net, lambda: [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)]),
    "a dataset of mappings": (
        Pair,
        lambda: Listed([{"x": X[i], "mask": MASK[i], "label": int(Y[i])} for i in range(12)]),
    ),
    "batches of mappings": (
        Pair,
        lambda: [
            {"x": X[i : i + 4], "mask": MASK[i : i + 4], "labels": Y[i : i + 4]} for i in (0, 4, 8)
        ],
    ),
    "a dataset of two inputs": (Pair, lambda: Listed([((X[i], MASK[i]), Y[i]) for i in range(12)])),
    "a loader of two inputs": (
        Pair,
        lambda: DataLoader(Listed([((X[i], MASK[i]), Y[i]) for i in range(12)]), 4),
    ),
    "texts of unlike length": (
        Pooled,
        lambda: Listed([(torch.tensor(t), int(y)) for t, y in zip(TEXTS, Y, strict=True)]),
    ),
    "mappings of unlike length": (
        Pooled,
        lambda: Listed([{"input_ids": t, "labels": int(y)} for t, y in zip(TEXTS, Y, strict=True)]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_record_test_and_probe_take_test_samples_in_every_form(tmp_path: Path, form: str) -> None:
    build, given = FORMS[form]
    model = build()
    optimizer = sgd(model)
    inputs = {net: (X,), Pair: (X, MASK), Pooled: (torch.ones(12, 3, dtype=torch.long),)}[build]
    recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
    with recorder.step(range(12)):
        F.cross_entropy(model(*inputs), Y).backward()
        optimizer.step()
    recorder.record_test(given(), F.cross_entropy)
    recorder.close()
    hydra_pipe.probe(tmp_path / "run", given(), name="again", model=model, loss=F.cross_entropy)
    probe = zarr.open_group(tmp_path / "run/probes/again.zarr", mode="r")
    own = test_arrays(tmp_path / "run")
    np.testing.assert_allclose(probe["loss"][:], own["0000000001/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        probe["gradient"][:], own["0000000001/gradient"], rtol=1e-4, atol=1e-6
    )
    labels = Gradients(tmp_path / "run/gradients.zarr").labels(names.TEST_LABELS)
    assert labels is not None
    assert labels.tolist() == Y.tolist()


@pytest.mark.parametrize("form", ["mappings", "two inputs"])
def test_a_pipeline_may_have_a_model_of_two_inputs(tmp_path: Path, form: str) -> None:
    def build() -> Pipeline:
        torch.manual_seed(0)
        model = Pair()
        as_mapping = [{"x": X[i], "mask": MASK[i], "labels": Y[i]} for i in range(12)]
        as_pair = [((X[i], MASK[i]), Y[i]) for i in range(12)]
        data = Listed(as_mapping if form == "mappings" else as_pair)
        return Pipeline(model, sgd(model), cross_entropy, data, data, batch_size=4, epochs=2)

    plain, own = build(), build()
    hydra_pipe.train(plain)
    hydra_pipe.record(own, tmp_path / "run", **EXACT)
    for a, b in zip(plain.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(a, b)
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    hydra_pipe.reduce(tmp_path / "run", method="hydra-exact", pipeline=build())


class Counting(nn.Module):
    """A loss that grows with its calls."""

    calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(output, target) * self.calls


class TestPipelines:
    """The same for `hydra_pipe.record`."""

    def test_without_a_test_set_it_is_trained_recorded_and_probed(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        tests, pipeline = pipeline.test, Pipeline(**vars(pipeline) | {"test": None})
        hydra_pipe.record(pipeline, tmp_path / "run")
        assert hydra_pipe.verify(tmp_path / "run") == []
        hydra_pipe.probe(tmp_path / "run", tests, name="late", pipeline=pipeline)
        assert hydra_pipe.reduce(tmp_path / "run", probe="late", method="hydra")
        assert hydra_pipe.export(tmp_path / "run", probe="late", method="hydra")
        with pytest.raises(UsageError, match="the pipeline has no test set"):
            hydra_pipe.record(pipeline, tmp_path / "other", test_every="epoch")

    def test_a_test_set_that_cannot_be_is_told_before_training(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        before = copy.deepcopy(pipeline.model.state_dict())
        tests = TensorDataset(torch.randn(5, 2), torch.zeros(5, dtype=torch.long))
        with pytest.raises(
            UserCodeError, match="the model raised at the first test samples, before training"
        ):
            hydra_pipe.record(Pipeline(**vars(pipeline) | {"test": tests}), tmp_path / "run")
        assert all(
            torch.equal(value, before[name]) for name, value in pipeline.model.state_dict().items()
        )
        assert not (tmp_path / "run").exists()

    def test_a_model_or_a_loss_that_counts_its_calls_is_not_changed_by_the_trial(
        self, tmp_path: Path
    ) -> None:
        def build(of_function: bool) -> Pipeline:
            pipeline = mlp_pipeline()
            own, calls = Counting(), iter(range(100))

            def counting(output: Tensor, target: Tensor) -> Tensor:
                return cross_entropy(output, target) * (1 + next(calls))

            return Pipeline(**vars(pipeline) | {"loss": counting if of_function else own})

        for of_function in (True, False):
            plain, own = build(of_function), build(of_function)
            hydra_pipe.train(plain)
            hydra_pipe.record(own, tmp_path / str(of_function))
            for a, b in zip(plain.model.parameters(), own.model.parameters(), strict=True):
                assert torch.equal(a, b)

    def test_a_test_set_that_fails_later_leaves_the_training(self, tmp_path: Path) -> None:
        pipeline = mlp_pipeline()
        inputs, targets = pipeline.test.tensors
        batch = pipeline.batch_size
        many = [values[torch.arange(batch + 2) % len(values)] for values in (inputs, targets)]
        with pytest.warns(RecordWarning, match="the file is gone.* by hydra-pipe probe"):
            hydra_pipe.record(
                Pipeline(**vars(pipeline) | {"test": Failing(*many)}), tmp_path / "run"
            )
        assert state_of(tmp_path / "run")["state"] == "complete"
        assert hydra_pipe.verify(tmp_path / "run") == []

    def test_labels_of_another_kind_are_refused(self) -> None:
        pipeline = mlp_pipeline()
        with pytest.raises(PipelineError, match="test_labels has shape"):
            Pipeline(**vars(pipeline) | {"test_labels": [[1.0]] * len(pipeline.test)})


class Drawing(Dataset[Any]):
    """Draws from every generator, its own ones too."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)
        self.inner = [random.Random(0), {"of torch": torch.Generator()}]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        drawn = (
            torch.rand(())
            + np.random.rand()
            + random.random()
            + self.own.random()
            + self.inner[0].random()
        )  # type: ignore[attr-defined]
        drawn = drawn + torch.rand((), generator=self.inner[1]["of torch"])  # type: ignore[index]
        return torch.tensor([7 + i % 2, 8]), int(drawn) % 2


class TestTraces:
    """Test gradients leave parameters, buffers and generators as they were."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.frozen = (
                nn.Embedding(9, 4, max_norm=0.5),
                nn.Embedding(9, 4, max_norm=0.5).requires_grad_(False),
            )
            self.head = nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.passes, self.cache, self.last = 0, [], None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.passes, self.last = self.passes + 1, x
            self.cache.append(x)
            return self.head((self.embed(x) + self.frozen(x)).flatten(1))

    @pytest.mark.parametrize("way", ["batches", "a dataset", "a loader", "one that fails"])
    def test_of_record_test(self, tmp_path: Path, way: str) -> None:
        torch.manual_seed(0)
        model, tokens = self.Scaled(), torch.randint(0, 4, (8, 2))
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 8, **EXACT)
        with recorder.step(range(8)):
            take_step(model, optimizer, tokens, Y[:8] % 2)
        model.embed.weight.grad = marked = torch.ones(9, 4)
        drawing = Drawing()
        tests: Any = drawing
        if way == "batches":
            tests = [(torch.tensor([[7, 8]]), torch.tensor([0]))]
        elif way == "a loader":
            tests = DataLoader(drawing, 2, shuffle=True, generator=torch.Generator())
        elif way == "one that fails":
            tests = [
                (torch.tensor([[7, 8]]), torch.tensor([0])),
                (torch.tensor([[7, 99]]), torch.tensor([0])),
            ]
        before, drawn = copy.deepcopy(model.state_dict()), generators()
        own = (
            drawing.own.bit_generator.state,
            drawing.inner[0].getstate(),
            drawing.inner[1]["of torch"].get_state(),
        )  # type: ignore[attr-defined, index]
        if way == "one that fails":
            with pytest.raises(UserCodeError):
                recorder.record_test(tests, F.cross_entropy)
        else:
            recorder.record_test(tests, F.cross_entropy)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert generators() == drawn
        assert own[:2] == (drawing.own.bit_generator.state, drawing.inner[0].getstate())  # type: ignore[attr-defined]
        assert torch.equal(own[2], drawing.inner[1]["of torch"].get_state())  # type: ignore[index]
        assert (model.passes, len(model.cache)) == (1, 1)
        assert model.last is tokens
        assert model.embed.weight.grad is marked
        assert model.training
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]

    def test_of_a_probe(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model, tokens = self.Scaled(), torch.randint(0, 4, (8, 2))
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 8, **EXACT)
        with recorder.step(range(8)):
            take_step(model, optimizer, tokens, Y[:8] % 2)
        recorder.close()
        before, drawn = copy.deepcopy(model.state_dict()), generators()
        hydra_pipe.probe(tmp_path / "run", Drawing(), name="drawn", model=model, loss=cross_entropy)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert generators() == drawn


class TestOtherWeights:
    """Weights that are not those of the last recorded step are said."""

    CHANGES: ClassVar[dict[str, Callable[[nn.Module], Any]]] = {
        "by hand": lambda m: m[0].weight.mul_(0.5),
        "one element": lambda m: m[2].bias[2].add_(1.0),
        "an average, past the counters": lambda m: [
            p.data.copy_(p.data * 0.9) for p in m.parameters()
        ],
        "exchanged tensors": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
        "the best epoch": lambda m: m.load_state_dict(
            {name: value * 0.9 for name, value in m.state_dict().items()}
        ),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_at_record_test_and_at_close(self, tmp_path: Path, change: str) -> None:
        for name in ("test", "close"):
            model = net()
            recorder, _ = recorded(tmp_path / name, model)
            with torch.no_grad():
                self.CHANGES[change](model)
            with pytest.warns(RecordWarning, match="written to since the last recorded step, 1"):  # noqa: PT031 - both are one act
                if name == "test":
                    recorder.record_test([(X, Y)], cross_entropy)
                else:
                    recorder.close()
            recorder.close()
            assert state_of(tmp_path / name)["facts"]["test_weights"] == "changed after step 1"

    def test_is_not_said_of_what_forward_passes_write_or_of_weights_put_back(
        self, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        model, tokens = TestTraces.Scaled(), torch.randint(0, 4, (8, 2))
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 8)
        for _ in range(2):
            with recorder.step(range(8)):
                take_step(model, optimizer, tokens, Y[:8] % 2)
            with torch.no_grad():
                model.eval()(torch.tensor([[5, 6]]))
                model.train()
            recorder.record_test([(torch.tensor([[7, 8]]), torch.tensor([0]))], F.cross_entropy)
        recorder.close()
        assert state_of(tmp_path / "run")["facts"].get("test_weights") is None

    def test_parameters_in_another_memory_format_are_noted_by_a_part(self) -> None:
        weight = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        note = WeightsNote(nn.Module(), [weight])
        note.take()
        assert not note.changed()
        weight.data.mul_(2)
        assert note.changed()


class TestPaused:
    """Passes whose gradients the loop throws away."""

    @staticmethod
    def by_signs(model: nn.Module, own: bool) -> Tensor:
        x = X.clone().requires_grad_()
        loss = F.cross_entropy(model(x), Y)
        if own:
            (gradient,) = torch.autograd.grad(loss, x)
        else:
            loss.backward()
            gradient = x.grad
            model.zero_grad()
        return X + 0.1 * gradient.sign()

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("way", ["step", "track", "next_batch"])
    def test_an_attack_on_the_inputs_is_no_part_of_the_rows(
        self, tmp_path: Path, own: bool, way: str
    ) -> None:
        weights, rows = [], []
        for name in ("plain", "given", "paused"):
            model = net()
            optimizer = sgd(model)
            moved = self.by_signs(copy.deepcopy(model), own)
            if name == "plain":
                take_step(model, optimizer, moved)
            else:
                recorder = Recorder(model, optimizer, tmp_path / name, 12, **EXACT)
                if way == "next_batch":
                    recorder.next_batch(range(12))
                batches: Any = (
                    recorder.track(DataLoader(TensorDataset(X, Y), 12))
                    if way == "track"
                    else [None]
                )
                for _ in batches:
                    with recorder.step(range(12)) if way == "step" else nullcontext():
                        if name == "paused":
                            with recorder.paused():
                                moved = self.by_signs(model, own)
                        take_step(model, optimizer, moved)
                recorder.close()
                rows.append(
                    zarr.open_group(tmp_path / name / "gradients.zarr", mode="r")["gradient"][:]
                )
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])
        np.testing.assert_array_equal(rows[0], rows[1])

    def test_the_first_pass_of_sharpness_aware_minimisation(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        for _ in range(2):
            with recorder.step(range(12)):
                with recorder.paused():
                    F.cross_entropy(model(X), Y).backward()
                    moves = [
                        0.05 * p.grad / p.grad.norm()
                        for p in model.parameters()
                        if p.grad is not None
                    ]
                    with torch.no_grad():
                        torch._foreach_add_(list(model.parameters()), moves)
                    optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                with torch.no_grad():
                    torch._foreach_sub_(list(model.parameters()), moves)
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == 2
        assert hydra_pipe.verify(tmp_path / "run") == []

    def test_between_steps_with_the_tracked_loader(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        loader = recorder.track(DataLoader(TensorDataset(X, Y), 6))
        for x, y in loader:
            take_step(model, optimizer, x, y)
        with recorder.paused():
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
        for x, y in loader:
            take_step(model, optimizer, x, y)
        recorder.close()
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == 4

    def test_gradients_of_a_pause_that_are_used_are_told(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        with (  # noqa: PT012
            pytest.raises(GradientMismatchError, match=r"with recorder.paused\(\)"),
            recorder.step(range(12)),
        ):
            with recorder.paused():
                F.cross_entropy(model(X.flip(0)), Y).backward()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()

    def test_a_step_in_a_pause_is_refused(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12)
        with (
            pytest.raises(RecordError, match=r"inside of recorder.paused\(\)"),
            recorder.step(range(12)),
            recorder.paused(),
        ):
            take_step(model, optimizer)
        recorder = Recorder(model, optimizer, tmp_path / "other", 12)
        with (
            pytest.raises(RecordError, match=r"recorder.step\(\) is inside of"),
            recorder.paused(),
            recorder.step(range(12)),
        ):
            pass


class StopEpochError(Exception):
    pass


def wrapped(loader: Any) -> Iterator[Any]:
    """As progress bars do."""
    yield from loader


class TestInterrupts:
    """After an exception nothing stays hooked or collecting, and the model trains on without the
    recorder.
    """

    def interrupted(
        self, run: Path, where: str, error: type[BaseException], wrap: Callable[[Any], Any]
    ) -> Any:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, run, 12, **EXACT)
        loader = recorder.track(DataLoader(TensorDataset(X, Y), 4))

        def train() -> None:
            for i, (x, y) in enumerate(wrap(loader)):
                if i == 2 and where == "before":
                    raise error
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if i == 2 and where == "forward":
                    raise error
                loss.backward()
                if i == 2 and where == "backward":
                    raise error
                optimizer.step()
                if i == 2 and where == "after":
                    raise error

        with pytest.raises(error):
            train()
        return model, optimizer, recorder, loader

    @pytest.mark.parametrize("wrap", [lambda loader: loader, wrapped], ids=["itself", "wrapped"])
    @pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
    def test_of_a_tracked_loop(
        self, tmp_path: Path, where: str, wrap: Callable[[Any], Any]
    ) -> None:
        model, optimizer, recorder, _ = self.interrupted(
            tmp_path / "run", where, KeyboardInterrupt, wrap
        )
        assert not hooks_of(model)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        n_steps = recorder.n_steps
        for _ in range(2):
            take_step(model, optimizer)
        assert recorder.n_steps == n_steps == 2 + (where == "after")
        with pytest.warns(RecordWarning, match="since the last recorded step"):
            recorder.close()
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == n_steps
        assert hydra_pipe.verify(tmp_path / "run") == []

    @pytest.mark.parametrize("where", ["before", "backward", "after"])
    def test_the_loop_may_go_on_with_the_recorder(self, tmp_path: Path, where: str) -> None:
        model, optimizer, recorder, loader = self.interrupted(
            tmp_path / "run", where, StopEpochError, lambda loader: loader
        )
        for x, y in loader:
            take_step(model, optimizer, x, y)
        recorder.record_test([(X, Y)], cross_entropy)
        recorder.close()
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == 5 + (where == "after")
        assert not hooks_of(model)

    def test_going_on_after_training_without_the_recorder_is_refused(self, tmp_path: Path) -> None:
        model, optimizer, _, loader = self.interrupted(
            tmp_path / "run", "after", KeyboardInterrupt, lambda loader: loader
        )
        take_step(model, optimizer)
        with pytest.raises(RecordError, match="trained or changed since, without the recorder"):
            next(iter(loader))

    def test_a_loop_that_is_left_by_break_goes_on(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        loader = recorder.track(DataLoader(TensorDataset(X, Y), 4))
        for x, y in wrapped(loader):
            try:
                raise StopEpochError
            except StopEpochError as error:
                kept = error
            F.cross_entropy(model(x), y).backward()
            break
        optimizer.step()
        x, y = next(iter(loader))
        take_step(model, optimizer, x, y)
        recorder.close()
        assert kept is not None
        assert state_of(tmp_path / "run")["facts"]["n_steps"] == 2

    @pytest.mark.parametrize("way", ["step", "next_batch"])
    def test_of_a_notebooks_cell(
        self, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        if way == "step":
            with recorder.step(range(12)):
                take_step(model, optimizer)
        else:
            recorder.next_batch(range(12))
            take_step(model, optimizer)
            recorder.next_batch(range(12))
            F.cross_entropy(model(X), Y).backward()
        # as a notebook does
        monkeypatch.setattr("sys.last_value", KeyboardInterrupt(), raising=False)
        take_step(model, optimizer)
        assert not hooks_of(model)
        assert recorder.n_steps == 1
        with pytest.warns(RecordWarning):
            recorder.close()

    def test_within_a_step(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12)
        with pytest.raises(KeyboardInterrupt), recorder.step(range(12)):  # noqa: PT012 - both are one act
            F.cross_entropy(model(X), Y).backward()
            raise KeyboardInterrupt
        assert not hooks_of(model)
        take_step(model, optimizer)


class OwnState(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mine": 1}


class TestCopies:
    @staticmethod
    def kept(module: nn.Module, *_: Any) -> None:
        """A hook of the user's own."""

    def build(self) -> nn.Module:
        model = nn.Sequential(OwnState(6, 5), nn.Tanh(), nn.Linear(5, 3))
        model[2].register_forward_hook(TestCopies.kept)
        return model

    WAYS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "old pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
        "torch.save": lambda m: torch.load(TestCopies.saved(m), weights_only=False),
    }

    @staticmethod
    def saved(value: Any) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return file

    @pytest.mark.parametrize("way", WAYS)
    def test_a_copy_has_no_hook_of_the_recorders(self, tmp_path: Path, way: str) -> None:
        model = self.build()
        recorder, optimizer = recorded(tmp_path / "run", model)
        copied = self.WAYS[way](model)
        if way == "copy":  # which shares its children
            assert not copied._forward_hooks
            assert not copied._forward_pre_hooks
            assert "__getstate__" not in vars(copied)
        else:
            assert hooks_of(copied) == [TestCopies.kept]
            assert all("__getstate__" not in vars(module) for module in copied.modules())
            assert copied[0].mine == 1
        assert torch.equal(copied(X), model(X))
        other = self.WAYS[way](optimizer) if way != "copy" else copy.deepcopy(optimizer)
        assert not other._optimizer_step_pre_hooks
        assert not other._optimizer_step_post_hooks
        if way != "copy":
            take_step(copied, sgd(copied))
        with recorder.step(range(12)):
            take_step(model, optimizer)
        recorder.close()
        assert hooks_of(model) == [TestCopies.kept]
        assert all("__getstate__" not in vars(module) for module in model.modules())

    def test_in_the_middle_of_a_step(self, tmp_path: Path) -> None:
        model = net()
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, tmp_path / "run", 12, **EXACT)
        with recorder.step(range(12)):
            teacher = copy.deepcopy(model)
            with torch.no_grad():
                wanted = teacher(X).softmax(1)
            F.cross_entropy(model(X), wanted).backward()
            assert not hooks_of(pickle.loads(pickle.dumps(model)))
            optimizer.step()
        recorder.close()
        assert state_of(tmp_path / "run")["state"] == "complete"


def test_no_warning_of_a_plain_loop(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder, _ = recorded(tmp_path / "run", net())
        recorder.record_test(DataLoader(TensorDataset(X, Y), 5), cross_entropy)
        recorder.close()


def test_the_command_says_in_one_line_that_test_gradients_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("late.py").write_text(
        "import torch\nfrom torch.nn.functional import cross_entropy\nfrom hydra_pipe import "
        "Pipeline\n\n\n"
        "class Late(list):\n    def __getitem__(self, i):\n        if i == 5:\n            raise "
        "OSError('gone')\n"
        "        return super().__getitem__(i)\n\n\n"
        "def pipeline():\n    data = Late((torch.randn(4), i % 2) for i in range(6))\n    model "
        "= torch.nn.Linear(4, 2)\n"
        "    def loss(output, target):\n        return cross_entropy(output, target, "
        "reduction='none')\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    return Pipeline(model, optimizer, loss, list(data)[:5], data, batch_size=4, "
        "epochs=1)\n"
    )
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:  # noqa: PT012 - both are one act
        warnings.simplefilter("always")
        app(["record", "late.py", "run"])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 0
    assert [line for line in told if line.startswith("hydra-pipe: the test gradients of")]
    assert not any("RecordWarning" in line for line in told)
    assert state_of(tmp_path / "run")["state"] == "complete"
