"""The rules of embeddings and of their bags, and the lines of a table that samples use.

Symbols: B samples in the batch, P positions a sample, D features of a line.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.factors import Contribution, TokenRows


def embedding_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of embeddings: the gradient at each position goes to the line of its token.

    Repeated tokens add up. Padding gets no gradient.

    Raises:
        LayerError: the module has scale_grad_by_freq, which counts tokens across samples, or sparse
            gradients.
    """
    assert isinstance(module, nn.Embedding)
    _refuse_options(module)
    (tokens,) = args or kwargs.values()
    batch = len(tokens)
    values = grad_output.reshape(batch, -1, module.embedding_dim)
    lines = token_rows(tokens.reshape(batch, -1), values, module.num_embeddings, module.padding_idx)
    return dict.fromkeys(wanted, lines)


def embedding_bag_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of bags: each token of a sample's bag gets the gradient at the bag.

    In a mean the gradient is divided by the number of the bag's tokens, without padding. A weight
    of a token multiplies the gradient.

    Raises:
        LayerError: the bag takes maxima, counts tokens across samples, or has sparse gradients.
    """
    assert isinstance(module, nn.EmbeddingBag)
    _refuse_options(module)
    if module.mode == "max":
        raise LayerError('an EmbeddingBag with mode="max" has no rule of its own')
    named = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False), **kwargs)
    tokens, weights = named["input"], named.get("per_sample_weights")
    factors = torch.ones_like(tokens, dtype=grad_output.dtype) if weights is None else weights
    if module.padding_idx is not None and module.padding_idx >= 0:
        factors = factors * (tokens != module.padding_idx)
    if tokens.dim() == 1:
        tokens, factors = _side_by_side(module, tokens, factors, named["offsets"], len(grad_output))
    if module.mode == "mean":
        factors = factors / factors.sum(1, keepdim=True).clamp(min=1)
    values = factors.unsqueeze(2) * grad_output.unsqueeze(1)
    return dict.fromkeys(wanted, TokenRows(tokens.long(), values, module.num_embeddings))


def _side_by_side(
    module: nn.EmbeddingBag, tokens: Tensor, factors: Tensor, offsets: Tensor, n_bags: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens and factors of bags that lie one after the other, shape (B, P).

    P is the length of the longest bag. Places past the end of a bag have the factor 0.

    Args:
        module: the module.
        tokens, factors: tokens of all bags and their factors, shape (tokens,).
        offsets: place of each bag's first token; with `include_last_offset` the end too.
        n_bags: B.
    """
    first = offsets[:n_bags].long()
    ends = torch.cat([offsets.long(), offsets.new_tensor([len(tokens)]).long()])[1 : n_bags + 1]
    longest = int((ends - first).max()) if n_bags else 0
    places = first[:, None] + torch.arange(max(1, longest), device=tokens.device)
    is_there = places < ends[:, None]
    if not len(tokens):
        return torch.zeros_like(places), factors.new_zeros(places.shape)
    places = places.clamp(max=len(tokens) - 1)
    return tokens[places], factors[places] * is_there


def _refuse_options(module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.scale_grad_by_freq or module.sparse:
        kind = "an EmbeddingBag" if isinstance(module, nn.EmbeddingBag) else "an Embedding"
        raise LayerError(
            f"{kind} with scale_grad_by_freq or sparse=True cannot be recorded: make it without"
        )


def token_rows(tokens: Tensor, values: Tensor, n_lines: int, padding: int | None) -> TokenRows:
    """Return the lines of a table without the lines of padding. See `TokenRows`."""
    if padding is not None and padding >= 0:
        values = values * (tokens != padding).unsqueeze(2)
    return TokenRows(tokens.long(), values, n_lines)
