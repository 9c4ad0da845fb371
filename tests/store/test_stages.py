"""The table of kinds of stage, held against docs/format.md and against what a run with all of them
has on the disk.
"""

import json
import re
from pathlib import Path

import pytest

import hydra_pipe
from hydra_pipe.store import names
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import (
    COMBINE,
    EXPORT,
    KEEP,
    KINDS,
    RECORD,
    REDUCE,
    REPORT,
    TOPS,
    StageId,
    StageKind,
    StageSource,
)

FORMAT = (Path(__file__).parents[2] / "docs/format.md").read_text()
TINY = str(Path(__file__).parents[1] / "crash/tiny.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    hydra_pipe.record(TINY, path, encoding="exact")
    hydra_pipe.reduce(path, keep_hypergradients=True, method="hydra")
    hydra_pipe.probe(path, f"{TINY}:mistakes", name="wrong")
    hydra_pipe.reduce(path, probe="wrong", method="grad-dot")
    hydra_pipe.reduce(path, method="hydra", top=3)
    hydra_pipe.export(path, full=True, top=5, method="hydra")
    hydra_pipe.export(path, top=2, method="hydra-top")
    hydra_pipe.clean(path, lowest=4, method="hydra")
    hydra_pipe.report(path, method="hydra")
    hydra_pipe.evaluate(TINY, path, "smoothness")
    return path


@pytest.fixture(scope="module")
def together(run: Path) -> Path:
    """The run and another one, combined."""
    hydra_pipe.record(f"{TINY}:second", run.parent / "second", encoding="exact")
    hydra_pipe.reduce(run.parent / "second", method="hydra")
    hydra_pipe.combine([run, run.parent / "second"], run.parent / "together", method="hydra")
    return run.parent / "together"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.word)
def test_footprints_are_listed_as_the_format_says(
    request: pytest.FixtureRequest, kind: StageKind
) -> None:
    """`arrays` has the files of each array, `files` each other file: told by the `zarr.json` that
    are there, not by the table.
    """
    run: Path = request.getfixturevalue("together" if kind is COMBINE else "run")
    stages = [stage for stage in RunDirectory.open(run).stages if stage.kind is kind]
    assert stages
    for stage in stages:
        area, listed = run / stage.area, json.loads((run / stage.checksums_file).read_text())
        files = [file for file in area.rglob("*") if file.is_file()] if area.is_dir() else [area]
        metadata = {
            file: json.loads(file.read_text()) for file in files if file.name == "zarr.json"
        }
        arrays = [file.parent for file, found in metadata.items() if found["node_type"] == "array"]
        chunks = {
            array: [file for file in files if file.is_relative_to(array / "c")] for array in arrays
        }
        others = set(files) - {file for own in chunks.values() for file in own}
        assert {run / name: len(found) // 20 for name, found in listed["arrays"].items()} == {
            a: len(own) for a, own in chunks.items()
        }
        assert {run / name for name in listed["files"]} == others
        assert kind.has_arrays == bool(arrays)


def test_names_of_stages_are_those_of_the_format() -> None:
    (row,) = re.findall(r"^\| `stages` \|(.*)$", FORMAT, re.MULTILINE)
    words = [tuple(found.split(" ")) for found in re.findall(r'"([^"]+)"', row)]
    assert {word: len(rest) for word, *rest in words} == {
        kind.word: int(kind is not RECORD.kind) for kind in KINDS
    }


def stages_of_the_format() -> list[tuple[StageId, str, str]]:
    """Stage, file of footprints and area of each line of the table."""
    lines = re.findall(r"^\| `([^`]+)` \| `(checksums/[^`]+)` \| (.*?) \|$", FORMAT, re.MULTILINE)
    return [(StageId.parse(words), footprints, area) for words, footprints, area in lines]


def test_areas_are_those_of_the_format() -> None:
    areas = {stage: area for stage, _, area in stages_of_the_format()}
    assert {stage.kind for stage in areas} == {*KINDS}
    assert areas.pop(REPORT.of("METHOD")) == (
        f"`{REPORT.of('METHOD').area}`; for the result `hydra-fisher`: "
        f"`{REPORT.of('hydra-fisher').area}`"
    )
    assert areas == {stage: f"`{stage.area}`" for stage in areas}


def test_footprints_are_in_the_files_of_the_format() -> None:
    assert [footprints for _, footprints, _ in stages_of_the_format()] == [
        stage.checksums_file for stage, _, _ in stages_of_the_format()
    ]


def test_what_a_result_was_made_from_are_the_facts_of_the_format(run: Path) -> None:
    found = RunDirectory.open(run)
    facts = {
        stage.kind.word: {source.fact for source in stage.sources(entry)}
        for stage, entry in found.stages.items()
    }
    assert {fact for own in facts.values() for fact in own} <= set(
        re.findall(r"`(of_\w+)`", FORMAT)
    )
    assert all(facts[word] == {"of_reduce"} for word in ("clean", "report"))
    assert all(facts[word] == {"of_record"} for word in ("keep", "probe", "evaluate", "tops"))
    of_export = {
        stage.name: [source.fact for source in stage.sources(entry)]
        for stage, entry in found.stages.items()
        if stage.kind is EXPORT
    }
    assert of_export == {"hydra": ["of_reduce"], "hydra-top": ["of_tops"]}
    of_probe = REDUCE.of("grad-dot-of-wrong")
    assert [source.fact for source in of_probe.sources(found.stages[of_probe])] == [
        "of_record",
        "of_probe",
    ]
    for stage in found.stages:
        origin = found.origin(stage)
        assert found.stages[stage].facts | origin == found.stages[stage].facts
        assert None not in origin.values()


@pytest.mark.parametrize(
    "words",
    [
        "record",
        "reduce hydra",
        "keep hydra-fisher",
        "probe late",
        "evaluate lds",
        "report hydra-mean",
    ],
)
def test_the_name_of_a_stage_is_read_back(words: str) -> None:
    assert str(StageId.parse(words)) == words


@pytest.mark.parametrize(
    "words",
    [
        "",
        "reduce",
        "reduce ",
        "record all",
        "reduce hydra mean",
        "reduce ../x",
        "later ../x",
        "export  x",
    ],
)
def test_what_no_stage_can_be_called_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="a stage called"):
        StageId.parse(words)


def test_a_stage_of_a_later_kind_is_left_as_it_is(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path).begin(RECORD, {})
    manifest = tmp_path / names.MANIFEST
    later = {"state": "complete", "settings": {"depth": 3}, "facts": {"seconds": 1.5}}
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(data | {"stages": data["stages"] | {"distil hydra": later}}))
    run = RunDirectory.open(tmp_path)
    assert list(run.stages) == [RECORD]
    run.end(RECORD, "failed")
    assert json.loads(manifest.read_text())["stages"]["distil hydra"] == later


def test_what_comes_from_a_relevance_goes_with_it() -> None:
    assert [str(stage) for stage in REDUCE.of("hydra-mean").results] == [
        "export hydra-mean",
        "clean hydra-mean",
        "report hydra-mean",
    ]
    assert TOPS.of("hydra-top").results == (EXPORT.of("hydra-top"),)
    assert RECORD.results == KEEP.of("hydra").results == ()
    assert StageSource.of(RECORD).fact == "of_record"
