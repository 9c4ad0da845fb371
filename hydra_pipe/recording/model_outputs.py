"""What a model returns, and the tensor of it that the loss is taken of: all that is known of transformers and Accelerate."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A model of transformers returns a mapping: what it predicts is here, and beside it may be the loss.
_PREDICTED = "logits"
# Accelerate gives back a copy, in full precision, of what autocast has made.
_COPY = "ToCopyBackward0"


def tensors_in(output: Any) -> list[Tensor]:
    """Tensors of what a model has returned; of a mapping that has `logits` these alone."""
    predicted = output.get(_PREDICTED) if isinstance(output, Mapping) else None
    if isinstance(predicted, Tensor):
        return [predicted]
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def predicted_in(output: Any) -> Tensor | None:
    """The tensor that the loss is taken of, where it is a single one."""
    predicted = output.get(_PREDICTED) if isinstance(output, Mapping) else output
    return predicted if isinstance(predicted, Tensor) else None


def watch_gradient(output: Any, predicted: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call `on_gradient` with the gradient that arrives at `predicted` of `output`.

    Of a mapping the loss may be taken of what `predicted` is a copy of. So the hook goes on the node that has made the original.
    """
    if predicted is output:
        predicted.register_hook(on_gradient)
        return
    node, place = predicted.grad_fn, predicted.output_nr
    if isinstance(node, torch.autograd.graph.Node) and node.name() == _COPY:
        node, place = node.next_functions[0]
    if node is not None:
        node.register_prehook(lambda gradients: on_gradient(gradients[place]) if gradients[place] is not None else None)
