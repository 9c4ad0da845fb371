"""Test samples that each proposed sample hurts most, by relevance."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from hydra_pipe.cleaning.evidence import blocks_of
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.clean_result import HURTS
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, DYNAMICS, ResultName
from hydra_pipe.store.run.stages import REDUCE
from hydra_pipe.types import F64, I64

# Most test samples that are named for a sample.
MOST = 5


def hurting(directory: RunDirectory, method: str) -> dict[str, Any] | None:
    """Return the result that tells which tests are hurt, or None if there is none.

    It has a column for each of the run's test samples: the relevance that proposes, or else
    the default method, or else the first that was reduced.

    Returns:
        Name and checksums of the result.
    """
    able = [
        name
        for name in directory.complete(REDUCE)
        if ResultName.parse(name) == ResultName(ResultName.parse(name).method)
        and not ResultName.parse(name).is_of_itself
    ]
    if method != DYNAMICS:
        able = [name for name in able if name == method]
    if not able:
        return None
    name = DEFAULT_METHOD if DEFAULT_METHOD in able else able[0]
    return {"method": name, "checksums": directory.checksums(REDUCE.of(name))}


def with_hurts(
    directory: RunDirectory, found: Cleaning, source: dict[str, Any] | None, progress: Progress
) -> Cleaning:
    """Return a proposal with the column `hurts` of `drop.parquet`.

    Args:
        directory: the run.
        found: the proposal.
        source: result that tells, from `hurting`. None: the column is null.
        progress: place to show progress.

    Raises:
        StoreError: the relevance is damaged.
    """
    drop, told = found.drop, None if source is None else dict(source)
    ids: list[list[int]] | list[None] = [None] * drop.num_rows
    if told is not None:
        samples = drop.column("train_id").to_numpy()
        ids = most_hurt(ReducedRun.open(directory, told["method"]), samples, progress)
        told["says"] = [f"hurts: the tests that each sample harms most, by {told['method']}"]
    at = drop.schema.get_field_index(HURTS)
    field = drop.schema.field(at)
    drop = drop.set_column(at, field, pa.array(ids, field.type))
    return replace(found, is_new=True, drop=drop, summary=found.summary | {HURTS: told})


def most_hurt(found: ReducedRun, samples: I64, progress: Progress) -> list[list[int]]:
    """Return the tests that each sample harms most, the most harmed first.

    Args:
        found: relevance, a column for each test.
        samples: training samples.
        progress: place to show progress.

    Returns:
        At most `MOST` ids for each sample: those with the lowest relevance below 0.

    Raises:
        StoreError: the relevance is damaged.
    """
    ids = found.columns.ids
    lowest: F64 = np.zeros((len(samples), MOST))
    tests: I64 = np.full((len(samples), MOST), -1)
    with progress.task("hurts", found.relevance.shape[1], "tests") as task:
        for columns, block in blocks_of(found.relevance):
            own = np.nan_to_num(block[samples].astype(np.float64), nan=0.0)
            values = np.concatenate([lowest, own], axis=1)
            of_tests = np.concatenate(
                [tests, np.broadcast_to(ids[columns], (len(samples), own.shape[1]))], axis=1
            )
            order = np.argsort(values, axis=1, kind="stable")[:, :MOST]
            lowest = np.take_along_axis(values, order, axis=1)
            tests = np.take_along_axis(of_tests, order, axis=1)
            task.advance(own.shape[1])
    return [row[harm < 0].tolist() for row, harm in zip(tests, lowest, strict=True)]
