"""Curvature weights of the rows, from the model's output and the gradient at the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from hydra_pipe.recording.seen_outputs import SeenOutput, placed_once
from hydra_pipe.recording.targets import TargetCheck
from hydra_pipe.recording.transfer import to_host
from hydra_pipe.types import F32, F64

# Outputs and gradients of several steps wait, since small tensors cost less together. They wait for
# at most this many bytes, or until the rows are written.
_WAITING_BYTES = 2**20


@dataclass(slots=True)
class _Pass:
    """One backward pass.

    Args:
        output: output of the model, detached; None once it was released.
        version: version counter of `output` when the model returned it. The loop may change
            `output` later.
        gradient: gradient that arrived at `output`; None once it was released.
        n_classes: number of classes of an output of one row a sample, else 0.
        batch: number of samples in the whole step.
        out: arrays to fill with the weights, the losses and the targets of the pass, each of shape
            (B,).
        samples: ids of the samples, shape (B,).
        told: loss function and targets, if the loop named them; None otherwise.
        tried: link whose cross-entropy it was compared with; None: it was compared with none.
    """

    output: Tensor | None
    version: int
    gradient: Tensor | None
    n_classes: int
    batch: int
    out: "LossColumns"
    samples: NDArray[np.int64]
    told: tuple[Loss, Tensor] | None
    tried: Link | None = None

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.out.losses)


class _Group:
    """Passes of outputs of one form, and statistics of their rows on the device.

    Args:
        passes: the passes, with their outputs and gradients.
        link: link of the cross-entropy that they are compared with.
    """

    def __init__(self, passes: Sequence[_Pass], link: Link) -> None:
        self.passes, self.link = passes, link
        outputs = [p.output for p in passes if p.output is not None]
        gradients = [p.gradient for p in passes if p.gradient is not None]
        self.eps = torch.finfo(outputs[0].dtype).eps
        self.statistics = cross_entropy_statistics(torch.cat(outputs), torch.cat(gradients), link)
        for one in passes:
            one.tried = link

    def release(self) -> None:
        """Drop the outputs. Passes of another loss then have no curvature."""
        for one in self.passes:
            one.output = one.gradient = None


def _negative(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    return -loss(output, target)


def _fitting(passes: Sequence[_Pass], link: Link) -> list[list[_Pass]]:
    """Return the passes that may end in `link` and were not compared with it, by their form."""
    groups: dict[tuple[object, ...], list[_Pass]] = {}
    for one in passes:
        if one.output is not None and one.tried != link and fits(link, one.output):
            form = (one.output.dtype, one.output.device, *one.output.shape[1:])
            groups.setdefault(form, []).append(one)
    return list(groups.values())


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
        climbs: True if the optimiser maximises the loss. The step's curvature is then of the loss
            times -1.
    """

    def __init__(self, targets: TargetCheck, *, climbs: bool = False) -> None:
        self._targets, self._climbs = targets, climbs
        # for each step with shares: its column, its number of samples, and the place of the row
        # that gives each share its curvature
        self._shared: list[tuple[NDArray[np.float32], int, NDArray[np.int64]]] = []
        self._links: tuple[Link, ...] = LINKS
        self._waiting: list[_Pass] = []
        self._waiting_bytes = 0
        # passes whose statistics are taken, and passes that the likeliest link does not fit
        self._groups: list[_Group] = []
        self._others: list[_Pass] = []
        # True if the last losses were those of the likeliest link
        self._is_sure = False
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
            Columns of the rows of the step's samples, then of the shares. `fill` fills the
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
            gradient = seen.gradient
            if self._climbs:
                gradient = None if gradient is None else -gradient
                told = None if told is None else (partial(_negative, told[0]), told[1])
            self._waiting.append(
                _Pass(
                    seen.output,
                    seen.version,
                    gradient,
                    seen.output.shape[1] if seen.output.dim() == 2 else 0,
                    batch,
                    found[rows],
                    own,
                    told,
                )
            )
            # a view keeps the whole storage of its base in memory
            self._waiting_bytes += seen.output.untyped_storage().nbytes()
        self._told = []
        if self._waiting_bytes > _WAITING_BYTES:
            self._shrink()
        return columns

    def take(self) -> list[Tensor]:
        """Return the values that `fill` needs on the host, on their devices."""
        self._look()
        return [group.statistics for group in self._groups]

    def fill(self, values: Sequence[F64]) -> None:
        """Fill in the columns that `observe` has returned so far.

        Args:
            values: values of the last `take`.

        Raises:
            RecordError: the targets belong to other samples than the ids say.
        """
        groups, self._groups = self._groups, []
        others, self._others = self._others, []
        for group, statistics in zip(groups, values, strict=True):
            others += self._unlike(group, statistics)
        # of another loss: the host waits for the device once more
        for link in self._links:
            fitting = _fitting(others, link)
            fits_link = {id(one) for passes in fitting for one in passes}
            others = [one for one in others if id(one) not in fits_link]
            for passes in fitting:
                group = _Group(passes, link)
                others += self._unlike(group, group.statistics.cpu().numpy())
        for one in others:
            self._by_loss(one)
        for column, batch, shares in self._shared:
            column[batch:] = column[shares]
        self._shared = []

    def finish(self) -> None:
        """Fill in the columns that `observe` has returned so far, and wait for the device.

        Raises:
            RecordError: the targets belong to other samples than the ids say.
        """
        self.fill(to_host(self.take()))

    def _look(self) -> None:
        """Take the statistics of the waiting passes, by the likeliest link."""
        # the loop may have overwritten an output since then
        waiting = [
            one
            for one in self._waiting
            if one.output is not None and one.output._version == one.version
        ]
        self._waiting, self._waiting_bytes = [], 0
        self._groups += [
            _Group(passes, self._links[0]) for passes in _fitting(waiting, self._links[0])
        ]
        self._others += [one for one in waiting if one.tried is None]

    def _shrink(self) -> None:
        """Release the waiting outputs, without a wait for the device if their loss is known."""
        on_host = all(p.output is None or p.output.device.type == "cpu" for p in self._waiting)
        is_named = any(p.told is not None for p in self._waiting)
        self._look()
        if on_host or is_named or self._others or not self._is_sure:
            self.finish()
            return
        for group in self._groups:
            group.release()

    def _unlike(self, group: _Group, statistics: F64) -> list[_Pass]:
        """Fill in the passes of a group whose loss is that of its link. Return the others."""
        passes = group.passes
        sizes = np.array([p.n_rows for p in passes])
        batches = np.array([p.batch for p in passes])
        weights, known = cross_entropy_weights(statistics, sizes, batches, group.eps)
        ends = np.cumsum(sizes)[:-1]
        columns = (weights, *losses_and_targets(statistics))
        of_passes = [
            LossColumns(*of) for of in zip(*(np.split(c, ends) for c in columns), strict=True)
        ]
        left: list[_Pass] = []
        filled: list[_Pass] = []
        for one, found, is_known in zip(passes, of_passes, known, strict=True):
            if is_known:
                one.out.curvature[:] = found.curvature
                one.out.losses[:] = self._as_given(found.losses)
                one.out.targets[:] = found.targets
                filled.append(one)
            else:
                left.append(one)
        if group.link == "softmax" and self._targets.is_on:
            self._check_targets([one for one in filled if len(one.samples)])
        if known.any():
            # the likeliest first
            self._links = (group.link, *(other for other in LINKS if other != group.link))
        self._is_sure = bool(known.all())
        return left

    def _by_loss(self, one: _Pass) -> None:
        """Fill in a pass whose loss the loop has named."""
        if one.told is None or one.output is None or one.gradient is None:
            return
        loss, target = one.told
        # forked: a loss may draw from the generator that the training uses
        with torch.random.fork_rng([one.output.device] if one.output.is_cuda else []):
            one.out.curvature[:], losses = curvature_weights(
                loss, one.output, target, one.gradient, one.batch
            )
        one.out.losses[:] = self._as_given(losses)

    def _as_given(self, losses: F32) -> F32:
        """Return losses as the loop has them."""
        return -losses if self._climbs else losses

    def _check_targets(self, passes: Sequence[_Pass]) -> None:
        """Check the targets of passes of one form whose loss is cross-entropy with classes.

        A loss of zero shows no target.
        """
        if passes and passes[0].n_classes:
            self._targets.check_all(
                [one.samples for one in passes],
                [one.out.targets for one in passes],
                passes[0].n_classes,
            )
