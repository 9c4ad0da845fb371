"""State of a training loop: the batches that it named, its present step, and whether it goes on.

A loop names its steps in one of two ways. It puts each step into a `step` block. Or a tracked
loader, or `next_batch`, names the batches; a step then lasts from one optimizer.step() to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.abandoned_loops import last_uncaught
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.copies import CleanCopies
from hydra_pipe.recording.micro_batches import MicroBatch, Mixture
from hydra_pipe.recording.optimizer_hooks import OptimizerHooks
from hydra_pipe.recording.pending import PendingSteps, StepNote
from hydra_pipe.recording.settings import checked_ids
from hydra_pipe.recording.step_sync import StepSync
from hydra_pipe.recording.weights import WeightsNote


@dataclass(slots=True)
class Between:
    """State outside of `step`. A batch named here belongs to the step of the next optimizer.step().

    Args:
        note: note of this step.
        named: last batch that `next_batch` named; None if there is none, or after `end_batch`.
        slip: error raised while test gradients were taken, since the last named batch; None if
            there was none.
    """

    note: StepNote = field(default_factory=StepNote)
    named: MicroBatch | None = None
    slip: BaseException | None = None


@dataclass(slots=True)
class InStep:
    """State inside of a `step` block.

    Args:
        note: note of this step.
        n_ended: number of steps that had ended when the block began, or when an earlier
            optimizer.step() of the block was over.
    """

    note: StepNote
    n_ended: int


@dataclass(slots=True)
class Testing:
    """State while test gradients are taken.

    Args:
        within: state of the loop before and after.
    """

    within: Between | InStep


@dataclass(frozen=True, slots=True)
class Left:
    """State after an exception has ended the loop: the hooks are off until the next named batch."""


@dataclass(frozen=True, slots=True)
class Closing:
    """State while the end of the recording is written. The hooks are off for good."""


@dataclass(frozen=True, slots=True)
class Closed:
    """State after the end of the recording.

    Args:
        failure: error that ended the recording; None if the recording is complete, or if nothing
            was recorded.
    """

    failure: BaseException | None


class Loop:
    """Follower of the loop that trains `model`.

    Args:
        model: the trained module.
        optimizer: optimiser of the model's parameters.
        parameters: the recorded parameters.
        n_samples: size of the training set.
        collector: collector, which hooks the model.
        pending: receiver of the steps.
        sync: agreement with other processes on the steps.
        on_failure: function that gets each error that ends the recording, before the error is
            raised.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        n_samples: int,
        collector: Collector,
        pending: PendingSteps,
        sync: StepSync,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._model, self._optimizer, self._parameters, self._n_samples = (
            model,
            optimizer,
            parameters,
            n_samples,
        )
        self._collector, self._pending, self._sync = collector, pending, sync
        self.fail = on_failure
        self.state: Between | InStep | Testing | Left | Closing | Closed = Between()
        # number of `paused` blocks that the loop is inside of, in any state
        self._n_paused = 0
        # number of steps of the recording that this loop resumes, until it takes a step itself;
        # None if it resumes none
        self._resumed_at: int | None = None
        # whether a loader or `next_batch` has named batches, for messages
        self._names_batches = False
        # last exception at a prompt, when the last batch was named
        self._uncaught = last_uncaught()
        self._weights = WeightsNote(model, parameters)
        self._hook()

    def _hook(self) -> None:
        """Hook the optimiser. The collector hooks the model."""
        self._copies = CleanCopies(self._model)
        self._updates = OptimizerHooks(self._optimizer, self._parameters, self)

    def _unhook(self) -> None:
        self._collector.forget()
        self._collector.detach()
        self._copies.remove()
        self._updates.remove()

    @property
    def n_steps(self) -> int:
        """Number of steps taken so far."""
        return self._pending.n_steps

    @property
    def is_closed(self) -> bool:
        """Tell whether nothing is recorded any more."""
        return isinstance(self.state, Closing | Closed)

    @property
    def is_over(self) -> bool:
        """Tell whether the end of the recording is written, or its failure told."""
        return isinstance(self.state, Closed)

    @property
    def is_in_step(self) -> bool:
        """Tell whether the loop is inside of a `step` block."""
        return isinstance(self._ground, InStep)

    @property
    def _ground(self) -> Between | InStep | None:
        """State of the loop, or its state before test gradients; None after the loop was left."""
        state = self.state.within if isinstance(self.state, Testing) else self.state
        return state if isinstance(state, Between | InStep) else None

    @property
    def _note(self) -> StepNote:
        return StepNote() if self._ground is None else self._ground.note

    def check_open(self) -> None:
        """Refuse a closed recorder.

        Raises:
            RecordError: the recorder is closed.
        """
        if self.is_closed:
            failure = self.state.failure if isinstance(self.state, Closed) else None
            # an interrupt has no words of its own
            reason = str(failure) or type(failure).__name__
            why = "" if failure is None else f", because its recording has failed ({reason})"
            raise RecordError(f"this recorder is closed{why}: make a new one for another run")

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Report the errors of a block outside of `step`, which would report its own.

        With several ranks the errors are held until the ranks meet.
        """
        try:
            with self._sync.holding():
                yield
        except Exception as error:
            self.fail(error)
            raise

    @contextmanager
    def step(self, sample_ids: ArrayLike | Tensor) -> Iterator[StepNote]:
        """See `Recorder.step`."""
        self.check_open()
        if self._n_paused:
            raise RecordError(
                "recorder.step() is inside of recorder.paused(), and its passes would be "
                "missing: pause within the step instead"
            )
        self.come_back(to_train=True)
        self._uncaught = last_uncaught()
        state = self.state = InStep(StepNote(), self.n_steps)
        try:
            with self._sync.holding():
                if any(micro_batch.tracked for micro_batch in self._collector.micro_batches):
                    raise RecordError(
                        f"recorder.step() is in step {self.n_steps}, which a batch of the tracked "
                        "loader has begun: leave out recorder.step(), or iterate the loader that "
                        "was given to track()"
                    )
                self._collector.watch(checked_ids(sample_ids, self._n_samples))
            yield state.note
            self.check_step_is_whole()
            self._end_step(taken=self.n_steps > state.n_ended)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            if self.state is state:
                self.state = Between()
            self._collector.forget()

    def _end_step(self, *, taken: bool) -> None:
        left_out = not taken and self._collector.left_out(begun=self.n_steps > 0)
        if self._sync.end_step(self.n_steps, taken=taken, left_out=left_out):
            self._pending.flush()

    def track(self) -> None:
        """Note that a loader will name the batches."""
        self._names_batches = True

    def next_batch(self, sample_ids: ArrayLike | Tensor) -> StepNote:
        """See `Recorder.next_batch`."""
        self.check_open()
        with self.heeding():
            ids = checked_ids(sample_ids, self._n_samples)
            before = self._ground
            named = self.hand_over(ids, before.named if isinstance(before, Between) else None)
            if isinstance(self._ground, Between):
                self._ground.named = named
        self._names_batches = True
        return self._note

    def end_batch(self) -> None:
        """See `Recorder.end_batch`."""
        if isinstance(self._ground, Between):
            self._ground.named = None
            self._collector.pause()

    def hand_over(self, samples: NDArray[np.int64], before: MicroBatch | None) -> MicroBatch | None:
        """Take a batch that a tracked loader or `next_batch` names.

        Args:
            samples: ids of the samples, shape (batch,), int64.
            before: previous named batch; None if this batch is the first of its epoch.

        Returns:
            The batch; None if its passes are not recorded.

        Raises:
            RecordError: the loop is inside of `step`, the model has not met `before`, or weights
                were changed after the loop was left.
        """
        if (
            self.is_closed
            or isinstance(self.state, Testing)
            or self._n_paused
            or self._sync.held is not None
        ):
            return None
        self.come_back(to_train=True)
        self._uncaught = last_uncaught()
        if not isinstance(self.state, Between):
            raise RecordError(
                "a loader or next_batch() names a batch inside of recorder.step(): use one of "
                "them, not both"
            )
        self.state.slip = None
        # a loop that resumes within an epoch draws the batches that it has done, and skips them
        if before is not None and not before.met and self._resumed_at != self.n_steps:
            raise RecordError(
                f"at step {self.n_steps} the next batch came before the model had met the last "
                "one: if the loop draws ahead, or leaves batches out, name its samples with "
                "recorder.step(ids)"
            )
        return self._collector.watch(samples, tracked=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See `Recorder.paused`."""
        self._n_paused += 1
        try:
            with self._collector.paused():
                yield
        finally:
            self._n_paused -= 1

    @contextmanager
    def testing(self) -> Iterator[None]:
        """Mark a block that takes test gradients, in any state of the loop.

        An error of the block is kept as `slip`, if the loop is outside of `step`.
        """
        ground = self._ground
        assert ground is not None
        slip: BaseException | None = None
        state = self.state = Testing(ground)
        try:
            yield
        except BaseException as error:
            slip = error
            raise
        finally:
            if isinstance(ground, Between):
                ground.slip = slip
            if self.state is state:
                self.state = ground

    def leave(self) -> None:
        """Unhook the model, as an exception has ended the loop, until a batch is named again."""
        if isinstance(self.state, Between):
            self.state = Left()
            self._unhook()

    def come_back(self, *, to_train: bool) -> None:
        """Hook the model again, if the loop was left.

        Args:
            to_train: True if the loop is about to train on.

        Raises:
            RecordError: steps are missing between the exception and the training to come.
        """
        if not isinstance(self.state, Left):
            return
        if to_train and self.weights_changed():
            raise RecordError(
                f"an exception ended the loop at step {self.n_steps}, and the model was trained "
                "or changed since, without the recorder: close() the recorder, or make a new one"
            )
        self.state = Between()
        self._collector.attach()
        self._hook()

    def resume(self, n_steps: int) -> None:
        """Resume a recording of `n_steps` steps."""
        self._resumed_at = n_steps

    def weights_changed(self) -> bool:
        """Tell whether parameters were changed since the optimiser's last step.

        Returns:
            False before the first step.
        """
        return self._weights.changed()

    def check_step_is_whole(self) -> None:
        """Refuse a step that not all of several optimisers took. Raises: RecordError."""
        self._updates.check_update_is_whole()

    def begin_end(self) -> None:
        """Remove the hooks, after which nothing is recorded."""
        if not self.is_closed:
            self.state = Closing()
        self._unhook()

    def end(self, failure: BaseException | None) -> None:
        """End the recording.

        Args:
            failure: error that ended the recording; None if it has not failed.
        """
        self.state = Closed(failure)

    def before_update(self) -> bool:
        """Tell whether the update that optimizer.step() is about to make belongs to the loop.

        Raises:
            RecordError: the loop is inside of `paused`.
        """
        if self._n_paused:
            error = RecordError(
                f"optimizer.step() at step {self.n_steps} is inside of recorder.paused(), and its "
                "gradients would be missing: leave the block first, or close() the recorder"
            )
            self.fail(error)
            raise error
        if last_uncaught() is not self._uncaught and not self.is_in_step:
            self.leave()  # an error has ended the notebook cell that named the last batch
            return False
        return True

    def take_update(self) -> None:
        """Take the step. The gradients are as the optimiser is about to use them.

        Raises:
            RecordError: no batch was named for the step, or its passes did not cover the batch.
            GradientMismatchError: the rows do not sum to the gradient in use.
            NonFiniteError: a gradient is infinite or not a number.
            LayerError: a factored block no longer has one position a sample, or two passes over the
                same places may be of different samples.
            StoreError: writing failed.
        """
        try:
            state = self.state
            if isinstance(state, InStep) and self.n_steps > state.n_ended:
                self._end_step(taken=True)  # an earlier optimizer.step() of the same `step` block
                state.n_ended = self.n_steps
            if self._sync.held is None:
                with self._sync.holding():
                    self._take_step()
            if not isinstance(state, InStep):
                self._collector.forget()  # also if an error is held and no step was taken
                self._end_step(taken=True)  # inside of `step` the end of the block does this
        except BaseException as error:
            self.fail(error)
            raise

    def after_update(self) -> None:
        """Note the weights that the optimiser has left."""
        self._weights.take()

    def _take_step(self) -> None:
        micro_batches = self._collector.micro_batches
        if not micro_batches:
            raise RecordError(
                f"optimizer.step() at step {self.n_steps} has no batch from a loader or "
                "next_batch(): draw, or name, a batch for each step, or close() the recorder "
                "first"
                if self._names_batches
                else "optimizer.step() is outside of recorder.step(), and its gradients would be "
                "missing: put it inside, or close() the recorder first"
            )
        samples = np.concatenate([micro_batch.samples for micro_batch in micro_batches])
        self._pending.add(samples, Mixture.of(micro_batches), self._note)
        if isinstance(self.state, InStep):
            self._collector.forget()
            self._collector.watch(samples)
        elif isinstance(self.state, Between):
            self.state.note = StepNote()
