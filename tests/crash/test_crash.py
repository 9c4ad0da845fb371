"""A command that is killed, or whose disk fails, at a call that changes a file: the same command ends with the same bytes."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import shim
from harness import KILLED, Commands, area_of, contents, differences, leftovers, unsafe_names

import hydra_pipe

pytestmark = [
    pytest.mark.xdist_group("crash"),
    pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not())),
]
PIPELINE = str(Path(__file__).with_name("tiny.py"))
KILLS = ("kill", "short-kill", "kill-after")
FAULTS = ("enospc", "eio", "short", "enospc for good")
# arguments, order of a reduction, and what comes before it
STAGES: dict[str, tuple[list[str], str | None, list[str]]] = {
    "record": (["record", PIPELINE, "RUN", "--encoding", "exact", "--checkpoint-every", "2"], None, []),
    "reduce, score first": (["reduce", "RUN"], "score first", ["record"]),
    "reduce, fold first": (["reduce", "RUN", "--keep-hypergradients"], "fold first", ["record"]),
    "export": (["export", "RUN", "--full", "--top", "5"], None, ["record", "reduce, score first"]),
    "prune": (["prune", "RUN"], None, ["record", "reduce, fold first"]),
}


@dataclass(frozen=True)
class Stage:
    """A stage that was run to its end.

    Args:
        name: of it.
        run: what it left.
        before: what was there before it; not there where there was nothing.
        calls: all of them.
        struck: one for each area of the run and name of a call, the one in the middle.
    """

    name: str
    run: Path
    before: Path
    calls: list[shim.Call]
    struck: list[shim.Call]


Perform = Callable[..., object]


@pytest.fixture(scope="module")
def two_commands() -> Iterator[list[Commands]]:
    """For two cores."""
    with Commands(small=True) as first, Commands(small=True) as second:
        yield [first, second]


def perform(commands: Commands, name: str, run: Path, **struck: object):
    arguments, order, _ = STAGES[name]
    return commands(run, [str(run) if word == "RUN" else word for word in arguments], order, **struck)


@pytest.fixture(scope="module")
def whole(two_commands: list[Commands], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stage]:
    """A stage that was run to its end, once for each name."""
    made: dict[str, Stage] = {}

    def of(name: str) -> Stage:
        if name not in made:
            directory = tmp_path_factory.mktemp("whole")
            for earlier in STAGES[name][2][-1:]:
                shutil.copytree(of(earlier).run, directory / "before")
                shutil.copytree(of(earlier).run, directory / "run")
            ended = perform(two_commands[0], name, directory / "run")
            assert ended.code == 0, ended.errors
            areas: dict[str, list[shim.Call]] = {}
            for call in ended.calls:
                areas.setdefault(area_of(call, directory / "run"), []).append(call)
            # of locks, and of the directory that they were in, benchmarks/crash.py strikes all: they are the last calls, and two
            # threads that make a directory may do it in one call more or less, so that a number may be past the end
            struck = [calls[len(calls) // 2] for area, calls in areas.items() if "locks" not in area and area != "rmdir ."]
            made[name] = Stage(name, directory / "run", directory / "before", ended.calls, struck)
        return made[name]

    return of


def each(
    stage: Stage, two_commands: list[Commands], tmp_path: Path, deeds: tuple[str, ...], strike: Callable[..., str | None]
) -> None:
    """Every call of `stage.struck` with one deed after the other, by `strike`, which says what is wrong; on both cores."""
    expected, numbers = contents(stage.run), count()

    def half(first: int) -> list[str]:
        wrong = []
        for number, call in list(enumerate(stage.struck))[first::2]:
            deed = deeds[number % len(deeds)]
            run = tmp_path / f"{next(numbers)}"
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
    assert len(stage.struck) > 5


def different(run: Path, expected: dict[str, bytes]) -> str | None:
    found = [f"{name} differs in {n} bytes" for name, n in differences(contents(run), expected).items()]
    found += [f"{name} is left" for name in leftovers(run)]
    return "; ".join(found + [f"{fault.where} {fault.what}" for fault in hydra_pipe.verify(run)]) or None


@pytest.mark.parametrize("name", STAGES)
def test_a_command_that_was_killed_ends_with_the_same_bytes(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    def strike(commands: Commands, run: Path, at: int, deed: str) -> str | None:
        ended = perform(commands, name, run, at=at, do=deed)
        return None if ended.code == KILLED else f"was not killed: {ended.code}, {len(ended.calls)} calls, {ended.errors}"

    each(whole(name), two_commands, tmp_path, KILLS, strike)


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_fails_is_told_in_one_line_and_the_command_ends_with_the_same_bytes_after_it(
    name: str, two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    stage = whole(name)
    expected = contents(stage.run)

    def strike(commands: Commands, run: Path, at: int, deed: str) -> str | None:
        what, _, stay = deed.partition(" ")
        ended = perform(commands, name, run, at=at, do=what, stay=bool(stay))
        return different(run, expected) if ended.code == 0 else f"{wrong}: {ended.errors}" if (wrong := ended.fault()) else None

    each(stage, two_commands, tmp_path, FAULTS, strike)


@pytest.mark.parametrize("name", STAGES)
def test_what_the_manifest_claims_was_safe_on_the_disk_before(name: str, whole: Callable[[str], Stage]) -> None:
    """A power cut takes what was not flushed: no manifest may count on that. Pruning only deletes."""
    stage = whole(name)
    renamed = [call for call in stage.calls if call.to.endswith("/run/run.json")]
    assert len(renamed) > 1 or name == "prune"
    for call in renamed:
        assert unsafe_names(stage.calls[: stage.calls.index(call)], stage.run) == [], call


def test_a_shim_strikes_the_call_that_it_is_told_to(
    two_commands: list[Commands], whole: Callable[[str], Stage], tmp_path: Path
) -> None:
    """So the tests above can fail: a short write is told as one, and half of it is there after the kill."""
    stage = whole("export")
    call = next(call for call in stage.calls if call.name == "write" and "run.json" in call.path)
    run = shutil.copytree(stage.before, tmp_path / "run")
    assert perform(two_commands[0], "export", run, at=call.number, do="short-kill").code == KILLED
    (partial,) = leftovers(run)
    assert 0 < len((run / partial).read_bytes()) < len((stage.run / "run.json").read_bytes())
