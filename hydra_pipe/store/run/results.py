"""Names of results: the names of arrays of `relevance.zarr` and of the stages made from them."""

from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from hydra_pipe.errors import UsageError

# Groupings of test samples: a column is the mean over each label, or over all test samples.
BY_LABEL, MEAN = "label", "mean"
GROUPINGS = (BY_LABEL, MEAN)
# The method of each training sample's relevance for itself: one column, without test samples.
ITSELF = "self"
DEFAULT_METHOD: Final = "hydra-fisher"
# Rank that leaves nothing out: a sweep over all features.
FULL: Final = "full"
Rank = int | Literal["full"]
# Name of a proposal of labels by the dynamics of the training, which is no result of reduce.
DYNAMICS: Final = "dynamics"
_SUFFIXES = {BY_LABEL: "-by-label", MEAN: "-mean"}
# Parts of a name after the method: before the number of steps, the number of directions and
# the name of the probe.
_UPTO, _RANK, _OF = "-upto-", "-rank-", "-of-"
# End of the name of a result that keeps the top samples of each column, and not every pair.
_TOP = "-top"


@dataclass(frozen=True)
class ResultName:
    """The parts of a result's name.

    `str` gives the name. The name is "hydra" for one column a test sample. It is
    "hydra-by-label" or "hydra-mean" for means over test samples. Results of the first steps are
    "hydra-upto-120" and "hydra-upto-120-mean". A result of some directions is
    "hydra-exact-rank-20", that of a sweep over all features "hydra-fisher-rank-full". Results for
    the test samples of probe `wrong` are "hydra-of-wrong" and "hydra-of-wrong-mean". A probe's name
    has no hyphen. Results of the top samples alone end in "-top": "hydra-top", "hydra-mean-top".

    Args:
        method: method of the relevance.
        by: grouping of the test samples. None: each has a column.
        up_to_step: number of the first steps that count. None: all count.
        rank: number of directions that were replayed, or of columns of the basis of a sweep; or
            "full". None: what the method takes without `--rank`.
        probe: name of the probe. None: the recording's own test samples.
        is_top: True for the top samples of each column alone.
    """

    method: str
    by: str | None = None
    up_to_step: int | None = None
    rank: Rank | None = None
    probe: str | None = None
    is_top: bool = False

    def __str__(self) -> str:
        name = self.method if self.rank is None else f"{self.method}{_RANK}{self.rank}"
        name = name if self.up_to_step is None else f"{name}{_UPTO}{self.up_to_step}"
        name = name if self.probe is None else f"{name}{_OF}{self.probe}"
        name = name if self.by is None else name + _SUFFIXES[self.by]
        return name + _TOP if self.is_top else name

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parse the name of a result. Any text is the name of some result."""
        name, of, probed = name.partition(_OF)
        test = probed.partition("-")[0]
        # A probe's name may be the name of a grouping, or "top".
        ending = probed.removeprefix(test) if of else name
        is_top = ending.endswith(_TOP)
        ending = ending.removesuffix(_TOP)
        by = next((by for by, suffix in _SUFFIXES.items() if ending.endswith(suffix)), None)
        name = name if of else ending.removesuffix(_SUFFIXES.get(by or "", ""))
        name, _, up_to_step = name.partition(_UPTO)
        method, _, rank = name.partition(_RANK)
        steps, columns = (int(n) if n.isdecimal() else None for n in (up_to_step, rank))
        kept: Rank | None = FULL if rank == FULL else columns
        return cls(method, by, steps, kept, test if of else None, is_top)

    @property
    def is_of_itself(self) -> bool:
        """True for relevance of each training sample for itself, without test samples."""
        return self.method == ITSELF

    @property
    def itself(self) -> "ResultName":
        """Name of the relevance of training samples for themselves over the same steps."""
        return ResultName(ITSELF, up_to_step=self.up_to_step)


def refuse_top(name: str) -> None:
    """Refuse a result of the top samples alone, for work that needs every pair.

    Raises:
        UsageError: `name` is the name of such a result.
    """
    result = ResultName.parse(name)
    if result.is_top:
        whole = replace(result, is_top=False)
        raise UsageError(
            f"{name} has only the top samples of each test, and every pair is needed: compute "
            f"{whole} with reduce without --top. export and open_run(RUN).top read {name}"
        )


def parse_rank(text: str) -> Rank:
    """Parse the value of `--rank`. Raises: UsageError: it is neither a number nor "full"."""
    if text == FULL:
        return FULL
    if text.isdecimal():
        return int(text)
    raise UsageError(f"--rank {text}: give a number, such as 512, or full")


def result_of(method: str, probe: str | None) -> str:
    """Return the result that `--method METHOD --probe NAME` means.

    Args:
        method: method, or name of a result such as "hydra-mean".
        probe: name of the probe. None: the one in `method`, if there is one.

    Raises:
        UsageError: `method` is a result for another probe.
    """
    result = ResultName.parse(method)
    if probe is None or result.probe == probe:
        return method
    if result.probe is not None:
        raise UsageError(
            f"--method {method} --probe {probe}: this result is for probe {result.probe}: name "
            "one probe"
        )
    return str(replace(result, probe=probe))
