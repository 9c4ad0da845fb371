"""What is lost between a gradient and what is stored of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_pipe.maths.quantise import DTYPES, Dtype, part_scale, scale_in_place

# Powers of two of a row's largest element: 2^-110 is 8e-34.
MAGNITUDES = st.lists(st.floats(-110, 100), min_size=1, max_size=8)
# How far the elements of a row are apart: 2^28 is what float16 holds to full precision.
SPREADS = st.sampled_from([0.0, 4.0, 20.0, 40.0])


def rows_of(magnitudes: list[float], spread: float, seed: int, width: int = 33) -> Tensor:
    """One row for each magnitude: its largest element 2^magnitude, the others down to 2^-spread of
    that.
    """
    generator = np.random.default_rng(seed)
    shape = (len(magnitudes), width)
    below = spread * generator.random(shape)
    below[:, 0] = 0.0
    exponents = np.array(magnitudes)[:, None] - below
    values = np.exp2(exponents) * generator.choice([-1.0, 1.0], shape)
    return torch.from_numpy(values.astype(np.float32))


def store(rows: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """What is stored of `rows`, and its scales."""
    scale = part_scale(rows.abs().amax(1), dtype)
    stored = torch.empty(rows.shape, dtype=getattr(torch, dtype))
    scaled = rows.clone()
    scale_in_place(scaled, scale, dtype)
    stored.copy_(scaled)
    return stored, scale


def read_back(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.double() * scale.double()[:, None]


@settings(max_examples=100, deadline=None)
@given(magnitudes=MAGNITUDES, spread=SPREADS, seed=st.integers(0, 1000))
def test_float16_loses_half_a_unit_in_the_last_place_of_each_element(
    magnitudes: list[float], spread: float, seed: int
) -> None:
    rows = rows_of(magnitudes, spread, seed)
    stored, scale = store(rows, "float16")
    error = (read_back(stored, scale) - rows.double()).abs()
    largest = rows.double().abs().amax(1, keepdim=True)
    full = rows.double().abs() >= largest * 2.0**-28
    assert bool((error[full] <= 2.0**-11 * rows.double().abs()[full]).all())
    # below that float16's own steps end: 2^-24 of a scaled element that is less than 2^15
    assert bool((error <= torch.maximum(2.0**-11 * rows.double().abs(), largest * 2.0**-39)).all())


@settings(max_examples=100, deadline=None)
@given(magnitudes=MAGNITUDES, spread=SPREADS, seed=st.integers(0, 1000))
def test_int8_loses_half_a_step_of_the_largest_element(
    magnitudes: list[float], spread: float, seed: int
) -> None:
    rows = rows_of(magnitudes, spread, seed)
    stored, scale = store(rows, "int8")
    error = (read_back(stored, scale) - rows.double()).abs()
    half_a_step = rows.double().abs().amax(1, keepdim=True) / 127 / 2
    assert bool((error <= half_a_step * (1 + 1e-4)).all())
    assert bool((stored.abs().amax(1) == 127).all())


@settings(max_examples=50, deadline=None)
@given(
    magnitudes=st.lists(st.floats(-120, 120), min_size=1, max_size=8),
    spread=SPREADS,
    seed=st.integers(0, 1000),
)
def test_float32_loses_nothing(magnitudes: list[float], spread: float, seed: int) -> None:
    rows = rows_of(magnitudes, spread, seed)
    stored, scale = store(rows, "float32")
    assert torch.equal(stored, rows)
    assert bool((scale == 1).all())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=8))
def test_float16_scales_are_powers_of_two(largest: list[float]) -> None:
    mantissa, _ = torch.frexp(part_scale(torch.tensor(largest), "float16"))
    assert bool((mantissa == 0.5).all())


@settings(max_examples=50, deadline=None)
@given(MAGNITUDES)
def test_the_largest_element_lands_at_the_top_of_float16(magnitudes: list[float]) -> None:
    largest = torch.from_numpy(np.exp2(magnitudes)).float()
    scaled = largest / part_scale(largest, "float16")
    assert bool(((scaled >= 2.0**14) & (scaled < 2.0**15)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_a_tiny_factor_times_that_of_an_ordinary_one_is_a_number(dtype: Dtype) -> None:
    tiny, ordinary = torch.tensor([0.0, 1e-45, 1e-30, 1e-20]), torch.full((4,), 0.01)
    assert bool((part_scale(tiny, dtype) * part_scale(ordinary, dtype) > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_from_1e_minus_30_to_1e4_underflows(dtype: Dtype) -> None:
    magnitude = 10.0 ** torch.arange(-30.0, 5.0)
    rows = magnitude[:, None] * torch.tensor([[0.0, 0.5, 1.0, -0.25]])
    read = read_back(*store(rows, dtype))
    torch.testing.assert_close(
        read / magnitude[:, None], (rows / magnitude[:, None]).double(), rtol=0, atol=1 / 127
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_are_stored_as_zeros_with_a_finite_scale(
    dtype: Dtype, loss_dtype: torch.dtype
) -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=loss_dtype)
    stored, scale = store(rows, dtype)
    assert stored[0].tolist() == [0, 0]
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert bool((stored[1] != 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_stored_the_same_whatever_stands_beside_it(dtype: Dtype) -> None:
    rows = rows_of([-20.0, 0.0, 13.0], 20.0, 0)
    together, scales = store(rows, dtype)
    for i in range(len(rows)):
        alone, scale = store(rows[i : i + 1], dtype)
        assert torch.equal(alone[0], together[i])
        assert scale[0] == scales[i]


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_a_wider_array_are_scaled_and_the_others_are_left_as_they_were(
    dtype: Dtype,
) -> None:
    rows = rows_of([0.0, -10.0], 4.0, 0)
    expected, scale = store(rows, dtype)
    table = torch.full((2, 50), 7.0)
    table[:, 5:38] = rows
    scale_in_place(table[:, 5:38], scale, dtype)
    assert torch.equal(table[:, 5:38].to(expected.dtype), expected)
    assert bool((table[:, :5] == 7).all())
    assert bool((table[:, 38:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_any_float_dtype_are_stored_with_float32_scales(
    model_dtype: torch.dtype, dtype: Dtype
) -> None:
    rows = torch.tensor([[1.0, -0.5, 0.25], [96.0, 3.0, 0.0]], dtype=model_dtype)
    stored, scale = store(rows, dtype)
    assert scale.dtype == torch.float32
    atol = 96 / 127 / 2 * (1 + 1e-4) if dtype == "int8" else 0
    torch.testing.assert_close(read_back(stored, scale), rows.double(), rtol=0, atol=atol)
