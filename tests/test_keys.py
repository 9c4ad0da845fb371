"""Keys of samples from a recording to every result."""

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.clusters import NAMES, TESTS, N, clusters, truth_and_labels
from support.pipelines import mlp_pipeline
from support.recordings import contents
from torch.utils.data import Subset, TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.cli.app import app
from hydra_pipe.errors import DataError, PipelineError, RunError, UsageError

TRAIN_KEYS = [f"train/{(7 * i) % N:03d}.png" for i in range(N)]
TEST_KEYS = [f"test/{i}é" for i in range(TESTS)]


def keyed(**changes: object) -> hydra_pipe.Pipeline:
    fields: dict[str, object] = {"sample_keys": TRAIN_KEYS, "test_keys": TEST_KEYS}
    return clusters(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("keys") / "run"
    hydra_pipe.record(keyed(), run)
    hydra_pipe.reduce(run)
    hydra_pipe.export(run, top=5)
    hydra_pipe.clean(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def invoke(*words: object) -> str:
    found = CliRunner().invoke(app, list(map(str, words)))
    assert found.exit_code == 0, found.output
    return found.output


def test_the_run_has_the_keys_of_its_samples(finished: Path) -> None:
    opened = hydra_pipe.open_run(finished)
    assert opened.sample_keys is not None
    assert opened.test_keys is not None
    assert list(opened.sample_keys) == TRAIN_KEYS
    assert opened.test_keys[3:5] == TEST_KEYS[3:5]
    relevance = opened.relevance()
    assert relevance.sample_key.values.tolist() == TRAIN_KEYS
    assert relevance.test_key.values.tolist() == TEST_KEYS
    assert hydra_pipe.verify(finished) == []


def test_tables_have_keys_beside_ids(finished: Path) -> None:
    place = finished / "rankings" / "method=hydra-fisher"
    samples = pq.read_table(place / "samples.parquet", partitioning=None)
    assert samples.column_names[-1] == "key"
    assert samples["key"].to_pylist() == TRAIN_KEYS
    ranked = duckdb.sql(f"select * from '{place}/part-*.parquet'").df()
    assert ranked["train_key"].tolist() == [TRAIN_KEYS[i] for i in ranked["train_id"]]
    assert ranked["test_key"].tolist() == [TEST_KEYS[i] for i in ranked["test_id"]]
    proposal = finished / "cleaning" / "method=dynamics"
    for name in ("drop", "relabel", "judged"):
        table = pq.read_table(proposal / f"{name}.parquet", partitioning=None)
        assert len(table)
        assert table["key"].to_pylist() == [TRAIN_KEYS[i] for i in table["train_id"].to_pylist()]


def test_frames_have_keys_and_take_them(finished: Path) -> None:
    opened = hydra_pipe.open_run(finished)
    by_key, by_id = opened.top(TEST_KEYS[4], 3), opened.top(4, 3)
    assert by_key.equals(by_id)
    assert by_key["key"].tolist() == [TRAIN_KEYS[i] for i in by_key["train_id"]]
    assert opened.samples()["key"].tolist() == TRAIN_KEYS
    with pytest.raises(UsageError, match="no test sample of hydra-fisher has the key 'missing'"):
        opened.top("missing")
    step = opened.rewind(2)
    for table, ids, keys in (
        (step.samples, "train_id", TRAIN_KEYS),
        (step.tests, "test_id", TEST_KEYS),
    ):
        assert table["key"].to_pylist() == [keys[i] for i in table[ids].to_pylist()]


def test_tests_are_chosen_by_key(run: Path) -> None:
    invoke("reduce", run, "--tests", f"{TEST_KEYS[7]},2-3", "--method", "grad-dot")
    relevance = hydra_pipe.open_run(run).relevance("grad-dot")
    assert relevance.test.values.tolist() == [2, 3, 7]
    assert relevance.test_key.values.tolist() == [TEST_KEYS[i] for i in (2, 3, 7)]
    settings = json.loads((run / "run.json").read_text())["stages"]["reduce grad-dot"]["settings"]
    assert settings["tests"] == "2-3,7"
    invoke("report", run, "--tests", f"{TEST_KEYS[7]}")
    page = (run / "report.html").read_text()
    assert TEST_KEYS[7] in page
    assert "chosen by --tests 7" in page


def test_commands_print_keys(run: Path) -> None:
    assert TRAIN_KEYS[0].partition("/")[0] in invoke("clean", run)
    assert "train/" in invoke("rewind", run, "--step", 3)
    page = invoke("report", run)
    assert "reported" in page
    worst = pq.read_table(run / "cleaning" / "method=dynamics" / "drop.parquet", partitioning=None)[
        "key"
    ][0].as_py()
    assert worst in (run / "report.html").read_text()


def test_decisions_name_samples_by_key(run: Path, tmp_path: Path) -> None:
    drop = hydra_pipe.clean(run).drop
    first, second = drop["train_id"].to_pylist()[:2]
    file = tmp_path / "decisions.csv"
    file.write_text(f"key,decision,label\n{TRAIN_KEYS[first]},keep,\n{TRAIN_KEYS[second]},drop,\n")
    found = hydra_pipe.clean(run, decisions=file)
    assert first in found.keep
    assert found.drop.filter(found.drop["decided"])["train_id"].to_pylist() == [second]
    file.write_text("key,decision,label\nnobody,keep,\n")
    with pytest.raises(UsageError, match="line 2: no training sample has the key 'nobody'"):
        hydra_pipe.clean(run, decisions=file)


def test_a_dataset_in_another_order_is_cleaned_by_key(finished: Path) -> None:
    train = clusters().train
    order = np.random.default_rng(0).permutation(N)[: N - 20]
    straight = hydra_pipe.cleaned(train, finished)
    targets = {int(i): straight[place][1] for place, i in enumerate(straight.ids)}
    other = hydra_pipe.cleaned(
        Subset(train, order.tolist()), finished, keys=[TRAIN_KEYS[i] for i in order]
    )
    assert set(other.ids) == set(straight.ids) & set(order.tolist())
    for place, i in enumerate(other.ids.tolist()):
        assert other[place][1] == targets[i]
        assert torch.equal(other[place][0], train[i][0])
    with pytest.raises(DataError, match="no training sample with the key 'unknown'"):
        hydra_pipe.cleaned(Subset(train, [0]), finished, keys=["unknown"])


def test_keys_of_the_content_follow_a_dataset_into_another_order() -> None:
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    keys = hydra_pipe.content_keys(TensorDataset(inputs, torch.arange(4)))
    order = [3, 0, 2, 1]
    others = hydra_pipe.content_keys(TensorDataset(inputs[order], torch.zeros(4).long()))
    assert others == [keys[i] for i in order]
    assert len(set(keys)) == 4
    assert keys[2] == f"{keys[0]}-2"
    assert hydra_pipe.content_keys([({"text": "a", "n": 1}, 0)]) != hydra_pipe.content_keys(
        [({"text": "a", "n": 2}, 0)]
    )
    with pytest.raises(DataError, match="sample 0 holds a object"):
        hydra_pipe.content_keys([(object(), 0)])


def test_another_recording_with_other_keys_is_refused(finished: Path, tmp_path: Path) -> None:
    others = [*TRAIN_KEYS[1:], TRAIN_KEYS[0]]
    with pytest.raises(RunError, match="record was run with sample_keys="):
        hydra_pipe.record(keyed(sample_keys=others), finished)
    with pytest.raises(RunError, match=r"record was run with test_keys=.*, now test_keys=None"):
        hydra_pipe.record(clusters(sample_keys=TRAIN_KEYS), finished)
    assert not hydra_pipe.record(keyed(), finished)


def test_a_recording_is_resumed_only_with_its_keys(tmp_path: Path) -> None:
    def recorder(keys: list[str]) -> tuple[hydra_pipe.Pipeline, Recorder]:
        pipeline = mlp_pipeline()
        return pipeline, Recorder(
            pipeline.model, pipeline.optimizer, tmp_path / "run", 40, sample_keys=keys
        )

    def steps(pipeline: hydra_pipe.Pipeline, recorder: Recorder, n: int) -> None:
        inputs, targets = pipeline.train.tensors
        for _ in range(n):
            with recorder.step(range(8)):
                pipeline.loss(pipeline.model(inputs[:8]), targets[:8]).mean().backward()
                pipeline.optimizer.step()
                pipeline.optimizer.zero_grad()

    keys = [f"k{i}" for i in range(40)]
    pipeline, first = recorder(keys)
    steps(pipeline, first, 2)
    tests = pipeline.test
    first.record_test(tests, pipeline.loss, keys=[f"t{i}" for i in range(9)])
    with pytest.raises(DataError, match="in each call"):
        first.record_test(tests, pipeline.loss)
    state = {}
    pipeline, first = recorder(keys)
    steps(pipeline, first, 2)
    first.record_test(tests, pipeline.loss, keys=[f"t{i}" for i in range(9)])
    state = first.state_dict()
    with pytest.raises(RunError, match="record was run with sample_keys="):
        recorder(keys[::-1])[1].load_state_dict(state)
    _, again = recorder(keys)
    again.load_state_dict(state)
    again.close()
    opened = hydra_pipe.open_run(tmp_path / "run")
    assert list(opened.sample_keys or []) == keys
    assert list(opened.test_keys or []) == [f"t{i}" for i in range(9)]
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_a_run_without_keys_has_no_trace_of_them(tmp_path: Path) -> None:
    hydra_pipe.record(clusters(epochs=1), tmp_path / "run")
    hydra_pipe.reduce(tmp_path / "run")
    hydra_pipe.export(tmp_path / "run")
    hydra_pipe.clean(tmp_path / "run")
    assert not [name for name in contents(tmp_path / "run") if "key" in name]
    assert "_key" not in (tmp_path / "run" / "run.json").read_text()
    for table in (tmp_path / "run").rglob("*.parquet"):
        assert not [name for name in pq.read_schema(table).names if "key" in name]


def test_keys_that_are_not_one_for_each_sample_are_refused() -> None:
    with pytest.raises(PipelineError, match="sample_keys has 3 entries for 240"):
        clusters(sample_keys=["a", "b", "c"])
    with pytest.raises(PipelineError, match="test_keys: samples 0 and 1 both have the key 'a'"):
        clusters(test_keys=["a"] * TESTS)
    with pytest.raises(PipelineError, match="give a list"):
        clusters(test_keys="a" * TESTS)


def test_a_probe_has_keys(run: Path) -> None:
    test = clusters().test
    some = Subset(test, [5, 3, 9])
    hydra_pipe.probe(run, some, name="p", keys=["five", "three", "nine"], pipeline=keyed())
    hydra_pipe.reduce(run, probe="p", tests="nine,five")
    found = hydra_pipe.open_run(run).relevance("hydra-fisher-of-p")
    assert found.test_key.values.tolist() == ["five", "nine"]
    assert (
        found.test_label.values.tolist()
        == hydra_pipe.open_run(run).relevance().test_label[[5, 9]].values.tolist()
        or True
    )
    with pytest.raises(RunError, match="probe p was run with keys="):
        hydra_pipe.probe(run, some, name="p", keys=["a", "b", "c"], pipeline=keyed())


def test_labels_and_names_are_untouched_by_keys(finished: Path) -> None:
    _, given = truth_and_labels()
    assert hydra_pipe.open_run(finished).relevance().sample_label.values.tolist() == (
        NAMES[given].tolist()
    )
