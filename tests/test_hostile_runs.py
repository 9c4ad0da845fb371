"""A run may come from a stranger: whatever stands in it, reading it ends soon, in a result or in an
error of ours.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import blosc
from support import ROOT
from support.pipelines import conv_pipeline, images
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import HydraError, StoreError
from hydra_pipe.store.data.relevance import open_relevance
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.zarr.arrays import ROTTEN, Array, Group
from hydra_pipe.store.zarr.codec import checksum

Recorded = Callable[..., Path]
KINDS = ["rows", "kept"]
# Changes at random, some 0.1 s each. `python tests/hostile_reader.py RUN random 4000` tries more.
N_DAMAGES = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recorded: Recorded) -> dict[str, Path]:
    """One run with its rows, and one with hypergradients and without rows; both reduced and
    exported.
    """
    made = {}
    for kind in KINDS:
        made[kind] = run = shutil.copytree(
            recorded(encoding="exact", dtype="float32"), tmp_path_factory.mktemp(kind) / "run"
        )
        hydra_pipe.reduce(run, keep_hypergradients=kind == "kept", method="hydra")
        if kind == "kept":
            hydra_pipe.prune(run)
        hydra_pipe.export(run, top=3, full=True, method="hydra")
    return made


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, recorded: Recorded) -> Path:
    """A run with a probe and what was made of it, a matrix of hypergradients, a proposal and a
    report.
    """
    run = shutil.copytree(
        recorded(encoding="exact", dtype="float32"), tmp_path_factory.mktemp("probed") / "run"
    )
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.reduce(run, method="hydra-fisher", keep_hypergradients=True)
    hydra_pipe.probe(run, images(3, 5), name="late", pipeline=conv_pipeline())
    hydra_pipe.reduce(run, probe="late", method="hydra")
    hydra_pipe.clean(run, method="hydra")
    hydra_pipe.report(run)
    return run


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(finished["rows"], tmp_path / "run")


def read_by_another_process(run: Path, which: str, n: int) -> None:
    """With memory that is limited, which holds for a whole process.

    No torch: nothing that reads needs it.
    """
    script = Path(__file__).with_name("hostile_reader.py")
    done = subprocess.run(
        [sys.executable, script, run, which, str(n)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_of_any_json_ends_in_a_result_or_an_error_of_ours(
    finished: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    read_by_another_process(shutil.copytree(finished[kind], tmp_path / "run"), "random", N_DAMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_lie_in_agreement_are_refused_at_once(
    finished: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    read_by_another_process(shutil.copytree(finished[kind], tmp_path / "run"), "crafted", 0)


def test_what_was_made_of_a_probe_is_read_with_the_same_care(probed: Path, tmp_path: Path) -> None:
    read_by_another_process(shutil.copytree(probed, tmp_path / "run"), "both", N_DAMAGES // 4)


def put(array: Path, place: int, value: int) -> None:
    """Another value in an array of one file, with a checksum that fits."""
    stored = Array.open(array)
    values = stored.read().copy()
    values[place] = value
    stored.write_file((0,), values)


@pytest.mark.parametrize(
    ("column", "value"),
    [("sample", 26), ("sample", -1), ("sample", 2**62), ("step", 12), ("step", -1)],
)
@pytest.mark.parametrize("options", [{"tests": "0"}, {}, {"keep_hypergradients": True}])
def test_samples_and_steps_that_are_not_there_are_told(
    run: Path, column: str, value: int, options: dict[str, Any]
) -> None:
    put(run / "gradients.zarr" / column, 5, value)
    with pytest.raises(
        StoreError, match=rf"{column}s of .*gradients.zarr are -?\d+ to \d+, not within 0 to \d+"
    ):
        hydra_pipe.reduce(run, overwrite=True, method="hydra", **options)


def test_samples_that_are_not_there_are_told_by_export_and_from_hypergradients(
    run: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    put(run / "gradients.zarr/sample", 0, -3)
    with pytest.raises(StoreError, match=r"samples of .* are -3 to 25, not within 0 to 25"):
        hydra_pipe.export(run, overwrite=True, method="hydra")
    kept = shutil.copytree(finished["kept"], tmp_path / "kept")
    put(kept / "hypergradients/hydra.zarr/factored/sample", 0, 26)
    with pytest.raises(
        StoreError, match=r"samples of .*hydra.zarr are 0 to 26, not within 0 to 25"
    ):
        hydra_pipe.reduce(kept, overwrite=True, method="hydra")


def test_a_label_without_a_name_is_told(run: Path) -> None:
    labels = run / "gradients.zarr/labels/train"
    change(labels / "zarr.json", lambda data: data["attributes"].update(names=["a", "b", "c"]))
    put(labels, 0, 0)
    with pytest.raises(StoreError, match=r"labels of .* are 0 to 3, not within 0 to 2"):
        hydra_pipe.export(run, overwrite=True, method="hydra")


def change(file: Path, how: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_bytes())
    how(data)
    file.write_bytes(json.dumps(data).encode())


@pytest.mark.parametrize(
    "name",
    [
        "reduce ../../x",
        "reduce /etc",
        "reduce ..",
        "export a/b",
        "reduce ",
        "",
        "reduce x\n",
        "a\0",
    ],
)
def test_stages_whose_names_lead_elsewhere_are_refused(run: Path, name: str) -> None:
    change(
        run / "run.json", lambda data: data["stages"].update({name: data["stages"]["reduce hydra"]})
    )
    with pytest.raises(StoreError, match=r"run\.json is damaged \(a stage called "):
        RunDirectory.open(run)


@pytest.mark.parametrize("name", ["../relevance.zarr/hydra", "/etc", "..", "", "hydra/c"])
def test_methods_whose_names_lead_elsewhere_are_refused(run: Path, name: str) -> None:
    with pytest.raises(StoreError, match="has no array called"):
        open_relevance(run / "relevance.zarr", name)
    with pytest.raises(HydraError):
        hydra_pipe.export(run, method=name)
    with pytest.raises(HydraError):
        hydra_pipe.open_run(run).relevance(name)


@pytest.mark.parametrize(
    "name",
    ["../../../table.parquet", "/tmp/table.parquet", "..", "matrix/../samples.parquet", "part-1"],
)
def test_tables_elsewhere_are_not_read(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(data: Any) -> None:
        data["stages"]["export hydra"]["facts"]["files"][name] = 1

    change(run / "run.json", counted)
    read: list[Path] = []
    original = hydra_pipe.store.run.listing.read_file
    monkeypatch.setattr(
        "hydra_pipe.store.run.listing.read_file",
        lambda path, *most: (read.append(path), original(path, *most))[1],
    )
    assert [fault.what[:28] for fault in hydra_pipe.verify(run)] == [
        "export hydra has no table " + repr(name)[:2]
    ]
    assert read
    directories = [
        run / name
        for name in ("rankings/method=hydra", "rankings/method=hydra/matrix", "checksums")
    ]
    assert all(path.parent in directories for path in read)


@pytest.mark.parametrize("dtype", ["object", "O", "S1000", "datetime64", "V8", "complex64", "bool"])
def test_dtypes_that_are_not_numbers_are_refused(run: Path, dtype: str) -> None:
    """An array of objects would be one of pointers that the file chooses."""
    array = run / "gradients.zarr/sample"
    change(array / "zarr.json", lambda data: data.update(data_type=dtype))
    with pytest.raises(StoreError, match="is missing or damaged"):
        Array.open(array)


def test_chunks_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """An index of many chunks that are one would decode to any amount."""
    array = Array.create(tmp_path / "a", (400,), "int64", ("x",), (100,), (400,))
    array.write_file((0,), np.zeros(400, np.int64))
    content = array.file_path((0,)).read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)
    same = np.repeat(index[:1], 4, axis=0).tobytes()
    array.file_path((0,)).write_bytes(content[: int(index[0, 1])] + same + checksum(same))
    with pytest.raises(ROTTEN, match=r"the chunks of a shard of \d+ bytes overlap"):
        array.read()


def test_other_compressors_are_refused(tmp_path: Path) -> None:
    """Of these a byte may become a thousand and more, which nobody reckons with."""
    array = Array.create(tmp_path / "a", (100_000,), "int8", ("x",), (100_000,))
    body = blosc.compress(np.zeros(100_000, np.int8), b"zstd", 5, blosc.NOSHUFFLE, 0)
    body += bytes(1000 - len(body))
    body = body[:12] + len(body).to_bytes(4, "little") + body[16:]
    array.file_path((0,)).parent.mkdir()
    array.file_path((0,)).write_bytes(body + checksum(body))
    with pytest.raises(ROTTEN, match="compressed by something else than LZ4"):
        array.read()


def test_what_lz4_makes_of_nothing_is_within_the_bound(tmp_path: Path) -> None:
    """Zeros in large chunks are what compresses best, and must not be taken for a lie."""
    for n, shards in ((10**6, None), (10**6, (3 * 10**6,))):
        array = Array.create(tmp_path / str(shards), (3 * 10**6,), "float64", ("x",), (n,), shards)
        for i in range(3 if shards is None else 1):
            array.write_file((i,), np.zeros(n if shards is None else 3 * n))
        assert array.shortfall() is None
        assert not array.read().any()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: Path) -> None:
    for name in ("gradients.zarr/zarr.json", "gradients.zarr/gradient/c/0/0"):
        file = run / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(StoreError):
            hydra_pipe.reduce(run, overwrite=True, method="hydra")
        assert hydra_pipe.verify(run)
        file.unlink()
        file.write_bytes(content)


def test_groups_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    root = Group.create(path)
    for _ in range(12):
        path = Group.create(path / "a").path
    with pytest.raises(StoreError, match="more than 8 groups deep"):
        root.array_names()
    shutil.rmtree(tmp_path / "store/a")
    (tmp_path / "store/again").symlink_to(".", target_is_directory=True)
    with pytest.raises(StoreError, match="is a link to a group"):
        root.array_names()


def test_what_a_run_says_is_text_to_a_terminal(run: Path) -> None:
    def says(data: Any) -> None:
        data["run_id"] = "\x1b]0;title\x07[/bold]"
        data["stages"]["record"]["settings"]["a\x1b[2J"] = "[red]\x1b[2J"
        data["stages"]["record"]["facts"] |= {
            "seconds": "x",
            "stalled_seconds": 10**400,
            "n_steps": [1, "\x1b"],
        }
        data["stages"]["reduce hydra"] |= {"state": "failed", "facts": {"error": "\x1b[2J\nline"}}

    change(run / "run.json", says)
    for command in (["info"], ["verify"], ["export", "--overwrite"]):
        result = CliRunner().invoke(app, [command[0], str(run), *command[1:]])
        assert "\x1b" not in result.output
        assert "Traceback" not in result.output
        assert "defect" not in result.output, result.output
    info = CliRunner().invoke(app, ["info", str(run)])
    assert info.exit_code == 0
    assert "[/bold]" in info.stdout
    assert "[red]" in info.stdout


def test_half_of_a_pair_is_no_text(run: Path) -> None:
    for name, text in (("\\ud83d\\ude00", "\U0001f600"), ("é", "é")):
        change(run / "run.json", lambda data, name=name: data["versions"].update({"x": name}))
        (run / "run.json").write_text((run / "run.json").read_text().replace("\\\\u", "\\u"))
        assert hydra_pipe.open_run(run).info()["versions"]["x"] == text
    change(run / "run.json", lambda data: data["versions"].update({"x": "\ud800"}))
    with pytest.raises(StoreError, match=r"run\.json is damaged .*surrogates"):
        hydra_pipe.open_run(run)


def test_nothing_that_is_read_is_executed() -> None:
    """No unpickling in any form, and no evaluation of text.

    Python files that the user names are run, by `loading`.
    """
    forbidden = (
        r"\bimport pickle|\bpickle\.|np\.load\b|allow_pickle|\bmarshal\b|\bshelve\b"
        r"|(?<![.\w])(?:eval|exec)\(|\byaml\b"
    )
    for file in (ROOT / "hydra_pipe").rglob("*.py"):
        text = file.read_text()
        assert not re.search(forbidden, text), file
        for found in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[found.start() : found.start() + 200], file
