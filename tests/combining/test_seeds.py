"""`record --seeds`: several runs of one pipeline function, resumable."""

from pathlib import Path

import numpy as np
import pytest
from support.pipelines import mlp_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import PipelineError, UsageError
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD

PIPELINE = """
from support.pipelines import mlp_pipeline
from hydra_pipe import Pipeline

def pipeline(epochs: int = 1, seed: int = 0) -> Pipeline:
    return mlp_pipeline(epochs=epochs, seed=seed)

def seedless(epochs: int = 1) -> Pipeline:
    return mlp_pipeline(epochs=epochs)
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(PIPELINE)
    return str(tmp_path / "small.py")


def test_each_seed_is_a_run_of_its_own(spec: str, tmp_path: Path) -> None:
    out = tmp_path / "many"
    found = CliRunner().invoke(app, ["record", spec, str(out), "--seeds", "3", "--set", "epochs=2"])
    assert found.exit_code == 0, found.output
    assert "3 runs recorded" in found.output
    assert f"hydra-pipe combine {out}/seed-* --into {out}/combined" in found.output
    assert sorted(path.name for path in out.iterdir()) == ["seed-0", "seed-1", "seed-2"]
    for seed in range(3):
        settings = RunDirectory.open(out / f"seed-{seed}").stages[RECORD].settings
        assert (settings["set seed"], settings["set epochs"]) == (seed, 2)
    hydra_pipe.record(spec, tmp_path / "alone", settings={"seed": 1, "epochs": 2})
    one, other = (
        hydra_pipe.open_run(run).steps["loss"] for run in (out / "seed-1", tmp_path / "alone")
    )
    np.testing.assert_array_equal(one, other)


def test_the_same_call_records_what_is_left(spec: str, tmp_path: Path) -> None:
    out = tmp_path / "many"
    assert hydra_pipe.record(spec, out, seeds=2)
    ids = [RunDirectory.open(out / f"seed-{seed}").run_id for seed in range(2)]
    assert not hydra_pipe.record(spec, out, seeds=2)
    assert hydra_pipe.record(spec, out, seeds=3)
    assert [RunDirectory.open(out / f"seed-{seed}").run_id for seed in range(2)] == ids
    for seed in range(3):
        hydra_pipe.reduce(out / f"seed-{seed}")
    assert hydra_pipe.combine([out / f"seed-{seed}" for seed in range(3)], out / "combined")


def test_seeds_that_mean_nothing_are_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give 1 or more"):
        hydra_pipe.record(spec, tmp_path / "out", seeds=0)
    with pytest.raises(UsageError, match="--seeds and --set seed"):
        hydra_pipe.record(spec, tmp_path / "out", settings=["seed=3"], seeds=2)
    with pytest.raises(PipelineError, match="a Pipeline was given"):
        hydra_pipe.record(mlp_pipeline(), tmp_path / "out", seeds=2)
    with pytest.raises(UsageError, match="seed"):
        hydra_pipe.record(f"{spec}:seedless", tmp_path / "out", seeds=2)
    assert not (tmp_path / "out").exists()
