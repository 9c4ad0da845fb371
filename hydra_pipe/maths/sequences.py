"""Modules that give several tensors: recurrent ones and attention, with the sample in a dimension of their choice, and others.

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
        LayerError: it was called with something that cannot be taken apart, such as a packed sequence; or it draws dropout.
    """
    everything = [*args, *kwargs.values()]
    if any(isinstance(x, nn.utils.rnn.PackedSequence) for x in everything):
        raise LayerError(
            f"{type(module).__name__} was given a packed sequence, which cannot be split by sample: give padded tensors"
        )
    # between layers: a recurrent module of one layer draws none
    if module.training and module.dropout and getattr(module, "num_layers", 2) > 1:
        raise LayerError(
            f"{type(module).__name__} has dropout={module.dropout}, which is drawn inside of it and cannot be drawn again for "
            f"each sample: make it with dropout=0, and put nn.Dropout beside it"
        )
    replica = replica_of(module)
    others, own = _tensors(module, wanted)
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
            _append(rows, own, gradients)
    return {name: torch.stack(samples).detach() for name, samples in rows.items()}


def several_rows(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[str],
    batch: int,
) -> dict[str, Tensor]:
    """As `sequence_rows`, of any module whose output holds tensors whose first dimension is the sample.

    One pass over the whole batch, and a backward pass a sample from its own part of the outputs: inputs may be anything.

    Raises:
        LayerError: an output has another first dimension, or the module cannot be run again.
    """
    kind = type(module).__name__
    wrong = next((tuple(g.shape) for g in grad_outputs if g is not None and (g.dim() == 0 or len(g) != batch)), None)
    if wrong is not None:
        raise LayerError(
            f"{kind} has an output of shape {wrong} in a batch of {batch}: its first dimension must be the sample, or its "
            f"gradient cannot be split by sample"
        )
    replica = replica_of(module)
    others, own = _tensors(module, wanted)
    devices = [p.device for p in own.values() if p.is_cuda][:1]
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.enable_grad(), torch.random.fork_rng(devices):
        output = torch.func.functional_call(replica, {**others, **own}, args, dict(kwargs))
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if len(leaves) != len(grad_outputs):
            raise LayerError(
                f"{kind} gave {len(grad_outputs)} tensors, and {len(leaves)} when it was run again: freeze its parameters"
            )
        used = [(x, g) for x, g in zip(leaves, grad_outputs, strict=True) if g is not None and x.requires_grad]
        for i in range(batch):
            alone = [torch.zeros_like(g) for _, g in used]
            for part, (_, gradient) in zip(alone, used, strict=True):
                part[i] = gradient[i]
            parameters = list(own.values())
            gradients = torch.autograd.grad([x for x, _ in used], parameters, alone, retain_graph=True, allow_unused=True)
            _append(rows, own, gradients)
    return {name: torch.stack(samples).detach() for name, samples in rows.items()}


def _tensors(module: nn.Module, wanted: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For a replay of `module`: what it is to use as it is, and the parameters `wanted`, whose gradients are to be taken."""
    others = {name: value.detach() for name, value in module.named_parameters()}
    own = {name: others.pop(name).requires_grad_() for name in wanted}
    # the replay may change buffers: its own
    return others | {name: buffer.clone() for name, buffer in module.named_buffers()}, own


def _append(rows: Mapping[str, list[Tensor]], own: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add a sample's gradients to the rows: zeros where there is none."""
    for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
        rows[name].append(torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten())


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
