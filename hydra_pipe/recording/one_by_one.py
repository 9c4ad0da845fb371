"""The slow way that always works: one backward pass a sample through the whole model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.factors import Contribution
from hydra_pipe.recording.places import Origin

# (function that makes the contributions, each with its block; the gradient at an output)
OnGradient = Callable[[Callable[[], list[tuple[int, Contribution]]], Tensor], None]


def take_one_by_one(
    origins: Sequence[Origin],
    trained: Sequence[nn.Parameter],
    blocks: Sequence[int],
    batch: int,
    on_gradient: OnGradient,
) -> None:
    """Split some parameters' gradients by sample, from the gradients at the outputs.

    The split happens in the backward pass to come.

    Args:
        origins: outputs that keep the samples apart.
        trained: the recorded parameters, in the order of the blocks.
        blocks: numbers of the parameters to split.
        batch: samples of the pass.
        on_gradient: function that is called when the gradients have come.
    """
    wanted = [trained[block] for block in blocks]

    def on_gradients(gradients: Sequence[Tensor | None]) -> None:
        used = [(o, g) for o, g in zip(origins, gradients, strict=True) if g is not None]
        if used:
            on_gradient(partial(_slow_rows, blocks, wanted, used, batch), used[0][1])

    if len(origins) == 1:
        origins[0].output.register_hook(lambda gradient: on_gradients([gradient]))  # type: ignore[no-untyped-call]
    else:
        torch.autograd.graph.register_multi_grad_hook([o.output for o in origins], on_gradients)


def _slow_rows(
    blocks: Sequence[int],
    trained: Sequence[nn.Parameter],
    used: Sequence[tuple[Origin, Tensor]],
    batch: int,
) -> list[tuple[int, Contribution]]:
    rows: list[list[Tensor]] = [[] for _ in blocks]
    for sample in range(batch):
        alone = [origin.order.only(gradient, batch, sample) for origin, gradient in used]
        try:
            found = torch.autograd.grad(
                [o.output for o, _ in used], trained, alone, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise LayerError(
                f"a parameter of shape {tuple(trained[0].shape)} cannot be split by sample: the "
                "outputs of the model that "
                f"the loss "
                f"uses depend on each other ({str(error).splitlines()[0][:80]}). Freeze it, or "
                "let the model return one of them"
            ) from error
        for of_block, parameter, gradient in zip(rows, trained, found, strict=True):
            of_block.append(
                torch.zeros_like(parameter).flatten()
                if gradient is None
                else gradient.detach().flatten()
            )
    return [(block, torch.stack(of_block)) for block, of_block in zip(blocks, rows, strict=True)]
