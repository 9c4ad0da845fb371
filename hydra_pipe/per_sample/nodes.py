"""Each sample's gradient at the inputs of one node of the autograd graph.

A layer rule (`hydra_pipe.per_sample.registry`) needs a module. A node needs only the graph that
autograd keeps of every pass. So nodes serve parameters of modules of any kind, and parameters that
are used outside of the module that owns them.

`slow_gradients_by_sample` always works: it calls the node once for each sample, with zeros in place
of the other samples' gradients. A rule (`hydra_pipe.per_sample.node_rules`) is fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hydra_pipe.per_sample.node_call import ByInput, NodeCall
from hydra_pipe.per_sample.node_rules import RULES
from hydra_pipe.per_sample.orders import FIRST, WHOLE


def gradients_by_sample(call: NodeCall) -> dict[int, ByInput]:
    """Return each sample's gradient at the wanted inputs of a node, by a rule if there is one.

    Returns:
        Rows of shape (B, numel of the input), or factors of the rows, by number of the input.

    Raises:
        RuntimeError, TypeError: the node cannot be called by itself.
    """
    rule = RULES.get(call.node.name())
    found: dict[int, ByInput] = {}
    if rule is not None:
        # In a batch of one, the first dimension may be taken to hold the sample.
        orders = [
            FIRST if order is WHOLE and g is not None and g.dim() else order
            for order, g in zip(call.orders, call.gradients, strict=True)
        ]
        if not any(order is WHOLE for order in orders):
            found = dict(rule(replace(call, orders=orders)))
    left = {slot: shape for slot, shape in call.shapes.items() if slot not in found}
    return found | (slow_gradients_by_sample(call, left) if left else {})


def slow_gradients_by_sample(
    call: NodeCall, shapes: Mapping[int, tuple[int, ...]]
) -> dict[int, Tensor]:
    """Run the node's own backward once for each sample: the slow twin of every rule.

    See `gradients_by_sample`.
    """
    rows: dict[int, list[Tensor]] = {slot: [] for slot in shapes}
    for sample in range(call.batch):
        alone = [
            None if gradient is None or order is None else order.only(gradient, call.batch, sample)
            for gradient, order in zip(call.gradients, call.orders, strict=True)
        ]
        at_inputs = _called(call.node, alone)
        for slot, shape in shapes.items():
            found = at_inputs[slot]
            # The engine, not the node, sums over broadcast dimensions.
            rows[slot].append(
                _zeros(alone, shape)
                if found is None
                else found.detach().sum_to_size(shape).reshape(-1)
            )
    return {slot: torch.stack(of_samples) for slot, of_samples in rows.items()}


def _zeros(like: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    """Return zeros, flattened, for an input of `shape` that a node has no gradient for."""
    device = next(x.device for x in like if x is not None)
    return torch.zeros(torch.Size(shape).numel(), device=device)


def _called(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the node's results for `gradients`, one entry for each of its `next_functions`."""
    own = getattr(node, "apply", None)
    if own is None:
        found = node(*gradients)
        return found if isinstance(found, tuple) else (found,)
    # A torch.autograd.Function has a result for every argument of its forward, tensor or not.
    found = own(*gradients)
    all_found = found if isinstance(found, tuple) else (found,)
    needed = iter(
        [g for g, is_needed in zip(all_found, node.needs_input_grad, strict=False) if is_needed]
    )
    return [next(needed) if function is not None else None for function, _ in node.next_functions]
