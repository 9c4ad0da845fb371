"""Reads everything in a run and checks every checksum and count."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.progress import Task
from hydra_pipe.store import names, rankings
from hydra_pipe.store.arrays import ROTTEN, Array
from hydra_pipe.store.files import read_file, sha256_of
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.hypergradients import HYPERGRADIENTS_UNREADABLE, Hypergradients
from hydra_pipe.store.relevance import open_relevance
from hydra_pipe.store.run import KEEP, PRUNED, RECORD, RunDirectory, Stage, export_stage, reduce_stage


@dataclass(frozen=True)
class Fault:
    """Something that is off.

    Args:
        where: file or array, relative to the run.
        what: is wrong with it, and what that means.
    """

    where: str
    what: str


def check_run(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Every fault of a run. Bytes are counted on `task` as they are read and decoded."""
    for name, stage in run.stages.items():
        if stage.state != "complete":
            yield Fault(names.MANIFEST, f"{name} is not finished (state: {stage.state}): run it again")
    recording = run.stages.get(RECORD)
    if recording is None:
        yield Fault(names.MANIFEST, "nothing was recorded")
        return
    if recording.state == "complete":
        try:
            yield from _check_gradients(run, recording, task)
        except StoreError as error:
            yield Fault(names.GRADIENTS, str(error))
        yield from _check_final(run, recording)
        if run.stages.get(KEEP) is not None and run.stages[KEEP].state == "complete":
            yield from check_hypergradients(run, task)
    for method in methods_of(run):
        if run.stages[reduce_stage(method)].state == "complete":
            yield from _check_relevance(run, method, task)
        if run.stages.get(export_stage(method)) is not None and run.stages[export_stage(method)].state == "complete":
            yield from _check_rankings(run, method)


def methods_of(run: RunDirectory) -> list[str]:
    """Methods whose relevance was computed, or begun."""
    prefix = reduce_stage("")
    return [name.removeprefix(prefix) for name in run.stages if name.startswith(prefix)]


def _check_gradients(run: RunDirectory, recording: Stage, task: Task) -> Iterator[Fault]:
    store = Gradients(run.path / names.GRADIENTS)
    advice = "record the run again with --overwrite"
    shapes = {}
    pruned = store.pruned_arrays() if recording.facts.get(PRUNED) else []
    for name, array in store.arrays():
        shapes[name] = array.shape
        if name in pruned:
            continue
        yield from _check_array(f"{names.GRADIENTS}/{name}", array, advice, task)
    n_rows, n_steps = recording.count("n_rows"), recording.count("n_steps")
    expected = store.expected_rows(recording.rank_rows(), n_steps, recording.count("n_tests"))
    expected |= {f"{names.LABELS}/{which}": n for which, n in recording.counts("labels").items()}
    for name, count in expected.items():
        if name not in shapes:
            yield Fault(f"{names.GRADIENTS}/{name}", f"is missing: {advice}")
        elif shapes[name][0] != count:
            yield Fault(f"{names.GRADIENTS}/{name}", f"has length {shapes[name][0]}, {count} were recorded: {advice}")
    rows_of_steps = int(store.rows_of_steps()[1].sum())
    if rows_of_steps != n_rows:
        yield Fault(f"{names.GRADIENTS}/{names.STEPS}", f"steps add up to {rows_of_steps} rows of {n_rows}: {advice}")


def check_hypergradients(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Every fault of the hypergradients that a run keeps."""
    try:
        gradients = Gradients(run.path / names.GRADIENTS)
        store = Hypergradients(run.path / names.HYPERGRADIENTS, gradients)
        expected = store.expected_shapes(gradients, run.stages[RECORD].count("n_samples"))
        found = dict(store.arrays())
    except StoreError as error:
        yield Fault(names.HYPERGRADIENTS, str(error))
        return
    for name, shape in expected.items():
        where = f"{names.HYPERGRADIENTS}/{name}"
        if name not in found:
            yield Fault(where, f"is missing: {HYPERGRADIENTS_UNREADABLE}")
        elif found[name].shape != shape:
            yield Fault(where, f"has shape {found[name].shape}, not {shape}: {HYPERGRADIENTS_UNREADABLE}")
        else:
            yield from _check_array(where, found[name], HYPERGRADIENTS_UNREADABLE, task)


def _check_final(run: RunDirectory, recording: Stage) -> Iterator[Fault]:
    expected = recording.facts.get("final_sha256")
    if expected is None:
        return  # a loop of the user's own keeps its own checkpoints
    file = run.path / names.CHECKPOINTS / names.FINAL_CHECKPOINT
    if not file.is_file() or sha256_of(file) != expected:
        yield Fault(f"{names.CHECKPOINTS}/{names.FINAL_CHECKPOINT}", "is missing or changed: record the run again with --overwrite")


def _check_relevance(run: RunDirectory, method: str, task: Task) -> Iterator[Fault]:
    where = f"{names.RELEVANCE}/{method}"
    advice = f"compute it again with hydra-pipe reduce {run.path} --overwrite"
    try:
        array = open_relevance(run.path / names.RELEVANCE, method)
    except StoreError as error:
        yield Fault(where, str(error))
        return
    yield from _check_array(where, array, advice, task)
    expected = (run.stages[RECORD].count("n_samples"), run.stages[reduce_stage(method)].count("n_columns"))
    if tuple(array.shape) != expected:
        yield Fault(where, f"has shape {tuple(array.shape)}, the recording has {expected}: {advice}")


def _check_array(where: str, array: Array, advice: str, task: Task) -> Iterator[Fault]:
    shortfall = array.shortfall()
    if shortfall:
        yield Fault(where, f"{shortfall}: {advice}")
        return
    step = array.file_rows
    for first in range(0, array.shape[0], step):
        try:
            values = array.read(slice(first, first + step))
        except ROTTEN as error:
            yield Fault(where, f"rows {first} to {min(first + step, array.shape[0])} are damaged ({shown(error)}): {advice}")
            continue
        task.advance(values.nbytes)


def _check_rankings(run: RunDirectory, method: str) -> Iterator[Fault]:
    directory = run.path / names.RANKINGS / names.rankings_directory(method)
    advice = f"write it again with hydra-pipe export {run.path} --overwrite"
    try:
        expected = run.stages[export_stage(method)].counts("files")
    except StoreError as error:
        yield Fault(names.MANIFEST, str(error))
        return
    for name in expected:
        if not rankings.is_table(name):
            yield Fault(names.MANIFEST, f"{export_stage(method)} has no table {shown(name)}: {advice}")
            continue
        where = f"{directory.relative_to(run.path)}/{name}"
        try:
            table = pq.ParquetFile(pa.BufferReader(read_file(directory / name)))
            n_rows, kept = table.metadata.num_rows, table.schema_arrow.metadata or {}
            if kept.get(b"hydra_pipe.run_id") != run.run_id.encode():
                yield Fault(where, f"belongs to another run: {advice}")
            elif n_rows != expected[name]:
                yield Fault(where, f"has {n_rows} rows, {expected[name]} were written: {advice}")
            else:
                # not the whole table at once: few bytes can say many rows
                for batch in table.iter_batches():
                    del batch
        except (OSError, pa.ArrowException) as error:
            yield Fault(where, f"cannot be read ({shown(error)}): {advice}")


def total_bytes(run: RunDirectory) -> int:
    """Decoded bytes that `check_run` reads, as far as the metadata tells."""
    total = 0
    try:
        if run.stages[RECORD].state == "complete":
            gradients = Gradients(run.path / names.GRADIENTS)
            pruned = gradients.pruned_arrays() if run.stages[RECORD].facts.get(PRUNED) else []
            total += sum(array.n_bytes for name, array in gradients.arrays() if name not in pruned)
            if KEEP in run.stages:
                total += sum(array.n_bytes for _, array in Hypergradients(run.path / names.HYPERGRADIENTS, gradients).arrays())
        for method in methods_of(run):
            total += open_relevance(run.path / names.RELEVANCE, method).n_bytes
    except (StoreError, KeyError):
        pass  # told as a fault, by name, in the check itself
    return total
