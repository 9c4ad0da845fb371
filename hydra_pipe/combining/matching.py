"""Samples of several runs, matched by their keys, or by their numbers where no run has keys."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, shown
from hydra_pipe.store.data.combined import ABSENT
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.types import I64

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class OfRun:
    """Samples of a run that are to be matched with those of others.

    Args:
        run: path of the run, for messages.
        n: number of samples.
        labels: their labels. None: unknown.
        keys: their keys. None: they have none.
    """

    run: object
    n: int
    labels: NDArray[Any] | None
    keys: Keys | None


@dataclass(frozen=True)
class Matched:
    """Samples of all runs together.

    Attributes:
        rows: number of each sample in each run, int64 (run, sample). -1: the run lacks it.
        labels: labels of the samples. None: unknown.
        keys: keys of the samples. None: they have none.
    """

    rows: I64
    labels: NDArray[Any] | None
    keys: Sequence[str] | None


class JoinedKeys(Sequence[str]):
    """Keys of several runs one after the other, read as they are asked for.

    Args:
        parts: keys of a run, and the ids of its samples that count, ascending.
    """

    def __init__(self, parts: Sequence[tuple[Keys, I64]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(ids) for _, ids in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        wanted = range(len(self))[at]
        if isinstance(wanted, int):
            return self[wanted : wanted + 1][0]
        found: list[str] = []
        for (keys, ids), end in zip(self._parts, self._ends.tolist(), strict=True):
            start = end - len(ids)
            own = ids[max(0, wanted.start - start) : max(0, wanted.stop - start)]
            found += keys.take(own).tolist()
        return found

    def __iter__(self) -> Iterator[str]:
        for keys, ids in self._parts:
            if len(ids) == len(keys):
                yield from keys
            else:
                counts = np.zeros(len(keys), bool)
                counts[ids] = True
                yield from (key for key, own in zip(keys, counts, strict=True) if own)


def matched(runs: Sequence[OfRun], what: str) -> Matched:
    """Match the samples of runs.

    The samples are in the order of the first run that has them.

    Args:
        runs: samples of each run.
        what: word for the samples, for messages: "training samples" or "test samples".

    Raises:
        RunError: some of the runs have keys; or no run has, and their numbers differ; or the labels
            of a sample differ.
        StoreError: keys are damaged.
    """
    without = [one for one in runs if one.keys is None]
    if without and len(without) < len(runs):
        keyed = next(one for one in runs if one.keys is not None)
        raise RunError(
            f"{keyed.run} has keys of its {what}, and {without[0].run} has none: combine runs that "
            "all have keys, or none"
        )
    if without:
        found = _by_number(runs, what)
    else:
        found = _by_key([one.keys for one in runs if one.keys is not None])
    labels = _labels(runs, found.rows, what)
    return Matched(found.rows, labels, found.keys)


def _by_number(runs: Sequence[OfRun], what: str) -> Matched:
    first = runs[0]
    for one in runs:
        if one.n != first.n:
            raise RunError(
                f"{first.run} has {first.n:,} {what} and {one.run} has {one.n:,}, without keys: "
                "only keys can tell which are the same (docs/combining.md)"
            )
    return Matched(np.tile(np.arange(first.n), (len(runs), 1)), None, None)


def _by_key(keys: Sequence[Keys]) -> Matched:
    rows: list[I64] = []
    parts: list[tuple[Keys, I64]] = []
    known, ids = np.zeros(0, f"S{_DIGEST_BYTES}"), np.zeros(0, np.int64)
    for own in keys:
        digests = _digests(own)
        at = np.minimum(np.searchsorted(known, digests), max(0, len(known) - 1))
        is_known = known[at] == digests if len(known) else np.zeros(len(digests), bool)
        new = np.flatnonzero(~is_known)
        of_own = np.empty(len(digests), np.int64)
        of_own[is_known] = ids[at[is_known]]
        of_own[new] = np.arange(len(known), len(known) + len(new))
        known, ids = np.concatenate([known, digests[new]]), np.concatenate([ids, of_own[new]])
        order = np.argsort(known, kind="stable")
        known, ids = known[order], ids[order]
        rows.append(of_own)
        parts += [(own, new)] if len(new) else []
    found = np.full((len(keys), len(known)), ABSENT, np.int64)
    for run, of_own in enumerate(rows):
        found[run, of_own] = np.arange(len(of_own))
    return Matched(found, None, JoinedKeys(parts))


def _digests(keys: Keys) -> NDArray[np.bytes_]:
    """Return a digest of each key. That two keys share one is beyond all odds."""
    found = np.empty(len(keys), f"S{_DIGEST_BYTES}")
    for first, window in keys.windows():
        found[first : first + len(window)] = [
            hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest() for key in window.tolist()
        ]
    return found


def _labels(runs: Sequence[OfRun], rows: I64, what: str) -> NDArray[Any] | None:
    """Return the labels of the samples, which all runs that have them agree on.

    None: a run does not know its labels.
    """
    if any(one.labels is None for one in runs):
        return None
    found: NDArray[Any] | None = None
    for one, own in zip(runs, rows, strict=True):
        assert one.labels is not None
        there = np.flatnonzero(own >= 0)
        labels = one.labels[own[there]]
        if found is None:
            found = np.empty(rows.shape[1], labels.dtype)
            known = np.zeros(rows.shape[1], bool)
        elif (found.dtype == object) != (labels.dtype == object):
            raise RunError(
                f"{runs[0].run} and {one.run} have labels of other kinds: record them alike"
            )
        others = np.flatnonzero(known[there] & (found[there] != labels))
        if len(others):
            sample = int(there[others[0]])
            raise RunError(
                f"{one.run} has the label {shown(labels[others[0]])} where another run has "
                f"{shown(found[sample])}, of {what[:-1]} {sample}: runs are combined on the same "
                "labels"
            )
        found[there], known[there] = labels, True
    return found
