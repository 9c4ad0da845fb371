"""Curvature weights of the rows, from the model's output and the gradient at the output."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.maths.curvature import (
    LINKS,
    Link,
    Loss,
    cross_entropy_statistics,
    cross_entropy_weights,
    curvature_weights,
    fits,
)
from hydra_pipe.recording.capture import SeenOutput
from hydra_pipe.recording.targets import TargetCheck

# Outputs and gradients of several steps wait, since small tensors cost less together. They wait for
# at most this many bytes, or until the rows are written.
_WAITING_BYTES = 2**20


@dataclass(slots=True)
class _Pass:
    """One backward pass.

    Args:
        output: output of the model, detached.
        version: version counter of `output` when the model returned it. The loop may change
            `output` later.
        gradient: gradient that arrived at `output`.
        batch: number of samples in the whole step.
        out: array to fill with the weights of the pass, shape (B,).
        samples: ids of the samples, shape (B,).
        told: loss function and targets, if the loop named them; None otherwise.
    """

    output: Tensor
    version: int
    gradient: Tensor
    batch: int
    out: NDArray[np.float32]
    samples: NDArray[np.int64]
    told: tuple[Loss, Tensor] | None

    @property
    def eps(self) -> float:
        return torch.finfo(self.output.dtype).eps


class CurvatureWatch:
    """Finder of rho (`hydra_pipe.maths.curvature`) for the rows of a training run.

    Cross-entropy is recognised by its gradient. The loop has to name any other loss. The gradient
    of cross-entropy also shows the targets.

    Args:
        targets: check of the targets against the labels.
    """

    def __init__(self, targets: TargetCheck) -> None:
        self._targets = targets
        # for each step with shares: its column, its number of samples, and the place of the row
        # that gives each share its curvature
        self._shared: list[tuple[NDArray[np.float32], int, NDArray[np.int64]]] = []
        self._links: tuple[Link, ...] = LINKS
        self._waiting: list[_Pass] = []
        self._waiting_bytes = 0
        self._told: list[tuple[Loss, Tensor, Tensor]] = []

    def tell(self, loss: Loss, output: Tensor, target: Tensor) -> None:
        """Note the loss of the pass with `output`: `loss(output, target)`, one for each sample."""
        self._told.append((loss, output, target))

    def observe(
        self,
        passes: Sequence[SeenOutput],
        samples: NDArray[np.int64],
        shares: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Take the passes of a step that is about to be recorded.

        Args:
            passes: passes of the step.
            samples: ids of the step's samples, shape (batch,), int64.
            shares: place of the row of each share, shape (shares,); None if rows are not shared.

        Returns:
            rho of each sample and of each share, shape (batch + shares,), float32. `finish` fills
            it in. An unknown value is NaN.
        """
        batch = len(samples)
        column = np.full(batch + (0 if shares is None else len(shares)), np.nan, np.float32)
        if shares is not None:
            self._shared.append((column, batch, shares))
        ends = [seen.first + seen.output.shape[0] for seen in passes]
        for seen, end in zip(passes, ends, strict=True):
            # a sample that was seen twice in a step has two terms, without a common curvature
            meeting = (
                sum(o.first < end and seen.first < e for o, e in zip(passes, ends, strict=True))
                if len(passes) > 1
                else 1
            )
            if meeting == 1 and end <= batch:
                told = next(
                    ((f, y) for f, o, y in self._told if o.data_ptr() == seen.output.data_ptr()),
                    None,
                )
                out = column[seen.first : end]
                own = samples[seen.first : end] if shares is None else samples[:0]
                self._waiting.append(
                    _Pass(seen.output, seen.version, seen.gradient, batch, out, own, told)
                )
                # a view keeps the whole storage of its base in memory
                self._waiting_bytes += seen.output.untyped_storage().nbytes()
        self._told = []
        if self._waiting_bytes > _WAITING_BYTES:
            self.finish()
        return column

    def finish(self) -> None:
        """Fill in the columns that `observe` has returned so far.

        Raises:
            RecordError: the targets belong to other samples than the ids say.
        """
        # the loop may have overwritten an output since then
        waiting, self._waiting = [p for p in self._waiting if p.output._version == p.version], []
        self._waiting_bytes = 0
        for link in self._links:
            waiting = self._by_gradient(waiting, link)
        for one in waiting:
            if one.told is not None:
                loss, target = one.told
                # forked: a loss may draw from the generator that the training uses
                with torch.random.fork_rng([one.output.device] if one.output.is_cuda else []):
                    one.out[:] = curvature_weights(
                        loss, one.output, target, one.gradient, one.batch
                    )
        for column, batch, shares in self._shared:
            column[batch:] = column[shares]
        self._shared = []

    def _by_gradient(self, passes: Sequence[_Pass], link: Link) -> list[_Pass]:
        """Fill in the weights of passes with cross-entropy of `link`. Return the other passes."""
        left: list[_Pass] = []
        groups: dict[tuple[object, ...], list[_Pass]] = {}
        for one in passes:
            if fits(link, one.output):
                groups.setdefault((one.output.dtype, *one.output.shape[1:]), []).append(one)
            else:
                left.append(one)
        for group in groups.values():
            outputs, gradients = (
                torch.cat([p.output for p in group]),
                torch.cat([p.gradient for p in group]),
            )
            statistics = cross_entropy_statistics(outputs, gradients, link).cpu().numpy()
            sizes = np.array([len(p.out) for p in group])
            batches = np.array([p.batch for p in group])
            weights, known = cross_entropy_weights(statistics, sizes, batches, group[0].eps)
            for one, of_pass, is_known in zip(
                group, np.split(weights, np.cumsum(sizes)[:-1]), known, strict=True
            ):
                if is_known:
                    one.out[:] = of_pass
                    if link == "softmax" and self._targets.is_on and len(one.samples):
                        self._check_targets(one)
                else:
                    left.append(one)
            if known.any():
                # the likeliest first
                self._links = (link, *(other for other in LINKS if other != link))
        return left

    def _check_targets(self, one: _Pass) -> None:
        """Check the targets of a pass whose loss is cross-entropy with classes.

        The only negative element of a sample's gradient is at its target.
        """
        if one.gradient.dim() == 2:
            least, targets = one.gradient.min(1)
            seen = (least < 0).cpu().numpy()  # a loss of zero shows no target
            self._targets.check(
                one.samples[seen], targets.cpu().numpy()[seen], one.gradient.shape[1]
            )
