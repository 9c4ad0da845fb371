"""Node rules: from the gradient at a node's output to each sample's gradient at one of its inputs.

Symbols: B samples in the pass, P positions of a sample, O output and I input features, T time
steps, H hidden features.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hydra_pipe.per_sample.embedding import token_rows
from hydra_pipe.per_sample.factors import Factors, Summed
from hydra_pipe.per_sample.lstm import LstmLayer, lstm_gate_gradients
from hydra_pipe.per_sample.node_call import ByInput, NodeCall, NodeRule
from hydra_pipe.per_sample.orders import SampleOrder


def summed_by_sample(
    values: Tensor, order: SampleOrder, batch: int, shape: tuple[int, ...]
) -> Summed | None:
    """Return each sample's part of `values`, summed to `shape`.

    The sum is autograd's sum over broadcast dimensions. None if `shape` holds samples itself.

    Args:
        values: a gradient times the factor of the input, in the shape of the node's output.
        order: place of the samples in `values`.
        batch: B.
        shape: shape of the input that was broadcast.

    Returns:
        Rows of shape (B, numel of `shape`).
    """
    aligned = (1,) * (values.dim() - len(shape)) + shape
    if len(aligned) != values.dim() or aligned[order.dim] != 1:
        return None
    others = aligned[: order.dim] + aligned[order.dim + 1 :]
    by_sample = order.split(values, batch)
    spread = [1, *(2 + dim for dim, size in enumerate(others) if size == 1)]
    rows = by_sample.sum(spread).reshape(batch, -1)
    terms = by_sample.numel() / max(rows.numel(), 1)
    return Summed(rows, torch.linalg.vector_norm(by_sample.flatten(1), dim=1) * terms**0.5)


def _broadcast(
    call: NodeCall, factors: Mapping[int, Callable[[], Tensor | None]]
) -> dict[int, ByInput]:
    """Apply the rule of elementwise nodes.

    The rows are the gradient times the factor of each input, summed to the input's shape.
    """
    found: dict[int, ByInput] = {}
    for slot, shape in call.shapes.items():
        if slot in factors:
            values = factors[slot]()
            summed = (
                None if values is None else summed_by_sample(values, call.order, call.batch, shape)
            )
            if summed is not None:
                found[slot] = summed
    return found


def _add_rule(call: NodeCall) -> dict[int, ByInput]:
    return _broadcast(
        call, {0: lambda: call.gradient, 1: lambda: call.gradient * call.node._saved_alpha}
    )


def _sub_rule(call: NodeCall) -> dict[int, ByInput]:
    return _broadcast(
        call, {0: lambda: call.gradient, 1: lambda: call.gradient * -call.node._saved_alpha}
    )


def _mul_rule(call: NodeCall) -> dict[int, ByInput]:
    return _broadcast(
        call, {0: lambda: _times(call, "_saved_other"), 1: lambda: _times(call, "_saved_self")}
    )


def _times(call: NodeCall, name: str) -> Tensor | None:
    other = getattr(call.node, name)
    return None if other is None else call.gradient * other.detach()


def _div_rule(call: NodeCall) -> dict[int, ByInput]:
    def numerator() -> Tensor | None:
        other = call.node._saved_other
        return None if other is None else call.gradient / other.detach()

    return _broadcast(call, {0: numerator})


def _expand_rule(call: NodeCall) -> dict[int, ByInput]:
    return _broadcast(call, {0: lambda: call.gradient})


def _prelu_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of PReLU, y = max(x, 0) + w min(x, 0): dw_i = sum_p g_ip min(x_ip, 0)."""
    return _broadcast(
        call, {1: lambda: call.gradient * call.node._saved_self.detach().clamp(max=0)}
    )


def _addmm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of beta b + alpha X M: dM_i = alpha sum_p x_ip g_ip^T.

    X has the shape (N, I), M has the shape (I, O).
    """
    return _product(
        call,
        bias=0,
        left=1,
        right=2,
        scale=call.node._saved_alpha,
        bias_scale=call.node._saved_beta,
    )


def _mm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of X M: see `_addmm_rule`."""
    return _product(call, bias=None, left=0, right=1, scale=1, bias_scale=1)


def _product(
    call: NodeCall, *, bias: int | None, left: int, right: int, scale: float, bias_scale: float
) -> dict[int, ByInput]:
    found: dict[int, ByInput] = {}
    order, batch = call.order, call.batch
    if bias is not None and bias in call.shapes:
        summed = summed_by_sample(call.gradient, order, batch, call.shapes[bias])
        if summed is not None:
            found[bias] = Summed(summed.rows * bias_scale, summed.bounds * abs(bias_scale))
    if order.dim == 0 and right in call.shapes:
        saved = call.node._saved_mat1 if bias is not None else call.node._saved_self
        gradient = order.split(call.gradient, batch)
        found[right] = Factors(
            order.split(saved.detach(), batch), gradient if scale == 1 else gradient * scale
        )
    if order.dim == 1 and left in call.shapes:
        saved = call.node._saved_mat2
        gradient = order.split(call.gradient, batch)
        found[left] = Factors(
            gradient if scale == 1 else gradient * scale, order.split(saved.detach(), batch)
        )
    return found


def _convolution_rule(call: NodeCall) -> dict[int, ByInput]:
    """Run a convolution's own backward on the entries of one sample at a time.

    No work is done for other samples.
    """
    node, order, batch = call.node, call.order, call.batch
    found: dict[int, ByInput] = {}
    if order.dim != 0:
        return found
    if 2 in call.shapes:
        found[2] = _by_channel(call.gradient, order, batch)
    if 1 in call.shapes:
        gradients, inputs = (
            order.split(call.gradient, batch),
            order.split(node._saved_input.detach(), batch),
        )
        weight = node._saved_weight.detach()
        geometry = (
            *(list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation)),
            *(node._saved_transposed, list(node._saved_output_padding), node._saved_groups),
        )
        rows = [
            torch.ops.aten.convolution_backward(
                g.contiguous(), x.contiguous(), weight, None, *geometry, [False, True, False]
            )[1]
            for g, x in zip(gradients, inputs, strict=True)
        ]
        found[1] = torch.stack(rows).flatten(1)
    return found


def _batch_norm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of y = w n(x) + b by channel: dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip.

    n(x) has the statistics of the whole batch.
    """
    node = call.node
    if call.gradients[0] is None or call.orders[0] is None or call.orders[0].dim != 0:
        return {}
    order, gradient = call.orders[0], call.gradients[0]
    found: dict[int, ByInput] = {}
    if 1 in call.shapes:
        values, own = node._saved_input.detach(), bool(node._saved_training)
        kept = (None, None) if own else (node._saved_running_mean, node._saved_running_var)
        eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
        normed = F.batch_norm(values, kept[0], kept[1], training=own, eps=eps)
        found[1] = _by_channel(gradient * normed, order, call.batch)
    if 2 in call.shapes:
        found[2] = _by_channel(gradient, order, call.batch)
    return found


def _embedding_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of a look-up: the gradient at each position goes to the line of its token."""
    node, order, batch = call.node, call.order, call.batch
    indices: Tensor = node._saved_indices
    if order.dim >= indices.dim() or node._saved_scale_grad_by_freq or 0 not in call.shapes:
        return {}
    tokens = order.split(indices, batch).reshape(batch, -1)
    values = order.split(call.gradient, batch).reshape(batch, -1, call.gradient.shape[-1])
    return {0: token_rows(tokens, values, call.shapes[0][0], node._saved_padding_idx)}


def _by_channel(values: Tensor, order: SampleOrder, batch: int) -> Summed:
    """Sum values of shape (N, C, ...) to rows of shape (B, C)."""
    by_sample = order.split(values.reshape(*values.shape[:2], -1), batch)  # (B, k, C, P)
    terms = by_sample.shape[1] * by_sample.shape[3]
    return Summed(
        by_sample.sum((1, 3)), torch.linalg.vector_norm(by_sample.flatten(1), dim=1) * terms**0.5
    )


def _group_norm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of y = w n(x) + b by channel, normed over groups: see `_batch_norm_rule`."""
    node, gradient, order = call.node, call.gradients[0], call.orders[0]
    if gradient is None or order is None or order.dim != 0:
        return {}
    found: dict[int, ByInput] = {}
    if 1 in call.shapes:
        normed = F.group_norm(
            node._saved_input.detach(), node._saved_group, None, None, node._saved_eps
        )
        found[1] = _by_channel(gradient * normed, order, call.batch)
    if 2 in call.shapes:
        found[2] = _by_channel(gradient, order, call.batch)
    return found


def _layer_norm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of y = w n(x) + b over the last dimensions.

    dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip.
    """
    node, gradient, order = call.node, call.gradients[0], call.orders[0]
    if gradient is None or order is None:
        return {}
    found: dict[int, ByInput] = {}
    for slot in (1, 2):
        if slot in call.shapes:
            values = gradient
            if slot == 1:
                normed = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
                values = gradient * normed
            summed = summed_by_sample(values, order, call.batch, call.shapes[slot])
            if summed is not None:
                found[slot] = summed
    return found


def _lstm_rule(call: NodeCall) -> dict[int, ByInput]:
    """Apply the rule of one LSTM layer in one direction: see `hydra_pipe.per_sample.lstm`."""
    node = call.node
    # outputs, last hidden state, last cell state
    places = (SampleOrder(1), SampleOrder(0), SampleOrder(0))
    usual = all(o is None or o == place for o, place in zip(call.orders, places, strict=False))
    if node._saved_mode != _LSTM or not usual or node._saved_input.shape[1] != call.batch:
        return {}
    weights = [getattr(node, f"_saved_weight{k}").detach() for k in range(4)]
    if not node._saved_has_biases:
        weights[2:] = [weights[0].new_zeros(len(weights[0]))] * 2
    layer = LstmLayer(
        node._saved_input.detach(),
        weights,
        node._saved_hx_.detach(),
        node._saved_cx_.detach(),
        node._saved_result0.detach(),
        bool(node._saved_reverse),
    )
    gates, inputs, before = lstm_gate_gradients(layer, *call.gradients[:3])
    rights = {1: inputs, 2: before, 3: None, 4: None}
    return {slot: Factors(gates, rights[slot]) for slot in call.shapes if slot in rights}


# torch's number of the mode
_LSTM = 2

RULES: dict[str, NodeRule] = {
    "AddBackward0": _add_rule,
    "SubBackward0": _sub_rule,
    "MulBackward0": _mul_rule,
    "DivBackward0": _div_rule,
    "ExpandBackward0": _expand_rule,
    "PreluKernelBackward0": _prelu_rule,
    "AddmmBackward0": _addmm_rule,
    "MmBackward0": _mm_rule,
    "EmbeddingBackward0": _embedding_rule,
    "ConvolutionBackward0": _convolution_rule,
    "NativeBatchNormBackward0": _batch_norm_rule,
    "CudnnBatchNormBackward0": _batch_norm_rule,
    "NativeGroupNormBackward0": _group_norm_rule,
    "NativeLayerNormBackward0": _layer_norm_rule,
    "MkldnnRnnLayerBackward0": _lstm_rule,
}
