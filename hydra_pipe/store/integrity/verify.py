"""Verification of a run: everything is read, and every fault is told with its meaning."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from hydra_pipe.errors import ManifestError, RunError, StoreError, shown
from hydra_pipe.progress import Progress, Task
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.clean_result import KEEP_FILE, read_proposal
from hydra_pipe.store.data.combined import Combined
from hydra_pipe.store.data.coordinates import coordinates_of, wrong_coordinates
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.hypergradients import open_kept
from hydra_pipe.store.data.probes import Probe
from hydra_pipe.store.data.rankings import opened_table
from hydra_pipe.store.data.relevance import columns_of, group_is_whole, open_array, open_relevance
from hydra_pipe.store.data.top_samples import TopSamples
from hydra_pipe.store.files import files_below, is_partial, sha256_of
from hydra_pipe.store.integrity.compare import Comparison
from hydra_pipe.store.integrity.consistency import check_rows
from hydra_pipe.store.integrity.faults import Fault
from hydra_pipe.store.run.footprints import Footprints
from hydra_pipe.store.run.listing import Listed, coordinate_names, footprints_or_fault, members_of
from hydra_pipe.store.run.manifest import PRUNED, RunDirectory
from hydra_pipe.store.run.stages import (
    CLEAN,
    COMBINE,
    DIRECTORIES,
    EXPORT,
    KEEP,
    PROBE,
    RECORD,
    REDUCE,
    TOPS,
    Stage,
    StageId,
    StageKind,
)
from hydra_pipe.store.zarr.arrays import METADATA, read_once


def check_path(path: str | os.PathLike[str], progress: Progress) -> list[Fault]:
    """Return every fault of the run at `path`.

    Raises:
        RunError: there is no run.
        StoreError: the run has a newer format version.
    """
    try:
        run = RunDirectory.open(path)
    except (RunError, ManifestError) as error:
        copy = RunDirectory.from_copy(path)
        if copy is None and isinstance(error, RunError):
            raise
        more = (
            ""
            if copy is None
            else "nothing of the run can be used without it: hydra-pipe verify --repair has a copy"
        )
        return [Fault(names.MANIFEST, str(error), more, kind="manifest")]
    with read_once(), progress.task("verify", total_bytes(run), "bytes") as task:
        return list(check_run(run, task))


def check_run(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Yield every fault of a run. `task` counts the bytes as they are read and decoded."""
    for which, stage in run.stages.items():
        if stage.state != "complete":
            found = f"{which} is not finished (state: {stage.state}): run it again"
            yield Fault(names.MANIFEST, found, kind="unfinished")
    if RunDirectory.from_copy(run.path) is None:
        yield Fault(
            f"{names.CHECKSUMS}/{names.MANIFEST}",
            f"is missing or damaged: if {names.MANIFEST} is lost too, the run is lost",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="copy",
        )
    yield from _check_strays(run)
    if RECORD not in run.stages and not run.is_combined:
        yield Fault(names.MANIFEST, "nothing was recorded", kind="unfinished")
        return
    for which, stage in run.stages.items():
        if stage.state == "complete":
            yield from check_stage(run, which, task)
    has_results = bool(run.of_kind(REDUCE) or run.of_kind(TOPS))
    if has_results and not group_is_whole(run.path / names.RELEVANCE, run.run_id):
        yield Fault(
            f"{names.RELEVANCE}/{METADATA}",
            "is missing or not what was written: readers do not find what is in it, or take it "
            "for another run's",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="group",
        )
    for coordinate in wrong_coordinates(run.path / names.RELEVANCE, coordinates_of(run)):
        yield Fault(
            f"{names.RELEVANCE}/{coordinate}",
            "does not say what the samples, test samples or means are: xarray shows wrong "
            "coordinates",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="group",
        )


def _check_strays(run: RunDirectory) -> Iterator[Fault]:
    """Yield a fault for everything in hydra-pipe's own directories that belongs to no stage."""
    known = {stage.checksums_file for stage in run.stages}
    known |= {f"{names.CHECKSUMS}/{names.MANIFEST}", f"{names.RELEVANCE}/{METADATA}"}
    areas = {stage.area for stage in run.stages} | {
        f"{names.RELEVANCE}/{name}" for name in coordinate_names(run)
    }
    strays: set[str] = set()
    for directory in DIRECTORIES:
        for file in files_below(run.path / directory):
            whole, part = f"{directory}/{file}", f"{directory}/{file.split('/')[0]}"
            if whole not in known and not is_partial(whole) and not {directory, part} & areas:
                strays.add(directory if directory == names.GRADIENTS else part)
    for where in sorted(strays):
        yield Fault(
            where,
            "belongs to no stage of the run: it may belong to another recording, and is no "
            "result of this one",
            f"move it elsewhere, or let hydra-pipe verify {run.path} --repair do so",
            kind="extra",
        )


def check_stage(run: RunDirectory, stage: StageId, task: Task) -> Iterator[Fault]:
    """Yield every fault of the files of a complete stage."""
    consequence = stage.consequence(run.path, run.stages)
    listed, lost = _footprints_of(run, stage)
    if lost is not None:
        yield lost
    told: set[str] = set()
    for fault in Comparison(
        run.path, stage, consequence, listed, _pruned(run, stage), task
    ).faults():
        if fault.kind == "damaged":
            told.add(fault.where)
        yield fault
    try:
        for fault in _CHECKS.get(stage.kind, _no_check)(_Checked(run, stage, consequence, listed)):
            if fault.where not in told:
                yield fault
    except StoreError as error:
        if not told:  # else the fault was told already, with the name of its file
            yield Fault(stage.area, str(error), consequence, stage=stage)
    for source in run.stale(stage):
        found = f"is stale: it was computed from another {source.what} than the one that is there"
        yield Fault(stage.area, found, consequence, stage=stage)


def _footprints_of(run: RunDirectory, stage: StageId) -> tuple[Footprints | None, Fault | None]:
    """Return the footprints of `stage`, or the fault of the file that holds them."""
    where, found = stage.checksums_file, footprints_or_fault(run, stage)
    if isinstance(found, Footprints):
        return found, None
    advice = f"hydra-pipe verify {run.path} --repair writes it again where it can"
    return None, Fault(
        where,
        found,
        f"swapped and exchanged files of {stage} cannot be found: {advice}",
        kind="unlisted",
        stage=stage,
    )


def _pruned(run: RunDirectory, stage: StageId) -> frozenset[str]:
    """Return the names of the arrays of `stage` whose chunks were deleted."""
    if stage != RECORD or not run.stages[RECORD].facts.get(PRUNED):
        return frozenset()
    try:
        return frozenset(
            f"{names.GRADIENTS}/{name}"
            for name in Gradients(run.path / names.GRADIENTS).pruned_arrays()
        )
    except StoreError:
        return frozenset()  # another check tells the fault, and the pruned arrays with it


@dataclass(frozen=True)
class _Checked:
    """A complete stage that is to be checked beyond its files, which may all be as written.

    Args:
        run: run of the stage.
        stage: the stage.
        consequence: meaning of a fault.
        listed: footprints of the stage. None where the list is lost.
    """

    run: RunDirectory
    stage: StageId
    consequence: str
    listed: Footprints | None

    @property
    def entry(self) -> Stage:
        """Entry of the stage in the manifest."""
        return self.run.stages[self.stage]

    @property
    def path(self) -> Path:
        """Path of the stage's area."""
        return self.run.path / self.stage.area

    @property
    def members(self) -> Listed | None:
        """Function that tells which groups and arrays are the stage's own. None: all that exist."""
        return None if self.listed is None else members_of(self.stage, self.listed)

    def fault(self, found: str, below: str = "") -> Fault:
        """Return a fault of the stage's area, or of something `below` it."""
        return Fault(
            f"{self.stage.area}/{below}".rstrip("/"), found, self.consequence, stage=self.stage
        )


def _no_check(checked: _Checked) -> Iterator[Fault]:
    """Return no fault, for a kind of stage whose files tell all that can be told."""
    return iter(())


def _check_recording(checked: _Checked) -> Iterator[Fault]:
    run = checked.run
    yield from _check_final(run)
    yield from check_rows(run, Gradients(checked.path, listed=checked.members), checked.consequence)


def _check_final(run: RunDirectory) -> Iterator[Fault]:
    expected = run.stages[RECORD].facts.get("final_sha256")
    if expected is None:
        return  # a user's own loop keeps its own checkpoints
    where = f"{names.CHECKPOINTS}/{names.FINAL_CHECKPOINT}"
    file = run.path / where
    if not file.is_file() or sha256_of(file) != expected:
        found = (
            "is missing or changed: the parameters that the test gradients were taken at are lost"
        )
        yield Fault(where, found, "record the run again with --overwrite", stage=RECORD)


def check_hypergradients(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Yield every fault of the hypergradients that a run keeps."""
    for method in run.complete(KEEP):
        yield from check_stage(run, KEEP.of(method), task)


def _recording_of(run: RunDirectory) -> Gradients | None:
    """Return the recording, or None if it has a fault.

    The check of the recording tells the fault. Results of the recording may still be whole.
    """
    try:
        gradients = Gradients(run.path / names.GRADIENTS)
    except StoreError:
        return None
    return gradients if gradients.run_id == run.run_id else None


def _check_probe(checked: _Checked) -> Iterator[Fault]:
    gradients = _recording_of(checked.run)
    if gradients is not None:
        Probe(checked.path, gradients, checked.members).check(
            checked.entry.count("n_tests", least=1)
        )
    return iter(())


def _check_kept_shapes(checked: _Checked) -> Iterator[Fault]:
    gradients = _recording_of(checked.run)
    if gradients is None:
        return
    store = open_kept(checked.path, gradients)
    found = dict(store.arrays())
    for name, shape in store.expected_shapes(
        gradients, checked.run.stages[RECORD].count("n_samples")
    ).items():
        if name not in found:
            yield checked.fault("is missing", name)
        elif found[name].shape != shape:
            yield checked.fault(f"has shape {found[name].shape}, not {shape}", name)


def _check_relevance(checked: _Checked) -> Iterator[Fault]:
    array = open_array(checked.path)
    columns_of(array)
    expected = (checked.run.n_samples(checked.stage.name), checked.entry.count("n_columns"))
    if array.shape != expected:
        yield checked.fault(f"has shape {array.shape}, the recording has {expected}")


def _check_top_samples(checked: _Checked) -> Iterator[Fault]:
    tops = TopSamples(checked.path, checked.run.run_id, checked.members)
    tops.check()
    n_columns, count = checked.entry.count("n_columns"), checked.entry.count("n_top", least=1)
    n_samples = checked.run.n_samples(checked.stage.name)
    if (tops.columns.n_columns, tops.count) != (n_columns, count):
        yield checked.fault(
            f"has {tops.count} samples of {tops.columns.n_columns} columns, {count} of "
            f"{n_columns} were written"
        )
        return
    # In pieces, not all at once: few bytes can claim many columns.
    for first in range(0, n_columns, tops.chunks[0]):
        tops.read((first, min(first + tops.chunks[0], n_columns)), count, n_samples)


def _check_combined(checked: _Checked) -> Iterator[Fault]:
    combined = Combined(checked.path, checked.run.run_id, checked.members)
    combined.check()
    for keys in (combined.keys(), combined.test_keys()):
        if keys is not None:
            keys.check()
    expected = tuple(checked.entry.count(name) for name in ("n_runs", "n_samples", "n_columns"))
    found = (combined.n_runs, combined.n_samples, combined.n_columns)
    if found != expected:
        yield checked.fault(f"has runs, samples and columns {found}, {expected} were combined")


def _check_rankings(checked: _Checked) -> Iterator[Fault]:
    for name, expected in checked.entry.counts("files").items():
        if not rankings.is_table(name):
            found = f"{checked.stage} has no table {shown(name)}"
            yield Fault(names.MANIFEST, found, checked.consequence, stage=checked.stage)
            continue
        try:
            table = opened_table(checked.path / name)
            n_rows, kept = table.metadata.num_rows, table.schema_arrow.metadata or {}
            if kept.get(b"hydra_pipe.run_id") != checked.run.run_id.encode():
                yield checked.fault("belongs to another run", name)
            elif n_rows != expected:
                yield checked.fault(f"has {n_rows} rows, {expected} were written", name)
            elif checked.listed is None:  # else every byte is known to be as it was written
                # In batches, not the whole table at once: few bytes can claim many rows.
                for batch in table.iter_batches():
                    del batch
        except (OSError, pa.ArrowException) as error:
            yield checked.fault(f"cannot be read ({shown(error)})", name)


def _check_proposal(checked: _Checked) -> Iterator[Fault]:
    try:
        read_proposal(checked.path, checked.entry.count("n_samples", least=1))
    except (OSError, ValueError, pa.ArrowException) as error:
        yield checked.fault(f"cannot be used ({shown(error)})", KEEP_FILE)


# Checks for faults of a stage whose files are all as they were written.
_CHECKS: dict[StageKind, Callable[[_Checked], Iterator[Fault]]] = {
    RECORD.kind: _check_recording,
    KEEP: _check_kept_shapes,
    PROBE: _check_probe,
    COMBINE: _check_combined,
    REDUCE: _check_relevance,
    TOPS: _check_top_samples,
    EXPORT: _check_rankings,
    CLEAN: _check_proposal,
}


def total_bytes(run: RunDirectory) -> int:
    """Return the decoded bytes that `check_run` reads, as far as the metadata tells."""
    total = 0
    try:
        if not run.is_combined and run.stages[RECORD].state == "complete":
            gradients = Gradients(run.path / names.GRADIENTS)
            pruned = gradients.pruned_arrays() if run.stages[RECORD].facts.get(PRUNED) else []
            total += sum(array.n_bytes for name, array in gradients.arrays() if name not in pruned)
            for method in run.complete(KEEP):
                total += sum(
                    array.n_bytes
                    for _, array in open_kept(run.path / KEEP.of(method).area, gradients).arrays()
                )
            for name in run.of_kind(PROBE):
                total += sum(
                    array.n_bytes
                    for _, array in Probe(run.path / PROBE.of(name).area, gradients).arrays()
                )
        for result in run.of_kind(COMBINE):
            path = run.path / COMBINE.of(result).area
            total += sum(array.n_bytes for _, array in Combined(path, run.run_id).arrays())
        for name in run.of_kind(TOPS):
            total += TopSamples(run.path / TOPS.of(name).area, run.run_id).n_bytes
        for method in run.of_kind(REDUCE):
            total += open_relevance(run.path / names.RELEVANCE, method).n_bytes
    except (StoreError, KeyError):
        pass  # the check itself tells the fault, by name
    return total
