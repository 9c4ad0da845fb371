"""Recording under `lightning.Trainer` as it is: `pip install 'hydra-pipe[lightning]'`."""

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
from hydra_pipe.recording.settings import (
    Labels,
    checked_keys,
    checked_labels,
    setting_of_keys,
)
from hydra_pipe.recording.test_gradients import try_test
from hydra_pipe.recording.tracking import WatchedLoader
from hydra_pipe.store import names
from hydra_pipe.store.run.stages import Settings

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
    """Records the training of a `lightning.Trainer`::

        trainer = Trainer(max_epochs=5, callbacks=[HydraCallback("runs/mine", test_dataset,
        test_loss)]) trainer.fit(module, train_loader)

    Then run `hydra-pipe reduce runs/mine`. Training is not changed: the weights are those without
    the callback, bit for bit. A sample's id is its index in the dataset of the train dataloader.
    Each optimizer step is one step of the run, however many batches are accumulated for it.
    Optimization must be automatic. Several devices are allowed, by `strategy="ddp"`.

    The trainer's checkpoints hold the recorder's state. So `trainer.fit(..., ckpt_path=...)` also
    resumes the recording, with the rows of the batches that the trainer then trains on. Within an
    epoch these batches equal those of an uninterrupted training only if the dataloader can resume,
    by `state_dict` and `load_state_dict`. Otherwise Lightning begins a new order for the rest of
    the epoch. A checkpoint made between accumulated batches does not hold their gradients: the
    recording cannot resume from such a checkpoint.

    The test gradients are taken when training ends, at the parameters of that moment. Some
    callbacks put other parameters in their place, such as averaged weights: give this callback
    before them. Test gradients are in the parameters' own precision, without autocast.

    Args:
        run: directory of the run.
        test_dataset: (input, target) samples whose predictions are to be explained, or mappings
            with the targets under "labels" or a similar key. They are batched as those of the train
            dataloader. Inputs are the arguments of the module's own `forward`. None:
            `hydra_pipe.probe` takes test gradients later.
        test_loss: (output of the module, targets) -> losses of shape (batch,), or their mean or
            sum. It is the training loss, or any other quantity to be explained. The first batch is
            tried before training.
        encoding, dim, dtype, seed, overwrite: options of `hydra_pipe.Recorder`.
        settings: further settings to keep in the manifest, beside those of the trainer that change
            training.
        sample_labels, test_labels: one label for each sample, for rankings and reports; taken from
            integer targets if absent. Labels of the training samples are found if the dataset is a
            TensorDataset or has `targets`.
        sample_keys, test_keys: one string for each sample that names no other one, such as a path.

    Raises:
        DataError: there are no test samples in `test_dataset`, or labels are not one integer or
            string for each sample, or keys not one string for each.
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
        sample_keys: Sequence[str] | None = None,
        test_keys: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        if (test_dataset is None) != (test_loss is None):
            raise UsageError(
                "give HydraCallback both a test_dataset and a test_loss, or none of them and "
                "take test gradients by probe later"
            )
        if test_dataset is not None and not len(test_dataset):
            raise DataError("test_dataset is empty: give at least one sample")
        n_tests = 0 if test_dataset is None else len(test_dataset)
        if test_labels is not None:
            checked_labels(test_labels, "test_labels", n_tests, "test samples")
        if test_keys is not None:
            checked_keys(test_keys, "test_keys", n_tests, "test samples")
        self._run, self._test_dataset, self._test_loss = run, test_dataset, test_loss
        self._options: dict[str, Any] = {
            "encoding": encoding,
            "dim": dim,
            "dtype": dtype,
            "seed": seed,
            "sample_keys": sample_keys,
            "overwrite": overwrite,
        }
        self._settings = (settings or {}) | setting_of_keys(names.TEST_KEYS_GIVEN, test_keys)
        self._sample_labels, self._test_labels = sample_labels, test_labels
        self._test_keys = test_keys
        self._batches: _TrainBatches | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._session: _Session | None = None

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the present training, or of the last one; None before the first."""
        return None if self._session is None else self._session.recorder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be recorded, and watch the train dataloader.

        The trainer may ask for the train dataloader at any time from here.
        """
        if stage != "fit":
            return
        self._leave(RecordError("the trainer began another training before the last one had ended"))
        _refuse_what_cannot_be(trainer, pl_module, tested=self._test_dataset is not None)
        self._batches, self._loaded = _TrainBatches(trainer), None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the recording, or resume it."""
        assert self._batches is not None
        loader = self._batches.only
        wrapped = trainer.strategy.model
        recorder = Recorder(
            wrapped if isinstance(wrapped, DistributedDataParallel) else pl_module,
            trainer.optimizers[0],
            self._run,
            loader.n_samples,
            settings=_settings_of(trainer, loader.loader) | self._settings,
            sample_labels=self._sample_labels
            if self._sample_labels is not None
            else _labels_of(loader.loader.dataset),
            **self._options,
        )
        recorder.facts["step_loss"] = _STEP_LOSS
        self._session = _Session(recorder, trainer)
        if self._test_dataset is not None:
            sources = self._test_dataset, loader.loader
            try_test(pl_module, self._tests(trainer), self._test_loss, pl_module.device, *sources)
        if trainer.global_step:
            self._session.resume(self._loaded)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the batch's samples."""
        if self._session is not None and self._batches is not None:
            self._session.begin_batch(self._batches.next_ids())

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the batch's loss."""
        if self._session is not None:
            self._session.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the step's loss."""
        if self._session is not None:
            self._session.note_loss()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ignore calls of the module until the next batch."""
        if self._session is not None:
            self._session.recorder.end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the test gradients and finish the recording."""
        assert self._session is not None
        tests = None if self._test_dataset is None else partial(self._tests, trainer)
        self._session.finish(tests, self._test_loss, self._test_labels, self._test_keys)

    def _tests(self, trainer: Trainer) -> Iterator[tuple[Any, Any]]:
        """Yield the test samples, batched as those of the train dataloader."""
        assert self._batches is not None
        loader = self._batches.only.loader
        collate = None if loader.batch_sampler is None else loader.collate_fn
        for batch in DataLoader(self._test_dataset, loader.batch_size or 1, collate_fn=collate):
            yield pair_of(trainer.precision_plugin.convert_input(batch), "test_dataset")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the recording as it is."""
        self._leave(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if self._batches is not None:
            self._batches.leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the trainer's checkpoint. Collective."""
        return {} if self._session is None else self._session.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._loaded = state_dict

    def _leave(self, error: BaseException) -> None:
        if self._batches is not None:
            self._batches.leave()
        if self._session is not None:
            self._session.leave(error)


class _TrainBatches:
    """The sample ids of the trainer's training batches, in the order in which they were drawn.

    Args:
        trainer: the trainer. It hands its dataloaders to the strategy when their samplers are
            final, and before it iterates them.
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
            raise UsageError(
                f"the trainer has {len(loaders)} train dataloaders, so a sample has no number of "
                f"its own: {_ONE_LOADER}"
            )
        return self._newest

    def next_ids(self) -> NDArray[np.int64]:
        """Return the sample ids of the batch that the trainer was just given, shape (batch,).

        Raises:
            RecordError: the batch cannot be paired with its samples.
        """
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
        # without a length the trainer draws one batch ahead to know the last
        ahead = int(sized_len(loader) is None)
        self._newest = WatchedLoader(loader, n_samples, _ONE_LOADER, ahead)
        return self._newest.loader


class _Session:
    """One recorded training.

    Args:
        recorder: recorder of the training.
        trainer: trainer that runs the training.
    """

    def __init__(self, recorder: Recorder, trainer: Trainer) -> None:
        self.recorder, self._trainer = recorder, trainer
        #: losses of the present step's batches, divided and scaled as the trainer does before it
        #: differentiates them
        self.losses: list[Tensor] = []
        self._note: StepNote | None = None
        # the trainer's count of optimizer steps when the last batch began; None: no batch has begun
        self._begun_at: int | None = None
        # the reason why no state can be taken any more, and the last state
        self._over: str | None = None
        self._kept: dict[str, Any] | None = None

    def resume(self, loaded: Mapping[str, Any] | None) -> None:
        """Resume from a checkpoint. Raises: RecordError: it holds no state of the recording."""
        if loaded is None or _STATE not in loaded:
            made = (
                "without HydraCallback, so that the steps before it were not recorded"
                if loaded is None
                else loaded[_WITHOUT]
            )
            raise RecordError(
                f"the training resumes at step {self._trainer.global_step}, from a checkpoint "
                f"that was made {made}: train from the beginning, or from another checkpoint"
            )
        self.recorder.load_state_dict(loaded[_STATE])

    def begin_batch(self, ids: NDArray[np.int64]) -> None:
        """Begin the batch of samples `ids`, which the trainer has been given."""
        if self._trainer.global_step != self._begun_at:
            self._begun_at, self.losses = self._trainer.global_step, []
        self.recorder.end_batch()  # a training step may leave out its batch
        self._note = self.recorder.next_batch(ids)

    def note_loss(self) -> None:
        """Note the loss of the step that is about to be taken."""
        if self._note is not None and self.losses:
            scaler = getattr(self._trainer.precision_plugin, "scaler", None)
            factor = self._trainer.accumulate_grad_batches / (
                1.0 if scaler is None else scaler.get_scale()
            )
            self._note.loss = float(torch.stack(self.losses).mean()) * factor

    def state(self) -> dict[str, Any]:
        """Return the state of the recorder, or the reason why there is none. Collective."""
        if self._over is not None:
            return self._kept or {_WITHOUT: self._over}
        if self._begun_at == self._trainer.global_step:
            return {_WITHOUT: "between accumulated batches, whose gradients it does not hold"}
        return {_STATE: self.recorder.state_dict()}

    def finish(
        self,
        tests: Tests | None,
        loss: TestLoss | None,
        labels: Labels | None,
        keys: Sequence[str] | None,
    ) -> None:
        """Record the test gradients and close."""
        finish(self.recorder, tests, loss, labels, keys)
        self._over = "after the recording was complete"

    def leave(self, error: BaseException) -> None:
        """Leave the recording as it is, because of `error`."""
        if self._over is not None:
            return
        # other processes may not have been stopped, and a state is collective
        if self._trainer.world_size == 1:
            with suppress(Exception):
                self._kept = self.state()  # for a checkpoint that the error triggers
        self._over = "after the recording had failed"
        self.recorder.fail(error)


def _refuse_what_cannot_be(trainer: Trainer, module: LightningModule, *, tested: bool) -> None:
    """Refuse a trainer or module that cannot be recorded.

    Raises:
        UsageError: names the obstacle.
    """
    if not isinstance(trainer, Trainer):
        raise UsageError(
            f"the trainer is {type(trainer).__module__}.{type(trainer).__name__}: take the "
            "trainer of lightning.pytorch, not of the package pytorch_lightning"
        )
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(
        strategy, DeepSpeedStrategy
    ):
        raise UsageError(
            f"{type(strategy).__name__} hides the samples' gradients, and is not recorded: train "
            "on one device, or with "
            f'strategy="ddp"'
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise UsageError(
            'gradient_clip_algorithm="value" changes each element of the gradient by itself, '
            'and the result cannot be split by sample: clip by "norm"'
        )
    if not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} has automatic_optimization=False, so it takes its own "
            "steps: optimize automatically, or record with hydra_pipe.Recorder in its "
            "training_step"
        )
    if module._compiler_ctx is not None or any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in module.modules()
    ):
        raise UsageError(
            f"{type(module).__name__} is compiled, which hides the samples' gradients: train it "
            "as it is"
        )
    if tested and type(module).forward is LightningModule.forward:
        raise UsageError(
            f"{type(module).__name__} has no forward to predict the test samples with: define "
            "forward(self, inputs)"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UsageError(
            f"{type(module).__name__}.training_step takes the dataloader's iterator, and draws "
            "batches itself: let it take a batch"
        )


def _settings_of(trainer: Trainer, loader: DataLoader[Any]) -> Settings:
    """Return the settings that the training depends on and the recorder does not see."""
    return {
        "batch size": loader.batch_size,
        "accumulated batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
    }


def _labels_of(dataset: Any) -> Sequence[int] | None:
    """Return one integer for each sample, if the dataset has them at hand.

    Samples are not asked for: drawing them could draw random numbers.
    """
    if isinstance(dataset, TensorDataset):
        targets = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != len(dataset):
        return None
    found = np.asarray(targets)
    return found.tolist() if found.ndim == 1 and found.dtype.kind in "iu" else None
