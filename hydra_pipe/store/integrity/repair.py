"""Repair of a damaged run: it goes back to its last good state.

A repair keeps what is whole, and forgets what has to be computed again.
"""

import os
from collections.abc import Iterator, Sequence

from hydra_pipe.errors import HydraError, StoreError, printable
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.coordinates import coordinates_of, write_coordinates
from hydra_pipe.store.data.relevance import write_group
from hydra_pipe.store.files import (
    files_below,
    is_partial,
    is_remote,
    location,
    move,
    remove,
    replace_file,
)
from hydra_pipe.store.integrity.faults import Fault
from hydra_pipe.store.integrity.verify import check_path
from hydra_pipe.store.run.footprints import digest, footprints
from hydra_pipe.store.run.locks import one_writer
from hydra_pipe.store.run.manifest import PRUNED, RunDirectory
from hydra_pipe.store.run.permission import check_writable
from hydra_pipe.store.run.stages import DIRECTORIES, KEEP, KINDS, RECORD, StageId, kept_with

# The method whose hypergradients are sums of rows.
_SUMMED = "hydra"


def repair_path(path: str | os.PathLike[str], progress: Progress) -> list[Fault]:
    """Repair the run at `path`.

    The repair tells the user, in a line each, what was found, what was done, and which command
    must run again.

    Returns:
        Faults that remain. Unfinished stages are not among them.

    Raises:
        RunError: there is no run, or a process writes it.
        StoreError: the run has a newer format version, or a link in it leads elsewhere.
    """
    copy = RunDirectory.from_copy(path)
    known: RunDirectory | None
    try:
        known = RunDirectory.open(path)
    except HydraError:
        known = copy
    with one_writer(location(path), *(() if known is None else (RECORD, *known.stages))):
        faults = check_path(path, progress)
        if any(fault.kind == "manifest" for fault in faults):
            if copy is None:
                return faults
            copy.save(*copy.stages)
            progress.say(
                printable(f"{names.MANIFEST}: {faults[0].found}: written again from its copy")
            )
            faults = check_path(path, progress)
        for fault in faults:
            progress.say(printable(f"{fault.where}: {fault.what}"))
        run = RunDirectory.open(path)
        _refuse_links(run)
        check_writable(run.path, *DIRECTORIES, names.CHECKPOINTS, names.SET_ASIDE)
        for line in _repair(run, faults):
            progress.say(printable(line))
        return [fault for fault in check_path(path, progress) if fault.kind != "unfinished"]


def _refuse_links(run: RunDirectory) -> None:
    """Refuse links: a repair moves and removes only files in the run itself.

    Raises:
        StoreError: a directory of the run is a link.
    """
    for where in (
        *DIRECTORIES,
        names.CHECKPOINTS,
        names.SET_ASIDE,
        *(stage.area for stage in run.stages),
    ):
        if not is_remote(run.path) and (run.path / where).is_symlink():
            raise StoreError(
                f"{run.path / where} is a link, and files behind a link are not repaired: put the "
                "files in its place"
            )


def _repair(run: RunDirectory, faults: Sequence[Fault]) -> Iterator[str]:
    """Repair `run`, and yield a line for each thing that was done.

    Args:
        run: the run.
        faults: all faults of the run.
    """
    yield from _remove_partial(run)
    for fault in faults:
        if fault.kind == "extra":
            yield f"{fault.where}: moved to {_set_aside(run, fault.where)}"
        elif fault.kind == "copy":
            run.save()
            yield f"{fault.where}: written again"
        elif fault.kind == "group":
            write_group(run.path / names.RELEVANCE, run.run_id)
            write_coordinates(run.path / names.RELEVANCE, coordinates_of(run))
            yield f"{fault.where}: written again"
    damaged = {
        fault.stage: fault
        for fault in reversed(faults)
        if fault.kind == "damaged" and fault.stage is not None
    }
    for fault in faults:
        if fault.kind == "unlisted" and fault.stage is not None and fault.stage not in damaged:
            if _listed_again(run, fault.stage):
                yield f"{fault.where}: written again, because every file is as it was written"
            else:
                damaged[fault.stage] = fault
    yield from _set_back(run, damaged, faults)


def _remove_partial(run: RunDirectory) -> Iterator[str]:
    for directory in DIRECTORIES:
        for name in files_below(run.path / directory):
            if is_partial(name):
                remove(run.path / directory / name)
                yield f"{directory}/{name}: removed: a writer that was stopped has left it"


def _set_aside(run: RunDirectory, where: str) -> str:
    """Move something out of the way. Returns: its new place, relative to the run."""
    target, number = f"{names.SET_ASIDE}/{where}", 1
    while (run.path / target).exists():
        number += 1
        target = f"{names.SET_ASIDE}/{where}.{number}"
    move(run.path / where, run.path / target)
    return target


def _listed_again(run: RunDirectory, stage: StageId) -> bool:
    """Write the footprints of `stage` again, if the manifest has their SHA-256."""
    try:
        content = footprints(run.path, stage).content()
    except (HydraError, OSError):
        return False  # for example, the rows of the run were pruned
    if digest(content) != run.checksums(stage):
        return False
    replace_file(run.path / stage.checksums_file, [content])
    return True


def _set_back(
    run: RunDirectory, damaged: dict[StageId, Fault], faults: Sequence[Fault]
) -> Iterator[str]:
    """Forget the stages `damaged`, each with its first fault, and the stages made from them."""
    lost = [stage for stage in damaged if stage.kind is KEEP]
    pruned = RECORD in run.stages and bool(run.stages[RECORD].facts.get(PRUNED))
    if lost and pruned and all(KEEP.of(method) in damaged for method in run.complete(KEEP)):
        # Nothing is left to answer from, and the rows behind it are gone.
        damaged.setdefault(RECORD, damaged[lost[0]])
    for stage in list(damaged):
        for result in stage.results:
            if result in run.stages:
                damaged.setdefault(result, damaged[stage])
    advice = {stage: f"run {run.command(stage)}" for stage in damaged}
    for stage in lost:
        advice[stage] += _after_keeping(run, stage, damaged)
        if pruned and RECORD not in damaged:
            advice[stage] = "its rows were pruned: other hypergradients are whole, and still answer"
    for stage in sorted(damaged, key=lambda stage: KINDS.index(stage.kind)):
        fault = damaged[stage]
        if stage == RECORD:
            _set_recording_back(run, fault, faults)
            advice[stage] += ", which begins anew and discards what was computed from it"
        else:
            run.forget(stage)
            for place in stage.places:
                remove(run.path / place)
        yield f"{stage}: set back, because {fault.where} {fault.found}: {advice[stage]}"


def _after_keeping(run: RunDirectory, stage: StageId, damaged: dict[StageId, Fault]) -> str:
    """Return the commands that must follow, to make again what keeping discards.

    Keeping sums of rows computes a relevance again. So it drops the relevance's results, which
    may be whole.
    """
    if stage.name != _SUMMED:
        return ""
    results = kept_with(stage, run.stages).results
    return "".join(
        f", then {run.command(result)}"
        for result in results
        if result in run.stages and result not in damaged
    )


def _set_recording_back(run: RunDirectory, fault: Fault, faults: Sequence[Fault]) -> None:
    """Set the recording back, so that it begins anew.

    Damaged files are moved out of the way, so that no checkpoint can resume with them.
    """
    wrong = {
        entry.where: None
        for entry in faults
        if (entry.stage, entry.kind) == (RECORD, "damaged") and "/" in entry.where
    }
    if fault.kind == "unlisted":  # some file was exchanged, and nothing tells which
        wrong = {names.GRADIENTS: None}
    run.end(RECORD, "failed", error=f"{fault.where} {fault.found}")
    checkpoints = run.path / names.CHECKPOINTS
    for name in files_below(checkpoints):
        if name.startswith("step-"):  # left by a process that was killed after the recording
            remove(checkpoints / name)
    for where in wrong:
        if (run.path / where).exists():
            _set_aside(run, where)
