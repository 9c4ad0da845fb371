"""Gradients as sums over positions of outer products: what layer rules yield before anything is multiplied.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input channels or features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.maths.scratch import Scratch

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# Of rows or patches that are written out at once: they stay in the cache until they are used.
_PIECE_BYTES = 2 * 2**20
_SCRATCH = Scratch()


@dataclass(frozen=True)
class Factors:
    """Gradients of B samples as sums over positions of outer products: row_i = sum_p outer(left[i, p], right[i, p]).

    Args:
        left: gradient at the output, shape (B, P, O).
        given_right: what it is multiplied by, shape (B, P, I), or the patches that it consists of; None stands for 1, as in a bias.
    """

    left: Tensor
    given_right: "Tensor | Patches | None"

    @cached_property
    def right(self) -> Tensor | None:
        """What `left` is multiplied by, written out."""
        if isinstance(self.given_right, Patches):
            return self.given_right.written_out(slice(0, len(self.left))).clone()
        return self.given_right

    def right_times(self, matrix: Tensor) -> Tensor:
        """`right` times the transpose of `matrix`, which has the shape (k, I); shape (B, P, k)."""
        if isinstance(self.given_right, Patches):
            return self.given_right.times(matrix)
        assert self.given_right is not None
        return self.given_right @ matrix.T

    def norms(self) -> Tensor:
        """Upper bound of each row's norm, and of the rounding in it where its terms cancel, shape (B,).

        |sum_p outer(l_p, r_p)| <= |l| |r| over all positions (Cauchy-Schwarz).
        """
        left = _norms(self.left)
        if self.given_right is None:
            return left.mul_(self.n_positions**0.5)
        return left.mul_(self.given_right.norms() if isinstance(self.given_right, Patches) else _norms(self.given_right))

    @property
    def n_inputs(self) -> int:
        """I; 1 where `right` is None."""
        if self.given_right is None:
            return 1
        return self.given_right.n_pixels if isinstance(self.given_right, Patches) else self.given_right.shape[-1]

    @property
    def n_positions(self) -> int:
        return self.left.shape[1]

    def rows(self) -> Tensor:
        """The gradients written out, shape (B, O * I), or (B, O) where `right` is None."""
        if self.given_right is None:
            return self.left.sum(1)
        rows = self.left.new_empty(len(self.left), self.left.shape[2], self.n_inputs)
        for samples in self._samples():
            self._multiply(samples, rows[samples])
        return rows.flatten(1)

    def pieces(self) -> Iterator[Tensor]:
        """The rows of a few samples after the other, where `right` is not None. Each is good until the next is asked for."""
        for samples in self._samples():
            shape = (samples.stop - samples.start, self.left.shape[2], self.n_inputs)
            rows = _SCRATCH.take("rows", shape, self.left)
            self._multiply(samples, rows)
            yield rows.flatten(1)

    def _samples(self) -> Iterator[slice]:
        right = self.given_right
        row_bytes = self.left.shape[2] * self.n_inputs * self.left.element_size()
        return _pieces(len(self.left), max(row_bytes, right.sample_bytes if isinstance(right, Patches) else 0))

    def _multiply(self, samples: slice, out: Tensor) -> None:
        right = self.given_right
        assert right is not None
        written_out = right.written_out(samples) if isinstance(right, Patches) else right[samples]
        torch.bmm(self.left[samples].transpose(1, 2), written_out, out=out)


@dataclass(frozen=True)
class Patches:
    """What each position of a convolution sees, shape (B, P, channels * kernel pixels), kept as the pixels they are cut from.

    Args:
        pixels: shape (B, channels, ...).
        conv: whose kernel, stride and dilation it is.
        positions: the number of them along each dimension; P is their product.
        widths: of the padding, in the order that F.pad takes.
        mode: of the padding, as F.pad names it.
    """

    pixels: Tensor
    conv: Conv | ConvTranspose
    positions: torch.Size
    widths: tuple[int, ...]
    mode: str = "constant"

    @property
    def n_pixels(self) -> int:
        """Channels times kernel pixels: I."""
        return int(self.pixels.shape[1] * math.prod(self.conv.kernel_size))

    @property
    def sample_bytes(self) -> int:
        """Of one sample's patches, written out."""
        return self.n_pixels * self.positions.numel() * self.pixels.element_size()

    def pieces(self) -> Iterator[slice]:
        """Samples whose patches are written out at once, one piece after the other."""
        return _pieces(len(self.pixels), self.sample_bytes)

    def written_out(self, samples: slice) -> Tensor:
        """The patches of some samples, good until others are asked for."""
        # a strided copy, measured at two to four times the speed of F.unfold
        padded = self._padded(self.pixels[samples])
        batch, channels = padded.shape[:2]
        of_sample, of_channel, *of_pixel = padded.stride()
        shape = (batch, channels, *self.conv.kernel_size, *self.positions)
        steps = [stride * d for stride, d in zip(of_pixel, self.conv.dilation, strict=True)]
        moves = [stride * s for stride, s in zip(of_pixel, self.conv.stride, strict=True)]
        view = padded.as_strided(shape, (of_sample, of_channel, *steps, *moves), padded.storage_offset())
        patches = _SCRATCH.take("patches", shape, padded).copy_(view)
        return patches.view(batch, self.n_pixels, -1).transpose(1, 2)

    def _padded(self, pixels: Tensor) -> Tensor:
        """`pixels` with their padding, contiguous."""
        if not any(self.widths):
            return pixels.contiguous()
        if self.mode != "constant":
            return F.pad(pixels, self.widths, mode=self.mode).contiguous()
        # at once what F.pad and a copy into the usual order of dimensions would do one after the other
        before, after = self.widths[-2::-2], self.widths[::-2]
        sizes = [n + b + a for n, b, a in zip(pixels.shape[2:], before, after, strict=True)]
        padded = _SCRATCH.take("padded", (*pixels.shape[:2], *sizes), pixels).zero_()
        inner = (slice(b, b + n) for b, n in zip(before, pixels.shape[2:], strict=True))
        padded[(slice(None), slice(None), *inner)] = pixels
        return padded

    def times(self, matrix: Tensor) -> Tensor:
        """The patches times the transpose of `matrix`, which has the shape (k, channels * kernel pixels); shape (B, P, k).

        A convolution with the rows of `matrix` as filters: nothing is written out.
        """
        filters = matrix.reshape(len(matrix), self.pixels.shape[1], *self.conv.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.positions) - 1]
        padded = F.pad(self.pixels, self.widths, mode=self.mode) if any(self.widths) else self.pixels
        found = convolve(padded, filters, stride=self.conv.stride, dilation=self.conv.dilation)
        # the output padding of a transposed convolution may leave room for more positions than there are
        for dim, n in enumerate(self.positions, start=2):
            found = found.narrow(dim, 0, n)
        return found.flatten(2).transpose(1, 2)

    def norms(self) -> Tensor:
        """Upper bound of the norm of each sample's patches, shape (B,): a pixel is in no more than the kernel has pixels."""
        zeros = self.mode == "constant" or not any(self.widths)
        pixels = self.pixels if zeros else F.pad(self.pixels, self.widths, mode=self.mode)
        return _norms(pixels.flatten(2)).mul_(math.prod(self.conv.kernel_size) ** 0.5)


# What a rule yields for one parameter: factors, or the rows themselves, shape (B, numel).
Contribution = Factors | Tensor


def _pieces(n_samples: int, sample_bytes: int) -> Iterator[slice]:
    at_once = max(1, _PIECE_BYTES // max(1, sample_bytes))
    return (slice(first, min(first + at_once, n_samples)) for first in range(0, n_samples, at_once))


def _norms(values: Tensor) -> Tensor:
    """Norm of each sample's values, shape (B,): as a product, which costs a tenth of torch's own norm."""
    flat = (values if values.is_contiguous() else values.transpose(1, 2)).reshape(len(values), 1, -1)
    if flat.dtype == torch.float16:  # whose squares overflow from 256 on, and vanish below 2e-4
        flat = flat.float()
    squares: Tensor = torch.bmm(flat, flat.transpose(1, 2))
    return squares.sqrt_().reshape(-1)
