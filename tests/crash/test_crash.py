"""A command that is killed, or whose disk fails, at a call that changes a file: the same command
ends with the same bytes.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import shim
from harness import (
    KILLED,
    Commands,
    area_of,
    commands_for,
    contents,
    differences,
    leftovers,
    unsafe_names,
)
from stages import ALL, LATER, STAGES, TOGETHER

import hydra_pipe

pytestmark = pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not()))
KILLS = ("kill", "short-kill", "kill-after")
FAULTS = ("enospc", "eio", "short", "enospc for good")
Struck = tuple[shim.Call, str]


@dataclass(frozen=True)
class Stage:
    """A stage that was run to its end.

    Args:
        name: of it.
        run: what it left.
        before: what was there before it; not there where there was nothing.
        seconds: it took.
        calls: all of them.
        areas: of these, those of each area of the run and name of a call; but for locks, and for
            the directory that they were in, of which benchmarks/crash.py strikes all: they are the
            last calls, and two threads that make a directory may do it in one call more or less, so
            that a number may be past the end.
    """

    name: str
    run: Path
    before: Path
    seconds: float
    calls: list[shim.Call]
    areas: dict[str, list[shim.Call]]

    def in_the_middle(self, deeds: Sequence[str]) -> list[Struck]:
        """The call in the middle of each area, with one deed after the other."""
        return [
            (calls[len(calls) // 2], deeds[n % len(deeds)])
            for n, calls in enumerate(self.areas.values())
        ]

    def drawn(self) -> list[Struck]:
        """Some deeds, each with a call that it can be done to."""
        draw = random.Random(self.name)
        deeds = [*draw.sample(KILLS, 2), *draw.sample(FAULTS, 2)]
        of_writes = [
            calls for area, calls in self.areas.items() if "write" in area.partition(" ")[0]
        ]
        return [
            (
                draw.choice(
                    draw.choice(of_writes if "short" in deed else list(self.areas.values()))
                ),
                deed,
            )
            for deed in deeds
        ]


Perform = Callable[..., object]


@pytest.fixture(scope="module")
def two_commands() -> Iterator[list[Commands]]:
    """For two cores."""
    with commands_for(2, small=True) as both:
        yield both


# Paths of the runs that are combined, by their names in the arguments.
sources: dict[str, str] = {}


def perform(commands: Commands, name: str, run: Path, **struck: object):
    arguments, order, _ = (ALL | TOGETHER)[name]
    return commands(run, [sources.get(word, word) for word in arguments], order, **struck)


@pytest.fixture(scope="module")
def whole(
    two_commands: list[Commands], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Stage]:
    """A stage that was run to its end, once for each name."""
    made: dict[str, Stage] = {}

    def of(name: str) -> Stage:
        if name not in made:
            if name == "combine":
                sources["FIRST"] = str(of("reduce, score first").run)
                sources["SECOND"] = str(of("second").run)
            directory = tmp_path_factory.mktemp("whole")
            for earlier in (ALL | TOGETHER)[name][2][-1:]:
                shutil.copytree(of(earlier).run, directory / "before")
                shutil.copytree(of(earlier).run, directory / "run")
            start = time.monotonic()
            ended = perform(two_commands[0], name, directory / "run")
            seconds = time.monotonic() - start
            assert ended.code == 0, ended.errors
            areas: dict[str, list[shim.Call]] = {}
            for call in ended.calls:
                area = area_of(call, directory / "run")
                if "locks" not in area and area != "rmdir .":
                    areas.setdefault(area, []).append(call)
            made[name] = Stage(
                name, directory / "run", directory / "before", seconds, ended.calls, areas
            )
        return made[name]

    return of


def each(
    stage: Stage,
    two_commands: list[Commands],
    tmp_path: Path,
    struck: list[Struck],
    strike: Callable[..., str | None],
) -> None:
    """Every call of `struck`, by `strike`, which says what is wrong; on both cores."""
    expected, numbers = contents(stage.run), count()

    def half(first: int) -> list[str]:
        wrong = []
        for call, deed in struck[first::2]:
            run = tmp_path / f"{next(numbers)}" / "run"
            if stage.before.exists():
                shutil.copytree(stage.before, run)
            found = strike(two_commands[first], run, call.number, deed)
            again = perform(two_commands[first], stage.name, run)
            found = found or (f"again: {again.errors}" if again.code else different(run, expected))
            wrong += [f"{deed} at {call.name} {call.path}: {found}"] if found else []
            shutil.rmtree(run)
        return wrong

    with ThreadPoolExecutor(2) as both:
        assert [line for lines in both.map(half, range(2)) for line in lines] == []
    assert len(struck) > 3


def different(run: Path, expected: dict[str, bytes]) -> str | None:
    found = [
        f"{name} differs in {n} bytes" for name, n in differences(contents(run), expected).items()
    ]
    found += [f"{name} is left" for name in leftovers(run)]
    return (
        "; ".join(found + [f"{fault.where} {fault.what}" for fault in hydra_pipe.verify(run)])
        or None
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_command_that_was_killed_ends_with_the_same_bytes(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    def strike(commands: Commands, run: Path, at: int, deed: str) -> str | None:
        ended = perform(commands, name, run, at=at, do=deed)
        return (
            None
            if ended.code == KILLED
            else f"was not killed: {ended.code}, {len(ended.calls)} calls, {ended.errors}"
        )

    stage = whole(name)
    each(stage, two_commands, tmp_path, stage.in_the_middle(KILLS), strike)


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_fails_is_told_in_one_line_and_the_command_ends_with_the_same_bytes_after_it(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    stage = whole(name)
    expected = contents(stage.run)

    def strike(commands: Commands, run: Path, at: int, deed: str) -> str | None:
        what, _, stay = deed.partition(" ")
        ended = perform(commands, name, run, at=at, do=what, stay=bool(stay))
        return (
            different(run, expected)
            if ended.code == 0
            else f"{wrong}: {ended.errors}"
            if (wrong := ended.fault())
            else None
        )

    each(stage, two_commands, tmp_path, stage.in_the_middle(FAULTS), strike)


@pytest.mark.parametrize("name", [*LATER, "combine"])
def test_whatever_a_command_meets_it_ends_with_the_same_bytes(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    stage, codes = whole(name), []
    expected = contents(stage.run)

    def strike(commands: Commands, run: Path, at: int, deed: str) -> str | None:
        what, _, stay = deed.partition(" ")
        ended = perform(commands, name, run, at=at, do=what, stay=bool(stay))
        codes.append(ended.code)
        if ended.code == 0:
            return different(run, expected)
        is_killed = ended.code == KILLED and deed in KILLS
        return f"{wrong}: {ended.errors}" if not is_killed and (wrong := ended.fault()) else None

    each(stage, two_commands, tmp_path, stage.drawn(), strike)
    # not always twice: two threads may take a call more or less: the last of them may not be there
    assert KILLED in codes


@pytest.mark.parametrize("name", ["fisher", "basis", "exact", "rank", "lds"])
def test_a_command_that_is_killed_at_some_moment_ends_with_the_same_bytes(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    """Of `benchmarks/crash.py` a little: at an instant, not at a call."""
    stage = whole(name)
    expected = contents(stage.run)
    run = shutil.copytree(stage.before, tmp_path / "run")
    for share in (0.3, 0.8):
        assert perform(two_commands[0], name, run, seconds=share * stage.seconds).code in (
            0,
            KILLED,
        )
    assert perform(two_commands[0], name, run).code == 0
    assert different(run, expected) is None


@pytest.mark.parametrize("name", [*ALL, "combine"])
def test_what_the_manifest_claims_was_safe_on_the_disk_before(
    name: str, whole: Callable[[str], Stage]
) -> None:
    """A power cut takes what was not flushed: no manifest counts on it. Pruning only deletes."""
    stage = whole(name)
    renamed = [call for call in stage.calls if call.to.endswith("/run/run.json")]
    assert len(renamed) > 1 or name == "prune"
    for call in renamed:
        assert unsafe_names(stage.calls[: stage.calls.index(call)], stage.run) == [], call


def test_a_shim_strikes_the_call_that_it_is_told_to(
    two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    """So the tests above can fail: a short write is told as one, and half of it is there after the
    kill.
    """
    stage = whole("export")
    call = next(call for call in stage.calls if call.name == "write" and "run.json" in call.path)
    run = shutil.copytree(stage.before, tmp_path / "run")
    assert perform(two_commands[0], "export", run, at=call.number, do="short-kill").code == KILLED
    (partial,) = leftovers(run)
    assert 0 < len((run / partial).read_bytes()) < len((stage.run / "run.json").read_bytes())
