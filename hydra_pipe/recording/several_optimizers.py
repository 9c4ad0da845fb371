"""Several optimisers that train one model together, such as Muon with AdamW beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hydra_pipe.errors import OptimizerError


class SeveralOptimizers(Optimizer):
    """Several optimisers, each of parameters of its own, that step together as one::

        optimizer = SeveralOptimizers(
            [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-4)]
        )

    Its parameter groups and its state are those of the optimisers, one optimiser after the other.
    A scheduler of it schedules all of them.

    Args:
        optimizers: the optimisers.

    Raises:
        OptimizerError: there is none, or two of them hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        if not self.optimizers:
            raise OptimizerError("there are no optimizers: give the optimizers of the model")
        seen: dict[nn.Parameter, int] = {}
        for number, one in enumerate(self.optimizers):
            for parameter in (p for group in one.param_groups for p in group["params"]):
                if parameter in seen:
                    raise OptimizerError(
                        f"optimizers {seen[parameter]} and {number} both hold a parameter of shape "
                        f"{tuple(parameter.shape)}: give each parameter to one of them"
                    )
                seen[parameter] = number
        # in place of Optimizer.__init__, which would make groups of its own
        self.__setstate__({"defaults": {}})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of all optimisers, in order."""
        return [group for one in self.optimizers for group in one.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """State of each parameter that has one."""
        return {key: value for one in self.optimizers for key, value in one.state.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of each optimiser. `closure` is called once, before all of them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.optimizers:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimisers."""
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` has returned.

        Raises:
            OptimizerError: it is of another number of optimisers.
        """
        states = state_dict["optimizers"]
        if len(states) != len(self.optimizers):
            raise OptimizerError(
                f"the state is of {len(states)} optimizers, and there are {len(self.optimizers)}: "
                "build the optimizers as they were"
            )
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimisers that update parameters: `optimizer` itself, or the several in it."""
    return optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else [optimizer]


def owners_of_groups(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimiser that updates each parameter group."""
    return [one for one in optimizers_in(optimizer) for _ in one.param_groups]
