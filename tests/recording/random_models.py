"""Random small models and loops, recorded: the rows are right, or the recorder refuses.

    PYTHONPATH=. python tests/recording/random_models.py --cases 3000 --first 0 [--jobs 2] [--only
    BLOCK] [--jsonl FILE] [--smallest 12]
    PYTHONPATH=. python tests/recording/random_models.py --seed 17 [--shrink]

A case is made from its seed alone: a stem, up to four blocks of `BLOCKS`, a head, and a loop. It
trains three times: plain; with the slow twin; and recorded. The twin takes from each pass the
gradient of each sample's own loss term, by a backward pass of its own, in the pass over the whole
batch and so with the training's random numbers. What comes of it:

    right      every row of every step is what the twin found, and so is every test gradient (in
               eval mode)
    refused    a HydraError, and every row that was written before it is right
    late       a HydraError after the training, as where test gradients are taken; the rows that
               were written are right
    share      with batch normalisation, a row that is neither of its loss term nor the share at
               the module's output; sums are right
    wrong      a row or a test gradient differs, or rows are of other samples
    scaled     all rows of a step are one number times what they should be, which the step's
               gradient_scale makes up for
    changed    weights or buffers are not those of plain training, bit for bit
    crash      any other exception
    unfit      the case itself does not train: a mistake in this file

The script prints seeds of what is wrong, changed or crashes, with the smallest case that still
does, and how many are refused by block, by part of the loop and by reason. Cases with a block of
`MIXING` should be refused and do not count as refusals.
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from rows import (
    FLOOR,
    HALF_FLOOR,
    HALF_TOLERANCE,
    couples,
    differences,
    gradients_of_losses,
    shares_of_outputs,
    stored_rows,
    stored_tests,
)

from hydra_pipe import Recorder
from hydra_pipe.errors import HydraError

WIDTH, CLASSES, WORDS, N_STEPS = 6, 3, 9, 2
TOLERANCE = 2e-3
RECORDED = ("right", "share")
BAD = ("wrong", "scaled", "changed", "crash", "unfit")

# The twin takes gradients by autograd.grad, which reentrant checkpointing does not know.
_recomputing = True

# ------------------------------------------------------------------------------------------
# blocks
#
# A block takes (sample, position, WIDTH) and gives it. It is made of the number of positions and of
# the batch.

BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {}
# The sample is not where the books look for it, or samples meet. These do not come together with
# batch normalisation in training mode, whose shares are told by their place.
MOVING: set[str] = set()
# These mix samples for good: they are to be refused.
MIXING: set[str] = set()
COUPLING: set[str] = set()
# They make positions more.
LONGER: set[str] = set()


def block(
    name: str, *kinds: set[str]
) -> Callable[[Callable[[int, int], nn.Module]], Callable[[int, int], nn.Module]]:
    def add(make: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
        assert name not in BLOCKS
        BLOCKS[name] = make
        for kind in kinds:
            kind.add(name)
        return make

    return add


class Block(nn.Module):
    """A forward pass as a function of the module and the input, and what it uses."""

    def __init__(self, run: Callable[["Block", Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(n_out: int = WIDTH, **options: bool) -> nn.Linear:
    return nn.Linear(WIDTH, n_out, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.5)


@block("linear")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + torch.tanh(m.f(x)), f=linear())


@block("linear without bias, ReLU in place")
def _(t: int, n: int) -> nn.Module:
    return nn.Sequential(
        linear(bias=False), nn.ReLU(inplace=True), linear(), nn.ReLU(inplace=True), linear()
    )


@block("conv1d")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f(x.transpose(1, 2)).transpose(1, 2),
        f=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2),
    )


@block("conv2d")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.g(F.relu(m.f(x[:, None]), inplace=True))[:, 0],
        f=nn.Conv2d(1, 3, 3, padding=1),
        g=nn.Conv2d(3, 1, 3, padding="same", padding_mode="circular", bias=False),
    )


@block("conv transposed")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2),
        f=nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1),
    )


@block("layer norm")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x) + x, f=nn.LayerNorm(WIDTH))


@block("layer norm, then linear")
def _(t: int, n: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), linear(), nn.GELU())


@block("group norm")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.GroupNorm(2, WIDTH))


@block("instance norm")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f(x.transpose(1, 2)).transpose(1, 2),
        f=nn.InstanceNorm1d(WIDTH, affine=True),
    )


@block("RMS norm")
def _(t: int, n: int) -> nn.Module:
    return nn.RMSNorm(WIDTH)


@block("own RMS norm")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), w=parameter(WIDTH)
    )


class Normed(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2).relu()


@block("batch norm", COUPLING)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.g(m.f(x.transpose(1, 2)).transpose(1, 2)) + x,
        f=nn.BatchNorm1d(WIDTH),
        g=linear(),
    )


@block("batch norm subclass", COUPLING)
def _(t: int, n: int) -> nn.Module:
    return nn.Sequential(Normed(WIDTH), linear())


@block("scale around batch norm", COUPLING)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.w * m.f(x.transpose(1, 2)).transpose(1, 2),
        f=nn.BatchNorm1d(WIDTH),
        w=parameter(WIDTH),
    )


class Evaluating(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


@block("batch norm in eval mode")
def _(t: int, n: int) -> nn.Module:
    norm = Evaluating(WIDTH)
    with torch.no_grad():
        norm.running_mean.normal_()
    return Block(lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=norm.eval())


@block("positions (T,)")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(torch.arange(x.shape[1])), f=nn.Embedding(t + 3, WIDTH))


@block("positions (1, T)")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(torch.arange(x.shape[1])[None]), f=nn.Embedding(t + 3, WIDTH))


@block("positions (B, T)")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f(torch.arange(x.shape[1]).expand(len(x), -1)),
        f=nn.Embedding(t + 3, WIDTH),
    )


@block("positions (1, T), not added")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x * m.f(torch.arange(x.shape[1])[None])[0], f=nn.Embedding(t + 3, WIDTH)
    )


@block("positions as a parameter")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: F.dropout(x + m.w[:, : x.shape[1]], 0.2, m.training),
        w=parameter(1, t + 3, WIDTH),
    )


@block("positions as a parameter (T, D)")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x + m.w[: x.shape[1]]), w=parameter(t + 3, WIDTH), f=linear())


class Offset(nn.Embedding):
    def forward(self, x: Tensor, past: int = 0) -> Tensor:
        return super().forward(x.shape[1] - 1 - torch.arange(x.shape[1]) + past)


@block("embedding subclass with further arguments")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(x, 2), f=Offset(t + 5, WIDTH))


@block("prototypes looked up once")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: (
            x + torch.softmax(x @ m.f(torch.arange(4)[None])[0].T, -1) @ m.f.weight.detach()
        ),
        f=nn.Embedding(4, WIDTH),
    )


@block("prototypes as many as the batch")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + torch.softmax(x @ m.f(torch.arange(n)).T, -1) @ m.g.weight,
        f=nn.Embedding(n, WIDTH),
        g=nn.Linear(WIDTH, n),
    )


@block("prototypes through a linear")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + x @ m.f(m.w).T @ m.w, w=parameter(n, WIDTH), f=linear())


@block("buckets by value")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f((x[..., 0] > 0).long() + 1), f=nn.Embedding(4, WIDTH, padding_idx=1)
    )


@block("scale around dropout")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.w * m.f(x),
        w=parameter(WIDTH),
        f=nn.Sequential(linear(), nn.Dropout(0.3)),
    )


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.7) / 0.7 if self.training else x


@block("scale around drop path")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.d(m.w * m.f(x)), w=parameter(WIDTH), f=linear(), d=DropPath())


@block("class token", LONGER)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.f(torch.cat([m.w.expand(len(x), -1, -1), x], 1)),
        w=parameter(1, 1, WIDTH),
        f=nn.Dropout(0.2),
    )


@block("class token, repeated")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        y = m.f(torch.cat([m.w[None].repeat(len(x), 1, 1), x], 1))
        return y[:, 1:] + y[:, :1]

    return Block(run, w=parameter(1, WIDTH), f=linear())


@block("temperature")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x) * m.w, w=nn.Parameter(torch.tensor(0.8)), f=linear())


@block("exponent of a scalar")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: torch.tanh(x) * m.w.exp() + m.b,
        w=nn.Parameter(torch.tensor(0.1)),
        b=nn.Parameter(torch.zeros(1)),
    )


@block("PReLU")
def _(t: int, n: int) -> nn.Module:
    return nn.Sequential(linear(), nn.PReLU())


@block("dropout")
def _(t: int, n: int) -> nn.Module:
    return nn.Sequential(linear(), nn.Dropout(0.3), linear())


@block("shared module")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(torch.tanh(m.f(x))), f=linear())


@block("shared norm")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x + m.g(m.f(x))), f=nn.LayerNorm(WIDTH), g=linear())


@block("shared, with unlike positions")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x) + m.f(x.mean(1))[:, None], f=linear())


@block("two views in one call", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        one, other = m.f(torch.cat([x, torch.tanh(x)])).chunk(2)
        return one + 0.5 * other

    return Block(run, f=linear())


@block("tied weights")
def _(t: int, n: int) -> nn.Module:
    f, g = linear(), linear()
    g.weight = f.weight
    return Block(lambda m, x: m.g(torch.tanh(m.f(x))), f=f, g=g)


@block("bias of two owners")
def _(t: int, n: int) -> nn.Module:
    f = linear()
    return Block(lambda m, x: m.f(x), f=f, b=f.bias)


@block("cells over time")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), WIDTH), []
        for i in range(x.shape[1]):
            h = m.f(x[:, i], h)
            out.append(h)
        return torch.stack(out, 1)

    return Block(run, f=nn.GRUCell(WIDTH, WIDTH))


@block("LSTM cells over time")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), WIDTH)
        out = []
        for i in range(x.shape[1]):
            h, c = m.f(x[:, i], (h, c))
            out.append(h)
        return torch.stack(out, 1)

    return Block(run, f=nn.LSTMCell(WIDTH, WIDTH))


@block("linear over time")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        h = torch.zeros(WIDTH)
        for part in x.unbind(1):
            h = torch.tanh(m.f(part) + m.g(h) * 0.5)
        return x + h[:, None]

    return Block(run, f=linear(), g=linear(bias=False))


@block("LSTM")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.f(x)[0], f=nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
    )


@block("GRU, time first")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        y, h = m.f(x.transpose(0, 1))
        return y.transpose(0, 1) + h[-1][:, None]

    return Block(run, f=nn.GRU(WIDTH, WIDTH, num_layers=2))


@block("attention")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f(x, x, x, need_weights=False)[0],
        f=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    )


@block("attention, time first, masked")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        mask = torch.ones(len(y), len(y), dtype=torch.bool).triu(1)
        return x + m.f(y, y, y, attn_mask=mask)[0].transpose(0, 1)

    return Block(run, f=nn.MultiheadAttention(WIDTH, 2))


@block("encoder layer")
def _(t: int, n: int) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)


@block("encoder layer with dropout")
def _(t: int, n: int) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.2, batch_first=True, norm_first=True)


@block("own attention")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        q, k, v = m.f(x).chunk(3, -1)
        return x + m.g(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    return Block(run, f=linear(3 * WIDTH), g=linear())


@block("functional linear of another's weight")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: F.linear(torch.tanh(m.f(x)), m.f.weight.T), f=linear())


@block("functional linear of a weight only")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: F.linear(x, m.f.weight, m.f.bias) + x, f=linear())


@block("matrix product")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, w=parameter(WIDTH, WIDTH))


@block("matrix of the batch's size")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + torch.tanh(x @ m.w.T) @ m.w, w=parameter(n, WIDTH))


@block("low rank beside a frozen layer")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        return m.f(x) + m.d(x) @ m.a @ m.b

    f = linear()
    f.requires_grad_(False)
    return Block(run, f=f, a=parameter(WIDTH, 2), b=parameter(2, WIDTH), d=nn.Dropout(0.2))


@block("parameter list")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x @ m.w[0] + m.w[1],
        w=nn.ParameterList([parameter(WIDTH, WIDTH), parameter(WIDTH)]),
    )


@block("parameter dict")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: m.f(x * m.w["own"]), w=nn.ParameterDict({"own": parameter(WIDTH)}), f=linear()
    )


@block("adapter over hidden weight")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.tanh(m.f(x)), f=weight_norm(linear()))


@block("bilinear")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(x, torch.tanh(x)), f=nn.Bilinear(WIDTH, WIDTH, WIDTH))


@block("permuted and undone", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.tanh(m.f(x.flip(0))).flip(0), f=linear())


@block("permuted at random and undone", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        order = torch.randperm(len(x))
        return m.g(m.f(x[order])[order.argsort()])

    return Block(run, f=linear(), g=linear())


@block("sorted by value and undone", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        order = x.detach().sum((1, 2)).argsort()
        return m.f(x[order])[0][order.argsort()]

    return Block(run, f=nn.GRU(WIDTH, WIDTH, batch_first=True))


@block("windows (B k, w)", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        width = 2 if x.shape[1] % 2 == 0 else 1
        y = x.reshape(-1, width, WIDTH)
        return (y + m.g(m.f(y))).reshape(x.shape)

    return Block(run, f=nn.LayerNorm(WIDTH), g=linear())


@block("positions flattened", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x.reshape(-1, WIDTH)).view(x.shape), f=linear())


@block("positions flattened, own parameter", MOVING)
def _(t: int, n: int) -> nn.Module:
    inner = Block(lambda m, x: torch.tanh(x * m.w), w=parameter(WIDTH))
    return Block(lambda m, x: m.f(x.reshape(-1, WIDTH)).view(x.shape), f=inner)


@block("time first", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.tanh(m.f(x.transpose(0, 1))).transpose(0, 1), f=linear())


@block("time first, flattened", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return m.f(y.reshape(-1, WIDTH)).view(y.shape).transpose(0, 1)

    return Block(run, f=linear())


@block("features first", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.w.view(-1, 1, 1).mul(x.permute(2, 0, 1)).permute(1, 2, 0),
        w=parameter(WIDTH),
    )


@block("positions of a mask", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        kept = x[..., 0] > -0.3
        out = torch.zeros_like(x)
        out[kept] = m.f(x[kept]).to(x.dtype)
        return x + out

    return Block(run, f=linear())


@block("experts", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = torch.softmax(m.r(flat), -1)
        best, which = scores.max(-1)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(m.f):
            at = (which == k).nonzero()[:, 0]
            if len(at):
                out = out.index_add(0, at, (expert(flat[at]) * best[at, None]).to(out.dtype))
        return x + out.view(x.shape)

    return Block(run, r=linear(2), f=nn.ModuleList([linear(), linear()]))


@block("chunks of the batch", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.cat([torch.tanh(m.f(part)) for part in x.chunk(2)]), f=linear())


@block("halves with unlike modules", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.cat([m.f(x[:half]), m.g(x[half:])])

    return Block(run, f=linear(), g=linear())


@block("every second sample", MOVING)
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        return x.index_add(0, torch.arange(0, len(x), 2), m.f(x[::2]).to(x.dtype))

    return Block(run, f=linear())


@block("samples one by one", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: torch.stack([torch.tanh(m.g(m.f(one[None])))[0] for one in x]),
        f=linear(),
        g=nn.LayerNorm(WIDTH),
    )


@block("samples one by one, without a batch", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.stack([torch.tanh(m.f(one)) for one in x]), f=linear())


@block("samples one by one, backwards", MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: torch.cat([torch.tanh(m.f(one[None])) for one in x.flip(0)]).flip(0),
        f=linear(),
    )


@block("positions one by one")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: torch.stack([m.f(x[:, i]) for i in range(x.shape[1])], 1), f=linear())


def _checkpointed(reentrant: bool) -> Callable[[Block, Tensor], Tensor]:
    def run(m: Block, x: Tensor) -> Tensor:
        if _recomputing and (x.requires_grad or not reentrant):
            return checkpoint(m.f, x, use_reentrant=reentrant)
        return m.f(x)

    return run


@block("checkpointed")
def _(t: int, n: int) -> nn.Module:
    return Block(
        _checkpointed(False), f=nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.2), linear())
    )


@block("checkpointed, reentrant")
def _(t: int, n: int) -> nn.Module:
    return Block(
        _checkpointed(True), f=nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.2), linear())
    )


class Several(nn.Module):
    """Two outputs, the second made of the first."""

    def __init__(self, *, as_dict: bool) -> None:
        super().__init__()
        self.w, self.f, self.as_dict = parameter(WIDTH), linear(), as_dict

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        one = torch.tanh(x * self.w)
        other = self.f(one) * self.w
        return {"one": one, "other": other} if self.as_dict else (one, other)


@block("tuple of outputs that depend on each other")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        one, other = m.f(x)
        return one + other

    return Block(run, f=Several(as_dict=False))


@block("dict of outputs, one of them used")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x)["other"] + x, f=Several(as_dict=True))


@block("detached branch")
def _(t: int, n: int) -> nn.Module:
    return Block(
        lambda m, x: x + m.f(x.detach()) + m.g(x).detach() + m.h(x),
        f=linear(),
        g=linear(),
        h=linear(),
    )


@block("part of an output used")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(x)[:, :1].tanh(), f=linear())


@block("frozen part")
def _(t: int, n: int) -> nn.Module:
    f, g = linear(), linear()
    f.requires_grad_(False)
    g.bias.requires_grad_(False)
    return Block(lambda m, x: m.g(torch.tanh(m.f(x))), f=f, g=g)


@block("module that is not used")
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x), f=linear(), g=linear())


@block("called without gradients too")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.f(x[:1])
            target = m.f(x).tanh()
        return m.f(x) + target

    return Block(run, f=linear())


@block("user's hook that changes an output")
def _(t: int, n: int) -> nn.Module:
    f = linear()
    f.register_forward_hook(lambda module, args, output: output * 1.5)
    return Block(lambda m, x: torch.tanh(m.f(x)), f=f)


@block("user's hook that adds")
def _(t: int, n: int) -> nn.Module:
    f = nn.LayerNorm(WIDTH)
    f.register_forward_hook(lambda module, args, output: output + args[0])
    return Block(lambda m, x: m.f(x), f=f)


@block("user's hook that changes an input")
def _(t: int, n: int) -> nn.Module:
    f = linear()
    f.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    return Block(lambda m, x: x + m.f(x), f=f)


@block("input changed in place afterwards")
def _(t: int, n: int) -> nn.Module:
    def run(m: Block, x: Tensor) -> Tensor:
        y = m.f(x)
        y += 1.0
        y[:, 0] *= 0.5
        return m.g(y.clone()) + y

    return Block(run, f=linear(), g=nn.LayerNorm(WIDTH))


@block("keyword arguments, None among them")
def _(t: int, n: int) -> nn.Module:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = parameter(WIDTH)

        def forward(
            self, scale: float, x: Tensor | None = None, mask: Tensor | None = None
        ) -> Tensor:
            assert x is not None
            y = x * self.w * scale
            return y if mask is None else y.masked_fill(mask, 0.0)

    def run(m: Block, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1])[:, None] > 1
        return m.f(0.5, x=x, mask=mask) + m.f(2.0, x=x)

    return Block(run, f=Inner())


@block("mean of the batch", MIXING, MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(x - 0.5 * x.mean(0)), f=linear())


@block("attention over the batch", MIXING, MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: x + m.f(x, x, x)[0], f=nn.MultiheadAttention(WIDTH, 2))


@block("mixed samples", MIXING, MOVING)
def _(t: int, n: int) -> nn.Module:
    return Block(lambda m, x: m.f(0.7 * x + 0.3 * x.flip(0)), f=linear())


# ------------------------------------------------------------------------------------------
# cases

STEMS = ("floats", "floats through a linear", "tokens", "images")
HEADS = (
    "mean",
    "first position",
    "each position",
    "tied",
    "tied module",
    "two outputs",
    "dict of outputs",
    "over positions",
    "sum of losses",
)
PASSES = (
    "one",
    "summed",
    "twice",
    "thrown away",
    "without gradients first",
    "evaluated first",
    "adversarial",
    "drawn anew",
)
MODES = ("step", "next_batch", "track")
OPTIMIZERS = ("sgd", "momentum", "adamw")
PRECISIONS = ("fp32", "bf16", "bf16, backward inside")
INTERRUPTED = ("never", "before the pass", "after the pass", "after backward")


@dataclass(frozen=True)
class Case:
    """What is built and how it is trained. The first value of each choice is the plainest."""

    seed: int
    blocks: tuple[str, ...]
    batch: int = 4
    length: int = 3
    stem: str = STEMS[0]
    head: str = HEADS[0]
    mode: str = MODES[0]
    micro: int = 1
    passes: str = PASSES[0]
    optimizer: str = OPTIMIZERS[0]
    interrupted: str = INTERRUPTED[0]
    clip: bool = False
    short: bool = False
    again: bool = False
    zero_first: bool = False
    shuffle: bool = False
    precision: str = PRECISIONS[0]

    @property
    def limits(self) -> tuple[float, float]:
        """Largest difference, and floor, of `rows.differences`."""
        return (TOLERANCE, FLOOR) if self.precision == "fp32" else (HALF_TOLERANCE, HALF_FLOOR)

    def __str__(self) -> str:
        plainest = Case(self.seed, self.blocks)
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(Case)
            if getattr(self, f.name) != getattr(plainest, f.name)
        ]
        return f"seed {self.seed}: {' -> '.join(self.blocks) or 'no blocks'}" + (
            f" ({', '.join(changed)})" if changed else ""
        )


def case_of(seed: int, only: str = "") -> Case:
    """The case of a seed. `only`: a block that it has anyway."""
    rng = random.Random(seed)

    def seldom(choices: tuple[str, ...], usual: float) -> str:
        return choices[0] if rng.random() < usual else rng.choice(choices)

    names = [name for name in BLOCKS if name not in MIXING]
    blocks = rng.choices(names, k=rng.choice((1, 1, 2, 2, 3, 4)))
    if rng.random() < 0.03:
        blocks.append(rng.choice(sorted(MIXING)))
    if only:
        blocks[0] = only
    if any(b in COUPLING for b in blocks) and any(b in MOVING for b in blocks):
        kept = COUPLING if only in COUPLING or (not only and rng.random() < 0.5) else MOVING
        dropped = MOVING if kept is COUPLING else COUPLING
        blocks = [b for b in blocks if b not in dropped]
    batch = rng.choice((1, 2, 3, 4, 4, 4, 5))
    length = batch if rng.random() < 0.25 and batch > 1 else rng.choice((2, 3, 4, 6))
    passes = seldom(PASSES, 0.65)
    if passes == "adversarial" and "checkpointed, reentrant" in blocks:
        passes = PASSES[0]  # torch has no gradient at the input of such a model
    precision = seldom(PRECISIONS, 0.9)
    if "bilinear" in blocks:
        precision = PRECISIONS[0]  # which has no autocast
    return Case(
        seed=seed,
        blocks=tuple(blocks),
        batch=batch,
        length=length,
        stem=rng.choice(STEMS),
        head=seldom(HEADS, 0.4),
        mode=rng.choice(MODES),
        micro=rng.choice((1, 1, 1, 2, 3)),
        passes=passes,
        optimizer=rng.choice(OPTIMIZERS),
        interrupted=seldom(INTERRUPTED, 0.85),
        clip=rng.random() < 0.25,
        short=rng.random() < 0.3,
        again=rng.random() < 0.12,
        zero_first=rng.random() < 0.3,
        shuffle=rng.random() < 0.3,
        precision=precision,
    )


class Model(nn.Module):
    """Stem, blocks, head."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.emb = (
            nn.Embedding(WORDS, WIDTH)
            if case.stem == "tokens" or case.head.startswith("tied")
            else None
        )
        if case.stem == "floats through a linear":
            self.stem: nn.Module = linear()
        elif case.stem == "images":
            self.stem = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList([BLOCKS[name](case.length, case.batch) for name in case.blocks])
        head = case.head
        n_out = 1 if head == "over positions" else WORDS if head == "tied module" else CLASSES
        if head != "tied":
            self.norm = nn.LayerNorm(WIDTH)
            self.out = nn.Linear(WIDTH, n_out)
        if head == "tied module":
            assert self.emb is not None
            self.out.weight = self.emb.weight

    def forward(self, x: Tensor) -> object:
        case = self.case
        if case.stem == "tokens":
            assert self.emb is not None
            x = self.emb(x)
        elif case.stem == "floats through a linear":
            x = self.stem(x)
        elif case.stem == "images":
            x = self.stem(x).flatten(2).transpose(1, 2)
        for module in self.blocks:
            x = module(x)
        if case.again and len(self.blocks):
            x = self.blocks[0](x)
        if case.head == "tied":
            assert self.emb is not None
            return x.tanh() @ self.emb.weight.T
        x = self.norm(x)
        if case.head == "over positions":
            return self.out(x)[..., 0]
        if case.head in ("each position", "tied module"):
            return self.out(x)
        logits = self.out(x[:, 0] if case.head == "first position" else x.mean(1))
        if case.head == "two outputs":
            return logits, x
        if case.head == "dict of outputs":
            return {"logits": logits, "features": x, "n": 3}
        return logits


def loss_of(case: Case, output: object, target: Tensor) -> Tensor:
    """One loss a sample, in float32."""
    if isinstance(output, dict):
        output = output["logits"]
    if case.head == "two outputs":
        assert isinstance(output, tuple)
        return F.cross_entropy(output[0].float(), target, reduction="none") + 0.1 * output[
            1
        ].float().pow(3).mean((1, 2))
    assert isinstance(output, Tensor)
    output = output.float()
    if case.head == "over positions":
        return F.cross_entropy(output, target % output.shape[1], reduction="none")
    if output.dim() == 3:
        targets = (target[:, None] + torch.arange(output.shape[1])) % output.shape[2]
        return F.cross_entropy(output.transpose(1, 2), targets, reduction="none").mean(1)
    return F.cross_entropy(output, target, reduction="none")


def data_of(case: Case, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    targets = torch.randint(0, CLASSES, (n,), generator=generator)
    if case.stem == "tokens":
        return torch.randint(0, WORDS, (n, case.length), generator=generator), targets
    if case.stem == "images":
        return torch.randn(n, 2, 2, 2 * case.length, generator=generator), targets
    return torch.randn(n, case.length, WIDTH, generator=generator), targets


class Interrupted(Exception):  # noqa: N818 - the user's own
    """Raised in the loop, which catches it and goes on."""


@dataclass
class Twin:
    """What the slow twin has found: of each step the rows, by sample."""

    trained: Mapping[str, nn.Parameter]
    steps: list[dict[int, dict[str, Tensor]]] = field(default_factory=list)
    shares: list[dict[int, dict[str, Tensor]]] = field(default_factory=list)
    present: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, model: nn.Module, terms: Callable[[], Tensor], ids: Tensor) -> Tensor:
        """Run a pass, and take each sample's gradient of it."""
        if couples(model):
            state, buffers = torch.get_rng_state(), {k: b.clone() for k, b in model.named_buffers()}
            _add(self.shared, ids, shares_of_outputs(model, terms, len(ids)))
            torch.set_rng_state(state)
            for name, buffer in model.named_buffers():
                buffer.data.copy_(buffers[name])
        found = terms()
        _add(self.present, ids, gradients_of_losses(found, self.trained))
        return found

    def clear(self) -> None:
        self.present, self.shared = {}, {}

    def end_step(self) -> None:
        self.steps.append(self.present)
        self.shares.append(self.shared)
        self.clear()


def _add(into: dict[int, dict[str, Tensor]], ids: Tensor, rows: list[dict[str, Tensor]]) -> None:
    for i, row in zip(ids.tolist(), rows, strict=True):
        before = into.get(i)
        into[i] = (
            row if before is None else {name: before[name] + value for name, value in row.items()}
        )


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01)
    momentum = 0.9 if case.optimizer == "momentum" else 0.0
    return torch.optim.SGD(parameters, lr=0.05, momentum=momentum, weight_decay=0.01)


def train(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder | None = None,
    twin: Twin | None = None,
) -> None:
    """The case's loop: plain, recorded or with the twin."""
    n = n_samples(case)
    x, y = data_of(case, n)
    loader = DataLoader(
        TensorDataset(x, y, torch.arange(n)), batch_size=case.batch, shuffle=case.shuffle
    )
    casting = torch.autocast("cpu", torch.bfloat16, enabled=case.precision != "fp32")
    inside = casting if case.precision == "bf16, backward inside" else contextlib.nullcontext()
    model.train()
    torch.manual_seed(case.seed + 1)

    def zero() -> None:
        optimizer.zero_grad(set_to_none=case.seed % 3 > 0)
        if twin is not None:
            twin.clear()

    def one_pass(
        inputs: Tensor,
        targets: Tensor,
        ids: Tensor,
        share: float,
        weight: float = 1.0,
        *,
        counts: bool = True,
    ) -> Tensor:
        def terms() -> Tensor:
            with casting:
                output = model(inputs)
            return (
                loss_of(case, output, targets)
                * weight
                * (1.0 if case.head == "sum of losses" else share)
            )

        return twin.add(model, terms, ids) if twin is not None and counts else terms()

    def backward(terms: Tensor) -> None:
        with inside:
            terms.sum().backward()

    def micro_batch(
        inputs: Tensor, targets: Tensor, ids: Tensor, share: float, *, interrupt: bool
    ) -> None:
        other = inputs.roll(1, 1) if case.stem != "images" else inputs.flip(-1)
        if interrupt and case.interrupted == "before the pass":
            raise Interrupted
        if case.passes == "thrown away":
            backward(one_pass(inputs, targets, ids, share, counts=False))
            zero()
        elif case.passes == "drawn anew":
            one_pass(inputs, targets, ids, share, counts=False)  # a pass that nothing comes of
        elif case.passes == "without gradients first":
            with torch.no_grad():
                model(inputs)
        elif case.passes == "evaluated first":
            model.eval()
            with torch.no_grad():
                model(other[:1])
            model.train()
        elif case.passes == "adversarial" and case.stem != "tokens":
            leaf = inputs.clone().requires_grad_()
            loss = loss_of(case, model(leaf), targets).sum()
            inputs = inputs + 0.1 * torch.autograd.grad(loss, leaf)[0].sign()
        found = one_pass(inputs, targets, ids, share)
        if interrupt and case.interrupted == "after the pass":
            raise Interrupted
        if case.passes == "summed":
            found = found + one_pass(other, targets, ids, share, weight=0.5)
        backward(found)
        if case.passes == "twice":
            backward(one_pass(other, targets, ids, share))
        if interrupt and case.interrupted == "after backward":
            raise Interrupted

    def groups() -> Iterator[list[tuple[Tensor, ...]]]:
        waiting: list[tuple[Tensor, ...]] = []
        for batch in loader:
            waiting.append(tuple(batch))
            if len(waiting) == case.micro:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def act() -> None:
        if case.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if twin is not None:
            twin.end_step()
        optimizer.step()
        if not case.zero_first:
            zero()

    if case.mode == "track":
        tracked = recorder.track(loader) if recorder is not None else loader
        n_batches, number, stopped = len(loader), 0, False
        for number, (inputs, targets, ids) in enumerate(tracked, 1):
            if case.zero_first and (number - 1) % case.micro == 0:
                zero()
            try:
                micro_batch(
                    inputs, targets, ids, 1 / (case.batch * case.micro), interrupt=number == 2
                )
            except Interrupted:
                zero()
                stopped = True
            has_gradients = any(
                p.grad is not None and bool(p.grad.any()) for p in model.parameters()
            )
            if (number % case.micro == 0 or number == n_batches) and (has_gradients or not stopped):
                act()
        return
    for k, group in enumerate(groups()):
        if case.zero_first:
            zero()
        size = sum(len(ids) for *_, ids in group)
        whole = torch.cat([ids for *_, ids in group])
        naming = (
            recorder.step(whole)
            if recorder is not None and case.mode == "step"
            else contextlib.nullcontext()
        )
        with contextlib.suppress(Interrupted):
            with naming:
                for m, (inputs, targets, ids) in enumerate(group):
                    if recorder is not None and case.mode == "next_batch":
                        recorder.next_batch(ids)
                    micro_batch(
                        inputs, targets, ids, 1 / size, interrupt=k == 1 and m == len(group) - 1
                    )
                act()
            continue
        zero()


def n_samples(case: Case) -> int:
    return case.batch * case.micro * N_STEPS + (1 if case.short else 0)


def built(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(case.seed)
    model = Model(case)
    return model, optimizer_of(case, model)


@dataclass
class Outcome:
    verdict: str
    why: str = ""
    off: float = 0.0


def run(case: Case, *, debug: bool = False) -> Outcome:
    """Train the case three times and compare."""
    global _recomputing
    try:
        plain, _ = made = built(case)
        train(case, *made)
        copied, optimizer = built(case)
        twin = Twin({k: p for k, p in copied.named_parameters() if p.requires_grad})
        _recomputing = False
        train(case, copied, optimizer, twin=twin)
        unlike = _unlike(plain, copied)
        if unlike and "reentrant" not in " ".join(case.blocks):
            return Outcome("unfit", f"the twin trains otherwise: {unlike}")
    except Exception as error:
        if debug:
            raise
        return Outcome("unfit", _line(error))
    finally:
        _recomputing = True
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        refusal, late = None, None
        model, optimizer_used = built(case)
        recorder = None
        try:
            recorder = Recorder(
                model,
                optimizer_used,
                path,
                n_samples=n_samples(case),
                encoding="exact",
                dtype="float32",
            )
            train(case, model, optimizer_used, recorder)
        except HydraError as error:
            refusal = _line(error)
            if debug:
                traceback.print_exc()
        except Exception as error:
            if debug:
                raise
            return Outcome("crash", _line(error))
        if refusal is None:
            moved = _unlike(plain, model)
            if moved:
                return Outcome("changed", moved)
            assert recorder is not None
            test_x, test_y = data_of(replace(case, seed=case.seed + 1), 2)
            try:
                recorder.record_test(
                    [(test_x, test_y)], lambda output, target: loss_of(case, output, target)
                )
                recorder.close()
            except HydraError as error:
                late = _line(error)
                if debug:
                    traceback.print_exc()
            except Exception as error:
                if debug:
                    raise
                return Outcome("crash", f"record_test: {_line(error)}")
            moved = _unlike(plain, model)
            if moved:
                return Outcome("changed", f"by record_test: {moved}")
        outcome = _compared(case, path, twin, complete=refusal is None and late is None)
        if outcome.verdict in ("wrong", "scaled", "share"):
            return replace(
                outcome, why=outcome.why + (f" [{refusal or late}]" if refusal or late else "")
            )
        if refusal is not None:
            return Outcome("refused", refusal)
        if late is not None:
            return Outcome("late", late)
        truth = _test_gradients(case, copied, test_x, test_y)
        tests = stored_tests(path)
        worst = differences(tests, truth)  # which are taken without autocast
        at = max(worst, key=lambda k: worst[k])
        if len(tests) != len(truth) or worst[at] > TOLERANCE:
            return Outcome("wrong", f"test gradient of {at} off by {worst[at]:.1%}", worst[at])
        return replace(outcome, off=max(outcome.off, worst[at]))


def _compared(case: Case, path: Path, twin: Twin, *, complete: bool) -> Outcome:
    """What is stored, beside what the twin has found."""
    if not (path / "gradients.zarr").exists():
        return Outcome("wrong", "nothing was written") if complete else Outcome("right")
    worst_off, verdict, why = 0.0, "right", ""
    tolerance, floor = case.limits
    zeros = {name: torch.zeros(p.numel()) for name, p in twin.trained.items()}
    for step, (truth, shares) in enumerate(zip(twin.steps, twin.shares, strict=True)):
        samples, stored = stored_rows(path, step)
        if not len(samples):
            if complete:
                return Outcome("wrong", f"step {step} has no rows")
            break
        found: dict[int, dict[str, Tensor]] = {}
        _add(
            found,
            torch.from_numpy(samples),
            stored,
        )
        if set(found) < set(truth):
            return Outcome(
                "wrong", f"step {step} has no rows of samples {sorted(set(truth) - set(found))}"
            )
        ids = sorted(found)
        rows = [found[i] for i in ids]
        wanted = [truth.get(i, zeros) for i in ids]
        worst = differences(rows, wanted, floor)
        if shares:
            by_place = differences(rows, [shares.get(i, zeros) for i in ids], floor)
            worst = {k: min(off, by_place[k]) for k, off in worst.items()}
        at = max(worst, key=lambda k: worst[k])
        worst_off = max(worst_off, worst[at])
        if worst[at] > tolerance:
            why = f"step {step}: {at} off by {worst[at]:.1%}"
            if not shares:
                products = sum(
                    float(row[k] @ want[k])
                    for row, want in zip(rows, wanted, strict=True)
                    for k in row
                )
                factor = products / max(
                    sum(float(want[k] @ want[k]) for want in wanted for k in want), 1e-30
                )
                fitting = (
                    [{k: v / factor for k, v in row.items()} for row in rows] if factor else rows
                )
                if max(differences(fitting, wanted, floor).values()) <= tolerance:
                    return Outcome("scaled", f"step {step}: all rows times {factor:.3f}", worst_off)
                return Outcome("wrong", why, worst_off)
            # shares that are neither: those of a parameter whose owner has batch normalisation
            # inside
            size = sum(float(row[at].norm()) for row in wanted)
            missing = float((sum(row[at] for row in rows) - sum(row[at] for row in wanted)).norm())
            if missing > tolerance * max(size, 1e-6):
                return Outcome("wrong", why, worst_off)
            verdict = "share"
    if complete and len(stored_rows(path, len(twin.steps))[0]):
        return Outcome("wrong", f"more than {len(twin.steps)} steps are written")
    return Outcome(verdict, why, worst_off)


def _test_gradients(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    model.eval()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return gradients_of_losses(loss_of(case, model(x), y), trained)


def _unlike(one: nn.Module, other: nn.Module) -> str:
    """The first tensor in which two models differ."""
    for (name, value), same in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        if not torch.equal(value, same):
            return f"{name} differs by {float((value - same).abs().max()):.1e}"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:260]


def shrunk(case: Case, verdict: str) -> Case:
    """The smallest case near `case` with the same verdict."""
    for blocks in (*((name,) for name in case.blocks), case.blocks):  # one step is often enough
        plain = Case(case.seed, blocks, case.batch, case.length)
        if run(plain).verdict == verdict:
            case = plain
            break
    smaller = True
    while smaller:
        smaller = False
        tried = [
            replace(case, blocks=case.blocks[:i] + case.blocks[i + 1 :])
            for i in range(len(case.blocks))
        ]
        plainest = Case(case.seed, case.blocks)
        for f in fields(Case):
            if f.name not in ("seed", "blocks") and getattr(case, f.name) != getattr(
                plainest, f.name
            ):
                tried.append(replace(case, **{f.name: getattr(plainest, f.name)}))
        for other in tried:
            if run(other).verdict == verdict:
                case, smaller = other, True
                break
    return case


# ------------------------------------------------------------------------------------------
# script


def outcome_of(seed: int, only: str = "") -> tuple[Case, Outcome]:
    torch.set_num_threads(1)
    case = case_of(seed, only)
    return case, run(case)


def _shrunk_of(case: Case, verdict: str) -> str:
    torch.set_num_threads(1)
    return str(shrunk(case, verdict))


def _kind_of(why: str) -> str:
    why = re.sub(r"(of|at|:) [\w.]+\.\w+", r"\1 P", why)
    return re.sub(r"\d[\d.,%e-]*", "#", why)[:150]


def report(found: list[tuple[Case, Outcome]]) -> None:
    counted = Counter(outcome.verdict for _, outcome in found)
    print(
        f"\n{len(found)} cases: "
        + ", ".join(f"{n} {verdict}" for verdict, n in counted.most_common())
    )
    fit = [(c, o) for c, o in found if not any(b in MIXING for b in c.blocks)]
    kept = sum(o.verdict in RECORDED for _, o in fit)
    print(
        f"recorded, of {len(fit)} without a block that mixes samples: {kept / max(len(fit), 1):.1%}"
    )
    for c, o in found:
        if o.verdict == "right" and any(b in MIXING for b in c.blocks) and c.batch > 1:
            print(f"mixes samples and is right all the same: {c}")
    parts: dict[str, Counter[str]] = {}
    for case, outcome in found:
        named = set(case.blocks) | {
            f"{k}: {getattr(case, k)}"
            for k in ("stem", "head", "mode", "passes", "interrupted", "optimizer", "precision")
        }
        named |= {
            k for k in ("clip", "short", "again", "zero_first", "shuffle") if getattr(case, k)
        }
        named |= {f"batch: {case.batch}", f"micro: {case.micro}"} | (
            {"as long as the batch"} if case.batch == case.length else set()
        )
        for part in named:
            parts.setdefault(part, Counter())[outcome.verdict] += 1
    print("\nby part, what was not recorded right:")
    for part, of in sorted(
        parts.items(), key=lambda item: -(1 - item[1]["right"] / item[1].total())
    ):
        others = ", ".join(
            f"{n} {verdict}" for verdict, n in of.most_common() if verdict != "right"
        )
        if others:
            print(f"  {1 - of['right'] / of.total():4.0%} of {of.total():4d}  {part}: {others}")
    reasons = Counter((o.verdict, _kind_of(o.why)) for _, o in found if o.verdict != "right")
    print("\nby reason:")
    for (verdict, why), n in reasons.most_common(40):
        seeds = [c.seed for c, o in found if (o.verdict, _kind_of(o.why)) == (verdict, why)][:4]
        print(f"  {n:4d} {verdict}: {why}  (seeds {', '.join(map(str, seeds))})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="one case")
    parser.add_argument(
        "--shrink", action="store_true", help="with --seed: the smallest case of the same verdict"
    )
    parser.add_argument("--only", default="", help="a block that every case has")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--jsonl", type=Path, help="one line a case")
    parser.add_argument(
        "--smallest", type=int, default=12, help="how many of the bad cases are made small"
    )
    parser.add_argument(
        "--blocks", action="store_true", help="each block alone, in the plainest loop"
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if asked.blocks:
        for name in BLOCKS:
            outcome = run(Case(0, (name,)))
            print(f"{outcome.verdict:8s} {name}: {outcome.why[:150]}", flush=True)
        return
    if asked.seed is not None:
        case = case_of(asked.seed, asked.only)
        print(case)
        outcome = run(case, debug=not asked.shrink)
        print(f"{outcome.verdict}: {outcome.why} (off {outcome.off:.1e})")
        if asked.shrink:
            print("smallest:", shrunk(case, outcome.verdict))
        return
    found: list[tuple[Case, Outcome]] = []
    with ProcessPoolExecutor(asked.jobs) as pool:
        seeds = range(asked.first, asked.first + asked.cases)
        for case, outcome in pool.map(outcome_of, seeds, [asked.only] * len(seeds), chunksize=8):
            found.append((case, outcome))
            if asked.jsonl:
                with asked.jsonl.open("a") as file:
                    file.write(
                        json.dumps(
                            {
                                "case": asdict(case),
                                "verdict": outcome.verdict,
                                "why": outcome.why,
                                "off": outcome.off,
                            }
                        )
                        + "\n"
                    )
            if outcome.verdict in BAD:
                print(f"{outcome.verdict}: {case}: {outcome.why}", flush=True)
        report(found)
        bad: dict[str, tuple[Case, Outcome]] = {}
        for case, outcome in found:
            if outcome.verdict in BAD:
                bad.setdefault(
                    f"{outcome.verdict} {_kind_of(outcome.why)} "
                    f"{len(bad) if outcome.verdict == 'wrong' else ''}",
                    (case, outcome),
                )
        chosen = list(bad.values())[: asked.smallest]
        if chosen:
            print("\nsmallest:")
            smallest: dict[str, None] = {}
            for (_, outcome), text in zip(
                chosen,
                pool.map(_shrunk_of, *zip(*[(c, o.verdict) for c, o in chosen], strict=True)),
                strict=True,
            ):
                smallest.setdefault(f"  {outcome.verdict}: {text}")
            print("\n".join(smallest))
    raise SystemExit(1 if any(o.verdict in BAD for _, o in found) else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
