"""Deletion of the rows of a run whose hypergradients are kept."""

from hydra_pipe.errors import RunError, StoreError
from hydra_pipe.progress import Task
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.files import remove, tree_bytes
from hydra_pipe.store.integrity.verify import check_hypergradients
from hydra_pipe.store.run.discarding import discard
from hydra_pipe.store.run.manifest import PRUNED, RunDirectory
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stage_runner import alone
from hydra_pipe.store.run.stages import KEEP, RECORD, REDUCE, TOPS, StageId
from hydra_pipe.store.zarr.arrays import CHUNKS


def prune_rows(run: RunDirectory, task: Task, *, discard_unfinished: bool = False) -> int:
    """Delete the rows of `run`.

    Everything that is kept in their place is read first, and its checksums are verified.

    Args:
        run: the run.
        task: progress, which counts the bytes that are read.
        discard_unfinished: True to give up unfinished hypergradients, which need the rows,
            where other hypergradients are complete.

    Returns:
        Bytes of the deleted files. 0 where they were deleted before.

    Raises:
        RunError: no hypergradients are kept, or a method's hypergradients are unfinished.
        StoreError: the kept hypergradients are damaged. Nothing was deleted.
    """
    with alone(run, *_keeping(run), *_unfinished(run)):
        return _prune(run, task, discard_unfinished)


def _keeping(run: RunDirectory) -> list[StageId]:
    """Return the stages that keep hypergradients, begun or complete."""
    return [stage for stage in run.stages if stage.kind is KEEP]


def _unfinished(run: RunDirectory) -> list[StageId]:
    """Return the stages that need the rows to finish.

    They are unfinished hypergradients, and the unfinished relevance of their methods.
    """
    begun = [stage for stage in _keeping(run) if run.stages[stage].state != "complete"]
    methods = {stage.name for stage in begun}
    for stage, entry in run.stages.items():
        if (
            stage.kind in (REDUCE, TOPS)
            and entry.state != "complete"
            and ResultName.parse(stage.name).method in methods
        ):
            begun.append(stage)
    return begun


def _check_finished(run: RunDirectory) -> None:
    """Check that all hypergradients are complete. Raises: RunError: some are unfinished."""
    for stage in _keeping(run):
        try:
            run.require(stage, run.command(stage))
        except RunError as error:
            if not run.complete(KEEP):
                raise
            raise RunError(
                f"{error}, or give it up with hydra-pipe prune {run.path} --discard-unfinished"
            ) from error


def _prune(run: RunDirectory, task: Task, discard_unfinished: bool) -> int:
    recording = run.require_recording()
    if not _keeping(run):
        raise RunError(
            f"{run.path} keeps no hypergradients: run hydra-pipe reduce {run.path} "
            "--keep-hypergradients first"
        )
    unfinished = _unfinished(run) if discard_unfinished and run.complete(KEEP) else []
    if not unfinished:
        _check_finished(run)
    faults = list(check_hypergradients(run, task))
    if faults:
        advice = "" if recording.facts.get(PRUNED) else "; nothing was deleted"
        raise StoreError(f"{faults[0].where}: {faults[0].what}{advice}")
    check_stages(run.path, RECORD, *unfinished)
    n_bytes = sum(tree_bytes(run.path / stage.area) for stage in unfinished)
    discard(run, *unfinished)
    gradients = Gradients(run.path / names.GRADIENTS)
    # The claim goes first: while rows are being deleted, the recording must not pass for whole.
    recording.facts[PRUNED] = True
    run.save(RECORD)
    for name in gradients.pruned_arrays():
        chunks = gradients.path / name / CHUNKS
        if chunks.exists():
            n_bytes += tree_bytes(chunks)
            remove(chunks)
    return n_bytes
