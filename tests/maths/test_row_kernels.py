"""The compiled loops of rows: for any shape they give what plain loops in float64 and torch give,
touch nothing else, and refuse what does not fit. Each of the loops' levels, whatever the processor.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.grids import Grids
from hydra_pipe.maths.row_kernels import Geometry
from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.per_sample.factors import Factors, rows_of
from hydra_pipe.per_sample.registry import rule_for

LOOPS: Any = row_kernels.compiled
pytestmark = pytest.mark.skipif(LOOPS is None, reason="the loops of rows were not compiled")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["plain", "avx2"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        before = LOOPS.use(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    LOOPS.use(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def by_loops(left: Tensor, pixels: Tensor, geometry: Geometry) -> Tensor:
    """The definition, in float64: one position and one step of the kernel after the other."""
    batch, _, outputs = left.shape
    groups, channels = geometry.groups, pixels.shape[1] // geometry.groups
    rows = np.zeros((batch, outputs, channels, *geometry.kernel))
    g, x = left.double().numpy(), pixels.double().numpy()
    for o, c in product(range(outputs), range(channels)):
        of_channel = x[:, o * groups // outputs * channels + c]
        for k in product(*map(range, geometry.kernel)):
            for number, p in enumerate(product(*map(range, geometry.positions))):
                at = tuple(
                    p[d] * geometry.stride[d] + k[d] * geometry.dilation[d] - geometry.before[d]
                    for d in range(len(k))
                )
                if all(0 <= a < n for a, n in zip(at, pixels.shape[2:], strict=True)):
                    rows[(slice(None), o, c, *k)] += g[:, number, o] * of_channel[:, *at]
    return torch.from_numpy(rows).flatten(1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from([1, 2, 3]), batch=st.integers(0, 3), last=st.booleans())
@pytest.mark.usefixtures("level")
def test_rows_are_those_of_the_definition(
    data: st.DataObject, dims: int, batch: int, last: bool
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    groups = data.draw(st.sampled_from([1, 1, 2]))
    outputs, channels = (groups * data.draw(st.integers(1, n)) for n in (7, 3))
    geometry = Geometry(
        sizes(1, 3), sizes(1, 4), sizes(1, 3), sizes(0, 2), sizes(0 if dims < 3 else 1, 4), groups
    )
    left = random(batch, outputs, int(np.prod(geometry.positions)), seed=1).transpose(1, 2)
    # more pixels than the positions see, or fewer: what lies outside is zero
    pixels = random(batch, channels, *sizes(1, 9), seed=2)
    if last:
        left, pixels = left.contiguous(), pixels.movedim(1, -1).contiguous().movedim(-1, 1)
    width = outputs * channels // groups * int(np.prod(geometry.kernel))
    around = torch.full((batch, width + 5), 7.0)
    out = row_kernels.convolved(left, pixels, geometry, around[:, 3:-2])  # not aligned
    torch.testing.assert_close(out.double(), by_loops(left, pixels, geometry), **CLOSE)
    assert bool((around[:, :3] == 7).all())
    assert bool((around[:, -2:] == 7).all())


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
)
@pytest.mark.usefixtures("level")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rows_of_convolutions_are_gradients_of_batches_of_one(
    data: st.DataObject, dims: int, transposed: bool, batch: int
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    groups = data.draw(st.sampled_from([1, 2]))
    options: dict[str, Any] = {"dilation": sizes(1, 2), "groups": groups, "bias": False}
    if transposed:
        options |= {"stride": (stride := sizes(1, 3)), "padding": sizes(0, 2)}
        options["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(stride, options["dilation"], strict=True)
        )
    else:
        mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        same = data.draw(st.booleans())
        options |= {"padding_mode": mode, "padding": "same" if same else sizes(0, 2)}
        options["stride"] = 1 if same else sizes(1, 4)
    make = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    torch.manual_seed(0)
    module = make(2 * groups, 5 * groups, sizes(1, 3), **options)
    inputs = random(batch, 2 * groups, *sizes(6, 8))
    output = module(inputs)
    gradient = random(*output.shape, seed=1)
    found = rule_for(module)(module, (inputs,), {}, gradient, ["weight"])["weight"]
    ones = [
        torch.autograd.grad(module(x[None]), module.weight, g[None])[0].flatten()
        for x, g in zip(inputs, gradient, strict=True)
    ]
    torch.testing.assert_close(rows_of(found), torch.stack(ones), **CLOSE)


@pytest.mark.parametrize("n_columns", [1, 7, 16, 50])
@pytest.mark.usefixtures("level")
def test_projections_are_those_of_torch(n_columns: int) -> None:
    module = nn.Conv2d(6, 16, 3, stride=2, padding=1, bias=False)
    inputs = random(5, 6, 9, 9)
    gradient = random(*module(inputs).shape, seed=1)
    factors, exact = (
        rule_for(module)(module, (inputs.to(dtype),), {}, gradient.to(dtype), ["weight"])["weight"]
        for dtype in (torch.float32, torch.float64)
    )
    assert isinstance(factors, Factors)
    rows = rows_of(exact)  # torch's own operators: the loops take no float64
    sketch = Sketch(0, "w", (16, 6, 3, 3), n_columns)
    torch.testing.assert_close(
        factors.by_loops(lambda: sketch.columns).double(), sketch(rows), **CLOSE
    )
    torch.testing.assert_close(sketch(rows.float()).double(), sketch(rows), **CLOSE)
    grids = Grids(0, "w", (16, 54), (2, 3), 6 * n_columns)
    torch.testing.assert_close(
        factors.by_loops(lambda: grids.columns).double(), grids(rows), **CLOSE
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    positions=st.integers(0, 5),
    outputs=st.integers(4, 9),
    inputs=st.integers(4, 9),
    side=st.sampled_from([(4, 4), (1, 4), (3, 2)]),
    last=st.booleans(),
)
def test_elements_of_products_are_those_of_the_rows(
    batch: int, positions: int, outputs: int, inputs: int, side: tuple[int, int], last: bool
) -> None:
    left, right = random(batch, positions, outputs), random(batch, positions, inputs, seed=1)
    if not last:  # features that are no neighbours
        left, right = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (left, right))
    grids = Grids(0, "w", (outputs, inputs), side, 5 * side[0] * side[1])
    rows = torch.bmm(left.double().transpose(1, 2), right.double()).flatten(1)
    torch.testing.assert_close(grids.of_factors(left, right).double(), grids(rows), **CLOSE)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4), channels=st.integers(1, 19), positions=st.integers(1, 30),
    shift=st.sampled_from([0.0, 100.0]), last=st.booleans(),
)  # fmt: skip
def test_sums_by_channel_are_those_of_float64(
    batch: int, channels: int, positions: int, shift: float, last: bool
) -> None:
    x = random(batch, channels, positions) + shift
    g = random(batch, channels, positions, seed=1)
    in_memory = [v.mT.contiguous().mT if last else v for v in (x, g)]
    rows, bounds = row_kernels.channel_sums(*in_memory, 1e-3)
    of_channel = (x.double() - x.double().mean((0, 2), keepdim=True)).transpose(0, 1)
    variance = of_channel.square().mean((1, 2), keepdim=True)
    normed = of_channel.div((variance + 1e-3).sqrt()).transpose(0, 1)
    terms = torch.stack([g * normed, g.double()])
    torch.testing.assert_close(rows.double(), terms.sum(3), rtol=1e-4, atol=3e-4)
    norms = terms.flatten(2).norm(dim=2) * positions**0.5
    torch.testing.assert_close(bounds.double(), norms, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    left, pixels = random(9, 900, 16), random(9, 8, 30, 30, seed=1)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), (30, 30))
    before = torch.get_num_threads()
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        found.append(row_kernels.convolved(left, pixels, geometry, torch.empty(9, 1152)))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    padded = F.pad(pixels, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    patches = padded.permute(0, 2, 3, 1, 4, 5).reshape(9, 900, 72)
    truth = torch.bmm(left.transpose(1, 2).double(), patches.double()).flatten(1)
    torch.testing.assert_close(found[1].double(), truth, rtol=1e-4, atol=1e-4)


def test_other_dtypes_are_left_to_torch() -> None:
    assert row_kernels.takes(torch.ones(2))
    assert not row_kernels.takes(torch.ones(2), torch.ones(2).double())
    assert not row_kernels.takes(torch.ones(2).bfloat16())
    assert not row_kernels.takes(torch.ones(2, device="meta"))


F32 = np.zeros((2, 4, 3), np.float32)
ONE = (1,)
ROWS = np.zeros((2, 9), np.float32)


def call(**changed: Any) -> None:
    arguments = {
        "left": F32, "pixels": np.zeros((2, 3, 4), np.float32), "kernel": ONE, "stride": ONE,
        "dilation": ONE, "before": (0,), "positions": (4,), "groups": 1, "out": ROWS,
        "sketch": None, "grids": None, "threads": 1,
    }  # fmt: skip
    LOOPS.products(*(arguments | changed).values())


NUMBERS = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"left": F32.astype(np.float64)}, TypeError),
        ({"left": F32[0]}, ValueError),
        ({"left": F32[:1]}, ValueError),
        ({"left": F32[:, :3]}, ValueError),
        ({"pixels": np.zeros((1, 3, 4), np.float32)}, ValueError),
        ({"pixels": np.zeros((2, 3, 4, 1, 1, 1), np.float32)}, ValueError),
        ({"kernel": (0,)}, ValueError),
        ({"kernel": (1, 1)}, ValueError),
        ({"kernel": [1]}, ValueError),
        ({"stride": (0,)}, ValueError),
        ({"before": (-1,)}, ValueError),
        ({"positions": (2**40,)}, ValueError),
        ({"kernel": (2**30,)}, ValueError),
        ({"kernel": (2**20,), "dilation": (2**20,)}, OverflowError),
        ({"groups": 2}, ValueError),
        ({"groups": 0}, ValueError),
        ({"out": ROWS[:, :8]}, ValueError),
        ({"out": ROWS[:, ::2]}, ValueError),
        ({"out": ROWS[:1]}, ValueError),
        ({"sketch": (np.zeros(9, np.int32), np.ones(8, np.int8), 1)}, ValueError),
        ({"sketch": (np.zeros(9, np.int32), np.ones(9, np.int8), 0)}, ValueError),
        ({"sketch": (np.full(9, 9, np.int32), np.ones(9, np.int8), 1)}, IndexError),
        ({"grids": (NUMBERS, NUMBERS, 2, 2, 1.0), "out": ROWS[:, :7]}, ValueError),
        ({"grids": (NUMBERS, NUMBERS, 0, 2, 1.0), "out": ROWS[:, :8]}, ValueError),
        ({"grids": (NUMBERS[:3], NUMBERS, 2, 2, 1.0), "out": ROWS[:, :8]}, ValueError),
        ({"grids": (NUMBERS + 3, NUMBERS, 2, 2, 1.0), "out": ROWS[:, :8]}, IndexError),
        ({"grids": (NUMBERS - 1, NUMBERS, 2, 2, 1.0), "out": ROWS[:, :8]}, IndexError),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    call()
    with pytest.raises(error):
        call(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient": F32[:1]},
        {"inputs": np.zeros((2, 3, 4), np.float32).transpose(0, 2, 1)},
        {"inputs": np.zeros((2, 4, 6), np.float32)[..., ::2]},
        {"rows": np.zeros((2, 2, 3), np.float32)},
        {"bounds": np.zeros((2, 3), np.float32)},
    ],
)
def test_sums_by_channel_that_do_not_fit_are_refused(changed: dict[str, Any]) -> None:
    arguments = {
        "inputs": F32, "gradient": F32, "eps": 1e-5, "rows": np.zeros((2, 2, 4), np.float32),
        "bounds": np.zeros((2, 2), np.float32), "threads": 1,
    }  # fmt: skip
    LOOPS.channel_sums(*arguments.values())
    with pytest.raises(ValueError, match=r"do not fit|has 2 rows"):
        LOOPS.channel_sums(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"tokens": np.zeros((2, 4), np.int32)}, TypeError),
        ({"tokens": np.zeros((2, 3), np.int64)}, ValueError),
        ({"tokens": np.full((2, 4), 3)}, IndexError),
        ({"tokens": np.full((2, 4), -1)}, IndexError),
        ({"values": F32.astype(np.float64)}, TypeError),
        ({"values": np.zeros((2, 4, 6), np.float32)[..., ::2]}, ValueError),
        ({"values": np.zeros((2, 4, 2), np.float32)}, ValueError),
        ({"values": np.zeros((2, 4, 0), np.float32)}, ValueError),
        ({"columns": np.zeros(8, np.int32)}, ValueError),
        ({"columns": np.full(9, 5, np.int32)}, IndexError),
        ({"columns": np.full(9, -1, np.int32)}, IndexError),
        ({"run": 0}, ValueError),
        ({"run": 2}, ValueError),
        ({"out": np.zeros((1, 5), np.float32)}, ValueError),
        ({"out": np.zeros((2, 10), np.float32)[:, ::2]}, ValueError),
    ],
)
def test_lines_that_do_not_fit_are_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    arguments = {
        "tokens": np.zeros((2, 4), np.int64), "values": F32, "columns": np.zeros(9, np.int32),
        "signs": np.ones(9, np.int8), "run": 1, "out": np.zeros((2, 5), np.float32), "threads": 1,
    }  # fmt: skip
    LOOPS.lines(*arguments.values())
    with pytest.raises(error):
        LOOPS.lines(*(arguments | changed).values())


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no loops called sse9"):
        LOOPS.use("sse9")
