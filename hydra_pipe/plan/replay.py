"""Plan of method `hydra-exact`: columns that are carried together, and states that are kept.

A pass trains the run again and keeps the training state now and then. Then it goes back over the
run, and trains each piece between two states again. With L levels of at most k states each,
k^L >= T, a pass takes L trainings and L k states in memory. The more levels, the fewer states,
and the more columns fit beside the states.
"""

import math
from dataclasses import dataclass, replace

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import even_width
from hydra_pipe.plan.costs import suggested
from hydra_pipe.plan.records import ColumnPlan, ReductionInput, common_bytes, spans
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes

# Vectors of a column beside the adjoints of the training state: the adjoint of the gradient
# before and after clipping, intermediate results of the optimiser's adjoint, the product with
# the Hessian, and the copy that is written when all are kept.
_PASSING = 6
# Bytes that a vectorised pass through a graph takes for each column, over the bytes that the
# graph has saved.
_GRAPH_TIMES = 4
# Share of the budget that training states may take.
_SHARE_OF_STATES = 0.4
_MOST_LEVELS = 14


@dataclass(frozen=True)
class ReplayInput:
    """Sizes and budget of a replay.

    Args:
        recording: sizes and budget.
        n_steps: number of steps that are replayed.
        parameter_bytes: bytes of all parameters that training moves.
        n_states: optimiser states of each parameter, such as 1 of SGD and 2 of Adam.
        state_bytes: bytes of the state from which training resumes.
        batch_bytes: bytes of a step's inputs and targets.
        graph_bytes: bytes that the graph of a batch's loss and gradient saves.
        cache_bytes: bytes of graphs up to which working on several at once pays off.
    """

    recording: ReductionInput
    n_steps: int
    parameter_bytes: int
    n_states: int
    state_bytes: int
    batch_bytes: int
    graph_bytes: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class ReplayPlan(ColumnPlan):
    """Plan of the passes of a replay.

    Args:
        columns: columns of the result that each pass answers.
        carried: vectors that each pass carries back: columns, or directions that stand for columns.
        at_once: vectors that go through a batch's graph together.
        levels: levels of kept states, and trainings that a pass takes.
        most_states: states of each level.
    """

    carried: tuple[Span, ...]
    at_once: int
    levels: int
    most_states: int

    @property
    def passes(self) -> int:
        return len(self.columns)

    @property
    def tasks(self) -> int:
        return len(self.columns)

    def after(self, done: int) -> "ReplayPlan":
        """Return the plan of the columns that are left after the first `done` columns."""
        left = tuple((max(low, done), high) for low, high in self.columns if high > done)
        picoseconds = self.picoseconds * len(left) // len(self.columns)
        carried = self.carried[len(self.columns) - len(left) :]
        return replace(self, columns=left, carried=carried, picoseconds=picoseconds)


def plan_replay(what: ReplayInput) -> ReplayPlan:
    """Return the plan with the fewest passes and trainings that fit the budget.

    Raises:
        BudgetError: not even one column fits.
    """
    given = what.recording
    ways = [(levels, _root(what.n_steps, levels)) for levels in range(2, _MOST_LEVELS + 1)]

    def bytes_of(way: tuple[int, int]) -> int:
        return way[0] * way[1] * (what.state_bytes + what.batch_bytes)

    small = [way for way in ways if bytes_of(way) <= _SHARE_OF_STATES * given.memory_bytes]
    levels, most = small[0] if small else min(ways, key=bytes_of)
    fixed = common_bytes(given, 0) + bytes_of((levels, most))
    column_graph = _GRAPH_TIMES * what.graph_bytes
    # Graphs that stay in the caches are fast. Graphs get a quarter of the memory that is left at
    # most, columns get the rest.
    worth = min(
        what.cache_bytes // max(1, what.graph_bytes),
        (given.memory_bytes - fixed) // (4 * max(1, column_graph)),
    )
    at_once = max(1, min(given.n_columns, worth))
    fixed += (at_once + 1) * column_graph
    each = (1 + what.n_states + _PASSING) * what.parameter_bytes + given.n_samples * 8 * 4
    most_columns = (given.memory_bytes - fixed) // each
    if most_columns < 1:
        peak = fixed + each
        raise BudgetError(
            f"hydra-exact of one column, {what.n_steps:,} steps of "
            f"{what.parameter_bytes // 2**10:,} KiB of parameters, needs "
            f"{format_bytes(peak)}, --memory is {format_bytes(given.memory_bytes)}: raise "
            f"--memory to {suggested(peak)}"
        )
    passes = -(-given.n_columns // most_columns)
    while (width := min(even_width(given.n_columns, passes), given.n_columns)) > most_columns:
        passes += 1
    columns = spans(0, given.n_columns, width)
    return ReplayPlan(
        order="backward",
        workers=1,
        columns=columns,
        carried=columns,
        at_once=min(at_once, width),
        levels=levels,
        most_states=most,
        peak_bytes=fixed + width * each,
        written_bytes=given.n_samples * given.n_columns * 4,
    )


def _root(n_steps: int, levels: int) -> int:
    """Return the least k of 2 or more with k^levels >= n_steps."""
    k = max(2, math.ceil(math.exp(math.log(n_steps) / levels)))
    while k > 2 and (k - 1) ** levels >= n_steps:
        k -= 1
    while k**levels < n_steps:
        k += 1
    return k
