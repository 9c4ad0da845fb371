"""What a reduction is asked for: options, a method, and a recording that it can be computed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reduction.executors.base import Scheduler
from hydra_pipe.reduction.solvers.base import Solver
from hydra_pipe.reduction.weights import Ints, RowUse
from hydra_pipe.store import names
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.probes import WhichTests
from hydra_pipe.store.relevance import Columns
from hydra_pipe.store.results import ResultName
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import KEEP, REDUCE, Settings, StageId


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user asks of a reduction, as text: see `hydra_pipe.reduce`."""

    method: str = "hydra"
    chunks: str = "auto"
    memory: str = "4GiB"
    scheduler: str = "threads"
    tests: str | None = None
    by: str | None = None
    keep_hypergradients: bool = False
    upto: int | None = None
    rank: int | None = None
    test: str | None = None


@dataclass(frozen=True)
class Method:
    """What a method needs and gives.

    Args:
        name: name, as users write it.
        solvers: solvers that one request of the method is carried out by, one after the other. None: the method trains again, and
            `replay/` makes its solver.
        rows: rows that count, and what each counts with.
        check_kept: check of hypergradients that were kept against the recording. None: the method keeps none.
        on_the_way: whether test gradients that were taken on the way are used, beside the last ones.
        of_tests: whether the method has anything to do with test samples.
        refuses: options that mean nothing to the method, each with the reason.
        sign, unit: sign and unit of the relevance, in words.
    """

    name: str
    solvers: "Callable[[Request], Sequence[Solver]] | None"
    rows: RowUse
    check_kept: "Callable[[Request], None] | None" = None
    on_the_way: bool = False
    of_tests: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    sign: str = names.SIGN_TEXT
    unit: str = names.UNIT_TEXT


@dataclass(frozen=True)
class Request:
    """A reduction that can be: checked options, and a complete recording, or the first steps of one.

    Args:
        directory: the run.
        gradients: its recording.
        n_samples: number of training samples.
        method: method that is asked for.
        tested: test gradients that are used, the last ones where several are.
        checkpoints: steps of all test gradients that are used, ascending.
        columns: columns of the result.
        groups: group of each test sample, shape (test,), where columns are their means.
        last: the last row of each sample, where the method looks at no others; else None.
        options: options, as given.
        scheduler: executor that is to compute it, not entered yet.
    """

    directory: RunDirectory
    gradients: Gradients
    n_samples: int
    method: Method
    tested: WhichTests
    checkpoints: tuple[int, ...]
    columns: Columns
    groups: NDArray[np.int64] | None
    last: Ints | None
    options: Options
    scheduler: Scheduler

    @property
    def name(self) -> str:
        """Name of the result."""
        options = self.options
        return str(ResultName(options.method, options.by, options.upto, options.rank, options.test))

    @property
    def stage(self) -> StageId:
        """The stage that computes the result."""
        return REDUCE.of(self.name)

    @property
    def settings(self) -> Settings:
        """What the result depends on."""
        selected = {} if self.options.tests is None else {"tests": self.columns.to_attributes()[names.TESTS]}
        first = {} if self.options.upto is None else {names.UPTO: self.options.upto}
        tested = {"checkpoint": self.tested.step} if self.method.of_tests else {}
        return tested | selected | first

    @property
    def kept(self) -> Path:
        """Path of the method's hypergradients, whether they are there or not."""
        return self.directory.path / self.keep_stage.area

    @property
    def keep_stage(self) -> StageId:
        """The stage that keeps them."""
        return KEEP.of(self.method.name)

    @property
    def has_kept(self) -> bool:
        """Whether kept hypergradients answer the request."""
        # what is kept is of all steps
        if self.options.keep_hypergradients or self.options.upto is not None or self.method.check_kept is None:
            return False
        return self.method.name in self.directory.complete(KEEP)
