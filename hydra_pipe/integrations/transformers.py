"""Recording under `transformers.Trainer` as it is: `pip install 'hydra-pipe[transformers]'`."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from math import nan
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hydra_pipe.errors import DataError, HydraError, RecordError, UsageError, missing_extra
from hydra_pipe.integrations.finishing import finish, optional
from hydra_pipe.integrations.named import SAMPLE_IDS, NamingCollator, checked_batch, named_batches
from hydra_pipe.integrations.refusals import refuse_training_arguments, unnamed_pass
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import EncodingChoice
from hydra_pipe.recording.collectives import unwrapped
from hydra_pipe.recording.pending import StepNote
from hydra_pipe.recording.recorder import DEFAULT_DIM, Recorder
from hydra_pipe.recording.settings import (
    Labels,
    checked_keys,
    checked_labels,
    setting_of_keys,
)
from hydra_pipe.recording.test_gradients import try_test
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.store import names
from hydra_pipe.store.run.stages import Settings

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import ExportableState
    from transformers.utils.generic import find_labels
except ImportError as error:
    raise missing_extra(__name__, "transformers", error) from error

# (output of the model, labels) -> losses of shape (batch,)
TestLoss = Callable[[Any, Tensor], Tensor]

_ATTRIBUTES, _STATE = "attributes", "recorder"
# The meaning of a step's loss: a model that takes the number of items is asked for sums over them.
_SUM, _MEAN = (
    "what its batches add, divided by the step's items as the model does",
    "mean of its batches' losses",
)
_LABELS = ("labels", "label", "label_ids")


class HydraCallback(TrainerCallback, ExportableState):
    """Records the training of a `transformers.Trainer`::

        trainer = Trainer(model, args, train_dataset=train, callbacks=[HydraCallback("runs/sst2",
        test_dataset)]) trainer.train()

    Then run `hydra-pipe reduce runs/sst2`. Training is not changed: the weights are those without
    the callback, bit for bit. A sample's id is its index in the training set. Each optimizer step
    is one step of the run, however many batches are accumulated for it. A row is the sample's share
    of that step's gradient. If the trainer divides by the number of tokens (causal language
    models), a long sample has a larger share than a short one, as it had in training.

    The trainer's checkpoints hold the recorder's state. So
    `trainer.train(resume_from_checkpoint=...)` also resumes the recording. Under `torchrun` every
    process gives the same callback.

    The test gradients are taken at the parameters of the last step, before `load_best_model_at_end`
    puts others back.

    Args:
        run: directory of the run.
        test_dataset: samples in the form of the training set, whose predictions are to be
            explained. Columns that the collator does not take of a training sample are left out of
            test samples as well. The first sample is tried before training. None:
            `hydra_pipe.probe` takes test gradients later.
        test_loss: (output of the model, labels) -> losses of shape (batch,). None: the loss that
            the model itself returns for the sample alone; for a language model this is the mean
            over its tokens. A model whose forward takes no labels needs a `test_loss`.
        encoding, dim, dtype, seed, overwrite: options of `hydra_pipe.Recorder`.
        settings: further settings to keep in the manifest, beside those of the trainer that change
            training.
        sample_labels, test_labels: one label for each sample, for rankings and reports; taken from
            integer labels if absent.
        sample_keys, test_keys: one string for each sample that names no other one, such as the id
            of a document.

    Raises:
        UsageError: no run is given.
        DataError: there are no test samples in `test_dataset`, or test labels or keys are not one
            for each.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        test_dataset: Any = None,
        *,
        test_loss: TestLoss | None = None,
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
        if run is None:
            # To restore callbacks, the trainer constructs them anew without their arguments.
            raise UsageError(
                "HydraCallback needs a run. Leave restore_callback_states_from_checkpoint at "
                "False: the callback resumes from the trainer's checkpoint without it"
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
        self._session: _Session | None = None

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the present training, or of the last one; None before the first."""
        return None if self._session is None else self._session.recorder

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wrap the trainer's `train`, to hear of an error or an interrupt that ends a training.

        The trainer tells its callbacks of a good end only.
        """
        trainer = _trainer_above(sys._getframe(1))
        if trainer is not None:
            trainer.train = _leaving(trainer.train, self)  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:  # the trainer's own signature
        """Begin the recording, or resume it."""
        if self._session is not None:
            # The session is of a training that was given up, such as for lack of memory for its
            # batches.
            self.leave(
                RecordError("the trainer began another training before the last one had ended")
            )
        _refuse_what_cannot_be(args)
        refuse_training_arguments(args)
        model, loader = objects["model"], objects["train_dataloader"]
        # the optimizer inside Accelerate's wrapper
        optimizer = getattr(objects["optimizer"], "optimizer", objects["optimizer"])
        dataset = named_batches(loader)
        recorder = Recorder(
            model,
            optimizer,
            self._run,
            len(dataset),
            settings=_settings_of(args) | self._settings,
            sample_labels=self._sample_labels,
            process_group=torch.distributed.group.WORLD if args.world_size > 1 else None,
            **self._options,
        )
        scale = args.world_size if args.average_tokens_across_devices else 1
        collate = loader.collate_fn
        assert isinstance(collate, NamingCollator)
        self._session = _Session(recorder, model, collate.collate, dataset, scale)
        if self._test_dataset is not None:
            self._session.try_tests(self._test_dataset, self._test_loss)
        if state.global_step:
            self._session.resume(state, type(self).__name__)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the recorder's state if a checkpoint is to be made."""
        self._keep(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the recorder's state if a checkpoint is to be made."""
        self._keep(args, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the recorder's state if the evaluation's result may lead to a checkpoint."""
        self._keep(args, control, anyway=args.save_strategy == "best")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Finish the recording at the trainer's last log line.

        After this line the trainer may load another model.
        """
        if logs is not None and "train_runtime" in logs:
            self._finish()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Finish the recording."""
        self._finish()

    def state(self) -> dict[str, Any]:
        """Return the state for the trainer's checkpoint."""
        attributes = {} if self._session is None else {_STATE: self._session.state()}
        return {"args": {}, _ATTRIBUTES: attributes}

    def _keep(
        self, args: TrainingArguments, control: TrainerControl, *, anyway: bool = False
    ) -> None:
        # Saving is collective, but the trainer asks only one process for its state.
        if self._session is not None and args.world_size > 1 and (control.should_save or anyway):
            self._session.keep()

    def leave(self, error: BaseException) -> None:
        """Remove the hooks, and leave the recording as it is, because of `error`."""
        if self._session is not None:
            self._session.leave(error)

    def _finish(self) -> None:
        if self._session is not None and not self._session.finished:
            # Only after training: reading samples of a dataset may draw random numbers, and would
            # change the training.
            recorder = self._session.recorder
            if self._sample_labels is None:
                with optional(recorder.path, "labels of the training samples"):
                    if (found := _labels_of(self._session.dataset)) is not None:
                        recorder.label_samples(found)
            labels = self._test_labels
            if labels is None and self._test_dataset is not None:
                with optional(recorder.path, "labels of the test samples"):
                    labels = _labels_of(self._test_dataset)
            self._session.finish(self._test_dataset, self._test_loss, labels, self._test_keys)


class _Session:
    """One recorded training.

    Args:
        recorder: recorder of the training.
        model: model that the trainer calls, or the module inside its wrapper.
        collate: the trainer's collator.
        dataset: dataset of the training samples.
        scale: factor by which the trainer multiplies a loss that is divided by the number of items.
    """

    def __init__(
        self,
        recorder: Recorder,
        model: nn.Module,
        collate: Callable[[list[Any]], Any],
        dataset: Any,
        scale: int,
    ) -> None:
        self.recorder, self.dataset, self._model = recorder, dataset, model
        self._collate, self._scale = collate, scale
        self.finished = False
        self._kept: tuple[int, dict[str, Any]] | None = None
        # the present step, the losses of its batches, and whether these are parts of one sum (else
        # each is a mean)
        self._note: StepNote | None = None
        self._losses: list[float] = []
        self._parts = False
        self._passing = False
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_pass, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_pass),
        ]

    def resume(self, state: TrainerState, name: str) -> None:
        """Resume from a checkpoint. Raises: RecordError: it was made without this callback."""
        kept = (
            state.stateful_callbacks.get(name)
            if isinstance(state.stateful_callbacks, Mapping)
            else None
        )
        found = kept.get(_ATTRIBUTES, {}).get(_STATE) if isinstance(kept, Mapping) else None
        if found is None:
            raise RecordError(
                f"the checkpoint of step {state.global_step} was made without {name}, so that "
                "the steps before it were not "
                f"recorded: train from the beginning, or from a checkpoint that was made with it"
            )
        self.recorder.load_state_dict(found)

    def keep(self) -> None:
        """Save the recorder's state. Collective."""
        if not self.finished:
            self._kept = self.recorder.n_steps, self.recorder.state_dict()

    def state(self) -> dict[str, Any] | None:
        """Return the state of the recorder; None once the recording is finished."""
        if self.finished:
            return None
        if self._kept is None or self._kept[0] != self.recorder.n_steps:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise RecordError(
                    "a checkpoint was not announced when the step ended, so the other processes "
                    "have not saved the recording's state: give HydraCallback after the "
                    "callbacks that ask for checkpoints"
                )
            self.keep()
        assert self._kept is not None
        return self._kept[1]

    def leave(self, error: BaseException) -> None:
        """Remove the hooks, and leave the recording as it is."""
        self._forget()
        if not self.finished:
            self.recorder.fail(error)

    def finish(
        self,
        dataset: Any,
        loss: TestLoss | None,
        labels: Labels | None,
        keys: Sequence[str] | None,
    ) -> None:
        """Record the test gradients and close."""
        tests = (
            None
            if dataset is None
            else partial(self._tests, dataset, loss, lambda: set(self.dataset[0]))
        )
        finish(self.recorder, tests, loss if loss is not None else _models_own, labels, keys)
        self.finished = True
        self._forget()

    def try_tests(self, dataset: Any, loss: TestLoss | None) -> None:
        """Take the loss of the first test sample, before training. Raises: as `try_test`."""
        model = unwrapped(self._model)
        device = next(model.parameters()).device
        # No sample of the training set is read: reading may draw random numbers, from a generator
        # of the dataset's own.
        named = getattr(self.dataset, "column_names", None)
        columns = set(named) if isinstance(named, list) else None
        sources = dataset, self.dataset, self._collate
        try:
            try_test(
                model,
                self._tests(dataset, loss, lambda: columns),
                loss or _models_own,
                device,
                *sources,
            )
        except HydraError:
            if columns is not None:
                raise
            # The cause may be columns that only the test samples have: try again without them.
            try_test(
                model,
                self._tests(dataset, loss, lambda: set(self.dataset[0])),
                loss or _models_own,
                device,
                *sources,
            )

    def _tests(
        self, dataset: Any, loss: TestLoss | None, columns: Callable[[], set[str] | None]
    ) -> Iterator[tuple[Any, Any]]:
        """Yield each test sample as the model is called with it, and its labels."""
        wanted, model = columns(), unwrapped(self._model)
        takes = inspect.signature(model.forward).parameters
        known = find_labels(type(model)) or _LABELS  # type: ignore[no-untyped-call]
        for i in range(len(dataset)):
            sample = dataset[i]
            with user_code(f"the data collator raised at test sample {i}"):
                kept = (
                    sample
                    if wanted is None
                    else {name: x for name, x in sample.items() if name in wanted}
                )
                collated = self._collate([kept])
            batch = dict(checked_batch(collated))
            names = [name for name in known if name in batch]
            names = names or [name for name in _LABELS if name in batch]
            labels = [batch[name] for name in names if batch[name] is not None]
            if not labels:
                raise DataError(
                    f"test sample {i} has no labels, which its loss needs: it has "
                    f"{', '.join(batch)}"
                )
            if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                refused = [name for name in names if name not in takes]
                if refused and loss is None:
                    raise DataError(
                        f"{type(model).__name__}.forward takes no {refused[0]}, and returns no "
                        "loss: give HydraCallback(..., "
                        f"test_loss=...), (output, labels) -> one loss per sample"
                    )
                batch = {name: values for name, values in batch.items() if name not in refused}
            yield batch, labels[0] if len(labels) == 1 else tuple(labels)

    def _before_pass(
        self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        ids = inputs.get(SAMPLE_IDS)
        if ids is None:
            if torch.is_grad_enabled() and model.training and self._note is None:
                # no batch has come: the trainer lost the ids on the way
                raise RecordError(unnamed_pass(model, inputs))
            return None
        if torch.is_grad_enabled():
            note = self.recorder.next_batch(ids)
            if note is not self._note:
                self._note, self._losses = note, []
            self._parts, self._passing = "num_items_in_batch" in inputs, True
            self.recorder.facts["step_loss"] = _SUM if self._parts else _MEAN
        return args, {name: value for name, value in inputs.items() if name != SAMPLE_IDS}

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._passing or self._note is None:
            return
        self._passing = False
        loss = output.get("loss") if isinstance(output, Mapping) else None
        self._losses.append(
            float(loss.detach()) if isinstance(loss, Tensor) and loss.dim() == 0 else nan
        )
        self._note.loss = sum(self._losses) * (
            self._scale if self._parts else 1 / len(self._losses)
        )

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()


def _trainer_above(frame: FrameType | None) -> Trainer | None:
    """Return the trainer that one of the callers of `frame` is constructing, or None."""
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _leaving(train: Callable[..., Any], callback: HydraCallback) -> Callable[..., Any]:
    """Wrap `train`, so that an exception in it also ends the recording."""

    @wraps(train)
    def leaving(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            callback.leave(error)
            raise

    return leaving


def _models_own(output: Any, _: Any) -> Tensor:
    """Return the loss that the model returns for one sample, shape (1,)."""
    # A model that returns a tuple puts the loss first, if it was given labels.
    loss = (
        output.get("loss")
        if isinstance(output, Mapping)
        else output[0]
        if isinstance(output, tuple)
        else None
    )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(
            "the model returns no loss: give HydraCallback(..., test_loss=...), (output, labels) "
            "-> one loss per sample"
        )
    return loss.reshape(1)


def _refuse_what_cannot_be(args: TrainingArguments) -> None:
    """Refuse options that cannot be recorded. Raises: UsageError: names the option."""
    refused = {
        "several GPUs in one process (DataParallel)": args.n_gpu > 1,
        "fsdp": bool(args.fsdp),
        "deepspeed": bool(args.deepspeed),
        "torch_compile": bool(args.torch_compile),
    }
    for option, is_set in refused.items():
        if is_set:
            raise UsageError(
                f"{option} hides the samples' gradients, and is not recorded: train without it, "
                "or on several GPUs by torchrun"
            )


def _settings_of(args: TrainingArguments) -> Settings:
    """Return the settings that the training depends on and the recorder does not see."""
    return {
        "trainer seed": args.seed,
        "epochs": args.num_train_epochs,
        "max steps": args.max_steps,
        "batch size": args.per_device_train_batch_size,
        "accumulated batches": args.gradient_accumulation_steps,
    }


def _labels_of(dataset: Any) -> Sequence[int] | None:
    """Return one integer label for each sample; None if the samples do not all have one."""
    first = dataset[0]
    column = (
        next((name for name in _LABELS if name in first), None)
        if isinstance(first, Mapping)
        else None
    )
    if column is None or _integer(first[column]) is None:
        return None
    named = getattr(dataset, "column_names", None)
    values = (
        dataset[column]
        if isinstance(named, list) and column in named
        else [dataset[i][column] for i in range(len(dataset))]
    )
    labels = [_integer(value) for value in values]
    return None if None in labels else labels  # type: ignore[return-value]


def _integer(value: Any) -> int | None:
    item = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
    return item if isinstance(item, int) else None
