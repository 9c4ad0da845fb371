"""Gradients at the gates of an LSTM layer, for all samples at once.

Symbols: T time steps, B samples, I input and H hidden features. i, f, g, o are the gates; c the
cell, h the output:

    c_t = f_t c_(t-1) + i_t g_t,    h_t = o_t tanh(c_t)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LstmLayer:
    """One layer of an LSTM in one direction, as it ran.

    Args:
        inputs: inputs of the layer, shape (T, B, I).
        weights: W_ih (4 H, I), W_hh (4 H, H), b_ih and b_hh (4 H).
        hidden, cell: states at the beginning, shape (B, H).
        outputs: h_1 to h_T, shape (T, B, H).
        reverse: True if time ran backwards.
    """

    inputs: Tensor
    weights: Sequence[Tensor]
    hidden: Tensor
    cell: Tensor
    outputs: Tensor
    reverse: bool


def lstm_gate_gradients(
    layer: LstmLayer,
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients before the gates' nonlinearities, and the inputs of the weights there.

    Let d_t be the gradients. Then dW_ih = sum_t d_t x_t^T, dW_hh = sum_t d_t h_(t-1)^T and
    db = sum_t d_t for each sample.

    Args:
        layer: layer that ran.
        grad_outputs: gradient at `outputs`, shape (T, B, H). None: no gradient.
        grad_hidden, grad_cell: gradients at h_T and c_T, shape (B, H). None: no gradient.

    Returns:
        d, shape (B, T, 4 H); x, shape (B, T, I); h of the step before, shape (B, T, H).
    """
    if layer.reverse:
        layer = replace(
            layer, inputs=layer.inputs.flip(0), outputs=layer.outputs.flip(0), reverse=False
        )
        grad_outputs = None if grad_outputs is None else grad_outputs.flip(0)
    inputs, outputs = layer.inputs, layer.outputs
    before = torch.cat([layer.hidden[None], outputs[:-1]])
    w_ih, w_hh, b_ih, b_hh = layer.weights
    i, f, g, o = (inputs @ w_ih.T + before @ w_hh.T + b_ih + b_hh).chunk(4, dim=2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [layer.cell]
    for f_t, addition in zip(f, i * g, strict=True):
        cells.append(torch.addcmul(addition, f_t, cells[-1]))
    squashed = torch.stack(cells[1:]).tanh()
    # The factors of dh_t and dc_t at the gates do not depend on the backward recursion.
    of_output = o * (1 - squashed * squashed)
    at_gates = torch.cat(
        [g * i * (1 - i), torch.stack(cells[:-1]) * f * (1 - f), i * (1 - g * g)], dim=2
    )
    at_o = squashed * o * (1 - o)
    d_h = torch.zeros_like(layer.hidden) if grad_hidden is None else grad_hidden
    d_c = torch.zeros_like(layer.cell) if grad_cell is None else grad_cell
    gates = torch.empty_like(torch.cat([i, f, g, o], dim=2))
    for t in range(len(inputs) - 1, -1, -1):
        if grad_outputs is not None:
            d_h = d_h + grad_outputs[t]
        d_c = torch.addcmul(d_c, d_h, of_output[t])
        torch.cat([at_gates[t] * d_c.repeat(1, 3), at_o[t] * d_h], dim=1, out=gates[t])
        d_h, d_c = gates[t] @ w_hh, d_c * f[t]
    return gates.transpose(0, 1), inputs.transpose(0, 1), before.transpose(0, 1)
