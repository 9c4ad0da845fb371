"""A check of whether the parameters are still those that the last recorded step left."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hydra_pipe.recording.addresses import address_of

# elements kept of a parameter after each step, and number of parameters with kept elements
_ELEMENTS, _PARAMETERS = 64, 4


class WeightsNote:
    """Cheap notes, taken after each step, that show later whether parameters were changed since.

    torch's counters show changes in place, and addresses show exchanged tensors. A change that
    bypasses the counters (`parameter.data.copy_(average)`) changes all parameters as a rule. So
    some elements of a few parameters are kept.

    Args:
        model: model in training. Each forward pass writes to its embeddings with `max_norm`, so
            their counters tell nothing.
        parameters: parameters in training.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        scaled = {
            id(m.weight)
            for m in model.modules()
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
        }
        self._counted = [p for p in parameters if id(p) not in scaled]
        spread = range(0, len(self._counted), max(1, -(-len(self._counted) // _PARAMETERS)))
        self._looked_at = [self._counted[k] for k in spread]
        # counters and addresses at the last note; None: no note was taken
        self._counts: list[int] | None = None
        self._addresses: list[int] = []
        # some elements, at present and at the last note
        self._elements: list[Tensor] = []
        self._kept: list[Tensor] = []

    def take(self) -> None:
        """Note the parameters as they are now."""
        self._counts = [p._version for p in self._counted]
        addresses = [address_of(p) for p in self._counted]
        if addresses != self._addresses:
            self._addresses = addresses
            self._elements = [_some(p) for p in self._looked_at]
            self._kept = [values.clone() for values in self._elements]
        elif self._kept:
            torch._foreach_copy_(self._kept, self._elements)

    def changed(self) -> bool:
        """Tell whether parameters were written to since the last note; False without a note."""
        if self._counts is None:
            return False
        if self._counts != [p._version for p in self._counted] or self._addresses != [
            address_of(p) for p in self._counted
        ]:
            return True
        pairs = zip(self._kept, self._elements, strict=True)
        # a nan that stays nan is no change
        return not all(torch.equal(kept.nan_to_num(), now.nan_to_num()) for kept, now in pairs)


def _some(parameter: Tensor) -> Tensor:
    """Return a view of some elements; of the first row in another memory format."""
    own = parameter.detach()
    return own.view(-1)[:_ELEMENTS] if own.is_contiguous() else own[0]
