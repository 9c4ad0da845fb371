"""Inputs that are the same, or nearly: digests, short vectors and their cosines."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.likeness import WORD
from hydra_pipe.types import F32, F64, I64

# Training samples and test samples that are compared, at most.
MOST_TRAIN, MOST_TEST = 10_000, 2_000
# Cosine from which inputs are nearly the same.
NEARLY = 0.99
# Pairs to show.
MOST_PAIRS = 12
# Numbers of a vector. More numbers than this are projected at random.
_SIZE = 128
# Numbers of an input that are looked at: a fixed random choice of them.
_MOST_NUMBERS = 4096
# Rows of fewer columns are the same or not: a cosine of few numbers says little.
_FEWEST_COLUMNS = 8
# Greatest ratio of the lengths of two vectors that are nearly the same.
_LENGTHS = 1.25
# Columns of a row that stray further, in standard deviations, count as this far.
_FURTHEST = 3.0
# Names of the tokens and of the targets in samples that are mappings.
_TOKENS, _TARGETS = "input_ids", ("label", "labels")
_N_WORDS = 1 << 14
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Pair:
    """Two inputs that are the same, or nearly.

    Args:
        one: id of a training sample.
        other: id of a training sample, or of a test sample.
        is_test: True if `other` is a test sample.
        is_exact: True if both have the same content.
        cosine: cosine of the vectors of both.
        differ: True if the labels of both are known and differ.
    """

    one: int
    other: int
    is_test: bool
    is_exact: bool
    cosine: float
    differ: bool


@dataclass(frozen=True)
class Duplicates:
    """Pairs of inputs that are the same, or nearly.

    Args:
        pairs: the first pairs: those whose labels differ, then the most alike.
        n_pairs: number of all pairs found.
        n_differ: number of pairs whose labels differ.
        n_across: number of pairs of a training sample and a test sample.
        n_train, n_test: numbers of samples that were compared.
    """

    pairs: list[Pair]
    n_pairs: int
    n_differ: int
    n_across: int
    n_train: int
    n_test: int


class Contents:
    """Contents of inputs, added one by one: a digest of each, and a vector of `_SIZE` numbers."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._numbers: dict[tuple[Any, ...], list[tuple[int, F32]]] = {}
        self._words: list[tuple[int, I64]] = []

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, value: Any) -> None:
        """Add a sample: a text, an array, a tensor, or a mapping or sequence of these.

        Of a pair of input and target only the input counts.
        """
        place, value = len(self._digests), _input(value)
        content = _bytes(value)
        # An input of which nothing is known is like itself only.
        parts = content if content is not None else [f"input {place}".encode()]
        self._digests.append(hashlib.sha256(b"".join(parts)).digest())
        array = _array(value)
        if isinstance(value, str):
            words = [_number(word) for word in WORD.findall(value.lower())]
            self._words.append((place, np.array(words, np.int64)))
        elif array is not None and array.ndim == 1 and array.dtype.kind in "iu":
            self._words.append((place, array.astype(np.int64) % _N_WORDS))
        elif array is not None and array.ndim and array.size >= _FEWEST_COLUMNS:
            key = (array.shape, array.ndim == 1 and array.size <= _SIZE)
            self._numbers.setdefault(key, []).append((place, _short(array, *key)))

    def vectors(self) -> tuple[F32, F32]:
        """Return a unit vector of each input, and its length before, the same for same inputs.

        Pixels are centred by their means over all inputs, columns of rows are standardised, and
        words count less the more inputs have them. Other inputs have random vectors.

        Returns:
            Shapes (input, number) and (input,).
        """
        found = np.zeros((len(self._digests), _SIZE + 1), np.float32)
        for (_, is_row), own in self._numbers.items():
            places, numbers = [place for place, _ in own], np.array([v for _, v in own], np.float64)
            numbers -= numbers.mean(axis=0)
            if is_row:
                spread = numbers.std(axis=0)
                numbers = np.divide(numbers, spread, out=np.zeros_like(numbers), where=spread > 0)
                numbers = np.clip(numbers, -_FURTHEST, _FURTHEST)
            found[places, : numbers.shape[1]] = numbers
        if self._words:
            found[[place for place, _ in self._words], :_SIZE] = _of_words(
                [words for _, words in self._words]
            )
        counted = {place for own in self._numbers.values() for place, _ in own}
        counted |= {place for place, _ in self._words}
        for place in range(len(found)):
            if place not in counted:
                seed = int.from_bytes(self._digests[place][:8], "little")
                found[place, :_SIZE] = np.random.default_rng(seed).standard_normal(_SIZE)
        lengths = np.linalg.norm(found, axis=1)
        # Inputs without a direction are like each other, and like nothing else.
        is_none = lengths <= 1e-6 * max(float(lengths.max(initial=0.0)), 1e-30)
        found[is_none] = 0.0
        found[is_none, _SIZE] = lengths[is_none] = 1.0
        found /= lengths[:, None]
        return found, lengths

    def digests(self) -> I64:
        """Return a number for each input, the same for inputs of the same content."""
        _, codes = np.unique(np.array(self._digests, "S32"), return_inverse=True)
        return codes.astype(np.int64)


def duplicates(
    contents: Contents, train: I64, test: I64, labels: NDArray[Any] | None
) -> Duplicates:
    """Return the pairs of training samples, and of a training and a test sample, that are alike.

    Args:
        contents: contents of the training samples, then of the test samples.
        train: ids of the training samples, shape (train,).
        test: ids of the test samples, shape (test,).
        labels: label of each of them as text, shape (train + test,). None: unknown. An empty
            text is an unknown label.
    """
    (vectors, lengths), digests = contents.vectors(), contents.digests()
    n_train, n = len(train), len(train) + len(test)
    ids = np.concatenate([train, test])
    kept: list[Pair] = []
    n_pairs = n_differ = n_across = 0
    height = max(1, _BLOCK // max(n, 1))
    for start in range(0, n_train, height):
        rows = np.arange(start, min(start + height, n_train))
        cosines = vectors[rows] @ vectors.T
        first, second = np.nonzero((cosines > NEARLY) & (np.arange(n)[None, :] > rows[:, None]))
        ratios = lengths[rows[first]] / lengths[second]
        close = (ratios < _LENGTHS) & (ratios > 1 / _LENGTHS)
        first, second = first[close], second[close]
        cosine = cosines[first, second]
        first = rows[first]
        exact = digests[first] == digests[second]
        differ = np.zeros(len(first), bool)
        if labels is not None:
            known = (labels[first] != "") & (labels[second] != "")
            differ = known & (labels[first] != labels[second])
        n_pairs += len(first)
        n_differ += int(differ.sum())
        n_across += int((second >= n_train).sum())
        best = np.lexsort((-cosine, ~exact, ~differ))[:MOST_PAIRS]
        kept += [
            Pair(
                int(ids[first[i]]),
                int(ids[second[i]]),
                bool(second[i] >= n_train),
                bool(exact[i]),
                float(cosine[i]),
                bool(differ[i]),
            )
            for i in best
        ]
    kept.sort(key=lambda pair: (not pair.differ, not pair.is_exact, -pair.cosine))
    return Duplicates(kept[:MOST_PAIRS], n_pairs, n_differ, n_across, n_train, len(test))


def _input(sample: Any) -> Any:
    """Return the input of a sample, without its target, if it has one."""
    if isinstance(sample, Mapping):
        if _TOKENS not in sample:
            return {name: value for name, value in sample.items() if name not in _TARGETS}
        tokens = sample[_TOKENS]
        return np.asarray(tokens) if isinstance(tokens, list) else tokens
    return sample[0] if isinstance(sample, tuple) and sample else sample


def _bytes(value: Any) -> list[bytes] | None:
    """Return the content of a value as bytes, or None if its kind is not known."""
    array = _array(value)
    if array is not None:
        return [f"{array.dtype}{array.shape}".encode(), np.ascontiguousarray(array).tobytes()]
    if isinstance(value, str):
        return [b"text", value.encode("utf-8", "surrogatepass")]
    if value is None or isinstance(value, bool | int | float):
        return [repr(value).encode()]
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        parts = [b"("]
        for each in value:
            content = _bytes(each)
            if content is None:
                return None
            parts += content
        return [*parts, b")"]
    return None


def _array(value: Any) -> NDArray[Any] | None:
    """Return a tensor or an array of numbers as an array, or None for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iufb":
        return np.asarray(value)
    return None


def _number(word: str) -> int:
    """Return a number for a word, the same in every process."""
    digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "little") % _N_WORDS


def _short(array: NDArray[Any], shape: tuple[int, ...], is_row: bool) -> F32:
    """Return at most `_SIZE` numbers of an array: all of them, or random projections."""
    flat = np.nan_to_num(array.reshape(-1).astype(np.float32), posinf=0.0, neginf=0.0)
    if is_row:
        return flat
    chosen, directions = _projection(flat.size)
    found: F32 = (flat[chosen] @ directions).astype(np.float32)
    return found


@cache
def _projection(size: int) -> tuple[I64, F32]:
    """Return the places of the numbers that are looked at, and the directions."""
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.permutation(size)[:_MOST_NUMBERS])
    return chosen, generator.standard_normal((len(chosen), _SIZE), np.float32)


def _of_words(texts: list[I64]) -> F64:
    """Return random projections of word counts, weighted by the rarity of each word.

    Args:
        texts: numbers of the words of each text.

    Returns:
        Shape (text, number). 0 for a text without a word that others lack.
    """
    having = np.zeros(_N_WORDS)
    for words in texts:
        having[np.unique(words)] += 1
    rarity = np.log(len(texts) / np.maximum(having, 1)) if len(texts) > 1 else np.ones(_N_WORDS)
    directions = np.random.default_rng(1).standard_normal((_N_WORDS, _SIZE), np.float32)
    found = np.zeros((len(texts), _SIZE))
    for place, words in enumerate(texts):
        found[place] = rarity[words] @ directions[words]
    return found
