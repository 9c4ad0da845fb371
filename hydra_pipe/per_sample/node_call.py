"""A node of the autograd graph that is about to run backward, as node rules see it.

Symbols: B samples in the pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hydra_pipe.per_sample.factors import Contribution
from hydra_pipe.per_sample.orders import SampleOrder

#: Each sample's gradient at an input of shape S: rows of shape (B, numel), or factors of them.
ByInput = Contribution


@dataclass(frozen=True, slots=True)
class NodeCall:
    """A node that is about to run backward.

    Args:
        node: of the autograd graph; its saved tensors are still there.
        gradients: at each output of the node, None where there is none.
        orders: where the gradients keep their samples, None where there is no gradient.
        batch: B.
        shapes: of the inputs whose gradients are wanted, by the input's number.
    """

    node: Any
    gradients: Sequence[Tensor | None]
    orders: Sequence[SampleOrder | None]
    batch: int
    shapes: Mapping[int, tuple[int, ...]]

    @property
    def gradient(self) -> Tensor:
        """Of a node with one output."""
        (gradient,) = self.gradients
        assert gradient is not None
        return gradient

    @property
    def order(self) -> SampleOrder:
        """Of a node with one output."""
        (order,) = self.orders
        assert order is not None
        return order


# Returns the inputs that the rule knows; the others are left to the slow twin.
NodeRule = Callable[[NodeCall], Mapping[int, ByInput]]
