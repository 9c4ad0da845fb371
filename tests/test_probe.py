"""Probes: new test samples on a finished run, against the same samples recorded as tests."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import ROOT
from support.compare import relative_error
from support.pipelines import conv_pipeline, cross_entropy, images, mlp_pipeline
from support.processes import killed_after
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.cli.app import app
from hydra_pipe.errors import (
    DataError,
    HydraError,
    NonFiniteError,
    PipelineError,
    RunError,
    StoreError,
    UsageError,
    UserCodeError,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import result_of
from hydra_pipe.store.run.stages import EXPORT, PROBE, RECORD, REDUCE

N_TEST, FIRST = 7, 4
ALL = images(N_TEST, 2)
HELD_BACK = Subset(ALL, range(FIRST, N_TEST))
METHODS: dict[str, dict[str, Any]] = {
    "hydra": {},
    "hydra-mean": {"by": "mean"},
    "hydra-by-label": {"by": "label"},
    "hydra-fisher": {},
    "hydra-exact": {},
    "hydra-exact-rank-2": {"rank": 2},
    "grad-dot": {},
    "grad-cos": {},
    "influence": {},
}
# Batches of other sizes are summed in another order, so that columns differ by float32's rounding,
# some 1e-7 of a gradient's norm, which a curvature sweep, a linear system and differences of nearly
# equal numbers make larger. Float16 rows: test gradients are rounded to 11 bits, where such a
# difference may tip a value to its neighbour, 1e-3 of it.
TOLERANCE = {"float32": 1e-5, "float16": 3e-3}


def adamw_pipeline(**changes: Any) -> Pipeline:
    model = mlp_pipeline().model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return mlp_pipeline(model=model, optimizer=optimizer, **changes)


CASES: dict[str, tuple[Callable[..., Pipeline], dict[str, Any]]] = {
    "SGD, exact": (conv_pipeline, {"encoding": "exact", "dtype": "float32"}),
    "SGD, projected": (conv_pipeline, {"encoding": "projected", "dim": 120, "dtype": "float16"}),
    "AdamW, exact": (adamw_pipeline, {"encoding": "exact", "dtype": "float32"}),
    "AdamW, projected": (adamw_pipeline, {"encoding": "projected", "dim": 120, "dtype": "float32"}),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A case, a run that has met all test samples, and one that has met the first of them and was
    probed with the others.
    """
    build, options = CASES[request.param]
    whole, probed = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "probed"))
    hydra_pipe.record(build(test=ALL), whole, **options)
    hydra_pipe.record(build(test=Subset(ALL, range(FIRST))), probed, **options)
    hydra_pipe.probe(probed, HELD_BACK, name="late", pipeline=build(test=Subset(ALL, range(FIRST))))
    return request.param, whole, probed


def relevance(run: Path, name: str = "hydra") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(name))


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_of_test_samples_is_what_they_are_in_the_run(
    case: tuple[str, Path, Path], name: str
) -> None:
    of, whole, probed = case
    build, recording = CASES[of]
    method, options = re.sub("-rank-2|-mean|-by-label", "", name), METHODS[name]

    def own(run: Path, n_test: int, **more: Any) -> None:
        if method == "hydra-exact":
            more |= {"pipeline": build(test=Subset(ALL, range(n_test)))}
        hydra_pipe.reduce(run, method=method, **options, **more)

    own(whole, N_TEST, tests=f"{FIRST}-{N_TEST - 1}")
    own(probed, FIRST, probe="late", **({"dataset": HELD_BACK} if method == "hydra-exact" else {}))
    found, expected = relevance(probed, result_of(name, "late")), relevance(whole, name)
    assert np.abs(expected).max() > 0
    assert relative_error(found, expected) < TOLERANCE[recording["dtype"]]


def test_the_run_with_a_probe_is_healthy_and_says_what_was_taken(
    case: tuple[str, Path, Path],
) -> None:
    _, _, probed = case
    assert hydra_pipe.verify(probed) == []
    info = hydra_pipe.open_run(probed).info()
    assert info["stages"]["probe late"]["facts"]["n_tests"] == N_TEST - FIRST
    assert info["bytes"]["probes"] > 0


def test_kept_hypergradients_answer_a_probe_when_the_rows_are_gone(
    case: tuple[str, Path, Path], tmp_path: Path
) -> None:
    of, whole, probed = case
    pruned = shutil.copytree(probed, tmp_path / "pruned")
    hydra_pipe.reduce(pruned, keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(pruned)
    build, recording = CASES[of]
    hydra_pipe.probe(
        pruned, HELD_BACK, name="again", pipeline=build(test=Subset(ALL, range(FIRST)))
    )
    hydra_pipe.reduce(pruned, probe="again", method="hydra")
    assert (
        RunDirectory.open(pruned).stages[REDUCE.of("hydra-of-again")].facts["plan"]["order"]
        == "from hypergradients"
    )
    hydra_pipe.reduce(whole, tests=f"{FIRST}-{N_TEST - 1}", method="hydra")
    assert (
        relative_error(relevance(pruned, "hydra-of-again"), relevance(whole))
        < TOLERANCE[recording["dtype"]]
    )
    assert hydra_pipe.verify(pruned) == []


# ------------------------------------------------------------------------------------------
# loops of one's own


def recorded_loop(
    run: Path, tests: Any, optimizer: Callable[..., torch.optim.Optimizer], **options: Any
) -> nn.Module:
    """A loop that freezes a part of its model on the way, takes tests twice, and has buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
    )
    own = optimizer(model.parameters(), lr=0.01)
    recorder = Recorder(model, own, run, 40, encoding="exact", dtype="float32", **options)
    for number, (inputs, targets) in enumerate(DataLoader(images(40, 1), 8)):
        with recorder.step(range(8 * number, 8 * number + 8)):
            cross_entropy(model(inputs), targets).mean().backward()
            own.step()
            own.zero_grad()
        if number == 2:
            recorder.record_test(DataLoader(tests, 3), cross_entropy)
            model[1].requires_grad_(False)
    recorder.record_test(DataLoader(tests, 3), nn.CrossEntropyLoss())
    recorder.close()
    return model


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_loop_of_ones_own_is_probed_with_its_model_and_loss(
    tmp_path: Path, optimizer: Any
) -> None:
    recorded_loop(tmp_path / "whole", ALL, optimizer)
    model = recorded_loop(tmp_path / "run", Subset(ALL, range(FIRST)), optimizer)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    hydra_pipe.probe(
        tmp_path / "run", HELD_BACK, name="late", model=model, loss=nn.CrossEntropyLoss()
    )
    for run, options in (("whole", {"tests": f"{FIRST}-{N_TEST - 1}"}), ("run", {"probe": "late"})):
        hydra_pipe.reduce(tmp_path / run, method="hydra", **options)
    assert (
        relative_error(relevance(tmp_path / "run", "hydra-of-late"), relevance(tmp_path / "whole"))
        < TOLERANCE["float32"]
    )
    # nothing of it is seen afterwards
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_model_that_is_not_the_runs_is_refused_by_name(tmp_path: Path) -> None:
    model = recorded_loop(tmp_path / "run", ALL, torch.optim.AdamW)

    def refused(match: str, other: nn.Module) -> None:
        with pytest.raises(RunError, match=match):
            hydra_pipe.probe(tmp_path / "run", ALL, name="late", model=other, loss=cross_entropy)
        assert PROBE.of("late") not in RunDirectory.open(tmp_path / "run").stages

    with pytest.raises(
        RunError,
        match=(
            r"loop of your own.*Give hydra_pipe.probe\(run, dataset, name=..., model=..., "
            r"loss=...\)"
        ),
    ):
        hydra_pipe.probe(tmp_path / "run", ALL, name="late")
    with pytest.raises(
        RunError, match="which keeps its parameters itself: a probe needs the model"
    ):
        hydra_pipe.probe(tmp_path / "run", ALL, name="late", pipeline=mlp_pipeline())
    refused(
        r"1\.weight is not as it was after 5 steps.*has other values: load", mlp_pipeline().model
    )
    refused(r"2\.weight is not as it was after 5 steps.*lacks it", nn.Sequential(*model[:2]))
    with torch.no_grad():
        model[2].running_mean[3] += 1e-6
    refused(r"2\.running_mean is not as it was", model)


def test_each_checkpoint_has_the_preconditioner_of_its_moment(tmp_path: Path) -> None:
    recorded_loop(tmp_path / "run", ALL, torch.optim.AdamW)
    gradients = hydra_pipe.open_run(tmp_path / "run").gradients
    for step in gradients.test_steps():
        found = gradients.preconditioner(step)
        assert found is not None
        assert len(found.elements) == gradients.layout.whole_width
        assert (found.elements > 0).any()
    recorded_loop(tmp_path / "plain", ALL, torch.optim.SGD)
    assert hydra_pipe.open_run(tmp_path / "plain").gradients.preconditioner(5) is None


# ------------------------------------------------------------------------------------------
# what a probe is made of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    hydra_pipe.record(mlp_pipeline(), tmp_path / "run")
    return tmp_path / "run"


def probe(run: Path, dataset: Any, name: str = "late", **options: Any) -> bool:
    return hydra_pipe.probe(run, dataset, name=name, pipeline=mlp_pipeline(), **options)


def changed(
    inputs: torch.Tensor | None = None, targets: torch.Tensor | None = None
) -> TensorDataset:
    found = images(3, 5).tensors
    return TensorDataset(
        found[0] if inputs is None else inputs, found[1] if targets is None else targets
    )


def with_nan() -> TensorDataset:
    inputs = images(3, 5).tensors[0].clone()
    inputs[1] = torch.nan
    return changed(inputs)


class Ragged:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 8, 8 + i // 2), 0


BAD: dict[str, tuple[Any, dict[str, Any], type[HydraError], str]] = {
    "no dataset": (7, {}, PipelineError, "the dataset is int 7: it must be a map-style dataset"),
    "empty": (
        changed(torch.zeros(0, 1, 8, 8), torch.zeros(0).long()),
        {},
        PipelineError,
        "the dataset is empty",
    ),
    "no pairs": ([1, 2], {}, DataError, "the probe dataset yields int: it must yield pairs"),
    "ragged": (Ragged(), {}, UserCodeError, "the model raised at probe samples 2 to 2"),
    "not finite": (
        with_nan(),
        {},
        NonFiniteError,
        "the loss of probe sample 1 is not finite at the end",
    ),
    "another shape": (
        changed(torch.zeros(3, 1, 9, 9)),
        {},
        UserCodeError,
        "the model raised at probe samples 0 to 2: RuntimeError",
    ),
    "targets": (
        changed(None, torch.tensor([0, 1, 9])),
        {},
        UserCodeError,
        "the loss raised at probe samples 0 to 2: IndexError",
    ),
    "labels": (
        changed(),
        {"labels": [1]},
        DataError,
        "probe_labels has 1 entries for 3 probe samples",
    ),
    "settings": (changed(), {"settings": ["a=1"]}, UsageError, "settings are for a function"),
    "name": (
        changed(),
        {"name": "a-b"},
        UsageError,
        "--name 'a-b': give up to 50 letters, digits and _",
    ),
    "hidden name": (changed(), {"name": "_b"}, UsageError, "a letter or a digit first"),
    "no function": ("nowhere.py", {}, UsageError, "names no function"),
    "no file": ("nowhere.py:f", {}, PipelineError, "there is no file nowhere.py"),
    "a loss alone": (
        changed(),
        {"loss": cross_entropy},
        UsageError,
        "give either a pipeline, or a model and its loss",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_probed_is_told(run: Path, case: str) -> None:
    dataset, options, kind, match = BAD[case]
    with pytest.raises(kind, match=match):
        probe(run, dataset, **options)
    assert not (run / "probes/late.zarr").exists()
    assert not list(run.glob("probes/.*"))
    # and what is left of it is in no one's way
    assert probe(run, changed())
    assert hydra_pipe.verify(run) == []


def test_a_changed_pipeline_is_refused_by_name(run: Path) -> None:
    wider = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 4))
    pipeline = mlp_pipeline(
        model=wider, optimizer=torch.optim.SGD(wider.parameters(), lr=0.1, momentum=0.9)
    )
    with pytest.raises(
        RunError,
        match=(
            r"was recorded with parameters 1\.weight \[16, 64\], and the pipeline has \[20, "
            r"64\]: give the pipeline of the recording"
        ),
    ):
        hydra_pipe.probe(run, changed(), name="late", pipeline=pipeline)


def test_parameters_that_are_lost_are_told(run: Path) -> None:
    final = run / "checkpoints/final.pt"
    content = final.read_bytes()
    final.write_bytes(content[:-1] + b"x")
    with pytest.raises(
        StoreError,
        match=r"final\.pt is not what was written at the end of training: record the run again",
    ):
        probe(run, changed())
    final.unlink()
    with pytest.raises(StoreError, match=r"final\.pt cannot be read"):
        probe(run, changed())


def test_a_run_without_what_a_probe_needs_says_to_record_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hydra_pipe.recording.recorded_tests.state_digests", lambda _: None)
        hydra_pipe.record(mlp_pipeline(), tmp_path / "sgd")
    with pytest.raises(
        RunError,
        match="does not say at which parameters its test gradients were taken: record the run",
    ):
        probe(tmp_path / "sgd", changed())


def test_methods_that_a_probe_cannot_answer_say_why(run: Path) -> None:
    probe(run, changed())
    for options, match in (
        ({"method": "tracin"}, "tracin needs test gradients on the way"),
        ({"up_to_step": 5}, "--probe late and --up-to-step: choose one"),
        ({"method": "self"}, "--probe is for methods with test samples"),
        ({"tests": "0-3"}, "3"),
        ({"dataset": changed()}, "dataset is for --method hydra-exact"),
    ):
        with pytest.raises(UsageError, match=match):
            hydra_pipe.reduce(run, probe="late", **options)
    with pytest.raises(
        RunError, match=r"probe other has not been run: run hydra-pipe probe .* --name other first"
    ):
        hydra_pipe.reduce(run, probe="other", method="hydra")
    with pytest.raises(UsageError, match="this result is for probe late"):
        hydra_pipe.export(run, method="hydra-of-late", probe="other")
    with pytest.raises(
        RunError,
        match=r"reduce hydra-of-late has not been run: run .* --probe late --method hydra first",
    ):
        hydra_pipe.export(run, probe="late", method="hydra")
    with pytest.raises(
        RunError,
        match=r"hydra-exact needs the samples of probe .*, whose dataset was given as an object",
    ):
        hydra_pipe.reduce(run, method="hydra-exact", probe="late", pipeline=mlp_pipeline())
    with pytest.raises(RunError, match="the samples of probe late are not the ones"):
        hydra_pipe.reduce(
            run, method="hydra-exact", probe="late", pipeline=mlp_pipeline(), dataset=images(3, 6)
        )


def test_other_samples_under_the_same_name_need_overwriting_which_drops_what_was_computed(
    run: Path,
) -> None:
    assert probe(run, changed())
    assert not probe(run, changed())
    hydra_pipe.reduce(run, probe="late", method="hydra")
    hydra_pipe.reduce(run, probe="late", by="mean", method="grad-dot")
    hydra_pipe.export(run, probe="late", method="hydra")
    hydra_pipe.reduce(run, method="hydra")
    with pytest.raises(
        RunError, match=r"probe late was run with samples=.*, now samples=.*--overwrite"
    ):
        probe(run, images(3, 6))
    with pytest.raises(
        RunError, match=r"probe late was run with labels=None, now labels=.*--overwrite"
    ):
        probe(run, changed(), labels=["a", "b", "c"])
    assert hydra_pipe.verify(run) == []
    assert probe(run, images(4, 6), overwrite=True)
    assert hydra_pipe.open_run(run).methods == ["hydra"]
    left = {path.name for path in (run / "relevance.zarr").iterdir() if path.is_dir()}
    assert left == {"hydra", "sample", "sample_label", "test", "test_label"}
    assert not list((run / "rankings").iterdir())
    assert hydra_pipe.verify(run) == []
    hydra_pipe.reduce(run, probe="late", method="hydra")
    assert relevance(run, "hydra-of-late").shape == (40, 4)


def test_a_failed_probe_is_no_result_and_recording_anew_drops_probes(run: Path) -> None:
    probe(run, changed())
    with pytest.raises(NonFiniteError):
        probe(run, with_nan(), overwrite=True)
    with pytest.raises(
        RunError, match=r"probe late is not finished .state: failed., the loss of probe sample 1"
    ):
        hydra_pipe.reduce(run, probe="late", method="hydra")
    hydra_pipe.record(mlp_pipeline(), run, overwrite=True)
    assert not (run / "probes").exists()
    assert hydra_pipe.verify(run) == []


def stored(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "probes").rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "where",
    ["probing.record_test_gradients", "probing.write_probe_labels", "store.run.stage_runner.seal"],
)
def test_a_probe_that_was_stopped_leaves_nothing_half_written_and_ends_with_the_same_bytes(
    run: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(run, changed())
    expected = stored(run)
    hydra_pipe.reduce(run, probe="late", method="hydra")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"hydra_pipe.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            probe(run, images(5, 8), overwrite=True)
    assert RunDirectory.open(run).stages[PROBE.of("late")].state == "failed"
    assert hydra_pipe.open_run(run).methods == []  # it was of the probe that is gone
    # what a process that was killed has left is in no one's way either
    (run / "probes/.late.zarr.partial/gradient").mkdir(parents=True)
    (run / "probes/.late.zarr.partial/gradient/zarr.json").write_text("{")
    assert {fault.kind for fault in hydra_pipe.verify(run)} == {"unfinished"}
    assert probe(run, changed())
    assert stored(run) == expected
    assert hydra_pipe.verify(run) == []


def test_named_labels_are_those_of_the_ranking(run: Path) -> None:
    probe(run, changed(), labels=["cat", "dog", "cat"])
    hydra_pipe.reduce(run, probe="late", by="label", method="hydra")
    assert hydra_pipe.open_run(run).relevance(
        "hydra-of-late-by-label"
    ).test_group_label.values.tolist() == ["cat", "dog"]
    hydra_pipe.export(run, method="hydra-by-label", probe="late", top=2)
    table = pq.read_table(run / "rankings/method=hydra-of-late-by-label/part-00000.parquet")
    assert set(table["test_label"].to_pylist()) == {"cat", "dog"}


def test_means_by_label_need_labels(run: Path) -> None:
    targets = torch.rand(3, 4).softmax(1)
    soft = nn.CrossEntropyLoss(reduction="none")
    pipeline = mlp_pipeline(loss=soft)
    hydra_pipe.probe(run, changed(None, targets), name="soft", pipeline=pipeline)
    with pytest.raises(
        UsageError,
        match=r"soft\.zarr has no labels of test samples: .*hydra_pipe.probe\(..., labels=...\)",
    ):
        hydra_pipe.reduce(run, probe="soft", by="label", method="hydra")


# ------------------------------------------------------------------------------------------
# damage


def files_of(run: Path) -> Iterator[Path]:
    yield from sorted(path for path in (run / "probes/late.zarr").rglob("*") if path.is_file())


def test_damage_of_a_probe_is_found_and_repaired(run: Path, tmp_path: Path) -> None:
    probe(run, changed())
    hydra_pipe.reduce(run, probe="late", method="hydra")
    n_files = len(list(files_of(run)))
    assert n_files == 9
    for number in range(n_files):
        broken = shutil.copytree(run, tmp_path / f"broken-{number}")
        file = list(files_of(broken))[number]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        faults = hydra_pipe.verify(broken)
        assert faults, f"{file.name} was changed and nobody saw it"
        assert all(fault.where.startswith("probes/late.zarr") for fault in faults)
        assert hydra_pipe.verify(broken, repair=True) == []
        assert PROBE.of("late") not in RunDirectory.open(broken).stages
        shutil.rmtree(tmp_path / "last", ignore_errors=True)
        broken.rename(tmp_path / "last")
    assert probe(tmp_path / "last", changed())
    assert hydra_pipe.verify(tmp_path / "last") == []


def test_a_probe_of_another_recording_and_a_result_of_another_probe_are_told(
    run: Path, tmp_path: Path
) -> None:
    probe(run, changed())
    hydra_pipe.reduce(run, probe="late", method="hydra")
    stage = RunDirectory.open(run)
    stage.stages[REDUCE.of("hydra-of-late")].facts["of_probe"] = "0" * 64
    stage.save(REDUCE.of("hydra-of-late"))
    assert ["computed from another probe" in fault.what for fault in hydra_pipe.verify(run)] == [
        True
    ]
    hydra_pipe.record(mlp_pipeline(), tmp_path / "other")
    probe(tmp_path / "other", changed())
    shutil.rmtree(run / "probes")
    shutil.copytree(tmp_path / "other/probes", run / "probes")
    with pytest.raises(
        StoreError,
        match=r"is no probe of this recording: .* take it again with hydra-pipe probe --overwrite",
    ):
        hydra_pipe.reduce(run, probe="late", overwrite=True, method="hydra")


# ------------------------------------------------------------------------------------------
# the command


MISTAKES = """
import torch
from torch.utils.data import TensorDataset
from digits import load


def wrong(n: int = 3, seed: int = 0):
    images, labels, truth = load(0.0, seed)
    return TensorDataset(images[-n:], labels[-n:])
"""


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def test_the_command_answers_for_new_inputs_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pipelines/digits.py", "digits.py")
    Path("mistakes.py").write_text(MISTAKES)
    call("record", "digits.py", "run", "--set", "epochs=2")
    taking = ("probe", "run", "mistakes.py:wrong", "--name", "wrong", "--set", "n=5")
    assert "probe wrong taken; next: hydra-pipe reduce run --probe wrong" in call(*taking)
    assert "nothing to do" in call(*taking)
    assert "probe wrong was run with set n=5, now set n=4" in call(*taking[:-1], "n=4", code=1)
    assert "no setting 'm'" in call(*taking[:-1], "m=4", code=2)
    assert "samples x tests  1,400 x 5" in re.sub(
        " +", " ", call("reduce", "run", "--method", "hydra", "--probe", "wrong", "--dry-run")
    ).replace("tests ", "tests  ")
    assert "next: hydra-pipe export run --method hydra-of-wrong\n" in call(
        "reduce", "run", "--method", "hydra", "--probe", "wrong"
    )
    assert "rankings: run/rankings/method=hydra-of-wrong\n" in call(
        "export", "run", "--method", "hydra", "--probe", "wrong", "--top", "7", "--full"
    )
    table = pq.read_table("run/rankings/method=hydra-of-wrong/part-00000.parquet")
    assert sorted(set(table["test_id"].to_pylist())) == [0, 1, 2, 3, 4]
    assert table.schema.metadata[b"hydra_pipe.method"] == b"hydra-of-wrong"
    # the last of the run's own test samples
    call("reduce", "run", "--method", "hydra", "--tests", "392-396")
    assert (
        relative_error(relevance(Path("run"), "hydra-of-wrong"), relevance(Path("run")))
        < TOLERANCE["float16"]
    )
    labels = hydra_pipe.open_run("run").gradients.labels("test")
    assert table["test_label"].to_pylist()[0] == labels[392]
    # trains again, with the samples of the file
    call("reduce", "run", "--probe", "wrong", "--method", "hydra-exact", "--mean")
    assert "probe wrong" in call("info", "run")
    assert "healthy" in call("verify", "run")
    # what is said to be run again is what was run
    directory = RunDirectory.open("run")
    for stage in (
        PROBE.of("wrong"),
        REDUCE.of("hydra-exact-of-wrong-mean"),
        EXPORT.of("hydra-of-wrong"),
    ):
        assert "nothing to do" in call(*directory.command(stage).split()[1:])
    assert "tracin needs test gradients on the way" in call(
        "reduce", "run", "--probe", "wrong", "--method", "tracin", code=2
    )


def test_evaluations_leave_probes_out(run: Path) -> None:
    from hydra_pipe.retraining.subject import Subject

    probe(run, images(9, 2))
    hydra_pipe.reduce(run, probe="late", method="hydra")
    hydra_pipe.reduce(run, method="hydra")
    assert list(Subject.open(mlp_pipeline(), RunDirectory.open(run), None).relevance(None)) == [
        "hydra"
    ]


@pytest.mark.parametrize("after", range(3))
def test_results_of_a_probe_that_is_taken_again_all_go_though_the_first_call_was_killed(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(mlp_pipeline(), run)
    again = {"name": "late", "pipeline": mlp_pipeline(), "overwrite": True}
    hydra_pipe.probe(run, HELD_BACK, **again)
    hydra_pipe.reduce(run, probe="late", method="hydra")
    hydra_pipe.export(run, probe="late", method="hydra")

    with monkeypatch.context() as patch:
        patch.setattr("hydra_pipe.store.run.discarding.remove", killed_after(after))
        with pytest.raises(InterruptedError):
            hydra_pipe.probe(run, HELD_BACK, **again)
    assert hydra_pipe.verify(run) != []
    hydra_pipe.probe(run, HELD_BACK, **again)
    assert set(RunDirectory.open(run).stages) == {RECORD, PROBE.of("late")}
    assert hydra_pipe.verify(run) == []
