"""The recorder: what a training loop calls, one `with` a step, or once for its loader."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import nan
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from hydra_pipe.errors import (
    DataError,
    RecordError,
    RecordWarning,
    RunError,
)
from hydra_pipe.maths.curvature import Loss
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import EncodingChoice
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.copies import CleanCopies
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.datasets import given_batches
from hydra_pipe.recording.diagnosis import refuse
from hydra_pipe.recording.joint import JointSteps, without_step
from hydra_pipe.recording.leaving import last_uncaught
from hydra_pipe.recording.modes import evaluating
from hydra_pipe.recording.optimizers import check_optimizer, innermost, leaves_out_step, rule_of
from hydra_pipe.recording.output import Output
from hydra_pipe.recording.portions import Mixture, Portion
from hydra_pipe.recording.ranks import Ranks, is_first, together, unwrapped
from hydra_pipe.recording.settings import (
    Labels,
    check_options,
    checked_ids,
    checked_labels,
    json_settings,
    needs_recording,
    record_settings,
)
from hydra_pipe.recording.slab import Slab
from hydra_pipe.recording.state import RecorderState
from hydra_pipe.recording.targets import TargetCheck
from hydra_pipe.recording.testing import record_test_gradients
from hydra_pipe.recording.tracking import TrackedLoader
from hydra_pipe.recording.transfer import buffers_for
from hydra_pipe.recording.untouched import untouched
from hydra_pipe.recording.update import UpdateReader
from hydra_pipe.recording.weights import WeightsNote
from hydra_pipe.store import names
from hydra_pipe.store.checkpoints import state_digests
from hydra_pipe.store.files import location
from hydra_pipe.store.run import Settings

DEFAULT_DIM = 4096


@dataclass
class StepNote:
    """What the loop may say of the step it is in.

    Args:
        loss: mean loss of the batch, kept in the step table; not a number where the loop does not say.
    """

    loss: float = nan


class Recorder:
    """Records the per-sample gradients of a training run as it happens.

    Each `step` gives one row for each sample of its batch: r(i, t) = the sample's share of the batch
    gradient (docs/architecture.md). Training is not changed: the weights are those of training without it, bit for bit::

        recorder = Recorder(model, optimizer, "runs/mine", n_samples=len(train))
        for inputs, targets, sample_ids in loader:
            with recorder.step(sample_ids):
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.record_test(test_loader, loss_fn)
        recorder.close()

    Or the loop stays as it is, and `loader = recorder.track(loader)` stands before it. `with Recorder(...) as recorder:` around
    both closes it, and marks the recording as failed where an exception ends the block.

    Args:
        model: the module that is trained; its modules are hooked until `close`. Wrapped in DistributedDataParallel where several
            processes train it together: then each gives the ids of its own samples, and all take the same number of steps.
        optimizer: torch.optim.SGD, Adam or AdamW over the model's parameters.
        run: directory of the run.
        n_samples: size of the training set; sample ids are 0 to n_samples - 1.
        encoding: "exact" (lossless), "projected", or "auto" (lossless where it fits `dim`).
        dim: budget in columns for "auto" and "projected".
        dtype: of the stored rows: "float16", "int8" (both with a float32 scale a row and block) or "float32". None: float16, but
            int8 with twice the columns, as many bytes, where "auto" would have to project and that is expected to lose less.
        seed: of the random projections.
        settings: further settings that the recording depends on, kept in the manifest.
        sample_labels: one integer or string for each training sample, for rankings and reports.
        overwrite: discard a recording that is there.
        process_group: of the processes that train `model` together by DistributedDataParallel, where a trainer wraps it and `model`
            is what is wrapped.
        allow_mixed_loss: record a loss that mixes the samples of a batch, as contrastive losses do. A row is then the share of the
            batch's gradient that goes through the sample's own outputs, and no derivative in the sample's weight.

    Raises:
        RunError: the directory holds a finished recording, one with other settings, or something else.
        OptimizerError, LayerError: this run cannot be recorded; the message says why.
        UsageError: an unknown encoding or dtype.
        DataError: `sample_labels` are not one integer or string for each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: str | os.PathLike[str],
        n_samples: int,
        *,
        encoding: EncodingChoice = "auto",
        dim: int = DEFAULT_DIM,
        dtype: Dtype | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        sample_labels: Labels | None = None,
        overwrite: bool = False,
        process_group: ProcessGroup | None = None,
        allow_mixed_loss: bool = False,
    ) -> None:
        self._ranks = Ranks.of(model, process_group)
        self._joint = JointSteps(self._ranks) if self._ranks is not None else None
        optimizer = innermost(optimizer)
        self._model, self._optimizer = unwrapped(model), optimizer
        self.path = location(run)
        with together(self._ranks):
            check_options(encoding, dim, dtype)
            if n_samples < 1:
                raise DataError(f"n_samples is {n_samples}: there is nothing to train on")
            trained = check_optimizer(optimizer, self._model)
            refuse(self._model, optimizer, trained)
            self._rule = rule_of(optimizer)
            self._parameters = list(trained)
            self.n_samples = n_samples
            self._sample_labels: NDArray[Any] | None = None
            if sample_labels is not None:
                self.label_samples(sample_labels)
            all_settings = record_settings(encoding, dim, dtype, seed, n_samples) | json_settings(settings or {})
        if self._ranks is not None:
            all_settings["n_ranks"] = self._ranks.size
            self._ranks.require_same({"run": str(self.path), "overwrite": overwrite} | all_settings)
        with together(self._ranks):
            if is_first(self._ranks) and not needs_recording(run, all_settings, overwrite=overwrite):
                raise RunError(f"{run} is recorded already: use another directory, or overwrite=True to discard it")
        self._output = Output(
            self.path,
            all_settings,
            len(optimizer.param_groups),
            preconditioned=self._rule.preconditioned,
            ranks=self._ranks,
            allocate=buffers_for(self._parameters[0].device),
        )
        self._updates = UpdateReader(optimizer, self._rule, trained)
        # rows of the steps that are not written yet, and what else their lines of the step tables hold
        self._slab: Slab | None = None
        self._pending: list[tuple[StepNote, dict[str, Any]]] = []
        self._note = StepNote()
        self._targets = TargetCheck(self._sample_labels)
        self._curvature = CurvatureWatch(self._targets)
        # whether the loop is inside of `step`, whether `record_test` runs, whether a loader is tracked
        self._in_step = self._in_test = self._tracks = False
        # the last batch that `next_batch` named
        self._named: Portion | None = None
        # whether it goes on with a recording and has not taken a step yet
        self._resumed = False
        # steps taken, and those of them that had ended when the present `step` began
        self.n_steps = self._n_ended = 0
        # what else the manifest is to say of this recording
        self.facts: dict[str, str | int | float | None] = {}
        self._closed = self._ended = False
        # blocks of `paused` that the loop is in; whether an exception has ended the loop, and the hooks are off
        self._n_paused, self._is_left = 0, False
        # what came to a prompt last, when the last batch was named
        self._uncaught = last_uncaught()
        # what `record_test` has raised since the last step, and why the recording failed
        self._slip: BaseException | None = None
        self._failure: BaseException | None = None
        self._seed = seed
        hold = self._joint.hold if self._joint is not None else None
        root = self._updates.root if self._rule.preconditioned else None
        probes = self._ranks is None or not self._ranks.static_graph
        self._collector = Collector(
            self._model, root, trained, encoding, dim, seed, dtype, hold, optimizer, probes=probes, allows_mixing=allow_mixed_loss
        )
        self._weights = WeightsNote(self._model, self._parameters)
        self._hook()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close; or mark the recording as failed where an exception ends the block, unless only test gradients are missing."""
        if error is None and self.n_steps == 0 and not self._closed:
            self._ended = True
            self._release()  # nothing was trained, and nothing is written
        elif error is None:
            self.close()
        elif error is self._slip:
            with suppress(Exception):  # the first error is the one to tell
                self.close()
        else:
            self.fail(error)

    def _hook(self) -> None:
        """Take notice of the optimizer; the collector does of the model."""
        self._copies = CleanCopies(self._model)
        self._step_hooks = [
            self._optimizer.register_step_pre_hook(self._before_optimizer_step),
            self._optimizer.register_step_post_hook(self._after_optimizer_step),
        ]

    def _unhook(self) -> None:
        self._collector.detach()
        self._copies.remove()
        for hook in self._step_hooks:
            hook.remove()

    def _leave(self) -> None:
        """An exception has ended the loop: take no notice of what is trained from now on, until a batch is named again."""
        if not (self._closed or self._in_step or self._is_left):
            self._is_left, self._named = True, None
            self._collector.forget()
            self._unhook()

    def _come_back(self, *, to_train: bool) -> None:
        """The loop goes on after `_leave`. Raises: RecordError: it would train on after steps that are missing."""
        if not self._is_left:
            return
        if to_train and self._weights.changed():
            raise RecordError(
                f"an exception has ended the loop at step {self.n_steps}, and the model was trained on, or changed, without the "
                f"recorder: close() it, or make a new one"
            )
        self._is_left = False
        self._collector.attach()
        self._hook()

    def _holding(self) -> AbstractContextManager[None]:
        """A block in the middle of a step: with several ranks, what is raised in it waits until they meet."""
        return nullcontext() if self._joint is None else self._joint.holding()

    @contextmanager
    def _heeding(self) -> Iterator[None]:
        """`_holding`, where the loop is in no `step` that would hear of an error."""
        try:
            with self._holding():
                yield
        except Exception as error:
            self.fail(error)
            raise

    @contextmanager
    def step(self, sample_ids: ArrayLike | Tensor) -> Iterator[StepNote]:
        """Record one optimiser step over the samples `sample_ids`.

        The block holds one or more backward passes and then optimizer.step(). Several passes over a part of the samples each
        (gradient accumulation) take the ids in order. A step that a gradient scaler leaves out, or whose gradients the loop clears
        in place of optimizer.step(), is counted, not recorded.

        Args:
            sample_ids: integers, shape (batch,), each from 0 to n_samples - 1, in the order in which the samples go through the
                model.

        Yields:
            A note whose `loss` the loop may set, before optimizer.step(): the first step is written by then.

        Raises:
            RecordError: no optimizer.step() within the block, or ids that are not those of the batch.
            BooksError: the rows do not sum to the gradient in use.
            NonFiniteError: a gradient is infinite or not a number.
            StoreError: writing failed.
        """
        self._check_open()
        if self._n_paused:
            raise RecordError(
                "recorder.step() inside of recorder.paused(): its passes would be missing; let the pause be within the step"
            )
        self._come_back(to_train=True)
        self._slip, self._uncaught = None, last_uncaught()
        try:
            self._note = StepNote()
            self._in_step = True
            with self._holding():
                if any(portion.tracked for portion in self._collector.portions):
                    raise RecordError(
                        f"recorder.step() in step {self.n_steps}, which has begun with a batch of the tracked loader: leave out "
                        f"recorder.step(), or iterate the loader itself"
                    )
                self._collector.watch(checked_ids(sample_ids, self.n_samples))
            self._n_ended = self.n_steps
            yield self._note
            self._end_step(taken=self.n_steps > self._n_ended)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._in_step = False
            self._collector.forget()

    def track(self, loader: DataLoader[Any]) -> TrackedLoader:
        """`loader` again, recording what a loop does with its batches: the loop itself stays as it is::

            loader = recorder.track(loader)
            for inputs, targets in loader:
                loss = loss_fn(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        A sample's id is its index in `loader.dataset`. A step is what happens from one optimizer.step() to the next: all batches
        that come in between are accumulated. Batches whose gradients the loop clears, as where a gradient scaler leaves out
        optimizer.step(), are not recorded; they count as one skipped step. The model must meet each batch before the next
        one is drawn. Batches come in the same order, and the same random numbers are drawn, as without `track`.

        With several ranks all call it, each with a loader of its own samples, such as one with a DistributedSampler. All take
        optimizer.step() after the same batches.

        Args:
            loader: over a map-style dataset of `n_samples` samples, with any sampler, batch sampler or workers.

        Returns:
            What to iterate, as often as wanted. Its length and attributes are the loader's.

        Raises:
            UsageError: not a DataLoader.
            RecordError: its batches cannot be told by their samples; or the recorder is closed.
            DataError: its dataset has another number of samples.
        """
        self._check_open()
        with together(self._ranks):
            tracked = TrackedLoader(loader, self.n_samples, self._hand_over, self._heeding, self._targets, self._leave)
        self._tracks = True
        return tracked

    def next_batch(self, sample_ids: ArrayLike | Tensor) -> StepNote:
        """Say whose the model's next pass is, where no `with` can stand around a step, as in a trainer's callback.

        A step is what happens from one optimizer.step() to the next, as with `track`: all batches named in between are accumulated.

        Args:
            sample_ids: integers, shape (batch,), each from 0 to n_samples - 1, in the order in which the samples go through the
                model.

        Returns:
            A note whose `loss`, that of the whole step, the loop may set before optimizer.step().

        Raises:
            RecordError: ids that cannot be, the last batch was never met, inside of `step`, or the recorder is closed.
        """
        self._check_open()
        with self._heeding():
            ids = checked_ids(sample_ids, self.n_samples)
            self._named = self._hand_over(ids, self._named)
        self._tracks = True
        return self._note

    def mixed(self, order: ArrayLike | Tensor, weight: float | ArrayLike | Tensor) -> None:
        """Say that the samples of the present batch were mixed with each other, as mixup and cutmix do.

        Sample number b of the batch has the weight w_b in what the model is given, and sample number order[b] the weight 1 - w_b::

            with recorder.step(ids):
                order, weight = torch.randperm(len(x)), 0.3
                recorder.mixed(order, weight)
                loss = loss_fn(model(weight * x + (1 - weight) * x[order]), y, y[order])

        Each row is shared out by these weights: the step has two rows for each of its places. In a tracked loop it comes after the
        batch was drawn.

        Args:
            order: a permutation of the batch, integers of shape (batch,).
            weight: of the sample itself, between 0 and 1: one number, or one for each, shape (batch,).

        Raises:
            RecordError: no batch is named, or the order or the weights cannot be those of the batch.
        """
        self._check_open()
        with self._heeding():
            portion = self._collector.portion
            if portion is None:
                raise RecordError(
                    "recorder.mixed() before a batch was named: call it inside of recorder.step(), or after the batch was drawn"
                )
            batch = len(portion.samples)
            places = np.asarray(order.cpu() if isinstance(order, Tensor) else order)
            weights = np.asarray(weight.cpu() if isinstance(weight, Tensor) else weight, np.float64)
            if places.shape != (batch,) or not np.array_equal(np.sort(places), np.arange(batch)):
                raise RecordError(f"the order of recorder.mixed() is no permutation of the {batch} samples of the batch")
            if weights.shape not in ((), (batch,)) or not ((weights >= 0) & (weights <= 1)).all():
                raise RecordError("the weights of recorder.mixed() are to be one number between 0 and 1, or one for each sample")
            portion.partners = portion.samples[places], np.broadcast_to(weights, (batch,)).copy()

    def end_batch(self) -> None:
        """Say that the model's next passes are not of the batch that `next_batch` named, whether it was met or not."""
        if not (self._closed or self._in_step):
            self._named = None
            self._collector.rest()

    def _hand_over(self, samples: NDArray[np.int64], before: Portion | None) -> Portion | None:
        """A batch comes that a tracked loader or `next_batch` names, after `before` if it is not the first of its epoch."""
        if self._closed or self._in_test or self._n_paused or (self._joint is not None and self._joint.held is not None):
            return None
        self._come_back(to_train=True)
        self._slip, self._uncaught = None, last_uncaught()
        if self._in_step:
            raise RecordError("a batch named by a loader or by next_batch() inside of recorder.step(): use one of them, not both")
        # a loop that goes on in mid-epoch draws what it has done already, and leaves it
        if before is not None and not before.met and not self._resumed:
            raise RecordError(
                f"at step {self.n_steps} a next batch came before the model had met the last one: a loop that draws ahead, or "
                f"leaves batches out, has to name its samples with recorder.step(ids)"
            )
        return self._collector.watch(samples, tracked=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose passes are not recorded, in a step or between steps: those whose gradients the optimizer never uses.

        For an attack on the inputs, the first pass of sharpness-aware minimisation, the other half of an adversarial pair, a
        teacher, or a saliency map::

            with recorder.paused():
                x = attacked(model, x, y)
            loss_fn(model(x), y).backward()

        A graph belongs to the block in which its forward pass was made, and its backward pass too. What the block adds to
        `.grad` has to be cleared before optimizer.step(), as the loop does without a recorder, or the books do not balance.
        Batches that a tracked loader gives in the block are not named.

        Raises:
            RecordError: optimizer.step() in the block, whose gradients would be missing.
        """
        self._n_paused += 1
        try:
            with self._collector.paused():
                yield
        finally:
            self._n_paused -= 1

    def _check_open(self) -> None:
        if self._closed:
            why = "" if self._failure is None else f", for its recording has failed ({self._failure})"
            raise RecordError(f"this recorder is closed{why}: make a new one for another run")

    @property
    def is_closed(self) -> bool:
        """Tell whether it records no more: it was closed, or the recording has failed."""
        return self._closed

    @property
    def n_skipped(self) -> int:
        """Steps that a gradient scaler left out, or whose gradients the loop cleared."""
        return self._collector.n_dropped + (self._joint.n_skipped if self._joint is not None else 0)

    @property
    def n_tests(self) -> int:
        """Test samples whose gradients were taken last; 0 before."""
        return self._output.n_tests

    @property
    def test_steps(self) -> list[int]:
        """Steps after which test gradients were taken."""
        return list(self._output.tests)

    def most_bytes(self, n_rows: int, n_steps: int, n_tests: int) -> int:
        """What `n_rows` more rows of `n_steps` steps, and `n_tests` test gradients, take on the disk at most.

        Raises:
            RecordError: before the first recorded step, which shows what a row has.
        """
        if self._output.writer is None:
            raise RecordError("most_bytes comes after the first recorded step")
        return self._output.writer.most_bytes(n_rows, n_steps, n_tests)

    def tell_loss(self, loss: Loss, output: Tensor, target: Tensor) -> None:
        """Say what the loss of this pass is, for the curvature weight of its rows (docs/architecture.md).

        Cross-entropy, of classes or of yes and no, is known without; of any other loss the weight is not known unless the loop
        tells it, within the step and before optimizer.step(). The loss is called once more, on a copy of `output`.

        Args:
            loss: (output, target) -> losses of shape (batch,); the loop may train on their mean or sum.
            output: what the model has returned, shape (batch, ...).
            target: shape (batch, ...).
        """
        if not self._closed and output.requires_grad:  # what comes of no training is waited for in vain, with all its memory
            self._curvature.tell(loss, output.detach(), target)

    def rests_before(self, batch: int) -> bool:
        """Whether a step of `batch` samples is one before which all rows so far are written anyway, every few steps.

        A `state_dict` that is taken there leaves no trace at all: which steps are checked together decides how their sums are
        rounded, and so the last bits of `imbalance`. Taken elsewhere, the run is that of another whose states were taken there too.
        """
        return self._slab is None or not self._pending or not self._slab.fits(batch)

    def state_dict(self) -> dict[str, Any]:
        """What the loop's own checkpoint has to hold for `load_state_dict`; everything recorded so far is safe on the disk.

            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": recorder.state_dict()}, ...)

        Test gradients that are taken after it count as discarded when it is loaded: take them before. With several ranks all call
        it, all get the same, and all load it.

        Returns:
            Numbers, strings, lists and dicts, which `torch.load` reads with `weights_only=True`.

        Raises:
            RecordError: in the middle of a step, or of batches that are accumulated; or the recorder is closed.
            NonFiniteError, BooksError: one of the last steps cannot be recorded.
            StoreError: writing failed.
        """
        self._check_open()
        with together(self._ranks):
            waiting = 0 if self._in_step else self._collector.n_waiting
            if self._in_step or waiting:
                raise RecordError(
                    f"state_dict() in the middle of step {self.n_steps}"
                    + (f", of which {waiting} batches wait for optimizer.step()" if waiting else "")
                    + ": call it after optimizer.step(), outside of recorder.step()"
                )
        self._collector.drop_seen()
        try:
            self._flush()
            # what is checked together, and so how its sums are rounded, must not depend on what came before the state
            self._slab = None
            return self._put_down()
        except BaseException as error:
            self.fail(error)
            raise

    def _put_down(self) -> dict[str, Any]:
        """Put everything on the disk, for who goes on from here and for who reads meanwhile. Collective. Returns: the state."""
        return self._output.state(self.n_steps, self.n_skipped, self._joint.interval if self._joint is not None else None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken: what was recorded since is discarded, and what follows is as if nothing had happened.

        Before the first step, after the model and the optimizer have got their own states back. The recorder must have been made
        on the same run with the same settings.

        Args:
            state: from `state_dict`.

        Raises:
            RecordError: not such a state, or a step was taken already.
            RunError: another run, one that was recorded again or completely since, or other settings, parameters or optimizer.
            StoreError: the run is damaged, or lacks rows that the state counts.
        """
        self._check_open()
        with together(self._ranks):
            if self.n_steps or self._output.writer is not None or any(p.live for p in self._collector.portions):
                raise RecordError(f"load_state_dict() in step {self.n_steps}: load the state before the first step")
            wanted = RecorderState.from_dict(state)
        if self._ranks is not None:
            self._ranks.require_same(wanted.to_dict())
        self._output.go_on(wanted, self._collector.resume)
        if self._joint is not None and wanted.meet_every is not None:
            self._joint.go_on(wanted.n_steps, wanted.meet_every)
        self.n_steps, self._collector.n_dropped = wanted.n_steps, wanted.n_skipped
        self._resumed = True

    def _end_step(self, *, taken: bool) -> None:
        left_out = not taken and self._collector.left_out(begun=self.n_steps > 0)
        if self._joint is not None:
            if self._joint.end_step(taken=taken, overflowed=left_out):
                self._flush()
        elif left_out:
            self._collector.n_dropped += 1
        elif not taken:
            raise without_step(self.n_steps)

    def record_test(self, tests: Any, loss: Any, *, labels: Labels | None = None) -> None:
        """Take the gradient of each test sample's loss at the present parameters, h_j = grad l_j.

        After training, and before that as often as wanted: of a run that goes on, `hydra-pipe reduce --upto STEP` answers for the
        steps after which it was called. All rows so far are safe on the disk then. For later probes digests of the parameters and
        buffers are kept, and, of the last time, Adam's preconditioner.

        What fails leaves the recording as it was: mend it and call this again, or close(), and `hydra_pipe.probe` takes test
        gradients later.

        The model is put into eval mode meanwhile. Parameters, buffers, `.grad` and random generators are as before afterwards.
        With several ranks all call it, with the whole test set: rank 0 does the work, and the others wait for it without looking
        at `tests`.

        Args:
            tests: a dataset of (input, target), or of mappings that hold their targets as "labels" or the like; or a loader, or
                any iterable, of batches of these. Test ids count from 0 in this order. Inputs are a tensor, or a tuple or a
                mapping of what the model is called with. Samples of a dataset may be of unlike shapes.
            loss: (output, target) -> losses of shape (batch,), or their mean or sum.
            labels: one for each test sample; taken from integer targets if absent.

        Raises:
            RecordError: before the first step, or nothing to test.
            DataError: not test samples, or not one label for each.
            NonFiniteError, BooksError, LayerError: as in training. UserCodeError: the model or the loss raised.

        Warns:
            RecordWarning: the parameters are not those that the last recorded step left.
        """
        if not self._closed and self.n_steps == 0:
            raise RecordError("record_test comes after the first recorded step and before close()")
        self._check_open()
        self._come_back(to_train=False)
        try:
            self._flush()
        except BaseException as error:
            self.fail(error)
            raise
        self._slab = None  # as in `state_dict`: a state that is taken here is to leave no trace
        self._say_whether_weights_changed("the test gradients are of these")
        # what was trained and then frozen has a gradient all the same, and earlier rows to multiply it with
        frozen = [p for p in self._parameters if not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._in_test = True
            n_tests, worst = 0, 0.0
            aside = self._collector.set_aside()
            with together(self._ranks), aside, untouched(self._model, loss, tests), evaluating(self._model):
                if is_first(self._ranks):
                    n_tests, worst = self._take_tests(tests, loss, labels)
            self._output.note_tests(self.n_steps, n_tests, worst)
            self._put_down()
            self._slip = None
        except BaseException as error:
            self._slip = error
            raise
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            self._in_test = False

    def _take_tests(self, tests: Any, loss: Any, labels: Labels | None) -> tuple[int, float]:
        """How many there are, and the largest share of a gradient that its rows miss."""
        writer = self._output.writer
        assert writer is not None
        table = writer.test_rows(self.n_steps, state_digests(self._model))
        try:
            batches, when = given_batches(tests, self._seed), f"after {self.n_steps} steps"
            n_tests, labels, worst = record_test_gradients(self._model, self._collector, table, batches, loss, labels, when)
            writer.flush_test(table)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                writer.drop_test()
            raise
        self._write_preconditioner()
        if labels is not None:
            self._output.write_labels(names.TEST_LABELS, labels)
        return n_tests, worst

    def _write_preconditioner(self) -> None:
        if (roots := self._collector.roots()) is not None:
            assert self._output.writer is not None
            self._output.writer.write_preconditioner(self.n_steps, roots)

    def _say_whether_weights_changed(self, which: str) -> None:
        changed = self._weights.changed()
        self.facts["test_weights"] = f"changed after step {self.n_steps - 1}" if changed else None
        if changed:
            warnings.warn(
                f"the parameters were written to since the last recorded step, {self.n_steps - 1} (those of the best epoch, an "
                f"average, or a change by hand): {which}, and the relevance of training samples leaves the change out",
                RecordWarning,
                stacklevel=3,
            )

    def label_samples(self, labels: Labels) -> None:
        """Give each training sample a label, for rankings and reports.

        Raises:
            DataError: not one integer or string for each sample.
        """
        self._sample_labels = checked_labels(labels, "sample_labels", self.n_samples, "training samples")

    def close(self) -> None:
        """Write what is left, remove the hooks and mark the recording as complete.

        A run that has no test gradients of its end gets some by `hydra_pipe.probe`: what that needs is kept.

        Raises:
            StoreError: writing failed.
            RecordError: nothing was recorded.
        """
        if self._closed:
            return
        try:
            self._flush()
        except BaseException as error:
            self.fail(error)
            raise
        if self._output.writer is not None and self.n_steps not in self._output.tests:
            self._say_whether_weights_changed("probes will be of these")
        try:
            self._output.complete(self._end, self.n_steps, self.n_skipped, self.facts)
        except BaseException as error:
            if self._closed or self._output.writer is None:  # else it may be tried again
                self.fail(error)
            raise
        self._ended = True

    def _end(self) -> None:
        if is_first(self._ranks):
            if self._sample_labels is not None:
                self._output.write_labels(names.TRAIN_LABELS, self._sample_labels)
            if self.n_steps not in self._output.tests:
                self._keep_what_probes_need()
        self._release()

    def _keep_what_probes_need(self) -> None:
        """Test gradients of no sample, with digests of the parameters, and the preconditioner."""
        writer = self._output.writer
        assert writer is not None
        writer.flush_test(writer.test_rows(self.n_steps, state_digests(self._model)))
        self._write_preconditioner()

    def fail(self, error: BaseException) -> None:
        """Keep what was recorded so far readable and mark the recording as failed. With several ranks, it waits for no other."""
        if self._ended:
            return
        self._ended, self._failure = True, error
        if not self._closed:
            # the first error is the one to tell, whatever comes of a disk, or of the user's loss that is called here
            with suppress(Exception):
                self._curvature.settle()
            with suppress(Exception):
                if self._joint is None:
                    self._flush()
            with suppress(Exception):
                self._release()
        self._output.fail(error)

    def _release(self) -> None:
        self._closed = True
        self._collector.forget()
        self._unhook()
        self._output.close()

    def _before_optimizer_step(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._n_paused:
            error = RecordError(
                f"optimizer.step() at step {self.n_steps} inside of recorder.paused(): its gradients would be missing; leave the "
                f"block first, or close() the recorder"
            )
            self.fail(error)
            raise error
        if last_uncaught() is not self._uncaught and not self._in_step:
            self._leave()  # an error has ended the cell in which the last batch was named
            return None
        if leaves_out_step(self._optimizer):
            return None  # as if it had not been called, which is what a scaler does with any other optimiser
        own, *given = args  # args begin with the optimiser
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._heed_step()
            return None
        # The closure makes the gradients, within optimizer.step(), which uses them at once.
        after = self._heeding_step_after(closure)
        return ((own, after, *given[1:]), kwargs) if given else (args, kwargs | {"closure": after})

    def _after_optimizer_step(self, *_: Any) -> None:
        self._weights.take()

    def _heeding_step_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """`closure`, which optimizer.step() calls once, and what comes between it and the update."""
        n_calls = 0

        def after() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls > 1:
                error = RecordError(
                    f"{type(self._optimizer).__name__} called the closure of step {self.n_steps} twice, and its update is of "
                    f"several gradients: use an optimizer that takes one"
                )
                self.fail(error)
                raise error
            found = closure()
            # a closure that has left its batch out leaves the optimiser nothing to do
            if any(p.grad is not None for p in self._parameters):
                self._heed_step()
            return found

        return after

    def _heed_step(self) -> None:
        """The gradients are as the optimiser is about to use them."""
        try:
            if self._joint is not None and self._in_step and self.n_steps > self._n_ended:
                self._end_step(taken=True)  # an earlier one of the same `step`
                self._n_ended = self.n_steps
            if self._joint is None or self._joint.held is None:
                with self._holding():
                    self._take_step()
            if self._joint is not None and not self._in_step:
                self._collector.forget()  # also where an error is held and nothing was taken
                self._end_step(taken=True)  # where the loop names its samples, leaving `step` does it
        except BaseException as error:
            self.fail(error)
            raise

    def _take_step(self) -> None:
        portions = self._collector.portions
        if not portions:
            raise RecordError(
                f"optimizer.step() at step {self.n_steps} after no batch that a loader or next_batch() named: draw, or name, "
                f"a batch for each step, or close() the recorder first"
                if self._tracks
                else "optimizer.step() outside of recorder.step(): its gradients would be missing; put it inside, or close() the "
                "recorder first"
            )
        samples = np.concatenate([portion.samples for portion in portions])
        self._record_rows(samples, Mixture.of(portions))
        self._collector.forget()
        if self._in_step:
            self._collector.watch(samples)

    def _record_rows(self, samples: NDArray[np.int64], mixture: Mixture | None) -> None:
        gradients = self._updates.gradients(self.n_steps)
        curvature = self._curvature.see(self._collector.outputs, samples, None if mixture is None else mixture.places)
        if mixture is not None:
            samples = np.concatenate([samples, mixture.partners])
        if self._joint is None and self._slab is not None and not self._slab.fits(len(samples)):
            self._flush()
        columns = {
            names.SAMPLE: samples,
            names.STEP: np.full(len(samples), self.n_steps),
            names.CURVATURE: curvature,
        }
        self._slab = self._collector.add_to(self._slab, gradients, columns, f"at step {self.n_steps}", at_step=True)
        self._pending.append((self._note, self._updates.settings(gradients) | {names.N_ROWS: len(samples)}))
        if not self._in_step:
            self._note = StepNote()
        self.n_steps += 1
        self._resumed = False
        if self._joint is None and self._output.writer is None:
            self._flush()  # a first step is checked at once: what it would refuse has to be refused before anything is written

    def _flush(self) -> None:
        """Check and write the steps that wait; several ranks meet here. Raises: the error of the first that cannot be recorded."""
        self._curvature.settle()  # first: it may call a loss of the user's, which may raise, and the steps are good all the same
        waiting = [(note.loss, values) for note, values in self._pending]
        self._pending = []
        with torch.no_grad():
            if self._joint is not None:
                checked, waiting, error = self._joint.meet(self._slab, waiting)
            elif self._slab is None or not waiting:
                return
            else:
                checked = self._slab.check(names.SAMPLE)
                error = checked.error
            if self._slab is not None and checked is not None and checked.entries:
                assert self._collector.dtype is not None  # it was chosen with the layout
                writer = self._output.open(self._slab.layout, self._collector.dtype)
                with self._holding():
                    self._output.write(writer, self._slab, checked, waiting)
        if error is not None:
            raise error
