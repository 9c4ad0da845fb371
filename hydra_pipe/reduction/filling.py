"""The stage that keeps the hypergradients of a sweep: every feature is swept as a test gradient, or every sample forward.

Either gives H, (sample, feature), from which any test sample is answered by R = H h (`matrix.py`). It is made in blocks of
features, or of samples, as a reduction is in blocks of columns, and gone on with where it was interrupted.
"""

from dataclasses import replace
from functools import partial

from hydra_pipe.errors import BudgetError, StoreError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.answering import AnswerInput, plan_answers
from hydra_pipe.plan.reduction import BACKWARD, FORWARD, Answered, Found, ReductionPlan
from hydra_pipe.plan.sweeping import MOST_FEATURES, MOST_SAMPLES, chunk_columns
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.executors.base import Scheduler, Workers
from hydra_pipe.reduction.fisher import graphs
from hydra_pipe.reduction.hydra import Job
from hydra_pipe.reduction.marks import combined, mark, marked, run_again
from hydra_pipe.reduction.request import Request, aligned, described, facts, feature_spans
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.files import remove_partials, sync_tree, tree_bytes
from hydra_pipe.store.hypergradients import create_matrix
from hydra_pipe.store.permission import check_stages
from hydra_pipe.store.space import free_bytes, room_for
from hydra_pipe.store.stage_runner import completing, taken_up
from hydra_pipe.store.stages import KEEP
from hydra_pipe.store.sweeps import remove_states
from hydra_pipe.units import format_bytes, format_seconds


def fill(request: Request, *, overwrite: bool, progress: Progress) -> bool:
    """Keep the matrix of hypergradients that `request` asks for. Errors: as of `hydra_pipe.reduce`.

    Returns:
        Whether there was anything to do.
    """
    directory, stage = request.directory, request.keep_stage

    def has_work() -> bool:
        return overwrite or directory.has_work(stage, {})

    with taken_up(directory, stage, has_work=has_work, progress=progress) as is_needed:
        if is_needed:
            _fill(request, overwrite, progress)
    return is_needed


def _fill(request: Request, overwrite: bool, progress: Progress) -> None:
    directory, stage = request.directory, request.keep_stage
    with request.scheduler as using:
        going_on = request.going_on(using.workers, None if overwrite else _answered(request), partial(_goes_on, request))
        answered, given, plan, whole = going_on.after, going_on.given, going_on.plan, going_on.whole
        _check_room(request, whole, 0 if answered is None else answered.done)
        using.start(request.gradients.path, directory.run_id, plan.peak_bytes)
        if answered is None:
            _begin(request, plan)
            _mark(request, Answered(plan.order, 0, given.base_bytes))
        else:
            run_again(directory, stage)
            remove_partials(request.kept)
            progress.say(f"going on after {answered.done:,} of {given.n_columns:,} {_columns(plan)}")
        progress.say(_summary(request, whole))
        with completing(directory, stage) as work:
            passes = _compute(request, plan, using, given.base_bytes, progress, () if answered is None else answered.found)
            remove_states(request.kept / names.SWEPT)  # of blocks that another budget had
            work.facts |= {"n_bytes": tree_bytes(request.kept), "plan": facts(whole)} | combined(passes)


def described_filling(request: Request, workers: Workers) -> str:
    """What `fill`, and the reduction that answers from it, would do, in lines for people. Raises: BudgetError."""
    given, plan = request.plan(workers)
    answered = _answered(request)
    if request.method.name in request.directory.complete(KEEP):
        lines = {"hypergradients": "are kept already"}
    else:
        _check_room(request, plan, 0 if answered is None or answered.order != plan.order else answered.done)
        lines = {
            "hypergradients": f"{given.n_samples:,} samples x {request.gradients.layout.whole_width:,} features",
            "order": f"{plan.order}, with {given.n_columns:,} {_columns(plan)} as columns",
            "passes": f"{plan.passes:,}, of {plan.test_blocks[0][1]:,} {_columns(plan)} for each of {len(plan.row_runs)} workers",
            "read": f"{format_bytes(plan.read_bytes)} decoded",
            "written": f"{_size(request, plan)}: {room_for(plan.written_bytes, request.directory.path)}",
            "operations": f"{plan.operations:,} of matrix products",
            "peak memory": f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
            + (" in each process" if given.processes else ""),
            "time": f"about {_lasting(plan)} where benchmarks/RESULTS.md was measured",
        }
    later = replace(given, n_columns=request.columns.n_columns, n_tests=request.columns.n_tests, grouped=request.groups is not None)
    answers = described(request, later, plan_answers(AnswerInput(later, request.gradients.layout.whole_width)))
    return f"{aligned(lines)}\n\nThen, from these:\n{answers}"


def _summary(request: Request, plan: ReductionPlan) -> str:
    each = f"{plan.test_blocks[0][1]:,} {_columns(plan)} each"
    return (
        f"keeping {_size(request, plan)}: {plan.order}, {plan.passes:,} pass{'es' if plan.passes > 1 else ''} of "
        f"{len(plan.row_runs)} workers, {each}, at most {format_bytes(plan.peak_bytes)} of memory, about {_lasting(plan)}"
    )


def _columns(plan: ReductionPlan) -> str:
    return "samples" if plan.order == FORWARD else "features"


def _size(request: Request, plan: ReductionPlan) -> str:
    n_samples, width = request.n_samples, request.gradients.layout.whole_width
    return f"{n_samples:,} samples x {width:,} features x 4 bytes = {format_bytes(plan.written_bytes)}"


def _lasting(plan: ReductionPlan) -> str:
    return format_seconds(plan.lasting_picoseconds / 1e12)


def _check_room(request: Request, plan: ReductionPlan, done: int) -> None:
    """Refuse what the disk has no room for. Raises: BudgetError.

    Args:
        request: what is asked for.
        plan: of all columns.
        done: columns that are there already.
    """
    free = free_bytes(request.directory.path)
    if free is None:
        return
    n_samples, width = request.n_samples, request.gradients.layout.whole_width
    block, n_workers, n_columns = plan.test_blocks[0][1], len(plan.row_runs), plan.test_blocks[-1][1]
    # where each sweep is, old and new while it is written
    states = 2 * n_workers * block * (2 * len(FORMS) * width + n_samples) * 4
    needed = plan.written_bytes * (n_columns - done) // n_columns + states
    if not done and request.kept.exists():
        free += tree_bytes(request.kept)  # which is removed before
    if needed > free:
        raise BudgetError(
            f"keeping {_size(request, plan)}, and {format_bytes(states)} on the way, needs {format_bytes(needed)} on the disk, "
            f"{format_bytes(free)} are free at {request.directory.path}: make room, leave out --keep-hypergradients, or record "
            f"with --encoding projected and a lower --dim, which is the number of features"
        )


def _begin(request: Request, plan: ReductionPlan) -> None:
    """Make what is to be filled: first the claim, then what is claimed."""
    directory, layout = request.directory, request.gradients.layout
    check_stages(directory.path, request.keep_stage)
    directory.begin(request.keep_stage, {})
    shape = (request.n_samples, layout.whole_width)
    create_matrix(request.kept, directory.run_id, shape, _chunks(plan, shape), feature_spans(layout))


def _chunks(plan: ReductionPlan, shape: tuple[int, int]) -> tuple[int, int]:
    """Samples and features of a file: whole files in a block."""
    block = plan.test_blocks[0][1]
    if plan.order == FORWARD:
        return chunk_columns(block, MOST_SAMPLES), min(MOST_FEATURES, shape[1])
    return min(MOST_SAMPLES, shape[0]), chunk_columns(block, MOST_FEATURES)


def _answered(request: Request) -> Answered | None:
    """Columns that an interrupted call has kept to the end."""
    found = marked(request.directory.stages.get(request.keep_stage))
    if found is None or found[0].order not in (BACKWARD, FORWARD):
        return None
    n_columns = request.n_samples if found[0].order == FORWARD else request.gradients.layout.whole_width
    return found[0] if found[0].done <= n_columns else None


def _goes_on(request: Request, answered: Answered, plan: ReductionPlan) -> bool:
    """Whether what is there can be gone on with: an array of this recording, whose files the plan's blocks fill."""
    if plan.order != answered.order:
        return False
    try:
        array = Array.open(request.kept / names.SWEPT)
    except StoreError:
        return False
    shape = (request.n_samples, request.gradients.layout.whole_width)
    if array.shape != shape or array.shards is not None:
        return False
    along, across, most = (0, 1, MOST_SAMPLES) if plan.order == FORWARD else (1, 0, MOST_FEATURES)
    whole_across = min(MOST_FEATURES if plan.order == FORWARD else MOST_SAMPLES, shape[across])
    fits = array.chunks[along] <= most and array.chunks[across] == whole_across
    return fits and all(first % array.chunks[along] == 0 for first, _ in plan.test_blocks)


def _compute(
    request: Request, plan: ReductionPlan, using: Scheduler, base_bytes: int, progress: Progress, before: tuple[Found, ...]
) -> tuple[Found, ...]:
    """Compute pass by pass. Returns: what they have found, and those `before` them."""
    job = Job(
        # what works elsewhere has another current directory
        gradients=request.gradients.path.absolute(),
        tested=request.tested,
        relevance=(request.kept / names.SWEPT).absolute(),
        n_samples=request.n_samples,
        tests=(),
        groups=None,
        kept=None,
        plan=plan,
        method=request.method.name,
        of_features=True,
    )
    n_rows, found = request.gradients.rows.n_rows, before
    with progress.task("keep hypergradients", n_rows * plan.passes, "rows") as task:
        for columns, graph in graphs(job, using.counter(task.advance, n_rows)):
            found += (using.compute(graph),)
            _mark(request, Answered(plan.order, columns[1], base_bytes, found))
    return found


def _mark(request: Request, answered: Answered) -> None:
    """Note in the manifest that a pass is done: its columns are safe on the disk."""
    sync_tree(request.kept, files=False)
    mark(request.directory, request.keep_stage, answered)
