"""Scores of stored rows against gradients written out whole, in float64."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.reduction.column_groups import DenseSegment, FactoredSegment, Segment, segments_of
from hydra_pipe.reduction.scores import Scorer, decode_tests

EVERY = settings(max_examples=100, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Blocks of all encodings; their runs of columns, and the blocks themselves, in any order."""
    widths = st.integers(1, 6)
    runs: list[tuple[str, int]] = []  # what is placed, and how many columns it takes
    kinds: dict[str, str] = {}
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["dense", "sketch", "factored", "factored with bias"]))
        kinds[f"b{i}"] = kind
        runs.append((f"b{i}", draw(widths)))
        if kind.startswith("factored"):
            runs.append((f"b{i} inputs", draw(widths)))
    if draw(st.booleans()):
        runs = draw(st.permutations(runs))
    columns: dict[str, tuple[int, int]] = {}
    first = 0
    for name, width in runs:
        columns[name] = (first, first + width)
        first += width
    blocks = []
    for name, kind in kinds.items():
        outputs = columns[name]
        n = outputs[1] - outputs[0]
        if kind == "dense":
            blocks.append(Block(name, (n,), 0, "dense", outputs))
        elif kind == "sketch":
            blocks.append(Block(name, (3 * n, 5), 0, "sketch", outputs))
        else:
            inputs = columns[f"{name} inputs"]
            blocks.append(Block(name, (n, inputs[1] - inputs[0]), 0, "factored", outputs, inputs))
            if kind == "factored with bias":
                blocks.append(Block(f"{name} bias", (n,), 0, "factored", outputs))
    if draw(st.booleans()):
        blocks = draw(st.permutations(blocks))
    return Layout(tuple(blocks), first, 0)


@dataclass
class Stored:
    """Rows as a store has them.

    Args:
        values: shape (row, feature), as stored.
        scale: shape (row, block), float32.
    """

    values: np.ndarray
    scale: np.ndarray

    def gradient(self, block: Block, index: int, row: int) -> np.ndarray:
        """The gradient of one block in one row written out, float64."""
        left = self.values[row, slice(*block.columns)].astype(np.float64)
        if block.inputs is not None:
            left = np.outer(left, self.values[row, slice(*block.inputs)].astype(np.float64)).ravel()
        return left * np.float64(self.scale[row, index])


def stored_rows(layout: Layout, n_rows: int, dtype: str, generator: np.random.Generator) -> Stored:
    shape = (n_rows, layout.n_features)
    values = (
        generator.integers(-127, 128, shape)
        if dtype == "int8"
        else 1000 * generator.normal(size=shape)
    )
    scale = 10.0 ** generator.uniform(-8, 2, (n_rows, len(layout.blocks)))
    return Stored(values.astype(dtype), scale.astype(np.float32))


@dataclass
class Case:
    layout: Layout
    rows: Stored
    tests: Stored
    weight: np.ndarray

    def scores(self, features_at_once: int) -> np.ndarray:
        segments = segments_of(self.layout)
        tests = decode_tests(self.tests.values, self.tests.scale, segments)
        return Scorer(tests, segments, self.layout.n_features, features_at_once)(
            self.read, self.weight
        )

    def read(self, first: int, last: int) -> np.ndarray:
        assert 0 <= first < last <= self.layout.n_features
        return np.ascontiguousarray(self.rows.values[:, first:last])

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Weighted inner products of the gradients written out, and the sum of the magnitudes of
        their terms.
        """
        alpha = self.weight.astype(np.float64) / self.rows.scale
        result = np.zeros((len(self.weight), len(self.tests.values)))
        size = np.zeros_like(result)
        for i in range(result.shape[0]):
            for j in range(result.shape[1]):
                for b, block in enumerate(self.layout.blocks):
                    terms = (
                        alpha[i, b]
                        * self.rows.gradient(block, b, i)
                        * self.tests.gradient(block, b, j)
                    )
                    result[i, j] += terms.sum()
                    size[i, j] += np.abs(terms).sum()
        return result, size


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(layouts())
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows = stored_rows(
        layout,
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["float16", "int8", "float32"])),
        generator,
    )
    tests = stored_rows(
        layout, draw(st.integers(1, 3)), draw(st.sampled_from(["float16", "float32"])), generator
    )
    weight = (generator.normal(size=rows.scale.shape) * rows.scale).astype(np.float32)
    return Case(layout, rows, tests, weight)


@EVERY
@given(case=cases(), data=st.data())
def test_scores_are_inner_products_of_the_gradients_written_out(
    case: Case, data: st.DataObject
) -> None:
    features_at_once = data.draw(st.integers(1, case.layout.n_features + 2))
    truth, size = case.truth()
    found = case.scores(features_at_once)
    assert found.dtype == np.float32
    assert found.shape == truth.shape
    assert np.all(np.abs(found - truth) <= 1e-5 * size)


@EVERY
@given(case=cases(), data=st.data())
def test_scores_are_independent_of_the_features_read_at_once(
    case: Case, data: st.DataObject
) -> None:
    features_at_once = data.draw(st.integers(1, case.layout.n_features))
    _, size = case.truth()
    whole = case.scores(case.layout.n_features)
    assert np.all(np.abs(case.scores(features_at_once) - whole) <= 1e-5 * size)


@EVERY
@given(case=cases(), data=st.data())
def test_every_column_is_read_once_in_order(case: Case, data: st.DataObject) -> None:
    features_at_once = data.draw(st.integers(1, case.layout.n_features + 2))
    seen: list[tuple[int, int]] = []
    segments = segments_of(case.layout)
    tests = decode_tests(case.tests.values, case.tests.scale, segments)

    def read(first: int, last: int) -> np.ndarray:
        seen.append((first, last))
        return case.read(first, last)

    Scorer(tests, segments, case.layout.n_features, features_at_once)(read, case.weight)
    assert [c for first, last in seen for c in range(first, last)] == list(
        range(case.layout.n_features)
    )
    assert all(last - first <= features_at_once for first, last in seen)


@EVERY
@given(case=cases())
def test_scoring_changes_none_of_its_inputs(case: Case) -> None:
    arrays = (case.rows.values, case.tests.values, case.tests.scale, case.weight)
    before = [array.copy() for array in arrays]
    case.scores(max(1, case.layout.n_features // 2))
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


@EVERY
@given(case=cases())
def test_each_row_has_its_scores_whatever_is_read_beside_it(case: Case) -> None:
    _, size = case.truth()
    together = case.scores(case.layout.n_features)
    for i in range(len(case.weight)):
        rows = Stored(case.rows.values[i : i + 1], case.rows.scale[i : i + 1])
        alone = Case(case.layout, rows, case.tests, case.weight[i : i + 1]).scores(
            case.layout.n_features
        )
        assert np.all(np.abs(alone[0] - together[i]) <= 1e-5 * size[i])


@EVERY
@given(case=cases(), data=st.data())
def test_a_block_of_weight_zero_adds_nothing(case: Case, data: st.DataObject) -> None:
    block = data.draw(st.integers(0, len(case.layout.blocks) - 1))
    case.weight[:, block] = 0.0
    truth, size = case.truth()
    assert np.all(np.abs(case.scores(case.layout.n_features) - truth) <= 1e-5 * size)


def blocks_in(segment: Segment) -> list[int]:
    if isinstance(segment, FactoredSegment):
        return [segment.weight] + ([] if segment.bias is None else [segment.bias])
    return [index for index, _ in segment.blocks]


@EVERY
@given(layouts())
def test_every_block_is_in_one_segment_with_its_own_columns(layout: Layout) -> None:
    segments = segments_of(layout)
    assert sorted(b for segment in segments for b in blocks_in(segment)) == list(
        range(len(layout.blocks))
    )
    for segment in segments:
        if isinstance(segment, FactoredSegment):
            weight = layout.blocks[segment.weight]
            assert (segment.outputs, segment.inputs) == (weight.columns, weight.inputs)
            if segment.bias is not None:
                assert layout.blocks[segment.bias].columns == weight.columns
        else:
            assert [layout.blocks[index].columns for index, _ in segment.blocks] == [
                c for _, c in segment.blocks
            ]


@EVERY
@given(layouts())
def test_neighbouring_dense_blocks_are_one_segment(layout: Layout) -> None:
    segments = segments_of(layout)
    assert [s.last_column for s in segments] == sorted(s.last_column for s in segments)
    dense = [s for s in segments if isinstance(s, DenseSegment)]
    for segment in dense:
        bounds = [c for _, c in segment.blocks]
        assert segment.columns == (bounds[0][0], bounds[-1][1])
        assert all(before[1] == after[0] for before, after in pairwise(bounds))
    starts = {s.columns[0] for s in dense}
    assert not any(s.columns[1] in starts for s in dense)


@pytest.mark.parametrize("features_at_once", [1, 2, 3, 5, 7])
def test_a_late_gradient_of_1e_minus_8_is_scored_to_full_precision(features_at_once: int) -> None:
    layout = Layout(
        (
            Block("w", (2, 3), 0, "factored", (0, 2), (2, 5)),
            Block("b", (2,), 0, "factored", (0, 2)),
            Block("n", (2,), 0, "dense", (5, 7)),
        ),
        7,
        0,
    )
    generator = np.random.default_rng(0)
    values = 2.0**14 * (1 + generator.random((2, 7)))  # nothing cancels
    tiny = np.float32(1e-8 * 2.0**-14)
    scale = np.array([[tiny * np.float32(2.0**-14), tiny, tiny]], np.float32)
    stored = [Stored(row[None].astype(np.float16), scale) for row in values]
    case = Case(layout, *stored, weight=scale)
    truth, _ = case.truth()
    assert truth[0, 0] > 1e-16
    np.testing.assert_allclose(case.scores(features_at_once), truth, rtol=1e-6)
