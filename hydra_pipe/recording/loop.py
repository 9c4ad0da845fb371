"""Where a training loop is: which batches it has named, when a step of it begins and ends, and whether it goes on at all.

The loop tells in one of two ways. It puts each step into `step`; or a tracked loader, or `next_batch`, names its
batches, and a step is what happens from one optimizer.step() to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.copies import CleanCopies
from hydra_pipe.recording.joint import StepSync
from hydra_pipe.recording.leaving import last_uncaught
from hydra_pipe.recording.optimizer_hooks import OptimizerHooks
from hydra_pipe.recording.pending import PendingSteps, StepNote
from hydra_pipe.recording.portions import Mixture, Portion
from hydra_pipe.recording.settings import checked_ids
from hydra_pipe.recording.weights import WeightsNote


@dataclass(slots=True)
class Between:
    """Outside of `step`. Batches that are named here are of the step that ends with the next optimizer.step().

    Args:
        note: of this step.
        named: the batch that `next_batch` named last; None: none, or `end_batch` was called since.
        slip: what taking test gradients has raised since a batch was named; None: nothing.
    """

    note: StepNote = field(default_factory=StepNote)
    named: Portion | None = None
    slip: BaseException | None = None


@dataclass(slots=True)
class InStep:
    """Inside of a `step` block.

    Args:
        note: of this step.
        n_ended: steps that had ended when it began, or when an earlier optimizer.step() of the block was over.
    """

    note: StepNote
    n_ended: int


@dataclass(slots=True)
class Testing:
    """While test gradients are taken.

    Args:
        within: where the loop is meanwhile.
    """

    within: Between | InStep


@dataclass(frozen=True, slots=True)
class Left:
    """An exception has ended the loop: the hooks are off until a batch is named again."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The hooks are off for good; the end of the recording is being written."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The recording is over.

    Args:
        failure: why it has failed; None: it is complete, or nothing was recorded.
    """

    failure: BaseException | None


class Loop:
    """Follows the loop that trains `model`.

    Args:
        model: the module that is trained.
        optimizer: the optimiser of its parameters.
        parameters: the recorded ones.
        n_samples: size of the training set.
        collector: hooks the model.
        pending: takes the steps.
        sync: agrees with other processes on them.
        on_failure: told of each error that ends the recording, before the error is raised.
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
        self._model, self._optimizer, self._parameters, self._n_samples = model, optimizer, parameters, n_samples
        self._collector, self._pending, self._sync = collector, pending, sync
        self.fail = on_failure
        self.state: Between | InStep | Testing | Left | Closing | Closed = Between()
        # blocks of `paused` that the loop is in, wherever it is
        self._n_paused = 0
        # steps of the recording that this loop goes on with, as long as it has not taken one itself; else None
        self._resumed_at: int | None = None
        # whether a loader or `next_batch` has named batches, for messages
        self._names_batches = False
        # what came to a prompt last, when the last batch was named
        self._uncaught = last_uncaught()
        self._weights = WeightsNote(model, parameters)
        self._hook()

    def _hook(self) -> None:
        """Take notice of the optimizer; the collector does of the model."""
        self._copies = CleanCopies(self._model)
        self._updates = OptimizerHooks(self._optimizer, self._parameters, self)

    def _unhook(self) -> None:
        self._collector.forget()
        self._collector.detach()
        self._copies.remove()
        self._updates.remove()

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""
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
        """Where the loop is, or was when test gradients began; None: nowhere."""
        state = self.state.within if isinstance(self.state, Testing) else self.state
        return state if isinstance(state, Between | InStep) else None

    @property
    def _note(self) -> StepNote:
        return StepNote() if self._ground is None else self._ground.note

    def check_open(self) -> None:
        """Raises: RecordError: the recorder is closed."""
        if self.is_closed:
            failure = self.state.failure if isinstance(self.state, Closed) else None
            why = "" if failure is None else f", for its recording has failed ({failure})"
            raise RecordError(f"this recorder is closed{why}: make a new one for another run")

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """A block that is in no `step` which would hear of its errors; with several ranks they wait until these meet."""
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
                "recorder.step() inside of recorder.paused(): its passes would be missing; let the pause be within the step"
            )
        self.come_back(to_train=True)
        self._uncaught = last_uncaught()
        state = self.state = InStep(StepNote(), self.n_steps)
        try:
            with self._sync.holding():
                if any(portion.tracked for portion in self._collector.portions):
                    raise RecordError(
                        f"recorder.step() in step {self.n_steps}, which has begun with a batch of the tracked loader: leave out "
                        f"recorder.step(), or iterate the loader itself"
                    )
                self._collector.watch(checked_ids(sample_ids, self._n_samples))
            yield state.note
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
        """A loader is going to name the batches."""
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
            self._collector.rest()

    def hand_over(self, samples: NDArray[np.int64], before: Portion | None) -> Portion | None:
        """A batch comes that a tracked loader or `next_batch` names.

        Args:
            samples: ids, shape (batch,).
            before: the batch that was named before it; None: it is the first of its epoch.

        Returns:
            The batch; None where its passes are not to be recorded.

        Raises:
            RecordError: inside of `step`, the model has not met `before`, or weights were changed since the loop was left.
        """
        if self.is_closed or isinstance(self.state, Testing) or self._n_paused or self._sync.held is not None:
            return None
        self.come_back(to_train=True)
        self._uncaught = last_uncaught()
        if not isinstance(self.state, Between):
            raise RecordError("a batch named by a loader or by next_batch() inside of recorder.step(): use one of them, not both")
        self.state.slip = None
        # a loop that goes on in mid-epoch draws what it has done already, and leaves it
        if before is not None and not before.met and self._resumed_at != self.n_steps:
            raise RecordError(
                f"at step {self.n_steps} a next batch came before the model had met the last one: a loop that draws ahead, or "
                f"leaves batches out, has to name its samples with recorder.step(ids)"
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
        """A block that takes test gradients, wherever the loop is. What it raises is kept as the loop's slip."""
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
        """An exception has ended the loop: take no notice of what is trained from now on, until a batch is named again."""
        if isinstance(self.state, Between):
            self.state = Left()
            self._unhook()

    def come_back(self, *, to_train: bool) -> None:
        """The loop goes on after `leave`, if it was left. Raises: RecordError: it would train on after steps that are missing."""
        if not isinstance(self.state, Left):
            return
        if to_train and self.weights_changed():
            raise RecordError(
                f"an exception has ended the loop at step {self.n_steps}, and the model was trained on, or changed, without the "
                f"recorder: close() it, or make a new one"
            )
        self.state = Between()
        self._collector.attach()
        self._hook()

    def go_on(self, n_steps: int) -> None:
        """Go on with a recording of `n_steps` steps."""
        self._resumed_at = n_steps

    def weights_changed(self) -> bool:
        """Tell whether parameters were written to since the last step that the optimiser took; False before the first."""
        return self._weights.changed()

    def begin_end(self) -> None:
        """Remove the hooks: nothing is recorded any more."""
        if not self.is_closed:
            self.state = Closing()
        self._unhook()

    def end(self, failure: BaseException | None) -> None:
        """The recording is over; `failure` is why it has failed."""
        self.state = Closed(failure)

    def before_update(self) -> bool:
        """Tell whether the update that optimizer.step() is about to make is of the loop. Raises: RecordError: in a pause."""
        if self._n_paused:
            error = RecordError(
                f"optimizer.step() at step {self.n_steps} inside of recorder.paused(): its gradients would be missing; leave the "
                f"block first, or close() the recorder"
            )
            self.fail(error)
            raise error
        if last_uncaught() is not self._uncaught and not self.is_in_step:
            self.leave()  # an error has ended the cell in which the last batch was named
            return False
        return True

    def take_update(self) -> None:
        """Take the step whose gradients are as the optimiser is about to use them. Raises: as `Recorder.step`."""
        try:
            state = self.state
            if isinstance(state, InStep) and self.n_steps > state.n_ended:
                self._end_step(taken=True)  # an earlier one of the same `step`
                state.n_ended = self.n_steps
            if self._sync.held is None:
                with self._sync.holding():
                    self._take_step()
            if not isinstance(state, InStep):
                self._collector.forget()  # also where an error is held and nothing was taken
                self._end_step(taken=True)  # where the loop names its samples, leaving `step` does it
        except BaseException as error:
            self.fail(error)
            raise

    def after_update(self) -> None:
        """Note the weights that the optimiser has left."""
        self._weights.take()

    def _take_step(self) -> None:
        portions = self._collector.portions
        if not portions:
            raise RecordError(
                f"optimizer.step() at step {self.n_steps} after no batch that a loader or next_batch() named: draw, or name, "
                f"a batch for each step, or close() the recorder first"
                if self._names_batches
                else "optimizer.step() outside of recorder.step(): its gradients would be missing; put it inside, or close() the "
                "recorder first"
            )
        samples = np.concatenate([portion.samples for portion in portions])
        self._pending.add(samples, Mixture.of(portions), self._note)
        if isinstance(self.state, InStep):
            self._collector.forget()
            self._collector.watch(samples)
        elif isinstance(self.state, Between):
            self.state.note = StepNote()
