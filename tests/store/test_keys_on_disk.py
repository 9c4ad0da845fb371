"""Keys on disk: what is read is what was given, in any window, and bad keys are refused."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_pipe.errors import DataError, StoreError, UsageError
from hydra_pipe.store.data import keys as module
from hydra_pipe.store.data.keys import Keys, check_keys, put_keys, selected
from hydra_pipe.store.zarr.arrays import Array

KEY = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9
)


def stored(path: Path, keys: list[str]) -> Keys:
    put_keys(path, keys, "sample")
    return Keys(Array.open(path))


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(KEY, min_size=1, max_size=30, unique=True), data=st.data())
def test_keys_come_back_as_they_were_given_from_files_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FILE_BYTES", data.draw(st.integers(1, 80)))
        patch.setattr(module, "_HELD_BYTES", data.draw(st.sampled_from([0, 2**20])))
        found = stored(tmp_path_factory.mktemp("keys") / "train_key", keys)
        n = len(keys)
        assert len(found) == n
        assert list(found) == found[:] == keys
        ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), np.int64)
        assert found.take(ids).tolist() == [keys[i] for i in ids]
        window = slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        assert found[window] == keys[window]
        assert found[-1] == keys[-1]
        others = data.draw(st.lists(KEY, max_size=5))
        wanted = [*reversed(keys), *others]
        at = {key: i for i, key in enumerate(keys)}
        assert found.ids_of(wanted).tolist() == [at.get(key, -1) for key in wanted]
        found.check()


def test_any_zarr_reader_reads_keys_as_bytes(tmp_path: Path) -> None:
    stored(tmp_path / "test_key", ["a", "größer", "中"])
    array = zarr.open_array(tmp_path / "test_key", mode="r")
    assert array.shape == (3, 8)
    assert [bytes(row).rstrip(b"\0").decode() for row in array[:]] == ["a", "größer", "中"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["a", "b", "a"], "samples 0 and 2 both have the key 'a'"),
        (["a", ""], "of 0 bytes"),
        (["a", "x" * 1025], "of 1025 bytes"),
        (["a\0b"], "none of them 0"),
        (["a", 7], "7, which is no string"),
        (["\ud800"], "no UTF-8"),
    ],
)
def test_impossible_keys_are_refused(keys: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_keys(keys, "sample_keys")


def test_keys_that_share_a_hash_by_chance_are_no_repetition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "hash", lambda key: len(key), raising=False)
    check_keys(["aa", "bb", "c"], "keys")
    with pytest.raises(DataError, match="samples 1 and 3"):
        check_keys(["aa", "bb", "c", "bb"], "keys")


def test_damaged_keys_are_named(tmp_path: Path) -> None:
    keys = stored(tmp_path / "train_key", ["one", "two"])
    array = Array.open(tmp_path / "train_key")
    array.write_file((0, 0), np.full((2, 3), 0xE4, np.uint8))
    with pytest.raises(StoreError, match="keys are not readable"):
        list(keys)
    array.write_file((0, 0), np.full((2, 3), ord("a"), np.uint8))
    with pytest.raises(StoreError, match="samples 0 and 1 both have the key 'aaa'"):
        keys.check()


def test_a_selection_has_ids_and_keys(tmp_path: Path) -> None:
    keys = stored(tmp_path / "test_key", ["cat-1.png", "a b", "17", "x", "-3"])
    assert selected("0-1, x", 5, keys) == ((0, 2), (3, 4))
    assert selected("cat-1.png,-3,a b", 5, keys) == ((0, 2), (4, 5))
    with pytest.raises(UsageError, match="17 is not within"):
        selected("17", 5, keys)  # a number is an id, whatever the keys are
    with pytest.raises(UsageError, match="no sample has the key 'dog'"):
        selected("x,dog", 5, keys)
    with pytest.raises(UsageError, match="is not a selection"):
        selected("x", 5, None)
