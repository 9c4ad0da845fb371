"""The methods, and what each of them needs and gives: nothing else in the reduction asks for a method by its name."""

from dataclasses import dataclass
from typing import Literal

from hydra_pipe.errors import UsageError
from hydra_pipe.store import names

# sum: of weighted rows, in any order; sweep: through the steps, backward; solve: of a linear system; replay: train again
Work = Literal["sum", "sweep", "solve", "replay"]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: as users write it.
        work: that it is.
        keeps: whether it has what does not depend on the tests (hypergradients): sums of rows, or a sweep of each feature.
        last_rows: whether it looks at the last row of each sample, and at no other.
        on_the_way: whether it uses the test gradients that were taken on the way, beside the last ones.
        of_tests: whether it has anything to do with test samples.
        cosine: whether rows and test gradients are divided by their norms.
        sign, unit: of what it gives, in words.
    """

    name: str
    work: Work = "sum"
    keeps: bool = False
    last_rows: bool = False
    on_the_way: bool = False
    of_tests: bool = True
    cosine: bool = False
    sign: str = names.SIGN_TEXT
    unit: str = names.UNIT_TEXT


_METHODS = (
    Method("hydra", keeps=True),
    Method("hydra-fisher", work="sweep", keeps=True),
    Method("hydra-exact", work="replay"),
    Method("tracin", on_the_way=True),
    Method("grad-dot", last_rows=True, unit="test loss times training loss, over parameter squared"),
    Method("grad-cos", last_rows=True, cosine=True, unit="cosine, from -1 to 1"),
    Method("influence", work="solve", last_rows=True),
    Method(
        "self",
        of_tests=False,
        sign="positive: its own steps have lowered the training sample's loss, all the more the larger its gradients were",
        unit="training loss",
    ),
)
METHODS = {method.name: method for method in _METHODS}


def method_named(name: str) -> Method:
    """The method called `name`. Raises: UsageError: there is none."""
    if name not in METHODS:
        raise UsageError(f"--method {name} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]
