"""Outputs of the model as the backward passes of a step have met them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class SeenOutput:
    """Output of the model in one backward pass, and the gradient there.

    Args:
        output: output of the model, detached.
        version: version counter of `output` when the model returned it. The loop may change
            `output` later.
        gradient: gradient that arrived at `output`.
        first: place in the step of the first sample of `output`.
        last_input: input of the last recorded module of the pass, detached, shape (B, d), if the
            module's output has the shape of `output`. None: it is not known.
    """

    output: Tensor
    version: int
    gradient: Tensor
    first: int
    last_input: Tensor | None = None


def placed_once(passes: Sequence[SeenOutput], batch: int) -> list[SeenOutput]:
    """Return the passes whose samples are met in no other pass of the step.

    Args:
        passes: passes of a step.
        batch: number of samples of the step.
    """
    spans = [(seen.first, seen.first + len(seen.output)) for seen in passes]
    return [
        seen
        for seen, (first, end) in zip(passes, spans, strict=True)
        if end <= batch and sum(a < end and first < b for a, b in spans) == 1
    ]
