"""Requests of a reduction: options, a method, and a recording to compute the result from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reduction.executors.base import Scheduler
from hydra_pipe.reduction.solvers.base import Solver
from hydra_pipe.reduction.weights import RowUse
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, Rank, ResultName
from hydra_pipe.store.run.stages import KEEP, Settings, StageId, reduces_to
from hydra_pipe.types import I64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a reduction, as the user gives them. See `hydra_pipe.reduce`."""

    method: str = DEFAULT_METHOD
    chunks: str = "auto"
    memory: str = "4GiB"
    scheduler: str = "threads"
    tests: str | None = None
    by: str | None = None
    keep_hypergradients: bool = False
    up_to_step: int | None = None
    rank: Rank | None = None
    probe: str | None = None
    top: int | None = None


@dataclass(frozen=True)
class Method:
    """Needs and results of a method.

    Args:
        name: name, as users write it.
        solvers: function that returns the solvers of a request, in the order in which they work.
            None: the method trains again, and `replay/` makes its solver.
        rows: rows that count, and their weights.
        check_kept: check of kept hypergradients against the recording. None: the method keeps none.
        on_the_way: True if the method also uses test gradients from before the end of training.
        of_tests: True if the method uses test samples.
        refuses: options that mean nothing to the method, each with the reason.
        sign: sign of the relevance, in words.
        unit: unit of the relevance, in words.
    """

    name: str
    solvers: "Callable[[ReductionRequest], Sequence[Solver]] | None"
    rows: RowUse
    check_kept: "Callable[[ReductionRequest], None] | None" = None
    on_the_way: bool = False
    of_tests: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    sign: str = names.SIGN_TEXT
    unit: str = names.UNIT_TEXT


@dataclass(frozen=True)
class ReductionRequest:
    """A possible reduction: checked options, and a complete recording or the first steps of one.

    Args:
        directory: the run.
        gradients: its recording.
        n_samples: number of training samples.
        method: method that is asked for.
        tested: test gradients that are used, the last ones if there are several.
        checkpoints: steps of all test gradients that are used, ascending.
        columns: columns of the result.
        groups: group of each test sample, shape (test,), int64, if columns are means of groups.
            Else None.
        last: the last row of each sample, if the method uses no other rows. Else None.
        options: options, as given.
        scheduler: executor that computes the reduction, not entered yet.
    """

    directory: RunDirectory
    gradients: Gradients
    n_samples: int
    method: Method
    tested: WhichTests
    checkpoints: tuple[int, ...]
    columns: ResultColumns
    groups: NDArray[np.int64] | None
    last: I64 | None
    options: Options
    scheduler: Scheduler

    @property
    def name(self) -> str:
        """Name of the result."""
        options = self.options
        return str(
            ResultName(
                options.method,
                options.by,
                options.up_to_step,
                options.rank,
                options.probe,
                options.top is not None,
            )
        )

    @property
    def stage(self) -> StageId:
        """The stage that computes the result."""
        return reduces_to(self.name)

    @property
    def settings(self) -> Settings:
        """Settings that the result depends on."""
        selected = (
            {}
            if self.options.tests is None
            else {"tests": self.columns.to_attributes()[names.TESTS]}
        )
        first = {} if self.options.up_to_step is None else {names.UPTO: self.options.up_to_step}
        tested = {"checkpoint": self.tested.step} if self.method.of_tests else {}
        top = {} if self.options.top is None else {names.TOP: self.options.top}
        return tested | selected | first | top

    @property
    def kept(self) -> Path:
        """Path of the method's hypergradients, which may not exist."""
        return self.directory.path / self.keep_stage.area

    @property
    def keep_stage(self) -> StageId:
        """The stage that keeps the method's hypergradients."""
        return KEEP.of(self.method.name)

    @property
    def has_kept(self) -> bool:
        """True if kept hypergradients answer the request."""
        # kept hypergradients count all steps and all features, so they cannot answer --up-to-step,
        # and would not be what --rank K asks for
        if (
            self.options.keep_hypergradients
            or self.options.up_to_step is not None
            or isinstance(self.options.rank, int)
            or self.method.check_kept is None
        ):
            return False
        return self.method.name in self.directory.complete(KEEP)
