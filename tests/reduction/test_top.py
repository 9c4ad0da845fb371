"""`reduce --top`: the top samples are those of the whole relevance, whatever computes them."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.pipelines import conv_pipeline

import hydra_pipe
from hydra_pipe.errors import BudgetError, RunError, StoreError, UsageError
from hydra_pipe.maths.ranking import Ranking
from hydra_pipe.plan import chunking
from hydra_pipe.reduction.methods import METHODS
from hydra_pipe.reduction.solvers import sums
from hydra_pipe.store.data import relevance
from hydra_pipe.store.data.rankings import opened_table

TOP = 3
ABLE = [name for name, method in METHODS.items() if "--top" not in method.refuses]
SIDES = {"helpful": 1, "harmful": -1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording in several shards, with test gradients on the way and a probe."""
    path = tmp_path_factory.mktemp("top") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_FEATURES", 100)
        patch.setattr(chunking, "SHARD_BYTES", 16 * 400 * 4)
        patch.setattr(chunking, "CHUNK_BYTES", 4 * 100 * 4)
        hydra_pipe.record(conv_pipeline(), path, encoding="exact", dtype="float32", test_every="1")
    return path


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def by_plain_sort(values: np.ndarray, top: int) -> dict[str, list[list[int]]]:
    """Ids of each side of each column: of one sign, the largest size first, then the lowest id."""
    found: dict[str, list[list[int]]] = {}
    for side, sign in SIDES.items():
        found[side] = [
            sorted(np.flatnonzero(column * sign > 0), key=lambda i: (-abs(column[i]), i))[:top]
            for column in values.T
        ]
    return found


def kept(run: Path, result: str) -> zarr.Group:
    return zarr.open_group(run / "relevance.zarr" / result, mode="r")


def assert_top_of(run: Path, result: str, top: int = TOP) -> None:
    """The group `result`-top has the top of the matrix `result`, by Zarr alone."""
    values = zarr.open_array(run / "relevance.zarr" / result, mode="r")[:]
    group = kept(run, f"{result}-top")
    assert (
        dict(group.attrs).items()
        >= dict(zarr.open_array(run / "relevance.zarr" / result, mode="r").attrs).items()
    )
    for side, ids in by_plain_sort(values, top).items():
        samples, found = group[f"{side}_sample"][:], group[side][:]
        assert samples.shape == found.shape == (values.shape[1], min(top, len(values)))
        for column, wanted in enumerate(ids):
            n = len(wanted)
            assert samples[column, :n].tolist() == wanted
            np.testing.assert_array_equal(found[column, :n], values[wanted, column])
            assert (samples[column, n:] == -1).all()
            assert np.isnan(found[column, n:]).all()


@pytest.mark.parametrize("chosen", [{}, {"by": "label"}, {"by": "mean"}, {"tests": "1,3-5"}])
@pytest.mark.parametrize("method", ABLE)
def test_the_top_samples_are_those_of_the_whole_relevance(
    own: Path, method: str, chosen: dict[str, str]
) -> None:
    options = {"method": method, "scheduler": "synchronous", "chunks": "auto", **chosen}
    hydra_pipe.reduce(own, **options)
    hydra_pipe.reduce(own, **options, top=TOP)
    result, few = hydra_pipe.open_run(own).methods
    assert few == f"{result}-top"
    if method == "hydra":  # folded first where every pair is computed: rounded in another order
        assert_about_top_of(own, result)
    else:
        assert_top_of(own, result)
    assert hydra_pipe.verify(own) == []


def assert_about_top_of(run: Path, result: str) -> None:
    values = zarr.open_array(run / "relevance.zarr" / result, mode="r")[:]
    group = kept(run, f"{result}-top")
    for side, ids in by_plain_sort(values, TOP).items():
        for column, wanted in enumerate(ids):
            assert group[f"{side}_sample"][column, : len(wanted)].tolist() == wanted
            np.testing.assert_allclose(
                group[side][column, : len(wanted)], values[wanted, column], rtol=1e-5
            )


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
@pytest.mark.parametrize("method", ["hydra-fisher", "tracin"])
def test_the_top_samples_do_not_depend_on_the_scheduler(
    own: Path, monkeypatch: pytest.MonkeyPatch, method: str, scheduler: str
) -> None:
    """With shares of 8 samples, so that rankings of several tasks meet."""
    monkeypatch.setattr(sums, "SAMPLE_MULTIPLE", 8)
    monkeypatch.setattr(relevance, "CHUNK_SAMPLES", 8)
    hydra_pipe.reduce(own, method=method, scheduler=scheduler)
    hydra_pipe.reduce(own, method=method, scheduler=scheduler, top=TOP)
    assert_top_of(own, method)


@pytest.mark.parametrize("options", [{"rank": 20}, {"rank": "full"}, {"up_to_step": 4}])
def test_results_of_their_own_have_top_samples(own: Path, options: dict[str, object]) -> None:
    hydra_pipe.reduce(own, scheduler="synchronous", **options)  # type: ignore[arg-type]
    hydra_pipe.reduce(own, scheduler="synchronous", top=TOP, **options)  # type: ignore[arg-type]
    result, few = hydra_pipe.open_run(own).methods
    assert few == f"{result}-top"
    assert_top_of(own, result)


@pytest.mark.parametrize("method", ["hydra", "hydra-fisher"])
def test_kept_hypergradients_answer_with_top_samples(own: Path, method: str) -> None:
    """Also after the rows are gone."""
    hydra_pipe.reduce(own, method=method, keep_hypergradients=True)
    hydra_pipe.prune(own)
    hydra_pipe.reduce(own, method=method, overwrite=True)
    hydra_pipe.reduce(own, method=method, top=TOP)
    assert_top_of(own, method)
    assert hydra_pipe.verify(own) == []


def test_more_than_there_are_samples_are_all_of_them(own: Path) -> None:
    hydra_pipe.reduce(own, method="grad-dot")
    hydra_pipe.reduce(own, method="grad-dot", top=1000)
    assert_top_of(own, "grad-dot", 1000)
    assert len(hydra_pipe.open_run(own).top(0, 500, "both", "grad-dot-top")) <= 26


def test_a_relevance_that_is_no_number_is_on_neither_side() -> None:
    values = np.array([[np.nan, 2, np.nan, 2, -1, 0, np.inf, -np.inf]], np.float32)
    whole = Ranking(0, 1, 2)
    whole.add(values, 0)
    parts = [Ranking(0, 1, 2) for _ in range(4)]
    for i, part in enumerate(parts):
        part.add(values[:, 2 * i : 2 * i + 2], 2 * i)
    joined, *later = parts
    for part in later:
        joined.join(part)
    for ranking in (whole, joined):
        assert ranking.tops().samples.tolist() == [[[6, 1], [7, 4]]]
        assert ranking.tops().ranked(0, 1).train.tolist() == [6, 7]


def test_rankings_joined_are_those_of_all_samples() -> None:
    """Of many ties, in slabs and shares of any size."""
    rng = np.random.default_rng(0)
    values = rng.integers(-4, 5, (5, 300)).astype(np.float32)
    for count in (1, 7, 40, 299, 400):
        whole = by_plain_sort(values.T, count)
        bounds = [0, *np.sort(rng.choice(300, 5, replace=False)).tolist(), 300]
        shares = []
        for low, high in pairwise(bounds):
            share = Ranking(0, 5, count)
            for first in range(low, high, 23):
                share.add(values[:, first : min(first + 23, high)], first)
            shares.append(share)
        for share in shares[1:]:
            shares[0].join(share)
        tops = shares[0].tops()
        for number, side in enumerate(SIDES):
            found = [row[row >= 0].tolist() for row in tops.samples[:, number]]
            assert found == whole[side]


def test_an_export_of_top_samples_is_that_of_the_whole_relevance(own: Path) -> None:
    hydra_pipe.reduce(own, method="tracin")
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    for result, top in (("tracin", 2), ("tracin-top", 2)):
        assert hydra_pipe.export(own, method=result, top=top)
        assert not hydra_pipe.export(own, method=result, top=top)
    whole, few = (
        opened_table(own / "rankings" / f"method={result}" / "part-00000.parquet").read()
        for result in ("tracin", "tracin-top")
    )
    assert few.equals(whole)
    assert len(few)
    assert [file.name for file in (own / "rankings/method=tracin-top").iterdir()] == [
        "part-00000.parquet"
    ]
    hydra_pipe.reduce(own, method="tracin", top=4, overwrite=True)
    again = hydra_pipe.open_run(own).info()["next"]
    assert again == [f"hydra-pipe export {own} --method tracin-top --top 4"]
    assert "export tracin-top" not in hydra_pipe.open_run(own).info()["stages"]
    with pytest.raises(BudgetError, match="raise --memory to"):
        hydra_pipe.export(own, method="tracin-top", top=4, memory="1MiB")


@pytest.mark.parametrize("side", ["helpful", "harmful", "both"])
def test_open_run_shows_top_samples_as_it_shows_the_whole_relevance(own: Path, side: str) -> None:
    pytest.importorskip("pandas")
    hydra_pipe.reduce(own, method="tracin")
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    run = hydra_pipe.open_run(own)
    whole, few = (run.top(2, 2, side, result) for result in ("tracin", "tracin-top"))
    assert few.equals(whole)
    assert few.attrs["test_id"] == whole.attrs["test_id"] == 2
    with pytest.raises(UsageError, match="k = 4: tracin-top has the top 3"):
        run.top(2, 4, side, "tracin-top")
    with pytest.raises(UsageError, match="has no test sample 99"):
        run.top(99, 2, side, "tracin-top")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda run: hydra_pipe.open_run(run).relevance("tracin-top"), "compute tracin with"),
        (lambda run: hydra_pipe.open_run(run).samples("tracin-top"), "compute tracin with"),
        (lambda run: hydra_pipe.report(run, method="tracin-top"), "compute tracin with"),
        (lambda run: hydra_pipe.clean(run, method="tracin-top"), "compute tracin with"),
        (
            lambda run: hydra_pipe.combine([run, run], run / "both", method="tracin-top"),
            "compute tracin with",
        ),
        (
            lambda run: hydra_pipe.evaluate(
                conv_pipeline(), run, "lds", methods="tracin-top", retrainings=10
            ),
            "compute tracin with",
        ),
        (lambda run: hydra_pipe.export(run, method="tracin-top", full=True), "compute tracin with"),
        (lambda run: hydra_pipe.export(run, method="tracin-top", top=4), "has the top 3"),
        (lambda run: hydra_pipe.reduce(run, method="tracin", top=0), "give 1 or more"),
        (lambda run: hydra_pipe.reduce(run, top=3, keep_hypergradients=True), "choose one"),
        (lambda run: hydra_pipe.reduce(run, top=3, method="self"), "self has one value"),
        (lambda run: hydra_pipe.reduce(run, top=3, method="hydra-exact"), "replays the training"),
    ],
)
def test_what_needs_every_pair_is_refused_by_name(
    own: Path, use: Callable[[Path], object], says: str
) -> None:
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    with pytest.raises(UsageError, match=says):
        use(own)


def test_another_number_of_top_samples_is_told_by_name(own: Path) -> None:
    assert hydra_pipe.reduce(own, method="tracin", top=TOP)
    assert not hydra_pipe.reduce(own, method="tracin", top=TOP)
    with pytest.raises(RunError, match="top=3, now top=4"):
        hydra_pipe.reduce(own, method="tracin", top=4)
    with pytest.raises(RunError, match=r"--method grad-dot.*first|--top 100.*first"):
        hydra_pipe.export(own, method="grad-dot-top")


def test_a_plan_counts_the_bytes_of_the_top_samples(own: Path) -> None:
    plan = hydra_pipe.plan_reduction(own, method="tracin", top=TOP)
    assert "of which 3 on each side are kept" in str(plan)
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    arrays = [array for name, array in kept(own, "tracin-top").arrays() if name != "test"]
    assert plan.written_bytes == sum(array.nbytes for array in arrays)


def test_a_damaged_group_is_found(own: Path) -> None:
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    chunk = own / "relevance.zarr/tracin-top/harmful_sample/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    (fault, *_) = hydra_pipe.verify(own)
    assert "harmful_sample" in fault.where
    hydra_pipe.verify(own, repair=True)
    assert "tops tracin-top" not in hydra_pipe.open_run(own).info()["stages"]
    assert not (own / "relevance.zarr/tracin-top").exists()


def test_samples_that_do_not_exist_are_refused(own: Path) -> None:
    """A stranger's file may have any numbers in it."""
    hydra_pipe.reduce(own, method="tracin", top=TOP)
    array = zarr.open_array(own / "relevance.zarr/tracin-top/helpful_sample", mode="r+")
    array[0, 0] = 26
    with pytest.raises(StoreError, match="samples"):
        hydra_pipe.export(own, method="tracin-top", top=TOP)
