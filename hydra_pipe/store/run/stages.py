"""Kinds of stage, one row each.

A row says where the results are, what they were made from, and which command makes them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, Self

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.store import names
from hydra_pipe.store.json_parsing import is_count, is_plain
from hydra_pipe.store.run import commands
from hydra_pipe.store.run.results import DEFAULT_METHOD, DYNAMICS, GROUPINGS, ResultName

State = Literal["running", "failed", "complete"]
Settings = dict[str, Any]

# Fact of every complete stage: SHA-256 of the file of its footprints.
CHECKSUMS: Final = "checksums"
# Fact of tables that have the relevance of samples for themselves: SHA-256 of its footprints.
OF_SELF: Final = "of_self"


@dataclass
class Stage:
    """One stage of a run.

    Args:
        state: state of the stage. "running" also after a crash.
        settings: settings that the result depends on.
        facts: findings and costs: counts, seconds, errors.
    """

    state: State
    settings: Settings
    facts: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, least: int = 0) -> int:
        """Return a fact that is a count, or else a setting.

        Raises:
            StoreError: the manifest lacks the count.
        """
        value = self.facts.get(name, self.settings.get(name))
        if not is_count(value, least):
            raise _strange(name, value)
        return value

    def counts(self, name: str) -> dict[str, int]:
        """Return a fact that counts things by name, or {} if it is missing.

        Raises:
            StoreError: the fact is something else.
        """
        value = self.facts.get(name, {})
        if not isinstance(value, dict) or not all(map(is_count, value.values())):
            raise _strange(name, value)
        return dict(value)

    def rank_rows(self) -> list[int]:
        """Return the number of rows of each process that recorded.

        Raises:
            StoreError: the manifest lacks the numbers, or their sum is wrong.
        """
        n_rows = self.count("n_rows")
        value = self.facts.get("rank_rows", [n_rows])
        if not isinstance(value, list) or not all(map(is_count, value)) or sum(value) != n_rows:
            raise _strange("rank_rows", value)
        return list(value)


def _strange(name: str, value: Any) -> StoreError:
    return StoreError(
        f"{names.MANIFEST} is damaged: it says {name} is {shown(value)}: record the run again "
        "with --overwrite"
    )


class Holds(Enum):
    """Content of a stage's area: a group of arrays, one array, other files, or one file."""

    GROUP = "group"
    ARRAY = "array"
    FILES = "files"
    FILE = "file"


@dataclass(frozen=True, eq=False)
class StageKind:
    """A kind of stage: a row of the table below.

    Args:
        word: first word of the names of its stages.
        noun: product of such a stage, in words.
        damaged: meaning of a damaged result. `{again}` stands for the command that makes the
            result again.
        holds: content of a stage's area.
        area: function from a stage's name to its area. Only this stage writes there. The path
            is relative to the run.
        command: function that returns the command of a stage, as `StageId.command` does.
        made_from: kind of stage that its results are made from. None: from nothing in the run.
        also: function that yields the other stages that a result was made from.
        beside: function from a stage's name to the other paths that go when a stage is
            discarded, relative to the run.
        otherwise: function that returns, by its name, another kind that a stage is made from, in
            place of `made_from`. None: there is no other.
    """

    word: str
    noun: str
    damaged: str
    holds: Holds
    area: Callable[[str], str]
    command: "Callable[[StageId, Path, Stages], str]"
    made_from: "StageKind | None"
    also: "Callable[[StageId, Stage], Iterator[StageSource]]" = lambda stage, entry: iter(())
    beside: Callable[[str], tuple[str, ...]] = lambda name: ()
    otherwise: "Callable[[str], StageKind | None]" = lambda name: None

    def __repr__(self) -> str:
        return f"StageKind({self.word})"

    def source(self, name: str) -> "StageKind | None":
        """Return the kind that the stage called `name` is made from. None: nothing in the run."""
        return self.otherwise(name) or self.made_from

    def of(self, name: object) -> "StageId":
        """Return the stage of this kind that is called `name`, or is of the result `name`."""
        return StageId(self, str(name))

    @property
    def has_arrays(self) -> bool:
        """True if its stages write arrays. Their only other files are the arrays' metadata."""
        return self.holds in (Holds.GROUP, Holds.ARRAY)


@dataclass(frozen=True)
class StageId:
    """A stage of a run. `str` gives its name in the manifest: "record", "reduce hydra-mean".

    Args:
        kind: kind of the stage.
        name: name of the result, the method, the probe or the kind of evaluation. Empty for
            the recording.
    """

    kind: StageKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.word} {self.name}".rstrip()

    @classmethod
    def parse(cls, words: str) -> Self | None:
        """Parse the name of a stage. None: its kind is of a later hydra-pipe.

        Raises:
            ValueError: no stage can have this name, because the name becomes a file's name.
        """
        word, *rest = words.split(" ")
        kind = next((kind for kind in KINDS if kind.word == word), None)
        n_more = len(rest) if kind is None else 0 if kind is RECORD.kind else 1
        if len(rest) != n_more or not all(map(is_plain, (word, *rest))):
            raise ValueError(f"a stage called {shown(words)}")
        return None if kind is None else cls(kind, "".join(rest))

    @property
    def area(self) -> str:
        """Path that only this stage writes, relative to the run: a directory or one file."""
        return self.kind.area(self.name)

    @property
    def places(self) -> tuple[str, ...]:
        """Paths that go when this stage is discarded, relative to the run, the area first."""
        return (self.area, *self.kind.beside(self.name))

    @property
    def checksums_file(self) -> str:
        """Path of the file of the stage's footprints, relative to the run."""
        return f"{names.CHECKSUMS}/{str(self).replace(' ', '-')}.json"

    @property
    def results(self) -> "tuple[StageId, ...]":
        """Stages that are made from this stage's relevance, and go when it goes."""
        if self.kind is COMBINE:
            mean = REDUCE.of(self.name)
            return (mean, *mean.results)
        return (
            tuple(kind.of(self.name) for kind in KINDS if kind.source(self.name) is self.kind)
            if self.kind in (REDUCE, TOPS)
            else ()
        )

    def command(self, run: Path, stages: "Stages") -> str:
        """Return the command that makes this stage again, with its settings.

        Args:
            run: path of the run.
            stages: stages of the run, which have the settings.
        """
        return self.kind.command(self, run, stages)

    def consequence(self, run: Path, stages: "Stages") -> str:
        """Return the meaning of damage to this stage, and advice. Arguments: as for `command`."""
        return self.kind.damaged.format(again=self.command(run, stages))

    def sources(self, entry: Stage) -> "Iterator[StageSource]":
        """Yield the stages that this one was made from. `entry`: this stage in the manifest."""
        source = self.kind.source(self.name)
        if source is not None:
            yield StageSource.of(RECORD if source is RECORD.kind else source.of(self.name))
            yield from self.kind.also(self, entry)


Stages = Mapping[StageId, Stage]


@dataclass(frozen=True)
class StageSource:
    """Another stage that a result was made from.

    Args:
        stage: the other stage.
        fact: name of the fact that has the checksums which the other stage had.
        what: product of the other stage, in words.
    """

    stage: StageId
    fact: str
    what: str

    @classmethod
    def of(cls, stage: StageId) -> Self:
        """Return `stage` as a source, by the words of its kind."""
        return cls(stage, f"of_{stage.kind.word}", stage.kind.noun)


def _settings(stages: Stages, stage: StageId) -> Settings:
    return stages[stage].settings if stage in stages else {}


def _by(command: Callable[[Path, str, Settings], str]) -> Callable[[StageId, Path, Stages], str]:
    return lambda stage, run, stages: command(run, stage.name, _settings(stages, stage))


def _recording(stage: StageId, run: Path, stages: Stages) -> str:
    return commands.recording(run, _settings(stages, stage))


def _evaluating(stage: StageId, run: Path, stages: Stages) -> str:
    return commands.evaluating(run, stage.name, _settings(stages, stage), _settings(stages, RECORD))


def _reducing(stage: StageId, run: Path, stages: Stages) -> str:
    if COMBINE.of(stage.name) in stages:
        return _combining(stage, run, stages)
    return commands.reducing(run, stage.name, _settings(stages, stage))


def _combining(stage: StageId, run: Path, stages: Stages) -> str:
    entry = stages.get(COMBINE.of(stage.name))
    return commands.combining(run, stage.name, {} if entry is None else entry.facts)


def _exporting(stage: StageId, run: Path, stages: Stages) -> str:
    # Top samples are exported as they are: the usual number may be more than were kept.
    kept = _settings(stages, TOPS.of(stage.name)).get(names.TOP)
    settings = _settings(stages, stage) or {names.TOP: kept}
    return commands.exporting(run, stage.name, settings)


def _keeping(stage: StageId, run: Path, stages: Stages) -> str:
    return f"{kept_with(stage, stages).command(run, stages)} --keep-hypergradients"


def kept_with(stage: StageId, stages: Stages) -> StageId:
    """Return the reduction that `stage` keeps hypergradients with.

    It is a reduction of all steps, if one exists, else the one of all test samples.
    """
    able = [REDUCE.of(ResultName(stage.name, by)) for by in (None, *GROUPINGS)]
    return next((made for made in stages if made in able), able[0])


def reduces_to(name: str) -> StageId:
    """Return the stage that computes the result `name`: every pair, or the top samples alone."""
    return (TOPS if ResultName.parse(name).is_top else REDUCE).of(name)


def _probe_of(stage: StageId, entry: Stage) -> Iterator[StageSource]:
    probe = ResultName.parse(stage.name).probe
    if probe is not None:
        yield StageSource.of(PROBE.of(probe))


def _own_relevance(stage: StageId, entry: Stage) -> Iterator[StageSource]:
    if OF_SELF in entry.facts:
        own = REDUCE.of(ResultName.parse(stage.name).itself)
        yield StageSource(own, OF_SELF, "relevance of samples for themselves")


RECORD: Final = StageKind(
    word="record",
    noun="recording",
    damaged=(
        "no relevance can be computed from this recording: record the run again with --overwrite"
    ),
    holds=Holds.GROUP,
    area=lambda name: names.GRADIENTS,
    command=_recording,
    made_from=None,
).of("")
KEEP: Final = StageKind(
    word="keep",
    noun="hypergradients",
    damaged=(
        "no test samples can be answered from what was kept: keep it again with {again} --overwrite"
    ),
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
COMBINE: Final = StageKind(
    word="combine",
    noun="combination",
    damaged="the mean over the runs cannot be trusted: compute it again with {again} --overwrite",
    holds=Holds.GROUP,
    area=lambda result: f"{names.COMBINED}/{result}.zarr",
    command=_combining,
    made_from=None,
)
REDUCE: Final = StageKind(
    word="reduce",
    noun="relevance",
    damaged="the relevance cannot be trusted: compute it again with {again} --overwrite",
    holds=Holds.ARRAY,
    area=lambda result: f"{names.RELEVANCE}/{result}",
    command=_reducing,
    made_from=RECORD.kind,
    also=_probe_of,
    beside=lambda result: (f"{names.RELEVANCE}/{names.columns_dimension(result)}",),
)
TOPS: Final = StageKind(
    word="tops",
    noun="top samples",
    damaged="the top samples cannot be trusted: compute them again with {again} --overwrite",
    holds=Holds.GROUP,
    area=lambda result: f"{names.RELEVANCE}/{result}",
    command=_by(commands.reducing),
    made_from=RECORD.kind,
    also=_probe_of,
)
EXPORT: Final = StageKind(
    word="export",
    noun="rankings",
    damaged="the rankings cannot be trusted: write them again with {again} --overwrite",
    holds=Holds.FILES,
    area=lambda result: f"{names.RANKINGS}/{names.METHOD}={result}",
    command=_exporting,
    made_from=REDUCE,
    also=_own_relevance,
    otherwise=lambda name: TOPS if ResultName.parse(name).is_top else None,
)
CLEAN: Final = StageKind(
    word="clean",
    noun="proposal",
    damaged="the proposal cannot be trusted: make it again with {again} --overwrite",
    holds=Holds.FILES,
    area=lambda result: f"{names.CLEANING}/{names.METHOD}={result}",
    command=_by(commands.cleaning),
    made_from=REDUCE,
    otherwise=lambda name: RECORD.kind if name == DYNAMICS else None,
)
REPORT: Final = StageKind(
    word="report",
    noun="report",
    damaged="the report cannot be trusted: write it again with {again} --overwrite",
    holds=Holds.FILE,
    area=lambda result: (
        names.REPORT if result == DEFAULT_METHOD else names.REPORT.replace(".", f"-{result}.")
    ),
    command=_by(commands.reporting),
    made_from=REDUCE,
    otherwise=lambda name: RECORD.kind if name == DYNAMICS else None,
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
# A kind comes after the kinds that it is made from.
KINDS: Final = (RECORD.kind, KEEP, PROBE, COMBINE, REDUCE, TOPS, EXPORT, CLEAN, REPORT, EVALUATE)
_HOMES = tuple(
    dict.fromkeys(kind.area("").partition("/")[0] for kind in KINDS if kind.holds is not Holds.FILE)
)
# Directories that only hydra-pipe writes.
DIRECTORIES: Final = (*_HOMES, names.CHECKSUMS)
# All that hydra-pipe puts into a run, except what a repair has set aside. --overwrite may
# remove all of it and nothing else.
OWNED: Final = (*_HOMES, names.CHECKPOINTS, names.CHECKSUMS, names.REPORT, names.MANIFEST)
