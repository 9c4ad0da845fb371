"""Decoding stored values beside NumPy's own conversion."""

import numpy as np
import pytest

from hydra_pipe.reduction.decoding import decode

EVERY_FLOAT16 = np.arange(65536, dtype=np.uint16).view(np.float16)
FINITE = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]


def test_every_finite_float16_is_decoded_exactly() -> None:
    stored = FINITE.reshape(-1, 31)
    out = np.empty(stored.shape, np.float32)
    decode(stored, [(0, 31, None)], out)
    np.testing.assert_array_equal(out, stored.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(stored))


@pytest.mark.parametrize("weight", [1e-38, 3e-8, 1.0, -7.5, 2.0**14, 2.0**15, 1e30])
@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_values_are_times_their_weights_rounded_once(dtype: str, weight: float) -> None:
    generator = np.random.default_rng(0)
    stored = generator.integers(-127, 128, (300, 1000)).astype(dtype)
    one, two = (np.float32(weight) * generator.random(300, np.float32) for _ in range(2))
    out = np.full(stored.shape, np.nan, np.float32)
    decode(stored, [(0, 10, None), (10, 400, one), (500, 1000, two)], out)
    exact = stored.astype(np.float64)
    np.testing.assert_array_equal(out[:, :10], exact[:, :10])
    np.testing.assert_array_equal(out[:, 10:400], (exact[:, 10:400] * one[:, None]).astype(np.float32))
    np.testing.assert_array_equal(out[:, 500:], (exact[:, 500:] * two[:, None]).astype(np.float32))


def test_a_weight_that_is_not_a_number_shows() -> None:
    out = np.empty((2, 3), np.float32)
    decode(np.ones((2, 3), np.float16), [(0, 3, np.array([1, np.nan], np.float32))], out)
    assert np.isnan(out[1]).all()
    assert (out[0] == 1).all()
