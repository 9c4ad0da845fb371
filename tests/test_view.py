"""`open_run`, `verify`, `info`: a finished run as others see it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from support.pipelines import conv_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import RunError
from hydra_pipe.store.files import tree_bytes
from hydra_pipe.units import format_bytes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recorded: Callable[..., Path]) -> Path:
    run = Path(shutil.copytree(recorded(), tmp_path_factory.mktemp("view") / "run"))
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.export(run, method="hydra")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_relevance_is_an_xarray_with_labels(finished: Path) -> None:
    relevance = hydra_pipe.open_run(finished).relevance("hydra")
    assert isinstance(relevance, xarray.DataArray)
    assert relevance.dims == ("sample", "test")
    assert set(relevance.coords) == {"sample", "test", "sample_label", "test_label"}
    assert relevance.sizes == {"sample": 26, "test": 7}
    assert relevance.attrs == {
        "method": "hydra",
        "sign": "positive: helpful, leaving the training sample out raises the test loss",
        "unit": "test loss",
        "run_id": hydra_pipe.open_run(finished).run_id,
    }
    pipeline = conv_pipeline()
    np.testing.assert_array_equal(relevance.sample_label, pipeline.train.tensors[1])
    np.testing.assert_array_equal(relevance.test_label, pipeline.test.tensors[1])


def test_relevance_of_chosen_test_samples_and_of_means_has_their_ids_and_labels(run: Path) -> None:
    labels = conv_pipeline().test.tensors[1].numpy()
    hydra_pipe.reduce(run, by="label", method="hydra")
    means = hydra_pipe.open_run(run).relevance("hydra-by-label")
    assert means.dims == ("sample", "test_group")
    np.testing.assert_array_equal(means.test_group_label, np.unique(labels))
    assert means.attrs["method"] == "hydra-by-label"
    hydra_pipe.reduce(run, tests="2,4-5", overwrite=True, method="hydra")
    chosen = hydra_pipe.open_run(run).relevance("hydra")
    np.testing.assert_array_equal(chosen.test, [2, 4, 5])
    np.testing.assert_array_equal(chosen.test_label, labels[[2, 4, 5]])


def test_xarray_opens_the_store_itself(finished: Path) -> None:
    dataset = xarray.open_zarr(finished / "relevance.zarr", consolidated=False)
    assert dataset["hydra"].dims == ("sample", "test")
    np.testing.assert_array_equal(
        dataset["hydra"].to_numpy(), hydra_pipe.open_run(finished).relevance("hydra")
    )


def test_xarray_opens_all_results_at_once_with_coordinates(run: Path) -> None:
    hydra_pipe.reduce(run, by="mean", method="hydra")
    hydra_pipe.reduce(run, by="label", method="hydra")
    hydra_pipe.reduce(run, method="tracin", tests="2,4-5")
    hydra_pipe.reduce(run, method="self")
    hydra_pipe.probe(run, conv_pipeline(n_test=4).test, name="late", pipeline=conv_pipeline())
    hydra_pipe.reduce(run, probe="late", method="hydra")
    dataset = xarray.open_zarr(run / "relevance.zarr", consolidated=False)
    train, test = (
        data.tensors[1].numpy() for data in (conv_pipeline().train, conv_pipeline().test)
    )
    opened = hydra_pipe.open_run(run)
    assert set(dataset.data_vars) == set(opened.methods)
    for method in opened.methods:
        np.testing.assert_array_equal(dataset[method], opened.relevance(method))
        np.testing.assert_array_equal(dataset[method].sample, np.arange(26))
        np.testing.assert_array_equal(dataset[method].sample_label, train)
    np.testing.assert_array_equal(dataset["hydra"].test, np.arange(7))
    np.testing.assert_array_equal(dataset["hydra"].test_label, test)
    assert (
        dataset["hydra-by-label"]["test_of_hydra-by-label"].to_numpy().tolist()
        == np.unique(test).tolist()
    )
    assert dataset["tracin"]["test_of_tracin"].to_numpy().tolist() == [2, 4, 5]
    assert dataset["hydra-of-late"].sizes == {"sample": 26, "test_of_hydra-of-late": 4}
    assert hydra_pipe.verify(run) == []
    hydra_pipe.reduce(run, method="tracin", overwrite=True)
    again = xarray.open_zarr(run / "relevance.zarr", consolidated=False)
    assert again["tracin"].dims == ("sample", "test")
    assert "test_of_tracin" not in again.coords
    assert hydra_pipe.verify(run) == []


def test_xarray_opens_every_group_of_a_run_and_takes_labels_for_labels(run: Path) -> None:
    hydra_pipe.reduce(run, by="label", keep_hypergradients=True, method="hydra")
    for place in ("gradients.zarr", "relevance.zarr", "hypergradients/hydra.zarr"):
        for file in (run / place).rglob("zarr.json"):
            if json.loads(file.read_text())["node_type"] == "group":
                group = str(file.parent.relative_to(run / place))
                xarray.open_zarr(
                    run / place, group=None if group == "." else group, consolidated=False
                ).load()
    labels = xarray.open_zarr(run / "gradients.zarr", group="labels", consolidated=False)
    assert dict(labels.indexes) == {}
    assert set(labels.data_vars) == {"train", "test"}
    np.testing.assert_array_equal(labels["test"], conv_pipeline().test.tensors[1])


def test_labels_of_words_are_numbers_with_their_names_beside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [["cat", "añ ß"][int(target) % 2] for target in conv_pipeline().test.tensors[1]]
    hydra_pipe.record(conv_pipeline(test_labels=words), run)
    hydra_pipe.reduce(run, by="label", method="hydra")
    label = xarray.open_zarr(run / "relevance.zarr", consolidated=False).test_label
    assert [label.attrs["names"][code] for code in label.to_numpy()] == words


def test_wrong_coordinates_are_found_and_repaired(run: Path) -> None:
    hydra_pipe.reduce(run, by="label", method="hydra")
    for name in ("sample", "test_label", "test_of_hydra-by-label"):
        coordinate = zarr.open_array(run / "relevance.zarr" / name)
        coordinate[0] = 5
        assert [fault.where for fault in hydra_pipe.verify(run)] == [f"relevance.zarr/{name}"]
        assert hydra_pipe.verify(run, repair=True) == []
        shutil.rmtree(run / "relevance.zarr" / name)
        assert hydra_pipe.verify(run) == []  # they may be absent


def test_relevance_of_a_method_that_was_not_computed_is_refused(finished: Path) -> None:
    with pytest.raises(
        RunError, match=r"no relevance of method magic \(it has hydra\): run hydra-pipe reduce"
    ):
        hydra_pipe.open_run(finished).relevance("magic")


def test_steps_and_gradients_are_there(finished: Path) -> None:
    run = hydra_pipe.open_run(finished)
    assert run.steps["learning_rate"].shape == (12, 2)
    assert run.steps["loss"].shape == (12,)
    assert run.gradients.rows.n_rows == 78
    assert run.methods == ["hydra"]


def test_info_says_what_is_recorded_and_how_exactly(finished: Path) -> None:
    info = json.loads(CliRunner().invoke(app, ["info", str(finished), "--json"]).stdout)
    recording = info["recording"]
    assert recording["features"] == sum(b["columns"] for b in recording["blocks"])
    assert recording["parameters"] == sum(p.numel() for p in conv_pipeline().model.parameters())
    assert {b["name"]: b["encoding"] for b in recording["blocks"]}["5.weight"] == "factored"
    assert all(b["exact"] for b in recording["blocks"])
    shown = CliRunner().invoke(app, ["info", str(finished), "--blocks"]).stdout
    for text in ("5.weight", "12x64", "factored", "complete", "float16", "encoding=auto"):
        assert text in shown


def test_info_shows_a_person_what_comes_next_whole_names_and_no_checksums(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = torch.nn.ModuleDict({f"part{i}": torch.nn.Linear(64, 64) for i in range(2)})

    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_with_a_long_name = layers
            self.head = torch.nn.Linear(64, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = inputs.flatten(1)
            for layer in self.transformer_with_a_long_name.values():
                hidden = layer(hidden).relu()
            return self.head(hidden)

    model = Deep()
    deep = run.with_name("deep")
    hydra_pipe.record(
        conv_pipeline(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), scheduler=None
        ),
        deep,
    )
    monkeypatch.setenv("COLUMNS", "40")
    shown = CliRunner().invoke(app, ["info", str(deep), "--blocks"]).stdout
    for name, _ in model.named_parameters():
        assert f"\n{name} " in shown
    assert shown.splitlines()[-1] == f"next: hydra-pipe reduce {deep}"
    assert "encoding: 6 factored; lossless except for the dtype" in shown
    assert f"on disk: {format_bytes(tree_bytes(deep))}" in shown
    assert "\nblock " not in CliRunner().invoke(app, ["info", str(deep)]).stdout
    done = CliRunner().invoke(app, ["info", str(run)]).stdout
    manifest = json.loads((run / "run.json").read_text())
    for stage in manifest["stages"].values():
        for fact, value in stage["facts"].items():
            if fact == "checksums" or fact.startswith("of_") or fact.endswith("sha256"):
                assert str(value)[:8] not in done
                assert f"{fact}: " not in done
    assert (
        json.loads(CliRunner().invoke(app, ["info", str(run), "--json"]).stdout)["stages"]
        == manifest["stages"]
    )
    hydra_pipe.reduce(run, by="mean", method="hydra")
    assert (
        f"next: hydra-pipe export {run} --method hydra-mean"
        in CliRunner().invoke(app, ["info", str(run)]).stdout
    )


@pytest.fixture
def crowded(run: Path) -> Path:
    """A run whose manifest has 18 stages more, the last but one of them failed."""
    manifest = json.loads((run / "run.json").read_text())
    methods = ("tracin", "grad-dot", "grad-cos", "influence", "hydra-mean", "hydra-of-new")
    for kind, facts in (
        ("reduce", {"seconds": 12.5, "n_samples": 26}),
        ("export", {"seconds": 0.1}),
        ("report", {"n_bytes": 60_066, "left_out": [], "no_samples": None}),
    ):
        for method in methods:
            stage = {"state": "complete", "settings": {"top": 5}, "facts": facts}
            manifest["stages"][f"{kind} {method}"] = stage
    failed = {"state": "failed", "settings": {}, "facts": {"error": "x" * 500}}
    manifest["stages"]["report hydra-mean"] = failed
    (run / "run.json").write_text(json.dumps(manifest))
    return run


def test_info_fits_a_screen(crowded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns and 24 lines, one of which is the prompt's."""
    monkeypatch.chdir(crowded.parent)
    shown = CliRunner().invoke(app, ["info", "run"]).stdout.splitlines()
    assert 18 <= len(shown) <= 23
    assert max(map(len, shown)) <= 80
    stages = json.loads((crowded / "run.json").read_text())["stages"]
    (left_out,) = [int(line.split()[1]) for line in shown if line.endswith("more stages: --json")]
    named = [line.split("  ")[0] for line in shown if line.split("  ")[0] in stages]
    assert len(named) == len(stages) - left_out
    assert "record" in named
    assert "report hydra-of-new" in named
    (failed,) = [line for line in shown if line.startswith("report hydra-mean ")]
    assert failed.split()[2] == "failed"
    assert failed.endswith("xxx...")


def test_the_final_checkpoint_is_the_trained_model(finished: Path) -> None:
    pipeline = conv_pipeline()
    hydra_pipe.train(pipeline)
    kept = torch.load(finished / "checkpoints" / "final.pt", weights_only=True)
    for name, value in pipeline.model.state_dict().items():
        assert torch.equal(kept[name], value)


def test_a_healthy_run_verifies(finished: Path) -> None:
    assert hydra_pipe.verify(finished) == []
    result = CliRunner().invoke(app, ["verify", str(finished)])
    assert (result.exit_code, result.stdout) == (0, f"{finished}: healthy\n")


def test_verify_tells_of_an_unfinished_stage(run: Path) -> None:
    manifest = json.loads((run / "run.json").read_text())
    manifest["stages"]["reduce hydra"]["state"] = "running"
    (run / "run.json").write_text(json.dumps(manifest))
    assert [(f.where, f.what) for f in hydra_pipe.verify(run)] == [
        ("run.json", "reduce hydra is not finished (state: running): run it again")
    ]
