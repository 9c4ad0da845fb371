"""Hooks of an optimiser, called before it uses the gradients and after it has used them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.optimizers import leaves_out_step
from hydra_pipe.recording.several_optimizers import optimizers_in


class UpdateListener(Protocol):
    """Listener to the updates of an optimiser."""

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""

    def before_update(self) -> bool:
        """Hear that optimizer.step() was called; tell whether to report this update."""

    def take_update(self) -> None:
        """Hear that the gradients are final, just before the optimiser uses them."""

    def after_update(self) -> None:
        """Hear that optimizer.step() is over."""

    def fail(self, error: BaseException) -> None:
        """Hear that the update cannot be recorded, just before `error` is raised."""


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _version(gradient: Tensor | None) -> tuple[Tensor, int] | None:
    """Return a gradient and its version counter, which any write changes."""
    return None if gradient is None else (gradient, gradient._version)


class OptimizerHooks:
    """The hooks of an optimiser, or of several that step together, until `remove`.

    Several optimisers take one update together. The first of them to step has the gradients of
    all. The listener hears of the end when the last of them has stepped.

    Args:
        optimizer: the optimiser, not a wrapper of it.
        parameters: the recorded parameters.
        listener: receiver of each update.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], listener: UpdateListener
    ) -> None:
        self._optimizers = optimizers_in(optimizer)
        self._parameters, self._listener = parameters, listener
        # optimisers that have yet to take the present update, and the gradients that they will use
        self._left: dict[Optimizer, list[tuple[Tensor, int] | None]] = {}
        self._handles = [
            handle
            for one in self._optimizers
            for handle in (
                one.register_step_pre_hook(self._before),
                one.register_step_post_hook(self._after),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def check_update_is_whole(self) -> None:
        """Refuse an update that not all optimisers have taken. Raises: RecordError."""
        if self._left:
            names = ", ".join(type(one).__name__ for one in self._left)
            raise RecordError(
                f"{names} did not take step {self._listener.n_steps - 1}, which other optimizers "
                "took: call step() of all of them at each step, or record one optimizer alone"
            )

    def _before(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        own, *given = args  # the first argument is the optimiser
        # A skipped step counts as never called: with any other optimiser the scaler does not call
        # step() at all.
        if not self._listener.before_update() or leaves_out_step(own):
            return None
        closure = given[0] if given else kwargs.get("closure")
        if own in self._left:
            with self._failing():
                self._take_part(own)
            return None
        with self._failing():
            self.check_update_is_whole()
        if closure is None:
            self._listener.take_update()
            self._left = {
                one: [_version(p.grad) for p in _parameters_of(one)]
                for one in self._optimizers
                if one is not own
            }
            return None
        if len(self._optimizers) > 1:
            with self._failing():
                raise RecordError(
                    f"{type(own).__name__}.step() has a closure, which makes new gradients beside "
                    "other optimizers: call backward() before the steps of all of them"
                )
        # The closure makes the gradients within optimizer.step(), and the optimiser uses them at
        # once.
        after = self._telling_after(own, closure)
        return ((own, after, *given[1:]), kwargs) if given else (args, kwargs | {"closure": after})

    def _after(self, *_: Any) -> None:
        if not self._left:
            self._listener.after_update()

    def _take_part(self, own: Optimizer) -> None:
        """Let an optimiser take its part of the present update.

        Raises:
            RecordError: its gradients are not the ones that were recorded.
        """
        recorded = self._left.pop(own)
        now = [_version(p.grad) for p in _parameters_of(own)]
        for parameter, before, after in zip(_parameters_of(own), recorded, now, strict=True):
            same = (
                before is after
                if before is None or after is None
                else before[0] is after[0] and before[1] == after[1]
            )
            if not same:
                raise RecordError(
                    f"a gradient of shape {tuple(parameter.shape)} changed at step "
                    f"{self._listener.n_steps - 1} after another optimizer had stepped: clip, "
                    "scale and unscale before the first step(), and call zero_grad() after the last"
                )

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except RecordError as error:
            self._listener.fail(error)
            raise

    def _telling_after(self, own: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap `closure` of `own` so that its gradients are reported before the update.

        optimizer.step() must call the closure only once.
        """
        n_calls = 0

        def after() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls > 1:
                error = RecordError(
                    f"{type(own).__name__} called the closure of step "
                    f"{self._listener.n_steps} twice, so its update uses several gradients: use "
                    "an optimizer that takes one"
                )
                self._listener.fail(error)
                raise error
            found = closure()
            # If the closure skipped its batch, there are no gradients and no update.
            if any(p.grad is not None for p in self._parameters):
                self._listener.take_update()
            return found

        return after
