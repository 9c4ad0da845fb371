"""Curvature weights of the rows, from the model's output and the gradient at the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
    losses_and_targets,
)
from hydra_pipe.recording.addresses import address_of
from hydra_pipe.recording.capture import SeenOutput, placed_once
from hydra_pipe.recording.targets import TargetCheck
from hydra_pipe.types import F32

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
        out: arrays to fill with the weights, the losses and the targets of the pass, each of shape
            (B,).
        samples: ids of the samples, shape (B,).
        told: loss function and targets, if the loop named them; None otherwise.
    """

    output: Tensor
    version: int
    gradient: Tensor
    batch: int
    out: "LossColumns"
    samples: NDArray[np.int64]
    told: tuple[Loss, Tensor] | None

    @property
    def eps(self) -> float:
        return torch.finfo(self.output.dtype).eps


@dataclass(frozen=True, slots=True)
class LossColumns:
    """Curvature, loss and target of each row of a step, as the loss shows them.

    Args:
        curvature: rho, shape (row,), float32; NaN where it is unknown.
        losses: loss of the row's sample, shape (row,), float32; NaN where it is unknown.
        targets: target class of the row's sample, shape (row,), int32; -1 where it is unknown.
    """

    curvature: F32
    losses: F32
    targets: NDArray[np.int32]

    @classmethod
    def unknown(cls, n_rows: int) -> Self:
        """Return columns of unknown values."""
        nothing = np.full((2, n_rows), np.nan, np.float32)
        return cls(nothing[0], nothing[1], np.full(n_rows, -1, np.int32))

    def __getitem__(self, rows: slice) -> "LossColumns":
        return LossColumns(self.curvature[rows], self.losses[rows], self.targets[rows])


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
    ) -> LossColumns:
        """Take the passes of a step that is about to be recorded.

        Args:
            passes: passes of the step.
            samples: ids of the step's samples, shape (batch,), int64.
            shares: place of the row of each share, shape (shares,); None if rows are not shared.

        Returns:
            Columns of the rows of the step's samples, then of the shares. `finish` fills the
            columns in. Of shared rows only the curvature is known.
        """
        batch = len(samples)
        columns = LossColumns.unknown(batch + (0 if shares is None else len(shares)))
        found = columns
        if shares is not None:
            self._shared.append((columns.curvature, batch, shares))
            # a mixed input has two targets, and its loss is no sample's
            found = LossColumns(
                columns.curvature, np.empty_like(columns.losses), np.empty_like(columns.targets)
            )
        for seen in placed_once(passes, batch):
            rows = slice(seen.first, seen.first + len(seen.output))
            told = next(
                ((f, y) for f, o, y in self._told if address_of(o) == address_of(seen.output)), None
            )
            own = samples[rows] if shares is None else samples[:0]
            self._waiting.append(
                _Pass(seen.output, seen.version, seen.gradient, batch, found[rows], own, told)
            )
            # a view keeps the whole storage of its base in memory
            self._waiting_bytes += seen.output.untyped_storage().nbytes()
        self._told = []
        if self._waiting_bytes > _WAITING_BYTES:
            self.finish()
        return columns

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
                    one.out.curvature[:], one.out.losses[:] = curvature_weights(
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
            sizes = np.array([len(p.output) for p in group])
            batches = np.array([p.batch for p in group])
            weights, known = cross_entropy_weights(statistics, sizes, batches, group[0].eps)
            ends = np.cumsum(sizes)[:-1]
            columns = (weights, *losses_and_targets(statistics))
            of_passes = [
                LossColumns(*of) for of in zip(*(np.split(c, ends) for c in columns), strict=True)
            ]
            for one, found, is_known in zip(group, of_passes, known, strict=True):
                if is_known:
                    one.out.curvature[:], one.out.losses[:] = found.curvature, found.losses
                    one.out.targets[:] = found.targets
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

        A loss of zero shows no target.
        """
        if one.gradient.dim() == 2:
            targets = one.out.targets.astype(np.int64)
            seen = targets >= 0
            self._targets.check(one.samples[seen], targets[seen], one.gradient.shape[1])
