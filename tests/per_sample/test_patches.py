"""Products with the patches of a convolution: what is multiplied in bands is what would come of all
patches written out.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.per_sample.factors import Factors
from hydra_pipe.per_sample.patches import Patches
from hydra_pipe.per_sample.registry import rule_for


def factors_of(module: nn.Module, inputs: Tensor) -> Factors:
    with torch.no_grad():
        output = module(inputs)
        grad_output = torch.randn(
            output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype
        )
        (factors,) = rule_for(module)(module, (inputs,), {}, grad_output, ["weight"]).values()
    assert isinstance(factors, Factors)
    return factors


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    last=st.booleans(),
    batch=st.integers(1, 4),
)
def test_rows_are_the_products_with_all_patches_in_any_order(
    data: st.DataObject, dims: int, transposed: bool, last: bool, batch: int
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    # a stride larger than the kernel leaves out lines; few channels are written out whole
    options = {"stride": sizes(1, 4), "dilation": sizes(1, 3), "padding": sizes(0, 2)}
    if not transposed:
        options["padding_mode"] = data.draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
    channels = data.draw(st.sampled_from([2, 9, 24]))
    sides = (3, channels) if transposed else (channels, 3)
    module = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(
        *sides, sizes(1, 3), **options
    ).double()
    inputs = torch.randn(
        batch,
        sides[0],
        *sizes(7, 9),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    factors = factors_of(
        module, inputs.movedim(1, -1).contiguous().movedim(-1, 1) if last else inputs
    )
    assert factors.right is not None
    truth = torch.bmm(factors.left.transpose(1, 2), factors.right).flatten(1)
    torch.testing.assert_close(factors.rows(), truth, rtol=1e-10, atol=1e-10)
    sketch = Sketch(0, "w", module.weight.shape, data.draw(st.integers(1, 20)))
    found = torch.cat([sketch(rows, factors.order) for rows in factors.pieces()])
    torch.testing.assert_close(found, sketch(truth), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("last", [False, True])
def test_wide_convolutions_write_out_a_third_of_their_patches(last: bool) -> None:
    inputs = torch.randn(2, 16, 12, 12)
    factors = factors_of(
        nn.Conv2d(16, 4, 3, padding=1),
        inputs.to(memory_format=torch.channels_last) if last else inputs,
    )
    patches = factors.given_right
    assert isinstance(patches, Patches)
    assert patches.order == ((2, 0, 3, 1) if last else (2, 0, 1, 3))
    bands = list(patches._bands(slice(0, 2)))
    assert [band.shape for band in bands] == [(2, 144, 48)] * 3
    assert len({band.untyped_storage().data_ptr() for band in bands}) == 1
