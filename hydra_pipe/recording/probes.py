"""Probes: gradients at the outputs of some samples alone, sent through the training's own graph.

A probe needs no loss, draws no random number, and touches no `.grad`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.per_sample.factors import Contribution
from hydra_pipe.per_sample.orders import FIRST, INTERLEAVED, SampleOrder, order_of
from hydra_pipe.recording.places import Call, Origin, Pass, Watched
from hydra_pipe.recording.walk import Walk, gradients_by_backward


@dataclass(frozen=True)
class PassGraph:
    """The graph of a pass, and the outputs where probes enter it.

    Args:
        walk: the nodes.
        origins: the outputs that keep the samples apart.
        of_pass: the pass.
    """

    walk: Walk
    origins: Sequence[Origin]
    of_pass: Pass

    @property
    def batch(self) -> int:
        """B, samples of the pass."""
        return self.of_pass.count

    @property
    def batch_norms(self) -> list[Any]:
        """Nodes of batch normalisations, which couple the samples."""
        return [node for node in self.walk.nodes if "BatchNorm" in node.name()]


@dataclass
class Probe:
    """Gradients of the outputs of some samples, on their way through the graph.

    Args:
        weights: weights of the samples' gradients, shape (B,); zero for samples that take no part.
        wants_rows: True if rows are to be made. If False, one sample takes part, and the probe only
            notes where its gradients arrive.
    """

    weights: Tensor
    wants_rows: bool
    reached: dict[Watched, list[tuple[int, Tensor]]] = field(default_factory=dict)
    other_dims: dict[Watched, set[int]] = field(default_factory=dict)
    in_batches: dict[Watched, bool] = field(default_factory=dict)
    rows: dict[int, list[tuple[int, Contribution]]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @classmethod
    def of_one(cls, sample: int, batch: int) -> "Probe":
        """Return a probe that finds where the gradients of `sample` arrive."""
        return cls(torch.zeros(batch).index_fill_(0, torch.tensor(sample), 1.0), wants_rows=False)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.weights)

    @property
    def sample(self) -> int:
        """The first sample that takes part."""
        return int(self.weights.argmax())

    def saw(self, call: Call, gradient: Tensor) -> None:
        """Note the gradients that have arrived at the output of a call."""
        if self.wants_rows:
            return
        reached = gradient.detach().reshape(call.shape) != 0
        if reached.dim() == 0 or not bool(reached.any()):
            return
        rows = reached.flatten(1).any(1) if reached.dim() > 1 else reached
        watched = call.watched
        self.reached.setdefault(watched, []).append((call.offset, rows.nonzero()[:, 0].cpu()))
        self.in_batches[watched] = self.in_batches.get(watched, True) and call.n_rows == self.batch
        dims = {
            dim
            for dim in range(1, reached.dim())
            if reached.shape[dim] == self.batch
            and order_of(reached, self.batch, self.sample, SampleOrder(dim)) == SampleOrder(dim)
        }
        self.other_dims[watched] = self.other_dims.get(watched, dims) & dims

    def take(self, contributions: Mapping[int, Contribution], first: int, _: bool) -> bool:
        """Take rows that were made."""
        for block, value in contributions.items():
            self.rows.setdefault(block, []).append((first, value))
        return False

    def order_of_rows(self, watched: Watched, total: int) -> SampleOrder | None:
        """Return the order of a module's rows that explains which rows were reached, or None.

        Args:
            watched: module that gradients have reached.
            total: rows of the module in the pass, over all its calls; 0: none were counted.
        """
        if not total:
            return FIRST
        rows = self.numbers_reached(watched)
        if int(rows.max()) >= total:
            return None
        reached = torch.zeros(total, dtype=torch.bool).index_fill_(0, rows, True)
        known = [watched.order] if watched.is_known else []
        likeliest = INTERLEAVED if self.in_batches[watched] and total > self.batch else FIRST
        return order_of(reached, self.batch, self.sample, *known, likeliest)

    def numbers_reached(self, watched: Watched) -> Tensor:
        """Return the numbers of the module's rows that gradients reached, over all its calls."""
        return torch.cat([offset + numbers for offset, numbers in self.reached[watched]])

    def send(
        self, graph: PassGraph, model: nn.Module, trained: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        """Send the gradients through the graph of a pass.

        Returns:
            torch's gradients of `trained`.
        """
        wanted = [p for p in trained if p.requires_grad]
        gradients = [_generic(origin, self.weights) for origin in graph.origins]
        coupled = [node.register_hook(_uncoupled) for node in graph.batch_norms]
        outputs = [o.output for o in graph.origins]
        found: Sequence[Tensor | None]
        try:
            if graph.walk.is_checkpointed:
                found = gradients_by_backward(graph.walk, model, outputs, gradients, wanted)
            else:
                found = torch.autograd.grad(
                    outputs, wanted, gradients, retain_graph=True, allow_unused=True
                )
        finally:
            for handle in coupled:
                handle.remove()
        known = dict(zip(wanted, found, strict=True))
        return [known.get(p) for p in trained]


def origins_of(outputs: Sequence[Tensor], batch: int) -> list[Origin]:
    """Return the outputs that keep the samples apart."""
    found = []
    for output in outputs:
        shape = output.shape
        if len(shape) and shape[0] and shape[0] % batch == 0:
            found.append(Origin(output, FIRST))
        elif batch in shape:
            found.append(Origin(output, SampleOrder(shape.index(batch))))
    return found


def _generic(origin: Origin, weights: Tensor) -> Tensor:
    """Return a gradient at an output: generic within each sample, times the sample's weight."""
    gradient = torch.zeros_like(origin.output)
    # in half precision, sums over positions must not overflow
    scale = 1.0 if gradient.dtype in (torch.float64, torch.float32) else 2.0**-6
    by_sample = origin.order.split_view(gradient, len(weights))
    by_sample[:] = (scale * weights).to(gradient).reshape(-1, *[1] * (by_sample.dim() - 1))
    generator = torch.Generator().manual_seed(0)
    for dim, size in enumerate(by_sample.shape[1:], 1):
        factors = torch.rand(size, generator=generator).add_(0.5) * torch.randint(
            0, 2, (size,), generator=generator
        ).mul_(2).sub_(1)
        by_sample.mul_(
            factors.to(gradient).reshape([size if d == dim else 1 for d in range(by_sample.dim())])
        )
    return gradient


def _uncoupled(
    at_inputs: Sequence[Tensor | None], at_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    """Remove a batch normalisation's coupling of the samples from a probe.

    The gradients of samples whose own outputs have no gradient become zero.
    """
    gradient, at_input = at_outputs[0], at_inputs[0]
    if gradient is None or at_input is None or gradient.dim() < 2 or len(gradient) != len(at_input):
        return None
    own = (gradient != 0).flatten(1).any(1).reshape(-1, *[1] * (at_input.dim() - 1))
    return (at_input * own, *at_inputs[1:])
