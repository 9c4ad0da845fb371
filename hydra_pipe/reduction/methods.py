"""The table of methods: needs, results, solvers. No other module asks for a method by its name."""

from collections.abc import Callable

from hydra_pipe.errors import UsageError
from hydra_pipe.reduction.request import Method, ReductionRequest
from hydra_pipe.reduction.solvers.base import Solver
from hydra_pipe.reduction.solvers.from_matrix import check_matrix
from hydra_pipe.reduction.solvers.hypergradient_matrix import fisher_solvers
from hydra_pipe.reduction.solvers.influence import Influence
from hydra_pipe.reduction.solvers.sums import SquaredSums, WeightedSums, check_sums
from hydra_pipe.reduction.weights import (
    RowUse,
    gradient_weights,
    hydra_weights,
    self_weights,
    tracin_weights,
)


def _one(
    solver: Callable[[ReductionRequest], Solver],
) -> Callable[[ReductionRequest], list[Solver]]:
    """Return a function that gives one solver for every request."""
    return lambda request: [solver(request)]


_NO_PIPELINE = {"--pipeline": "needs none", "dataset": "needs none"}
_NO_TRAINING = _NO_PIPELINE | {"--rank": "does not need it"}
_EACH_ROW_ONCE = {"--keep-hypergradients": "reads each row only once"}
_NO_TESTS = dict.fromkeys(
    ("--tests", "--by", "--mean", "--probe", "--top"),
    "has one value for each training sample, and no test samples",
)

_METHODS = (
    Method("hydra", _one(WeightedSums), RowUse(hydra_weights), check_sums, refuses=_NO_TRAINING),
    Method(
        "hydra-fisher",
        fisher_solvers,
        RowUse(hydra_weights),
        check_matrix,
        refuses=_NO_PIPELINE,
    ),
    Method(
        "hydra-exact",
        None,
        RowUse(hydra_weights),
        refuses={
            "--keep-hypergradients": "has none that hold for other test samples",
            "--chunks": "reads no rows",
            "--top": "replays the training for every pair",
        },
    ),
    Method(
        "tracin",
        _one(WeightedSums),
        RowUse(tracin_weights),
        on_the_way=True,
        refuses=_NO_TRAINING | {"--keep-hypergradients": "weighs rows in another way"},
    ),
    Method(
        "grad-dot",
        _one(WeightedSums),
        RowUse(gradient_weights, last=True),
        refuses=_NO_TRAINING | _EACH_ROW_ONCE,
        unit="test loss times training loss, over parameter squared",
    ),
    Method(
        "grad-cos",
        _one(WeightedSums),
        RowUse(gradient_weights, last=True, cosine=True),
        refuses=_NO_TRAINING | _EACH_ROW_ONCE,
        unit="cosine, from -1 to 1",
    ),
    Method(
        "influence",
        _one(Influence),
        RowUse(gradient_weights, last=True),
        refuses=_NO_TRAINING
        | _EACH_ROW_ONCE
        | {"--chunks": "chooses by the memory beside its matrix"},
    ),
    Method(
        "self",
        _one(SquaredSums),
        RowUse(self_weights),
        of_tests=False,
        refuses=_NO_TRAINING | _EACH_ROW_ONCE | _NO_TESTS,
        sign=(
            "positive: its own steps have lowered the training sample's loss, all the more the "
            "larger its gradients were"
        ),
        unit="training loss",
    ),
)
METHODS = {method.name: method for method in _METHODS}


def method_named(name: str) -> Method:
    """Return the method called `name`. Raises: UsageError: there is none."""
    if name not in METHODS:
        raise UsageError(f"--method {name} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]
