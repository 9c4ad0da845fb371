"""Hooks of an optimiser: they tell when it is about to use the gradients, and when it has used them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.optimizers import leaves_out_step


class UpdateListener(Protocol):
    """Who is told of the updates of an optimiser."""

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""

    def before_update(self) -> bool:
        """Hear that optimizer.step() was called; tell whether the update is one to hear of."""

    def take_update(self) -> None:
        """Hear that the gradients are as the optimiser is about to use them."""

    def after_update(self) -> None:
        """Hear that optimizer.step() is over."""

    def fail(self, error: BaseException) -> None:
        """Hear that the update cannot be recorded: `error` is about to be raised."""


class OptimizerHooks:
    """The hooks of one optimiser, from their making until `remove`.

    Args:
        optimizer: the optimiser, not a wrapper of it.
        parameters: the recorded parameters.
        listener: told of each update.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], listener: UpdateListener) -> None:
        self._optimizer, self._parameters, self._listener = optimizer, parameters, listener
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take no further notice of the optimiser."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # a step that is left out is as if it had not been called, which is what a scaler does with any other optimiser
        if not self._listener.before_update() or leaves_out_step(self._optimizer):
            return None
        own, *given = args  # args begin with the optimiser
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._listener.take_update()
            return None
        # The closure makes the gradients, within optimizer.step(), which uses them at once.
        after = self._telling_after(closure)
        return ((own, after, *given[1:]), kwargs) if given else (args, kwargs | {"closure": after})

    def _after(self, *_: Any) -> None:
        self._listener.after_update()

    def _telling_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """`closure`, which optimizer.step() calls once, and what comes between it and the update."""
        n_calls = 0

        def after() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls > 1:
                error = RecordError(
                    f"{type(self._optimizer).__name__} called the closure of step {self._listener.n_steps} twice, and "
                    f"its update is of several gradients: use an optimizer that takes one"
                )
                self._listener.fail(error)
                raise error
            found = closure()
            # a closure that has left its batch out leaves the optimiser nothing to do
            if any(p.grad is not None for p in self._parameters):
                self._listener.take_update()
            return found

        return after
