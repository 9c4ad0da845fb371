"""Method `hydra-exact` as a reduction: its pipeline, its plan and its passes."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hydra_pipe.errors import BudgetError, RunError
from hydra_pipe.plan.records import SAMPLE_MULTIPLE, Answered, Found, ReductionInput
from hydra_pipe.plan.replay import ReplayInput, ReplayPlan, plan_replay
from hydra_pipe.recording.datasets import on_device
from hydra_pipe.recording.several_optimizers import owners_of_groups
from hydra_pipe.reduction.executors.base import CountRows, Workers
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.solvers.base import Course, Units
from hydra_pipe.reduction.solvers.result import ResultSolver
from hydra_pipe.replay.lowrank import basis_of, corrected
from hydra_pipe.replay.products import batch_of, check_twice_differentiable
from hydra_pipe.replay.sweep import ExactSweep, moving
from hydra_pipe.replay.testing import test_gradients
from hydra_pipe.replay.trajectory import Trajectory, restore, training_state
from hydra_pipe.replay.updates import state_shapes
from hydra_pipe.store import names
from hydra_pipe.store.data.relevance import open_relevance, read_relevance, write_relevance
from hydra_pipe.store.data.save_interval import SaveInterval
from hydra_pipe.store.data.sweep_state import load_state, remove_state, remove_states, save_state
from hydra_pipe.store.disk_space import room_for
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.training.batches import Samples, epoch_order
from hydra_pipe.training.pipeline import Pipeline
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes, format_seconds, resident_bytes

# Bytes of the batch graphs that are worked on at once, one for each column. On a CPU they should
# stay in its caches. On a GPU they should fill it.
_CACHE_BYTES = {"cpu": 2**26, "cuda": 2**31}
# Allowed difference of a replayed loss: training amplifies differences by rounding. The first is
# relative to the recorded loss, the second absolute.
_LOSS_RELATIVE, _LOSS_ABSOLUTE = 0.02, 1e-3


class Replay(ResultSolver[ReplayPlan]):
    """Solver that trains a recorded run again, and sweeps back over its steps.

    Args:
        request: the reduction that is asked for.
        load: function that builds the pipeline of the run, untrained.
    """

    divided_by_memory = True

    def __init__(self, request: ReductionRequest, load: Callable[[], Pipeline]) -> None:
        super().__init__(request)
        self._load = load
        self._pipeline: Pipeline | None = None
        self._n_steps = request.gradients.n_steps
        self._recorded = request.gradients.step_table(names.LOSS)
        self._recorded_tests = request.tested.losses(request.gradients)[request.columns.test_ids]
        # the largest difference between a loss and the recorded one
        self._off = 0.0

    # ------------------------------------------------------------------ planning

    def given(self, workers: Workers) -> ReductionInput:
        """See `CommonSolver`. The memory of training is included.

        Raises:
            HydraError: the pipeline cannot be built.
        """
        if self._pipeline is None:
            self._pipeline = self._load()
            self._trajectory = Trajectory(self._pipeline, self._n_steps)
            self._sizes, self._seconds = _measured(self._pipeline, self.request.columns.n_columns)
            # after a first step, so that the data and the memory of torch are included
            self._resident_bytes = resident_bytes()
        return super().given(replace(workers, resident_bytes=self._resident_bytes))

    def plan(self, given: ReductionInput, after: Answered | None) -> ReplayPlan:
        """See `CommonSolver`."""
        whole = self._plan(ReplayInput(given, self._n_steps, **self._sizes))
        return whole.after(0 if after is None else after.done)

    def _plan(self, what: ReplayInput) -> ReplayPlan:
        found = plan_replay(what)
        return replace(found, picoseconds=self._lasting(found))

    def _lasting(self, plan: ReplayPlan) -> int:
        """Estimate the picoseconds of a plan from the measured time of a first step."""
        train, column = self._seconds
        seconds = self._n_steps * (
            train * (1 + plan.levels) * len(plan.carried) + column * plan.carried[-1][1]
        )
        return int(seconds * 1e12)

    def most(self, answered: Answered) -> int:
        """See `ResultSolver`."""
        return self.request.columns.n_columns

    def conclude(self) -> None:
        """See `Solver`. Remove states of column blocks that an earlier budget had planned."""
        remove_states(self.target)

    # ------------------------------------------------------------------ words

    def units(self, given: ReductionInput, plan: ReplayPlan) -> Units:
        """See `Solver`. Each training counts its rows once, the way back once for each column.

        One column takes about as long as one training.
        """
        carried = sum(last - first for first, last in plan.carried)
        return Units(given.n_read, given.n_rows * (plan.levels * plan.passes + carried), "rows")

    def describe(self, course: Course[ReplayPlan]) -> dict[str, str]:
        """See `Solver`."""
        return self.lines(course) | {
            "written": room_for(course.plan.written_bytes, self.directory.path)
        }

    def summary(self, course: Course[ReplayPlan]) -> str:
        """See `Solver`."""
        return ", ".join(f"{name}: {value}" for name, value in self.lines(course).items())

    def lines(self, course: Course[ReplayPlan]) -> dict[str, str]:
        """Describe the plan for people: a name and a value for each line."""
        given, plan, whole = course.given, course.plan, course.whole
        of = "groups of test samples" if given.grouped else "test gradients"
        n, width = whole.carried[-1][1], whole.carried[0][1]
        return {
            "steps": (
                f"{self._n_steps:,}, trained {plan.levels} times in each pass, "
                f"{plan.most_states:,} states kept a level"
            ),
            "columns": (
                f"{n:,} {of}, {width:,} in each pass, {plan.at_once:,} through a step's graph at "
                "once"
            ),
            "passes": f"{plan.passes:,}",
            "peak memory": (
                f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
            ),
            "time": f"about {format_seconds(plan.picoseconds / 1e12)}, as a first step took",
        }

    # ------------------------------------------------------------------ the work

    def passes(
        self, course: Course[ReplayPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`. A pass finds the largest difference between a loss and the recorded one."""
        job = self.job(course.plan, course.given)
        for columns in course.plan.columns:
            yield columns, delayed(self._pass, pure=False)(job, columns, count_rows)

    def _pass(self, job: ReductionJob[ReplayPlan], columns: Span, count_rows: CountRows) -> Found:
        count = self._counter(count_rows)
        self._trajectory.forward(job.plan.most_states, count)
        gradients = self._gradients(job, job.averages(), columns)
        sums = self._sweep(job, columns, gradients, count_rows, count, {})
        array = Array.open(job.relevance)
        for low in range(0, job.n_samples, SAMPLE_MULTIPLE):
            write_relevance(
                array, low, columns[0], (-sums[low : low + SAMPLE_MULTIPLE]).astype(np.float32)
            )
        remove_state(job.relevance, columns)
        return {names.LOSS_DIFFERENCE: self._off}

    def _gradients(
        self, job: ReductionJob[ReplayPlan], averages: NDArray[np.float32] | None, columns: Span
    ) -> list[Tensor]:
        """Return the test gradients at the end of training, one tensor (column, ...) a parameter.

        Compares the test losses with the recorded ones.
        """
        pipeline, ids = self._pipeline, self.request.columns.test_ids
        assert pipeline is not None
        found = test_gradients(pipeline, moving(pipeline), ids, averages, columns, job.plan.at_once)
        for place, (now, then) in enumerate(
            zip(found.losses.tolist(), self._recorded_tests.tolist(), strict=True)
        ):
            self._hold(now, then, f"the loss of test sample {ids[place]}")
        return found.gradients

    def _sweep(
        self,
        job: ReductionJob[ReplayPlan],
        columns: Span,
        gradients: list[Tensor],
        count_rows: CountRows,
        count: Callable[[int, float, int], None],
        beside: dict[str, NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """Return d l_j / d w_i for the losses l_j of the given gradients, shape (sample, column).

        The arrays `beside` are saved with the state of the sweep. If the sweep resumes, `beside`
        is updated in place with the saved arrays.
        """
        assert self._pipeline is not None
        sweep = ExactSweep(self._pipeline, gradients, job.n_samples, job.plan.at_once)
        width = len(gradients[0])
        first = self._go_on(job, columns, sweep, beside)
        if first < self._n_steps:
            count_rows(width * int(self.request.gradients.rows_of_steps()[1][first:].sum()))
        pace = SaveInterval()
        for step in self._trajectory.backward(first, count):
            sweep.step(step)
            count_rows(width * len(step.ids))
            if pace.due:
                with pace.keeping():
                    save_state(
                        job.relevance, columns, {"step": step.number}, sweep.arrays() | beside
                    )
        return sweep.sums

    def _go_on(
        self,
        job: ReductionJob[ReplayPlan],
        columns: Span,
        sweep: ExactSweep,
        beside: dict[str, NDArray[np.float64]],
    ) -> int:
        """Restore a saved sweep and the arrays `beside` it. Return the number of steps left."""
        found = load_state(job.relevance, columns, sweep.arrays() | beside)
        if found is None or not is_count(found[0].get("step")) or found[0]["step"] > self._n_steps:
            return self._n_steps
        sweep.restore(found[1])
        beside |= {name: found[1][name].astype(np.float64) for name in beside}
        return int(found[0]["step"])

    def _counter(self, count_rows: CountRows) -> Callable[[int, float, int], None]:
        def after_step(number: int, loss: float, n_rows: int) -> None:
            self._hold(loss, float(self._recorded[number]), f"the loss of step {number}")
            count_rows(n_rows)

        return after_step

    def _hold(self, now: float, then: float, what: str) -> None:
        """Refuse a training that differs from the recorded one. Raises: RunError."""
        difference = abs(now - then)
        self._off = max(self._off, difference)
        if not difference <= _LOSS_RELATIVE * abs(then) + _LOSS_ABSOLUTE:
            raise RunError(
                f"{self.request.directory.path}: {what} is {now:.6g} now, and was {then:.6g} when "
                "it was recorded: training does not come out the same. Check that the pipeline's "
                "file and its data are unchanged, and that a Pipeline object is newly built"
            )


def _measured(pipeline: Pipeline, n_columns: int) -> tuple[dict[str, int], tuple[float, float]]:
    """Measure a first step for the plan of a replay. Restores the state of training afterwards.

    Returns:
        Sizes by their names in `ReplayInput`. Then two times in seconds: building the graph of the
        step, and passing one column through the graph.
    """
    state = training_state(pipeline, 0)
    parameters = moving(pipeline)
    order = epoch_order(pipeline, 0)
    with closing(Samples(pipeline, "train").batches(order[:1])) as batches:
        _, inputs, targets = next(batches)
    batch_bytes = sum(values.nbytes for values in tree_leaves((inputs, targets)))
    device = parameters[0].device
    inputs, targets = on_device(inputs, device), on_device(targets, device)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # warm up before timing: the first call of each operation takes longer
    check_twice_differentiable(batch_of(pipeline, parameters, inputs, targets))
    start = time.monotonic()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        batch = batch_of(pipeline, parameters, inputs, targets)
    train = time.monotonic() - start
    own = {p.untyped_storage().data_ptr() for p in parameters}
    graph_bytes = sum(n for storage, n in saved.items() if storage not in own)
    columns = max(1, min(4, n_columns))
    vectors = [torch.ones(columns, *p.shape, dtype=p.dtype, device=device) for p in parameters]
    batch.products(vectors, columns)
    start = time.monotonic()
    batch.products(vectors, columns)
    column = (time.monotonic() - start) / columns
    restore(pipeline, state)
    parameter_bytes = sum(p.nbytes for p in parameters)
    optimizer = pipeline.optimizer
    owners = owners_of_groups(optimizer)
    n_of_state = max(
        len(state_shapes(owner, group, p.shape))
        for owner, group in zip(owners, optimizer.param_groups, strict=True)
        for p in group["params"]
    )
    beside = sum(b.nbytes for b in pipeline.model.buffers())
    # the saved states of the random generators take some 30 KB
    state_bytes = (1 + n_of_state) * parameter_bytes + beside + 2**15
    cache_bytes = _CACHE_BYTES.get(device.type, _CACHE_BYTES["cuda"])
    sizes = {
        "parameter_bytes": parameter_bytes,
        "n_states": n_of_state,
        "state_bytes": state_bytes,
        "batch_bytes": batch_bytes,
    }
    return sizes | {"graph_bytes": graph_bytes, "cache_bytes": cache_bytes}, (train, column)


class LowRankReplay(Replay):
    """Solver that replays a few directions of the test gradients (replay/lowrank.py).

    An approximation answers for the rest of the test gradients.

    Args:
        request: the reduction that is asked for.
        load: function that builds the pipeline of the run, untrained.
        rank: number of directions.
        approximation: name of the relevance array that answers for the rest.
    """

    def __init__(
        self, request: ReductionRequest, load: Callable[[], Pipeline], rank: int, approximation: str
    ) -> None:
        super().__init__(request, load)
        self._rank, self._approximation = min(rank, request.columns.n_columns), approximation

    def _plan(self, what: ReplayInput) -> ReplayPlan:
        given = what.recording
        # three copies of the test gradients: as they are, divided by their norms, and mixed
        beside = (
            3 * given.n_tests * what.parameter_bytes + 4 * 8 * given.n_samples * given.n_columns
        )
        few = replace(given, n_columns=self._rank, memory_bytes=given.memory_bytes - beside)
        found = super()._plan(replace(what, recording=few))
        if len(found.carried) > 1:
            raise BudgetError(
                f"--rank {self._rank}: not all directions fit {format_bytes(given.memory_bytes)} "
                "at once: raise --memory, "
                f"or lower the rank to {found.carried[0][1]}"
            )
        peak_bytes, written_bytes = found.peak_bytes + beside, given.n_samples * given.n_columns * 4
        return replace(
            found,
            columns=((0, given.n_columns),),
            peak_bytes=peak_bytes,
            written_bytes=written_bytes,
        )

    def _pass(self, job: ReductionJob[ReplayPlan], columns: Span, count_rows: CountRows) -> Found:
        count = self._counter(count_rows)
        self._trajectory.forward(job.plan.most_states, count)
        basis = basis_of(self._gradients(job, None, columns), self._rank)
        # saved with the sweep: a resumed sweep continues with the directions that it began with,
        # and a second decomposition may give other ones
        beside = {"mixing": basis.mixing, "coefficients": basis.coefficients}
        exact = -self._sweep(job, columns, basis.vectors, count_rows, count, beside)
        basis = replace(basis, mixing=beside["mixing"], coefficients=beside["coefficients"])
        approximate = read_relevance(
            open_relevance(job.relevance.parent, self._approximation), slice(None)
        )
        values = corrected(approximate, exact, basis).astype(np.float32)
        array = Array.open(job.relevance)
        for low in range(0, job.n_samples, SAMPLE_MULTIPLE):
            write_relevance(array, low, 0, values[low : low + SAMPLE_MULTIPLE])
        remove_state(job.relevance, columns)
        return {names.LOSS_DIFFERENCE: self._off, names.GRADIENTS_HELD: basis.held}

    def lines(self, course: Course[ReplayPlan]) -> dict[str, str]:
        """See `Replay`."""
        return {
            "directions": f"{self._rank} of the test gradients, the rest by {self._approximation}"
        } | super().lines(course)
