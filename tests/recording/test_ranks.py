"""Two processes under DistributedDataParallel: one run, equal to that of one process with the same
batches; no rank fails alone.

Each pair of processes does everything of a group of ranks_worker.py or ranks_tracked.py, and many
tests look at what it left.
"""

import json
import multiprocessing
import os
import re
import shutil
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from ranks_tracked import CLEARED, EPOCHS, KEPT, OVERFLOWED, TRACKED, Tracked, as_rank
from ranks_worker import CASES, GROUPS, N_STEPS, PROBED, TEST, UNEVEN, WORLD, Case, X, Y
from support import ROOT
from support.pipelines import cross_entropy
from support.recordings import arrays, assert_same_run, decoded_group
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.cli.app import app
from hydra_pipe.store import names

SECONDS = 240


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes that have imported what the ranks need: one imports it, and forks the
    others.
    """
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent, ROOT))))
        patch.setenv("PYTHONWARNINGS", "error")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        # which the first optimiser imports
        context.set_forkserver_preload(["ranks_tracked", "torch._dynamo"])
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def spawn(processes: BaseContext, tmp_path_factory: pytest.TempPathFactory):
    """The directory in which the ranks ran a group of functions, after `before` if any, and what
    each found, by function.
    """
    done: dict[str, tuple[Path, list[dict[str, Any]]]] = {}

    def run(
        group: str, before: str | None = None, code: int = 0
    ) -> tuple[Path, list[dict[str, Any]]]:
        if group not in done:
            directory = run(before, code=7)[0] if before else tmp_path_factory.mktemp("ranks")
            ranks = [
                processes.Process(target=as_rank, args=(group, rank, directory))
                for rank in range(WORLD)
            ]
            for rank in ranks:
                rank.start()
            try:
                for rank in ranks:
                    rank.join(SECONDS)
                codes = [rank.exitcode for rank in ranks]
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.join()
            logs = [directory / f"{rank}.log" for rank in range(WORLD)]
            assert codes == [code] * WORLD, "\n".join(log.read_text()[-3000:] for log in logs)
            found = [directory / f"{rank}.json" for rank in range(WORLD)]
            done[group] = directory, [json.loads(path.read_text()) for path in found if not code]
        return done[group]

    return run


def alone(case: Case, run: Path) -> None:
    """The same training in one process: each rank's samples weigh what its mean weighs in the mean
    over ranks.
    """
    model = case.build()
    optimizer = case.optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, N_STEPS)
    recorder = Recorder(model, optimizer, run, 24, sample_labels=Y.tolist(), **dict(case.options))
    for ids in case.batches():
        together = np.concatenate(ids)
        with recorder.step(together) as note:
            note.loss = 0.0
            for own in ids:
                loss = cross_entropy(model(X[own]), Y[own]).mean() / WORLD
                loss.backward()
                note.loss += loss.item()
            if case.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if recorder.n_steps == 7:
            recorder.record_test(DataLoader(TEST, 2), cross_entropy)
    recorder.record_test(DataLoader(TEST, 2), cross_entropy)
    recorder.close()


def scaled_rows(run: Path) -> dict[str, np.ndarray]:
    """What each sample of each step added to the gradient in use, in the order of step, then
    sample.
    """
    store = zarr.open_group(run / "gradients.zarr", mode="r")
    parts = (
        [store[f"rank/{rank}"] for rank in range(store.attrs["n_ranks"])]
        if "rank" in store
        else [store]
    )
    steps, samples = (
        np.concatenate([part[name][:] for part in parts]) for name in ("step", "sample")
    )
    scale = store["steps/gradient_scale"][:][steps]
    order = np.lexsort((samples, steps))
    decoded = [decoded_group(store, part, slice(None)) for part in parts]
    rows = {
        name: np.concatenate([d[name] for d in decoded]) * scale[:, None] for name in decoded[0]
    }
    return {name: values[order] for name, values in rows.items()} | {
        "(step, sample)": np.stack([steps, samples], 1)[order]
    }


def assert_close(value: np.ndarray, truth: np.ndarray, tolerance: float, what: str = "") -> None:
    np.testing.assert_allclose(
        value, truth, rtol=0, atol=tolerance * np.abs(truth).max(), err_msg=what
    )


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, spawn, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A case, the run of two ranks, and that of one process."""
    directory, _ = spawn("runs")
    run = tmp_path_factory.mktemp("alone") / "run"
    alone(CASES[request.param], run)
    return request.param, directory / request.param, run


def test_two_ranks_record_the_run_of_one_process(pair: tuple[str, Path, Path]) -> None:
    name, together, alone = pair
    # float16's own rounding; and D of Adam's first steps, 1 / |g| nearly, which blows up that of
    # gradients near zero
    tolerance = {"float16": 2e-3, "adamw": 1e-3, "adamw, sketched": 1e-3}.get(name, 1e-4)
    rows, truth = scaled_rows(together), scaled_rows(alone)
    assert rows.keys() == truth.keys()
    for block, values in truth.items():
        assert_close(rows[block], values, tolerance, block)

    one, other = hydra_pipe.open_run(together), hydra_pipe.open_run(alone)
    assert one.gradients.layout == other.gradients.layout
    np.testing.assert_array_equal(one.steps["n_rows"], other.steps["n_rows"])
    for column, values in other.steps.items():
        if column not in ("first_row", "gradient_scale", "imbalance"):
            np.testing.assert_allclose(one.steps[column], values, rtol=1e-4, err_msg=column)
    assert one.steps["imbalance"].max() < 1e-4
    assert one.gradients.test_steps() == other.gradients.test_steps() == [7, N_STEPS]

    for run in (together, alone):
        assert hydra_pipe.reduce(run, method="hydra")
        assert hydra_pipe.export(run, top=5, method="hydra")
        assert hydra_pipe.verify(run) == []
    relevance, expected = (
        hydra_pipe.open_run(run).relevance("hydra").to_numpy() for run in (together, alone)
    )
    assert_close(relevance, expected, tolerance)
    tables = [
        pl.read_parquet(run / "rankings/method=hydra/part-00000.parquet")
        for run in (together, alone)
    ]
    assert tables[0].drop("relevance").equals(tables[1].drop("relevance"))
    visits = [
        pl.read_parquet(run / "rankings/method=hydra/samples.parquet")["visits"]
        for run in (together, alone)
    ]
    assert visits[0].equals(visits[1])


def curvature_of_rows(run: Path) -> np.ndarray:
    """What each row is multiplied with in the step's curvature, c n rho r r^T, when rows are those
    of `scaled_rows`.
    """
    gradients, steps = (
        hydra_pipe.open_run(run).gradients,
        hydra_pipe.open_run(run).steps["gradient_scale"],
    )
    first, counts = gradients.rows_of_steps()
    found = []
    for step, scale in enumerate(steps):
        rows = [slice(at, at + n) for at, n in zip(first[step], counts[step], strict=True)]
        samples = np.concatenate([gradients.samples(own) for own in rows])
        weights = np.concatenate(
            [gradients.curvature(own) * (own.stop - own.start) / scale for own in rows]
        )
        found.append(weights[samples.argsort()])
    return np.concatenate(found)


def test_two_ranks_have_the_curvature_of_one_process(pair: tuple[str, Path, Path]) -> None:
    name, together, alone = pair
    weights, truth = curvature_of_rows(together), curvature_of_rows(alone)
    known = np.isfinite(weights)  # not of passes of one sample, whose loss cannot be told
    assert np.isfinite(truth).all()
    assert known.all() == (name != "accumulated")
    np.testing.assert_allclose(weights[known], truth[known], rtol=1e-3)
    facts = hydra_pipe.open_run(together).info()["stages"]["record"]["facts"]
    assert facts["n_curved_rows"] == known.sum()


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_training_without_a_recorder(spawn, name: str) -> None:
    assert [found[name] for found in spawn("runs")[1]] == [True, True]


def test_without_clipping_the_scale_is_exactly_one_over_the_ranks(spawn) -> None:
    scale = hydra_pipe.open_run(spawn("runs")[0] / "even").steps["gradient_scale"]
    assert scale.tolist() == [1 / WORLD] * N_STEPS


@pytest.mark.parametrize("name", PROBED)
@pytest.mark.parametrize("method", ["hydra", "hydra-fisher"])
def test_a_probe_of_a_run_of_two_ranks_is_what_its_own_tests_are(
    spawn, name: str, method: str
) -> None:
    run = spawn("runs")[0] / f"{name}, probed"
    own, probed = (
        [
            hydra_pipe.reduce(run, method=method, probe=test),
            np.asarray(hydra_pipe.open_run(run).relevance(result)),
        ][1]
        for test, result in ((None, method), ("again", f"{method}-of-again"))
    )
    assert own.shape == (24, len(TEST))
    assert np.abs(own).max() > 0
    assert_close(probed, own, 1e-5)
    assert hydra_pipe.verify(run) == []


def test_the_run_says_how_many_ranks_recorded_it(spawn) -> None:
    run = hydra_pipe.open_run(spawn("runs")[0] / "uneven")
    facts = run.info()["stages"]["record"]["facts"]
    n_rows = sum(UNEVEN) * N_STEPS
    assert (facts["n_steps"], facts["n_rows"], facts["n_tests"]) == (N_STEPS, n_rows, len(TEST))
    own = [sum(len(ids[rank]) for ids in CASES["uneven"].batches()) for rank in range(WORLD)]
    assert facts["rank_rows"] == own
    assert (run.info()["recording"]["ranks"], run.info()["recording"]["rows"]) == (WORLD, n_rows)
    shown = CliRunner().invoke(app, ["info", str(run.path)]).stdout
    assert "recorded by 2 processes" in " ".join(shown.split())
    np.testing.assert_array_equal(run.gradients.labels(names.TRAIN_LABELS), Y)
    first, counts = run.gradients.rows_of_steps()
    for step in (0, 4, N_STEPS - 1):
        for rank, ids in enumerate(CASES["uneven"].batches()[step]):
            rows = slice(first[step, rank], first[step, rank] + counts[step, rank])
            np.testing.assert_array_equal(run.gradients.samples(rows), ids)
            assert set(run.gradients.step_of_rows(rows)) == {step}


def test_verify_finds_what_a_rank_has_lost(spawn, tmp_path: Path) -> None:
    for lost in ("rank/1/gradient/c/0/0", "rank/1/steps/n_rows/c/0", "rank/0/sample/c/0"):
        run = tmp_path / lost.replace("/", "-")
        shutil.copytree(spawn("runs")[0] / "even", run)
        (run / "gradients.zarr" / lost).unlink()
        assert [fault.where for fault in hydra_pipe.verify(run)][:1] == [f"gradients.zarr/{lost}"]
    shutil.rmtree(run / "gradients.zarr" / "rank" / "1")
    assert {"gradients.zarr/rank/1/gradient", "gradients.zarr/rank/1/zarr.json"} < {
        fault.where for fault in hydra_pipe.verify(run)
    }


# function of a worker, what both ranks are to raise, how many steps are recorded, or None where no
# directory is to be there
TOLD = [
    (
        "unwrapped",
        r"RecordError: 2 processes train together .* wrap it in "
        r"torch\.nn\.parallel\.DistributedDataParallel",
        None,
    ),
    ("pipeline", r"PipelineError: a pipeline is trained by one process, not by 2", None),
    (
        "not finite",
        r"NonFiniteError: rank 1: the gradient of first\.weight is not finite at step 5 for "
        r"samples 5, 6, 7: ",
        5,
    ),
    (
        "penalty at once",
        r"GradientMismatchError: the books do not balance at step 0: the recorded rows of "
        r"first\.weight miss",
        None,
    ),
    (
        "penalty, projected",
        r"GradientMismatchError: the books do not balance at step 0: the recorded rows of "
        r"first\.\w+ miss",
        None,
    ),
    (
        "penalty later",
        r"GradientMismatchError: the books do not balance at step 4: the recorded rows of "
        r"first\.\w+ miss",
        4,
    ),
    (
        "mixing",
        r"LayerError: rank 1: .* other rows of first: the model mixes the samples of a batch",
        None,
    ),
    (
        "layouts",
        r"RecordError: first\.weight is recorded as factored in columns .* on rank 0 and as "
        r"dense in .* on rank 1",
        None,
    ),
    (
        "rates",
        r"RecordError: learning_rate is \[0\.1\] on rank 0 and \[0\.5\] on rank 1 at step 3",
        1,
    ),
    (
        "scales",
        r"RecordError: at step 3 the gradient in use is 2 times the mean over the ranks on rank "
        r"1 and 1 times on rank 0",
        1,
    ),
    (
        "changed",
        r"GradientMismatchError: rank 1: the books do not balance at step 3: the recorded rows "
        r"of second\.bias",
        3,
    ),
    (
        "left out by one",
        r"RecordError: rank 0 left out optimizer\.step\(\) at step 4, others did not",
        4,
    ),
    ("left out", r"RecordError: step 4 ended without optimizer\.step\(\)", 4),
    ("ids", r"RecordError: rank 1: sample id 99 is not among the 24 training samples", 2),
    (
        "unlike seeds",
        r"UsageError: seed is 64 on rank 0, 65 on rank 1: give Recorder the same",
        None,
    ),
    ("one bad dim", r"UsageError: rank 1: dim is -1", None),
    # and stays open
    ("test", r"NonFiniteError: rank 0: the loss of test sample 0 is not finite after 1 steps", ...),
    ("tracked ids", r"RecordError: rank 1: sample id -1 is not among the 24 training samples", 2),
    (
        "tracked in part",
        r"RecordError: rank 1: the tracked loader gave a batch of 3 samples, and the passes at "
        r"step 2 took 2",
        2,
    ),
    ("drawn ahead", r"RecordError: rank 1: at step 2 the next batch came before", 2),
    (
        "tracked and named",
        r"RecordError: rank 1: recorder\.step\(\) is in step 2, which a batch of the tracked",
        2,
    ),
    (
        "tracked, not finite",
        r"NonFiniteError: rank 1: the gradient of first\.weight is not finite at step 5",
        5,
    ),
    (
        "tracked, mixing",
        r"LayerError: rank 1: .* other rows of first: the model mixes the samples of a batch",
        None,
    ),
    (
        "tracked, another set",
        r"DataError: rank 1: the loader's dataset has 5 samples, the recorder's n_samples is 24",
        None,
    ),
    ("unlike dtypes", r"UsageError: dtype is 'float16' on rank 0, 'int8' on rank 1", None),
    ("again", r"RunError: rank 0: .* is recorded already", ...),
    ("again, other settings", r"RunError: rank 0: .*: record was run with seed=0, now seed=3", ...),
]


@pytest.mark.parametrize(("name", "message", "steps"), TOLD, ids=[name for name, *_ in TOLD])
def test_what_goes_wrong_on_one_rank_is_told_on_all(
    spawn, name: str, message: str, steps: object
) -> None:
    directory, found = spawn("faults" if name in GROUPS["faults"] else "tracked")
    for rank in range(WORLD):
        assert re.match(message, str(found[rank][name])), found[rank][name]
    if steps is None:
        assert not (directory / name).exists()
    elif steps is not ...:
        record = json.loads((directory / name / "run.json").read_text())["stages"]["record"]
        assert (record["state"], record["facts"]["n_steps"]) == ("failed", steps)
        assert re.match(message, f"{found[0][name].split(':')[0]}: {record['facts']['error']}")
        store = zarr.open_group(directory / name / "gradients.zarr", mode="r")
        assert [store[f"rank/{rank}/gradient"].shape[0] for rank in range(WORLD)] == [
            3 * steps
        ] * WORLD
        assert np.isfinite(store["rank/1/gradient"][:].astype(float)).all()


def test_a_step_that_a_gradient_scaler_skips_for_one_rank_is_skipped_for_all(spawn) -> None:
    directory, found = spawn("faults")
    assert [of_rank["scaled"] for of_rank in found] == [{"n_steps": 18, "n_skipped": 2}] * WORLD
    assert [of_rank["over again"] for of_rank in found] == [{"n_steps": 20, "n_skipped": 0}] * WORLD
    assert (
        hydra_pipe.open_run(directory / "scaled").info()["stages"]["record"]["facts"]["n_rows"]
        == 20 * 3 * WORLD
    )


def test_parameters_that_one_rank_does_not_use_have_the_gradient_of_the_other(spawn) -> None:
    directory, found = spawn("faults")
    assert [of_rank["unused"] for of_rank in found] == [{"n_steps": 6}] * WORLD
    run = hydra_pipe.open_run(directory / "unused")
    updated = dict(
        zip(
            [b.name for b in run.gradients.layout.blocks],
            run.steps["updated"].T.tolist(),
            strict=True,
        )
    )
    assert (updated["second.weight"], updated["never.weight"]) == ([1] * 6, [0] * 6)
    rows = scaled_rows(run.path)["second.weight"].reshape(6, 2, 3, -1)  # step, rank, sample
    assert [bool(np.any(of_rank)) for of_rank in rows[:, 1]] == [True, False] * 3
    assert all(np.any(of_rank) for of_rank in rows[:, 0])


@pytest.mark.parametrize("name", ["own passes", "own passes, static graph"])
def test_the_recorders_own_passes_leave_ddp_alone(spawn, name: str) -> None:
    assert [of_rank[name] for of_rank in spawn("faults")[1]] == [True, True]


def test_a_rank_whose_loop_raises_leaves_a_failed_run_behind(spawn) -> None:
    directory, found = spawn("faults")
    assert [of_rank["broken loop"] for of_rank in found] == ["RuntimeError", "KeyError"]
    record = json.loads((directory / "broken loop" / "run.json").read_text())["stages"]["record"]
    assert record["state"] == "failed"
    assert record["facts"]["n_steps"] == 17  # the ranks last met after that many


def fates(case: Tracked) -> list[str]:
    """What becomes of each group of batches."""
    left_over = case.accumulate == 2  # of three batches an epoch
    every = []
    for k in range(EPOCHS * (3 if case.accumulate == 1 else 2 if left_over else 1)):
        overflowed = any(k == at for at, _ in OVERFLOWED)
        every.append(
            "cleared"
            if k in CLEARED or (left_over and k % 2)
            else "overflowed"
            if overflowed
            else "recorded"
        )
    return every


@pytest.mark.parametrize("name", TRACKED)
def test_a_tracked_loop_of_two_ranks_is_one_that_names_its_samples(spawn, name: str) -> None:
    directory, found = spawn("tracked")
    fate = fates(TRACKED[name])
    n_steps, n_overflowed = fate.count("recorded"), fate.count("overflowed")
    # after the last nothing comes that could tell
    n_dropped = n_overflowed + fate.count("cleared") - (fate[-1] != "recorded")
    for of_rank in found:
        assert of_rank[name]["named"] == [True, n_steps, n_overflowed, len(TEST)]
        assert of_rank[name]["tracked"] == [True, n_steps, n_dropped, len(TEST)]
    named, tracked = (directory / f"{name}, {form}" for form in ("named", "tracked"))
    ours, others = arrays(tracked), arrays(named)
    assert ours.keys() == others.keys()
    # by sums over the steps that are checked together
    rounded = ("steps/gradient_scale", "steps/imbalance")
    for array, values in ours.items():
        if array in rounded:
            np.testing.assert_allclose(values, others[array], rtol=1e-5, atol=1e-6, err_msg=array)
        else:
            assert values.tobytes() == others[array].tobytes(), array
    for run, skipped in ((named, n_overflowed), (tracked, n_dropped)):
        assert hydra_pipe.open_run(run).info()["stages"]["record"]["facts"]["n_skipped"] == skipped
        assert hydra_pipe.reduce(run, method="hydra")
        assert hydra_pipe.verify(run) == []
    assert_close(
        *(hydra_pipe.open_run(run).relevance("hydra").to_numpy() for run in (tracked, named)), 1e-5
    )


def test_the_dtype_that_is_left_open_is_chosen_for_all_ranks(spawn) -> None:
    for name, dtype in (("dtype left open", "int8"), ("three batches", "float16")):
        store = zarr.open_group(
            spawn("tracked")[0] / f"{name}, tracked" / "gradients.zarr", mode="r"
        )
        assert [store[f"rank/{rank}/gradient"].dtype for rank in range(WORLD)] == [dtype] * WORLD


def test_every_optimizer_step_within_one_step_is_recorded(spawn) -> None:
    directory, found = spawn("tracked")
    assert [of_rank["twice"] for of_rank in found] == [40] * WORLD
    run = hydra_pipe.open_run(directory / "twice")
    assert run.gradients.rows.n_rows == 40 * 3 * WORLD
    assert hydra_pipe.verify(run.path) == []


def test_states_are_given_or_refused_to_all_ranks(spawn) -> None:
    _, found = spawn("tracked")
    waits = (
        r"RecordError: rank \d: state_dict\(\) in the middle of step {}, of which {} batches wait"
    )
    # skipped: for rank 1's sake; for rank 0's, while rank 1 has no loss, and cleared
    expected = [
        [1, 0, [3, 3]],
        [1, 1, [3, 3]],
        [1, 2, [3, 3]],
        waits.format(1, 1),
        [2, 2, [9, 9]],
        waits.format(2, 1),
    ]
    for of_rank in found:
        *states, n_steps, n_skipped = of_rank["skipped"]
        for state, value in zip(
            states, [*expected, [2, 3, [9, 9]], [3, 3, [12, 12]]], strict=False
        ):
            assert re.match(value, state) if isinstance(value, str) else state == value
        assert (n_steps, n_skipped) == (3, 3)


@pytest.mark.parametrize("which", KEPT)
def test_two_ranks_that_were_killed_go_on_as_if_they_had_not_been(spawn, which: str) -> None:
    directory, found = spawn("resumed", "killed")
    assert_same_run(directory / which, directory / f"{which}, whole")
    for of_rank in found:
        states, weights = of_rank[which]
        expected, expected_weights = of_rank[f"{which}, whole"]
        assert states == found[0][which][0]
        assert weights == expected_weights
        assert [s | {"run_id": ""} for s in states] == [s | {"run_id": ""} for s in expected]
        assert [s["tests"] for s in states] == [[5, 6], [5, 6, 8]]
        assert {(s["meet_every"], s["n_tests"], s["labels"]["test"]) for s in states} == {(2, 5, 5)}


def test_ranks_that_load_unlike_states_are_told(spawn) -> None:
    for of_rank in spawn("resumed", "killed")[1]:
        assert re.match(r"UsageError: \w+ is .* on rank 0, .* on rank 1", of_rank["unlike states"])
        assert re.match(
            r"RecordError: rank 1: this is no value of recorder\.state_dict\(\)",
            of_rank["bad state"],
        )
