"""The outputs of a model, and the tensor that the loss is taken of.

All knowledge of transformers' and Accelerate's outputs is here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A model of transformers returns a mapping: predictions are under this key, and the loss may be
# beside them.
_PREDICTED = "logits"
# Accelerate returns a copy, in full precision, of the output under autocast.
_COPY = "ToCopyBackward0"


def tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output. A mapping with `logits` gives `logits` alone."""
    predicted = output.get(_PREDICTED) if isinstance(output, Mapping) else None
    if isinstance(predicted, Tensor):
        return [predicted]
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def all_tensors_in(output: Any) -> list[Tensor]:
    """Return all tensors in a model's output, those of `tensors_in` first."""
    parts = dict(output) if isinstance(output, Mapping) else output
    found = [*tensors_in(output), *(x for x in tree_leaves(parts) if isinstance(x, Tensor))]
    return list({id(x): x for x in found}.values())


def predicted_in(output: Any) -> Tensor | None:
    """Return the tensor that the loss is taken of; None if there is not a single one."""
    predicted = output.get(_PREDICTED) if isinstance(output, Mapping) else output
    return predicted if isinstance(predicted, Tensor) else None


def watch_gradient(output: Any, predicted: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call `on_gradient` with the gradient that arrives at `predicted` of `output`.

    In a mapping, `predicted` may be a copy, and the loss may be taken of the original. So the hook
    goes on the node that made the original.
    """
    if predicted is output:
        predicted.register_hook(on_gradient)
        return
    node, place = predicted.grad_fn, predicted.output_nr
    if isinstance(node, torch.autograd.graph.Node) and node.name() == _COPY:
        node, place = node.next_functions[0]
    if node is not None:
        node.register_prehook(
            lambda gradients: (
                on_gradient(gradients[place]) if gradients[place] is not None else None
            )
        )
