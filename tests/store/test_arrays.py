"""Our Zarr beside zarr-python: what one writes the other reads, and what is not ours is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from hydra_pipe.errors import StoreError
from hydra_pipe.store.zarr.arrays import ROTTEN, Array, Group
from hydra_pipe.store.zarr.codec import COMPRESSOR, LEVEL

DTYPES = ["float16", "float32", "float64", "int8", "int64", "uint8"]


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Shape, chunks and, or not, shards."""
    n = draw(st.integers(1, 2))
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)))
    chunks = tuple(draw(st.lists(st.integers(1, 6), min_size=n, max_size=n)))
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks) if draw(st.booleans()) else None
    return shape, chunks, shards


def values_of(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def written(
    path: Path,
    values: np.ndarray,
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    **more: Any,
) -> Array:
    """All files of an array, by our writer."""
    array = Array.create(
        path, values.shape, values.dtype, ("row", "column")[: values.ndim], chunks, shards, **more
    )
    size = shards or chunks
    for at in np.ndindex(*(-(-n // s) for n, s in zip(values.shape, size, strict=True))):
        array.write_file(
            at, values[tuple(slice(i * s, (i + 1) * s) for i, s in zip(at, size, strict=True))]
        )
    return array


def by_zarr(
    path: Path,
    values: np.ndarray,
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    **more: Any,
) -> zarr.Array:
    """The same array, by zarr-python."""
    array = zarr.create_array(
        LocalStore(path),
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        shards=shards,
        filters=None,
        dimension_names=("row", "column")[: values.ndim],
        overwrite=True,
        config={"write_empty_chunks": True},
        **(
            {
                "compressors": [
                    BloscCodec(cname=COMPRESSOR, clevel=LEVEL, shuffle="shuffle"),
                    Crc32cCodec(),
                ]
            }
            | more
        ),
    )
    array[...] = values
    return array


@settings(max_examples=60, deadline=None)
@given(grid=grids(), dtype=st.sampled_from(DTYPES), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_zarr_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, grid: Any, dtype: str, shuffle: bool, seed: int
) -> None:
    shape, chunks, shards = grid
    path = tmp_path_factory.mktemp("ours")
    values = values_of(shape, dtype, seed)
    array = written(path, values, chunks, shards, shuffle=shuffle, attributes={"unit": "loss"})
    assert array.missing_files() == 0
    theirs = zarr.open_array(path, mode="r")
    np.testing.assert_array_equal(theirs[...], values)
    assert (theirs.dtype, theirs.chunks, theirs.shards, dict(theirs.attrs)) == (
        values.dtype,
        chunks,
        shards,
        {"unit": "loss"},
    )


@settings(max_examples=60, deadline=None)
@given(grid=grids(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), data=st.data())
def test_we_read_any_window_of_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, grid: Any, dtype: str, seed: int, data: st.DataObject
) -> None:
    shape, chunks, shards = grid
    path = tmp_path_factory.mktemp("theirs")
    values = values_of(shape, dtype, seed)
    by_zarr(path, values, chunks, shards)
    window = []
    for n in shape:
        first = data.draw(st.integers(0, n))
        window.append(slice(first, data.draw(st.integers(first, n + 3))))
    array = Array.open(path)
    np.testing.assert_array_equal(array.read(*window), values[tuple(window)])
    np.testing.assert_array_equal(array.read(), values)


def test_metadata_are_those_of_zarr(tmp_path: Path) -> None:
    for shards in (None, (8, 6)):
        values = values_of((20, 6), "float16", 0)
        by_zarr(tmp_path / "theirs", values, (4, 3), shards, fill_value=np.nan)
        written(tmp_path / "ours", values, (4, 3), shards)
        ours, theirs = (
            json.loads((tmp_path / side / "zarr.json").read_text()) for side in ("ours", "theirs")
        )
        assert ours == theirs


def test_groups_nest_and_open_in_zarr(tmp_path: Path) -> None:
    root = Group.create(tmp_path / "store", {"kind": "x"})
    written(root.require_group("a").path / "deep", values_of((3,), "int64", 0), (2,), None)
    written(root.path / "top", values_of((3,), "int64", 0), (2,), None)
    assert root.array_names() == ["a/deep", "top"]
    assert root.group_names() == ["a"]
    assert root.group("b") is None
    theirs = zarr.open_group(tmp_path / "store", mode="r")
    assert dict(theirs.attrs) == {"kind": "x"}
    assert sorted(name for name, _ in theirs.members(max_depth=None)) == ["a", "a/deep", "top"]


def test_other_codecs_are_refused_by_name(tmp_path: Path) -> None:
    by_zarr(tmp_path, values_of((4,), "int64", 0), (2,), None, compressors=[ZstdCodec()])
    with pytest.raises(StoreError, match="codecs bytes, zstd, not bytes, blosc, crc32c"):
        Array.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [-1, 6]),
        ("shape", [4]),
        ("shape", "x"),
        ("data_type", "string"),
        ("zarr_format", 2),
        ("codecs", []),
    ],
)
def test_metadata_that_cannot_be_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    array = written(tmp_path, values_of((4, 6), "float32", 0), (2, 3), None)
    (tmp_path / "zarr.json").write_text(json.dumps(array.metadata | {key: value}))
    with pytest.raises(StoreError, match="is missing or damaged"):
        Array.open(tmp_path)


def test_a_chunk_of_another_size_is_not_taken_for_one(tmp_path: Path) -> None:
    """Its checksum is right: only its length tells."""
    small = written(tmp_path / "small", values_of((2,), "int64", 0), (2,), None)
    written(tmp_path / "large", values_of((4,), "int64", 0), (4,), None)
    (tmp_path / "large/c/0").write_bytes(small.file_path((0,)).read_bytes())
    with pytest.raises(ROTTEN, match="a chunk of 32 bytes says it has 16"):
        Array.open(tmp_path / "large").read()


def test_missing_and_short_files_are_damage(tmp_path: Path) -> None:
    array = written(tmp_path, values_of((8, 6), "float32", 0), (2, 3), (4, 6))
    file = array.file_path((1, 0))
    content = file.read_bytes()
    for damaged in (b"", content[:10], content[:-1], content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(ROTTEN):
            array.read()
    file.unlink()
    assert array.missing_files() == 1
    with pytest.raises(ROTTEN):
        array.read()
    np.testing.assert_array_equal(array.read(slice(0, 4)), values_of((8, 6), "float32", 0)[:4])
