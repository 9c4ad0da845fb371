"""What bad input gets: one line that names the thing, a way out, the right exit code, nothing
written or what was there kept.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
from typer.testing import CliRunner, Result

from hydra_pipe.cli.app import app

BAD = str(Path(__file__).with_name("bad_pipelines.py"))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def assert_told(result: Result, message: str, code: int) -> None:
    """One line of ours, last, that says `message`; no traceback of ours."""
    lines = result.stderr.strip().split("\n")
    assert result.exit_code == code, result.stderr
    assert lines[-1].startswith("hydra-pipe: "), result.stderr
    assert re.search(message, lines[-1]), result.stderr
    assert "hydra_pipe/" not in result.stderr


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


RECORD = [
    # (pipeline, further arguments, message, exit code)
    ("no/such/file.py", [], r"there is no pipeline file no/such/file\.py", 1),
    (f"{BAD}:nowhere", [], r"has no function nowhere: define it, or name another", 1),
    (__file__.replace(".py", ".txt"), [], r"there is no pipeline file .*\.txt", 1),
    (BAD, ["--set", "speed=3"], r"no setting 'speed': it has lr, epochs, nesterov", 2),
    (BAD, ["--set", "lr=fast"], r"lr='fast' is not a float", 2),
    (BAD, ["--set", "epochs=2.5"], r"epochs='2.5' is not an int", 2),
    (
        BAD,
        ["--set", "nesterov=perhaps"],
        r"nesterov='perhaps' is not a bool: write true or false",
        2,
    ),
    (BAD, ["--set", "lr"], r"--set lr is not KEY=VALUE", 2),
    (f"{BAD}:needs_a_value", [], r"needs a value for 'lr': add --set lr=VALUE", 2),
    (
        BAD,
        ["--encoding", "best"],
        r"encoding 'best' is unknown: choose one of auto, exact, projected",
        2,
    ),
    (
        BAD,
        ["--dtype", "float8"],
        r"dtype 'float8' is unknown: choose one of float16, int8, float32",
        2,
    ),
    (BAD, ["--dim", "0"], r"dim is 0: it must be 1 or more", 2),
    (
        BAD,
        ["--dim", "2"],
        r"--dim 2 is less than one column for each of the 4 parameters: raise it to 4",
        1,
    ),
    (BAD, ["--set", "epochs=0"], r"epochs is int 0: it must be a positive integer", 1),
    (
        f"{BAD}:raises",
        [],
        r":raises raised: ValueError: invalid literal for int\(\) with base 10: 'twenty'",
        1,
    ),
    (f"{BAD}:returns_nothing", [], r"returned NoneType: it must return a Pipeline", 1),
    (
        f"{BAD}:scalar_loss",
        [],
        r"loss returned shape \(\) for a batch of 4: it must return one loss per sample, shape "
        r"\(4,\)",
        1,
    ),
    (f"{BAD}:loss_of_another_shape", [], r"loss returned shape \(4, 3\) for a batch of 4", 1),
    (f"{BAD}:loss_that_raises", [], r"the loss raised at step 0 \(epoch 1\): RuntimeError", 1),
    (
        f"{BAD}:model_that_raises",
        [],
        r"the model raised at step 0 \(epoch 1\): RuntimeError: mat1 and mat2",
        1,
    ),
    (f"{BAD}:no_pairs", [], r"train dataset yields Tensor: it must yield pairs", 1),
    (f"{BAD}:empty_test", [], r"test dataset is empty", 1),
    (f"{BAD}:no_dataset", [], r"train dataset is int 7: it must be a map-style dataset", 1),
    (f"{BAD}:too_few_labels", [], r"sample_labels has 3 entries for 20 samples", 1),
    (f"{BAD}:nothing_to_train", [], r"no trainable parameter", 1),
    (f"{BAD}:other_optimizer", [], r"Adadelta is not handled", 1),
    (
        f"{BAD}:strangers_parameters",
        [],
        r"holds 2 parameters that are not the model's, the first of shape \(3, 6\)",
        1,
    ),
    (f"{BAD}:penalty", [], r"books do not balance at step 0: the recorded rows of weight miss", 1),
    (f"{BAD}:mixing", [], r"depends on other rows of 0: the model mixes the samples", 1),
    (
        f"{BAD}:infinite_gradient",
        [],
        r"the gradient of 0\.weight is not finite at step 0 for samples \d+",
        1,
    ),
]


@pytest.mark.parametrize(
    ("pipeline", "more", "message", "code"), RECORD, ids=lambda value: str(value)[-40:]
)
def test_record_tells_and_writes_nothing(
    tmp_path: Path, pipeline: str, more: list[str], message: str, code: int
) -> None:
    run = tmp_path / "run"
    assert_told(call("record", pipeline, run, *more), message, code)
    assert not run.exists()


def test_a_pipeline_that_raises_shows_its_own_traceback_and_our_line_last(tmp_path: Path) -> None:
    lines = call("record", f"{BAD}:raises", tmp_path / "run").stderr.strip().split("\n")
    assert lines[0].strip().startswith(f'File "{BAD}"')
    assert 'int("twenty")' in lines[1]
    assert len(lines) == 4 or lines[-2].strip().startswith("^")


def test_debug_shows_the_whole_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hydra_pipe.cli.app",
        "info",
        str(tmp_path / "none"),
        "--debug",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


def test_without_debug_there_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hydra_pipe.cli.app", "info", str(tmp_path / "none")]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message", "steps"),
    [
        ("infinite_loss", r"the loss is inf at step 3 \(epoch 1\), samples \d+:", 3),
        (
            "broken_dataset",
            r"train dataset raised at samples .*OSError: the picture is broken",
            None,
        ),
        (
            "changing_shape",
            r"yields an \(input, target\) of shapes \(\d,\) and \(\) after \(\d,\) and \(\)",
            None,
        ),
    ],
)
def test_what_was_recorded_before_a_failure_stays_readable(
    tmp_path: Path, function: str, message: str, steps: int | None
) -> None:
    run = tmp_path / "run"
    assert_told(call("record", f"{BAD}:{function}", run), message, 1)
    if steps is None:
        return
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["stages"]["record"]["state"] == "failed"
    assert zarr.open_array(run / "gradients.zarr" / "gradient", mode="r").shape[0] == steps * 4
    assert zarr.open_array(run / "gradients.zarr" / "steps" / "loss", mode="r").shape[0] == steps
    assert_told(
        call("reduce", run, "--method", "hydra"),
        r"record is not finished \(state: failed\), the loss is inf",
        1,
    )
    assert json.loads(call("info", run, "--json").stdout)["recording"]["rows"] == steps * 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call("run", BAD, run).exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


KEEPS = [
    # (command after which what was there is as it was, message, exit code); RUN stands for the run
    (
        ["record", BAD, "RUN", "--set", "lr=0.2"],
        r"record was run with set lr=0\.1, now set lr=0\.2: use another",
        1,
    ),
    (
        ["record", BAD, "RUN", "--dtype", "int8"],
        r"with dtype=None, now dtype='int8'.*--overwrite",
        1,
    ),
    (["record", f"{BAD}:scalar_loss", "RUN", "--overwrite"], r"one loss per sample", 1),
    (
        ["export", "RUN", "--top", "3"],
        r"export hydra-fisher was run with top=100, now top=3",
        1,
    ),
    (["export", "RUN", "--method", "hydra", "--top", "0"], r"--top 0: give 1 or more", 2),
    (
        ["export", "RUN", "--method", "magic"],
        r"reduce magic has not been run: run hydra-pipe reduce",
        1,
    ),
    (["reduce", "RUN", "--method", "magic"], r"--method magic is unknown: choose one of hydra", 2),
    (
        ["reduce", "RUN", "--method", "hydra", "--scheduler", "tcp"],
        r"--scheduler tcp is unknown: choose one of threads, processes, synchronous, or the "
        r"address",
        2,
    ),
    (
        ["reduce", "RUN", "--method", "hydra", "--overwrite", "--chunks", "big"],
        r"--chunks big is not ROWSxFEATURES",
        2,
    ),
    (
        ["reduce", "RUN", "--method", "hydra", "--overwrite", "--chunks", "0x5"],
        r"--chunks 0x5 is not ROWSxFEATURES",
        2,
    ),
    (
        ["reduce", "RUN", "--method", "hydra", "--overwrite", "--memory", "much"],
        r"'much' is not a size",
        2,
    ),
    (
        ["reduce", "RUN", "--method", "hydra", "--overwrite", "--memory", "10MiB"],
        r"needs [\d.]+ [MG]iB, --memory is 10 MiB: raise --memory to \d+MiB",
        1,
    ),
]


@pytest.mark.parametrize(
    ("command", "message", "code"),
    KEEPS,
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_a_refused_command_keeps_what_was_there(
    run: Path, command: list[str], message: str, code: int
) -> None:
    before = snapshot(run)
    assert_told(call(*(str(run) if a == "RUN" else a for a in command)), message, code)
    assert snapshot(run) == before


def test_the_same_command_again_does_nothing(run: Path) -> None:
    before = snapshot(run)
    again = call("run", BAD, run)
    assert again.exit_code == 0
    assert again.stdout.count("nothing to do") == 3
    assert snapshot(run) == before


def test_reduce_and_export_come_after_what_they_need(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for command in ("reduce", "export", "info", "verify"):
        assert_told(
            call(command, run), r"there is no run at .*record one with hydra-pipe record", 1
        )
    call("record", BAD, run)
    assert_told(
        call("export", run, "--method", "hydra"),
        r"reduce hydra has not been run: run hydra-pipe reduce .* first",
        1,
    )


def edit_manifest(run: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((run / "run.json").read_text())
    change(manifest)
    (run / "run.json").write_text(json.dumps(manifest))


DAMAGE = [
    (
        "no manifest",
        lambda run: (run / "run.json").unlink(),
        r"is not a run of hydra-pipe: it has no run\.json",
    ),
    ("no JSON", lambda run: (run / "run.json").write_text('{"format": '), r"run\.json is damaged"),
    (
        "another format",
        lambda run: (run / "run.json").write_text("[1, 2]"),
        r"is not a manifest of hydra-pipe",
    ),
    (
        "a newer version",
        lambda run: edit_manifest(run, lambda m: m.update(format_version=99)),
        r"written in format version 99, this hydra-pipe reads up to 1: upgrade",
    ),
    (
        "a stage without state",
        lambda run: edit_manifest(run, lambda m: m["stages"]["record"].pop("state")),
        r"is damaged",
    ),
    (
        "no store",
        lambda run: shutil.rmtree(run / "gradients.zarr"),
        r"gradients\.zarr is missing: .*record the run again",
    ),
    (
        "no array",
        lambda run: shutil.rmtree(run / "gradients.zarr" / "scale"),
        r"scale is missing or damaged",
    ),
    (
        "a lost shard",
        lambda run: (run / "gradients.zarr/gradient/c/0/0").unlink(),
        r"gradient lacks 1 chunk files",
    ),
    (
        "a flipped bit",
        lambda run: flip(run / "gradients.zarr/gradient/c/0/0"),
        r"gradient cannot be read \(.*checksum.*\): the recording is not readable",
    ),
    (
        "broken metadata",
        lambda run: (run / "gradients.zarr/zarr.json").write_text("{"),
        r"metadata of .* is damaged",
    ),
    (
        "a foreign store",
        lambda run: (
            shutil.rmtree(run / "gradients.zarr"),
            zarr.create_group(run / "gradients.zarr"),
        ),
        r"is a Zarr store, but not one that hydra-pipe wrote",
    ),
]


def flip(file: Path, at: int = 40) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("what", "damage", "message"), DAMAGE, ids=[entry[0] for entry in DAMAGE])
def test_reduce_tells_of_damage(
    run: Path, what: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(run)
    assert_told(call("reduce", run, "--method", "hydra", "--overwrite"), message, 1)


def test_record_refuses_a_directory_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("four years of work")
    assert_told(call("record", BAD, tmp_path, "--overwrite"), r"holds files but is not a run", 1)
    assert (tmp_path / "thesis.txt").read_text() == "four years of work"
    assert_told(call("record", BAD, tmp_path / "thesis.txt"), r"is a file: name a directory", 1)


def test_overwrite_leaves_files_of_the_user_alone(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    assert call("record", BAD, run, "--set", "lr=0.2", "--overwrite").exit_code == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "relevance.zarr").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 512 KiB. Only root can make one, which CI is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_same_command_goes_on_after_room_is_made(
    small_disk: Path,
) -> None:
    run = small_disk / "run"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(456 * 1024))
    arguments = ("record", BAD, run, "--set", "epochs=40")
    assert_told(call(*arguments), r"No space left on device.*make room", 1)
    ballast.unlink()
    assert call(*arguments).exit_code == 0
    assert call("verify", run).exit_code == 0


def test_a_read_only_disk_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_told(
        call("record", BAD, small_disk / "run"),
        r"Read-only file system: the file system is read-only: name a run",
        1,
    )


def test_a_directory_inside_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_told(call("record", BAD, tmp_path / "file" / "run"), r"Not a directory", 1)


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (
        ["record"],
        ["reduce", "run", "--method", "hydra", "--colour", "red"],
        ["paint"],
    ):
        assert call(*arguments).exit_code == 2


def test_a_reader_that_has_seen_enough_is_no_failure_of_ours(tmp_path: Path) -> None:
    assert call("record", BAD, tmp_path / "run").exit_code == 0
    command = [sys.executable, "-m", "hydra_pipe.cli.app", "info", tmp_path / "run", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert "hydra-pipe:" not in process.stderr.read()
