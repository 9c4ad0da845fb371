"""Recording under `lightning.Trainer`: nothing changes in training, and the run is that of a plain
loop.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from small_lightning import (
    EXACT,
    TESTS,
    TRAIN,
    GoingOn,
    Killer,
    Net,
    StoppedError,
    fit,
    loader,
    trainer,
)
from support import ROOT
from support.pipelines import cross_entropy
from support.recordings import arrays, assert_same_arrays, assert_same_weights, steps_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from two_processes import rows_of_two, samples_of_two

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import (
    DataError,
    HydraError,
    OptimizerError,
    RecordError,
    RecordWarning,
    RunError,
    UsageError,
)
from hydra_pipe.integrations.lightning import HydraCallback
from hydra_pipe.loading import load_pipeline
from hydra_pipe.store import names

pytestmark = [
    # in Lightning
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
    ),
    # in torch's compiler
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
]
Ids = np.ndarray[Any, Any]
Clip = Callable[[Iterator[nn.Parameter]], object]


class Witness(pl.Callback):
    """Notes the random state at the beginning of each batch, and the module's batches."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.states.append(torch.get_rng_state())
        self.inputs.append(batch[0])


def steps_in(
    states: list[Tensor], ids: list[np.ndarray[Any, Any]], size: int
) -> Iterator[list[tuple[np.ndarray[Any, Any], Tensor]]]:
    """Of each step its batches: their ids, and the random state in which they began."""
    waiting = iter(states)
    for of_step in ids:
        yield [(part, next(waiting)) for part in np.split(of_step, range(size, len(of_step), size))]


def plain_recording(
    run: Path, module: Net, of: Path, states: list[Tensor], accumulate: int, clip: Clip, bf16: bool
) -> None:
    """The training that `of` recorded, in a loop that names its samples, from the random states
    that its batches began with.
    """
    made: Any = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    recorder = Recorder(
        module, optimizer, run, len(TRAIN), sample_labels=TRAIN.tensors[1].tolist(), **EXACT
    )
    for batches in steps_in(states, steps_of(of), 4):
        with recorder.step(np.concatenate([ids for ids, _ in batches])) as note:
            losses = []
            for ids, state in batches:
                torch.set_rng_state(state)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                    loss = module.training_step([x[ids] for x in TRAIN.tensors], 0)
                losses.append(loss.detach() / accumulate)
                (loss / accumulate).backward()
            note.loss = float(torch.stack(losses).mean()) * accumulate
            clip(module.parameters())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    recorder.record_test(DataLoader(TESTS, 4), cross_entropy)
    recorder.close()


CASES: dict[str, tuple[Callable[[], Net], dict[str, Any], Clip]] = {
    "sgd": (lambda: Net(torch.optim.SGD, momentum=0.9, weight_decay=0.01), {}, list),
    "adamw, clipped by norm": (
        Net,
        {"gradient_clip_val": 0.1},
        partial(clip_grad_norm_, max_norm=0.1),
    ),
    "sgd, accumulated, in bfloat16": (
        lambda: Net(torch.optim.SGD),
        {"accumulate_grad_batches": 3, "precision": "bf16-mixed", "gradient_clip_val": 0.5},
        partial(clip_grad_norm_, max_norm=0.5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_without_it_and_the_run_is_that_of_a_plain_loop(
    tmp_path: Path, case: str
) -> None:
    make, options, clip = CASES[case]
    plain = fit(make(), **options)
    witness = Witness()
    recorded = fit(
        make(), HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT), witness, **options
    )
    assert_same_weights(plain, recorded)
    assert not any(
        hook
        for module in recorded.modules()
        for hook in (module._forward_hooks, module._forward_pre_hooks)
    )

    found, accumulate = arrays(tmp_path / "run"), options.get("accumulate_grad_batches", 1)
    for ids, inputs in zip(
        np.split(found[names.SAMPLE], np.cumsum([*map(len, witness.inputs)])[:-1]),
        witness.inputs,
        strict=True,
    ):
        assert torch.equal(TRAIN.tensors[0][ids], inputs)
    assert (
        found[f"{names.STEPS}/{names.N_ROWS}"].tolist()
        == ([4, 4, 4, 4, 4, 4, 2] if accumulate == 1 else [12, 12, 2]) * 2
    )
    assert np.isfinite(found[names.CURVATURE]).all()

    looped = make()
    plain_recording(
        tmp_path / "loop",
        looped,
        tmp_path / "run",
        witness.states,
        accumulate,
        clip,
        "bf16-mixed" in options.values(),
    )
    assert_same_weights(recorded, looped)
    assert_same_arrays(tmp_path / "run", tmp_path / "loop")


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_leaves_out_is_not_recorded(
    tmp_path: Path, fused: bool
) -> None:
    class Overflowing(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (
                float("inf") if batch_idx == 2 else 1.0
            )

    def plugin() -> MixedPrecision:  # Lightning itself takes bfloat16 for float16 on the CPU
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    plain = fit(Overflowing(fused=fused), plugins=plugin())
    callback = HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT)
    assert_same_weights(plain, fit(Overflowing(fused=fused), callback, plugins=plugin()))
    assert callback.recorder is not None
    assert (callback.recorder.n_steps, callback.recorder.n_skipped) == (12, 2)
    found = arrays(tmp_path / "run")
    assert found[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.01
    assert found[f"{names.STEPS}/{names.LOSS}"].max() < 3  # of the unscaled loss


def test_workers_validation_and_reloaded_loaders_do_not_disturb(tmp_path: Path) -> None:
    class Asking(Net):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(num_workers=2, persistent_workers=True)

        def configure_optimizers(self) -> Any:
            # makes the trainer draw from its loader before it has begun
            assert self.trainer.estimated_stepping_batches == 21
            return super().configure_optimizers()

    options = {
        "max_epochs": 3,
        "val_check_interval": 3,
        "reload_dataloaders_every_n_epochs": 2,
        "limit_train_batches": 7,
    }
    witness = Witness()
    callback = HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT)
    modules = []
    for callbacks in ((), (callback, witness)):
        pl.seed_everything(5, verbose=False)
        modules.append(Asking())
        trainer(*callbacks, **options).fit(modules[-1], val_dataloaders=DataLoader(TESTS, 5))
    assert_same_weights(*modules)
    ids = arrays(tmp_path / "run")[names.SAMPLE]
    assert torch.equal(TRAIN.tensors[0][ids], torch.cat(witness.inputs))
    assert len(ids) == 3 * 26
    assert hydra_pipe.verify(tmp_path / "run") == []


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_batches_that_a_training_step_leaves_out_are_not_recorded(tmp_path: Path) -> None:
    class Choosing(Net):
        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> int | None:
            return -1 if (self.current_epoch, batch_idx) == (0, 5) else None  # ends the epoch

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            if batch_idx == 1:
                return None
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    witness = Witness()
    modules = [
        fit(Choosing()),
        fit(Choosing(), HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT), witness),
    ]
    assert_same_weights(*modules)
    kept = [0, 2, 4, 6, 8, 10, 11, 12]  # of 6 begun batches in the first epoch and 7 in the second
    ids = arrays(tmp_path / "run")[names.SAMPLE]
    assert torch.equal(TRAIN.tensors[0][ids], torch.cat([witness.inputs[k] for k in kept]))


def test_a_module_that_calls_the_network_it_holds_is_recorded_as_one_that_calls_itself(
    tmp_path: Path,
) -> None:
    class Held(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    for make in (Net, Held):
        fit(
            make(dropout=0.0),
            HydraCallback(tmp_path / make.__name__, TESTS, cross_entropy, **EXACT),
        )
    assert np.isfinite(arrays(tmp_path / "Held")[names.CURVATURE]).all()
    assert_same_arrays(tmp_path / "Net", tmp_path / "Held")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_that_was_killed_goes_on_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    def run(name: str, *others: pl.Callback, resume: Path | None = None) -> Any:
        kept = ModelCheckpoint(
            tmp_path / f"{name}-out", every_n_train_steps=9, save_top_k=-1, filename="{step}"
        )
        callbacks = [HydraCallback(tmp_path / name, TESTS, cross_entropy, **EXACT), kept, *others]
        return fit(
            Net(dropout=0.0),
            *callbacks,
            train=GoingOn(),
            resume=resume,
            enable_checkpointing=True,
            max_epochs=3,
        )

    whole = run("whole")
    with pytest.raises(StoppedError):
        run("run", Killer(12))
    # the third batch of the second epoch
    resumed = run("run", resume=tmp_path / "run-out" / "step=9.ckpt")
    assert_same_weights(whole, resumed)
    assert_same_arrays(tmp_path / "whole", tmp_path / "run")
    assert len(arrays(tmp_path / "run")[names.SAMPLE]) == 3 * 26


def test_two_processes_record_one_run_and_go_on_with_it(tmp_path: Path) -> None:
    rows = rows_of_two("lightning_ranks.py", tmp_path, {"LOCAL_RANK": "RANK"}, NODE_RANK="0")
    assert samples_of_two(rows) == sorted([*range(26)] * 3)  # each once an epoch
    assert all(np.isfinite(rows[f"rank/{rank}/{names.CURVATURE}"]).all() for rank in range(2))


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)
def test_rows_are_of_the_trained_batches_where_lightning_begins_a_new_order_in_mid_epoch(
    tmp_path: Path,
) -> None:
    def run(witness: Witness, *others: pl.Callback, resume: Path | None = None) -> Any:
        return fit(
            Net(),
            HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT),
            witness,
            *others,
            resume=resume,
        )

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "nine.ckpt")

    first, second = Witness(), Witness()
    with pytest.raises(StoppedError):
        run(first, Saver(), Killer(11))
    run(second, resume=tmp_path / "nine.ckpt")
    ids = arrays(tmp_path / "run")[names.SAMPLE]
    trained = torch.cat([*first.inputs[:9], *second.inputs])
    assert torch.equal(TRAIN.tensors[0][ids], trained)
    assert len(second.inputs) == 5
    assert sorted(ids[26:]) != sorted(range(26))  # not an epoch


def test_a_checkpoint_between_accumulated_batches_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    class Saver(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.current_epoch, batch_idx) in ((0, 2), (1, 1)):
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    def run(name: str, *others: pl.Callback, resume: Path | None = None) -> Any:
        callback = HydraCallback(tmp_path / name, TESTS, cross_entropy, **EXACT)
        return fit(
            Net(), callback, *others, accumulate_grad_batches=2, resume=resume, train=GoingOn()
        )

    whole = run("whole", Saver())  # training goes on
    assert_same_weights(fit(Net(), accumulate_grad_batches=2, train=GoingOn()), whole)
    with pytest.raises(
        RecordError,
        match=r"resumes at step 1, .* made between accumulated batches",
    ):
        run("run", resume=tmp_path / "0-2.ckpt")
    with pytest.raises(RunError, match="is recorded already"):
        run("whole", resume=tmp_path / "1-1.ckpt")


def test_a_checkpoint_for_an_error_between_steps_is_one_to_go_on_from(tmp_path: Path) -> None:
    class Saver(pl.Callback):
        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "error.ckpt")

    def run(name: str, *others: pl.Callback, resume: Path | None = None) -> Any:
        return fit(
            Net(torch.optim.SGD),
            HydraCallback(tmp_path / name, TESTS, cross_entropy),
            *others,
            train=GoingOn(),
            resume=resume,
        )

    with pytest.raises(StoppedError):
        run("run", Killer(9), Saver())
    assert hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]["state"] == "failed"
    run("run", resume=tmp_path / "error.ckpt")
    assert len(arrays(tmp_path / "run")[names.SAMPLE]) == 52


def test_a_checkpoint_without_a_recording_is_refused(tmp_path: Path) -> None:
    made = trainer(max_epochs=1)
    made.fit(Net(), loader(), DataLoader(TESTS, 5))
    made.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RecordError, match=r"resumes at step 7, .* made without HydraCallback"):
        fit(
            Net(),
            HydraCallback(tmp_path / "run", TESTS, cross_entropy),
            resume=tmp_path / "plain.ckpt",
        )
    assert not (tmp_path / "run").exists()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(TRAIN)


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter([[*TRAIN.tensors]])


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Drawing(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError("is not reached")


class Headless(pl.LightningModule):
    validation_step = Net.validation_step
    training_step, configure_optimizers = Net.training_step, Net.configure_optimizers


def compiled() -> Net:
    module = Net()
    module.net.compile()
    return module


def refused_by_rule() -> Net:
    return Net(torch.optim.LBFGS)


@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor")
@pytest.mark.parametrize(
    ("module", "train", "error", "message"),
    [
        (Manual, loader, UsageError, "Manual has automatic_optimization=False"),
        (Headless, loader, UsageError, "Headless has no forward"),
        (Drawing, loader, UsageError, "takes the dataloader's iterator"),
        (compiled, loader, UsageError, "Net is compiled"),
        (lambda: torch.compile(Net()), loader, UsageError, "Net is compiled"),
        (refused_by_rule, loader, OptimizerError, "LBFGS is not handled"),
        (
            Net,
            lambda: {"a": loader(), "b": loader()},
            UsageError,
            "the trainer has 2 train dataloaders",
        ),
        (Net, lambda: DataLoader(Stream(), 4), RecordError, "Stream is an IterableDataset"),
        (
            Net,
            Batches,
            UsageError,
            "only a torch.utils.data.DataLoader can be tracked, not a Batches",
        ),
    ],
    ids=[
        "manual",
        "no forward",
        "draws",
        "compiled part",
        "compiled",
        "lbfgs",
        "two loaders",
        "stream",
        "batches",
    ],
)
def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, module: Any, train: Any, error: type[HydraError], message: str
) -> None:
    callback = HydraCallback(tmp_path / "run", TESTS, cross_entropy)
    with pytest.raises(error, match=message):
        fit(module(), callback, train=train())
    assert not (tmp_path / "run").exists()


def test_clipping_by_value_is_refused(tmp_path: Path) -> None:
    callback = HydraCallback(tmp_path / "run", TESTS, cross_entropy)
    with pytest.raises(UsageError, match='gradient_clip_algorithm="value" changes each element'):
        fit(Net(), callback, gradient_clip_val=0.1, gradient_clip_algorithm="value")


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_gradients_are_refused(tmp_path: Path, strategy: Any) -> None:
    callback = HydraCallback(tmp_path / "run", TESTS, cross_entropy)
    made = trainer(callback)
    made.strategy.__class__ = strategy  # to make one needs what is not here
    with pytest.raises(UsageError, match=f"{strategy.__name__} hides the samples' gradients"):
        callback.setup(made, Net(), "fit")


def test_the_trainer_of_another_package_is_refused(tmp_path: Path) -> None:
    class Trainer:
        pass

    with pytest.raises(
        UsageError, match=r"the trainer is .*\.Trainer: take the trainer of lightning\.pytorch"
    ):
        HydraCallback(tmp_path / "run", TESTS, cross_entropy).setup(Trainer(), Net(), "fit")  # type: ignore[arg-type]


def test_no_test_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="test_dataset is empty"):
        HydraCallback(tmp_path / "run", [], cross_entropy)


@pytest.mark.data
def test_lenet_on_fashion_mnist(tmp_path: Path, shared_data: Path) -> None:
    settings = {"data": shared_data / "fashion-mnist", "n_train": 256, "n_test": 20}
    source = load_pipeline(str(ROOT / "pipelines" / "fashion_mnist.py"), settings)
    train, tests = source.build().train, source.build().test

    class LeNet(Net):
        def __init__(self) -> None:
            super().__init__(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)
            torch.manual_seed(0)
            self.net = source.build().model

    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    witness = Witness()
    modules = [
        fit(LeNet(), *callbacks, train=DataLoader(train, 32, shuffle=True), tests=tests, **options)
        for callbacks in ((), (HydraCallback(tmp_path / "run", tests, cross_entropy), witness))
    ]
    assert_same_weights(*modules)
    found = arrays(tmp_path / "run")
    assert torch.equal(train.tensors[0][found[names.SAMPLE]], torch.cat(witness.inputs))
    assert found[f"{names.STEPS}/{names.N_ROWS}"].tolist() == [64] * 8
    assert found[f"{names.STEPS}/{names.IMBALANCE}"].max() < 1e-3
    assert np.isfinite(found[names.CURVATURE]).all()
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    relevance = np.asarray(hydra_pipe.open_run(tmp_path / "run").relevance("hydra"))
    assert relevance.shape == (256, 20)
    assert np.abs(relevance).max() > 0


class Failing(Dataset[Any]):
    """Its last sample cannot be had."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        if i == 5:
            raise OSError("the file is gone")
        return TESTS[i % 5]


def complete(run: Path) -> bool:
    return json.loads((run / names.MANIFEST).read_text())["stages"]["record"]["state"] == "complete"


class OfMappings(Net):
    """Its batches are mappings."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch["x"]), batch["label"])

    validation_step = None  # type: ignore[assignment]


@pytest.mark.parametrize("tests", [None, "mappings", "pairs"])
def test_batches_may_be_mappings_and_a_test_set_is_optional(
    tmp_path: Path, tests: str | None
) -> None:
    data = [{"x": x, "label": y} for x, y in TRAIN]
    given = {None: (), "mappings": (data[:5], cross_entropy), "pairs": (TESTS, cross_entropy)}[
        tests
    ]
    callback = HydraCallback(tmp_path / "run", *given, **EXACT)
    module, plain = OfMappings(), OfMappings()
    for own, callbacks in ((module, [callback]), (plain, [])):
        pl.seed_everything(5, verbose=False)
        trainer(*callbacks).fit(own, DataLoader(data, 4, shuffle=True))
    assert_same_weights(plain, module)
    assert hydra_pipe.verify(tmp_path / "run") == []
    if tests is None:
        hydra_pipe.probe(tmp_path / "run", TESTS, name="late", model=module, loss=cross_entropy)
        assert hydra_pipe.reduce(tmp_path / "run", probe="late", method="hydra")
    else:
        assert hydra_pipe.reduce(tmp_path / "run", method="hydra")


SLIPS: dict[str, tuple[Any, Any, str]] = {
    "a loss that raises": (
        TESTS,
        lambda output, target: output.no_such,
        "the loss raised at the first test samples",
    ),
    "a loss of another shape": (TESTS, lambda output, target: output, "the loss has shape"),
    "inputs of another shape": (
        TensorDataset(torch.zeros(5, 2), TESTS.tensors[1]),
        cross_entropy,
        "the model raised at the first",
    ),
    "no pairs": ([1, 2, 3], cross_entropy, "test_dataset yields Tensor"),
}


@pytest.mark.parametrize("case", SLIPS)
def test_test_samples_that_cannot_be_are_told_before_training(tmp_path: Path, case: str) -> None:
    tests, loss, message = SLIPS[case]
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(HydraError, match=message):
        fit(module, HydraCallback(tmp_path / "run", tests, loss, **EXACT))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not (tmp_path / "run").exists()
    assert not any(
        hook for part in module.modules() for hook in (part._forward_hooks, part._forward_pre_hooks)
    )


def test_test_samples_that_fail_after_training_leave_its_result(tmp_path: Path) -> None:
    with pytest.warns(RecordWarning, match=r"the file is gone.*hydra_pipe.probe"):
        module = fit(Net(), HydraCallback(tmp_path / "run", Failing(), cross_entropy, **EXACT))
    assert_same_weights(fit(Net()), module)
    assert complete(tmp_path / "run")
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_labels_that_cannot_be_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample_labels has shape"):
        fit(Net(), HydraCallback(tmp_path / "run", TESTS, cross_entropy, sample_labels=[[1]] * 26))
    with pytest.raises(DataError, match="test_labels has 2 entries for 5 test samples"):
        HydraCallback(tmp_path / "run", TESTS, cross_entropy, test_labels=[1, 2])
    with pytest.raises(UsageError, match="a test_dataset and a test_loss, or none"):
        HydraCallback(tmp_path / "run", TESTS)


class Interrupter(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_hooked(tmp_path: Path) -> None:
    module = Net()
    with suppress(KeyboardInterrupt, SystemExit):  # which of them depends on the trainer's version
        fit(module, HydraCallback(tmp_path / "run", TESTS, cross_entropy, **EXACT), Interrupter())
    assert not any(
        hook for part in module.modules() for hook in (part._forward_hooks, part._forward_pre_hooks)
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    cross_entropy(module(TRAIN.tensors[0]), TRAIN.tensors[1]).mean().backward()
    optimizer.step()
