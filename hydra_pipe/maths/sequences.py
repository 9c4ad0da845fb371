"""Modules that take and give several tensors, with the sample in a dimension of its own choice: recurrent ones and attention.

torch has no vectorised form of their backward passes, so these are taken one sample at a time: right, and slow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.layers import replica_of

# Their children's forward is not called where they use the children's parameters, so they answer for these too.
ANSWERS_FOR_CHILDREN = (nn.MultiheadAttention,)


def is_sequence_module(module: nn.Module) -> bool:
    """Whether `sequence_rows` knows where `module` keeps its samples."""
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention)


def sequence_rows(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[str],
    batch: int,
) -> dict[str, Tensor]:
    """Each sample's gradient of the parameters `wanted`, one pass and one backward pass a sample.

    Args:
        module: RNN, LSTM, GRU or MultiheadAttention.
        args, kwargs: as it was called.
        grad_outputs: gradient at each tensor of its output, in order; None where there is none.
        wanted: names of parameters, of the module's own or below it.
        batch: number of samples.

    Returns:
        Rows of shape (batch, numel) by name.

    Raises:
        LayerError: it was called with something that cannot be taken apart, such as a packed sequence.
    """
    everything = [*args, *kwargs.values()]
    if any(isinstance(x, nn.utils.rnn.PackedSequence) for x in everything):
        raise LayerError(
            f"{type(module).__name__} was given a packed sequence, which cannot be split by sample: give padded tensors"
        )
    replica = replica_of(module)
    others = {name: value.detach() for name, value in module.named_parameters()}
    own = {name: others.pop(name).requires_grad_() for name in wanted}
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    devices = [p.device for p in own.values() if p.is_cuda][:1]
    with torch.enable_grad(), torch.random.fork_rng(devices):
        for i in range(batch):
            inputs = [_of_sample(module, place, x, i, batch) for place, x in _places(module, args, kwargs)]
            keywords = dict(zip(kwargs, inputs[len(args) :], strict=True))
            output = torch.func.functional_call(replica, {**others, **own}, tuple(inputs[: len(args)]), keywords)
            leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            pairs = [
                (leaf, _slice(gradient, _output_dim(module, k), i))
                for k, (leaf, gradient) in enumerate(zip(leaves, grad_outputs, strict=True))
                if gradient is not None
            ]
            gradients = torch.autograd.grad([x for x, _ in pairs], list(own.values()), [g for _, g in pairs], allow_unused=True)
            for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
                rows[name].append(torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten())
    return {name: torch.stack(samples).detach() for name, samples in rows.items()}


_ATTENTION_INPUTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _places(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = _ATTENTION_INPUTS if isinstance(module, nn.MultiheadAttention) else ("input", "hx")
    return [*zip(names, args, strict=False), *kwargs.items()]


def _of_sample(module: nn.Module, place: str, value: Any, i: int, batch: int) -> Any:
    if isinstance(value, tuple):  # an LSTM's hidden state and cell
        return tuple(_of_sample(module, place, x, i, batch) for x in value)
    if not isinstance(value, Tensor):
        return value
    if place == "attn_mask":  # (L, S) for all samples, or (batch * heads, L, S)
        heads = len(value) // batch
        return value if value.dim() == 2 else value[i * heads : (i + 1) * heads]
    if place == "key_padding_mask":
        return value[i : i + 1]
    return _slice(value.detach(), 1 if place == "hx" or not module.batch_first else 0, i)


def _output_dim(module: nn.Module, number: int) -> int:
    """Dimension of the sample in output tensor `number`: hidden states have it second, attention weights first."""
    if number > 0:
        return 0 if isinstance(module, nn.MultiheadAttention) else 1
    return 0 if module.batch_first else 1


def _slice(value: Tensor, dim: int, i: int) -> Tensor:
    return value.narrow(dim, i, 1)
