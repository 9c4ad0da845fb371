"""The rule of embeddings, and the lines of a table that samples use.

Symbols: B samples in the batch, P positions a sample, D features of a line.
"""

from collections.abc import Collection, Mapping
from typing import Any

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
    if module.scale_grad_by_freq or module.sparse:
        raise LayerError(
            "an Embedding with scale_grad_by_freq or sparse=True cannot be recorded: make it "
            "without"
        )
    (tokens,) = args or kwargs.values()
    batch = len(tokens)
    values = grad_output.reshape(batch, -1, module.embedding_dim)
    lines = token_rows(tokens.reshape(batch, -1), values, module.num_embeddings, module.padding_idx)
    return dict.fromkeys(wanted, lines)


def token_rows(tokens: Tensor, values: Tensor, n_lines: int, padding: int | None) -> TokenRows:
    """Return the lines of a table without the lines of padding. See `TokenRows`."""
    if padding is not None and padding >= 0:
        values = values * (tokens != padding).unsqueeze(2)
    return TokenRows(tokens.long(), values, n_lines)
