"""The recorder, which a training loop calls: one `with` a step, or once for its loader."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self

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
from hydra_pipe.recording.capture import Watching
from hydra_pipe.recording.collectives import processes_of, unwrapped
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.dynamics import DynamicsWatch
from hydra_pipe.recording.loop import Between, Loop
from hydra_pipe.recording.optimizer_reader import OptimizerReader
from hydra_pipe.recording.optimizers import check_optimizer, innermost, maximizes, rules_of_groups
from hydra_pipe.recording.pending import PendingSteps, StepNote
from hydra_pipe.recording.recorded_tests import TestGradients
from hydra_pipe.recording.recording_stage import RecordingStage
from hydra_pipe.recording.refusals import refuse
from hydra_pipe.recording.settings import (
    Labels,
    check_options,
    checked_keys,
    checked_labels,
    json_settings,
    needs_recording,
    record_settings,
)
from hydra_pipe.recording.state import RecorderState
from hydra_pipe.recording.step_sync import steps_of
from hydra_pipe.recording.targets import TargetCheck
from hydra_pipe.recording.tracking import TrackedLoader
from hydra_pipe.recording.transfer import buffers_for
from hydra_pipe.store import names
from hydra_pipe.store.files import location
from hydra_pipe.store.run.stages import Settings

DEFAULT_DIM = 4096


class Recorder:
    """Records the per-sample gradients of a training run as it happens.

    Each `step` gives one row for each sample of its batch: r(i, t) is the sample's share of the
    batch gradient (docs/architecture.md). Training is not changed: the weights are those of
    training without a recorder, bit for bit::

        recorder = Recorder(model, optimizer, "runs/mine", n_samples=len(train))
        for inputs, targets, sample_ids in loader:
            with recorder.step(sample_ids):
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.record_test(test_loader, loss_fn)
        recorder.close()

    The loop can also stay as it is, after a line `loader = recorder.track(loader)`. Around the
    loop, a block `with Recorder(...) as recorder:` closes the recorder at its end. If an exception
    ends the block, the recording is marked as failed.

    Args:
        model: the module in training; its modules are hooked until `close`. If several processes
            train it together, it is wrapped in DistributedDataParallel. Then each process gives the
            ids of its own samples, and all take the same number of steps.
        optimizer: torch.optim.SGD, Adam, AdamW or another that is known (docs/optimiser.md), over
            the model's parameters. Or a list of several that each take every step.
        run: directory of the run.
        n_samples: size of the training set; sample ids are 0 to n_samples - 1.
        encoding: "exact" (lossless), "projected", or "auto" (lossless if it fits `dim`).
        dim: budget in columns for "auto" and "projected".
        dtype: dtype of the stored rows: "float16", "int8" (both with a float32 scale a row and
            block) or "float32". None: float16. But None gives int8 with twice the columns, as many
            bytes, if "auto" would have to project and int8 is expected to lose less.
        seed: seed of the random projections.
        settings: further settings that the recording depends on, kept in the manifest.
        sample_labels: one integer or string for each training sample, for rankings and reports.
        sample_keys: one string for each training sample that names no other one, such as a path,
            the id of a document or a hash. Tables have the keys beside the ids, and runs are
            combined by them.
        overwrite: True discards an existing recording.
        process_group: process group that trains `model` by DistributedDataParallel, if a trainer
            wraps the model and `model` is the module inside.
        allow_mixed_loss: True records a loss that mixes the samples of a batch, such as a
            contrastive loss. A row is then the share of the batch's gradient that goes through the
            sample's own outputs. It is not a derivative in the sample's weight.

    Raises:
        RunError: the directory holds a finished recording, one with other settings, or something
            else.
        OptimizerError, LayerError: this run cannot be recorded; the message says why.
        UsageError: an unknown encoding or dtype.
        DataError: `sample_labels` are not one integer or string for each sample, or `sample_keys`
            not one string for each.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        run: str | os.PathLike[str],
        n_samples: int,
        *,
        encoding: EncodingChoice = "auto",
        dim: int = DEFAULT_DIM,
        dtype: Dtype | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        sample_labels: Labels | None = None,
        sample_keys: Sequence[str] | None = None,
        overwrite: bool = False,
        process_group: ProcessGroup | None = None,
        allow_mixed_loss: bool = False,
    ) -> None:
        self._processes = processes_of(model, process_group)
        self._sync = steps_of(self._processes)
        self._model = unwrapped(model)
        self.path = location(run)
        with self._processes.together():
            check_options(encoding, dim, dtype)
            if n_samples < 1:
                raise DataError(f"n_samples is {n_samples}: there is nothing to train on")
            used: torch.optim.Optimizer = innermost(optimizer)
            trained = check_optimizer(used, self._model)
            refuse(self._model, used, trained)
            rules, parameters = rules_of_groups(used), list(trained)
            self.n_samples = n_samples
            self._sample_labels: NDArray[Any] | None = None
            if sample_labels is not None:
                self.label_samples(sample_labels)
            self._sample_keys = (
                None
                if sample_keys is None
                else checked_keys(sample_keys, "sample_keys", n_samples, "training samples")
            )
            all_settings = record_settings(
                encoding, dim, dtype, seed, n_samples, self._sample_keys
            ) | json_settings(settings or {})
        if self._processes.size > 1:
            all_settings["n_ranks"] = self._processes.size
        self._processes.require_same({"run": str(self.path), "overwrite": overwrite} | all_settings)
        with self._processes.together():
            if self._processes.is_first and not needs_recording(
                run, all_settings, overwrite=overwrite
            ):
                raise RunError(
                    f"{run} is recorded already: use another directory, or overwrite=True to "
                    "discard it"
                )
        #: further entries for the manifest
        self.facts: dict[str, str | int | float | None] = {}
        self._output = RecordingStage(
            self.path,
            all_settings,
            len(used.param_groups),
            preconditioned=any(rule.preconditioned for rule in rules),
            paced=any(rule.has_paces for rule in rules),
            processes=self._processes,
            allocate=buffers_for(parameters[0].device),
        )
        updates = OptimizerReader(used, rules, trained)
        watching = Watching(
            self._sync.guarded,
            has_ranks=self._processes.size > 1,
            probes=not self._processes.static_graph,
            allows_mixing=allow_mixed_loss,
        )
        self._collector = Collector(
            self._model,
            trained,
            encoding,
            dim,
            seed,
            dtype,
            used,
            watching,
            preconditioned=any(rule.preconditioned for rule in rules),
        )
        self._targets = TargetCheck(self._sample_labels)
        self._curvature = CurvatureWatch(self._targets, climbs=maximizes(used))
        self._dynamics = DynamicsWatch(seed)
        self._pending = PendingSteps(
            self._collector,
            updates,
            self._curvature,
            self._dynamics,
            self._sync,
            self._output,
        )
        self._tests = TestGradients(
            self._model, parameters, self._collector, updates, self._output, self._processes, seed
        )
        self._loop = Loop(
            self._model,
            used,
            parameters,
            n_samples,
            self._collector,
            self._pending,
            self._sync,
            self.fail,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the recorder, or mark the recording as failed if an exception ends the block.

        If only the test gradients failed, the recording is closed all the same.
        """
        state = self._loop.state
        if error is None and self.n_steps == 0 and not self.is_closed:
            self._release()  # nothing was trained, so there is nothing to write
            self._loop.end(None)
        elif error is None:
            self.close()
        elif isinstance(state, Between) and error is state.slip:
            with suppress(Exception):  # report the first error only
                self.close()
        else:
            self.fail(error)

    def step(self, sample_ids: ArrayLike | Tensor) -> AbstractContextManager[StepNote]:
        """Record one optimiser step over the samples `sample_ids`.

        The block holds one or more backward passes, then optimizer.step(). Several passes over a
        part of the samples each (gradient accumulation) take the ids in order. A step may be
        skipped by a gradient scaler, or the loop may clear its gradients instead of calling
        optimizer.step(). Such a step is counted, not recorded.

        Args:
            sample_ids: integers, shape (batch,), each from 0 to n_samples - 1, in the order in
                which the samples go through the model.

        Yields:
            A note whose `loss` the loop may set. It must do so before optimizer.step(): the first
            step is written there.

        Raises:
            RecordError: no optimizer.step() within the block, or ids that are not those of the
                batch.
            GradientMismatchError: the rows do not sum to the gradient in use.
            NonFiniteError: a gradient is infinite or not a number.
            StoreError: writing failed.
        """
        return self._loop.step(sample_ids)

    def track(self, loader: DataLoader[Any]) -> TrackedLoader:
        """Wrap `loader` to record the loop over its batches. The loop itself stays as it is::

            loader = recorder.track(loader)
            for inputs, targets in loader:
                loss = loss_fn(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        A sample's id is its index in `loader.dataset`. A step lasts from one optimizer.step() to
        the next: all batches in between are accumulated. Batches are not recorded if the loop
        clears their gradients, for example when a gradient scaler skips optimizer.step(). They
        count as one skipped step. The model must meet each batch before the next one is drawn.
        Batches come in the same order, and the same random numbers are drawn, as without `track`.

        With several ranks, all ranks call `track`, each with a loader of its own samples, such as a
        loader with a DistributedSampler. All ranks call optimizer.step() after the same batches.

        Args:
            loader: loader over a map-style dataset of `n_samples` samples, with any sampler, batch
                sampler or workers.

        Returns:
            The loader to iterate, as often as wanted. Its length and attributes are those of
            `loader`.

        Raises:
            UsageError: not a DataLoader.
            RecordError: its batches cannot be told by their samples; or the recorder is closed.
            DataError: its dataset has another number of samples.
        """
        loop = self._loop
        loop.check_open()
        with self._processes.together():
            tracked = TrackedLoader(
                loader, self.n_samples, loop.hand_over, loop.heeding, self._targets, loop.leave
            )
        loop.track()
        return tracked

    def next_batch(self, sample_ids: ArrayLike | Tensor) -> StepNote:
        """Name the samples of the model's next pass.

        This is for code in which no `with` can stand around a step, such as a trainer's callback. A
        step lasts from one optimizer.step() to the next, as with `track`: all batches named in
        between are accumulated.

        Args:
            sample_ids: integers, shape (batch,), each from 0 to n_samples - 1, in the order in
                which the samples go through the model.

        Returns:
            A note. The loop may set its `loss`, the loss of the whole step, before
            optimizer.step().

        Raises:
            RecordError: impossible ids, or the model never met the last batch, or a call inside of
                `step`, or the recorder is closed.
        """
        return self._loop.next_batch(sample_ids)

    def mixed(self, order: ArrayLike | Tensor, weight: float | ArrayLike | Tensor) -> None:
        """Declare that the samples of the present batch were mixed with each other (mixup, cutmix).

        In the model's input, sample number b of the batch has the weight w_b, and sample number
        order[b] has the weight 1 - w_b::

            with recorder.step(ids):
                order, weight = torch.randperm(len(x)), 0.3
                recorder.mixed(order, weight)
                loss = loss_fn(model(weight * x + (1 - weight) * x[order]), y, y[order])

        Each row is shared out by these weights: the step has two rows for each of its places. In a
        tracked loop, call `mixed` after the batch was drawn.

        Args:
            order: permutation of the batch, integers of shape (batch,).
            weight: weight of the sample itself, between 0 and 1: one number, or one for each
                sample, shape (batch,).

        Raises:
            RecordError: no batch is named, or the order or the weights cannot be those of the
                batch.
        """
        self._loop.check_open()
        with self._loop.heeding():
            micro_batch = self._collector.micro_batch
            if micro_batch is None:
                raise RecordError(
                    "recorder.mixed() comes before a batch is named: call it inside of "
                    "recorder.step(), or after the batch was drawn"
                )
            micro_batch.mix(order, weight)

    def end_batch(self) -> None:
        """End the batch that `next_batch` named, whether the model met it or not.

        The model's next passes are not of this batch.
        """
        self._loop.end_batch()

    def paused(self) -> AbstractContextManager[None]:
        """Enter a block whose passes are not recorded, in a step or between steps.

        The optimizer must never use the gradients of these passes. Examples are an attack on the
        inputs, the first pass of sharpness-aware minimisation, the other half of an adversarial
        pair, a teacher, or a saliency map::

            with recorder.paused():
                x = attacked(model, x, y)
            loss_fn(model(x), y).backward()

        A graph belongs to the block in which its forward pass was made. So does its backward pass.
        Gradients that the block adds to `.grad` must be cleared before optimizer.step(), as in a
        loop without a recorder. Otherwise the books do not balance. Batches that a tracked loader
        gives in the block are not named.

        Raises:
            RecordError: optimizer.step() in the block, whose gradients would be missing.
        """
        return self._loop.paused()

    @property
    def is_closed(self) -> bool:
        """Tell whether the recorder records no more: it was closed, or the recording has failed."""
        return self._loop.is_closed

    @property
    def n_steps(self) -> int:
        """Number of steps recorded so far."""
        return self._pending.n_steps

    @property
    def n_skipped(self) -> int:
        """Number of steps that a gradient scaler skipped, or whose gradients the loop cleared."""
        return self._collector.n_dropped + self._sync.n_skipped

    @property
    def n_tests(self) -> int:
        """Number of test samples whose gradients were taken last; 0 before."""
        return self._output.n_tests

    @property
    def test_steps(self) -> list[int]:
        """The steps after which test gradients were taken."""
        return list(self._output.tests)

    def most_bytes(self, n_rows: int, n_steps: int, n_tests: int, n_test_steps: int) -> int:
        """Return the most bytes that further rows and test gradients take on the disk.

        Args:
            n_rows: number of further rows.
            n_steps: number of the steps that have these rows.
            n_tests: number of further test gradients.
            n_test_steps: number of steps after which these test gradients are taken.

        Raises:
            RecordError: no step was recorded yet. The first recorded step shows the size of a row.
        """
        if self._output.writer is None:
            raise RecordError("most_bytes is known after the first recorded step: call it then")
        return self._output.writer.most_bytes(n_rows, n_steps, n_tests, n_test_steps)

    def set_loss(self, loss: Loss, output: Tensor, target: Tensor) -> None:
        """Tell the loss function of this pass, for the curvature weight of its rows.

        The curvature weight (docs/architecture.md) of cross-entropy, of classes or of yes and no,
        is known without this call. The weight of any other loss is unknown unless the loop tells
        the loss, within the step and before optimizer.step(). The loss is called once more, on a
        copy of `output`.

        Args:
            loss: (output, target) -> losses of shape (batch,); the loop may train on their mean or
                sum.
            output: output of the model, shape (batch, ...).
            target: targets, shape (batch, ...).
        """
        # An output without a graph gets no backward pass: waiting for one would only keep its
        # memory.
        if not self.is_closed and output.requires_grad:
            self._curvature.tell(loss, output.detach(), target)

    def flushes_before(self, batch: int) -> bool:
        """Tell whether the buffer is flushed before the next step of `batch` samples.

        This happens every few steps. A `state_dict` taken here does not change the recording. Taken
        at another step it forces a flush. A flush decides which steps are checked together, and so
        how their sums are rounded: the last bits of `imbalance` may change. Two runs then agree bit
        for bit only if both took states at the same steps.
        """
        return self._pending.flushes_before(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the recorder's state for the loop's own checkpoint, for `load_state_dict`.

        Everything recorded so far is then safe on the disk::

            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "recorder": recorder.state_dict()}, ...)

        Test gradients that are taken after the state count as discarded when the state is loaded:
        take them before. With several ranks, all ranks call this, all get the same state, and all
        load it.

        Returns:
            Numbers, strings, lists and dicts, which `torch.load` reads with `weights_only=True`.

        Raises:
            RecordError: in the middle of a step, or of batches that are accumulated; or the
                recorder is closed.
            NonFiniteError, GradientMismatchError: one of the last steps cannot be recorded.
            StoreError: writing failed.
        """
        self._loop.check_open()
        with self._processes.together():
            waiting = 0 if self._loop.is_in_step else self._collector.n_waiting
            if self._loop.is_in_step or waiting:
                raise RecordError(
                    f"state_dict() in the middle of step {self.n_steps}"
                    + (f", of which {waiting} batches wait for optimizer.step()" if waiting else "")
                    + ": call it after optimizer.step(), outside of recorder.step()"
                )
        self._collector.drop_seen()
        with self._failing():
            self._pending.flush()
            # The grouping of steps to check must not depend on the steps before the state.
            self._pending.begin_anew()
            return self._put_down()

    def _put_down(self) -> dict[str, Any]:
        """Put everything on the disk, and return the state. Collective.

        The state is for a later resume, the data also for readers of the unfinished run.
        """
        return self._output.state(self.n_steps, self.n_skipped, self._sync.interval)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was taken.

        Rows recorded since are discarded. The rest of the recording is as if there had been no
        interruption. Call this before the first step, after the model and the optimizer have loaded
        their own states. The recorder must have been made on the same run with the same settings.

        Args:
            state: value of `state_dict`.

        Raises:
            RecordError: `state` is not such a value, or a step was taken already.
            RunError: another run, a run that was recorded again or completely since, or other
                settings, parameters or optimizer.
            StoreError: the run is damaged, or lacks rows that the state counts.
        """
        self._loop.check_open()
        with self._processes.together():
            if (
                self.n_steps
                or self._output.writer is not None
                or any(p.live for p in self._collector.micro_batches)
            ):
                raise RecordError(
                    f"load_state_dict() in step {self.n_steps}: load the state before the first "
                    "step"
                )
            wanted = RecorderState.from_dict(state)
        self._processes.require_same(wanted.to_dict())
        self._output.resume(wanted, self._collector.resume)
        self._sync.resume(wanted.n_steps, wanted.meet_every)
        self._pending.resume(wanted.n_steps)
        self._collector.n_dropped = wanted.n_skipped
        self._loop.resume(wanted.n_steps)

    def record_test(
        self,
        tests: Any,
        loss: Any,
        *,
        labels: Labels | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        """Take the gradient of each test sample's loss at the present parameters, h_j = grad l_j.

        Call this after training, and during training as often as wanted. While the run goes on,
        `hydra-pipe reduce --up-to-step STEP` answers for the steps after which it was called. All
        rows so
        far are safe on the disk afterwards. For later probes, digests of the parameters and buffers
        are kept, and Adam's preconditioner of the last call.

        A failure leaves the recording as it was. Mend the cause and call this again, or call
        close(): then `hydra_pipe.probe` takes test gradients later.

        The model is in eval mode meanwhile. Parameters, buffers, `.grad` and random generators are
        restored afterwards. With several ranks, all ranks call this, with the whole test set. Rank
        0 does the work. The others wait for it without looking at `tests`.

        Args:
            tests: dataset of (input, target) pairs, or of mappings with the targets under "labels"
                or a similar key; or a loader, or any iterable, of batches of these. Test ids count
                from 0 in this order. Inputs are a tensor, or a tuple or mapping of the model's
                arguments. Samples of a dataset may be of unlike shapes.
            loss: (output, target) -> losses of shape (batch,), or their mean or sum.
            labels: one label for each test sample; taken from integer targets if absent.
            keys: one string for each test sample that names no other one, in each call or in none.

        Raises:
            RecordError: before the first step, or nothing to test.
            DataError: not test samples, or not one label or key for each.
            NonFiniteError, GradientMismatchError, LayerError: the reasons known from training.
            UserCodeError: the model or the loss raised.

        Warns:
            RecordWarning: the parameters are not those that the last recorded step left.
        """
        if not self.is_closed and self.n_steps == 0:
            raise RecordError("call record_test after the first recorded step and before close()")
        self._loop.check_open()
        self._loop.come_back(to_train=False)
        with self._failing():
            self._pending.flush()
        self._pending.begin_anew()  # as in `state_dict`: a state taken here must leave no trace
        self._say_whether_weights_changed("the test gradients were taken at these parameters")
        with self._loop.testing():
            self._tests.take(self.n_steps, tests, loss, labels, keys)
            self._put_down()

    def _say_whether_weights_changed(self, which: str) -> None:
        changed = self._loop.weights_changed()
        self.facts["test_weights"] = f"changed after step {self.n_steps - 1}" if changed else None
        if changed:
            warnings.warn(
                f"the parameters were written to since the last recorded step, {self.n_steps - 1} "
                f"(the best epoch, an average, or a change by hand): {which}, and the relevance "
                "of training samples leaves the change out",
                RecordWarning,
                stacklevel=3,
            )

    def label_samples(self, labels: Labels) -> None:
        """Give each training sample a label, for rankings and reports.

        Raises:
            DataError: not one integer or string for each sample.
        """
        self._sample_labels = checked_labels(
            labels, "sample_labels", self.n_samples, "training samples"
        )

    def close(self) -> None:
        """Write the remaining rows, remove the hooks and mark the recording as complete.

        If no test gradients were taken at the end, the data for `hydra_pipe.probe` are kept: it can
        take some later.

        Raises:
            StoreError: writing failed.
            RecordError: nothing was recorded.
        """
        if self.is_closed:
            return
        with self._failing():
            self._loop.check_step_is_whole()
            self._pending.flush()
        if self._output.writer is not None and self.n_steps not in self._output.tests:
            self._say_whether_weights_changed("probes will be taken at these parameters")
        try:
            self._output.complete(self._end, self.n_steps, self.n_skipped, self.facts)
        except BaseException as error:
            if self.is_closed or self._output.writer is None:  # otherwise the caller may try again
                self.fail(error)
            raise
        self._loop.end(None)

    def _end(self) -> None:
        if self._processes.is_first:
            if self._sample_labels is not None:
                self._output.write_labels(names.TRAIN_LABELS, self._sample_labels)
            if self._sample_keys is not None:
                self._output.write_keys(names.TRAIN_KEYS, self._sample_keys)
            if self.n_steps not in self._output.tests:
                self._tests.keep_what_probes_need(self.n_steps)
        self._release()

    def fail(self, error: BaseException) -> None:
        """Mark the recording as failed, and keep the rows so far readable.

        With several ranks, this waits for no other rank.
        """
        if self._loop.is_over:
            return
        was_open = not self.is_closed
        self._loop.end(error)
        if was_open:
            self._pending.save()
            with suppress(Exception):  # report the first error only
                self._release()
        self._output.fail(error)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Enter a block whose errors end the recording."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _release(self) -> None:
        self._loop.begin_end()
        # the buffer for rows is large, and useless to the holder of a closed recorder
        self._pending.begin_anew()
        self._output.close()
