"""The recorder: what a training loop calls, one `with` a step."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from hydra_pipe.errors import (
    DataError,
    HydraError,
    NonFiniteError,
    RecordError,
    RunError,
)
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import EncodingChoice, Layout
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.joint import JointSteps, Pending, without_step
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.recording.optimizers import check_optimizer, rule_of
from hydra_pipe.recording.ranks import Ranks, unwrapped
from hydra_pipe.recording.settings import check_options, checked_ids, json_settings, needs_recording, record_settings
from hydra_pipe.recording.slab import Checked, Slab
from hydra_pipe.store import names
from hydra_pipe.store.gradients import GROUP_COLUMNS, GradientsWriter
from hydra_pipe.store.run import RECORD, RunDirectory, Settings
from hydra_pipe.store.table import TableWriter

Labels = Sequence[int] | Sequence[str] | NDArray[Any]

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
    gradient (docs/architecture.md). Training is not changed: the weights are those of training without it, bit for bit.

        recorder = Recorder(model, optimizer, "runs/mine", n_samples=len(train))
        for inputs, targets, sample_ids in loader:
            with recorder.step(sample_ids):
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.record_test(test_loader, loss_fn)
        recorder.close()

    Args:
        model: the module that is trained; its modules are hooked until `close`. Wrapped in DistributedDataParallel where several
            processes train it together: then each gives the ids of its own samples, and all take the same number of steps.
        optimizer: torch.optim.SGD, Adam or AdamW over the model's parameters.
        run: directory of the run.
        n_samples: size of the training set; sample ids are 0 to n_samples - 1.
        encoding: "exact" (lossless), "projected", or "auto" (lossless where it fits `dim`).
        dim: budget in columns for "auto" and "projected".
        dtype: of the stored rows: "float16", "int8" (both with a float32 scale a row and block) or "float32".
        seed: of the random projections.
        settings: further settings that the recording depends on, kept in the manifest.
        sample_labels: one integer or string for each training sample, for rankings and reports.
        overwrite: discard a recording that is there.

    Raises:
        RunError: the directory holds a finished recording, one with other settings, or something else.
        OptimizerError, LayerError: this run cannot be recorded; the message says why.
        UsageError: an unknown encoding or dtype.
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
        dtype: Dtype = "float16",
        seed: int = 0,
        settings: Settings | None = None,
        sample_labels: Labels | None = None,
        overwrite: bool = False,
    ) -> None:
        self._ranks = Ranks.of(model)
        self._joint = JointSteps(self._ranks) if self._ranks is not None else None
        self._model, self._optimizer = unwrapped(model), optimizer
        self._overwrite = overwrite
        self.path = Path(run)
        with self._together():
            check_options(encoding, dim, dtype)
            if n_samples < 1:
                raise DataError(f"n_samples is {n_samples}: there is nothing to train on")
            trained = check_optimizer(optimizer, self._model)
            self._rule = rule_of(optimizer)
            self._parameters = list(trained)
            self._known = set(trained)
            self._n_groups = len(optimizer.param_groups)
            self._dtype = dtype
            self.n_samples = n_samples
            self._sample_labels: Labels | None = None
            if sample_labels is not None:
                self.label_samples(sample_labels)
            self._settings = record_settings(encoding, dim, dtype, seed, n_samples) | json_settings(settings or {})
        if self._ranks is not None:
            self._settings["n_ranks"] = self._ranks.size
            self._ranks.require_same({"run": os.fspath(run), "overwrite": overwrite} | self._settings)
        with self._together():
            if self._is_first and not needs_recording(run, self._settings, overwrite=overwrite):
                raise RunError(f"{run} is recorded already: use another directory, or overwrite=True to discard it")
        self._directory: RunDirectory | None = None
        self._writer: GradientsWriter | None = None
        # rows of the steps that are not written yet, and what else their lines of the step tables hold
        self._slab: Slab | None = None
        self._pending: list[tuple[StepNote, dict[str, Any]]] = []
        self._samples: NDArray[np.int64] | None = None
        self._note = StepNote()
        self.n_steps = self.n_skipped = 0
        self.n_tests: int | None = None
        self._worst_imbalance = 0.0
        self._n_labels: dict[str, int] = {}
        # what else the manifest is to say of this recording
        self.facts: dict[str, str | int | float | None] = {}
        self._closed = self._ended = False
        hold = self._joint.hold if self._joint is not None else None
        self._collector = Collector(self._model, optimizer, self._rule, trained, encoding, dim, seed, hold)
        self._step_hook = optimizer.register_step_pre_hook(self._before_optimizer_step)

    @property
    def _is_first(self) -> bool:
        """Whether this process keeps the manifest and what the ranks have in common: rank 0, or the only one there is."""
        return self._ranks is None or self._ranks.rank == 0

    def _together(self) -> AbstractContextManager[None]:
        """A block that all ranks run; what is raised in it on one is raised on all."""
        return nullcontext() if self._ranks is None else self._ranks.together()

    def _holding(self) -> AbstractContextManager[None]:
        """A block in the middle of a step: with several ranks, what is raised in it waits until they meet."""
        return nullcontext() if self._joint is None else self._joint.holding()

    @contextmanager
    def step(self, sample_ids: ArrayLike | Tensor) -> Iterator[StepNote]:
        """Record one optimiser step over the samples `sample_ids`.

        The block holds one or more backward passes and then optimizer.step(). Several passes over a part of the samples each
        (gradient accumulation) take the ids in order. A step that a gradient scaler leaves out is counted, not recorded.

        Args:
            sample_ids: integers, shape (batch,), each from 0 to n_samples - 1, in the order in which the samples go through the
                model.

        Yields:
            A note whose `loss` the loop may set.

        Raises:
            RecordError: no optimizer.step() within the block, or ids that are not those of the batch.
            BooksError: the rows do not sum to the gradient in use.
            NonFiniteError: a gradient is infinite or not a number.
            StoreError: writing failed.
        """
        if self._closed:
            raise RecordError("this recorder is closed: make a new one for another run")
        try:
            self._note = StepNote()
            with self._holding():
                self._samples = checked_ids(sample_ids, self.n_samples)
                self._collector.watch(len(self._samples))
            steps_before = self.n_steps
            yield self._note
            self._end_step(taken=self.n_steps > steps_before)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._collector.rest()
            self._samples = None

    def check_split(self, losses: Tensor) -> None:
        """Refuse a model that mixes samples, or keeps them elsewhere than in the first dimension, before a row is written.

        One backward pass from the first sample's loss alone: it must reach no row but the first. For the first pass of a
        loop that knows each sample's loss; `record_test` does it too. The graph is kept, `.grad` is not touched. Batch
        normalisation in training mode mixes samples on purpose and is let through. Nothing is done where DistributedDataParallel
        has static_graph=True: it would take this backward pass for its first.

        Args:
            losses: of a pass under `step`, shape (batch,), before its backward pass.

        Raises:
            LayerError: names the parameter.
        """
        if self._ranks is not None and self._ranks.static_graph:
            return
        with self._holding():
            self._collector.check_split(losses)

    def _end_step(self, *, taken: bool) -> None:
        # a gradient scaler leaves out optimizer.step() where a scaled gradient overflows
        overflowed = not taken and self._collector.overflowed()
        if self._joint is not None:
            if self._joint.end_step(taken=taken, overflowed=overflowed):
                self._flush()
        elif overflowed:
            self.n_skipped += 1
        elif not taken:
            raise without_step(self.n_steps)

    def record_test(self, batches: Iterable[Any], loss: Any, *, labels: Labels | None = None) -> None:
        """Take the gradient of each test sample's loss at the present parameters, h_j = grad l_j.

        The model is put into eval mode meanwhile; `.grad` is not touched. With several ranks all call it, with the whole test set:
        rank 0 does the work, and the others wait for it without looking at `batches`.

        Args:
            batches: of (inputs, targets) or (inputs, targets, anything); test ids count from 0 in this order.
            loss: (output, target) -> losses of shape (batch,), or their mean or sum.
            labels: one for each test sample; taken from integer targets if absent.

        Raises:
            RecordError: before the first step, or nothing to test.
            NonFiniteError, BooksError, LayerError: as in training.
        """
        if self._closed or self.n_steps == 0:
            raise RecordError("record_test comes after the first recorded step and before close()")
        was_training = [module for module in self._model.modules() if module.training]
        # what was trained and then frozen has a gradient all the same, and earlier rows to multiply it with
        frozen = [p for p in self._parameters if not p.requires_grad]
        try:
            self._model.eval()
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._flush()
            assert self._writer is not None
            # a loader draws from the global generator, which the training goes on with
            with self._together(), torch.random.fork_rng(_devices(self._parameters)):
                if self._is_first:
                    self._record_test(self._writer, batches, loss, labels)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            for module in was_training:
                module.training = True
            for parameter in frozen:
                parameter.requires_grad_(False)
            self._collector.rest()

    def _record_test(self, writer: GradientsWriter, batches: Iterable[Any], loss: Any, labels: Any) -> None:
        table = writer.test_rows(self.n_steps)
        device = self._parameters[0].device
        targets_seen: list[NDArray[np.int64]] = []
        first_test = 0
        slab: Slab | None = None
        for inputs, targets, *_ in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            self._collector.watch(len(inputs))
            with torch.enable_grad():
                losses = per_sample_losses(loss, self._model(inputs), targets)
                if not torch.isfinite(losses).all():
                    worst = first_test + int(torch.argmin(torch.isfinite(losses).int()))
                    raise NonFiniteError(f"the loss of test sample {worst} is not finite after {self.n_steps} steps")
                if first_test == 0:
                    self._collector.check_split(losses)
                given = torch.autograd.grad(losses.sum(), self._parameters, allow_unused=True)
            self._collector.rest()
            when = f"in the test gradients after {self.n_steps} steps"
            columns = {names.LOSS: losses.detach().float().cpu().numpy()}
            slab = self._collector.add_to(slab, given, columns, when, at_step=False)
            self._write_tests(slab, table, first_test)
            if not (targets.is_floating_point() or targets.is_complex()) and targets.dim() == 1:
                targets_seen.append(targets.cpu().numpy())
            first_test += len(inputs)
        if first_test == 0:
            raise RecordError("there are no test samples: give record_test at least one batch")
        if labels is not None and len(labels) != first_test:
            raise DataError(f"test_labels has {len(labels)} entries for {first_test} test samples")
        writer.flush_test(table)
        if labels is None and sum(map(len, targets_seen)) == first_test:
            labels = np.concatenate(targets_seen)
        if labels is not None:
            writer.write_labels(names.TEST_LABELS, labels)
            self._n_labels[names.TEST_LABELS] = first_test
        self.n_tests = first_test

    def _write_tests(self, slab: Slab, table: TableWriter, first_test: int) -> None:
        checked = slab.check(first_id=first_test)
        if checked.error is not None:
            raise checked.error
        self._worst_imbalance = max(self._worst_imbalance, float(checked.books.imbalance.max()))
        slab.write(checked, table)

    def label_samples(self, labels: Labels) -> None:
        """Give each training sample a label, for rankings and reports. Raises: DataError: not one for each sample."""
        if len(labels) != self.n_samples:
            raise DataError(f"sample_labels has {len(labels)} entries for {self.n_samples} training samples")
        self._sample_labels = labels

    def close(self) -> None:
        """Write what is left, remove the hooks and mark the recording as complete.

        Raises:
            StoreError: writing failed.
            RecordError: nothing was recorded.
        """
        if self._closed:
            return
        try:
            self._flush()
            with self._together():
                if self._writer is None:
                    raise RecordError("nothing was recorded: no step was taken")
                if self._sample_labels is not None and self._is_first:
                    self._writer.write_labels(names.TRAIN_LABELS, self._sample_labels)
                    self._n_labels[names.TRAIN_LABELS] = self.n_samples
                rows = self._writer.rows.n_rows
                self._release()
            part_rows = [rows] if self._ranks is None else self._ranks.gather([rows])[:, 0].astype(int).tolist()
            with self._together():
                if self._directory is not None:
                    self._complete(self._directory, part_rows)
        except BaseException as error:
            self.fail(error)
            raise

    def _complete(self, directory: RunDirectory, part_rows: list[int]) -> None:
        directory.end(
            RECORD,
            "complete",
            n_steps=self.n_steps,
            n_skipped=self.n_skipped,
            n_rows=sum(part_rows),
            n_tests=self.n_tests or 0,
            worst_imbalance=self._worst_imbalance,
            labels=self._n_labels,
            **({"rank_rows": part_rows} if self._ranks is not None else {}),
            **self.facts,
        )
        self._ended = True

    def fail(self, error: BaseException) -> None:
        """Keep what was recorded so far readable and mark the recording as failed. With several ranks, it waits for no other."""
        if self._ended:
            return
        self._ended = True
        if not self._closed:
            with suppress(HydraError):  # the first error is the one to tell; this one most often is the same
                if self._joint is None:
                    self._flush()
            with suppress(HydraError):
                self._release()
        if self._directory is None or self._writer is None:
            return  # it failed before anything was written: what was in the directory is as it was
        found = {"n_steps": self._writer.n_steps_written, "error": str(error) or type(error).__name__}
        if self._ranks is None:
            found["n_rows"] = self._writer.rows.n_written
        with suppress(OSError):  # on a full or read-only disk the manifest stays at "running", which reads as unfinished too
            self._directory.end(RECORD, "failed", **found)

    def _release(self) -> None:
        self._closed = True
        self._collector.detach()
        self._step_hook.remove()
        if self._writer is not None:
            self._writer.close()

    def _before_optimizer_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._joint is not None and self._joint.held is not None:
            return
        with self._holding():
            if self._samples is None:
                raise RecordError(
                    "optimizer.step() outside of recorder.step(): its gradients would be missing; put it inside, or close() the "
                    "recorder first"
                )
            if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):  # args begin with the optimiser
                raise RecordError("optimizer.step(closure) is not handled: run the backward pass before optimizer.step()")
            self._record_rows(self._samples)

    def _record_rows(self, samples: NDArray[np.int64]) -> None:
        gradients = self._present_gradients()
        if self._joint is None and self._slab is not None and not self._slab.fits(len(samples)):
            self._flush()
        columns = {names.SAMPLE: samples, names.STEP: np.full(len(samples), self.n_steps)}
        self._slab = self._collector.add_to(self._slab, gradients, columns, f"at step {self.n_steps}", at_step=True)
        settings = [self._rule.settings(group) for group in self._optimizer.param_groups]
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        groups = [self._collector.group_of(index) for index in range(len(states))]
        updated = [gradient is not None for gradient in gradients]
        started = [u and self._rule.starts_momentum(s, g) for u, s, g in zip(updated, states, groups, strict=True)]
        factors = [self._rule.step_factor(s, g) for s, g in zip(states, groups, strict=True)]
        values: dict[str, Any] = {name: [of_group[name] for of_group in settings] for name in GROUP_COLUMNS}
        values |= {"updated": updated, "momentum_started": started, "step_factor": factors, names.N_ROWS: len(samples)}
        self._pending.append((self._note, values))
        self.n_steps += 1
        if self._joint is None and self._writer is None:
            self._flush()  # a first step is checked at once: what it would refuse has to be refused before anything is written

    def _flush(self) -> None:
        """Check and write the steps that wait; several ranks meet here. Raises: the error of the first that cannot be recorded."""
        waiting = [(note.loss, values) for note, values in self._pending]
        self._pending = []
        with torch.no_grad():
            if self._joint is not None:
                checked, waiting, error = self._joint.meet(self._slab, waiting)
                self.n_skipped = self._joint.n_skipped
            elif self._slab is None or not waiting:
                return
            else:
                checked = self._slab.check(names.SAMPLE)
                error = checked.error
            if self._slab is not None and checked is not None and checked.entries:
                writer = self._writer or self._open_store(self._slab.layout)
                with self._holding():
                    self._write(writer, self._slab, checked, waiting)
        if error is not None:
            raise error

    def _write(self, writer: GradientsWriter, slab: Slab, checked: Checked, waiting: Sequence[Pending]) -> None:
        first_row = writer.rows.n_rows
        slab.write(checked, writer.rows)
        imbalance = checked.books.imbalance.max(axis=1)
        self._worst_imbalance = max(self._worst_imbalance, float(imbalance.max()))
        for (loss, values), scalar, worst in zip(waiting, checked.books.scalar, imbalance, strict=False):
            found = {names.FIRST_ROW: first_row, names.GRADIENT_SCALE: scalar, names.IMBALANCE: worst}
            writer.append_step({**values, **found, names.LOSS: loss})
            first_row += values[names.N_ROWS]

    def _present_gradients(self) -> list[Tensor | None]:
        if len(self._optimizer.param_groups) != self._n_groups:
            raise RecordError(f"the optimizer has got a new parameter group at step {self.n_steps}: record again from there")
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self._known:
                    raise RecordError(
                        f"a parameter of shape {tuple(parameter.shape)} has begun to train at step {self.n_steps}: it was "
                        f"frozen, or not in the optimizer, when recording started; record again from there"
                    )
        gradients = [p.grad for p in self._parameters]
        if all(g is None for g in gradients):
            raise RecordError(f"no parameter has a gradient at step {self.n_steps}: call loss.backward() before optimizer.step()")
        return gradients

    def _open_store(self, layout: Layout) -> GradientsWriter:
        with self._together():
            if self._is_first:
                directory = RunDirectory.open_or_none(self.path)
                if directory is not None and self._overwrite:
                    directory.clear()
                    directory = None
                self._directory = directory = directory or RunDirectory.create(self.path)
                directory.begin(RECORD, self._settings)
                self._writer = self._part_of_store(layout, directory.run_id)
        if self._ranks is not None:
            run_id = self._ranks.gather_text(self._directory.run_id if self._directory is not None else "")[0]
            with self._ranks.together():
                self._writer = self._writer or self._part_of_store(layout, run_id)
        assert self._writer is not None
        return self._writer

    def _part_of_store(self, layout: Layout, run_id: str) -> GradientsWriter:
        return GradientsWriter(
            self.path / names.GRADIENTS,
            layout,
            self._dtype,
            len(self._optimizer.param_groups),
            run_id,
            preconditioned=self._rule.preconditioned,
            rank=self._ranks.rank if self._ranks is not None else 0,
            n_ranks=self._ranks.size if self._ranks is not None else 1,
        )


def _devices(parameters: Sequence[nn.Parameter]) -> list[torch.device]:
    return list({p.device for p in parameters if p.is_cuda})
