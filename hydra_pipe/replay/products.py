"""Products with a batch's Hessian and with its per-sample gradients, for many vectors at once.

Let L(theta, w) = sum_i w_i l_i(theta) / n, and let G be its gradient in theta at w = 1. The
derivative of <u, G> is H u in theta, and <u, grad l_i> / n in w_i. One backward pass through the
backward pass gives both (Pearlmutter, "Fast exact multiplication by the Hessian", 1994). Several
vectors u take one vectorised pass through one graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydra_pipe.errors import HydraError, PipelineError
from hydra_pipe.recording.datasets import called
from hydra_pipe.training.pipeline import Pipeline

_RAISING = ("torch::autograd::Error", "torch::autograd::NotImplemented")


@dataclass(frozen=True)
class Batch:
    """A batch's loss, ready to be differentiated twice.

    Args:
        parameters: parameters that the loss is a function of.
        weight: weights w of the samples, shape (sample,).
        gradients: gradient G, one tensor for each parameter, with a graph of its own. None for a
            parameter that the loss does not depend on.
    """

    parameters: Sequence[Tensor]
    weight: Tensor
    gradients: Sequence[Tensor | None]

    def products(self, vectors: Sequence[Tensor], at_once: int) -> tuple[Tensor, list[Tensor]]:
        """Return the products of vectors u with the per-sample gradients and with the Hessian.

        Args:
            vectors: vectors u, one tensor (column, ...) for each parameter.
            at_once: number of columns that go through the graph together.

        Returns:
            <u, r_i> with r_i = grad l_i / n, shape (column, sample), and H u, one tensor
            (column, ...) for each parameter.

        Raises:
            PipelineError: an operation of the model has no second derivative.
        """
        used = [i for i, g in enumerate(self.gradients) if g is not None and g.requires_grad]
        outputs = [g for g in self.gradients if g is not None and g.requires_grad]
        wanted = [self.weight, *self.parameters]
        n = vectors[0].shape[0]
        found = [torch.zeros(n, *x.shape, dtype=x.dtype, device=x.device) for x in wanted]
        for first in range(0, n, at_once):
            own = slice(first, first + at_once)
            given = [vectors[i][own] for i in used]
            for to, values in zip(found, _grad(outputs, wanted, given), strict=True):
                if values is not None:
                    to[own] = values
        return found[0], found[1:]


def check_twice_differentiable(batch: Batch) -> None:
    """Refuse a graph in which torch has put a node that raises in place of a second derivative.

    `torch.autograd.grad` silently skips these nodes, so its result would lack their part.

    Raises:
        PipelineError: the graph has a node of this kind.
    """
    left = [g.grad_fn for g in batch.gradients if g is not None]
    seen: set[object] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _RAISING:
            raise _cannot("an operation of it has no second derivative")
        left += [following for following, _ in node.next_functions]


def batch_of(
    pipeline: Pipeline, parameters: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> Batch:
    """Return the loss of a batch at the model's current parameters, ready for two derivatives.

    Raises:
        PipelineError: an operation of the model has no second derivative.
    """
    # other attention backends cannot be differentiated twice
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = pipeline.loss(called(pipeline.model, inputs), targets)
        weight = torch.ones_like(losses, requires_grad=True)
        with _twice_differentiable():
            gradients = torch.autograd.grad(
                (weight * losses).mean(), parameters, create_graph=True, allow_unused=True
            )
    return Batch(parameters, weight, gradients)


def gradients_of_each(
    losses: Tensor, parameters: Sequence[Tensor], averages: Tensor | None = None
) -> list[Tensor]:
    """Return the gradient of each loss, or of the average of each group of losses.

    Args:
        losses: losses to differentiate, shape (loss,).
        parameters: parameters to differentiate in.
        averages: weight of each loss in the average of each group, shape (group, loss). None: each
            loss is differentiated alone.

    Returns:
        One tensor for each parameter, shape (loss, ...), or (group, ...) with `averages`. Zeros for
        a parameter that no loss depends on.
    """
    of = (
        torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        if averages is None
        else averages
    )
    found = _grad([losses], list(parameters), [of])
    return [
        torch.zeros(len(of), *p.shape, dtype=p.dtype, device=p.device) if g is None else g.detach()
        for p, g in zip(parameters, found, strict=True)
    ]


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return vector-Jacobian products of several vectors, stacked along the first dimension.

    All vectors take one pass where torch can batch it, else one pass each.
    """
    if not outputs:
        return [None] * len(inputs)
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return list(
            torch.autograd.grad(outputs, inputs, list(vectors), is_grads_batched=True, **options)
        )
    except RuntimeError:
        # an operation has no batching rule; or it has no derivative, and the calls below raise
        pass
    each = []
    for j in range(len(vectors[0])):
        with _twice_differentiable():
            each.append(torch.autograd.grad(outputs, inputs, [v[j] for v in vectors], **options))
    return [None if own[0] is None else torch.stack(list(own)) for own in zip(*each, strict=True)]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    try:
        yield
    except HydraError:
        raise
    except RuntimeError as error:
        raise _cannot(str(error).strip().splitlines()[0]) from error


def _cannot(why: str) -> PipelineError:
    return PipelineError(
        f"the model cannot be differentiated twice, which hydra-exact needs ({why}): use "
        "--method hydra-fisher"
    )
