"""Verdicts on rows: the blocks whose rows are not the samples' own, found by probes."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hydra_pipe.per_sample.factors import Contribution, Factors, TokenRows, bounds_of, rows_of
from hydra_pipe.recording.places import Pass
from hydra_pipe.recording.probes import PassGraph, Probe

# Limit of the difference between rows and gradient, relative to the gradient, or to the summed
# norms of the rows if these are larger: terms may cancel in a gradient.
_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LIMIT = 5e-2

# Contributions of each block, each with the place of its first sample in the step.
Rows = Mapping[int, Sequence[tuple[int, Contribution]]]


class RowCheck:
    """Compares the rows that the recorder would make in a pass with torch's own gradients.

    Args:
        trained: the recorded parameters, in the order of the blocks.
        graph: graph of the pass.
        rows_of: function that sends a probe, and returns the rows and torch's gradients of
            `trained`.
        slow: blocks that one backward pass a sample splits; no probe shows their rows.
        seed: seed of the choice of the samples that take part, and of their weights.
        is_half: function that tells whether gradients went through half precision; known once a
            probe has come through.
    """

    def __init__(
        self,
        trained: Sequence[nn.Parameter],
        graph: PassGraph,
        rows_of: Callable[[Probe], tuple[Rows, Sequence[Tensor | None]]],
        slow: frozenset[int],
        seed: int,
        is_half: Callable[[], bool],
    ) -> None:
        self._trained, self._graph, self._rows_of, self._slow = trained, graph, rows_of, slow
        self._seed, self._is_half = seed, is_half

    def wrong_blocks(self, *, thoroughly: bool) -> set[int]:
        """Return the blocks whose rows are not the samples' own.

        Args:
            thoroughly: False probes the gradients of one half of the samples. True probes all
                outputs' gradients at once, and again with a weight for each sample, with which its
                row must grow. If a batch normalisation couples the samples, True instead probes
                halves of the samples, one half for each bit of their numbers.
        """
        batch = self._graph.batch
        generator = torch.Generator().manual_seed(self._seed)
        if batch == 1:
            return self._wrong_in_parts([torch.ones(1)])
        if not thoroughly:
            return self._wrong_in_parts(
                [(torch.randperm(batch, generator=generator) < batch // 2).float()]
            )
        if self._graph.batch_norms:
            numbers = torch.arange(batch)
            halves = [(numbers >> bit & 1).float() for bit in range((batch - 1).bit_length())]
            return self._wrong_in_parts([halves[0], *(1 - half for half in halves)])
        weights = 0.5 + 1.5 * torch.rand(batch, generator=generator)
        plain, totals = self._rows_of(Probe(torch.ones(batch), wants_rows=True))
        weighted, _ = self._rows_of(Probe(weights, wants_rows=True))
        wrong = self._unlike(plain, totals, torch.ones(batch))
        for block, parameter in enumerate(self._trained):
            grown, size = (
                _sizes(rows.get(block, ()), self._graph.of_pass) for rows in (weighted, plain)
            )
            expected, least = weights.double() * size, size.clamp(min=float(size.max()) * 1e-3)
            if bool(
                ((grown - expected).abs() > self._limit(parameter) * weights.double() * least).any()
            ):
                wrong.add(block)
        return wrong - self._slow

    def _wrong_in_parts(self, parts: Sequence[Tensor]) -> set[int]:
        """Return the blocks that are wrong in a probe of a part of the samples.

        A block is wrong if rows of samples that take no part are not zero, or if its rows do not
        sum to torch's gradient.
        """
        wrong: set[int] = set()
        for part in parts:
            rows, totals = self._rows_of(Probe(part, wants_rows=True))
            wrong |= self._unlike(rows, totals, part)
        return wrong

    def _unlike(self, rows: Rows, totals: Sequence[Tensor | None], part: Tensor) -> set[int]:
        wrong = set()
        for block, (parameter, total) in enumerate(zip(self._trained, totals, strict=True)):
            if block in self._slow:
                continue
            of_block = rows.get(block, ())
            sizes = _sizes(of_block, self._graph.of_pass)
            others = float(sizes[part == 0].sum())
            error, size = _missing(of_block, total, parameter)
            size = max(size, float(sizes.sum()))
            if not math.isfinite(error + others + size):
                # an overflow of the probe says nothing of the rows; one of the step's own gradients
                # is reported
                continue
            if (
                not error + others
                <= self._limit(parameter) * size + torch.finfo(torch.float32).tiny
            ):
                wrong.add(block)
        return wrong

    def _limit(self, parameter: nn.Parameter) -> float:
        return _HALF_LIMIT if self._is_half() else _LIMIT.get(parameter.dtype, _HALF_LIMIT)


def _sizes(rows: Sequence[tuple[int, Contribution]], of_pass: Pass) -> Tensor:
    """Return upper bounds of the norms of a block's rows, by sample, shape (B,), float64."""
    sizes = torch.zeros(of_pass.count, dtype=torch.float64)
    for first, value in rows:
        bounds = bounds_of(value).double().cpu()
        sizes[first - of_pass.first :][: len(bounds)] += bounds
    return sizes


def _missing(
    rows: Sequence[tuple[int, Contribution]], total: Tensor | None, parameter: nn.Parameter
) -> tuple[float, float]:
    """Return the norm of the gradient that rows miss, and the norm of torch's gradient.

    The missed gradient is torch's gradient less the sum of the rows. Both are multiplied by one
    random vector, so that no row is written out (Freivalds, see `hydra_pipe.maths.gradient_check`).
    """
    outputs = len(parameter) if parameter.dim() else 1
    probe = torch.randn(
        parameter.numel() // max(outputs, 1), generator=torch.Generator().manual_seed(0)
    ).to(parameter)
    wanted = torch.zeros_like(parameter) if total is None else total.detach()
    difference = wanted.reshape(outputs, -1) @ probe
    size = float(torch.linalg.vector_norm(difference))
    for _, value in rows:
        if isinstance(value, TokenRows):
            difference = difference - value.sum_times(probe.to(value.values)).to(probe)
        elif not isinstance(value, Factors) or value.given_right is None:
            of_rows = (
                value.left.sum((0, 1)) if isinstance(value, Factors) else rows_of(value).sum(0)
            )
            difference = difference - of_rows.reshape(outputs, -1).to(probe) @ probe
        else:
            times = value.right_times(probe.to(value.left)[None])
            difference = difference - (value.left.flatten(0, 1).T @ times.flatten()).to(probe)
    return float(torch.linalg.vector_norm(difference)), size
