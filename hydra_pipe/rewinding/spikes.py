"""Spikes of a training: steps whose loss or gradient stands out, and the samples behind them."""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, UsageError
from hydra_pipe.maths.spikes import CUT, Standing, standing_out
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.steps import forward
from hydra_pipe.reduction.weights import used_weights
from hydra_pipe.rewinding.products import RowBlock, RowProducts, at_once
from hydra_pipe.rewinding.rows import (
    StepIndex,
    joined_column,
    labels_column,
    samples_of,
)
from hydra_pipe.store import names
from hydra_pipe.store.data.rankings import with_keys
from hydra_pipe.store.data.recording import SoFar
from hydra_pipe.types import F64, I64

Series = Literal["loss", "gradient"]
LOSS: Final = "loss"
GRADIENT: Final = "gradient"
# Most samples of a spike, and most repeated samples, that a sentence names.
_NAMED = 12


@dataclass(frozen=True)
class Spikes:
    """Steps whose loss, or gradient, stands out from the steps before them.

    docs/rewind.md has the rule. Steps that stand out one after the other are one spike.

    Attributes:
        by: "loss", or "gradient" for the norm of the gradient that the step used.
        values: loss or norm of each step, not a number where it is not known, float64 (step,).
        expected: what the steps before let expect, not a number where there are too few, (step,).
        line: value above which a step is a spike, (step,).
        table: the spikes, in order. Columns: `first_step`, `last_step`, `highest_step`, `value`
            and `expected` of the highest step, `score` (robust standard deviations above the
            expected), `samples` (ids of the samples whose own loss is above the line, the largest
            loss first; by gradient, or where losses are not known, all samples of the steps).
        repeaters: samples of two spikes or more. Columns: `train_id`, `label`, `spikes` (number
            of spikes with the sample), the most first, and `key` if samples have keys.
        summary: findings as plain values. Its `says` holds lines for a person.
    """

    by: str
    values: F64
    expected: F64
    line: F64
    table: pa.Table
    repeaters: pa.Table
    summary: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Spikes of a series, with the samples of each.

    Attributes:
        values: the series, shape (step,).
        standing: the series beside what the steps before let expect.
        runs: first and last step of each spike, shape (spike, 2).
        samples: ids of the samples of each spike, the largest loss first.
        targets: class that the loss compared each of them with, -1 where it is not known.
    """

    values: F64
    standing: Standing
    runs: I64
    samples: list[I64]
    targets: list[I64]

    def counts(self) -> Counter[int]:
        """Return the number of spikes that each sample is in."""
        return Counter(int(sample) for own in self.samples for sample in own)


def found_by_loss(recording: SoFar) -> Found | None:
    """Return the spikes of the loss. None if the loss of the steps is not known.

    Raises:
        StoreError: damaged.
    """
    values = recording.gradients.step_table(names.LOSS).astype(np.float64)
    return _found(recording, values, by_loss=True) if np.isfinite(values).any() else None


def found_spikes(recording: SoFar, by: str | None, progress: Progress) -> tuple[str, Found]:
    """Return the spikes of a series, and the name of the series.

    Args:
        recording: the recording.
        by: "loss" or "gradient". None: the loss, or the gradient if losses are not known.
        progress: place to show progress.

    Raises:
        UsageError: there is no such series.
        RunError: the series is not known.
        StoreError: damaged.
    """
    if by is not None and by not in get_args(Series):
        raise UsageError(f"--by {by}: give loss or gradient")
    if by != GRADIENT:
        found = found_by_loss(recording)
        if found is not None:
            return LOSS, found
        if by == LOSS:
            raise RunError(
                f"{recording.gradients.path} knows the loss of no step: give --by gradient, or "
                "name the loss when you record (recorder.step(ids, loss=...))"
            )
    norms = gradient_norms(recording, progress)
    return GRADIENT, _found(recording, norms, by_loss=False)


def gradient_norms(recording: SoFar, progress: Progress) -> F64:
    """Return the norm of the gradient that each step used, shape (step,). Reads all rows.

    Raises:
        RunError: the rows were pruned.
        StoreError: damaged.
    """
    store = recording.gradients
    if recording.pruned:
        raise RunError(f"{store.path}: its rows were pruned: gradients are not known")
    weights, products = used_weights(store), RowProducts(store.layout)
    height = at_once(store.layout)
    norms = np.full(store.n_steps, np.nan)
    with (
        progress.task("norms", store.rows.n_rows, "rows") as task,
        closing(forward(store, 0, store.rows.shard_rows)) as f,
    ):
        for rows in f:
            n = len(rows.sample)
            weight = weights.of_rows(np.full(n, rows.step), rows.scale)
            blocks = [
                _block(rows.stored[low : low + height], weight[low : low + height])
                for low in range(0, n, height)
            ]
            squared = float(products.with_sum(blocks).sum())
            norms[rows.step] = np.sqrt(max(squared, 0.0)) if n else np.nan
            task.advance(n)
    return norms


def _block(stored: NDArray[Any], weight: NDArray[np.float32]) -> RowBlock:
    return RowBlock(lambda: stored, weight)


def _found(recording: SoFar, values: F64, *, by_loss: bool) -> Found:
    standing = standing_out(values)
    steps = np.flatnonzero(standing.spikes)
    firsts, lasts = steps[np.diff(steps, prepend=-2) > 1], steps[np.diff(steps, append=-1) != 1]
    runs = np.stack([firsts, lasts], axis=1)
    index = StepIndex(recording.gradients)
    line = standing.line if by_loss else None
    found = [_samples(recording, index, range(first, last + 1), line) for first, last in runs]
    return Found(values, standing, runs, [ids for ids, _ in found], [own for _, own in found])


def _samples(recording: SoFar, index: StepIndex, steps: range, line: F64 | None) -> tuple[I64, I64]:
    """Return the samples of some steps whose loss is above the line, the largest loss first.

    Args:
        recording: the recording.
        index: places of its rows.
        steps: the steps.
        line: the line of each step, shape (step,). None: all samples count.

    Returns:
        Ids and targets of the samples, both of shape (sample,).
    """
    store = recording.gradients
    found: list[tuple[I64, NDArray[np.float32], I64]] = []
    for step in steps:
        rows = index.rows(step)
        ids = samples_of(store, rows, recording.n_samples)
        loss, target = (
            joined_column(partial(store.row_dynamics, name), rows)
            for name in (names.LOSS, names.TARGET)
        )
        kept = np.ones(len(ids), bool)
        if line is not None and np.isfinite(loss).any():
            kept = loss > line[step]
        found.append((ids[kept], np.nan_to_num(loss[kept]), target[kept].astype(np.int64)))
    ids, losses, targets = (np.concatenate(parts) for parts in zip(*found, strict=True))
    falling = np.argsort(-losses, kind="stable")
    # a sample of several steps counts once, where its loss is largest
    first = np.unique(ids[falling], return_index=True)[1]
    places = falling[np.sort(first)]
    return ids[places], targets[places]


def spikes_of(path: object, recording: SoFar, by: str | None, progress: Progress) -> Spikes:
    """Return the result of `Run.spikes`.

    Args:
        path: path of the run, for commands.
        recording: the recording.
        by, progress: same as in `found_spikes`.

    Raises:
        UsageError, RunError, StoreError: the errors of `found_spikes`.
    """
    series, found = found_spikes(recording, by, progress)
    standing, values = found.standing, found.values
    highest = np.array(
        [first + int(standing.score[first : last + 1].argmax()) for first, last in found.runs],
        np.int64,
    )
    table = pa.table(
        {
            "first_step": pa.array(found.runs[:, 0], pa.int64()),
            "last_step": pa.array(found.runs[:, 1], pa.int64()),
            "highest_step": pa.array(highest, pa.int64()),
            "value": pa.array(values[highest], pa.float64()),
            "expected": pa.array(standing.expected[highest], pa.float64()),
            "score": pa.array(standing.score[highest], pa.float64()),
            "samples": pa.array([own.tolist() for own in found.samples], pa.list_(pa.int64())),
        }
    )
    repeaters = _repeaters(recording, found)
    summary: dict[str, Any] = {
        "run_id": recording.gradients.run_id,
        "by": series,
        "n_steps": recording.gradients.n_steps,
        "n_judged": int(np.isfinite(standing.score).sum()),
        "n_spikes": len(found.runs),
        "cut": CUT,
    }
    summary["next"] = None
    if highest.size:
        worst = found.runs[int(standing.score[highest].argmax()), 0]
        summary["next"] = f"hydra-pipe rewind {path} --step {worst}"
    summary["says"] = _says(summary, table, repeaters)
    return Spikes(series, values, standing.expected, standing.line, table, repeaters, summary)


def _repeaters(recording: SoFar, found: Found) -> pa.Table:
    repeated = sorted(
        ((sample, n) for sample, n in found.counts().items() if n > 1),
        key=lambda entry: (-entry[1], entry[0]),
    )
    ids = np.array([sample for sample, _ in repeated], np.int64)
    target_of = {
        int(sample): int(target)
        for own, targets in zip(found.samples, found.targets, strict=True)
        for sample, target in zip(own, targets, strict=True)
    }
    targets = np.array([target_of[int(sample)] for sample in ids], np.int64)
    table = pa.table(
        {
            "train_id": ids,
            "label": labels_column(recording, ids, targets),
            "spikes": pa.array([n for _, n in repeated], pa.int32()),
        }
    )
    return with_keys(table, recording.gradients.keys(names.TRAIN_KEYS), ids)


def _says(summary: dict[str, Any], table: pa.Table, repeaters: pa.Table) -> list[str]:
    what = "loss" if summary["by"] == LOSS else "norm of the gradient"
    n, judged = summary["n_spikes"], summary["n_judged"]
    says = [
        f"{n:,} {'spike' if n == 1 else 'spikes'} in {judged:,} steps by {what}: scores above "
        f"{CUT:g} (robust standard deviations)"
    ]
    if not judged:
        return [f"{summary['n_steps']:,} steps are too few: a step is judged by 20 before it"]
    if repeaters.num_rows:
        first = repeaters.slice(0, _NAMED).to_pylist()
        named = ", ".join(f"{row['train_id']} ({row['spikes']})" for row in first)
        more = repeaters.num_rows - len(first)
        says.append(
            f"{repeaters.num_rows:,} samples are in two spikes or more (sample, spikes): {named}"
            f"{f' and {more:,} more' if more else ''}"
        )
    lasting = [row for row in table.to_pylist() if row["last_step"] > row["first_step"]]
    if lasting:
        first_step = max(lasting, key=lambda row: row["score"])["first_step"]
        says.append(
            f"where a spike lasts, as from step {first_step}, the update before it may have made "
            f"it: look at step {first_step - 1} too"
        )
    return says
