"""Combining runs, against plain NumPy over their arrays."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipelines import images, mlp_pipeline
from support.recordings import contents
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.combining import run as combining
from hydra_pipe.errors import BudgetError, NonFiniteError, RunError, UsageError
from hydra_pipe.maths.ensembles import ColumnMoments
from hydra_pipe.plan.combining import CombiningInput, CombiningPlan, plan_combining
from hydra_pipe.progress import Progress, Task
from hydra_pipe.store.data import combined as combined_module
from hydra_pipe.store.data import relevance as relevance_module
from hydra_pipe.store.data.relevance import open_relevance, write_relevance
from hydra_pipe.store.names import COSINE, EFFECTIVE_RUNS
from hydra_pipe.store.run.manifest import RunDirectory

N, TESTS = 40, 9
KEYS, TEST_KEYS = [f"train/{i}" for i in range(N)], [f"test/{i}" for i in range(TESTS)]


def record(run: Path, seed: int, train: list[int], tests: list[int], *, keyed: bool) -> None:
    """Record and reduce a run over some samples of a pool, in the order given."""
    samples, others = images(N, 1), images(TESTS, 2)
    fields: dict[str, object] = {
        "train": TensorDataset(*(values[train] for values in samples.tensors)),
        "test": TensorDataset(*(values[tests] for values in others.tensors)),
    }
    if keyed:
        fields["sample_keys"] = [KEYS[i] for i in train]
        fields["test_keys"] = [TEST_KEYS[i] for i in tests]
    hydra_pipe.record(mlp_pipeline(seed=seed, **fields), run)
    hydra_pipe.reduce(run)


def truth(
    runs: list[Path], train: list[list[int]], tests: list[list[int]]
) -> dict[str, np.ndarray]:
    """Mean, standard error and agreement by plain loops, in float64, over the whole pools."""
    values = np.full((len(runs), N, TESTS), np.nan)
    for r, run in enumerate(runs):
        relevance = np.asarray(hydra_pipe.open_run(run).relevance(), np.float64)
        for i, sample in enumerate(train[r]):
            for j, test in enumerate(tests[r]):
                values[r, sample, test] = relevance[i, j]
    scale = np.full((len(runs), TESTS), np.nan)
    for r, j in np.ndindex(scale.shape):
        own = values[r, ~np.isnan(values[r, :, j]), j]
        scale[r, j] = np.sqrt((own**2).mean()) if len(own) else np.nan
    mean, error = np.zeros((N, TESTS)), np.full((N, TESTS), np.nan)
    agreeing, n_runs = np.zeros((N, TESTS), int), np.zeros((N, TESTS), int)
    for i in range(N):
        for j in range(TESTS):
            own = values[:, i, j] / scale[:, j]
            own = own[~np.isnan(own)]
            n_runs[i, j] = len(own)
            if len(own):
                mean[i, j] = own.mean() * np.nanmedian(scale[:, j])
                agreeing[i, j] = (np.sign(own) == np.sign(mean[i, j])).sum()
            if len(own) > 1:
                error[i, j] = np.std(own, ddof=1) / np.sqrt(len(own)) * np.nanmedian(scale[:, j])
    return {"mean": mean, "error": error, "agreeing": agreeing, "runs": n_runs}


def check(out: Path, expected: dict[str, np.ndarray], train: np.ndarray, tests: np.ndarray) -> None:
    opened = hydra_pipe.open_run(out)
    at = np.ix_(train, tests)
    found, combined = opened.relevance(), opened.combined()
    np.testing.assert_allclose(found, expected["mean"][at], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        combined.standard_error.read(), expected["error"][at], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(combined.agreeing.read(), expected["agreeing"][at])
    samples, columns = np.meshgrid(range(len(train)), range(len(tests)), indexing="ij")
    pairs = combined.spread_of(samples.ravel(), columns.ravel())
    np.testing.assert_array_equal(pairs.runs, expected["runs"][at].ravel())
    np.testing.assert_array_equal(pairs.agreeing, expected["agreeing"][at].ravel())
    assert hydra_pipe.verify(out) == []


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of the same samples in the same order, without keys."""
    place = tmp_path_factory.mktemp("seeds")
    everything = list(range(N)), list(range(TESTS))
    for seed in range(3):
        record(place / f"seed-{seed}", seed, *everything, keyed=False)
    return [place / f"seed-{seed}" for seed in range(3)]


SHUFFLED = [
    list(range(30)),
    np.random.default_rng(1).permutation(N).tolist(),
    [39, 5, *range(10, 35)],
]
SOME_TESTS = [[0, 1, 2, 3, 4], [8, 3, 0, 6], [2, 3, 4, 7]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of other samples in other orders, with keys."""
    place = tmp_path_factory.mktemp("shards")
    for run, (train, tests) in enumerate(zip(SHUFFLED, SOME_TESTS, strict=True)):
        record(place / f"run-{run}", run, train, tests, keyed=True)
    return [place / f"run-{run}" for run in range(3)]


def union(parts: list[list[int]]) -> np.ndarray:
    """The samples of all runs, in the order of the first run that has them."""
    return np.array(list(dict.fromkeys(i for part in parts for i in part)))


def test_runs_without_keys_are_combined_by_number(seeds: list[Path], tmp_path: Path) -> None:
    everything = [list(range(N))] * 3, [list(range(TESTS))] * 3
    assert hydra_pipe.combine(seeds, tmp_path / "out")
    check(tmp_path / "out", truth(seeds, *everything), np.arange(N), np.arange(TESTS))
    assert not hydra_pipe.combine(seeds, tmp_path / "out")


def test_other_samples_in_other_orders_are_matched_by_key(
    shards: list[Path], tmp_path: Path
) -> None:
    hydra_pipe.combine(shards, tmp_path / "out")
    train, tests = union(SHUFFLED), union(SOME_TESTS)
    expected = truth(shards, SHUFFLED, SOME_TESTS)
    assert (expected["runs"][np.ix_(train, tests)] == 0).any()  # pairs that no run has
    check(tmp_path / "out", expected, train, tests)
    opened = hydra_pipe.open_run(tmp_path / "out")
    assert list(opened.sample_keys or []) == [KEYS[i] for i in train]
    assert list(opened.test_keys or []) == [TEST_KEYS[i] for i in tests]
    found = opened.relevance()
    assert found.sample_key.values.tolist() == [KEYS[i] for i in train]
    np.testing.assert_array_equal(found.sample_label, images(N, 1).tensors[1][train])
    np.testing.assert_array_equal(found.test_label, images(TESTS, 2).tensors[1][tests])


def test_runs_that_were_reduced_for_other_tests_are_combined_on_all(
    seeds: list[Path], tmp_path: Path
) -> None:
    chosen = [[0, 1, 2, 5], [1, 2, 3], [2, 5, 7]]
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in seeds]
    for run, tests in zip(runs, chosen, strict=True):
        hydra_pipe.reduce(run, tests=",".join(map(str, tests)), overwrite=True)
    hydra_pipe.combine(runs, tmp_path / "out")
    expected = truth(runs, [list(range(N))] * 3, chosen)
    tests = np.array([0, 1, 2, 3, 5, 7])
    check(tmp_path / "out", expected, np.arange(N), tests)
    np.testing.assert_array_equal(hydra_pipe.open_run(tmp_path / "out").relevance().test, tests)


def test_means_over_tests_are_combined_by_their_names(seeds: list[Path], tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in seeds]
    for run in runs:
        hydra_pipe.reduce(run, by="label")
    hydra_pipe.combine(runs, tmp_path / "out", method="hydra-fisher-by-label")
    own = [
        np.asarray(hydra_pipe.open_run(run).relevance("hydra-fisher-by-label"), float)
        for run in runs
    ]
    values = np.stack(own)
    scale = np.sqrt((values**2).mean(axis=1, keepdims=True))
    expected = (values / scale).mean(axis=0) * np.median(scale, axis=0)
    found = hydra_pipe.open_run(tmp_path / "out").relevance("hydra-fisher-by-label")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_moments_of_a_column_are_those_of_plain_numpy(data: st.DataObject) -> None:
    n, n_runs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=(n_runs, n)) * 10.0 ** rng.integers(-6, 6, (n_runs, 1))
    values[rng.random((n_runs, n)) < 0.2] = 0.0
    there = rng.random((n_runs, n)) < data.draw(st.sampled_from([0.5, 1.0]))
    moments = ColumnMoments(n)
    scaled = np.full((n_runs, n), np.nan)
    scales = []
    for r in range(n_runs):
        own = values[r, there[r]]
        scales.append(np.sqrt(np.mean(own**2)) if own.size else 0.0)
        assert moments.add(np.flatnonzero(there[r]), own) == pytest.approx(scales[-1])
        scaled[r, there[r]] = own / scales[-1] if scales[-1] else own
    found, size = moments.spread(), np.median(scales)
    dots, squares = [], []
    for i in range(n):
        own = scaled[~np.isnan(scaled[:, i]), i]
        squares += (own**2).tolist()
        dots += [own[a] * own[b] for a in range(len(own)) for b in range(len(own)) if a != b]
        mean = own.mean() if len(own) else 0.0
        assert found.mean[i] == pytest.approx(mean * size, rel=1e-9, abs=1e-12)
        if len(own) > 1:
            error = np.std(own, ddof=1) / np.sqrt(len(own)) * size
            assert found.standard_error[i] == pytest.approx(error, rel=1e-7, abs=1e-9 * size)
        else:
            assert np.isnan(found.standard_error[i])
        if abs(mean) > 1e-12:
            assert found.agreeing[i] == (np.sign(own) == np.sign(mean)).sum()
    if dots and np.sum(squares) > 0:
        cosine = np.mean(dots) / np.mean(squares)
        assert found.cosine == pytest.approx(cosine, abs=1e-9)
        n_seen = (~np.isnan(scaled)).sum(axis=0)
        runs = n_seen[n_seen > 0].mean()
        assert found.effective_runs == pytest.approx(runs / (1 + (runs - 1) * max(cosine, 0)))
    else:
        assert np.isnan(found.cosine)


def test_runs_that_say_the_same_are_worth_one(tmp_path: Path, seeds: list[Path]) -> None:
    runs = [Path(shutil.copytree(seeds[0], tmp_path / f"copy-{i}")) for i in range(3)]
    for i, run in enumerate(runs):  # as if each were a run of its own
        _renamed(run, f"{i:032x}")
    hydra_pipe.combine(runs, tmp_path / "out")
    facts = hydra_pipe.open_run(tmp_path / "out").combined().column_facts()
    np.testing.assert_allclose(facts[COSINE], 1.0)
    np.testing.assert_allclose(facts[EFFECTIVE_RUNS], 1.0)


def _renamed(run: Path, run_id: str) -> None:
    """Give a run another id in its manifests and stores, as no user does."""
    old = RunDirectory.open(run).run_id
    for file in (run / "run.json", run / "checksums" / "run.json", *run.rglob("zarr.json")):
        file.write_text(file.read_text().replace(old, run_id))
    for file in (run / "run.json", run / "checksums" / "run.json"):
        manifest = json.loads(file.read_text())
        for stage in manifest["stages"].values():
            stage["facts"].pop("checksums", None)
        file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("width", [1, 4])
def test_blocks_and_chunks_that_do_not_divide_change_no_value(
    seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    hydra_pipe.combine(seeds, tmp_path / "whole")
    whole = hydra_pipe.open_run(tmp_path / "whole")
    for module in (relevance_module, combined_module):
        monkeypatch.setattr(module, "chunk_samples", lambda n: min(n, 16))
    _plan_in_blocks(monkeypatch, width)
    hydra_pipe.combine(seeds, tmp_path / "parts")
    parts = hydra_pipe.open_run(tmp_path / "parts")
    np.testing.assert_array_equal(np.asarray(parts.relevance()), np.asarray(whole.relevance()))
    for name in ("standard_error", "agreeing"):
        one, other = (getattr(run.combined(), name).read() for run in (parts, whole))
        np.testing.assert_array_equal(one, other)
    for name, values in whole.combined().column_facts().items():
        np.testing.assert_array_equal(parts.combined().column_facts()[name], values)
    assert hydra_pipe.verify(tmp_path / "parts") == []


def _plan_in_blocks(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    def planned(what: CombiningInput) -> CombiningPlan:
        plan = plan_combining(what)
        return CombiningPlan(
            plan.n_columns, width, plan.peak_bytes, plan.read_bytes, plan.written_bytes
        )

    monkeypatch.setattr(combining, "plan_combining", planned)


class Stopping(Progress):
    """Raises when so many pairs are combined."""

    def __init__(self, after: int) -> None:
        self._left = after

    def task(self, description: str, total: int, unit: str):
        stopping = self

        class Counted(Task):
            def advance(self, n: int) -> None:
                stopping._left -= 1
                if not stopping._left:
                    raise KeyboardInterrupt

        return (
            _given(Counted())
            if description == "combine"
            else super().task(description, total, unit)
        )


class _given:  # noqa: N801
    def __init__(self, value: Task) -> None:
        self._value = value

    def __enter__(self) -> Task:
        return self._value

    def __exit__(self, *_: object) -> None:
        pass


def test_a_resumed_combination_has_the_same_bytes(
    seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plan_in_blocks(monkeypatch, 2)
    hydra_pipe.combine(seeds, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        hydra_pipe.combine(seeds, tmp_path / "resumed", progress=Stopping(3))
    stages = RunDirectory.open(tmp_path / "resumed").stages
    assert {str(which): stage.state for which, stage in stages.items()} == {
        "combine hydra-fisher": "running",
        "reduce hydra-fisher": "failed",
    }
    read: list[int] = []
    original = combining._spreads

    def counted(sources, first: int, last: int):
        read.append(first)
        return original(sources, first, last)

    monkeypatch.setattr(combining, "_spreads", counted)
    assert hydra_pipe.combine(seeds, tmp_path / "resumed")
    assert read == [6, 8]
    own_id = RunDirectory.open(tmp_path / "resumed").run_id
    other_id = RunDirectory.open(tmp_path / "straight").run_id
    one, other = (
        {
            name: data.replace(run_id.encode(), b"")
            for name, data in contents(tmp_path / run).items()
            if not name.startswith("checksums") and name != "run.json"
        }
        for run, run_id in (("resumed", own_id), ("straight", other_id))
    )
    assert one == other
    assert hydra_pipe.verify(tmp_path / "resumed") == []


def test_a_run_that_was_reduced_anew_is_combined_anew(seeds: list[Path], tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in seeds]
    hydra_pipe.combine(runs, tmp_path / "out")
    hydra_pipe.export(tmp_path / "out")
    hydra_pipe.reduce(runs[1], overwrite=True)
    assert not hydra_pipe.combine(runs, tmp_path / "out")  # the same values again
    array = open_relevance(runs[1] / "relevance.zarr", "hydra-fisher")
    write_relevance(array, 0, 0, -array.read())
    directory = RunDirectory.open(runs[1])
    which = next(one for one in directory.stages if str(one) == "reduce hydra-fisher")
    directory.stages[which].facts["checksums"] = "other"
    directory.save(which)
    assert hydra_pipe.combine(runs, tmp_path / "out")
    assert not (tmp_path / "out" / "rankings").exists() or not list(
        (tmp_path / "out" / "rankings").iterdir()
    )


def test_everything_after_reduce_takes_a_combination(shards: list[Path], tmp_path: Path) -> None:
    out, runner = tmp_path / "out", CliRunner()

    def invoke(*words: object) -> str:
        found = runner.invoke(app, list(map(str, words)))
        assert found.exit_code == 0, found.output
        return found.output

    assert "3 runs combined" in invoke("combine", *shards, "--into", out)
    assert "already" in invoke("combine", *shards, "--into", out)
    invoke("export", out, "--top", 4, "--full")
    ranked = pq.read_table(
        out / "rankings" / "method=hydra-fisher" / "part-00000.parquet", partitioning=None
    ).to_pandas()
    combined = hydra_pipe.open_run(out).combined()
    columns = np.searchsorted(np.unique(ranked["test_id"]), ranked["test_id"])
    pairs = combined.spread_of(ranked["train_id"].to_numpy(), columns)
    np.testing.assert_array_equal(ranked["agreeing_runs"], pairs.agreeing)
    np.testing.assert_array_equal(ranked["runs"], pairs.runs)
    np.testing.assert_allclose(ranked["standard_error"], pairs.standard_error)
    train = union(SHUFFLED)
    assert ranked["train_key"].tolist() == [KEYS[train[i]] for i in ranked["train_id"]]
    samples = pq.read_table(
        out / "rankings" / "method=hydra-fisher" / "samples.parquet", partitioning=None
    ).to_pandas()
    visits = np.zeros(N, int)
    for run, part in zip(shards, SHUFFLED, strict=True):
        own = hydra_pipe.open_run(run)
        np.add.at(visits, np.array(part)[own.gradients.samples(slice(None))], 1)
    assert samples["visits"].tolist() == visits[train].tolist()
    top = hydra_pipe.open_run(out).top(TEST_KEYS[3], 2)
    assert list(top.columns[-3:]) == ["standard_error", "agreeing_runs", "runs"]
    invoke("report", out)
    page = (out / "report.html").read_text()
    assert "stable in 3 of 3 runs" in page
    assert "runs combined" in page
    found = hydra_pipe.clean(out, method="hydra-fisher", lowest=3)
    assert found.drop["key"].to_pylist() == [
        KEYS[train[i]] for i in found.drop["train_id"].to_pylist()
    ]
    assert "combine" in invoke("info", out)
    assert "healthy" in invoke("verify", out)
    assert "combines runs" in repr(hydra_pipe.open_run(out))
    refused = runner.invoke(app, ["reduce", str(out)])
    assert refused.exit_code == 1
    assert "combines runs, and has no recording of its own" in refused.output


def test_what_cannot_be_combined_is_refused(
    seeds: list[Path], shards: list[Path], tmp_path: Path
) -> None:
    def combined(*runs: Path, **options: object) -> None:
        hydra_pipe.combine(runs, tmp_path / "out", **options)

    with pytest.raises(UsageError, match="1 runs to combine"):
        combined(seeds[0])
    with pytest.raises(RunError, match=r"has keys of its training samples, and .* has none"):
        combined(seeds[0], shards[0])
    with pytest.raises(RunError, match="would count twice"):
        combined(seeds[0], Path(shutil.copytree(seeds[0], tmp_path / "copy")))
    with pytest.raises(RunError, match="reduce influence has not been run"):
        combined(*seeds, method="influence")
    record(tmp_path / "few", 3, list(range(30)), list(range(TESTS)), keyed=False)
    with pytest.raises(RunError, match="only keys can tell which are the same"):
        combined(seeds[0], tmp_path / "few")
    with pytest.raises(RunError, match="holds a recording"):
        hydra_pipe.combine(seeds[:2], seeds[2])
    with pytest.raises(BudgetError, match="raise --memory"):
        combined(*seeds, memory="1MiB")
    combined(*seeds[:2])
    with pytest.raises(RunError, match="combine hydra-fisher was run with runs="):
        combined(*seeds)
    combined(*seeds, overwrite=True)
    assert hydra_pipe.open_run(tmp_path / "out").combined().n_runs == 3
    with pytest.raises(RunError, match="combines runs itself"):
        hydra_pipe.combine([seeds[0], tmp_path / "out"], tmp_path / "more")


def test_other_labels_of_the_same_sample_are_refused(tmp_path: Path) -> None:
    for name, shift in (("one", 0), ("other", 1)):
        samples = images(N, 1)
        train = TensorDataset(samples.tensors[0], (samples.tensors[1] + shift) % 4)
        hydra_pipe.record(
            mlp_pipeline(train=train, test_keys=TEST_KEYS, sample_keys=KEYS), tmp_path / name
        )
        hydra_pipe.reduce(tmp_path / name)
    with pytest.raises(RunError, match="runs are combined on the same labels"):
        hydra_pipe.combine([tmp_path / "one", tmp_path / "other"], tmp_path / "out")


def test_values_that_are_no_numbers_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(seeds[1], tmp_path / "broken"))
    array = open_relevance(run / "relevance.zarr", "hydra-fisher")
    values = array.read()
    values[3, 5] = np.inf
    write_relevance(array, 0, 0, values)
    with pytest.raises(NonFiniteError, match="for test 5: leave the run out"):
        hydra_pipe.combine([seeds[0], run], tmp_path / "out")


def test_a_combination_of_another_method_is_reported_and_drawn(
    seeds: list[Path], tmp_path: Path
) -> None:
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in seeds[:2]]
    for run in runs:
        hydra_pipe.reduce(run, method="grad-dot")
    hydra_pipe.combine(runs, tmp_path / "out", method="grad-dot")
    assert hydra_pipe.report(tmp_path / "out")
    assert "stable in 2 of 2 runs" in (tmp_path / "out" / "report-grad-dot.html").read_text()
    assert hydra_pipe.open_run(tmp_path / "out").methods == ["grad-dot"]
    hydra_pipe.combine(runs, tmp_path / "out")  # another method of the same runs, beside it
    assert hydra_pipe.open_run(tmp_path / "out").methods == ["grad-dot", "hydra-fisher"]
    with pytest.raises(RunError, match="combines runs, and has no recording"):
        hydra_pipe.open_run(tmp_path / "out").plot.loss()
    assert hydra_pipe.verify(tmp_path / "out") == []


def test_a_damaged_combination_is_set_back_and_combined_again(
    seeds: list[Path], tmp_path: Path
) -> None:
    hydra_pipe.combine(seeds, tmp_path / "out")
    before = np.asarray(hydra_pipe.open_run(tmp_path / "out").relevance())
    hydra_pipe.export(tmp_path / "out")
    chunk = next((tmp_path / "out" / "combined").rglob("agreeing/c/0/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    assert [fault.where for fault in hydra_pipe.verify(tmp_path / "out")] == [
        "combined/hydra-fisher.zarr/agreeing/c/0/0"
    ]
    assert hydra_pipe.verify(tmp_path / "out", repair=True) == []
    assert RunDirectory.open(tmp_path / "out").stages == {}
    assert hydra_pipe.combine(seeds, tmp_path / "out")
    np.testing.assert_array_equal(
        np.asarray(hydra_pipe.open_run(tmp_path / "out").relevance()), before
    )


def test_a_combination_may_lie_in_an_object_store(seeds: list[Path]) -> None:
    out = "memory://combined/out"
    hydra_pipe.combine(seeds, out)
    assert hydra_pipe.open_run(out).combined().n_runs == 3
    assert not hydra_pipe.combine(seeds, out)
    assert hydra_pipe.verify(out) == []


@given(
    rows=st.lists(st.integers(1, 10**7), min_size=2, max_size=20),
    n_columns=st.integers(1, 10**5),
    memory=st.integers(2**28, 2**36),
)
def test_a_plan_keeps_to_its_budget_and_covers_every_column(
    rows: list[int], n_columns: int, memory: int
) -> None:
    what = CombiningInput(tuple(rows), max(rows), n_columns, 64, 2**27, memory)
    try:
        plan = plan_combining(what)
    except BudgetError:
        return
    assert plan.peak_bytes <= memory
    blocks = plan.blocks(0)
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == n_columns
    assert plan.width == n_columns or plan.width < 64 or plan.width % 64 == 0
