"""Method `hydra-fisher`, out of core: a task for each block of columns, which reads the recording from its end.

What there is to compute is in `sweep.py`; here it is fed, kept from time to time, and its result written.
"""

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.plan.answering import TESTS_AT_ONCE
from hydra_pipe.plan.reduction import FORWARD, SAMPLE_MULTIPLE, Found, Span
from hydra_pipe.plan.selection import cut
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.expansion import Expansion
from hydra_pipe.reduction.forward import ForwardSweep
from hydra_pipe.reduction.hydra import CountRows, Job
from hydra_pipe.reduction.loops import Workspace
from hydra_pipe.reduction.steps import StepRows, backward, forward
from hydra_pipe.reduction.sweep import Floats, Recursion, Sweep
from hydra_pipe.reduction.sweep import Span as SeriesSpan
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.pace import Pace
from hydra_pipe.store.parsing import is_count
from hydra_pipe.store.relevance import write_relevance
from hydra_pipe.store.rows import check_within
from hydra_pipe.store.sweeps import load_state, remove_state, save_state


def graphs(job: Job, count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
    """The passes in order: columns that are answered, and its graph, which gives the share of the curvature that was left."""
    sweep, mean = delayed(sweep_columns), delayed(_mean)
    blocks, workers = job.plan.test_blocks, len(job.plan.row_runs)
    for start in range(0, len(blocks), workers):
        together = blocks[start : start + workers]
        # each reads every row: one of them counts for all
        counters = [count_rows, *([partial(_heed, count_rows)] * (len(together) - 1))]
        shares = [sweep(job, columns, count) for columns, count in zip(together, counters, strict=True)]
        yield (together[0][0], together[-1][1]), mean(shares)


def _heed(count_rows: CountRows, _: int) -> None:
    """Count nothing, but end where the counter says so."""
    count_rows(0)


def _mean(shares: list[float]) -> Found:
    return {names.CURVATURE_LEFT: sum(shares) / len(shares)}


@single_threaded_blas
def sweep_columns(job: Job, columns: Span, count_rows: CountRows) -> float:
    """Fill some columns of the relevance, or of the matrix; or, forward, some of its samples. Where it was interrupted it goes on.

    Returns:
        The share of the curvature that saturation has left, mean over the steps.
    """
    store = job.store()
    expansion = Expansion(store.layout)
    schedule, series = store.schedules()
    spans = _merged(expansion, series)
    sweep: Recursion
    if job.plan.order == FORWARD:
        sweep = ForwardSweep(columns, expansion.width, schedule, spans)
    else:
        starts = units(expansion, columns) if job.of_features else columns_of_tests(store, job, expansion, columns)
        sweep = Sweep(starts, schedule, spans, job.n_samples)
    _go_on(job, columns, sweep, store.n_steps)
    scales = store.step_table(names.GRADIENT_SCALE)
    workspace, pace, taken = Workspace(), Pace(), sweep.n_steps
    if taken:
        counts = store.rows_of_steps()[1].sum(axis=1)
        count_rows(int((counts[:taken] if job.plan.order == FORWARD else counts[len(counts) - taken :]).sum()))
    with closing(forward(store, taken) if job.plan.order == FORWARD else backward(store, store.n_steps - taken)) as steps:
        for rows in steps:
            check_within(rows.sample, job.n_samples, f"samples of {store.path}")
            _step(sweep, expansion, rows, scales[rows.step], workspace)
            count_rows(len(rows.sample))
            if pace.due:
                with pace.keeping():
                    _keep(job, columns, sweep)
    _write(Array.open(job.relevance), columns, sweep)
    remove_state(job.relevance, columns)
    return sweep.left / max(1, sweep.n_steps)


def _write(array: Array, columns: Span, sweep: Recursion) -> None:
    """Write what a sweep that is at its end has found."""
    if isinstance(sweep, ForwardSweep):
        sweep.settle()
        width = array.chunks[1]
        for left in range(0, array.shape[1], width):
            features = slice(left, min(left + width, array.shape[1]))
            write_relevance(array, columns[0], left, np.negative(sweep.changes(features)))
    elif isinstance(sweep, Sweep):
        for low in range(0, array.shape[0], SAMPLE_MULTIPLE):
            write_relevance(array, low, columns[0], np.negative(sweep.sums[low : low + SAMPLE_MULTIPLE]))


def _step(sweep: Recursion, expansion: Expansion, rows: StepRows, scale: float, workspace: Workspace) -> None:
    out = workspace.matrix(len(rows.sample), expansion.width)
    expansion.expand(rows.stored, rows.scale * np.float32(scale), out)
    # n rho r r.T of the mean loss, and the update went along c times its gradient: n rho / c of (c r)(c r).T
    count = rows.count / np.float32(scale) if scale > 0 else np.zeros_like(rows.count)
    sweep.step(rows.step, out, count, rows.rho, rows.sample)


def units(expansion: Expansion, features: Span) -> Floats:
    """Vectors of one feature each, shape (feature of these, feature)."""
    found: Floats = np.zeros((features[1] - features[0], expansion.width), np.float32)
    found[np.arange(len(found)), np.arange(*features)] = 1
    return found


def columns_of_tests(store: Gradients, job: Job, expansion: Expansion, columns: Span) -> Floats:
    """Test gradients multiplied out, or means of them, shape (column, feature)."""
    rows, averages = job.tested.rows(store), job.averages()
    tests = columns if averages is None else (0, len(averages))
    found: Floats = np.zeros((columns[1] - columns[0], expansion.width), np.float32)
    place = 0
    for first, last in cut(job.tests, *tests):
        for low in range(first, last, TESTS_AT_ONCE):
            own = slice(low, min(low + TESTS_AT_ONCE, last))
            out = np.empty((own.stop - own.start, expansion.width), np.float32)
            expansion.expand(rows.features(own, slice(0, store.layout.n_features)), rows.scales(own), out)
            if averages is None:
                found[place : place + len(out)] = out
            else:
                found += averages[place : place + len(out), columns[0] : columns[1]].T @ out
            place += len(out)
    return found


def _merged(expansion: Expansion, series: NDArray[np.int64]) -> list[SeriesSpan]:
    """Features of one history that lie side by side are one span."""
    merged: list[SeriesSpan] = []
    for first, last, block in expansion.spans:
        own = int(series[block])
        if merged and merged[-1][2] == own:
            merged[-1] = (merged[-1][0], last, own)
        else:
            merged.append((first, last, own))
    return merged


def _keep(job: Job, columns: Span, sweep: Recursion) -> None:
    sweep.settle()
    save_state(job.relevance, columns, {"taken": sweep.n_steps, "left": sweep.left}, sweep.arrays())


def _go_on(job: Job, columns: Span, sweep: Recursion, n_steps: int) -> None:
    """Put a sweep back to where it was."""
    found = load_state(job.relevance, columns, sweep.arrays())
    if found is None:
        return
    state, arrays = found
    taken, left = state.get("taken"), state.get("left")
    if not is_count(taken) or taken > n_steps or not isinstance(left, int | float):
        return
    sweep.restore(arrays)
    sweep.n_steps, sweep.left = taken, float(left)
