"""A made-up recording, the sweep as a float64 loop, and interruptions of a sweep."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.pipelines import mlp_pipeline

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.maths.fisher import FORMS, Form
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.reduction.solvers import sweep
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD


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


def root_of(store: Gradients, step: int, *, factored: bool) -> np.ndarray:
    """D^(1/2) of the features of `whole`, as docs/format.md has it; 1 where rows have none.

    Elementwise, or where factored blocks stay `factored`, as their columns have it.
    """
    if not store.preconditioned:
        return np.ones(1)
    group = zarr.open_group(store.path, mode="r")[f"test/{names.checkpoint_name(step)}"]
    if not factored:
        return np.asarray(group["root_of_elements"][:], np.float64)
    columns, biases = (np.asarray(group[f"root_of_{of}"][:]) for of in ("columns", "biases"))
    found = []
    for block, bias in zip(store.layout.blocks, biases, strict=True):
        own = columns[slice(*block.columns)].astype(np.float64) * bias
        if block.inputs is not None:
            own = np.outer(own, columns[slice(*block.inputs)].astype(np.float64)).ravel()
        found.append(own)
    return np.concatenate(found)


def by_loop(run: Path, forms: tuple[Form, ...] = FORMS, floor: bool = True) -> np.ndarray:
    """Mean over the forms, each swept for itself."""
    return np.sum([form.share * by_loop_of(run, form, floor) for form in forms], axis=0)


def by_loop_of(run: Path, form: Form, floor: bool) -> np.ndarray:
    """The sweep of one form over all features."""
    store = hydra_pipe.open_run(run).gradients
    rows, tests = rows_and_tests(store)
    root = root_of(store, store.test_steps()[-1], factored=False)
    return swept(store, rows * root, (tests * root).T, blocks_of(store), form, floor)


def rows_and_tests(store: Gradients) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the last test gradients, with every block multiplied out, without D."""
    everything = slice(None)
    tests = store.test_rows(store.test_steps()[-1])
    return tuple(
        whole(of.features(everything, everything), of.scales(everything), store)
        for of in (store.rows, tests)
    )


def blocks_of(store: Gradients) -> np.ndarray:
    """The block of each feature of `whole`."""
    widths = [
        b.columns[1] - b.columns[0] if b.inputs is None else b.numel for b in store.layout.blocks
    ]
    return np.repeat(np.arange(len(widths)), widths)


def swept(
    store: Gradients,
    rows: np.ndarray,
    a: np.ndarray,
    block: np.ndarray,
    form: Form,
    floor: bool = True,
) -> np.ndarray:
    """DESIGN's sweep, step by step, on whole vectors in float64; C as a matrix, saturated by the
    inverse of one as large.

    Rows of shape (row, coordinate), the adjoints that it begins with, shape (coordinate, column),
    and the block of each coordinate.
    """
    everything = slice(None)
    v = np.zeros_like(a)
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
        if store.paced:
            mu = mu * store.step_table("momentum_factor")[t][block][:, None]
            tau = 1 - (1 - tau) * store.step_table("gain_factor")[t][block][:, None]
        gain = np.where(started, 1.0, 1 - tau)
        d = -eta * a
        has = mu != 0
        v_new = np.where(has, v + np.where(nesterov, mu * d, d), v)
        g = np.where(has, np.where(nesterov, d + gain * v_new, gain * v_new), d)
        v = np.where(has, np.where(started, 0.0, mu * v_new), v)
        step = np.where(has, eta * (1 - tau), eta)
        length = np.where(nesterov, eta * (1 - mu * tau), step)
        kappa = form.factor * length / np.maximum(1 - mu, 0.01)
        if floor:
            stable = np.where(nesterov, eta * (1 + mu) + mu * step, step)
            kappa = np.maximum(kappa, stable / (2 * (1 + mu)))
        np.add.at(relevance, samples[own], -(r @ g))
        weight = counts[t][part[own]] * np.clip(
            np.where(np.isnan(rho[own]), 1.0, rho[own]), form.least, form.most
        )
        curvature = (r.T * weight) @ r / abs(c)
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


def relevance(run: Path, method: str = "hydra-fisher") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


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


def in_blocks(patch: pytest.MonkeyPatch, width: int, workers: int) -> None:
    """Blocks of columns of that width, so many at a time."""
    plan = CommonSolver._planned

    def changed(solver: CommonSolver, given: ReductionInput, after: Answered | None):
        given, found = plan(solver, given, after)
        done, end = 0 if after is None else after.done, found.columns[-1][1]
        blocks = tuple((first, min(first + width, end)) for first in range(done, end, width))
        return given, dataclasses.replace(found, columns=blocks, workers=workers)

    patch.setattr(CommonSolver, "_planned", changed)


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
