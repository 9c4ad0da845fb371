"""Kinds of stage, one row each: where its results are, what they were made from, and which command makes them again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, Self

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.store import commands, names
from hydra_pipe.store.parsing import is_count, is_plain
from hydra_pipe.store.results import DEFAULT_METHOD, GROUPINGS, ResultName

State = Literal["running", "failed", "complete"]
Settings = dict[str, Any]

# fact of every complete stage: SHA-256 of the file of its footprints
CHECKSUMS: Final = "checksums"
# fact of tables: those of the relevance of samples for themselves that is in them
OF_SELF: Final = "of_self"


@dataclass
class Stage:
    """One stage of a run.

    Args:
        state: how it stands; "running" also after a crash.
        settings: those that its result depends on.
        facts: what it found or took: counts, seconds, what went wrong.
    """

    state: State
    settings: Settings
    facts: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, least: int = 0) -> int:
        """A fact, or else a setting, that counts something. Raises: StoreError: the manifest lacks it."""
        value = self.facts.get(name, self.settings.get(name))
        if not is_count(value, least):
            raise _strange(name, value)
        return value

    def counts(self, name: str) -> dict[str, int]:
        """A fact that counts things by their names; empty if it is not there. Raises: StoreError: it is something else."""
        value = self.facts.get(name, {})
        if not isinstance(value, dict) or not all(map(is_count, value.values())):
            raise _strange(name, value)
        return dict(value)

    def rank_rows(self) -> list[int]:
        """Rows of each process that recorded. Raises: StoreError: the manifest lacks them, or they do not add up."""
        n_rows = self.count("n_rows")
        value = self.facts.get("rank_rows", [n_rows])
        if not isinstance(value, list) or not all(map(is_count, value)) or sum(value) != n_rows:
            raise _strange("rank_rows", value)
        return list(value)


def _strange(name: str, value: Any) -> StoreError:
    return StoreError(f"{names.MANIFEST} is damaged: it says {name} is {shown(value)}: record the run again with --overwrite")


class Holds(Enum):
    """What a stage leaves in its area: a group of arrays, one array, other files, or the one file that the area is."""

    GROUP = "group"
    ARRAY = "array"
    FILES = "files"
    FILE = "file"


@dataclass(frozen=True, eq=False)
class StageKind:
    """A kind of stage: a row of the table below.

    Args:
        word: first word of its stages' names.
        noun: what a stage of this kind makes, in words.
        damaged: what it means that a result is damaged, with `{again}` for the command that makes it again.
        holds: what is in the area of a stage.
        area: path of what a stage alone writes, relative to the run, by the stage's name.
        command: the command that makes a stage, as `StageId.command`.
        made_from: the kind that its results are made from; None: from nothing in the run.
        also: which other stages a result was made from.
        beside: what else goes when a stage is discarded, relative to the run, by the stage's name.
    """

    word: str
    noun: str
    damaged: str
    holds: Holds
    area: Callable[[str], str]
    command: "Callable[[StageId, Path, Stages], str]"
    made_from: "StageKind | None"
    also: "Callable[[StageId, Stage], Iterator[Source]]" = lambda stage, entry: iter(())
    beside: Callable[[str], tuple[str, ...]] = lambda name: ()

    def __repr__(self) -> str:
        return f"StageKind({self.word})"

    def of(self, name: object) -> "StageId":
        """The stage of this kind that is called `name`, or is of the result `name`."""
        return StageId(self, str(name))

    @property
    def has_arrays(self) -> bool:
        """Tell whether its stages write arrays: their other files are the arrays' metadata."""
        return self.holds in (Holds.GROUP, Holds.ARRAY)


@dataclass(frozen=True)
class StageId:
    """A stage of a run. `str` gives its name in the manifest: "record", "reduce hydra-mean".

    Args:
        kind: kind of the stage.
        name: name of the result, the method, the probe or the kind of evaluation; empty for the recording.
    """

    kind: StageKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.word} {self.name}".rstrip()

    @classmethod
    def parse(cls, words: str) -> Self | None:
        """The stage called `words`; None: its kind is not in the table, as of a later hydra-pipe.

        Raises:
            ValueError: no stage can be called so, for its name becomes that of files.
        """
        word, *rest = words.split(" ")
        kind = next((kind for kind in KINDS if kind.word == word), None)
        n_more = len(rest) if kind is None else 0 if kind is RECORD.kind else 1
        if len(rest) != n_more or not all(map(is_plain, (word, *rest))):
            raise ValueError(f"a stage called {shown(words)}")
        return None if kind is None else cls(kind, "".join(rest))

    @property
    def area(self) -> str:
        """What this stage alone writes, relative to the run: a directory, or one file."""
        return self.kind.area(self.name)

    @property
    def places(self) -> tuple[str, ...]:
        """What goes when this stage is discarded, relative to the run: its area, and what belongs to it beside the area."""
        return (self.area, *self.kind.beside(self.name))

    @property
    def checksums_file(self) -> str:
        """Where the footprints of its files are, relative to the run."""
        return f"{names.CHECKSUMS}/{str(self).replace(' ', '-')}.json"

    @property
    def results(self) -> "tuple[StageId, ...]":
        """Stages whose results come from this one's relevance, and go when it does."""
        return tuple(kind.of(self.name) for kind in KINDS if kind.made_from is self.kind) if self.kind is REDUCE else ()

    def command(self, run: Path, stages: "Stages") -> str:
        """The command that makes this stage of the run at `run` again, with the settings that it has in `stages`."""
        return self.kind.command(self, run, stages)

    def consequence(self, run: Path, stages: "Stages") -> str:
        """What it means that something of this stage is damaged, and what to do. Arguments: as of `command`."""
        return self.kind.damaged.format(again=self.command(run, stages))

    def sources(self, entry: Stage) -> "Iterator[Source]":
        """Stages that this one was made from; `entry` is what the manifest says of this one."""
        source = self.kind.made_from
        if source is not None:
            yield Source.of(RECORD if source is RECORD.kind else source.of(self.name))
            yield from self.kind.also(self, entry)


Stages = Mapping[StageId, Stage]


@dataclass(frozen=True)
class Source:
    """Another stage that a result was made from.

    Args:
        stage: that stage.
        fact: name of the fact that has the checksums which that stage had.
        what: what it made, in words.
    """

    stage: StageId
    fact: str
    what: str

    @classmethod
    def of(cls, stage: StageId) -> Self:
        """That stage, by the words of its kind."""
        return cls(stage, f"of_{stage.kind.word}", stage.kind.noun)


def _settings(stages: Stages, stage: StageId) -> Settings:
    return stages[stage].settings if stage in stages else {}


def _by(command: Callable[[Path, str, Settings], str]) -> Callable[[StageId, Path, Stages], str]:
    return lambda stage, run, stages: command(run, stage.name, _settings(stages, stage))


def _recording(stage: StageId, run: Path, stages: Stages) -> str:
    return commands.recording(run, _settings(stages, stage))


def _evaluating(stage: StageId, run: Path, stages: Stages) -> str:
    return commands.evaluating(run, stage.name, _settings(stages, stage), _settings(stages, RECORD))


def _keeping(stage: StageId, run: Path, stages: Stages) -> str:
    return f"{kept_with(stage, stages).command(run, stages)} --keep-hypergradients"


def kept_with(stage: StageId, stages: Stages) -> StageId:
    """The reduction that `stage` keeps hypergradients with: one of all steps that is there, or that of all test samples."""
    able = [REDUCE.of(ResultName(stage.name, by)) for by in (None, *GROUPINGS)]
    return next((made for made in stages if made in able), able[0])


def _probe_of(stage: StageId, entry: Stage) -> Iterator[Source]:
    probe = ResultName.parse(stage.name).test
    if probe is not None:
        yield Source.of(PROBE.of(probe))


def _own_relevance(stage: StageId, entry: Stage) -> Iterator[Source]:
    if OF_SELF in entry.facts:
        own = REDUCE.of(ResultName.parse(stage.name).itself)
        yield Source(own, OF_SELF, "relevance of samples for themselves")


RECORD: Final = StageKind(
    word="record",
    noun="recording",
    damaged="no relevance can be computed from this recording: record the run again with --overwrite",
    holds=Holds.GROUP,
    area=lambda name: names.GRADIENTS,
    command=_recording,
    made_from=None,
).of("")
KEEP: Final = StageKind(
    word="keep",
    noun="hypergradients",
    damaged="no test samples can be answered from what was kept: keep it again with {again} --overwrite",
    holds=Holds.GROUP,
    area=lambda method: f"{names.HYPERGRADIENTS}/{method}.zarr",
    command=_keeping,
    made_from=RECORD.kind,
)
PROBE: Final = StageKind(
    word="probe",
    noun="probe",
    damaged="nothing can be computed for its test samples: take it again with {again} --overwrite",
    holds=Holds.GROUP,
    area=lambda name: f"{names.PROBES}/{name}.zarr",
    command=_by(commands.probing),
    made_from=RECORD.kind,
)
REDUCE: Final = StageKind(
    word="reduce",
    noun="relevance",
    damaged="the relevance cannot be trusted: compute it again with {again} --overwrite",
    holds=Holds.ARRAY,
    area=lambda result: f"{names.RELEVANCE}/{result}",
    command=_by(commands.reducing),
    made_from=RECORD.kind,
    also=_probe_of,
    beside=lambda result: (f"{names.RELEVANCE}/{names.columns_dimension(result)}",),
)
EXPORT: Final = StageKind(
    word="export",
    noun="rankings",
    damaged="the rankings cannot be trusted: write them again with {again} --overwrite",
    holds=Holds.FILES,
    area=lambda result: f"{names.RANKINGS}/{names.METHOD}={result}",
    command=_by(commands.exporting),
    made_from=REDUCE,
    also=_own_relevance,
)
CLEAN: Final = StageKind(
    word="clean",
    noun="proposal",
    damaged="the proposal cannot be trusted: make it again with {again} --overwrite",
    holds=Holds.FILES,
    area=lambda result: f"{names.CLEANING}/{names.METHOD}={result}",
    command=_by(commands.cleaning),
    made_from=REDUCE,
)
REPORT: Final = StageKind(
    word="report",
    noun="report",
    damaged="the report cannot be trusted: write it again with {again} --overwrite",
    holds=Holds.FILE,
    area=lambda result: names.REPORT if result == DEFAULT_METHOD else names.REPORT.replace(".", f"-{result}."),
    command=_by(commands.reporting),
    made_from=REDUCE,
)
EVALUATE: Final = StageKind(
    word="evaluate",
    noun="evaluation",
    damaged="the evaluation cannot be trusted: make it again with {again} --overwrite",
    holds=Holds.FILES,
    area=lambda kind: f"{names.EVALUATION}/{kind}",
    command=_evaluating,
    made_from=RECORD.kind,
)
# what others are made from comes first
KINDS: Final = (RECORD.kind, KEEP, PROBE, REDUCE, EXPORT, CLEAN, REPORT, EVALUATE)
_HOMES = tuple(kind.area("").partition("/")[0] for kind in KINDS if kind.holds is not Holds.FILE)
# directories in which hydra-pipe alone writes
DIRECTORIES: Final = (*_HOMES, names.CHECKSUMS)
# everything that hydra-pipe puts into a run but for what repairing has set aside, and so all that --overwrite may remove
OWNED: Final = (*_HOMES, names.CHECKPOINTS, names.CHECKSUMS, names.REPORT, names.MANIFEST)
