"""Runs in an object store, through the S3 protocol on this machine and in memory: the same bytes as
on a local disk.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from support.pipelines import conv_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import RunError, StoreError
from hydra_pipe.store.files import location
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT, KEEP, RECORD
from hydra_pipe.store.zarr.arrays import Array

BUCKET = "hydra-pipe-tests"
pytestmark = [
    # botocore's and aiohttp's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket of a server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where runs go: by the test's parameter."""
    kind = request.param
    name = tmp_path.name
    return f"{request.getfixturevalue('s3')}/{name}" if kind == "s3" else f"memory://{name}"


# a run is some hundred requests, of some milliseconds each: what S3 itself does not change is
# tested in memory
in_memory = pytest.mark.parametrize("root", ["memory"], indirect=True)
in_s3 = pytest.mark.parametrize("root", ["s3"], indirect=True)
both = pytest.mark.parametrize("root", ["s3", "memory"], indirect=True)


def all_stages(run: str | Path) -> None:
    assert hydra_pipe.record(conv_pipeline(), run, encoding="exact", dtype="float16")
    assert hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    assert hydra_pipe.export(run, top=3, full=True, method="hydra")


def files_of(run: str) -> dict[str, bytes]:
    """What a run in a store consists of."""
    fs, _, [path] = fsspec.get_fs_token_paths(run)
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, bytes]]:
    """The files that all stages have left, by the kind of store."""
    return {}


@pytest.fixture
def run(root: str, made: dict[str, dict[str, bytes]]) -> str:
    """A run that all stages have made in a store of that kind: the first test's is made, the
    others' are copies of its files.
    """
    run, kind = f"{root}/run", root.partition(":")[0]
    if kind not in made:
        all_stages(run)
        made[kind] = files_of(run)
    else:
        fs, _, [path] = fsspec.get_fs_token_paths(run)
        fs.pipe({f"{path}/{name}": content for name, content in made[kind].items()})
    return run


def contents(run: str | Path) -> dict[str, bytes]:
    """Every file of a run but the manifest and checksums, whose seconds and run id differ; and
    metadata without the run id.
    """
    if isinstance(run, Path):
        found = {str(f.relative_to(run)): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    else:
        found = files_of(run)
    run_id = json.loads(found.pop("run.json"))["run_id"].encode()
    # Parquet compresses its own; what it says is compared by the tables' values
    compared = {
        name: content
        for name, content in found.items()
        if not name.endswith(".parquet") and "checksums/" not in name
    }
    return {name: content.replace(run_id, b"RUN") for name, content in compared.items()}


@both
def test_all_stages_leave_what_they_leave_on_a_disk(run: str, tmp_path: Path) -> None:
    all_stages(tmp_path / "run")
    assert contents(run) == contents(tmp_path / "run")
    assert hydra_pipe.verify(run) == []
    view = hydra_pipe.open_run(run)
    np.testing.assert_array_equal(
        view.relevance("hydra").values,
        hydra_pipe.open_run(tmp_path / "run").relevance("hydra").values,
    )
    np.testing.assert_array_equal(view.relevance_array("hydra")[:], view.relevance("hydra").values)
    assert view.info()["bytes"]["gradients.zarr"] > 0


@in_memory
def test_a_matrix_of_hypergradients_is_there_what_it_is_on_a_disk(
    root: str, tmp_path: Path
) -> None:
    for run in (f"{root}/run", tmp_path / "run"):
        hydra_pipe.record(conv_pipeline(epochs=1), run, encoding="projected", dim=40)
        assert hydra_pipe.reduce(run, method="hydra-fisher", keep_hypergradients=True)
        assert hydra_pipe.prune(run) > 0
        assert hydra_pipe.reduce(run, method="hydra-fisher", tests="1-3", overwrite=True)
        assert hydra_pipe.verify(run) == []
    assert contents(f"{root}/run") == contents(tmp_path / "run")


@in_memory
def test_the_same_command_does_nothing_and_overwrite_begins_anew(run: str) -> None:
    assert not hydra_pipe.record(conv_pipeline(), run, encoding="exact", dtype="float16")
    assert not hydra_pipe.reduce(run, method="hydra")
    assert not hydra_pipe.export(run, top=3, full=True, method="hydra")
    hydra_pipe.record(conv_pipeline(), run, encoding="exact", dtype="float32", overwrite=True)
    assert not location(f"{run}/relevance.zarr").exists()
    assert not location(f"{run}/rankings").exists()
    assert hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.verify(run) == []


@both
def test_damage_and_loss_are_found(run: str) -> None:
    rows = location(f"{run}/gradients.zarr/gradient/c/0/0")
    content = bytearray(rows.read_bytes())
    content[100] ^= 1
    rows.write_bytes(bytes(content))
    assert [fault.where for fault in hydra_pipe.verify(run)] == ["gradients.zarr/gradient/c/0/0"]
    with pytest.raises(StoreError, match="the checksum is wrong"):
        hydra_pipe.reduce(run, overwrite=True, keep_hypergradients=True, method="hydra")
    rows.unlink()
    with pytest.raises(StoreError, match="gradient lacks 1 chunk files"):
        hydra_pipe.reduce(run, overwrite=True, keep_hypergradients=True, method="hydra")


@both
def test_other_files_are_told_by_their_sizes_and_repaired(run: str) -> None:
    """Footprints of arrays' files have no checksum there, where each small read is a request."""
    relevance = Array.open(location(f"{run}/relevance.zarr/hydra"))
    relevance.write_file((0, 0), np.zeros(relevance.shape, np.float32))
    location(f"{run}/rankings/method=hydra/notes.txt").write_bytes(b"mine")
    location(f"{run}/checksums/record.json").unlink()
    found = {fault.where: fault.what for fault in hydra_pipe.verify(run)}
    assert sorted(found) == [
        "checksums/record.json",
        "rankings/method=hydra/notes.txt",
        "relevance.zarr/hydra/c/0/0",
    ]
    assert re.search(
        r"is not what was written: it has \d+ bytes, \d+ were written",
        found["relevance.zarr/hydra/c/0/0"],
    )
    assert hydra_pipe.verify(run, repair=True) == []
    assert list(RunDirectory.open(run).stages) == [RECORD, KEEP.of("hydra")]
    assert location(f"{run}/set-aside/rankings/method=hydra/notes.txt").read_bytes() == b"mine"
    assert hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.export(run, top=3, method="hydra")
    assert hydra_pipe.verify(run) == []


@in_memory
def test_a_check_of_a_run_reads_no_file_again_and_again(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading is a request: one for what metadata say, and one for their checksum."""
    read: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    fs = type(fsspec.filesystem("memory"))

    def counting(name: str, count: Counter[str]) -> None:
        original = getattr(fs, name)

        def counted(self: object, path: str, *args: object, **more: object) -> object:
            count[path] += path.endswith("zarr.json")
            return original(self, path, *args, **more)

        monkeypatch.setattr(fs, name, counted)

    counting("cat_file", read)
    counting("info", asked)
    assert hydra_pipe.verify(run) == []
    assert read["/" + run.removeprefix("memory://") + "/gradients.zarr/zarr.json"] == 2
    assert max(read.values()) == 2
    assert sum(asked.values()) == 0


@in_memory
def test_rows_are_pruned_and_tests_answered_without_them(run: str) -> None:
    whole = hydra_pipe.open_run(run).relevance("hydra").values
    assert hydra_pipe.prune(run) > 0
    assert not location(f"{run}/gradients.zarr/gradient/c").exists()
    hydra_pipe.reduce(run, tests="2-4", overwrite=True, method="hydra")
    found = hydra_pipe.open_run(run).relevance("hydra").values
    np.testing.assert_allclose(found, whole[:, 2:5], rtol=1e-4, atol=1e-6 * np.abs(whole).max())


@in_memory
def test_an_interrupted_export_leaves_a_stage_that_is_not_complete(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{root}/run"
    hydra_pipe.record(conv_pipeline(), run, encoding="exact", dtype="float16")
    hydra_pipe.reduce(run, method="hydra")

    def fail(*_: object) -> None:
        raise OSError("the connection is gone")

    with monkeypatch.context() as patch:
        patch.setattr("hydra_pipe.exporting.totals.Adding.classes", fail)
        with pytest.raises(OSError, match="connection is gone"):
            hydra_pipe.export(run, method="hydra")
    assert RunDirectory.open(run).stages[EXPORT.of("hydra")].state == "failed"
    assert not location(f"{run}/rankings").exists()
    assert hydra_pipe.export(run, method="hydra")
    assert hydra_pipe.verify(run) == []


@both
def test_a_recording_goes_on_from_a_state(root: str) -> None:
    """As it does on a disk: in two runs of the program, with the same rows."""
    pipelines = [conv_pipeline(), conv_pipeline()]

    def steps(pipeline: hydra_pipe.Pipeline, recorder: hydra_pipe.Recorder, which: range) -> None:
        inputs, targets = pipeline.train.tensors
        for step in which:
            ids = [(step * 5 + i) % len(inputs) for i in range(5)]
            with recorder.step(ids):
                pipeline.loss(pipeline.model(inputs[ids]), targets[ids]).mean().backward()
                pipeline.optimizer.step()
                pipeline.optimizer.zero_grad()

    def recorder_of(pipeline: hydra_pipe.Pipeline, name: str) -> hydra_pipe.Recorder:
        return hydra_pipe.Recorder(
            pipeline.model, pipeline.optimizer, f"{root}/{name}", 26, encoding="exact"
        )

    whole = recorder_of(pipelines[0], "whole")
    steps(pipelines[0], whole, range(6))
    whole.close()

    first = recorder_of(pipelines[1], "parts")
    steps(pipelines[1], first, range(3))
    kept = {
        "recorder": first.state_dict(),
        "model": {name: value.clone() for name, value in pipelines[1].model.state_dict().items()},
        "optimizer": pipelines[1].optimizer.state_dict(),
    }
    again = conv_pipeline()
    again.model.load_state_dict(kept["model"])
    again.optimizer.load_state_dict(kept["optimizer"])
    second = recorder_of(again, "parts")
    second.load_state_dict(kept["recorder"])
    steps(again, second, range(3, 6))
    second.close()
    rows = [hydra_pipe.open_run(f"{root}/{name}").gradients.rows for name in ("whole", "parts")]
    assert rows[0].n_rows == rows[1].n_rows == 30
    whole_rows, parts_rows = (found.features(slice(0, 30), slice(0, 100)) for found in rows)
    np.testing.assert_array_equal(whole_rows, parts_rows)
    assert torch.equal(pipelines[0].model[0].weight, again.model[0].weight)


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/run") == tmp_path / "run"
    assert location(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://x/run", r"name a directory, or a URL that fsspec knows"),
        ("gs://b/run", r"pip install 'hydra-pipe\[gcs\]'"),
    ],
)
def test_a_url_that_cannot_be_used_is_told(url: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        hydra_pipe.open_run(url)


@in_s3
def test_the_command_line_takes_urls_and_tells_what_is_wrong(run: str, root: str) -> None:

    def call(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    assert f"there is no run at {root}/none" in call("info", f"{root}/none", code=1)
    assert "healthy" in call("verify", run)
    assert json.loads(call("info", run, "--json"))["path"] == run
    assert f"rankings: {run}/rankings/method=hydra" in call(
        "export", run, "--method", "hydra", "--top", "2", "--overwrite"
    )
    told = call("reduce", "s3://no-such-bucket-here/run", code=1)
    assert "there is no run at s3://no-such-bucket-here/run" in told


def test_a_store_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    settings |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    for credentials in ({}, {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}):
        command = [sys.executable, "-m", "hydra_pipe.cli.app", "info", "s3://elsewhere/run"]
        # nor those of the machine that this runs on
        result = subprocess.run(
            command,
            env=settings
            | credentials
            | {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert result.returncode == 1
        assert "the object store cannot be used" in result.stderr
        assert "Traceback" not in result.stderr
