"""A node of the autograd graph that is about to run backward: the input of node rules.

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
        node: node of the autograd graph. Its saved tensors are still there.
        gradients: gradient at each output of the node. None: no gradient.
        orders: place of the samples in each gradient. None: no gradient.
        batch: B.
        shapes: shapes of the inputs whose gradients are wanted, by number of the input.
    """

    node: Any
    gradients: Sequence[Tensor | None]
    orders: Sequence[SampleOrder | None]
    batch: int
    shapes: Mapping[int, tuple[int, ...]]

    @property
    def gradient(self) -> Tensor:
        """Gradient at the output of a node with one output."""
        (gradient,) = self.gradients
        assert gradient is not None
        return gradient

    @property
    def order(self) -> SampleOrder:
        """Place of the samples in the gradient of a node with one output."""
        (order,) = self.orders
        assert order is not None
        return order


# A rule returns the inputs that it knows. The other inputs are left to the slow twin.
NodeRule = Callable[[NodeCall], Mapping[int, ByInput]]
