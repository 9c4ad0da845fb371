"""float16 against twice as many int8 columns, for models of any make."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import CHOICES, EVERY, LENET5, MLP, SPARE_COLUMNS, models, other

from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.quantise import part_scale, scale_in_place
from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.plan.dtype_choice import ROUNDING_VARIANCE, choose_recording, expected_variance
from hydra_pipe.plan.layout import Block, EncodingChoice, Parameter, choose_layout

RESNET_LIKE = other(
    "conv", (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)
)


@pytest.mark.parametrize("model", [LENET5, MLP])
def test_float16_stays_where_it_holds_everything_without_loss(model: list[Parameter]) -> None:
    layout, dtype = choose_recording(model, "auto", 4096, seed=0)
    assert dtype == "float16"
    assert layout == choose_layout(model, "auto", 4096, seed=0)


@pytest.mark.parametrize("dim", [300, 1024, 4096])
def test_int8_with_twice_the_columns_is_taken_where_float16_would_be_projected(dim: int) -> None:
    layout, dtype = choose_recording(RESNET_LIKE, "auto", dim, seed=0)
    assert dtype == "int8"
    assert dim < layout.n_features <= 2 * dim


def test_int8_is_taken_where_it_makes_an_exact_recording_of_a_projected_one() -> None:
    layout, dtype = choose_recording(LENET5, "auto", 2000, seed=0)
    assert dtype == "int8"
    assert all(block.exact for block in layout.blocks)


def test_projections_so_wide_that_int8_would_lose_more_stay_float16() -> None:
    huge = other("table", (10**6, 10), (10**6, 10))
    layout, dtype = choose_recording(huge, "auto", 10**6, seed=0)
    assert not any(block.exact for block in layout.blocks)
    assert dtype == "float16"


@EVERY
@given(
    model=models(),
    choice=CHOICES,
    spare=SPARE_COLUMNS,
    dtype=st.sampled_from(["float16", "int8", "float32"]),
)
def test_a_dtype_that_was_asked_for_is_kept(
    model: list[Parameter], choice: EncodingChoice, spare: int, dtype
) -> None:
    dim = len(model) + spare
    assert choose_recording(model, choice, dim, 3, dtype) == (
        choose_layout(model, choice, dim, 3),
        dtype,
    )


@EVERY
@given(model=models(), choice=CHOICES, spare=SPARE_COLUMNS)
def test_the_choice_takes_no_more_bytes_and_expects_no_more_error(
    model: list[Parameter], choice: EncodingChoice, spare: int
) -> None:
    dim = len(model) + spare
    layout, dtype = choose_recording(model, choice, dim, seed=3)
    plain = choose_layout(model, choice, dim, seed=3)
    if dtype == "int8":
        assert choice == "auto"
        assert layout.n_features <= 2 * dim
        assert expected_variance(layout, "int8") < expected_variance(plain, "float16")
    else:
        assert layout == plain


@pytest.mark.parametrize(
    "block",
    [
        Block("w", (30, 40), 0, "sketch", (0, 64)),
        Block("w", (30, 40), 0, "sketch", (0, 299)),
        Block("w", (30, 40), 0, "kron", (0, 50), kron=(30, 40, 5, 10)),
        Block("w", (30, 40), 0, "kron", (0, 240), kron=(30, 40, 30, 8)),
    ],
)
def test_no_measured_variance_of_a_projection_is_above_its_bound(block: Block) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1200, generator=generator, dtype=torch.float64)
    outer = torch.outer(
        torch.randn(30, generator=generator).double(), torch.randn(40, generator=generator).double()
    ).flatten()
    for a, b in ((x, y), (x, x), (outer, outer)):
        products = []
        for seed in range(300):
            width = block.columns[1]
            if block.kron:
                projection = Kron(seed, "w", block.shape, *block.kron[2:], block.kron[:2])
            else:
                projection = Sketch(seed, "w", block.shape, width)
            p, q = projection(torch.stack([a, b]))
            products.append((p @ q).item())
        # the sample variance of 300 draws is off by a tenth or so
        assert np.var(products) <= 1.3 * block.variance * (a @ a * (b @ b)).item()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_no_measured_error_of_rounding_is_above_its_bound(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for heavy in (1, 3, 7):  # ever heavier tails
        rows = torch.randn(2000, 50, generator=generator) ** heavy
        others = torch.randn(2000, 50, generator=generator) ** heavy
        scale = part_scale(rows.abs().amax(1), dtype)
        stored = rows.clone()
        scale_in_place(stored, scale, dtype)
        rounded = (stored.to(getattr(torch, dtype)).float() * scale[:, None]).double()
        error = ((rounded - rows.double()) * others.double()).sum(1)
        relative = error / (rows.double().norm(dim=1) * others.double().norm(dim=1))
        assert relative.square().mean() <= ROUNDING_VARIANCE[dtype]
