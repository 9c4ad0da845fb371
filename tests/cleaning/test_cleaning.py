"""clean from end to end: digits with wrong labels, and made-up relevance."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import ROOT
from support.mislabelled import TESTS, N, small
from support.pipelines import conv_pipeline, mlp_pipeline
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cleaning.evidence import means_by, sums_over
from hydra_pipe.cleaning.folds import folds_of
from hydra_pipe.cleaning.retraining import ALL, RANDOM, TRUE, WRONG
from hydra_pipe.cleaning.treatments import DROPPED, MIXED, RELABELLED
from hydra_pipe.cli.app import app
from hydra_pipe.errors import HydraError, NonFiniteError, PipelineError, RunError, UsageError
from hydra_pipe.progress import Progress, Task
from hydra_pipe.retraining import campaign
from hydra_pipe.retraining.retrainer import HIT, Retrainer
from hydra_pipe.store.data.relevance import (
    ResultColumns,
    create_relevance,
    open_relevance,
    write_relevance,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import CLEAN, REDUCE


def place(run: Path, method: str = "hydra") -> Path:
    return run / "cleaning" / f"method={method}"


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }


def put(run: Path, name: str, values: np.ndarray, columns: ResultColumns | None = None) -> None:
    """A relevance array called `name`, as if it had been reduced."""
    directory = RunDirectory.open(run)
    words = {"method": "made up", "sign": "positive is helpful", "unit": "test loss"}
    columns = columns or ResultColumns(((0, values.shape[1]),))
    array = create_relevance(
        run / "relevance.zarr", name, words, len(values), columns, 64, directory.run_id
    )
    write_relevance(array, 0, 0, values.astype(np.float32))
    directory.begin(REDUCE.of(name), {})
    directory.end(REDUCE.of(name), "complete", checksums=str(values.sum()))


def test_on_digits_most_of_the_proposed_are_wrong_and_most_suggestions_right(
    tmp_path: Path,
) -> None:
    run, spec = tmp_path / "run", str(ROOT / "pipelines" / "digits.py")
    hydra_pipe.record(spec, run, settings={"noise": 0.2, "epochs": 8})
    hydra_pipe.reduce(run, method="hydra")
    found = hydra_pipe.clean(run, method="hydra")
    sys.path.insert(0, str(ROOT / "pipelines"))
    from digits import load

    _, labels, truth = (values.numpy() for values in load(0.2, 0))
    drop = found.drop.to_pydict()
    assert 50 < found.drop.num_rows < 350
    assert (labels != truth)[drop["train_id"]].mean() > 0.6, "by chance 0.2"
    relabelled = [
        (i, s)
        for i, s in zip(drop["train_id"], drop["suggested_label"], strict=True)
        if s is not None
    ]
    assert len(relabelled) > 20
    assert np.mean([truth[i] == s for i, s in relabelled]) > 0.6, "by chance 0.1"
    assert hydra_pipe.verify(run) == []


def test_keep_and_drop_are_all_samples_once_and_the_table_says_what_the_ranking_says(
    run: Path,
) -> None:
    hydra_pipe.export(run, method="hydra")
    found = hydra_pipe.clean(run, lowest=9, method="hydra")
    assert found.is_new
    keep = [int(line) for line in (place(run) / "keep.txt").read_text().splitlines()]
    table = pq.read_table(place(run) / "drop.parquet")
    assert keep == sorted(keep) == found.keep.tolist()
    assert sorted(keep + table["train_id"].to_pylist()) == list(range(N))
    assert table.num_rows == 9
    ranking = (
        pq.read_table(run / "rankings" / "method=hydra" / "samples.parquet")
        .to_pandas()
        .set_index("train_id")
    )
    own = table.to_pandas().set_index("train_id")
    for column in ("label", "relevance_sum", "rank"):
        np.testing.assert_allclose(own[column], ranking.loc[own.index, column])
    assert own["score"].is_monotonic_increasing
    assert {
        (a, s is None)
        for a, s in zip(
            table["action"].to_pylist(), table["suggested_label"].to_pylist(), strict=True
        )
    } <= {
        ("relabel", False),
        ("drop", True),
    }
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert metadata["hydra_pipe.run_id"] == RunDirectory.open(run).run_id
    assert json.loads((place(run) / "summary.json").read_text())["n_proposed"] == 9


def test_sums_and_means_are_those_of_the_matrix(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_pipe.cleaning.evidence.BLOCK_BYTES", 1)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N, 150)).astype(np.float32)
    put(run, "many", values)
    array = open_relevance(run / "relevance.zarr", "many")
    chosen = rng.random((3, 150)) < 0.5
    np.testing.assert_allclose(
        sums_over(array, chosen, Progress()),
        [values[:, own].sum(axis=1) for own in chosen],
        rtol=1e-4,
    )
    groups, ids = rng.integers(0, 4, 150), np.array([7, 3, 59])
    expected = np.stack([values[ids][:, groups == g].mean(axis=1) for g in range(4)], axis=1)
    np.testing.assert_allclose(means_by(array, ids, groups, 4), expected, rtol=1e-4, atol=1e-6)


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(run: Path) -> None:
    hydra_pipe.clean(run, lowest=5, method="hydra")
    before = files_of(run)
    again = hydra_pipe.clean(run, lowest=5, method="hydra")
    assert not again.is_new
    assert again.drop.num_rows == 5
    assert files_of(run) == before
    with pytest.raises(RunError, match="lowest=5"):
        hydra_pipe.clean(run, lowest=6, method="hydra")
    assert hydra_pipe.clean(run, lowest=6, overwrite=True, method="hydra").drop.num_rows == 6
    assert hydra_pipe.verify(run) == []


def test_a_relevance_that_is_computed_again_takes_its_proposal_with_it(run: Path) -> None:
    hydra_pipe.clean(run, method="hydra")
    hydra_pipe.reduce(run, overwrite=True, method="hydra")
    assert not place(run).exists()
    assert CLEAN.of("hydra") not in RunDirectory.open(run).stages
    assert hydra_pipe.verify(run) == []


def test_damage_is_found_and_repaired_and_the_same_command_makes_it_again(run: Path) -> None:
    hydra_pipe.clean(run, method="hydra")
    good = files_of(place(run))
    (place(run) / "keep.txt").write_bytes(good["keep.txt"].replace(b"\n", b"\n\n", 1))
    (fault,) = hydra_pipe.verify(run)
    assert fault.where == "cleaning/method=hydra/keep.txt"
    assert "hydra-pipe clean" in fault.consequence
    assert hydra_pipe.verify(run, repair=True) == []
    assert hydra_pipe.clean(run, method="hydra").is_new
    assert files_of(place(run)) == good


def test_a_proposal_that_does_not_add_up_is_told_though_its_files_are_as_written(run: Path) -> None:
    from hydra_pipe.store.run.footprints import seal

    hydra_pipe.clean(run, lowest=3, method="hydra")
    keep = place(run) / "keep.txt"
    lines = keep.read_text().splitlines()
    directory = RunDirectory.open(run)
    facts = directory.stages[CLEAN.of("hydra")].facts
    for content, told in (
        (lines[1:], "each of 60 training samples"),
        ([*lines[:-1], "9" * 18], "each of 60 training samples"),
        ([*lines[:-1], "9" * 30], "no ids"),
        ([*lines[1:], "-1"], "no ids"),
        ([lines[1], lines[0], *lines[2:]], "each of 60 training samples"),
    ):
        keep.write_text("".join(f"{line}\n" for line in content))
        directory.end(
            CLEAN.of("hydra"),
            "complete",
            **(facts | {"checksums": seal(directory, CLEAN.of("hydra"))}),
        )
        assert [told in fault.found for fault in hydra_pipe.verify(run)] == [True]
    keep.write_text("".join(f"{line}\n" for line in lines))
    directory.end(
        CLEAN.of("hydra"),
        "complete",
        **(facts | {"n_samples": 2**60, "checksums": seal(directory, CLEAN.of("hydra"))}),
    )
    assert len(hydra_pipe.verify(run)) == 1, "found without asking for memory for as many"


def test_a_failure_leaves_the_old_proposal_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra_pipe.clean(run, lowest=5, method="hydra")
    before = files_of(place(run))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("hydra_pipe.store.data.clean_result.pq.write_table", full)
        with pytest.raises(OSError, match="No space"):
            hydra_pipe.clean(run, lowest=6, overwrite=True, method="hydra")
    assert files_of(place(run)) == before
    assert RunDirectory.open(run).stages[CLEAN.of("hydra")].state == "failed"
    assert hydra_pipe.clean(run, lowest=6, method="hydra").is_new


def test_means_and_unlabelled_samples_are_ranked_without_suggestions(
    run: Path, tmp_path: Path
) -> None:
    hydra_pipe.reduce(run, by="mean", method="hydra")
    found = hydra_pipe.clean(run, method="hydra-mean", lowest=7)
    every = hydra_pipe.clean(run, lowest=7, method="hydra")
    assert found.drop["train_id"].to_pylist() == every.drop["train_id"].to_pylist(), (
        "a mean orders as the sum does"
    )
    assert found.drop["suggested_label"].null_count == 7
    by_label = np.zeros((N, 4))
    by_label[:, 0] = -np.arange(N)
    put(run, "x-by-label", by_label, ResultColumns(((0, TESTS),), "label", (0, 1, 2, 3)))
    suggested = hydra_pipe.clean(run, method="x-by-label", lowest=4).drop.to_pydict()
    assert all(
        s == (0 if own != 0 else None)
        for s, own in zip(suggested["suggested_label"], suggested["label"], strict=True)
    )

    unlabelled = tmp_path / "unlabelled"
    pipeline = conv_pipeline()
    pipeline.train = TensorDataset(pipeline.train.tensors[0], pipeline.train.tensors[1].float())
    pipeline.test = TensorDataset(pipeline.test.tensors[0], pipeline.test.tensors[1].float())
    pipeline.loss = lambda output, target: (output[:, 0] - target) ** 2
    hydra_pipe.record(pipeline, unlabelled)
    hydra_pipe.reduce(unlabelled, method="hydra")
    drop = hydra_pipe.clean(unlabelled, lowest=3, method="hydra").drop
    assert drop["label"].null_count == drop["suggested_label"].null_count == 3
    assert "all samples" in drop["reason"][0].as_py()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "influence"}, RunError, "hydra-pipe reduce .* --method influence first"),
        ({"method": "self"}, UsageError, "no test samples"),
        ({"lowest": N}, UsageError, "some must stay"),
        ({"seeds": 3}, UsageError, "--seeds is for --retrain"),
        ({"pipeline": "x.py"}, UsageError, "--pipeline is for --retrain and --rounds"),
        ({"rounds": 2}, UsageError, "--rounds is for labels judged by dynamics"),
        ({"undecided": "keep"}, UsageError, "--undecided is for --decisions"),
        ({"retrain": True, "seeds": 0}, UsageError, "1 or more"),
        ({"retrain": True, "pipeline": mlp_pipeline()}, RunError, "was recorded with"),
        ({"retrain": True, "pipeline": "nowhere.py"}, PipelineError, "nowhere"),
        ({"memory": "much"}, UsageError, "much"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    run: Path, options: dict[str, object], error: type[HydraError], message: str
) -> None:
    before = files_of(run)
    with pytest.raises(error, match=message):
        hydra_pipe.clean(run, **({"method": "hydra"} | options))
    if "lowest" not in options:  # found out once scores are there, when the stage has begun
        assert files_of(run) == before
    assert not place(run).exists()


def test_relevance_that_is_no_number_is_refused(run: Path) -> None:
    values = np.ones((N, 3))
    values[4, 1] = np.inf
    put(run, "odd", values)
    with pytest.raises(NonFiniteError, match="of 1 of 60"):
        hydra_pipe.clean(run, method="odd")


def test_halves_share_no_test_and_are_alike_in_labels() -> None:
    labels = np.repeat([0, 1, 2], [10, 7, 4])
    folds, words = folds_of(ResultColumns(((5, 26),)), 40, labels)
    one, other = folds
    assert (one.chosen ^ other.chosen).all()
    for fold in folds:
        assert not set(fold.tests) & set(np.arange(5, 26)[fold.chosen])
        assert np.abs(2 * np.bincount(labels[fold.chosen]) - [10, 7, 4]).max() <= 1
    assert sorted(np.concatenate([one.tests, other.tests])) == list(range(5, 26))
    assert "the other half" in words
    (only,), words = folds_of(ResultColumns(((0, 30),), "mean", ("mean",)), 40, None)
    assert only.tests.tolist() == list(range(30, 40))
    (only,), words = folds_of(ResultColumns(((0, 40),), "mean", ("mean",)), 40, None)
    assert only.tests.tolist() == list(range(40))
    assert words.startswith("NOT independent")


def test_accuracy_is_that_of_retrained_models_on_the_half_that_has_not_chosen(run: Path) -> None:
    """One seed, which is not the seed of the run, fold by fold, by hand."""
    found = hydra_pipe.clean(run, lowest=12, retrain=True, seeds=1, method="hydra")
    relevance = np.asarray(hydra_pipe.open_run(run).relevance("hydra"))
    labels = small().train.tensors[1].numpy()
    folds, _ = folds_of(ResultColumns(((0, TESTS),)), TESTS, small().test.tensors[1].numpy())
    from hydra_pipe.cleaning.decision import Cut, scores_of

    hits, all_hits = [], []
    for fold in folds:
        weights = np.ones((2, N), np.float32)
        weights[
            1,
            Cut(lowest=12).of(
                scores_of(relevance[:, fold.chosen].sum(axis=1, dtype=float), labels)
            ),
        ] = 0.0
        start = {name: p.detach() for name, p in small(1).model.named_parameters()}
        retrainer = Retrainer(small(), Progress(), "weights")
        both = retrainer.train(weights, Task(), seed=1, start=start)[:, HIT][:, fold.tests]
        all_hits.append(both[0])
        hits.append(both[1])
    rows = {row["trained on"]: row for row in found.retraining}
    compared = [DROPPED, RELABELLED, MIXED]
    rows_of_treatments = [name for how in compared for name in (how, RANDOM[how])]
    assert list(rows) == [ALL, *rows_of_treatments, WRONG, TRUE]
    assert rows[ALL]["accuracy"] == pytest.approx(np.concatenate(all_hits).mean())
    assert rows[DROPPED]["accuracy"] == pytest.approx(np.concatenate(hits).mean())
    assert rows[ALL]["accuracy_change"] == 0.0
    for row in rows.values():
        for name in ("accuracy", "loss", "accuracy_change", "loss_change"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    for how in compared:
        beside = rows[how]["accuracy"] - rows[RANDOM[how]]["accuracy"]
        assert rows[how]["accuracy_over_random"] == pytest.approx(beside)
    known = found.summary["retraining"]["known"]
    wrong = np.isin(found.drop["train_id"].to_numpy(), np.arange(12)).sum()
    assert (known["wrong"], known["found"], known["recall"]) == (12, wrong, wrong / 12)
    assert hydra_pipe.verify(run) == []


def test_retraining_goes_on_where_it_was_killed_and_more_seeds_use_what_is_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hydra_pipe.clean(
        Path(shutil.copytree(run, run.parent / "whole")),
        retrain=True,
        seeds=2,
        lowest=6,
        method="hydra",
    )
    train = Retrainer.train
    trained: list[int] = []

    def killed(self: Retrainer, weights: np.ndarray, task: Task, **more: object) -> np.ndarray:
        if len(trained) == 2:  # the check, and the first seed
            raise KeyboardInterrupt
        trained.append(len(weights))
        return train(self, weights, task, **more)

    with monkeypatch.context() as patched:
        patched.setattr(campaign.Retrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            hydra_pipe.clean(run, retrain=True, seeds=2, lowest=6, method="hydra")
    assert len(list((place(run) / "retrained").iterdir())) == 1
    assert (place(run) / "keep.txt").exists(), "the proposal is there before anything is trained"
    counted: list[int] = []

    def counting(self: Retrainer, weights: np.ndarray, task: Task, **more: object) -> np.ndarray:
        counted.append(len(weights))
        return train(self, weights, task, **more)

    monkeypatch.setattr(campaign.Retrainer, "train", counting)
    again = hydra_pipe.clean(run, retrain=True, seeds=2, lowest=6, method="hydra")
    assert len(counted) == 2, "the check, and the second seed"
    assert again.retraining == whole.retraining
    assert not hydra_pipe.clean(run, retrain=True, seeds=2, lowest=6, method="hydra").is_new
    assert hydra_pipe.clean(run, lowest=6, method="hydra").retraining == whole.retraining, (
        "without --retrain what is there is shown"
    )
    assert len(counted) == 2


def test_the_command_prints_a_table_where_the_files_are_and_how_to_use_them(run: Path) -> None:
    result = CliRunner().invoke(
        app, ["clean", str(run), "--method", "hydra", "--lowest", "12", "--retrain", "--seeds", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "and 2 more" in result.stdout
    assert "drop as many at random" in result.stdout
    hint = next(line for line in result.stdout.splitlines() if "cleaned(train" in line)
    wanted = eval(hint.partition(": ")[2], {"hydra_pipe": hydra_pipe, "train": small().train})
    assert N - 12 <= len(wanted) < N


def test_a_run_of_a_pipeline_object_needs_that_object(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(recorded(), tmp_path / "run"))
    hydra_pipe.reduce(run, method="hydra")
    with pytest.raises(RunError, match="pipeline="):
        hydra_pipe.clean(run, retrain=True, method="hydra")
    found = hydra_pipe.clean(run, lowest=3, retrain=True, pipeline=conv_pipeline(), method="hydra")
    assert found.summary["retraining"]["seeds"] == 1, "an object has no other initial weights"
