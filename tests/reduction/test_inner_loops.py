"""The inner loops, compiled and in NumPy, beside plain float64 and NumPy's own conversion."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.reduction import kernels
from hydra_pipe.reduction.kernels import FEW_TESTS, Weighted, Workspace, add_products, decode, fold

EVERY_FLOAT16 = np.arange(65536, dtype=np.uint16).view(np.float16)
FINITE = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]
EVERY = settings(max_examples=100, deadline=None)
COMPILED = pytest.param(
    kernels.compiled,
    id="compiled",
    marks=pytest.mark.skipif(
        kernels.compiled is None, reason="needs a C compiler at installation, and x86-64 with AVX2"
    ),
)
only_compiled = pytest.mark.parametrize("form", [COMPILED], indirect=True)


@pytest.fixture(params=[COMPILED, pytest.param(None, id="NumPy")], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    monkeypatch.setattr(kernels, "compiled", request.param)
    found: ModuleType | None = request.param
    return found


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
    np.testing.assert_array_equal(
        out[:, 10:400], (exact[:, 10:400] * one[:, None]).astype(np.float32)
    )
    np.testing.assert_array_equal(out[:, 500:], (exact[:, 500:] * two[:, None]).astype(np.float32))


def test_a_weight_that_is_not_a_number_shows() -> None:
    out = np.empty((2, 3), np.float32)
    decode(np.ones((2, 3), np.float16), [(0, 3, np.array([1, np.nan], np.float32))], out)
    assert np.isnan(out[1]).all()
    assert (out[0] == 1).all()


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, list[Weighted], np.ndarray]:
    """A window of stored rows that is part of a wider array, runs of columns with strided weights
    or none, and exact values.
    """
    n, before, after = draw(st.integers(0, 11)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(["float16", "int8", "float32"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = generator.integers(-127, 128, (n, before + sum(widths) + after))
    stored = (whole.astype(dtype) / (1 if dtype == "int8" else 8)).astype(dtype)[
        :, before : before + sum(widths)
    ]
    weights = generator.standard_normal((n, len(widths))).astype(np.float32)
    columns: list[Weighted] = []
    exact = stored.astype(np.float64)
    first = 0
    for i, width in enumerate(widths):
        weight = weights[:, i] if draw(st.booleans()) else None
        columns.append((first, first + width, weight))
        if weight is not None:
            exact[:, first : first + width] *= weight[:, None]
        first += width
    return stored, columns, exact


@EVERY
@given(rows(), st.integers(0, FEW_TESTS + 4), st.integers(0, 2**32 - 1))
def test_products_are_added_to_the_scores(
    given: tuple[np.ndarray, list[Weighted], np.ndarray], n_tests: int, seed: int
) -> None:
    stored, columns, exact = given
    generator = np.random.default_rng(seed)
    tests = generator.standard_normal((n_tests, stored.shape[1] + 2)).astype(np.float32)[:, 1:-1]
    scores = generator.standard_normal((len(stored), n_tests)).astype(np.float32)
    wanted = scores + exact @ tests.T.astype(np.float64)
    bound = np.abs(scores) + np.abs(exact) @ np.abs(tests.T.astype(np.float64))
    add_products(stored, columns, tests, scores, Workspace())
    assert (np.abs(scores - wanted) <= (len(tests.T) + 4) * 2.0**-24 * bound + 1e-30).all()


@EVERY
@given(rows(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_rows_are_added_to_the_sums_of_their_samples(
    given: tuple[np.ndarray, list[Weighted], np.ndarray], n_samples: int, seed: int
) -> None:
    stored, columns, exact = given
    generator = np.random.default_rng(seed)
    places = generator.integers(-2, n_samples, len(stored))
    whole = generator.standard_normal((n_samples, stored.shape[1] + 2)).astype(np.float32)
    wanted, bound = whole.astype(np.float64), np.abs(whole).astype(np.float64)
    for place, row in zip(places, exact, strict=True):
        if place >= 0:
            wanted[place, 1:-1] += row
            bound[place, 1:-1] += np.abs(row)
    fold(stored, columns, places, whole[:, 1:-1], Workspace())
    # what is beside the sums stays as it is
    assert (np.abs(whole - wanted) <= 12 * 2.0**-24 * bound).all()


@only_compiled
def test_scores_of_a_row_do_not_depend_on_the_rows_and_tests_beside_it(form: ModuleType) -> None:
    generator = np.random.default_rng(0)
    stored = generator.standard_normal((7, 123)).astype(np.float16)
    tests = generator.standard_normal((5, 123)).astype(np.float32)
    together = np.zeros((7, 5), np.float32)
    form.dots(stored, None, tests, together)
    alone = np.zeros((7, 5), np.float32)
    for k in range(7):
        for j in range(5):
            form.dots(stored[k : k + 1], None, tests[j : j + 1], alone[k : k + 1, j : j + 1])
    np.testing.assert_array_equal(together, alone)


def test_a_sample_beyond_the_sums_is_refused() -> None:
    sums = np.zeros((2, 3), np.float32)
    with pytest.raises(IndexError):
        fold(np.ones((2, 3), np.float16), [(0, 3, None)], np.array([0, 2]), sums, Workspace())


HALF, SINGLE = np.ones((4, 3), np.float16), np.ones((4, 3), np.float32)
WEIGHT, PLACES = np.ones(4, np.float32), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.decode(HALF, None, np.ones((4, 2), np.float32)), ValueError),
        (lambda c: c.decode(HALF, None, np.ones((3, 3), np.float32)), ValueError),
        (lambda c: c.decode(HALF, None, HALF.copy()), TypeError),
        (lambda c: c.decode(HALF, None, np.ones((4, 6), np.float32)[:, ::2]), ValueError),
        (lambda c: c.decode(HALF, WEIGHT[:3], SINGLE.copy()), ValueError),
        (lambda c: c.decode(HALF, WEIGHT.astype(np.float64), SINGLE.copy()), TypeError),
        (lambda c: c.decode(HALF[0], None, SINGLE.copy()), ValueError),
        (lambda c: c.decode(HALF.astype(np.int16), None, SINGLE.copy()), TypeError),
        (
            lambda c: c.decode(
                HALF, None, np.frombuffer(SINGLE.tobytes(), np.float32).reshape(4, 3)
            ),
            ValueError,
        ),
        (lambda c: c.decode(HALF, None, "nothing"), TypeError),
        (lambda c: c.decode(HALF), TypeError),
        (
            lambda c: c.dots(HALF, None, np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)),
            ValueError,
        ),
        (
            lambda c: c.dots(HALF, None, np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)),
            ValueError,
        ),
        (
            lambda c: c.dots(HALF, None, np.ones((2, 3), np.float16), np.ones((4, 2), np.float32)),
            TypeError,
        ),
        (lambda c: c.fold(HALF, WEIGHT, PLACES[:3], SINGLE.copy()), ValueError),
        (lambda c: c.fold(HALF, WEIGHT, PLACES.astype(np.int32), SINGLE.copy()), TypeError),
        (lambda c: c.fold(HALF, WEIGHT, PLACES, np.ones((4, 2), np.float32)), ValueError),
    ],
)
@only_compiled
def test_what_does_not_fit_together_is_refused(
    form: ModuleType, call: Callable[[ModuleType], None], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(form)
