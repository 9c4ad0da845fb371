"""Patches that the positions of a convolution see, and sums over positions of their products.

Symbols: B samples in the batch, P positions a sample, O output and I input channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.row_kernels import Geometry, Projection
from hydra_pipe.maths.scratch import Scratch

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# Least number of columns of a fast product. With so many columns, one product is taken for each
# step along the kernel's first dimension.
_ENOUGH_COLUMNS = 32
# Bytes of rows or patches that are written out at once. On a processor they stay in the cache
# until used. An accelerator has no use for small pieces: each is a launch of its own.
_PIECE_BYTES, _DEVICE_PIECE_BYTES = 2 * 2**20, 256 * 2**20
_SCRATCH = Scratch()


@dataclass(frozen=True)
class Patches:
    """Patches of the positions of a convolution, shape (B, P, channels * kernel pixels).

    They are kept as the pixels that they are cut from.

    Args:
        pixels: pixels, shape (B, channels, ...).
        conv: module with the kernel, stride and dilation.
        positions: number of positions along each dimension. P is their product.
        widths: widths of the padding, in the order that F.pad takes.
        mode: mode of the padding, as F.pad names it.
    """

    pixels: Tensor
    conv: Conv | ConvTranspose
    positions: torch.Size
    widths: tuple[int, ...]
    mode: str = "constant"

    @property
    def n_pixels(self) -> int:
        """I: channels times kernel pixels."""
        return int(self.pixels.shape[1] * math.prod(self.conv.kernel_size))

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's patches, written out."""
        return self.n_pixels * self.positions.numel() * self.pixels.element_size()

    @cached_property
    def order(self) -> tuple[int, ...] | None:
        """Order in which `multiply` has the dimensions of a weight of shape (O, channels, *kernel).

        None: the weight's own order.
        """
        rest = range(3, 2 + len(self.positions))
        if not self._in_bands:
            return None
        return (2, 0, *rest, 1) if self._channels_last else (2, 0, 1, *rest)

    def pieces(self) -> Iterator[slice]:
        """Yield slices of samples whose patches are written out at once."""
        return pieces(self.pixels, self.sample_bytes)

    def pieces_of_products(self, row_bytes: int) -> Iterator[slice]:
        """Yield slices of samples for one call of `multiply` each.

        Args:
            row_bytes: bytes of the product of one sample.
        """
        if not self._in_bands:
            return pieces(self.pixels, max(row_bytes, self.sample_bytes))
        _, turns, length = self._lines
        per_step = self.n_pixels // self.conv.kernel_size[0]
        size = per_step * len(turns) * length * math.prod(self.positions[1:])
        return pieces(self.pixels, max(row_bytes, size * self.pixels.element_size()))

    def written_out(self, samples: slice) -> Tensor:
        """Return the patches of some samples, good until other patches are asked for."""
        # A strided copy has been measured at two to four times the speed of F.unfold.
        padded = self._padded(self.pixels[samples], channels_last=False)
        batch, channels = padded.shape[:2]
        of_sample, of_channel, *of_pixel = padded.stride()
        shape = (batch, channels, *self.conv.kernel_size, *self.positions)
        steps = [stride * d for stride, d in zip(of_pixel, self.conv.dilation, strict=True)]
        moves = [stride * s for stride, s in zip(of_pixel, self.conv.stride, strict=True)]
        view = padded.as_strided(
            shape, (of_sample, of_channel, *steps, *moves), padded.storage_offset()
        )
        patches = _SCRATCH.take("patches", shape, padded).copy_(view)
        return patches.view(batch, self.n_pixels, -1).transpose(1, 2)

    def multiply_all(
        self, left: Tensor, out: Tensor, into: Projection | None = None, groups: int = 1
    ) -> Tensor:
        """Write sum_p outer(left[i, p], patch[i, p]) of all samples by the compiled loops.

        Args:
            left: left factors, shape (B, P, O).
            out: memory of the result, shape (B, O * I / groups), or (B, k) with a projection. The
                dimensions of the weight are in its own order.
            into: projection of the rows; None: the rows themselves.
            groups: number of groups of outputs and of channels that are multiplied.

        Returns:
            `out`.
        """
        is_constant = self.mode == "constant"
        pixels = self.pixels if is_constant else F.pad(self.pixels, self.widths, mode=self.mode)
        before = self.widths[-2::-2] if is_constant else (0,) * len(self.positions)
        settings = (self.conv.kernel_size, self.conv.stride, self.conv.dilation)
        geometry = Geometry(*settings, before, tuple(self.positions), groups)
        return row_kernels.convolved(left, pixels, geometry, out, into)

    def multiply(self, samples: slice, left: Tensor, out: Tensor) -> None:
        """Write sum_p outer(left[i, p], patch[i, p]) of some samples.

        The result is a weight with its dimensions in `order`.

        Args:
            samples: samples whose patches are multiplied.
            left: left factors of these samples, shape (b, P, O).
            out: memory of the result, shape (b, O * I).
        """
        batch, _, outputs = left.shape
        lefts, steps = left.transpose(1, 2), self.conv.kernel_size[0]
        if not self._in_bands:
            torch.bmm(lefts, self.written_out(samples), out=out.view(batch, outputs, -1))
            return
        of_steps = out.view(batch, steps, outputs, -1)
        for step, band in enumerate(self._bands(samples)):
            # The product goes to contiguous memory first. torch writes other results one sample
            # after the other.
            product = _SCRATCH.take("product", (batch, outputs, band.shape[2]), left)
            of_steps[:, step] = torch.bmm(lefts, band, out=product)

    def in_weight_order(self, rows: Tensor, outputs: int) -> Tensor:
        """Return a view of the result of `multiply`, with the dimensions in the weight's own order.

        Args:
            rows: result of `multiply`, shape (b, O * I).
            outputs: O.

        Returns:
            A view of shape (b, O, channels, *kernel).
        """
        order = self.order or range(2 + len(self.positions))
        sizes = (outputs, self.pixels.shape[1], *self.conv.kernel_size)
        places = [1 + order.index(dim) for dim in range(len(sizes))]
        return rows.view(len(rows), *(sizes[dim] for dim in order)).permute(0, *places)

    @cached_property
    def _in_bands(self) -> bool:
        """True if only pixels along the kernel's last dimensions are written out.

        Along the first dimension, views are enough.
        """
        steps = self.conv.kernel_size[0]
        return steps == 1 or self.n_pixels // steps >= _ENOUGH_COLUMNS

    @property
    def _channels_last(self) -> bool:
        return self.pixels.stride(1) == 1

    @cached_property
    def _lines(self) -> tuple[list[tuple[int, int]], list[int], int]:
        """Lines of pixels, grouped by place modulo the stride. The lines of a group are neighbours.

        The first entry has, for each step along the kernel's first dimension, the line in its group
        that the first position sees, and the group. Then come the groups that are seen at all, and
        the number of lines of a group that are needed.
        """
        stride, dilation = self.conv.stride[0], self.conv.dilation[0]
        first = [divmod(step * dilation, stride) for step in range(self.conv.kernel_size[0])]
        return first, sorted({turn for _, turn in first}), first[-1][0] + self.positions[0]

    def _bands(self, samples: slice) -> Iterator[Tensor]:
        """Yield the patches of some samples for each step along the kernel's first dimension.

        Each band has the shape (b, P, I / steps). The bands are views of the same memory, good
        until others are asked for. The memory has one copy of the pixels for each step along the
        other dimensions only. For a 3 x 3 kernel it is a third of the memory of all patches.
        """
        padded = self._padded(self.pixels[samples], channels_last=self._channels_last)
        batch, channels = padded.shape[:2]
        of_sample, of_channel, of_line, *of_pixel = padded.stride()
        steps = [stride * d for stride, d in zip(of_pixel, self.conv.dilation[1:], strict=True)]
        moves = [stride * s for stride, s in zip(of_pixel, self.conv.stride[1:], strict=True)]
        of_move = of_line * self.conv.stride[0]
        first, turns, length = self._lines
        kernel, rest = self.conv.kernel_size[1:], self.positions[1:]
        if self._channels_last:
            shape, at = (batch, len(turns), length, *rest, *kernel, channels), 1
            strides = (of_sample, of_move, *moves, *steps, of_channel)
            groups = _SCRATCH.take("bands", shape, padded).unbind(1)
        else:
            shape, at = (batch, channels, *kernel, len(turns), length, *rest), 2 + len(kernel)
            strides = (of_sample, of_channel, *steps, of_move, *moves)
            groups = _SCRATCH.take("bands", shape, padded).unbind(at)
        for turn, group in zip(turns, groups, strict=True):
            n_lines = len(range(turn, padded.shape[2], self.conv.stride[0]))
            there = group.narrow(at, 0, min(length, n_lines))  # no position sees the missing lines
            there.copy_(
                padded.as_strided(there.shape, strides, padded.storage_offset() + turn * of_line)
            )
        for line, turn in first:
            band = groups[turns.index(turn)].narrow(at, line, self.positions[0])
            columns = self.n_pixels // len(first)
            if self._channels_last:
                yield band.view(batch, -1, columns)
            else:
                yield band.view(batch, columns, -1).transpose(1, 2)

    def _padded(self, pixels: Tensor, *, channels_last: bool) -> Tensor:
        """Return `pixels` with their padding, contiguous, or with the channels last in memory."""
        if not any(self.widths) or self.mode != "constant":
            padded = F.pad(pixels, self.widths, mode=self.mode) if any(self.widths) else pixels
            return (
                padded.movedim(1, -1).contiguous().movedim(-1, 1)
                if channels_last
                else padded.contiguous()
            )
        # One copy in place of two, which F.pad and a change of the order of dimensions would take.
        before, after = self.widths[-2::-2], self.widths[::-2]
        sizes = [n + b + a for n, b, a in zip(pixels.shape[2:], before, after, strict=True)]
        batch, channels = pixels.shape[:2]
        if channels_last:
            padded = (
                _SCRATCH.take("padded", (batch, *sizes, channels), pixels).zero_().movedim(-1, 1)
            )
        else:
            padded = _SCRATCH.take("padded", (batch, channels, *sizes), pixels).zero_()
        inner = (slice(b, b + n) for b, n in zip(before, pixels.shape[2:], strict=True))
        padded[(slice(None), slice(None), *inner)] = pixels
        return padded

    def times(self, matrix: Tensor) -> Tensor:
        """Return the patches times the transpose of `matrix`, shape (B, P, k).

        The product is a convolution with the rows of `matrix` as filters. Nothing is written out.

        Args:
            matrix: matrix of shape (k, channels * kernel pixels).
        """
        filters = matrix.reshape(len(matrix), self.pixels.shape[1], *self.conv.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.positions) - 1]
        padded = (
            F.pad(self.pixels, self.widths, mode=self.mode) if any(self.widths) else self.pixels
        )
        found = convolve(padded, filters, stride=self.conv.stride, dilation=self.conv.dilation)
        # The output padding of a transposed convolution may leave room for more positions than
        # there are.
        for dim, n in enumerate(self.positions, start=2):
            found = found.narrow(dim, 0, n)
        return found.flatten(2).transpose(1, 2)

    def norms(self) -> Tensor:
        """Return an upper bound of the norm of each sample's patches, shape (B,).

        A pixel is in no more patches than the kernel has pixels.
        """
        zeros = self.mode == "constant" or not any(self.widths)
        pixels = self.pixels if zeros else F.pad(self.pixels, self.widths, mode=self.mode)
        return norms(pixels.flatten(2)).mul_(math.prod(self.conv.kernel_size) ** 0.5)


def pieces(samples: Tensor, sample_bytes: int) -> Iterator[slice]:
    """Return slices of samples to work on at once, by the device of the samples.

    Args:
        samples: values of the samples, shape (B, ...).
        sample_bytes: bytes that the work takes for one sample.
    """
    n_samples = len(samples)
    piece_bytes = _PIECE_BYTES if samples.device.type == "cpu" else _DEVICE_PIECE_BYTES
    at_once = max(1, piece_bytes // max(1, sample_bytes))
    return (slice(first, min(first + at_once, n_samples)) for first in range(0, n_samples, at_once))


def norms(values: Tensor) -> Tensor:
    """Return the norm of each sample's values, shape (B,).

    The norm is taken as a product, which costs a tenth of torch's own norm.
    """
    flat = (values if values.is_contiguous() else values.transpose(1, 2)).reshape(
        len(values), 1, -1
    )
    if flat.dtype == torch.float16:  # float16 squares overflow from 256 on, and vanish below 2e-4
        flat = flat.float()
    squares: Tensor = torch.bmm(flat, flat.transpose(1, 2))
    return squares.sqrt_().reshape(-1)
