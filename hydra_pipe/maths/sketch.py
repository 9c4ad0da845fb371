"""The random projection for anything large: a balanced count sketch.

Every coordinate is given a random sign and one of k buckets; the buckets differ in size by one at most. For x, y in R^n and
the sketch S, E[<S x, S y>] = <x, y> exactly, and Var <= (q / k) (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) with
q = k * max P(two coordinates share a bucket), which is 1.02 at most, so no worse than a Gaussian projection of the same width
(Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009, for independent buckets). It costs one pass over x.

The buckets are those of a random order of x, dealt out in turn. Where x is long enough, runs of r neighbours are put in order
instead of single coordinates, which memory does several times as fast. Neighbours of a run never meet in a bucket, and with r and
k coprime any other two do with the chance that two places at random do.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from hydra_pipe.maths.runs import run_length
from hydra_pipe.maths.scratch import Scratch

_SCRATCH = Scratch()


class Sketch:
    """A projection R^n -> R^k that is a function of (seed, block name, shape, k) alone, in any process, on any machine.

    Args:
        seed: of the run.
        name: of the block.
        shape: of the block; n is its number of elements.
        n_columns: k, at most n.
    """

    def __init__(self, seed: int, name: str, shape: tuple[int, ...], n_columns: int) -> None:
        numel = math.prod(map(int, shape))
        digest = hashlib.sha256(f"{seed}\n{name}\n{tuple(map(int, shape))}".encode()).digest()
        # Raw Philox words are part of NumPy's compatibility promise; what Generator makes of them is not.
        words = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)).random_raw(2 * numel)
        self.n_columns = n_columns
        self._shape = tuple(map(int, shape))
        self._gathers: dict[tuple[int, ...], Tensor] = {}
        self._signed: Tensor | None = None
        self._run = run_length(numel, n_columns)
        self._order = torch.from_numpy(np.argsort(words[: numel // self._run], kind="stable"))
        self._sign = self._in_order(torch.from_numpy(np.where(words[numel:] >> np.uint64(63), 1.0, -1.0).astype(np.float32))[None])

    def _in_order(self, rows: Tensor) -> Tensor:
        in_runs = rows.reshape(len(rows), -1, self._run)
        return in_runs.index_select(1, self._order).flatten(1)

    def signs(self, weight: Tensor) -> Tensor:
        """The signs of the coordinates times `weight` (n elements), in the sketch's order, on its device."""
        self._to(weight.device)
        return self._sign * self._in_order(weight.reshape(1, -1))

    def __call__(self, rows: Tensor, signs: Tensor | None = None, order: tuple[int, ...] | None = None) -> Tensor:
        """Project rows of shape (B, n), with other `signs` than its own if given, to (B, k), in their dtype, on their device.

        `order`: of the block's dimensions in the rows, where it is not their own.
        """
        self._to(rows.device)
        n_runs = len(self._order)
        mixed = _SCRATCH.take("in order", (len(rows), n_runs, self._run), rows)
        if order is None:
            torch.index_select(rows.reshape(len(rows), n_runs, self._run), 1, self._order, out=mixed)
        else:
            torch.index_select(rows, 1, self._gather(order), out=mixed.view(len(rows), -1))
        mixed = mixed.flatten(1).mul_(self._sign if signs is None else signs)
        k = self.n_columns
        whole = mixed.shape[1] // k * k
        sums = mixed[:, :whole].reshape(len(mixed), -1, k).sum(1)
        rest = mixed[:, whole:]
        sums[:, : rest.shape[1]] += rest
        return sums

    def of_lines(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Project rows of which only some lines are not zero: no other line is looked at.

        Args:
            tokens: lines of the block, shape (B, P).
            values: what to add there, shape (B, P, elements of a line).

        Returns:
            Shape (B, k).
        """
        self._to(values.device)
        signed = self._signed_columns().view(-1, values.shape[2])[tokens]
        sums = values.new_zeros(len(values), self.n_columns)
        columns = signed.abs().sub_(1).long()
        return sums.scatter_add_(1, columns.flatten(1), (values * signed.sign()).flatten(1))

    def _signed_columns(self) -> Tensor:
        """The column of each coordinate, counted from 1, times its sign; int32, in the block's own order."""
        if self._signed is None:
            numel = self._sign.shape[1]
            columns = (torch.arange(numel, dtype=torch.int32, device=self._sign.device) % self.n_columns).add_(1)
            columns *= self._sign[0].to(torch.int32)
            own = torch.empty_like(self._order).scatter_(0, self._order, torch.arange(len(self._order), device=self._order.device))
            self._signed = columns.view(-1, self._run).index_select(0, own).flatten()
        return self._signed

    def _gather(self, order: tuple[int, ...]) -> Tensor:
        """Where each element of the sketch's order is in rows whose dimensions are in `order`."""
        found = self._gathers.get(order)
        if found is None:
            numel = math.prod(self._shape)
            places = torch.arange(numel, dtype=torch.int32, device=self._order.device)
            in_own = places.view([self._shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])
            found = self._gathers[order] = self._in_order(in_own.reshape(1, -1))[0]
        return found

    def _to(self, device: torch.device) -> None:
        if self._order.device != device:
            self._order, self._sign = self._order.to(device), self._sign.to(device)
            self._gathers.clear()
            self._signed = None
