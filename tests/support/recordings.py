"""What is in a recording, read by zarr-python; and how alike two recordings are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import nn

import hydra_pipe
from hydra_pipe.store import names


def arrays(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every array of a recording, by its name in the store."""
    store = zarr.open_group(run / names.GRADIENTS, mode="r")
    return {
        name: np.asarray(found[:])
        for name, found in store.members(max_depth=None)
        if isinstance(found, zarr.Array)
    }


def assert_same_arrays(a: Path, b: Path) -> None:
    """All arrays of two recordings are the same, bit for bit."""
    ours, others = arrays(a), arrays(b)
    assert ours.keys() == others.keys()
    for name, values in ours.items():
        other = others[name]
        assert (values.dtype, values.shape) == (other.dtype, other.shape), name
        assert values.tobytes() == other.tobytes(), name


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """All parameters and buffers are the same, bit for bit."""
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def steps_of(run: Path) -> list[np.ndarray[Any, Any]]:
    """The sample ids of each step."""
    found = arrays(run)
    return [
        found[names.SAMPLE][found[names.STEP] == step]
        for step in range(found[names.STEP].max() + 1)
    ]


def decoded(run: Path, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Every block's gradients, written out: (row, numel), from what is on disk and docs/format.md
    alone.
    """
    store = zarr.open_group(run / "gradients.zarr", mode="r")
    return decoded_group(store, store, rows)


def decoded_tests(run: Path) -> dict[str, np.ndarray]:
    """Every block's test gradients, written out: (test, numel), all of one checkpoint."""
    store = zarr.open_group(run / "gradients.zarr", mode="r")
    (checkpoint,) = store["test"].group_keys()
    return decoded_group(store, store[f"test/{checkpoint}"], slice(None))


def decoded_group(store: zarr.Group, group: zarr.Group, rows: slice) -> dict[str, np.ndarray]:
    """Every block's gradients in some rows of `group`, with arrays `gradient` and `scale`."""
    values, scale = (
        group["gradient"][rows].astype(np.float64),
        group["scale"][rows].astype(np.float64),
    )
    result = {}
    for index, block in enumerate(store.attrs["hydra_pipe_blocks"]["blocks"]):
        own = values[:, slice(*block["columns"])]
        if block["inputs"] is not None:
            own = np.einsum("ro,ri->roi", own, values[:, slice(*block["inputs"])]).reshape(
                len(own), -1
            )
        result[block["name"]] = own * scale[:, index, None]
    return result


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the store, without the id that each run has of its own."""
    store = run / "gradients.zarr"
    run_id = json.loads((run / "run.json").read_text())["run_id"].encode()
    return {
        str(f.relative_to(store)): f.read_bytes().replace(run_id, b"ID")
        for f in store.rglob("*")
        if f.is_file()
    }


def stages(run: Path) -> dict[str, object]:
    """The stages of the manifest, without facts about the disk, and without digests of files that
    have the run's id.
    """
    found = json.loads((run / "run.json").read_text())["stages"]
    for fact in ("stalls", "stalled_seconds", "checksums"):
        found["record"]["facts"].pop(fact, None)
    return found


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have the same files, and their manifests say the same."""
    ours, others = contents(a), contents(b)
    assert sorted(ours) == sorted(others)
    assert [name for name in ours if ours[name] != others[name]] == []
    assert stages(a) == stages(b)
    assert hydra_pipe.verify(a) == []
