"""The table of kinds of evaluation, without torch. Options are refused before torch loads."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hydra_pipe.errors import UsageError, shown
from hydra_pipe.store.run.results import GROUPINGS

if TYPE_CHECKING:
    from hydra_pipe.evaluation.evaluator import Evaluator

# Least value of options that are numbers.
_LEAST = {"retrainings": 10, "seeds": 1}


@dataclass(frozen=True)
class Options:
    """Choices of a user, each None where the kind of evaluation is to choose.

    Args:
        samples: ids of the samples to leave out, such as "0-99,150".
        retrainings: number of random subsets to train on.
        seeds: number of initial weights and orders for each training set.
        methods: names of relevance arrays with commas between them.
        left_out: numbers of samples to leave out, as shares of the number of wrong labels.
        drop: share of the training samples to leave out, or the largest share.
        tests: ids of the test samples to ask about, such as "0-99,150".
        by: grouping of the test samples to ask about, "label" or "mean".
    """

    samples: str | None = None
    retrainings: int | None = None
    seeds: int | None = None
    methods: str | None = None
    left_out: str | None = None
    drop: float | None = None
    tests: str | None = None
    by: str | None = None

    def given(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the value of each option that is not None."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation.

    Args:
        name: word after `evaluate RUN`.
        options: names of the `Options` that the kind takes.
        evaluator: module and class that do the work.
    """

    name: str
    options: tuple[str, ...]
    evaluator: str

    def check(self, options: Options) -> None:
        """Refuse options that the kind does not take.

        Raises:
            UsageError: an option of another kind is given, or a value is not possible.
        """
        for name, value in options.given():
            if name not in self.options:
                takers = ", ".join(kind.name for kind in KINDS.values() if name in kind.options)
                spelled = name.replace("_", "-")
                raise UsageError(
                    f"--{spelled} is no option of evaluate {self.name}, but of {takers}"
                )
            if name in _LEAST and value < _LEAST[name]:
                raise UsageError(f"--{name} {value}: give {_LEAST[name]} or more")
        if options.drop is not None and not 0.0 < options.drop < 1.0:
            raise UsageError(
                f"--drop {options.drop:g}: give a share of the training samples between 0 and 1, "
                "such as 0.01"
            )
        if options.by is not None and options.by not in GROUPINGS:
            raise UsageError(f"--by {shown(options.by)}: give {' or '.join(GROUPINGS)}")

    def load(self) -> "Evaluator":
        """Import torch and the class that does the work."""
        module, name = self.evaluator.split(":")
        evaluator: Evaluator = getattr(import_module(module), name)()
        return evaluator


KINDS = {
    kind.name: kind
    for kind in (
        Kind("loo", ("samples", "methods"), "hydra_pipe.evaluation.loo:LeaveOneOut"),
        Kind(
            "lds",
            ("retrainings", "seeds", "methods", "drop"),
            "hydra_pipe.evaluation.lds:DatamodelScore",
        ),
        Kind(
            "qld",
            ("seeds", "methods", "drop", "tests", "by"),
            "hydra_pipe.evaluation.qld:QueryLoss",
        ),
        Kind("subset", ("methods", "drop", "tests"), "hydra_pipe.evaluation.subset:SmallestSubset"),
        Kind("noise", ("methods", "left_out"), "hydra_pipe.evaluation.noise:WrongLabels"),
        Kind("smoothness", (), "hydra_pipe.evaluation.smoothness:Smoothness"),
        Kind("approximation", (), "hydra_pipe.evaluation.approximation:Approximation"),
    )
}


def kind_of(name: str) -> Kind:
    """Return the kind of evaluation called `name`.

    Raises:
        UsageError: there is no such kind.
    """
    if name not in KINDS:
        raise UsageError(
            f"evaluate {name}: there is no such kind, choose one of {', '.join(KINDS)}"
        )
    return KINDS[name]
