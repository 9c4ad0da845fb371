"""Inputs that are alike: held against all pairs, for pixels, rows and texts."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.reporting.alike import _chosen
from hydra_pipe.reporting.drawing import Cells, Text
from hydra_pipe.reporting.duplicates import MOST_PAIRS, MOST_TRAIN, Contents, Duplicates, duplicates
from hydra_pipe.reporting.likeness import common_words, differing_columns, shared_words
from hydra_pipe.reporting.pieces import marked


def found_in(
    values: Sequence[object], n_test: int = 0, labels: list[str] | None = None
) -> Duplicates:
    contents = Contents()
    for value in values:
        contents.add(value)
    n_train = len(values) - n_test
    texts = None if labels is None else np.array(labels, object)
    return duplicates(contents, np.arange(n_train), np.arange(n_test), texts)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), kind=st.sampled_from(["pixels", "row", "tokens", "text"]))
def test_inputs_of_the_same_content_are_found_and_no_others_are_called_the_same(
    seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    shape = {"pixels": (3, 9, 7), "row": (11,), "tokens": (20,), "text": (20,)}[kind]
    is_float = kind in ("pixels", "row")
    many = rng.normal(size=(30, *shape)) if is_float else rng.integers(0, 500, (30, *shape))
    copies = rng.integers(0, 30, 12)
    arrays = [*many, *many[copies]]
    values = [" ".join(map(str, a)) for a in arrays] if kind == "text" else arrays
    labels = [str(n) for n in rng.integers(0, 2, len(values))]
    found = found_in(values, 5, labels)
    same = {
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if i < len(values) - 5 and np.array_equal(arrays[i], arrays[j])
    }
    assert found.n_pairs == len(same)
    assert found.n_across == sum(j >= len(values) - 5 for _, j in same)
    assert found.n_differ == sum(labels[i] != labels[j] for i, j in same)
    assert len(found.pairs) == min(len(same), MOST_PAIRS)
    assert all(pair.is_exact for pair in found.pairs)
    assert [pair.differ for pair in found.pairs] == sorted(
        (pair.differ for pair in found.pairs), reverse=True
    )


def test_inputs_that_are_nearly_the_same_are_found_by_their_cosine() -> None:
    rng = np.random.default_rng(0)
    pictures = [torch.tensor(rng.random((1, 28, 28))) for _ in range(40)]
    noisy = pictures[3] + 0.01 * torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0))
    (pair,) = found_in([*pictures, noisy]).pairs
    assert (pair.one, pair.other, pair.is_exact, pair.differ) == (3, 40, False, False)
    centred = np.stack([p.numpy().ravel() for p in [*pictures, noisy]])
    centred -= centred.mean(axis=0)
    one, other = centred[3], centred[40]
    true = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert abs(pair.cosine - true) < 0.005


def test_inputs_without_content_are_like_each_other_and_unknown_ones_like_nothing() -> None:
    blank = np.zeros((2, 4, 4))
    found = found_in([blank, blank.copy(), np.ones((2, 4, 4)), object(), object()])
    assert [(pair.one, pair.other) for pair in found.pairs] == [(0, 1)]
    structures = [{"ids": torch.tensor([1, 2]), "more": [3.5, None]} for _ in range(2)]
    (pair,) = found_in([*structures, {"ids": torch.tensor([1, 3]), "more": [3.5, None]}]).pairs
    assert pair.is_exact
    assert found_in([]).n_pairs == 0


def test_targets_beside_the_inputs_do_not_count() -> None:
    row, other = torch.arange(9.0), torch.ones(9)
    assert found_in([(row, 0), (row.clone(), 1), (other, 0)]).pairs[0].is_exact
    texts = [{"text": "a b", "label": 0}, {"text": "a b", "label": 1}, {"text": "a c", "label": 1}]
    assert [(pair.one, pair.other) for pair in found_in(texts).pairs] == [(0, 1)]
    tokens = [{"input_ids": [5, 8, 13], "labels": n, "attention_mask": [1] * 3} for n in range(2)]
    assert found_in([*tokens, {"input_ids": [5, 8, 14], "labels": 0}]).pairs[0].is_exact


def test_rows_are_alike_in_direction_and_in_length() -> None:
    rng = np.random.default_rng(0)
    rows = [*rng.normal(size=(50, 12))]
    near, twice = rows[4] + 0.01, np.mean(rows, axis=0) + 2 * (rows[5] - np.mean(rows, axis=0))
    pairs = {(pair.one, pair.other) for pair in found_in([*rows, near, twice]).pairs}
    assert pairs == {(4, 50)}
    # Few columns have like directions by chance.
    assert found_in([*rng.normal(size=(200, 2))]).n_pairs == 0


def test_of_many_samples_some_are_compared_those_that_look_wrong_among_them() -> None:
    n = MOST_TRAIN + 500
    first = np.array([7, n - 1, n + 3])
    chosen = _chosen(n, first)
    assert len(np.unique(chosen)) == MOST_TRAIN
    assert {7, n - 1} <= set(chosen.tolist())
    assert chosen.max() < n
    assert _chosen(5, first).tolist() == list(range(5))


def test_words_that_two_texts_share_are_marked_but_not_those_of_all_texts() -> None:
    texts = [Text(f"what is word{i} ?", 20) for i in range(12)]
    common = common_words(texts)
    assert common == {"what", "is"}
    assert common_words(texts[:5]) == frozenset()
    shared = shared_words(Text("What is Rust <b>?", 17), Text("rust is what", 12), common)
    assert shared == {"rust"}
    assert marked("What is Rust <b>?", shared) == "What is <mark>Rust</mark> &lt;b&gt;?"
    assert shared_words(None, texts[0], common) == frozenset()


def test_columns_in_which_rows_differ_are_named() -> None:
    one = Cells((("age", "3"), ("job", "cook")), 2)
    assert differing_columns(one, Cells((("age", "4"), ("job", "cook")), 2)) == [("age", "3", "4")]
    assert differing_columns(one, one) == []
    assert differing_columns(one, Cells((("age", "3"), ("town", "x")), 2)) is None
    assert differing_columns(one, Text("x", 1)) is None
