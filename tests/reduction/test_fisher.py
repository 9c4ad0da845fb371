"""Method `hydra-fisher` against a float64 loop over whole gradients: encodings, optimisers,
processes, divisions of the work.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import (
    InterruptedHereError,
    adamw,
    by_loop,
    in_blocks,
    interrupted_after,
    made_up,
    nesterov,
    relevance,
)
from support.compare import relative_error
from support.pipelines import conv_pipeline, likelihood, mlp_pipeline
from torch import nn

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.errors import BudgetError, RunError
from hydra_pipe.maths.fisher import Form
from hydra_pipe.plan import chunking
from hydra_pipe.reduction import answers
from hydra_pipe.reduction.solvers import sweep
from hydra_pipe.reduction.solvers.sweep import Running
from hydra_pipe.store.data import save_interval
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import REDUCE


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that steps begin and end within files, and lie across two."""
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 12)


def plain() -> Pipeline:
    pipeline = mlp_pipeline(epochs=3)
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=0.3)
    return pipeline


def trained_by(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Pipeline:
    pipeline = mlp_pipeline(epochs=3)
    pipeline.optimizer = kind(pipeline.model.parameters(), **options)
    if options.get("maximize"):
        pipeline.loss = likelihood
    return pipeline


def dropout() -> Pipeline:
    pipeline = adamw(epochs=3)
    pipeline.model.insert(3, nn.Dropout(0.3))
    return pipeline


BUILDERS: dict[str, Callable[[], Pipeline]] = {
    "SGD, clipped, two groups, dampening": conv_pipeline,
    "momentum": lambda: mlp_pipeline(epochs=4),
    "Nesterov": nesterov,
    "no momentum": plain,
    "AdamW": adamw,
    "AdamW, dropout": dropout,
    "NAdam": lambda: trained_by(torch.optim.NAdam, lr=0.02, momentum_decay=0.4),
    "RAdam": lambda: trained_by(torch.optim.RAdam, lr=0.1),
    "RMSprop": lambda: trained_by(torch.optim.RMSprop, lr=0.003, momentum=0.5),
    "Adagrad": lambda: trained_by(torch.optim.Adagrad, lr=0.03),
    "climbing": lambda: trained_by(torch.optim.SGD, lr=0.1, momentum=0.9, maximize=True),
}


@pytest.mark.filterwarnings("ignore:the optimizer has maximize=True")
@pytest.mark.parametrize("name", BUILDERS)
def test_the_sweep_is_that_of_a_float64_loop(tmp_path: Path, name: str) -> None:
    hydra_pipe.record(BUILDERS[name](), tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "run", method="hydra-fisher")
    expected = by_loop(tmp_path / "run")
    assert relative_error(relevance(tmp_path / "run"), expected) < 1e-4
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    # curvature counts here
    assert relative_error(relevance(tmp_path / "run", "hydra"), expected) > 0.01
    assert hydra_pipe.verify(tmp_path / "run") == []


@pytest.mark.parametrize(
    "options", [{"encoding": "projected", "dim": 60}, {"dtype": "int8"}, {"dim": 100}], ids=str
)
def test_the_sweep_works_in_the_columns_that_were_recorded(
    tmp_path: Path, options: dict[str, object]
) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "run", **options)
    hydra_pipe.reduce(tmp_path / "run", method="hydra-fisher")
    assert relative_error(relevance(tmp_path / "run"), by_loop(tmp_path / "run")) < 1e-4


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_steps_of_several_processes_and_settings_of_several_groups(
    tmp_path: Path, n_ranks: int
) -> None:
    run = made_up(tmp_path / "run", n_ranks)
    hydra_pipe.reduce(run, method="hydra-fisher")
    expected = by_loop(run)
    assert relative_error(relevance(run), expected) < 3e-4
    hydra_pipe.reduce(run, method="hydra-fisher", by="label")
    means = np.stack([expected[:, label::3].mean(axis=1) for label in range(3)], axis=1)
    assert relative_error(relevance(run, "hydra-fisher-by-label"), means) < 3e-4
    hydra_pipe.reduce(run, method="hydra-fisher", by="mean", tests="2-4,8")
    assert (
        relative_error(
            relevance(run, "hydra-fisher-mean")[:, 0], expected[:, [2, 3, 4, 8]].mean(axis=1)
        )
        < 3e-4
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up(tmp_path / "run", 2)


@pytest.mark.parametrize(("width", "workers"), [(1, 1), (4, 1), (4, 2), (6, 2), (11, 1)])
@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_any_division_of_the_columns_gives_the_same(
    run: Path, width: int, workers: int, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_loop(run)
    in_blocks(monkeypatch, width, workers)
    hydra_pipe.reduce(run, method="hydra-fisher", scheduler=scheduler)
    assert relative_error(relevance(run), expected) < 3e-4
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize("chunks", ["1x1", "5x100", "1000x19"])
@pytest.mark.parametrize("rank", [None, 6])
def test_rows_may_be_decoded_in_other_pieces(run: Path, chunks: str, rank: int | None) -> None:
    """`--chunks` is rounded up to whole stored chunks of whole rows, and to a file at most."""
    other = shutil.copytree(run, run.with_name("other"))
    for path, options in ((run, {"chunks": chunks}), (other, {})):
        hydra_pipe.reduce(path, method="hydra-fisher", rank=rank, **options)
    name = "hydra-fisher" if rank is None else f"hydra-fisher-rank-{rank}"
    assert np.array_equal(relevance(run, name), relevance(other, name))
    plan = RunDirectory.open(run).stages[REDUCE.of(name)].facts["plan"]
    stored = hydra_pipe.open_run(run).gradients.rows
    assert plan["reading"]["rows"] % stored.chunk_rows == 0
    assert plan["reading"]["rows"] <= stored.shard_rows
    assert plan["reading"]["features"] == 19


@pytest.mark.parametrize("after", [0, 1, 4, 6, 8, 13, 20])
def test_a_sweep_goes_on_in_its_middle_to_the_same_bytes(
    run: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    in_blocks(monkeypatch, 4, 1)
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    hydra_pipe.reduce(other, method="hydra-fisher")
    with interrupted_after(after):
        hydra_pipe.reduce(run, method="hydra-fisher")
    real, again = sweep._step, []
    monkeypatch.setattr(
        sweep, "_step", lambda *arguments: (again.append(arguments), real(*arguments))
    )
    hydra_pipe.reduce(run, method="hydra-fisher")
    assert len(again) == 21 - after  # seven steps of three blocks
    assert np.array_equal(relevance(run), relevance(other))
    facts = [
        RunDirectory.open(path).stages[REDUCE.of("hydra-fisher")].facts["curvature_left"]
        for path in (run, other)
    ]
    assert 0 < facts[0] == facts[1] < 1
    assert not list((run / "relevance.zarr").rglob("sweep-*"))
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40] + b"x" + content[41:],
        lambda _: b"",
    ],
)
def test_a_damaged_state_is_not_gone_on_with(
    run: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    expected = by_loop(run)
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(
            answers, "write_relevance", lambda *_: (_ for _ in ()).throw(InterruptedHereError)
        )
        with pytest.raises(InterruptedHereError):
            hydra_pipe.reduce(run, method="hydra-fisher", scheduler="synchronous")
    states = list((run / "relevance.zarr/hydra-fisher").glob("sweep-*"))
    assert states
    for state in states:
        state.write_bytes(damage(state.read_bytes()))
    hydra_pipe.reduce(run, method="hydra-fisher")
    assert relative_error(relevance(run), expected) < 3e-4


def test_what_a_sweep_cannot_do_is_refused(run: Path) -> None:
    with pytest.raises(
        BudgetError,
        match=r"a sweep of one column over 29 features .*, --memory is 100 MiB: raise --memory to",
    ):
        hydra_pipe.reduce(run, method="hydra-fisher", memory="100MiB")
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.reduce(run, method="hydra-fisher")
    hydra_pipe.prune(run)
    with pytest.raises(
        RunError,
        match="its gradients were pruned: only hydra and hydra-exact work without them",
    ):
        hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)


def test_a_sweep_does_not_blow_up_where_the_curvature_is_far_too_large_for_the_steps(
    tmp_path: Path,
) -> None:
    """The raw sweep gains a factor each step, the saturated one none."""
    run = made_up(tmp_path / "run", 2, curvature=1e4)
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.reduce(run, method="hydra-fisher")
    found, fast = relevance(run), relevance(run, "hydra")
    assert np.linalg.norm(found) < np.linalg.norm(fast)
    assert np.linalg.norm(
        by_loop(run, (Form(1e-12, 0.0, np.inf, 1.0),), floor=False)
    ) > 1e6 * np.linalg.norm(fast)
    assert RunDirectory.open(run).stages[REDUCE.of("hydra-fisher")].facts["curvature_left"] < 0.4


def test_a_sweep_of_the_first_steps_is_that_of_a_training_that_ends_there(tmp_path: Path) -> None:
    for name, epochs, every in (("long", 3, "epoch"), ("short", 1, None)):
        pipeline = conv_pipeline(epochs=epochs)
        pipeline.scheduler = None
        hydra_pipe.record(pipeline, tmp_path / name, test_every=every)
    hydra_pipe.reduce(tmp_path / "long", method="hydra-fisher", up_to_step=4)
    hydra_pipe.reduce(tmp_path / "short", method="hydra-fisher")
    assert np.array_equal(
        relevance(tmp_path / "long", "hydra-fisher-upto-4"), relevance(tmp_path / "short")
    )


def test_where_one_task_fails_the_others_end_before_it_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they would go on writing into what the same call, made again, has begun anew."""
    in_blocks(monkeypatch, 6, 2)
    real, steps, begun = sweep._step, [], threading.Event()

    def step(running: Running, *arguments: object) -> None:
        n_columns = running.sweep.sums.shape[1]
        steps.append(n_columns)
        if n_columns == 5:  # the second block
            assert begun.wait(30)
            raise InterruptedHereError
        begun.set()
        time.sleep(0.2)
        real(running, *arguments)

    monkeypatch.setattr(sweep, "_step", step)
    with pytest.raises(InterruptedHereError):
        hydra_pipe.reduce(run, method="hydra-fisher", scheduler="threads")
    n_steps = len(steps)
    assert n_steps < 7
    time.sleep(0.5)
    assert len(steps) == n_steps
