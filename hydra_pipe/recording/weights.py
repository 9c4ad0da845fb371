"""Whether a model's parameters are those that the last recorded step left."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# elements of a parameter that are kept after each step, and parameters of which some are
_ELEMENTS, _PARAMETERS = 64, 8


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
        spread = range(0, len(self._counted), -(-len(self._counted) // _PARAMETERS)) if self._counted else ()
        self._looked_at = [self._counted[k] for k in spread]
        self._counts: tuple[int, int] | None = None
        self._kept: list[Tensor] = []

    def take(self) -> None:
        """Note the parameters as they are now."""
        self._counts = self._counted_now()
        now = _elements(self._looked_at)
        if len(self._kept) != len(now):
            self._kept = [values.clone() for values in now]
        elif now:
            torch._foreach_copy_(self._kept, now)

    def changed(self) -> bool:
        """Whether parameters were written to since they were noted; False where they never were."""
        if self._counts is None:
            return False
        if self._counted_now() != self._counts:
            return True
        pairs = zip(self._kept, _elements(self._looked_at), strict=True)
        # not a number is no change of one
        return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)

    def _counted_now(self) -> tuple[int, int]:
        return sum(p._version for p in self._counted), hash(tuple(p.data_ptr() for p in self._counted))


def _elements(parameters: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [p.detach().reshape(-1)[:_ELEMENTS] for p in parameters]
