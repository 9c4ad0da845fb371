"""Reads everything in a run and says what is not as it was written, and what that means."""

import os
from collections.abc import Iterator

import pyarrow as pa

from hydra_pipe.errors import ManifestError, RunError, StoreError, shown
from hydra_pipe.progress import Progress, Task
from hydra_pipe.store import names, rankings
from hydra_pipe.store.arrays import METADATA
from hydra_pipe.store.checksums import Footprints, area_of
from hydra_pipe.store.commands import command_of
from hydra_pipe.store.compare import Comparison
from hydra_pipe.store.coordinates import coordinates_of, wrong_coordinates
from hydra_pipe.store.fault import Fault
from hydra_pipe.store.files import files_below, is_partial, sha256_of
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.hypergradients import open_kept
from hydra_pipe.store.listing import PLACES, Listed, coordinate_names, footprints_or_fault, members_of
from hydra_pipe.store.probes import Probe
from hydra_pipe.store.proposals import KEEP_FILE, read_proposal
from hydra_pipe.store.rankings import opened_table
from hydra_pipe.store.relevance import (
    ITSELF,
    columns_of,
    group_is_whole,
    open_array,
    open_relevance,
    parts_of_result,
    result_name,
)
from hydra_pipe.store.run import (
    CHECKSUMS,
    OF_PROBE,
    OF_RECORD,
    OF_REDUCE,
    OF_SELF,
    PRUNED,
    RECORD,
    UPTO,
    RunDirectory,
    clean_stage,
    evaluate_stage,
    export_stage,
    keep_stage,
    probe_stage,
    reduce_stage,
    report_stage,
)
from hydra_pipe.store.sense import check_rows

_KEEP, _REDUCE, _EXPORT = keep_stage(""), reduce_stage(""), export_stage("")
_CLEAN, _REPORT, _EVALUATE, _PROBE = clean_stage(""), report_stage(""), evaluate_stage(""), probe_stage("")
_STAGES = (_KEEP, _PROBE, _REDUCE, _EXPORT, _CLEAN, _REPORT, _EVALUATE)


def check_path(path: str | os.PathLike[str], progress: Progress) -> list[Fault]:
    """Every fault of the run at `path`.

    Raises:
        RunError: there is no run. StoreError: it was written in a newer format version.
    """
    try:
        run = RunDirectory.open(path)
    except (RunError, ManifestError) as error:
        copy = RunDirectory.from_copy(path)
        if copy is None and isinstance(error, RunError):
            raise
        more = "" if copy is None else "nothing of the run can be used without it: hydra-pipe verify --repair has a copy"
        return [Fault(names.MANIFEST, str(error), more, kind="manifest")]
    with progress.task("verify", total_bytes(run), "bytes") as task:
        return list(check_run(run, task))


def check_run(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Every fault of a run. Bytes are counted on `task` as they are read and decoded."""
    for name, stage in run.stages.items():
        if stage.state != "complete":
            yield Fault(names.MANIFEST, f"{name} is not finished (state: {stage.state}): run it again", kind="unfinished")
    if RunDirectory.from_copy(run.path) is None:
        yield Fault(
            f"{names.CHECKSUMS}/{names.MANIFEST}",
            f"is missing or damaged: should {names.MANIFEST} be lost, so is the run",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="copy",
        )
    yield from _check_strays(run)
    if RECORD not in run.stages:
        yield Fault(names.MANIFEST, "nothing was recorded", kind="unfinished")
        return
    for name, stage in run.stages.items():
        if stage.state == "complete" and (name == RECORD or name.startswith(_STAGES)):
            yield from check_stage(run, name, task)
    if methods_of(run) and not group_is_whole(run.path / names.RELEVANCE, run.run_id):
        yield Fault(
            f"{names.RELEVANCE}/{METADATA}",
            "is missing or not what was written: what is in it is not found, or taken for another run's",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="group",
        )
    for name in wrong_coordinates(run.path / names.RELEVANCE, coordinates_of(run)):
        yield Fault(
            f"{names.RELEVANCE}/{name}",
            "does not say what the samples, test samples or means are: xarray shows wrong coordinates",
            f"hydra-pipe verify {run.path} --repair writes it again",
            kind="group",
        )


def methods_of(run: RunDirectory) -> list[str]:
    """Methods whose relevance was computed, or begun."""
    return [name.removeprefix(_REDUCE) for name in run.stages if name.startswith(_REDUCE)]


def _check_strays(run: RunDirectory) -> Iterator[Fault]:
    """What is in hydra-pipe's own directories and belongs to no stage."""
    known = {names.checksums_file(stage) for stage in run.stages}
    known |= {f"{names.CHECKSUMS}/{names.MANIFEST}", f"{names.RELEVANCE}/{METADATA}"}
    areas = {area_of(stage) for stage in run.stages} | {f"{names.RELEVANCE}/{name}" for name in coordinate_names(run)}
    strays: set[str] = set()
    for directory in PLACES:
        for file in files_below(run.path / directory):
            whole, part = f"{directory}/{file}", f"{directory}/{file.split('/')[0]}"
            if whole not in known and not is_partial(whole) and not {directory, part} & areas:
                strays.add(directory if directory == names.GRADIENTS else part)
    for where in sorted(strays):
        yield Fault(
            where,
            "belongs to no stage of the run: it may be of another recording, and is no result of this one",
            f"move it elsewhere, or let hydra-pipe verify {run.path} --repair do so",
            kind="extra",
        )


def check_stage(run: RunDirectory, stage: str, task: Task) -> Iterator[Fault]:
    """Every fault of what a complete stage has written."""
    consequence = _consequence_of(run, stage)
    listed, lost = _footprints_of(run, stage)
    if lost is not None:
        yield lost
    told: set[str] = set()
    for fault in Comparison(run.path, stage, consequence, listed, _pruned(run, stage), task).faults():
        if fault.kind == "damaged":
            told.add(fault.where)
        yield fault
    try:
        for fault in _sense(run, stage, consequence, listed):
            if fault.where not in told:
                yield fault
    except StoreError as error:
        if not told:  # otherwise it was told, by the name of its file
            yield Fault(area_of(stage), str(error), consequence, stage=stage)
    yield from _check_origin(run, stage, consequence)


def _consequence_of(run: RunDirectory, stage: str) -> str:
    """What it means that something of `stage` is damaged, and what to do."""
    if stage == RECORD:
        return "no relevance can be computed from this recording: record the run again with --overwrite"
    again = f"{command_of(run, stage)} --overwrite"
    if stage.startswith(_KEEP):
        return f"no test samples can be answered from what was kept: keep it again with {again}"
    if stage.startswith(_PROBE):
        return f"nothing can be computed for its test samples: take it again with {again}"
    if stage.startswith(_REDUCE):
        return f"the relevance cannot be trusted: compute it again with {again}"
    if stage.startswith(_EVALUATE):
        return f"the evaluation cannot be trusted: make it again with {again}"
    if stage.startswith(_CLEAN):
        return f"the proposal cannot be trusted: make it again with {again}"
    if stage.startswith(_REPORT):
        return f"the report cannot be trusted: write it again with {again}"
    return f"the rankings cannot be trusted: write them again with {again}"


def _footprints_of(run: RunDirectory, stage: str) -> tuple[Footprints | None, Fault | None]:
    """What `stage` has written, or what is wrong with the file that says so."""
    where, found = names.checksums_file(stage), footprints_or_fault(run, stage)
    if isinstance(found, Footprints):
        return found, None
    advice = f"hydra-pipe verify {run.path} --repair writes it again where it can"
    return None, Fault(
        where, found, f"swapped and exchanged files of {stage} cannot be told: {advice}", kind="unlisted", stage=stage
    )


def _pruned(run: RunDirectory, stage: str) -> frozenset[str]:
    """Arrays of `stage` whose chunks were deleted."""
    if stage != RECORD or not run.stages[RECORD].facts.get(PRUNED):
        return frozenset()
    try:
        return frozenset(f"{names.GRADIENTS}/{name}" for name in Gradients(run.path / names.GRADIENTS).pruned_arrays())
    except StoreError:
        return frozenset()  # that is told as a fault; so is what was pruned then


def _check_origin(run: RunDirectory, stage: str, consequence: str) -> Iterator[Fault]:
    """Whether `stage` was computed from what is there now."""
    sources = [(RECORD, OF_RECORD, "recording")]
    facts = run.stages[stage].facts
    probed = parts_of_result(stage.removeprefix(_REDUCE)).test if stage.startswith(_REDUCE) else None
    if probed is not None:
        sources.append((probe_stage(probed), OF_PROBE, "probe"))
    if stage.startswith((_EXPORT, _CLEAN)):
        method = stage.removeprefix(_EXPORT if stage.startswith(_EXPORT) else _CLEAN)
        sources = [(reduce_stage(method), OF_REDUCE, "relevance")]
        if OF_SELF in facts:
            own = result_name(ITSELF, None, parts_of_result(method).upto)
            sources.append((reduce_stage(own), OF_SELF, "relevance of samples for themselves"))
    if stage.startswith(_REPORT):
        sources = [(reduce_stage(stage.removeprefix(_REPORT)), OF_REDUCE, "relevance")]
    if stage == RECORD or UPTO in run.stages[stage].settings:
        return  # the first steps are the same when more have come, and where they are recorded anew the stage is forgotten
    for source, fact, what in sources:
        present = run.stages[source].facts.get(CHECKSUMS) if source in run.stages else None
        if present is not None and facts.get(fact) != present:
            found = f"is stale: it was computed from another {what} than the one that is there"
            yield Fault(area_of(stage), found, consequence, stage=stage)


def _sense(run: RunDirectory, stage: str, consequence: str, listed: Footprints | None) -> Iterator[Fault]:
    """What is wrong with `stage` though every file may be as it was written. Raises: StoreError: something cannot be read."""
    own = None if listed is None else members_of(stage, listed)
    if stage == RECORD:
        yield from _check_final(run)
        yield from check_rows(run, Gradients(run.path / names.GRADIENTS, listed=own), consequence)
    elif stage.startswith(_KEEP):
        yield from _check_kept_shapes(run, stage, consequence)
    elif stage.startswith(_PROBE):
        _check_probe(run, stage, own)
    elif stage.startswith(_REDUCE):
        yield from _check_relevance(run, stage, consequence)
    elif stage.startswith(_EXPORT):
        yield from _check_rankings(run, stage, consequence, decode=listed is None)
    elif stage.startswith(_CLEAN):
        yield from _check_proposal(run, stage, consequence)


def _check_final(run: RunDirectory) -> Iterator[Fault]:
    expected = run.stages[RECORD].facts.get("final_sha256")
    if expected is None:
        return  # a loop of the user's own keeps its own checkpoints
    where = f"{names.CHECKPOINTS}/{names.FINAL_CHECKPOINT}"
    file = run.path / where
    if not file.is_file() or sha256_of(file) != expected:
        found = "is missing or changed: the parameters that the test gradients were taken at are lost"
        yield Fault(where, found, "record the run again with --overwrite", stage=RECORD)


def check_hypergradients(run: RunDirectory, task: Task) -> Iterator[Fault]:
    """Every fault of the hypergradients that a run keeps."""
    for method in run.kept_methods():
        yield from check_stage(run, keep_stage(method), task)


def _recording_of(run: RunDirectory) -> Gradients | None:
    """The recording; None where it has a fault, which is told there: what was made of it may be whole."""
    try:
        gradients = Gradients(run.path / names.GRADIENTS)
    except StoreError:
        return None
    return gradients if gradients.run_id == run.run_id else None


def _check_probe(run: RunDirectory, stage: str, listed: Listed | None) -> None:
    """Raises: StoreError: something is wrong with the probe, though every file may be as it was written."""
    gradients = _recording_of(run)
    if gradients is not None:
        Probe(run.path / area_of(stage), gradients, listed).check(run.stages[stage].count("n_tests", least=1))


def _check_kept_shapes(run: RunDirectory, stage: str, consequence: str) -> Iterator[Fault]:
    gradients = _recording_of(run)
    if gradients is None:
        return
    store = open_kept(run.path / area_of(stage), gradients)
    found = dict(store.arrays())
    for name, shape in store.expected_shapes(gradients, run.stages[RECORD].count("n_samples")).items():
        where = f"{area_of(stage)}/{name}"
        if name not in found:
            yield Fault(where, "is missing", consequence, stage=stage)
        elif found[name].shape != shape:
            yield Fault(where, f"has shape {found[name].shape}, not {shape}", consequence, stage=stage)


def _check_relevance(run: RunDirectory, stage: str, consequence: str) -> Iterator[Fault]:
    array = open_array(run.path / area_of(stage))
    columns_of(array)
    expected = (run.stages[RECORD].count("n_samples"), run.stages[stage].count("n_columns"))
    if array.shape != expected:
        yield Fault(area_of(stage), f"has shape {array.shape}, the recording has {expected}", consequence, stage=stage)


def _check_rankings(run: RunDirectory, stage: str, consequence: str, *, decode: bool) -> Iterator[Fault]:
    for name, expected in run.stages[stage].counts("files").items():
        if not rankings.is_table(name):
            yield Fault(names.MANIFEST, f"{stage} has no table {shown(name)}", consequence, stage=stage)
            continue
        where = f"{area_of(stage)}/{name}"
        try:
            table = opened_table(run.path / where)
            n_rows, kept = table.metadata.num_rows, table.schema_arrow.metadata or {}
            if kept.get(b"hydra_pipe.run_id") != run.run_id.encode():
                yield Fault(where, "belongs to another run", consequence, stage=stage)
            elif n_rows != expected:
                yield Fault(where, f"has {n_rows} rows, {expected} were written", consequence, stage=stage)
            elif decode:  # otherwise every byte is known to be as it was written
                # not the whole table at once: few bytes can say many rows
                for batch in table.iter_batches():
                    del batch
        except (OSError, pa.ArrowException) as error:
            yield Fault(where, f"cannot be read ({shown(error)})", consequence, stage=stage)


def _check_proposal(run: RunDirectory, stage: str, consequence: str) -> Iterator[Fault]:
    try:
        read_proposal(run.path / area_of(stage), run.stages[stage].count("n_samples", least=1))
    except (OSError, ValueError, pa.ArrowException) as error:
        yield Fault(f"{area_of(stage)}/{KEEP_FILE}", f"cannot be used ({shown(error)})", consequence, stage=stage)


def total_bytes(run: RunDirectory) -> int:
    """Decoded bytes that `check_run` reads, as far as the metadata tells."""
    total = 0
    try:
        if run.stages[RECORD].state == "complete":
            gradients = Gradients(run.path / names.GRADIENTS)
            pruned = gradients.pruned_arrays() if run.stages[RECORD].facts.get(PRUNED) else []
            total += sum(array.n_bytes for name, array in gradients.arrays() if name not in pruned)
            for kept in run.kept_methods():
                total += sum(array.n_bytes for _, array in open_kept(run.path / names.kept_store(kept), gradients).arrays())
            for stage in (name for name in run.stages if name.startswith(_PROBE)):
                total += sum(array.n_bytes for _, array in Probe(run.path / area_of(stage), gradients).arrays())
        for method in methods_of(run):
            total += open_relevance(run.path / names.RELEVANCE, method).n_bytes
    except (StoreError, KeyError):
        pass  # told as a fault, by name, in the check itself
    return total
