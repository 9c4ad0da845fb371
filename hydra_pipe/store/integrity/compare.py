"""Comparison of every file of a stage with the file that was written.

A file must have its footprint, its own checksums must be right, and it must decode.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.progress import Task
from hydra_pipe.store.files import is_partial
from hydra_pipe.store.integrity.faults import Fault
from hydra_pipe.store.run.footprints import (
    Footprints,
    bytes_of,
    file_shape,
    files_of,
    fits,
    n_places,
    name_of,
    of_array_file,
    of_file,
    places,
)
from hydra_pipe.store.run.stages import Holds, StageId
from hydra_pipe.store.zarr.arrays import CHUNKS, METADATA, ROTTEN, Array, Group
from hydra_pipe.store.zarr.codec import Shape

# The most missing files of an array that are named one by one.
_NAMED = 3


class Comparison:
    """Comparison of the files of one stage with the footprints of the stage.

    Args:
        root: directory of the run.
        stage: the stage.
        consequence: meaning of a fault, for the message.
        listed: footprints of the stage. None where they are lost: then files are checked only
            against their own checksums.
        pruned: names of the arrays whose chunks were deleted.
        task: progress, which counts the decoded bytes.
    """

    def __init__(
        self,
        root: Path,
        stage: StageId,
        consequence: str,
        listed: Footprints | None,
        pruned: frozenset[str],
        task: Task,
    ) -> None:
        self._root, self._stage, self._consequence = root, stage, consequence
        self._listed, self._pruned, self._task = listed, pruned, task
        self._area = stage.area
        # Every existing file: name relative to the run -> size. A checked file is removed.
        self._left = files_of(root, stage)
        self._told: set[str] = set()
        self._written_as: dict[str, str] | None = None

    def faults(self) -> Iterator[Fault]:
        """Return every fault, file by file."""
        if not self._left:
            yield self._fault(self._area, "is missing")
            return
        try:
            arrays: Mapping[str, list[str] | None] = (
                dict.fromkeys(self._arrays()) if self._listed is None else self._listed.arrays
            )
        except StoreError as error:
            yield self._fault(self._area, str(error))
            return
        below = self._files_of_arrays()
        for name, written in arrays.items():
            yield from self._check_array(name, written, below.get(name, []))
        if self._listed is None:
            return  # nothing tells which files other than arrays there should be
        for name, footprint in self._listed.files.items():
            yield from self._check_file(name, footprint)
        for name in self._left:
            if not is_partial(name):
                yield Fault(
                    name,
                    "does not belong here: hydra-pipe has written nothing of this name, and "
                    "other readers may take it for data",
                    f"move it elsewhere, or let hydra-pipe verify {self._root} --repair do so",
                    kind="extra",
                    stage=self._stage,
                )

    def _fault(self, where: str, found: str) -> Fault:
        return Fault(where, found, self._consequence, stage=self._stage)

    def _arrays(self) -> list[str]:
        """Return the arrays in the area, from metadata. Raises: StoreError: they are damaged."""
        if not self._stage.kind.has_arrays:
            return []
        if self._stage.kind.holds is Holds.ARRAY:
            return [self._area]
        return [
            f"{self._area}/{name}"
            for name in Group.open(self._root / self._area, self._consequence).array_names()
        ]

    def _files_of_arrays(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for name in self._left:
            array, chunks, _ = name.partition(f"/{CHUNKS}/")
            if chunks or name.endswith(f"/{METADATA}"):
                found[array.removesuffix(f"/{METADATA}")].append(name)
        return found

    def _check_file(self, name: str, written: str) -> Iterator[Fault]:
        """Return the faults of a file outside of arrays, unless it was checked before."""
        if name in self._told:
            return
        self._told.add(name)
        if self._left.pop(name, None) is None:
            yield self._fault(name, "is missing")
            return
        try:
            found = of_file(self._root / name)
        except OSError as error:
            yield self._fault(name, f"cannot be read ({shown(error)})")
            return
        if not fits(written, found):
            yield self._fault(name, self._exchanged(written, found))

    def _check_array(self, name: str, written: list[str] | None, own: list[str]) -> Iterator[Fault]:
        metadata = f"{name}/{METADATA}"
        if not own:
            self._told.add(metadata)
            yield self._fault(name, "is missing")
            return
        faults = []
        if self._listed is not None and metadata in self._listed.files:
            faults = list(self._check_file(metadata, self._listed.files[metadata]))
        try:
            array = Array.open(self._root / name)
        except StoreError as error:
            faults = faults or [self._fault(name, str(error))]
        yield from faults
        if faults or name in self._pruned:
            for file in own:  # none of these files can be judged
                self._left.pop(file, None)
            return
        self._left.pop(metadata, None)
        n_files, n_there = n_places(array), len(own) if written is None else len(written)
        if n_files != n_there if written is not None else n_files > n_there:
            yield self._fault(
                name, f"needs {n_files:,} files, and {n_there:,} were written or are there"
            )
            for file in own:
                self._left.pop(file, None)
            return
        yield from self._check_chunks(name, array, written)

    def _check_chunks(self, name: str, array: Array, written: list[str] | None) -> Iterator[Fault]:
        missing = []
        for at, footprint in zip(
            places(array), repeat(None) if written is None else written, strict=False
        ):
            file = f"{name}/{name_of(at)}"
            n_bytes = self._left.pop(file, None)
            if n_bytes is None:
                missing.append((file, at))
                continue
            found = self._wrong_with(array, at, n_bytes, footprint)
            if found is not None:
                yield self._fault(file, found)
        if len(missing) <= _NAMED:
            for file, at in missing:
                yield self._fault(file, f"is missing, with {_span(array, at)}")
        else:
            yield self._fault(
                name,
                f"lacks {len(missing):,} of its {n_places(array):,} files, the first of them "
                f"{missing[0][0]}",
            )

    def _wrong_with(self, array: Array, at: Shape, n_bytes: int, written: str | None) -> str | None:
        """Describe the fault of one file of an array; None if it has none."""
        window = [slice(i * n, (i + 1) * n) for i, n in zip(at, file_shape(array), strict=True)]
        try:
            values = array.read(*window)
            found = of_array_file(array, at, n_bytes)
        except ROTTEN as error:
            short = written is not None and n_bytes != bytes_of(written)
            size = (
                f", and it has {n_bytes:,} bytes of {bytes_of(written):,}"
                if written is not None and short
                else ""
            )
            return f"{_span(array, at)} are damaged ({shown(error)}{size})"
        self._task.advance(values.nbytes)
        return None if written is None or fits(written, found) else self._exchanged(written, found)

    def _exchanged(self, written: str, found: str) -> str:
        """Describe a file that differs from the file that was written in its place."""
        if self._written_as is None:
            self._written_as = self._names()
        other = self._written_as.get(found)
        if other is not None:
            return f"holds what was written as {other}"
        if bytes_of(written) != bytes_of(found):
            return (
                f"is not what was written: it has {bytes_of(found):,} bytes, "
                f"{bytes_of(written):,} were written"
            )
        return "is not what was written, but an older file, or one of another run"

    def _names(self) -> dict[str, str]:
        """Return the name of each written file, by its footprint."""
        assert self._listed is not None
        found = {footprint: name for name, footprint in self._listed.files.items()}
        for name, footprints in self._listed.arrays.items():
            try:
                array = Array.open(self._root / name)
            except StoreError:
                continue
            if n_places(array) == len(footprints):
                found |= {
                    footprint: f"{name}/{name_of(at)}"
                    for at, footprint in zip(places(array), footprints, strict=True)
                }
        return found


def _span(array: Array, at: Shape) -> str:
    """Return the rows in one file of an array, in words."""
    first = at[0] * array.file_rows
    return f"its rows {first:,} to {min(first + array.file_rows, array.shape[0]):,}"
