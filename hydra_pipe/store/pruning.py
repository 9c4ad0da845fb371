"""Deleting the rows of a run whose hypergradients are kept."""

from contextlib import ExitStack

from hydra_pipe.errors import RunError, StoreError
from hydra_pipe.progress import Task
from hydra_pipe.store import names
from hydra_pipe.store.arrays import CHUNKS
from hydra_pipe.store.commands import command_of
from hydra_pipe.store.files import remove, tree_bytes
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.locks import one_writer
from hydra_pipe.store.run import PRUNED, RECORD, RunDirectory, keep_stage
from hydra_pipe.store.verify import check_hypergradients


def prune_rows(run: RunDirectory, task: Task) -> int:
    """Delete the rows of `run`, once everything that is kept instead has been read and its checksums verified.

    Args:
        run: the run.
        task: counts the bytes that are read.

    Returns:
        Bytes of files that were deleted; 0 where they were before.

    Raises:
        RunError: hypergradients are not kept, or those of a method not to the end.
        StoreError: what is kept is damaged, and nothing was deleted.
    """
    with ExitStack() as locks:
        for stage in _keeping(run):
            locks.enter_context(one_writer(run.path, stage))
        run.refresh()
        return _prune(run, task)


def _keeping(run: RunDirectory) -> list[str]:
    """Stages that keep hypergradients, begun or complete."""
    return [name for name in run.stages if name.startswith(keep_stage(""))]


def _prune(run: RunDirectory, task: Task) -> int:
    recording = run.require(RECORD, f"hydra-pipe record PIPELINE {run.path}")
    if not (keeping := _keeping(run)):
        raise RunError(f"{run.path} keeps no hypergradients: run hydra-pipe reduce {run.path} --keep-hypergradients first")
    for stage in keeping:  # an unfinished one needs the rows
        run.require(stage, command_of(run, stage))
    faults = list(check_hypergradients(run, task))
    if faults:
        advice = "" if recording.facts.get(PRUNED) else "; nothing was deleted"
        raise StoreError(f"{faults[0].where}: {faults[0].what}{advice}")
    gradients = Gradients(run.path / names.GRADIENTS)
    # first the claim: what is being deleted must not be taken for a complete recording
    recording.facts[PRUNED] = True
    run.save(RECORD)
    n_bytes = 0
    for name in gradients.pruned_arrays():
        chunks = gradients.path / name / CHUNKS
        if chunks.exists():
            n_bytes += tree_bytes(chunks)
            remove(chunks)
    return n_bytes
