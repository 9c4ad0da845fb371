"""Tell whether a model's parameters are those that the last recorded step left."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# elements of a parameter that are kept after each step, and parameters of which some are
_ELEMENTS, _PARAMETERS = 64, 4


class WeightsNote:
    """Notes cheaply, after each step, what tells later that parameters were changed since.

    Counters of torch tell of changes in place, and addresses of exchanged tensors. What goes past the counters
    (`parameter.data.copy_(average)`) changes all parameters as a rule: some elements of a few are kept.

    Args:
        model: its embeddings with `max_norm` are written to by each forward pass, and their counters tell nothing.
        parameters: that are trained.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        scaled = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None}
        self._counted = [p for p in parameters if id(p) not in scaled]
        spread = range(0, len(self._counted), max(1, -(-len(self._counted) // _PARAMETERS)))
        self._looked_at = [self._counted[k] for k in spread]
        # counters and addresses as they were noted; None: they never were
        self._counts: list[int] | None = None
        self._addresses: list[int] = []
        # some elements, as they are and as they were noted
        self._elements: list[Tensor] = []
        self._kept: list[Tensor] = []

    def take(self) -> None:
        """Note the parameters as they are now."""
        self._counts = [p._version for p in self._counted]
        addresses = [p.data_ptr() for p in self._counted]
        if addresses != self._addresses:
            self._addresses = addresses
            self._elements = [_some(p) for p in self._looked_at]
            self._kept = [values.clone() for values in self._elements]
        elif self._kept:
            torch._foreach_copy_(self._kept, self._elements)

    def changed(self) -> bool:
        """Tell whether parameters were written to since they were noted; False where they never were."""
        if self._counts is None:
            return False
        if self._counts != [p._version for p in self._counted] or self._addresses != [p.data_ptr() for p in self._counted]:
            return True
        pairs = zip(self._kept, self._elements, strict=True)
        # not a number is no change of one
        return not all(torch.equal(kept.nan_to_num(), now.nan_to_num()) for kept, now in pairs)


def _some(parameter: Tensor) -> Tensor:
    """A view of some elements; of another memory format, of the first row."""
    own = parameter.detach()
    return own.view(-1)[:_ELEMENTS] if own.is_contiguous() else own[0]
