"""`hypergradients/METHOD.zarr`: hypergradients H(i) of all samples.

They are kept so that new test samples need no gradients of the training:
R(i, j) = <H(i), h_j>.

For a method that sums rows, H(i) = - sum_t alpha(t) c(t) r(i, t), in two parts. `folded`
(sample, feature) has the sums over the columns of blocks that are not factored, in order. A
sum of outer products is not an outer product. So `factored` has the columns of factored
blocks row by row, as they were recorded, and `scale` has the weight of each block.

For a sweep, `swept` (sample, feature) has the factored blocks multiplied out, because
curvature does not turn an outer product into an outer product.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.plan.chunking import MOST_FEATURES, MOST_SAMPLES
from hydra_pipe.plan.layout import factored_part
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import ROW_DTYPES, Rows, check_kind, joined, read_array
from hydra_pipe.store.files import remove, sync, sync_tree
from hydra_pipe.store.zarr.arrays import Array, Group, damage_named

HYPERGRADIENTS_UNREADABLE = (
    "keep them again with hydra-pipe reduce --keep-hypergradients --overwrite"
)
# Decoded bytes of a file of `folded`.
_FILE_BYTES = 16 * 2**20
_COUNTED_AT_ONCE = 2**20
MOST_FILE_ROWS = 4096


class HypergradientStore(ABC):
    """Hypergradients of one method, opened for reading.

    Args:
        path: path of the store.
        gradients: recording of the same run. Its rows may be gone.

    Raises:
        StoreError: the store is missing or damaged, belongs to another run or to another
            method than its name says, or is of another kind.
    """

    kind: str

    def __init__(self, path: Path, gradients: Gradients) -> None:
        self.path = path
        self._root = Group.open(path, HYPERGRADIENTS_UNREADABLE)
        found = self._root.attributes
        if found.get(names.RUN_ID) != gradients.run_id:
            raise StoreError(f"{path} belongs to another recording: {HYPERGRADIENTS_UNREADABLE}")
        if found.get(names.METHOD) != path.stem or found.get(names.KIND) != self.kind:
            what = f"{shown(found.get(names.KIND))} of method {shown(found.get(names.METHOD))}"
            raise StoreError(
                f"{path} has {what}, not {self.kind} of {path.stem}: {HYPERGRADIENTS_UNREADABLE}"
            )

    def arrays(self) -> list[tuple[str, Array]]:
        """Return every array with its name."""
        return [(name, self._root.array(name)) for name in self._root.array_names()]

    def check(self, gradients: Gradients, n_samples: int) -> None:
        """Compare shapes with the shapes of the run, and with the files. Reads no values.

        Raises:
            StoreError: a shape is wrong, or files are missing.
        """
        self._check_kinds(gradients)
        for name, shape in self.expected_shapes(gradients, n_samples).items():
            array = self._root.array(name)
            fault = (
                f"has shape {array.shape}, not {shape}"
                if array.shape != shape
                else array.shortfall()
            )
            if fault is not None:
                raise StoreError(f"{array.path} {fault}: {HYPERGRADIENTS_UNREADABLE}")

    @abstractmethod
    def _check_kinds(self, gradients: Gradients) -> None:
        """Check dtypes and chunks against the form that is written. Raises: StoreError."""

    @abstractmethod
    def expected_shapes(self, gradients: Gradients, n_samples: int) -> dict[str, tuple[int, ...]]:
        """Return every array that must exist, with its shape."""


class Hypergradients(HypergradientStore):
    """Sums of weighted rows. Arguments and errors are those of `HypergradientStore`."""

    kind = "hypergradients"

    def __init__(self, path: Path, gradients: Gradients) -> None:
        super().__init__(path, gradients)
        _check_width(self._root, gradients)
        # The layout of the factored columns alone, and their places in the layout of the run.
        self.layout, self.columns, self.blocks = factored_part(gradients.layout)
        self.folded = (
            self._root.array(names.FOLDED)
            if len(self.columns) < gradients.layout.n_features
            else None
        )
        self._parts = _parts(self._root, gradients.n_ranks) if self.columns else []
        self.rows = Rows(self._parts, len(self.columns), len(self.blocks)) if self.columns else None

    def samples(self, rows: slice) -> NDArray[np.int64]:
        """Return the training sample of each factored row in `rows`.

        Raises:
            StoreError: damaged.
        """
        assert self.rows is not None
        return joined(
            lambda part, own: read_array(self._parts[part].array(names.SAMPLE), own),
            rows,
            self.rows.part_rows,
        )

    def read_folded(self, samples: slice) -> NDArray[np.float32]:
        """Return the sums of some samples, shape (sample, feature). Raises: StoreError: damaged."""
        assert self.folded is not None
        return read_array(self.folded, samples)

    def _check_kinds(self, gradients: Gradients) -> None:
        if self.folded is not None:
            check_kind(self.folded, ("float32",), gradients.layout.n_features - len(self.columns))
        for part in self._parts:
            check_kind(part.array(names.SAMPLE), ("int64",), None)

    def expected_shapes(self, gradients: Gradients, n_samples: int) -> dict[str, tuple[int, ...]]:
        """Return every array that must exist, with its shape."""
        expected: dict[str, tuple[int, ...]] = {}
        if len(self.columns) < gradients.layout.n_features:
            expected[names.FOLDED] = (n_samples, gradients.layout.n_features - len(self.columns))
        if self.columns:
            for rank, n_rows in enumerate(gradients.rows.part_rows):
                part = _part_name(rank, gradients.n_ranks)
                shapes = {
                    names.GRADIENT: (n_rows, len(self.columns)),
                    names.SCALE: (n_rows, len(self.blocks)),
                    names.SAMPLE: (n_rows,),
                }
                expected |= {f"{part}/{name}": shape for name, shape in shapes.items()}
        return expected


class HypergradientMatrix(HypergradientStore):
    """Result of a sweep for each feature.

    Arguments and errors are those of `HypergradientStore`.
    """

    kind = "hypergradient matrix"

    def __init__(self, path: Path, gradients: Gradients) -> None:
        super().__init__(path, gradients)
        self.swept = self._root.array(names.SWEPT)
        self.spans: Any = self._root.attributes.get(names.FEATURES)

    def _check_kinds(self, gradients: Gradients) -> None:
        check_kind(self.swept, ("float32",), gradients.layout.whole_width)
        rows, columns = self.swept.chunks
        # A reader decodes whole chunks, so larger ones are refused.
        if self.swept.shards is not None or rows > MOST_SAMPLES or columns > MOST_FEATURES:
            raise StoreError(
                f"{self.swept.path} is not as hydra-pipe writes it: {HYPERGRADIENTS_UNREADABLE}"
            )

    def expected_shapes(self, gradients: Gradients, n_samples: int) -> dict[str, tuple[int, ...]]:
        """Return every array that must exist, with its shape."""
        return {names.SWEPT: (n_samples, gradients.layout.whole_width)}

    def tiles(self) -> list[slice]:
        """Return the spans of features that have files of their own, in order."""
        width, own = self.swept.shape[1], self.swept.chunks[1]
        return [slice(low, min(low + own, width)) for low in range(0, width, own)]

    def read(self, samples: slice, features: slice) -> NDArray[np.float32]:
        """Return some features of some samples, shape (sample, feature).

        Raises:
            StoreError: damaged.
        """
        with damage_named(self.swept.path, HYPERGRADIENTS_UNREADABLE):
            return self.swept.read(samples, features)


def open_kept(path: Path, gradients: Gradients) -> HypergradientStore:
    """Open the hypergradients at `path`, of either kind.

    Arguments and errors: as for `HypergradientStore`.
    """
    kind = Group.open(path, HYPERGRADIENTS_UNREADABLE).attributes.get(names.KIND)
    opened = HypergradientMatrix if kind == HypergradientMatrix.kind else Hypergradients
    return opened(path, gradients)


def create_matrix(
    path: Path,
    run_id: str,
    shape: tuple[int, int],
    chunks: tuple[int, int],
    spans: Sequence[Sequence[object]],
) -> Array:
    """Create an array for the result of a sweep for each feature, safe on the disk.

    The array has no data. Anything that was at `path` is removed.

    Args:
        path: path of the store, which is named after the method.
        run_id: id of the run.
        shape: (sample, feature).
        chunks: samples and features of a file. A file is never written in two pieces.
        spans: name of each block, its first feature and one past its last.
    """
    remove(path)
    attributes = {
        names.KIND: HypergradientMatrix.kind,
        names.RUN_ID: run_id,
        names.METHOD: path.stem,
    }
    Group.create(path, attributes | {names.FEATURES: [list(span) for span in spans]})
    array = Array.create(
        path / names.SWEPT, shape, "float32", (names.SAMPLE_DIM, names.FEATURE_DIM), chunks
    )
    _sync(path)
    return array


def create_hypergradients(path: Path, gradients: Gradients, n_samples: int) -> None:
    """Create a store for the hypergradients of a run, without data, safe on the disk.

    Anything that was at `path` is removed.
    """
    remove(path)
    _create(path, gradients, n_samples)
    _sync(path)


def _sync(path: Path) -> None:
    sync_tree(path)
    for directory in (path.parent, path.parent.parent):  # the parent may be new
        sync(directory)


def _create(path: Path, gradients: Gradients, n_samples: int) -> None:
    layout, columns, blocks = factored_part(gradients.layout)
    attributes = {
        names.KIND: Hypergradients.kind,
        names.RUN_ID: gradients.run_id,
        names.METHOD: path.stem,
    }
    root = Group.create(path, attributes | {names.LAYOUT: layout.to_json()})
    n_folded = gradients.layout.n_features - len(columns)
    if n_folded:
        # A power of two, so that files fill the blocks of samples that are written
        # together.
        file_rows = 1 << (
            max(1, min(_FILE_BYTES // (n_folded * 4), MOST_FILE_ROWS)).bit_length() - 1
        )
        dimensions = (names.SAMPLE_DIM, names.FEATURE_DIM)
        Array.create(
            path / names.FOLDED, (n_samples, n_folded), "float32", dimensions, (file_rows, n_folded)
        )
    if not columns:
        return
    rows = gradients.rows
    for rank, n_rows in enumerate(rows.part_rows):
        part = root
        for name in _part_name(rank, gradients.n_ranks).split("/"):
            part = part.require_group(name)
        shard, chunk = rows.shard_rows, (rows.chunk_rows, len(columns))
        shards = (shard, len(columns)) if shard != rows.chunk_rows else None
        wide = ((names.ROW_DIM, names.FEATURE_DIM), chunk, shards)
        Array.create(
            part.path / names.GRADIENT, (n_rows, len(columns)), rows.dtype, *wide, shuffle=False
        )
        scale = (names.ROW_DIM, names.BLOCK_DIM)
        Array.create(
            part.path / names.SCALE, (n_rows, len(blocks)), "float32", scale, (shard, len(blocks))
        )
        Array.create(part.path / names.SAMPLE, (n_rows,), "int64", (names.ROW_DIM,), (shard,))


def write_factored(
    path: Path, n_ranks: int, rank: int, shard: int, values: dict[str, NDArray[Any]]
) -> None:
    """Write one shard of the factored rows, safe on the disk.

    Args:
        path: path of the store.
        n_ranks: number of processes that recorded.
        rank: process whose rows they are.
        shard: number of the shard.
        values: gradient, scale and samples of the shard's rows, by array name.
    """
    part = path / _part_name(rank, n_ranks)
    for name, found in values.items():
        Array.open(part / name).write_file(
            (shard, *(0 for _ in found.shape[1:])), found, safely=True
        )


def write_folded(path: Path, first: int, sums: NDArray[np.float32]) -> None:
    """Write the sums of samples from `first` on, safe on the disk.

    The sums begin a file. They end a file too, except at the array's end.
    """
    array = Array.open(path / names.FOLDED)
    for low in range(0, len(sums), array.file_rows):
        array.write_file(
            ((first + low) // array.file_rows, 0), sums[low : low + array.file_rows], safely=True
        )


def _check_width(root: Group, gradients: Gradients) -> None:
    """Check, before many factored columns are counted one by one, that a row has so many.

    Raises:
        StoreError: no row has so many columns.
    """
    if gradients.layout.n_features <= _COUNTED_AT_ONCE:
        return
    factored = [
        block
        for block in gradients.layout.blocks
        if block.encoding == "factored" and block.inputs is not None
    ]
    width = sum(
        last - first
        for block in factored
        for first, last in (block.columns, block.inputs or (0, 0))
    )
    if width > _COUNTED_AT_ONCE:
        array = root.array(f"{_part_name(0, gradients.n_ranks)}/{names.GRADIENT}")
        check_kind(array, ROW_DTYPES, width)
        fault = array.shortfall() if array.shape[0] else "has no rows"
        if fault is not None:
            raise StoreError(f"{array.path} {fault}: {HYPERGRADIENTS_UNREADABLE}")


def _parts(root: Group, n_ranks: int) -> Sequence[Group]:
    found = [root.group(_part_name(rank, n_ranks)) for rank in range(n_ranks)]
    present = [group for group in found if group is not None]
    if len(present) != n_ranks:
        raise StoreError(f"{root.path} lacks the factored blocks: {HYPERGRADIENTS_UNREADABLE}")
    return present


def _part_name(rank: int, n_ranks: int) -> str:
    return names.FACTORED if n_ranks == 1 else f"{names.FACTORED}/{names.rank_name(rank)}"
