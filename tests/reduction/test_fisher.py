"""Method `hydra-fisher` against a float64 loop over whole gradients: encodings, optimisers,
processes, divisions of the work.
"""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.compare import relative_error
from support.pipelines import conv_pipeline, mlp_pipeline
from torch import nn

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.errors import BudgetError, RunError, UsageError
from hydra_pipe.maths.fisher import FORMS, Form
from hydra_pipe.plan import chunking
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.reduction.solvers import sweep
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.reduction.sweep import Sweep
from hydra_pipe.store import names
from hydra_pipe.store.data import save_interval
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that steps begin and end within files, and lie across two."""
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 12)


def whole(stored: np.ndarray, scale: np.ndarray, store: Gradients) -> np.ndarray:
    """What rows say, every block multiplied out, float64, (row, all columns of all blocks), as
    docs/format.md has it.
    """
    found = []
    for number, block in enumerate(store.layout.blocks):
        own = stored[:, slice(*block.columns)].astype(np.float64) * scale[:, number, None]
        if block.inputs is not None:
            own = np.einsum(
                "ko,ki->koi", own, stored[:, slice(*block.inputs)].astype(np.float64)
            ).reshape(len(own), -1)
        found.append(own)
    return np.concatenate(found, axis=1)


def by_loop(run: Path, forms: tuple[Form, ...] = FORMS, floor: bool = True) -> np.ndarray:
    """Mean over the forms, each swept for itself."""
    return np.sum([form.share * by_loop_of(run, form, floor) for form in forms], axis=0)


def by_loop_of(run: Path, form: Form, floor: bool) -> np.ndarray:
    """DESIGN's sweep, step by step, on whole vectors in float64; C as a matrix, saturated by the
    inverse of one as large.
    """
    store = hydra_pipe.open_run(run).gradients
    everything = slice(None)
    rows = whole(store.rows.features(everything, everything), store.rows.scales(everything), store)
    checkpoint = store.test_steps()[-1]
    tests = store.test_rows(checkpoint)
    a = whole(tests.features(everything, everything), tests.scales(everything), store).T
    v = np.zeros_like(a)
    widths = [
        b.columns[1] - b.columns[0] if b.inputs is None else b.numel for b in store.layout.blocks
    ]
    block = np.repeat(np.arange(len(widths)), widths)
    group = np.array([b.group for b in store.layout.blocks])[block]
    samples, steps, rho = (
        store.samples(everything),
        store.step_of_rows(everything),
        store.curvature(everything),
    )
    part = np.repeat(np.arange(store.n_ranks), store.rows.part_rows)
    counts = np.array(
        [
            [np.sum((steps == t) & (part == k)) for k in range(store.n_ranks)]
            for t in range(store.n_steps)
        ]
    )
    relevance = np.zeros((samples.max() + 1, a.shape[1]))

    def of(name: str, t: int) -> np.ndarray:
        return store.step_table(name)[t][group][:, None].astype(np.float64)

    for t in range(store.n_steps - 1, -1, -1):
        own = np.flatnonzero(steps == t)
        c = store.step_table("gradient_scale")[t]
        r = c * rows[own]
        eta = of("learning_rate", t) * store.step_table("step_factor")[t][block][:, None]
        mu, tau, decay, shrink = (
            of(name, t) for name in ("momentum", "dampening", "weight_decay", "decoupled_decay")
        )
        nesterov = of("nesterov", t) > 0
        started = store.step_table("momentum_started")[t][block][:, None] > 0
        gain = np.where(started, 1.0, 1 - tau)
        d = -eta * a
        has = mu != 0
        v_new = np.where(has, v + np.where(nesterov, mu * d, d), v)
        g = np.where(has, np.where(nesterov, d + gain * v_new, gain * v_new), d)
        v = np.where(has, np.where(started, 0.0, mu * v_new), v)
        step = np.where(has, eta * (1 - tau), eta)
        kappa = form.factor * step / np.maximum(1 - mu, 0.01)
        if floor:
            kappa = np.maximum(kappa, step * np.where(nesterov, 1 + 2 * mu, 1.0) / (2 * (1 + mu)))
        np.add.at(relevance, samples[own], -(r @ g))
        weight = counts[t][part[own]] * np.clip(
            np.where(np.isnan(rho[own]), 1.0, rho[own]), form.least, form.most
        )
        curvature = (r.T * weight) @ r / c
        a = (
            (1 - shrink) * a
            + decay * g
            + curvature @ np.linalg.solve(np.eye(len(a)) + kappa * curvature, g)
        )
    return relevance


def adamw(**changes: object) -> Pipeline:
    pipeline = mlp_pipeline(**changes)
    pipeline.optimizer = torch.optim.AdamW(pipeline.model.parameters(), lr=0.01, weight_decay=0.1)
    return pipeline


def nesterov() -> Pipeline:
    pipeline = mlp_pipeline(epochs=3)
    pipeline.optimizer = torch.optim.SGD(
        pipeline.model.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-2
    )
    return pipeline


def plain() -> Pipeline:
    pipeline = mlp_pipeline(epochs=3)
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=0.3)
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
}


def relevance(run: Path, method: str = "hydra-fisher") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


@pytest.mark.parametrize("name", BUILDERS)
def test_the_sweep_is_that_of_a_float64_loop(tmp_path: Path, name: str) -> None:
    hydra_pipe.record(BUILDERS[name](), tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "run", method="hydra-fisher")
    expected = by_loop(tmp_path / "run")
    assert relative_error(relevance(tmp_path / "run"), expected) < 1e-4
    hydra_pipe.reduce(tmp_path / "run")
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


def made_up(path: Path, n_ranks: int, curvature: float = 1.0, tested: Sequence[int] = ()) -> Path:
    """A recording of random rows: two groups of AdamW's kind, a factored block with a bias, some
    curvature unknown, steps of other lengths, of which a process may have none, and that are longer
    than a file."""
    generator = np.random.default_rng(1)
    layout = Layout(
        (
            Block("c", (7,), 0, "dense", (0, 7)),
            Block("w", (3, 5), 1, "factored", (7, 10), (10, 15)),
            Block("b", (3,), 1, "factored", (7, 10)),
            Block("d", (4,), 1, "dense", (15, 19)),
        ),
        19,
        0,
    )
    run = RunDirectory.create(path)
    run.begin(RECORD, {"n_samples": 20})
    writers = [
        GradientsWriter(
            path / names.GRADIENTS, layout, "float32", 2, run.run_id, rank=k, n_ranks=n_ranks
        )
        for k in range(n_ranks)
    ]
    sizes = [[9, 4], [0, 30], [5, 5], [40, 3], [1, 0], [8, 8], [2, 7]]
    n_rows = [0] * n_ranks
    for step, size in enumerate(sizes):
        settings = {
            "momentum": [0.9, 0.0],
            "dampening": [0.9, 0.0],
            "weight_decay": [0.0, 1e-2],
            "decoupled_decay": [0.01, 0.0],
        }
        line = {name: np.array(value) for name, value in settings.items()} | {
            "nesterov": np.array([0, 0])
        }
        line |= {
            "learning_rate": np.array([0.1, 0.2]) / (step + 1),
            "updated": np.array([1, 1, 1, step != 3]),
            "loss": 0.0,
        }
        line |= {
            "momentum_started": np.array([step == 0] * 4),
            "step_factor": np.array([1.0, 1.0, 1.0, 0.5]),
        }
        for k, writer in enumerate(writers):
            n = size[k]
            for rows, views in writer.rows.reserve(n):
                m = rows.stop - rows.start
                views[names.GRADIENT][:] = generator.standard_normal((m, 19))
                views[names.GRADIENT][:, 15:] *= step != 3
                views[names.SCALE][:] = generator.uniform(0.05, 0.3, (m, 4))
                views[names.SAMPLE][:] = generator.integers(0, 20, m)
                views[names.STEP][:] = step
                views[names.CURVATURE][:] = np.where(
                    generator.random(m) < 0.2, np.nan, generator.exponential(curvature, m)
                )
            own = {
                names.FIRST_ROW: n_rows[k],
                names.N_ROWS: n,
                names.GRADIENT_SCALE: 0.5 + step / 10,
                names.IMBALANCE: 0.0,
            }
            writer.append_step(line | own)
            n_rows[k] += n
    for n_steps in (*tested, len(sizes)):
        tests = writers[0].test_rows(n_steps)
        for rows, views in tests.reserve(11):
            views[names.GRADIENT][:] = generator.standard_normal((rows.stop - rows.start, 19))
            views[names.SCALE][:] = 1.0
            views[names.LOSS][:] = 0.0
        writers[0].flush_test(tests)
    writers[0].write_labels(names.TEST_LABELS, np.arange(11) % 3)
    for writer in reversed(writers):
        writer.close()
    facts = {"rank_rows": n_rows} if n_ranks > 1 else {}
    facts |= {"labels": {names.TEST_LABELS: 11}}
    run.end(
        RECORD,
        "complete",
        n_steps=len(sizes),
        n_rows=sum(n_rows),
        n_tests=11,
        checksums=seal(run, RECORD),
        **facts,
    )
    return path


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


def in_blocks(patch: pytest.MonkeyPatch, width: int, workers: int) -> None:
    """Blocks of columns of that width, so many at a time."""
    plan = CommonSolver._planned

    def changed(solver: CommonSolver, given: ReductionInput, after: Answered | None):
        given, found = plan(solver, given, after)
        done, end = 0 if after is None else after.done, found.columns[-1][1]
        blocks = tuple((first, min(first + width, end)) for first in range(done, end, width))
        return given, dataclasses.replace(found, columns=blocks, workers=workers)

    patch.setattr(CommonSolver, "_planned", changed)


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


class InterruptedHereError(Exception):
    pass


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """What is swept in it is interrupted after so many steps."""
    real, taken = sweep._step, []

    def step(*arguments: object) -> None:
        if len(taken) == steps:
            raise InterruptedHereError
        taken.append(arguments)
        real(*arguments)

    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(sweep, "_step", step)
        with pytest.raises(InterruptedHereError):
            yield


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
            sweep, "write_relevance", lambda *_: (_ for _ in ()).throw(InterruptedHereError)
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
    with pytest.raises(UsageError, match="--chunks is for --method hydra"):
        hydra_pipe.reduce(run, method="hydra-fisher", chunks="64x64")
    with pytest.raises(
        BudgetError,
        match=r"a sweep of one column over 29 features .*, --memory is 100 MiB: raise --memory to",
    ):
        hydra_pipe.reduce(run, method="hydra-fisher", memory="100MiB")
    hydra_pipe.reduce(run, keep_hypergradients=True)
    hydra_pipe.reduce(run, method="hydra-fisher")
    hydra_pipe.prune(run)
    with pytest.raises(
        RunError,
        match="its gradients were pruned: only hydra, and hydra-exact, are answered without them",
    ):
        hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)


def test_a_sweep_does_not_blow_up_where_the_curvature_is_far_too_large_for_the_steps(
    tmp_path: Path,
) -> None:
    """The raw sweep gains a factor each step, the saturated one none."""
    run = made_up(tmp_path / "run", 2, curvature=1e4)
    hydra_pipe.reduce(run)
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

    def step(swept: Sweep, *arguments: object) -> None:
        steps.append(swept.sums.shape[1])
        if swept.sums.shape[1] == 5:  # the second block
            assert begun.wait(30)
            raise InterruptedHereError
        begun.set()
        time.sleep(0.2)
        real(swept, *arguments)

    monkeypatch.setattr(sweep, "_step", step)
    with pytest.raises(InterruptedHereError):
        hydra_pipe.reduce(run, method="hydra-fisher", scheduler="threads")
    n_steps = len(steps)
    assert n_steps < 7
    time.sleep(0.5)
    assert len(steps) == n_steps
