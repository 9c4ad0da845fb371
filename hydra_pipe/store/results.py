"""Names of results: which relevance an array of `relevance.zarr` and the stages made of it are about."""

from dataclasses import dataclass, replace
from typing import Final, Self

from hydra_pipe.errors import UsageError

# groupings of test samples: a column is the mean of each label's, or of all
BY_LABEL, MEAN = "label", "mean"
GROUPINGS = (BY_LABEL, MEAN)
# the method whose one column is each training sample's relevance for itself, and is of no test sample
ITSELF = "self"
DEFAULT_METHOD: Final = "hydra"
_SUFFIXES = {BY_LABEL: "-by-label", MEAN: "-mean"}
# what stands between a method and its first steps, its directions, and the probe that it was computed for
_UPTO, _RANK, _OF = "-upto-", "-rank-", "-of-"


@dataclass(frozen=True)
class ResultName:
    """A result, as its name tells it.

    `str` gives the name: "hydra"; for means over test samples "hydra-by-label", "hydra-mean"; of the first steps only
    "hydra-upto-120", "hydra-upto-120-mean"; of some directions "hydra-exact-rank-20"; for the test samples of the probe `test`,
    whose name has no hyphen, "hydra-of-wrong", "hydra-of-wrong-mean".

    Args:
        method: method of the relevance.
        by: grouping of the test samples; None: each has a column.
        upto: number of the first steps that count; None: all count.
        rank: number of directions that were replayed; None: all were.
        test: name of the probe; None: the recording's own test samples.
    """

    method: str
    by: str | None = None
    upto: int | None = None
    rank: int | None = None
    test: str | None = None

    def __str__(self) -> str:
        name = self.method if self.rank is None else f"{self.method}{_RANK}{self.rank}"
        name = name if self.upto is None else f"{name}{_UPTO}{self.upto}"
        name = name if self.test is None else f"{name}{_OF}{self.test}"
        return name if self.by is None else name + _SUFFIXES[self.by]

    @classmethod
    def parse(cls, name: str) -> Self:
        """The result called `name`. Any text is the name of some result."""
        name, of, probed = name.partition(_OF)
        test = probed.partition("-")[0]
        # a probe may be called as groups are
        grouped = probed.removeprefix(test) if of else name
        by = next((by for by, suffix in _SUFFIXES.items() if grouped.endswith(suffix)), None)
        name = name if by is None or of else name.removesuffix(_SUFFIXES[by])
        name, _, upto = name.partition(_UPTO)
        method, _, rank = name.partition(_RANK)
        numbers = [int(n) if n.isdecimal() else None for n in (upto, rank)]
        return cls(method, by, numbers[0], numbers[1], test if of else None)

    @property
    def is_of_itself(self) -> bool:
        """Tell whether it is of each training sample for itself, without test samples."""
        return self.method == ITSELF

    @property
    def itself(self) -> "ResultName":
        """The relevance of training samples for themselves over the same steps."""
        return ResultName(ITSELF, upto=self.upto)


def result_of(method: str, test: str | None) -> str:
    """The result that `--method METHOD --test NAME` means: of `method`, or of what is called so ("hydra-mean"), for that probe.

    Raises:
        UsageError: `method` is a result for another probe.
    """
    result = ResultName.parse(method)
    if test is None or result.test == test:
        return method
    if result.test is not None:
        raise UsageError(f"--method {method} --test {test}: that result is of probe {result.test}: name one probe")
    return str(replace(result, test=test))
