"""What is said of the disk before anything is written: how much, and whether it fits."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.pipelines import conv_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.progress import Progress
from hydra_pipe.store import disk_space
from hydra_pipe.store.data.checkpoints import save_checkpoint
from hydra_pipe.store.files import tree_bytes
from hydra_pipe.units import parse_bytes

TINY = str(Path(__file__).parent / "crash" / "tiny.py")


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def promised(lines: list[str]) -> int:
    """Bytes that are said to be written at most."""
    found = [
        match for line in lines if (match := re.search(r"at most ([\d.]+ \w+) to write", line))
    ]
    assert len(found) == 1, lines
    return parse_bytes(found[0][1])


@contextmanager
def only_free(n_bytes: int):
    """A disk that has no more than that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_space, "free_bytes", lambda path: n_bytes)
        yield


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"encoding": "projected", "dim": 40}, {"test_every": "epoch"}],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_recording_takes_no_more_than_is_said_before_it(
    tmp_path: Path, options: dict[str, object], optimizer: str
) -> None:
    pipeline, said = conv_pipeline(epochs=3), Said()
    if optimizer == "AdamW":
        pipeline.optimizer = torch.optim.AdamW(pipeline.model.parameters())
        pipeline.scheduler = None
    highest, take = 0, save_checkpoint

    def taken(*arguments: object) -> None:
        nonlocal highest
        take(*arguments)
        highest = max(highest, tree_bytes(tmp_path / "run"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra_pipe.training.checkpointing.save_checkpoint", taken)
        hydra_pipe.record(
            pipeline, tmp_path / "run", checkpoint_every="1", progress=said, **options
        )
    assert 0 < max(highest, tree_bytes(tmp_path / "run")) <= promised(said.lines)


def test_the_root_of_the_preconditioner_is_counted_beside_each_test_gradients(
    tmp_path: Path,
) -> None:
    # the root of a wide layer has many more elements than factored rows have columns
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6000))
    pipeline, said = (
        conv_pipeline(
            epochs=30,
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            scheduler=None,
            n_train=8,
            n_test=2,
        ),
        Said(),
    )
    hydra_pipe.record(pipeline, tmp_path / "run", test_every="epoch", progress=said)
    roots = list((tmp_path / "run" / "gradients.zarr" / "test").glob("*/root_of_elements"))
    assert len(roots) == 30
    assert tree_bytes(tmp_path / "run") <= promised(said.lines)


def test_what_may_not_fit_is_said_before_it_is_written(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with only_free(10**6):
        told = [
            CliRunner().invoke(app, arguments)
            for arguments in (
                ["record", TINY, run],
                ["reduce", run],
                ["reduce", run, "--dry-run"],
                ["export", run, "--full"],
            )
        ]
    assert [result.exit_code for result in told] == [0, 0, 0, 0]
    assert re.search(
        r"52 rows to record: at most .* to write, and only 977 KiB free: it may not fit",
        told[0].stderr,
    )
    assert "free" not in told[1].stderr
    assert re.search(r"written +at most 728 B to write, 977 KiB free", told[2].stdout)
    with only_free(100):
        told = [
            CliRunner().invoke(app, [*arguments, "--overwrite"])
            for arguments in (["reduce", run], ["export", run, "--full"])
        ]
    for result in told:
        assert re.search(
            r"at most .* to write, and only 100 B free: it may not fit; on a full disk the "
            r"command stops",
            result.stderr,
        )


def test_free_bytes_are_those_of_the_file_system_that_a_run_is_to_be_on(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert disk_space.free_bytes(tmp_path / "is" / "not" / "there") == pytest.approx(
        found.f_bavail * found.f_frsize, rel=0.1
    )
    from upath import UPath

    assert disk_space.free_bytes(UPath("memory://run")) is None
    assert disk_space.room_for(5 * 2**30, UPath("memory://run")) == "at most 5 GiB to write"
