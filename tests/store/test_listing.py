"""Files of an older run, left by a copy that deletes nothing, are nobody's: results are of what the
manifest lists.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.pipelines import conv_pipeline, images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import StoreError
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.evaluations import digest_of
from hydra_pipe.store.data.sweep_state import load_state, save_state
from hydra_pipe.store.run.listing import unlisted
from hydra_pipe.store.run.manifest import RunDirectory

N, N_TESTS = 24, 6


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def looped(
    run: Path, *, seed: int = 0, labels: bool = False, adam: bool = False, on_the_way: bool = False
) -> None:
    """A run of a loop of one's own; its test gradients are taken at the end, and on the way where
    that is asked for.
    """
    torch.manual_seed(seed)
    inputs, targets = torch.randn(N + N_TESTS, 5), torch.randn(N + N_TESTS, 2)
    model = nn.Linear(5, 2)
    optimizer = (
        torch.optim.Adam(model.parameters())
        if adam
        else torch.optim.SGD(model.parameters(), lr=0.1)
    )
    names = {"sample_labels": [f"s{i % 3}" for i in range(N)]} if labels else {}
    tests = DataLoader(TensorDataset(inputs[N:], targets[N:]), batch_size=3)
    of_tests = {"labels": [f"t{i % 2}" for i in range(N_TESTS)]} if labels else {}
    with_steps = 3 if on_the_way else 2

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((output - target) ** 2).mean(1)

    recorder = Recorder(model, optimizer, run, N, **names)
    for step in range(with_steps):
        with recorder.step(torch.arange(N)):
            loss(model(inputs[:N]), targets[:N]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if on_the_way or step == with_steps - 1:
            recorder.record_test(tests, loss, **of_tests)
    recorder.close()


def trained(run: Path, epochs: int, **options: object) -> None:
    hydra_pipe.record(conv_pipeline(epochs=epochs), run, **options)


def everything(run: Path) -> None:
    """Every stage that leaves optional files."""
    looped(run, labels=True, on_the_way=True, seed=1)
    probe(run, labels=True)
    for method in ("hydra", "tracin", "self"):
        hydra_pipe.reduce(run, method=method)
    hydra_pipe.reduce(run, by="label", keep_hypergradients=True, method="hydra")
    hydra_pipe.export(run, full=True, method="hydra")


def probe(run: Path, *, labels: bool, seed: int = 1) -> None:
    """A probe at the final parameters, which are found by training again."""
    torch.manual_seed(seed)
    inputs, targets = torch.randn(N + N_TESTS, 5), torch.randn(N + N_TESTS, 2)
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(hydra_pipe.open_run(run).gradients.n_steps):
        ((model(inputs[:N]) - targets[:N]) ** 2).mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    hydra_pipe.probe(
        run,
        TensorDataset(inputs[N:], targets[N:]),
        name="some",
        labels=["a", "b", "a", "b", "a", "b"] if labels else None,
        model=model,
        loss=lambda output, target: ((output - target) ** 2).mean(1),
    )


# old run, new run
PAIRS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "more epochs": (lambda run: trained(run, 3, test_every="epoch"), lambda run: trained(run, 2)),
    "a probe and everything else": (everything, lambda run: looped(run)),
    "labels": (lambda run: looped(run, labels=True, seed=1), lambda run: looped(run)),
    "a preconditioner": (
        lambda run: looped(run, adam=True, on_the_way=True),
        lambda run: looped(run),
    ),
    "labels of Adam": (
        lambda run: looped(run, adam=True, labels=True),
        lambda run: looped(run, adam=True, seed=1),
    ),
    "tests on the way": (
        lambda run: looped(run, on_the_way=True, labels=True),
        lambda run: looped(run, labels=True, seed=1),
    ),
}
RESULTS = ("hydra", "tracin", "grad-dot", "hydra-mean", "self")


def results(run: Path) -> dict[str, object]:
    """Everything that stages make of a run."""
    found: dict[str, object] = {}
    for method in ("hydra", "tracin", "grad-dot", "self"):
        hydra_pipe.reduce(run, method=method)
    hydra_pipe.reduce(run, by="mean", method="hydra")
    for name in RESULTS:
        relevance = hydra_pipe.open_run(run).relevance(name)
        found[name] = relevance.to_numpy().tobytes()
        found[f"coordinates of {name}"] = {
            key: value.to_numpy().tolist() for key, value in relevance.coords.items()
        }
    hydra_pipe.export(run, full=True, method="hydra")
    for file in sorted((run / "rankings/method=hydra").rglob("*.parquet")):
        found[str(file.relative_to(run))] = pq.ParquetFile(file).read().to_pylist()
    found["clean"] = hydra_pipe.clean(run, lowest=3, method="hydra").drop.to_pylist()
    found["recording"] = hydra_pipe.open_run(run).info()["recording"]
    return found


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, dict[str, object]]]:
    """For a pair: a copy of the old run with the new one copied over it, and what stages make of
    the new one alone.
    """
    kept: dict[str, tuple[Path, dict[str, object]]] = {}

    def make(name: str) -> tuple[Path, dict[str, object]]:
        if name not in kept:
            place = tmp_path_factory.mktemp("listing")
            for run, recorded in zip(("old", "new"), PAIRS[name], strict=True):
                recorded(place / run)
            shutil.copytree(place / "old", place / "mixed")
            shutil.copytree(place / "new", place / "mixed", dirs_exist_ok=True)
            kept[name] = place / "mixed", results(place / "new")
        return kept[name]

    return make


@pytest.mark.parametrize("pair", PAIRS)
def test_what_an_older_run_has_left_changes_no_result(
    made: Callable[[str], tuple[Path, dict[str, object]]], tmp_path: Path, pair: str
) -> None:
    mixed, expected = made(pair)
    run = Path(shutil.copytree(mixed, tmp_path / "run"))
    assert results(run) == expected


@pytest.mark.parametrize("pair", PAIRS)
def test_each_stage_says_before_it_works_which_files_are_not_of_the_run(
    made: Callable[[str], tuple[Path, dict[str, object]]], tmp_path: Path, pair: str
) -> None:
    run = Path(shutil.copytree(made(pair)[0], tmp_path / "run"))
    strays = unlisted(RunDirectory.open(run))
    assert strays
    for stage in (hydra_pipe.reduce, hydra_pipe.export, hydra_pipe.clean):
        said = Said()
        stage(run, method="hydra", progress=said)
        assert said.lines[0].startswith(
            "not read, because run.json does not list them: gradients.zarr/"
        ), stage
        assert strays[0] in said.lines[0]
        assert "verify" in said.lines[0]
    hydra_pipe.verify(run, repair=True)
    assert hydra_pipe.verify(run) == []
    assert unlisted(RunDirectory.open(run)) == []


def test_a_healthy_run_with_every_stage_has_nothing_that_is_not_listed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    everything(run)
    hydra_pipe.clean(run, lowest=2, method="hydra")
    hydra_pipe.reduce(run, probe="some", method="hydra")
    said = Said()
    hydra_pipe.export(run, probe="some", progress=said, method="hydra")
    assert unlisted(RunDirectory.open(run)) == []
    assert not any("not read" in line for line in said.lines)


def test_labels_of_an_older_probe_are_not_those_of_one_without(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for run, labels in ((old, True), (new, False)):
        looped(run, seed=1)
        probe(run, labels=labels)
    shutil.copytree(new, old, dirs_exist_ok=True)
    for run in (old, new):
        hydra_pipe.reduce(run, probe="some", method="hydra")
        hydra_pipe.export(run, probe="some", method="hydra")
    tables = [
        pq.ParquetFile(run / "rankings/method=hydra-of-some/part-00000.parquet").read().to_pylist()
        for run in (old, new)
    ]
    assert tables[0] == tables[1]
    assert tables[0][0]["test_label"] is None


def test_groups_of_ranks_of_an_older_run_are_not_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    looped(run)
    before = results(Path(shutil.copytree(run, tmp_path / "alone")))
    for rank in ("0", "1"):
        shutil.copytree(run / "gradients.zarr/steps", run / "gradients.zarr/rank" / rank / "steps")
        shutil.copy(
            run / "gradients.zarr/steps/zarr.json", run / "gradients.zarr/rank" / rank / "zarr.json"
        )
    shutil.copy(run / "gradients.zarr/steps/zarr.json", run / "gradients.zarr/rank/zarr.json")
    shutil.rmtree(run / "gradients.zarr/rank/1/steps/loss/c")  # of no consequence: nobody looks
    assert results(run) == before


def test_an_interrupted_recording_reads_no_labels_or_tests_but_its_own(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    looped(old, labels=True, on_the_way=True)
    torch.manual_seed(0)
    inputs, targets, model = torch.randn(30, 5), torch.randn(30, 2), nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, new, N)
    for _ in range(2):
        with recorder.step(torch.arange(N)):
            ((model(inputs[:N]) - targets[:N]) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.record_test(
        DataLoader(TensorDataset(inputs[N:], targets[N:]), batch_size=3),
        lambda output, target: ((output - target) ** 2).mean(1),
    )
    recorder.state_dict()
    shutil.copytree(new, old, dirs_exist_ok=True)
    recorder.close()
    hydra_pipe.reduce(old, up_to_step=2, method="hydra")
    found = hydra_pipe.open_run(old)
    assert set(found.relevance("hydra-upto-2").coords) == {"sample", "test"}
    assert found.info()["recording"]["test_checkpoints"] == [2]


def test_without_its_list_a_recording_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    looped(run)
    (run / "checksums/record.json").unlink()
    with pytest.raises(
        StoreError, match=r"checksums/record\.json is missing: .* verify .* --repair"
    ):
        hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.verify(run, repair=True)
    assert hydra_pipe.reduce(run, method="hydra")


def test_a_sweep_does_not_go_on_from_where_another_run_was(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    state = {"adjoint": np.ones((3, 2), np.float32)}
    for run, seed in ((old, 0), (new, 1)):
        looped(run, seed=seed)
        hydra_pipe.reduce(run, method="hydra-fisher")
    array = Path("relevance.zarr/hydra-fisher")
    save_state(old / array, (0, 3), {"taken": 1}, state)
    assert load_state(old / array, (0, 3), state) is not None
    shutil.copy(old / array / "sweep-0-3", new / array)
    assert load_state(new / array, (0, 3), state) is None


def test_retrainings_of_another_run_are_not_taken_for_this_ones() -> None:
    weights = np.ones((2, 3), np.float32)
    assert digest_of("a" * 32, weights, 0, "weights") != digest_of("b" * 32, weights, 0, "weights")


def test_a_table_of_retrainings_of_an_earlier_proposal_is_not_this_ones(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 2)
    hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.clean(run, lowest=2, method="hydra").retraining == []
    place = run / "cleaning/method=hydra"
    shutil.copy(place / "drop.parquet", place / "retraining.parquet")
    assert hydra_pipe.clean(run, lowest=2, method="hydra").retraining == []


def test_a_recording_that_goes_on_lists_nothing_of_an_older_one(tmp_path: Path) -> None:
    """`seal` lists what is there: going on takes out what is not the recording's before."""
    run = tmp_path / "run"
    torch.manual_seed(0)
    data = images(16, 1)

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, Recorder]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, Recorder(model, optimizer, run, 16)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        with recorder.step(torch.arange(16)):
            nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, recorder = begun()
    step(model, optimizer, recorder)
    state = json.loads(json.dumps(recorder.state_dict()))
    recorder.close()
    manifest = json.loads((run / "run.json").read_text())
    manifest["stages"]["record"] |= {"state": "failed", "facts": {}}
    (run / "run.json").write_text(json.dumps(manifest))
    old = tmp_path / "old"
    looped(old, labels=True, on_the_way=True)
    for part in ("labels", "test"):
        shutil.copytree(
            old / "gradients.zarr" / part, run / "gradients.zarr" / part, dirs_exist_ok=True
        )
    shutil.copytree(old / "gradients.zarr/steps", run / "gradients.zarr/rank/0/steps")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model, optimizer, recorder = begun()
    model.load_state_dict(weights)
    recorder.load_state_dict(state)
    step(model, optimizer, recorder)
    recorder.close()
    listed = json.loads((run / "checksums/record.json").read_text())
    names = [*listed["arrays"], *listed["files"]]
    assert not [name for name in names if "/labels" in name or "/rank" in name]
    steps = {name.split("/test/")[1].split("/")[0] for name in names if "/test/" in name} - {
        "zarr.json"
    }
    assert set(map(int, steps)) == {2}  # the end's, without samples
