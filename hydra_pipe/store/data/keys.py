"""Keys of samples: one string for each, such as a path, the id of a document, or a hash.

They are stored as bytes of UTF-8, a row for each key, and are read in windows.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import DataError, StoreError, UsageError, shown
from hydra_pipe.plan.id_ranges import parse_selection
from hydra_pipe.store import names
from hydra_pipe.store.files import remove
from hydra_pipe.store.zarr.arrays import Array, damage_named
from hydra_pipe.types import I64, U8, Span

KEYS_UNREADABLE = "keys are not readable"
# The most bytes of a key. A longer key is better replaced by its hash.
MOST_KEY_BYTES = 1024
# Bytes of a file of keys, and bytes of keys that stay in memory once they are read.
_FILE_BYTES, _HELD_BYTES = 2**20, 64 * 2**20
# Bytes of a string in Python beside its text.
_STRING_BYTES = 64
_DIGEST_DIGITS = 16


class Keys(Sequence[str]):
    """The keys of the samples of a store, read as they are asked for.

    Args:
        array: uint8 (sample, byte). A row is UTF-8, and zeros to its end.

    Raises:
        StoreError: the array is another one than hydra-pipe writes.
    """

    def __init__(self, array: Array) -> None:
        width = array.shape[1] if len(array.shape) == 2 else 0
        # A reader decodes whole chunks. The chunks of keys are small, so larger ones are refused.
        is_small = array.chunks[0] * width <= max(_FILE_BYTES, width)
        if array.dtype != np.uint8 or not 0 < width <= MOST_KEY_BYTES or not is_small:
            raise StoreError(
                f"{array.path} has {array.dtype.name} values of shape {array.shape} in chunks of "
                f"{array.chunks[0]}, not a row of up to {MOST_KEY_BYTES} bytes for each key: "
                f"{KEYS_UNREADABLE}"
            )
        self._array, self._width = array, width
        self._held: NDArray[np.bytes_] | None = None

    def __len__(self) -> int:
        return self._array.shape[0]

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        """Return a key, or a list of keys. Raises: StoreError: damaged."""
        chosen = range(len(self))[at]
        found = self.take(np.atleast_1d(np.asarray(chosen, np.int64)))
        return found.tolist() if isinstance(at, slice) else str(found[0])

    def __iter__(self) -> Iterator[str]:
        for _, window in self.windows():
            yield from self._decoded(window)

    def most_bytes(self, n: int) -> int:
        """Return the most bytes of the keys that stay in memory, and of `n` of them in a table."""
        return min(self._array.n_bytes, _HELD_BYTES) + min(n, len(self)) * (
            2 * self._width + _STRING_BYTES
        )

    def take(self, ids: I64) -> NDArray[np.object_]:
        """Return the keys of samples as str objects, shape (id,).

        Args:
            ids: ids of samples, in any order.

        Raises:
            StoreError: damaged.
        """
        found = np.empty(len(ids), object)
        if self._array.n_bytes <= _HELD_BYTES:
            found[:] = self._decoded(self._all()[ids])
            return found
        order = np.argsort(ids, kind="stable")
        files = ids[order] // self._array.file_rows
        for places in np.split(order, np.flatnonzero(np.diff(files)) + 1) if len(ids) else []:
            first = int(ids[places[0]])
            window = self._read(slice(first, int(ids[places[-1]]) + 1))
            found[places] = self._decoded(window[ids[places] - first])
        return found

    def ids_of(self, keys: Sequence[str]) -> I64:
        """Return the id of the sample of each key, shape (key,). -1: no sample has it.

        Raises:
            StoreError: damaged.
        """
        found = np.full(len(keys), -1)
        if not len(keys):
            return found
        wanted = np.array([key.encode() for key in keys])
        order = np.argsort(wanted)
        for first, window in self.windows():
            at = np.searchsorted(wanted, window, sorter=order)
            near = order[np.minimum(at, len(wanted) - 1)]
            for row in np.flatnonzero(wanted[near] == window):
                found[wanted == window[row]] = first + row
        return found

    def windows(self) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
        """Yield the keys as bytes, file by file, with the id of the first.

        Raises:
            StoreError: damaged.
        """
        for first in range(0, len(self), self._array.file_rows):
            yield first, self._read(slice(first, first + self._array.file_rows))

    def check(self) -> None:
        """Refuse keys that are empty or not text, or that two samples have. Reads all of them.

        Raises:
            StoreError: damaged.
        """
        try:
            check_keys(self, str(self._array.path))
        except DataError as error:
            raise StoreError(f"{error}: {KEYS_UNREADABLE}") from error

    def _all(self) -> NDArray[np.bytes_]:
        if self._held is None:
            self._held = self._read(slice(None))
        return self._held

    def _read(self, samples: slice) -> NDArray[np.bytes_]:
        with damage_named(self._array.path, KEYS_UNREADABLE):
            values: U8 = self._array.read(samples)
        found: NDArray[np.bytes_] = values.view(f"S{self._width}")[:, 0]
        return found

    def _decoded(self, keys: NDArray[np.bytes_]) -> list[str]:
        try:
            return [key.decode() for key in keys.tolist()]
        except UnicodeDecodeError as error:
            raise StoreError(
                f"{self._array.path} is damaged ({shown(error)}): {KEYS_UNREADABLE}"
            ) from error


def put_keys(path: Path, keys: Sequence[str], dimension: str) -> None:
    """Write an array of keys, file by file.

    Args:
        path: path of the array, whose name is the name of its keys.
        keys: keys that `check_keys` accepts.
        dimension: dimension of the samples.
    """
    width = max(len(key.encode()) for key in keys)
    rows = max(1, min(_FILE_BYTES // width, len(keys)))
    remove(path)
    array = Array.create(
        path, (len(keys), width), "uint8", (dimension, names.key_bytes(path.name)), (rows, width)
    )
    for number, first in enumerate(range(0, len(keys), rows)):
        window = np.array([key.encode() for key in keys[first : first + rows]], f"S{width}")
        array.write_file((number, 0), window.view(np.uint8).reshape(-1, width))


def check_keys(keys: Collection[str], name: str) -> None:
    """Refuse keys that no samples can have.

    Args:
        keys: keys of the samples. They may be read twice.
        name: name of the keys, for messages.

    Raises:
        DataError: a key is no text, is empty or too long, or two samples have it.
    """
    hashes = np.fromiter((hash(_checked(key, name)) for key in keys), np.int64, len(keys))
    ordered = np.sort(hashes)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    # Few keys share a hash by chance. They are compared one by one.
    seen: dict[str, int] = {}
    for number, key in enumerate(keys):
        if hash(key) in repeated and seen.setdefault(key, number) != number:
            raise DataError(
                f"{name}: samples {seen[key]} and {number} both have the key {shown(key)}: give "
                "each sample a key of its own"
            )


def _checked(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise DataError(f"{name} has {shown(key)}, which is no string: give one for each sample")
    try:
        n_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has {shown(key)}, which is no UTF-8: give other keys") from error
    if not 0 < n_bytes <= MOST_KEY_BYTES or "\0" in key:
        raise DataError(
            f"{name} has {shown(key)} of {n_bytes} bytes: a key has 1 to {MOST_KEY_BYTES} bytes, "
            "none of them 0: give hashes in place of longer keys"
        )
    return key


def digest_of_keys(keys: Iterable[str]) -> str:
    """Return the first 16 hex digits of the SHA-256 of keys, each followed by a zero byte."""
    found = hashlib.sha256()
    for key in keys:
        found.update(key.encode() + b"\0")
    return found.hexdigest()[:_DIGEST_DIGITS]


def selected(
    selection: str, n: int, keys: Keys | None, option: str = "--tests"
) -> tuple[Span, ...]:
    """Return the spans of a selection of samples, by ids and keys.

    Numbers and spans of numbers are ids. Every other part of a selection is a key.

    Args:
        selection: ids, spans and keys with commas between them, such as "0-99,cat.png".
        n: number of samples.
        keys: keys of the samples. None: they have none.
        option: name of the option that gave `selection`.

    Raises:
        UsageError: `selection` cannot be read, or names a sample that does not exist.
        StoreError: damaged.
    """
    if keys is None:
        return parse_selection(selection, n, option)
    parts = [part.strip() for part in selection.split(",")]
    places = [at for at, part in enumerate(parts) if not _is_span(part)]
    ids = keys.ids_of([parts[at] for at in places])
    for at, found in zip(places, ids.tolist(), strict=True):
        if found < 0:
            raise UsageError(
                f"{option} {selection}: no sample has the key {shown(parts[at])}: write keys, ids "
                "and spans of ids, such as 0-99,150"
            )
        parts[at] = str(found)
    return parse_selection(",".join(parts), n, option)


def _is_span(part: str) -> bool:
    return all(piece.strip().isdecimal() for piece in part.split("-", 1))
