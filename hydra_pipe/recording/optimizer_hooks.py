"""Hooks of an optimiser, called before it uses the gradients and after it has used them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from hydra_pipe.errors import RecordError
from hydra_pipe.recording.optimizers import leaves_out_step


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


class OptimizerHooks:
    """The hooks of one optimiser, from construction until `remove`.

    Args:
        optimizer: the optimiser, not a wrapper of it.
        parameters: the recorded parameters.
        listener: receiver of each update.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], listener: UpdateListener
    ) -> None:
        self._optimizer, self._parameters, self._listener = optimizer, parameters, listener
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A skipped step counts as never called: with any other optimiser the scaler does not call
        # step() at all.
        if not self._listener.before_update() or leaves_out_step(self._optimizer):
            return None
        own, *given = args  # the first argument is the optimiser
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._listener.take_update()
            return None
        # The closure makes the gradients within optimizer.step(), and the optimiser uses them at
        # once.
        after = self._telling_after(closure)
        return ((own, after, *given[1:]), kwargs) if given else (args, kwargs | {"closure": after})

    def _after(self, *_: Any) -> None:
        self._listener.after_update()

    def _telling_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap `closure` so that its gradients are reported before the update.

        optimizer.step() must call the closure only once.
        """
        n_calls = 0

        def after() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls > 1:
                error = RecordError(
                    f"{type(self._optimizer).__name__} called the closure of step "
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
