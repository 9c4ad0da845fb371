"""Models as the recorder describes them, whose layouts several tests choose."""

from hypothesis import settings
from hypothesis import strategies as st

from hydra_pipe.plan.layout import (
    ENCODING_CHOICES,
    Parameter,
)

EVERY = settings(max_examples=100, deadline=None)


def linear(
    name: str, inputs: int, outputs: int, bias: bool = True, group: int = 0
) -> list[Parameter]:
    """A Linear with one position a sample, as the recorder describes it after the first step."""
    weight = Parameter(f"{name}.weight", (outputs, inputs), group, factors=(outputs, inputs))
    return [weight] + (
        [Parameter(f"{name}.bias", (outputs,), group, bias_of=weight.name)] if bias else []
    )


def other(name: str, *shapes: tuple[int, ...], group: int = 0) -> list[Parameter]:
    """A convolution, a norm, an embedding: parameters without factors."""
    return [Parameter(f"{name}.{i}", shape, group) for i, shape in enumerate(shapes)]


LENET5 = [
    *other("conv1", (6, 1, 5, 5), (6,)),
    *other("conv2", (16, 6, 5, 5), (16,)),
    *linear("fc1", 400, 120),
    *linear("fc2", 120, 84),
    *linear("fc3", 84, 10),
]


MLP = [*linear("0", 784, 512), *linear("2", 512, 512), *linear("4", 512, 10)]


@st.composite
def models(draw: st.DrawFn) -> list[Parameter]:
    """Modules of all kinds, their parameters in any order."""
    widths = st.one_of(st.integers(1, 4), st.integers(1, 200))
    parameters: list[Parameter] = []
    for i in range(draw(st.integers(1, 5))):
        group = draw(st.integers(0, 1))
        if draw(st.booleans()):
            parameters += linear(f"m{i}", draw(widths), draw(widths), draw(st.booleans()), group)
        else:
            shapes = draw(st.lists(st.lists(widths, max_size=2).map(tuple), min_size=1, max_size=2))
            parameters += other(f"m{i}", *shapes, group=group)
    return draw(st.permutations(parameters)) if draw(st.booleans()) else parameters


CHOICES = st.sampled_from(ENCODING_CHOICES)


SPARE_COLUMNS = st.one_of(st.integers(0, 20), st.integers(0, 2000))
