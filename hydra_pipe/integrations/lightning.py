"""Recording under `lightning.Trainer`, its loop untouched: `pip install 'hydra-pipe[lightning]'`."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from hydra_pipe.errors import DataError, RecordError, UsageError, missing_extra
from hydra_pipe.integrations.finishing import Tests, finish
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import EncodingChoice
from hydra_pipe.recording.datasets import pair_of
from hydra_pipe.recording.pending import StepNote
from hydra_pipe.recording.recorder import DEFAULT_DIM, Recorder
from hydra_pipe.recording.settings import Labels, checked_labels
from hydra_pipe.recording.testing import try_test
from hydra_pipe.recording.tracking import WatchedLoader
from hydra_pipe.store.stages import Settings

try:
    from lightning.fabric.utilities.data import sized_len
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
except ImportError as error:
    raise missing_extra(__name__, "lightning", error) from error

# (output of the module, targets) -> losses of shape (batch,)
TestLoss = Callable[[Any, Tensor], Tensor]

_STATE, _WITHOUT = "recorder", "without"
_STEP_LOSS = "mean of its batches' losses"
_ONE_LOADER = "give the trainer one torch DataLoader over a map-style dataset"


class HydraCallback(Callback):
    """Records a `lightning.Trainer`'s training::

        trainer = Trainer(max_epochs=5, callbacks=[HydraCallback("runs/mine", test_dataset, test_loss)])
        trainer.fit(module, train_loader)

    Then `hydra-pipe reduce runs/mine`. Training is not changed: the weights are those without the callback, bit for bit. A
    sample's id is its index in the dataset of the train dataloader. Each optimizer step is one step of the run, whatever is
    accumulated for it. Optimization must be automatic; devices may be several, by `strategy="ddp"`.

    The recorder's state is kept in the trainer's checkpoints: `trainer.fit(..., ckpt_path=...)` goes on with the recording too,
    with the rows of the batches that the trainer then trains on. Within an epoch these are those of a training that was never
    interrupted only if the dataloader can go on where it was, with `state_dict` and `load_state_dict`: else Lightning begins a
    new order for the rest of the epoch. From a checkpoint that was made between batches that are accumulated, whose gradients no
    checkpoint holds, the recording cannot go on.

    The test gradients are taken when training ends, of the parameters as they are then: give the callback before those that put
    others in their place, such as averaged weights. They are in the parameters' own precision, without autocast.

    Args:
        run: directory of the run.
        test_dataset: (input, target) samples whose predictions are to be explained, or mappings that hold their targets as
            "labels" or the like, put into batches as those of the train dataloader. Inputs are what the module itself is called
            with, its `forward`. None: `hydra_pipe.probe` takes test gradients later.
        test_loss: (output of the module, targets) -> losses of shape (batch,), or their mean or sum: what is trained on, or
            whatever else is to be explained. The first batch is tried before training.
        encoding, dim, dtype, seed, overwrite: see `hydra_pipe.Recorder`.
        settings: further settings to keep in the manifest, beside those of the trainer that change training.
        sample_labels, test_labels: one for each sample, for rankings and reports; taken from integer targets if absent, of
            the training samples where the dataset is a TensorDataset or has `targets`.

    Raises:
        DataError: there are no test samples in `test_dataset`, or labels are not one integer or string for each sample.
        UsageError: a `test_dataset` without its `test_loss`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        test_dataset: Any = None,
        test_loss: TestLoss | None = None,
        *,
        encoding: EncodingChoice = "auto",
        dim: int = DEFAULT_DIM,
        dtype: Dtype | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        sample_labels: Labels | None = None,
        test_labels: Labels | None = None,
        overwrite: bool = False,
    ) -> None:
        if (test_dataset is None) != (test_loss is None):
            raise UsageError(
                "give HydraCallback a test_dataset and a test_loss, or none of them, and test gradients by probe later"
            )
        if test_dataset is not None and not len(test_dataset):
            raise DataError("test_dataset is empty: give at least one sample")
        if test_labels is not None:
            checked_labels(test_labels, "test_labels", 0 if test_dataset is None else len(test_dataset), "test samples")
        self._run, self._test_dataset, self._test_loss = run, test_dataset, test_loss
        self._options: dict[str, Any] = {"encoding": encoding, "dim": dim, "dtype": dtype, "seed": seed, "overwrite": overwrite}
        self._settings = settings or {}
        self._sample_labels, self._test_labels = sample_labels, test_labels
        self._batches: _TrainBatches | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._session: _Session | None = None

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the training that goes on, or of the last one; None before the first."""
        return None if self._session is None else self._session.recorder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be recorded, and watch the train dataloader, which the trainer may ask for at any time from here."""
        if stage != "fit":
            return
        self._leave(RecordError("the trainer began anew before its training had ended"))
        _refuse_what_cannot_be(trainer, pl_module, tested=self._test_dataset is not None)
        self._batches, self._loaded = _TrainBatches(trainer), None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on with, the recording."""
        assert self._batches is not None
        loader = self._batches.only
        wrapped = trainer.strategy.model
        recorder = Recorder(
            wrapped if isinstance(wrapped, DistributedDataParallel) else pl_module,
            trainer.optimizers[0],
            self._run,
            loader.n_samples,
            settings=_settings_of(trainer, loader.loader) | self._settings,
            sample_labels=self._sample_labels if self._sample_labels is not None else _labels_of(loader.loader.dataset),
            **self._options,
        )
        recorder.facts["step_loss"] = _STEP_LOSS
        self._session = _Session(recorder, trainer)
        if self._test_dataset is not None:
            sources = self._test_dataset, loader.loader
            try_test(pl_module, self._tests(trainer), self._test_loss, pl_module.device, *sources)
        if trainer.global_step:
            self._session.go_on(self._loaded)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Name the batch's samples."""
        if self._session is not None and self._batches is not None:
            self._session.begin_batch(self._batches.next_ids())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the batch's loss."""
        if self._session is not None:
            self._session.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Note the step's loss."""
        if self._session is not None:
            self._session.note_loss()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take no notice of what the module is called with until the next batch."""
        if self._session is not None:
            self._session.recorder.end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the test gradients and finish the recording."""
        assert self._session is not None
        tests = None if self._test_dataset is None else partial(self._tests, trainer)
        self._session.finish(tests, self._test_loss, self._test_labels)

    def _tests(self, trainer: Trainer) -> Iterator[tuple[Any, Any]]:
        """The test samples, in batches as those of the train dataloader."""
        assert self._batches is not None
        loader = self._batches.only.loader
        collate = None if loader.batch_sampler is None else loader.collate_fn
        for batch in DataLoader(self._test_dataset, loader.batch_size or 1, collate_fn=collate):
            yield pair_of(trainer.precision_plugin.convert_input(batch), "test_dataset")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the recording as it is."""
        self._leave(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if self._batches is not None:
            self._batches.leave()

    def state_dict(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps. All processes ask for it together."""
        return {} if self._session is None else self._session.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts."""
        self._loaded = state_dict

    def _leave(self, error: BaseException) -> None:
        if self._batches is not None:
            self._batches.leave()
        if self._session is not None:
            self._session.leave(error)


class _TrainBatches:
    """Which samples the batches of the trainer's train dataloader are of: they come in the order in which they were drawn.

    Args:
        trainer: hands its dataloaders to the strategy when their samplers are final, and before it iterates them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._own = trainer, trainer.strategy.process_dataloader
        self._newest: WatchedLoader | None = None
        trainer.strategy.process_dataloader = self._process  # type: ignore[method-assign, assignment]

    @property
    def only(self) -> WatchedLoader:
        """The train dataloader. Raises: UsageError: there are several."""
        loaders = tree_leaves(self._trainer.train_dataloader)
        if self._newest is None or len(loaders) != 1:
            raise UsageError(f"the trainer has {len(loaders)} train dataloaders, whose samples have no one number: {_ONE_LOADER}")
        return self._newest

    def next_ids(self) -> NDArray[np.int64]:
        """Of the batch that the trainer has just been given, shape (batch,). Raises: RecordError: see `WatchedLoader`."""
        assert self._newest is not None
        return self._newest.next_ids(self._newest.drawn)

    def leave(self) -> None:
        """Leave the strategy as it was."""
        self._trainer.strategy.__dict__.pop("process_dataloader", None)

    def _process(self, loader: Any) -> Any:
        loader = self._own(loader)
        if not self._trainer.training:
            return loader
        n_samples = None if self._newest is None else self._newest.n_samples
        ahead = int(sized_len(loader) is None)  # by which the trainer knows the last batch
        self._newest = WatchedLoader(loader, n_samples, _ONE_LOADER, ahead)
        return self._newest.loader


class _Session:
    """One training that is recorded.

    Args:
        recorder: of it.
        trainer: of it.
    """

    def __init__(self, recorder: Recorder, trainer: Trainer) -> None:
        self.recorder, self._trainer = recorder, trainer
        #: of the batches of the step that goes on, divided and scaled as the trainer does before it differentiates them
        self.losses: list[Tensor] = []
        self._note: StepNote | None = None
        # the trainer's optimizer steps when the last batch began; None: none has begun since it said so last
        self._begun_at: int | None = None
        # why no state can be taken any more, and the last one
        self._over: str | None = None
        self._kept: dict[str, Any] | None = None

    def go_on(self, loaded: Mapping[str, Any] | None) -> None:
        """Go on where a checkpoint was made. Raises: RecordError: it holds no state of the recording."""
        if loaded is None or _STATE not in loaded:
            made = "without HydraCallback, so that the steps before it were not recorded" if loaded is None else loaded[_WITHOUT]
            raise RecordError(
                f"the training goes on at step {self._trainer.global_step}, from a checkpoint that was made {made}: train from the "
                f"beginning, or from another checkpoint"
            )
        self.recorder.load_state_dict(loaded[_STATE])

    def begin_batch(self, ids: NDArray[np.int64]) -> None:
        """The trainer has been given the batch of samples `ids`."""
        if self._trainer.global_step != self._begun_at:
            self._begun_at, self.losses = self._trainer.global_step, []
        self.recorder.end_batch()  # a training step may leave one out
        self._note = self.recorder.next_batch(ids)

    def note_loss(self) -> None:
        """Say what the loss of the step is that is about to be taken."""
        if self._note is not None and self.losses:
            scaler = getattr(self._trainer.precision_plugin, "scaler", None)
            factor = self._trainer.accumulate_grad_batches / (1.0 if scaler is None else scaler.get_scale())
            self._note.loss = float(torch.stack(self.losses).mean()) * factor

    def state(self) -> dict[str, Any]:
        """Of the recorder, or why there is none. Collective."""
        if self._over is not None:
            return self._kept or {_WITHOUT: self._over}
        if self._begun_at == self._trainer.global_step:
            return {_WITHOUT: "between batches whose gradients are accumulated, which it does not hold"}
        return {_STATE: self.recorder.state_dict()}

    def finish(self, tests: Tests | None, loss: TestLoss | None, labels: Labels | None) -> None:
        """Record the test gradients and close."""
        finish(self.recorder, tests, loss, labels)
        self._over = "after the recording was complete"

    def leave(self, error: BaseException) -> None:
        """Leave the recording as it is, because of `error`."""
        if self._over is not None:
            return
        if self._trainer.world_size == 1:  # others may not have been stopped
            with suppress(Exception):
                self._kept = self.state()  # for a checkpoint that is made for the error
        self._over = "after the recording had failed"
        self.recorder.fail(error)


def _refuse_what_cannot_be(trainer: Trainer, module: LightningModule, *, tested: bool) -> None:
    """Raises: UsageError: names it."""
    if not isinstance(trainer, Trainer):
        raise UsageError(
            f"the trainer is {type(trainer).__module__}.{type(trainer).__name__}: take that of lightning.pytorch, and not of the "
            f"package pytorch_lightning"
        )
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise UsageError(
            f"{type(strategy).__name__} hides the samples' gradients, and is not recorded: train on one device, or with "
            f'strategy="ddp"'
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise UsageError(
            'gradient_clip_algorithm="value" changes each element of the gradient by itself, so that no share of it is a '
            'sample\'s: clip by "norm"'
        )
    if not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} has automatic_optimization=False, so that its steps are its own, with one optimizer or "
            f"several: optimize automatically, or record with hydra_pipe.Recorder in its training_step"
        )
    if module._compiler_ctx is not None or any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    ):
        raise UsageError(f"{type(module).__name__} is compiled, which hides the samples' gradients: train it as it is")
    if tested and type(module).forward is LightningModule.forward:
        raise UsageError(
            f"{type(module).__name__} has no forward, with which the test samples would be predicted: define forward(self, inputs)"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UsageError(
            f"{type(module).__name__}.training_step takes the dataloader's iterator, and draws batches itself: let it take a batch"
        )


def _settings_of(trainer: Trainer, loader: DataLoader[Any]) -> Settings:
    """What the training depends on and the recorder does not see."""
    return {
        "batch size": loader.batch_size,
        "accumulated batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
    }


def _labels_of(dataset: Any) -> Sequence[int] | None:
    """One integer for each sample, where the dataset has them at hand; to ask it for its samples would draw random numbers."""
    if isinstance(dataset, TensorDataset):
        targets = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != len(dataset):
        return None
    found = np.asarray(targets)
    return found.tolist() if found.ndim == 1 and found.dtype.kind in "iu" else None
