"""The options of reduce and prune, through the command line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.reduction.methods import METHODS
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName, result_of
from hydra_pipe.store.run.stages import REDUCE


@pytest.fixture
def run(tmp_path: Path, recorded: Callable[..., Path]) -> Path:
    return shutil.copytree(recorded(encoding="exact", dtype="float32"), tmp_path / "run")


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def test_a_dry_run_prints_the_plan_and_does_nothing(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    plan = call(
        "reduce",
        str(run),
        "--method",
        "hydra",
        "--dry-run",
        "--memory",
        "3GiB",
        "--tests",
        "0-2",
        "--mean",
    )
    found = dict(re.split(r"  +", line, maxsplit=1) for line in plan.splitlines())
    assert {
        "order",
        "passes",
        "tasks",
        "read",
        "written",
        "operations",
        "peak memory",
        "between workers",
    } <= set(found)
    assert found["samples x tests"] == "26 x 3, in 1 groups"
    assert found["peak memory"].endswith("of 3 GiB")
    assert (run / "run.json").read_bytes() == before
    assert not (run / "relevance.zarr").exists()


def test_selections_and_means_have_results_of_their_own(run: Path) -> None:
    assert "next: hydra-pipe export" in call(
        "reduce", str(run), "--method", "hydra", "--tests", "1,3-5"
    )
    assert f"next: hydra-pipe export {run} --method hydra-by-label" in call(
        "reduce", str(run), "--method", "hydra", "--by", "label"
    )
    assert f"next: hydra-pipe export {run} --method hydra-mean" in call(
        "reduce", str(run), "--method", "hydra", "--mean"
    )
    assert hydra_pipe.open_run(run).methods == ["hydra", "hydra-by-label", "hydra-mean"]
    assert "rankings" in call("export", str(run), "--method", "hydra-by-label")
    assert "--mean and --by: choose one of them" in call(
        "reduce", str(run), "--method", "hydra", "--mean", "--by", "label", code=2
    )


def test_rows_are_pruned_once_hypergradients_are_kept(run: Path) -> None:
    assert "--keep-hypergradients first" in call("prune", str(run), code=1)
    call("reduce", str(run), "--method", "hydra", "--keep-hypergradients")
    assert re.search(r"[\d.]+ [KM]iB deleted", call("prune", str(run)))
    assert "pruned already, nothing to do" in call("prune", str(run))
    assert "healthy" in call("verify", str(run))
    call("reduce", str(run), "--method", "hydra", "--tests", "0", "--overwrite")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--method", "grad-dot"], "grad-dot"),
        (["--method", "influence", "--mean"], "influence-mean"),
        (["--method", "tracin", "--by", "label", "--tests", "0-4"], "tracin-by-label"),
        (["--method", "self"], "self"),
    ],
)
def test_what_is_advised_makes_the_same_result_again(
    run: Path, options: list[str], name: str
) -> None:
    said = call("reduce", str(run), "--method", "hydra", *options)
    assert (
        "self_relevance" in said
        if name == "self"
        else f"next: hydra-pipe export {run} --method {name}\n" in said
    )
    again = RunDirectory.open(run).command(REDUCE.of(name))
    assert "nothing to do" in call(*again.split()[1:])
    assert hydra_pipe.open_run(run).methods == [name]


def test_every_method_is_in_the_help_and_in_the_documents() -> None:
    # lines end at hyphens
    text, helped = (
        (ROOT / "docs/methods.md").read_text(),
        re.sub(r"\s+", "", call("reduce", "--help")),
    )
    for method in METHODS:
        assert f"`{method}`" in text
        assert method in helped


@pytest.mark.parametrize("method", ["hydra", "grad-cos", "up-to-date"])
@pytest.mark.parametrize("by", [None, "label", "mean"])
@pytest.mark.parametrize("up_to_step", [None, 12])
@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize("test", [None, "wrong", "mean", "by_label", "2"])
def test_a_name_of_a_result_is_taken_apart_as_it_was_made(
    method: str, by: str | None, up_to_step: int | None, rank: int | None, test: str | None
) -> None:
    result = ResultName(method, by, up_to_step, rank, test)
    assert ResultName.parse(str(result)) == result
    assert result_of(str(ResultName(method, by, up_to_step, rank)), test) == str(result)
