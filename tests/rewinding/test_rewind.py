"""`rewind`: the samples of a step, their shares, and what the step did to the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.pipelines import conv_pipeline, mlp_pipeline
from support.recordings import arrays, decoded, decoded_group
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner, Result

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import ExtraError, RunError, UsageError
from hydra_pipe.rewinding import products
from hydra_pipe.store.run.manifest import RunDirectory

STEP = 5
# Wrong labels of one batch of BATCH samples.
WRONG, BATCH, N = range(32, 40), 8, 120


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["rewind", *map(str, arguments)])


def whole(blocks: dict[str, np.ndarray], weights: np.ndarray | None = None) -> np.ndarray:
    """Gradients in one, (row, numel); each block times its weight."""
    weights = np.ones(len(blocks)) if weights is None else weights
    return np.concatenate(
        [w * own for w, own in zip(weights, blocks.values(), strict=True)], axis=1
    )


def by_loop(
    run: Path, step: int, checkpoint: int, d: np.ndarray | float = 1.0
) -> dict[str, np.ndarray]:
    """What a step is made of, from what is on disk and docs/format.md alone.

    `d` multiplies the test gradients: the preconditioner of Adam.
    """
    found = arrays(run)
    mine = np.flatnonzero(found["step"] == step)
    rows = decoded(run, slice(int(mine[0]), int(mine[-1]) + 1))
    store = zarr.open_group(run / "gradients.zarr", mode="r")
    groups = [b["group"] for b in store.attrs["hydra_pipe_blocks"]["blocks"]]
    c = found["steps/gradient_scale"][step]
    updated = found["steps/updated"][step].astype(float)
    parts = whole(rows, c * updated)
    total = parts.sum(axis=0)
    rate = found["steps/learning_rate"][step][groups] * found["steps/step_factor"][step] * updated
    moved = whole(rows, c * rate)
    tests = d * whole(decoded_group(store, store[f"test/{checkpoint:010d}"], slice(None)))
    return {
        "train_id": found["sample"][mine],
        "loss": found["loss"][mine],
        "norm": np.linalg.norm(parts, axis=1),
        "share": parts @ total / (total @ total),
        "total": np.linalg.norm(total),
        "tests_change": -(moved @ tests.T).mean(axis=1),
        "change": -(moved.sum(axis=0) @ tests.T),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "exact", "dtype": "float32"},
        {"encoding": "auto", "dim": 400},
        {"encoding": "projected", "dim": 60, "dtype": "int8"},
    ],
    ids=["exact", "auto", "projected"],
)
def test_a_step_is_what_plain_loops_over_its_rows_give(
    recorded: Callable[..., Path], options: dict[str, object]
) -> None:
    run = recorded(test_every="epoch", **options)
    found = hydra_pipe.open_run(run).rewind(STEP)
    expected = by_loop(run, STEP, 4)
    assert found.summary["tests_step"] == 4
    table = found.samples.to_pandas()
    assert table["gradient_share"].is_monotonic_decreasing
    order = np.argsort(-expected["share"], kind="stable")
    assert table["train_id"].tolist() == expected["train_id"][order].tolist()
    for column, name in (
        ("gradient_norm", "norm"),
        ("gradient_share", "share"),
        ("tests_change", "tests_change"),
        ("loss", "loss"),
    ):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(table[column], expected[name][order], atol=2e-6 * scale)
    np.testing.assert_allclose(table["gradient_share"].sum(), 1)
    np.testing.assert_allclose(table["loss_share"].sum(), 1)
    np.testing.assert_allclose(found.summary["gradient_norm"], expected["total"], rtol=1e-5)
    tests = found.tests.to_pandas()
    assert tests["change"].is_monotonic_decreasing
    by_id = tests.sort_values("test_id")
    scale = np.abs(expected["change"]).max()
    np.testing.assert_allclose(by_id["change"], expected["change"], atol=2e-6 * scale)
    np.testing.assert_allclose(by_id["loss"], arrays(run)["test/0000000004/loss"])
    np.testing.assert_allclose(
        found.summary["tests_change"], table["tests_change"].sum(), rtol=1e-4
    )


def test_blocks_of_few_rows_give_the_same(
    recorded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(test_every="epoch", encoding="exact", dtype="float32")
    one = hydra_pipe.open_run(run).rewind(STEP)
    monkeypatch.setattr(products, "_BLOCK_ROWS", 3)
    many = hydra_pipe.open_run(run).rewind(STEP)
    for of_one, of_many in ((one.samples, many.samples), (one.tests, many.tests)):
        for name in ("gradient_norm", "gradient_share", "tests_change", "change"):
            if name in of_one.column_names:
                np.testing.assert_allclose(of_many[name], of_one[name], rtol=1e-4, atol=1e-7)


def test_labels_predictions_and_shares_are_those_of_the_recording(
    recorded: Callable[..., Path],
) -> None:
    run = recorded(test_every="epoch", encoding="exact", dtype="float32")
    frame = hydra_pipe.open_run(run).dynamics()
    own = frame[frame["step"] == STEP].set_index("train_id")
    table = hydra_pipe.open_run(run).rewind(STEP).samples.to_pandas().set_index("train_id")
    own = own.loc[table.index]
    assert table["label"].tolist() == own["target"].tolist()
    assert table["predicted"].tolist() == own["predicted"].tolist()
    np.testing.assert_allclose(table["loss_share"], own["loss"] / own["loss"].sum(), rtol=1e-6)


def test_under_adam_shares_are_of_the_gradient_and_the_change_has_the_preconditioner(
    tmp_path: Path,
) -> None:
    pipeline = mlp_pipeline()
    pipeline.optimizer = torch.optim.Adam(pipeline.model.parameters(), lr=0.01)
    hydra_pipe.record(pipeline, tmp_path / "run", test_every="epoch")
    run = hydra_pipe.open_run(tmp_path / "run")
    found = run.rewind(7)
    expected = by_loop(tmp_path / "run", 7, found.summary["tests_step"])
    table = found.samples.to_pandas().set_index("train_id").loc[expected["train_id"]]
    np.testing.assert_allclose(table["gradient_share"], expected["share"], atol=1e-5)
    assert any("preconditioner" in line for line in found.summary["says"])
    gradients = run.gradients
    root = gradients.preconditioner(found.summary["tests_step"])
    assert root is not None
    blocks = root.rank_one(gradients.layout).of_blocks(gradients.layout)
    tests = by_loop(tmp_path / "run", 7, found.summary["tests_step"], np.concatenate(blocks) ** 2)
    change = found.tests.to_pandas().sort_values("test_id")["change"]
    scale = np.abs(tests["change"]).max()
    np.testing.assert_allclose(change, tests["change"], atol=1e-4 * scale)


def train(run: Path, epochs: int = 8) -> None:
    """A training whose batch of samples 32 to 39 has wrong labels, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(N) % 4
    inputs = 0.3 * torch.randn(N, 6, generator=generator)
    inputs[torch.arange(N), targets] += 2
    labels = targets.clone()
    labels[WRONG] = (labels[WRONG] + 1) % 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hydra_pipe.Recorder(model, optimizer, run, n_samples=N)
    loader = recorder.track(DataLoader(TensorDataset(inputs, labels), batch_size=BATCH))
    for _ in range(epochs):
        for batch, own in loader:
            loss = F.cross_entropy(model(batch), own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    recorder.record_test(DataLoader(TensorDataset(inputs, targets), batch_size=40), F.cross_entropy)
    recorder.close()


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("spiked") / "run"
    train(run)
    return run


def test_a_batch_of_wrong_labels_is_a_spike_and_its_samples_are_named(spiked: Path) -> None:
    found = hydra_pipe.open_run(spiked).spikes()
    steps = found.table["first_step"].to_pylist()
    assert len(steps) >= 5
    assert {step % (N // BATCH) for step in steps} == {WRONG.start // BATCH}
    assert all(set(own) <= set(WRONG) for own in found.table["samples"].to_pylist())
    repeaters = found.repeaters.to_pandas()
    assert set(repeaters["train_id"]) == set(WRONG)
    assert (repeaters["spikes"] >= 4).all()
    labels = repeaters.set_index("train_id")["label"]
    assert all(labels[sample] == (sample + 1) % 4 for sample in WRONG)
    one = hydra_pipe.open_run(spiked).rewind(steps[-1])
    table = one.samples.to_pandas()
    assert one.summary["is_spike"]
    assert set(table["train_id"]) == set(WRONG)
    assert (
        table["spikes"] == table["train_id"].map(repeaters.set_index("train_id")["spikes"])
    ).all()
    assert (table["predicted"] == table["train_id"] % 4).all()
    assert one.summary["tests_change"] > 0, "the wrong labels have harmed the tests"


def test_a_step_between_spikes_is_no_spike(spiked: Path) -> None:
    one = hydra_pipe.open_run(spiked).rewind(50)
    assert one.summary["is_spike"] is False
    assert one.summary["tests_change"] < 0
    assert one.samples["spikes"].to_pylist() == [0] * BATCH


def test_norms_of_gradients_are_those_of_the_steps(recorded: Callable[..., Path]) -> None:
    run = recorded(test_every="epoch", encoding="exact", dtype="float32")
    found = hydra_pipe.open_run(run).spikes(by="gradient")
    for step in (0, STEP, 11):
        one = hydra_pipe.open_run(run).rewind(step)
        np.testing.assert_allclose(found.values[step], one.summary["gradient_norm"], rtol=1e-5)
    assert found.summary["n_spikes"] == 0
    assert "12 steps are too few" in found.summary["says"][0]


def test_the_command_names_the_next_command(spiked: Path, tmp_path: Path) -> None:
    done = call(spiked, "--spikes", "--picture", tmp_path / "loss.svg")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "loss", "expected", "score", "samples", "repeated"]
    assert all(
        len(line) <= 80 for line in lines if not line.startswith(("8 samples", "next", "pic"))
    )
    (following,) = [line for line in lines if line.startswith("next: ")]
    picture = (tmp_path / "loss.svg").read_text()
    assert picture.startswith("<?xml")
    assert call(spiked, "--spikes", "--picture", tmp_path / "again.svg").exit_code == 0
    assert (tmp_path / "again.svg").read_text() == picture
    done = call(*following.split()[3:])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith("8 samples, learning rate 0.1")
    assert "a spike (score" in lines[1]
    heads = "sample label predicted loss of loss |grad| of grad tests spikes"
    assert lines[2].split() == heads.split()
    assert {int(line.split()[0]) for line in lines[3 : 3 + BATCH]} == set(WRONG)
    assert "tests that the step harmed most:" in lines
    assert all(len(line) <= 80 for line in lines[2:] if not line.startswith("tests: "))


def test_json_has_what_python_has(spiked: Path, tmp_path: Path) -> None:
    found = hydra_pipe.open_run(spiked).spikes()
    done = call(spiked, "--spikes", "--json", "--picture", tmp_path / "loss.png")
    told = json.loads(done.stdout)
    assert told["spikes"] == found.table.to_pylist()
    assert told["repeaters"] == found.repeaters.to_pylist()
    assert told["n_spikes"] == found.table.num_rows
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    one = hydra_pipe.open_run(spiked).rewind(50)
    told = json.loads(call(spiked, "--step", 50, "--json").stdout)
    assert told["samples"] == one.samples.to_pylist()
    assert told["tests"] == one.tests.to_pylist()
    assert told["loss"] == one.summary["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --spikes, to find steps that stand out, or --step N"),
        (["--spikes", "--step", "3"], "give --spikes, to find steps that stand out, or --step N"),
        (["--step", "3", "--by", "loss"], "--by loss is for --spikes"),
        (["--spikes", "--by", "weather"], "--by weather: give loss or gradient"),
        (["--step", "120"], "step 120: steps 0 to 119 of"),
        (["--step", "-1"], "step -1: steps 0 to 119 of"),
        (["--spikes", "--top", "0"], "--top 0: give 1 or more"),
        (["--spikes", "--picture", "loss.gif"], "give a name that ends in .png or .svg"),
    ],
)
def test_bad_options_are_told(spiked: Path, arguments: list[str], message: str) -> None:
    done = call(spiked, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not Path("loss.gif").exists()


def test_a_picture_without_matplotlib_is_told(
    spiked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = call(spiked, "--spikes", "--picture", tmp_path / "loss.png")
    assert "a picture needs matplotlib, which is not installed" in done.stderr
    assert issubclass(ExtraError, hydra_pipe.HydraError)
    assert not (tmp_path / "loss.png").exists()


def test_a_pruned_run_still_tells_samples_and_losses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(mlp_pipeline(), run)
    whole_run = hydra_pipe.open_run(run).rewind(3).samples.to_pandas().set_index("train_id")
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(run)
    found = hydra_pipe.open_run(run).rewind(3)
    table = found.samples.to_pandas().set_index("train_id").loc[whole_run.index]
    assert table["loss_share"].tolist() == whole_run["loss_share"].tolist()
    assert found.samples["gradient_share"].null_count == len(table)
    assert found.tests is None
    assert found.summary["says"][-1].startswith("the rows were pruned")
    with pytest.raises(RunError, match="its rows were pruned"):
        hydra_pipe.open_run(run).spikes(by="gradient")
    assert call(run, "--step", 3).exit_code == 0


def test_without_tests_the_rest_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(mlp_pipeline(test=None), run)
    found = hydra_pipe.open_run(run).rewind(3)
    assert found.tests is None
    assert found.samples["tests_change"].null_count == found.samples.num_rows
    assert found.summary["says"][-1].startswith("no test gradients were taken")
    done = call(run, "--step", 3)
    assert done.exit_code == 0
    assert "tests" not in done.stdout.splitlines()[2]


def test_losses_that_are_not_known_leave_the_gradient(tmp_path: Path) -> None:
    """A loss that the recorder does not know by its name, in a loop that does not tell it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(40, 3)
    with hydra_pipe.Recorder(model, optimizer, tmp_path / "run", n_samples=40) as recorder:
        for step in range(30):
            ids = [(step * 4 + i) % 40 for i in range(4)]
            with recorder.step(ids):
                (model(inputs[ids]) ** 4).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    run = hydra_pipe.open_run(tmp_path / "run")
    found = run.rewind(25)
    assert found.summary["says"][0] == "the loss of this step is not known"
    assert found.samples["loss_share"].null_count == 4
    assert found.samples["spikes"].null_count == 4
    np.testing.assert_allclose(sum(found.samples["gradient_share"].to_pylist()), 1)
    assert run.spikes().by == "gradient"
    with pytest.raises(RunError, match="knows the loss of no step: give --by gradient"):
        run.spikes(by="loss")


def test_an_unfinished_recording_answers_for_its_committed_steps(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded(test_every="epoch", encoding="exact", dtype="float32"), run)
    manifest = json.loads((run / "run.json").read_text())
    recording = manifest["stages"]["record"]
    recording["state"] = "running"
    recording["facts"] = {
        "committed": {"n_steps": 8, "part_rows": [52], "tests": [4, 8], "n_tests": 7, "labels": []}
    }
    (run / "run.json").write_text(json.dumps(manifest))
    found = hydra_pipe.open_run(run).rewind(STEP)
    expected = by_loop(run, STEP, 4)
    np.testing.assert_allclose(
        sorted(found.samples["gradient_share"].to_pylist()), sorted(expected["share"]), atol=1e-5
    )
    with pytest.raises(UsageError, match="steps 0 to 7 of"):
        hydra_pipe.open_run(run).rewind(8)
    del recording["facts"]["committed"]
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="no step is committed yet"):
        hydra_pipe.open_run(run).rewind(0)
    assert RunDirectory.open(run).stages


def test_a_run_in_an_object_store_is_read(recorded: Callable[..., Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("upath")
    run = recorded(test_every="epoch", encoding="exact", dtype="float32")
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/rewind/run", recursive=True)
    there = hydra_pipe.open_run("memory://rewind/run")
    here = hydra_pipe.open_run(run)
    assert there.rewind(STEP).samples.equals(here.rewind(STEP).samples)
    assert there.spikes().table.equals(here.spikes().table)


def test_nothing_is_written(spiked: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in spiked.rglob("*")}
    call(spiked, "--spikes")
    call(spiked, "--step", 4)
    assert {file: file.stat().st_mtime_ns for file in spiked.rglob("*")} == before


def test_conv_pipeline_has_a_clipped_step() -> None:
    """The loops above check the scale of clipping and the rates of groups: both are there."""
    assert conv_pipeline().max_grad_norm == 0.5
    assert len(conv_pipeline().optimizer.param_groups) == 2
