"""A whole reduction: check, plan, compute pass by pass, write; and go on where one was interrupted."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.reduction import BACKWARD, BY_FEATURES, BY_SAMPLES, FROM_MATRIX, Answered, Found, ReductionInput, ReductionPlan
from hydra_pipe.plan.sweeping import chunk_columns
from hydra_pipe.progress import Progress
from hydra_pipe.reduction import loops
from hydra_pipe.reduction.executors import executor_of
from hydra_pipe.reduction.executors.base import Scheduler
from hydra_pipe.reduction.filling import described_filling, fill
from hydra_pipe.reduction.fisher import graphs as sweep_graphs
from hydra_pipe.reduction.hydra import Job, graphs
from hydra_pipe.reduction.influence import graphs as solving_graphs
from hydra_pipe.reduction.marks import ANSWERED, combined, mark, marked, run_again
from hydra_pipe.reduction.matrix import graphs as matrix_graphs
from hydra_pipe.reduction.request import Request, described, facts, left_of, summary
from hydra_pipe.store import names
from hydra_pipe.store.coordinates import own_coordinates, shared_coordinates, write_coordinates
from hydra_pipe.store.files import remove, remove_partials, sync_tree, tree_bytes
from hydra_pipe.store.hypergradients import create_hypergradients
from hydra_pipe.store.permission import check_stages
from hydra_pipe.store.prefix import committed
from hydra_pipe.store.relevance import chunk_samples, columns_of, create_relevance, open_relevance
from hydra_pipe.store.space import say_if_tight
from hydra_pipe.store.stage_runner import Work, completing, taken_up
from hydra_pipe.store.stages import RECORD
from hydra_pipe.store.sweeps import remove_states

# orders whose first pass may take long, and is divided by the memory that its process had
_DIVIDED = (BACKWARD, BY_SAMPLES, BY_FEATURES)
# whose columns are done block by block
_BY_COLUMNS = (BACKWARD, FROM_MATRIX)
# fact of an interrupted reduction: whether it kept hypergradients too
_KEEPING = "keeping"


def reduce_request(request: Request, *, overwrite: bool = False, progress: Progress | None = None) -> bool:
    """Do what is asked for: see `hydra_pipe.reduce`, which has the same arguments and raises the same.

    Returns:
        Whether there was anything to do.
    """
    progress = progress or Progress()
    if request.fills:
        filled = fill(request, overwrite=overwrite, progress=progress)
        return reduce_request(_from_filled(request), overwrite=overwrite, progress=progress) or filled
    # of hypergradients there is one store, whatever the result is called
    kept = (request.keep_stage,) if request.options.keep_hypergradients else ()
    has_work = partial(_has_work, request, overwrite)
    with taken_up(request.directory, request.stage, *kept, has_work=has_work, progress=progress) as is_needed:
        if is_needed:
            _reduce(request, overwrite, progress)
    return is_needed


def _from_filled(request: Request) -> Request:
    """What is left of a request once the matrix is there: to answer from it."""
    options = replace(request.options, keep_hypergradients=False)
    return replace(request, options=options, scheduler=executor_of(options.scheduler))


def _has_work(request: Request, overwrite: bool) -> bool:
    directory = request.directory
    kept = directory.stages.get(request.keep_stage)
    to_keep = request.options.keep_hypergradients and (kept is None or kept.state != "complete")
    return overwrite or directory.has_work(request.stage, request.settings) or to_keep


def _reduce(request: Request, overwrite: bool, progress: Progress) -> None:
    directory, stage = request.directory, request.stage
    with request.scheduler as using:
        going_on = request.going_on(using.workers, None if overwrite else _answered(request), partial(_goes_on, request))
        answered, given, plan, whole = going_on.after, going_on.given, going_on.plan, going_on.whole
        using.start(request.gradients.path, directory.run_id, plan.peak_bytes)
        if answered is None:
            _begin(request, given, plan)
            if plan.order in _DIVIDED:  # that is gone on with, or begun anew, with the same memory
                _mark(request, Answered(plan.order, 0, given.base_bytes))
        else:
            _resume(request)
            progress.say(f"going on after {answered.done:,} {'samples' if answered.order == 'fold first' else 'test samples'}")
        if request.method.on_the_way and len(request.checkpoints) == 1:
            progress.say(
                f"{request.method.name} takes the test gradients at the end for all steps; TracIn's own are those on the way: "
                "record with --test-every epoch"
            )
        progress.say(summary(request, given, plan))
        say_if_tight(plan.written_bytes, directory.path, progress)
        if loops.compiled is None:
            progress.say(f"the inner loops are not compiled, and take twice as long: {loops.WHY_NOT}")
        with completing(directory, stage) as work:
            passes = _compute(request, given, plan, using, progress, () if answered is None else answered.found)
            if request.options.keep_hypergradients:
                Work(directory, request.keep_stage, {"n_bytes": tree_bytes(request.kept)}).complete()
            if plan.order == BACKWARD:
                remove_states(_store(request) / request.name)  # of blocks of columns that another budget had
            work.facts |= {"n_tests": request.columns.n_tests, "n_columns": given.n_columns, "plan": facts(whole)}
            work.facts |= combined(passes)
            if plan.order == FROM_MATRIX:
                work.facts |= left_of(directory.stages[request.keep_stage])


def plan_request(request: Request) -> str:
    """What `reduce_request` would do, in lines. Reads metadata only, unless a pipeline is needed. Raises: BudgetError."""
    with request.scheduler as using:
        if request.fills:
            return described_filling(request, using.workers)
        return described(request, *request.plan(using.workers))


def _store(request: Request) -> Path:
    return request.directory.path / names.RELEVANCE


def _begin(request: Request, given: ReductionInput, plan: ReductionPlan) -> None:
    """Make what is to be filled, and drop what an earlier reduction led to: results of another relevance must not stay behind."""
    directory, name, keeping = request.directory, request.name, request.options.keep_hypergradients
    kept = (request.keep_stage,) if keeping else ()
    stage = request.stage
    check_stages(directory.path, stage, *stage.results, *kept)
    # first the claims, then what they claim
    directory.forget(*stage.results)
    directory.begin(stage, request.settings)
    if keeping:
        _forget_kept(request)
    for place in (place for one in (stage, *stage.results) for place in one.places):
        remove(directory.path / place)
    width = given.n_columns if given.grouped else plan.test_blocks[0][1]
    if plan.order in _BY_COLUMNS:
        width = chunk_columns(plan.test_blocks[0][1])
    method = request.method
    attributes = {names.METHOD: method.name, names.SIGN: method.sign, names.UNIT: method.unit}
    own = committed(directory.stages[RECORD])
    n_tests = 0 if own is None else own.n_tests
    is_whole = request.options.test is None and request.columns.by is None and request.columns.tests == ((0, n_tests),)
    create_relevance(_store(request), name, attributes, given.n_samples, request.columns, width, directory.run_id, whole=is_whole)
    coordinates = shared_coordinates(request.gradients, given.n_samples, n_tests)
    write_coordinates(_store(request), coordinates if is_whole else {**coordinates, **own_coordinates(name, request.columns)})
    if keeping:
        create_hypergradients(request.kept, request.gradients, given.n_samples)


def _forget_kept(request: Request) -> None:
    """Mark that hypergradients are kept anew: what interrupted reductions have kept before is not there any more."""
    directory = request.directory
    for name, stage in directory.stages.items():
        if isinstance(found := stage.facts.get(ANSWERED), dict) and found.get(_KEEPING):
            del stage.facts[ANSWERED]
            directory.save(name)
    directory.begin(request.keep_stage, {})


def _resume(request: Request) -> None:
    """Mark that the reduction runs again, and clean up after the process that was killed."""
    run_again(request.directory, request.stage)
    remove_partials(_store(request) / request.name)
    if request.options.keep_hypergradients:
        remove_partials(request.kept)


def _answered(request: Request) -> Answered | None:
    """What an interrupted reduction has written to the end, and kept if this one is to keep it."""
    found = marked(request.directory.stages.get(request.stage))
    if found is None or (request.options.keep_hypergradients and not found[1].get(_KEEPING)):
        return None
    answered = found[0]
    n = request.columns.n_columns if answered.order in _BY_COLUMNS else max(1, request.columns.n_tests)
    n = request.n_samples if answered.order == "fold first" else n
    return answered if answered.done <= n else None


def _goes_on(request: Request, answered: Answered, plan: ReductionPlan) -> bool:
    """Whether what is there is what was answered, and the plan fits its chunks."""
    if plan.order != answered.order:
        return False
    try:
        array = open_relevance(_store(request), request.name)
        if columns_of(array) != request.columns or array.shape != (request.n_samples, request.columns.n_columns):
            return False
    except StoreError:
        return False
    rows, columns = array.chunks
    if array.shards is not None or rows != chunk_samples(request.n_samples) or any(a % rows for a, _ in plan.sample_blocks):
        return False
    groups_together = request.columns.by is not None and plan.order not in _BY_COLUMNS
    return groups_together or all(first % columns == 0 for first, _ in plan.test_blocks)


def _compute(
    request: Request, given: ReductionInput, plan: ReductionPlan, using: Scheduler, progress: Progress, before: tuple[Found, ...]
) -> tuple[Found, ...]:
    """Compute pass by pass. Returns: what they have found, and those `before` them."""
    kept = request.kept.absolute() if request.from_kept or request.options.keep_hypergradients else None
    job = Job(
        # what works elsewhere has another current directory
        gradients=request.gradients.path.absolute(),
        tested=request.tested,
        relevance=(_store(request) / request.name).absolute(),
        n_samples=given.n_samples,
        tests=request.columns.tests,
        groups=request.groups,
        kept=kept,
        plan=plan,
        prefix=request.gradients.prefix,
        method=request.method.name,
        checkpoints=request.checkpoints,
        in_place=not given.processes,
    )
    n_rows = given.n_read if not request.from_kept or given.n_factored else 0
    of_graph = n_rows * (plan.passes if request.method.work == "solve" else 1)
    n_counted = n_rows * plan.passes
    if request.engine is not None:
        n_counted, passes = request.engine.n_counted(plan), request.engine.passes
    elif plan.order == FROM_MATRIX:
        of_graph, passes = given.n_samples, matrix_graphs
        n_counted = of_graph * plan.passes
    else:
        passes = {"sum": graphs, "sweep": sweep_graphs, "solve": solving_graphs}[request.method.work]
    found = before
    with progress.task("reduce", n_counted, "samples" if plan.order == FROM_MATRIX else "rows") as task:
        for span, graph in passes(job, using.counter(task.advance, of_graph)):
            of_pass: Found = using.compute(graph)
            # of sums there are many passes, that find nothing
            found += (of_pass,) if of_pass else ()
            _mark(request, Answered(plan.order, span[1], given.base_bytes, found))
    return found


def _mark(request: Request, answered: Answered) -> None:
    """Note in the manifest that a pass is done: what it has answered is safe on the disk."""
    sync_tree(_store(request) / request.name, files=False)
    if request.options.keep_hypergradients:
        sync_tree(request.kept, files=False)
    mark(request.directory, request.stage, answered, **{_KEEPING: request.options.keep_hypergradients})
