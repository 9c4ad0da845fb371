"""`verify` finds every kind of damage and invents none; `verify --repair` leaves a run that is in
order, and says how to go on.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.pipelines import conv_pipeline, mlp_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.cli.app import app
from hydra_pipe.errors import HydraError, RunError, StoreError
from hydra_pipe.plan import chunking
from hydra_pipe.progress import Progress
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.locks import one_writer
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import StageId
from hydra_pipe.store.zarr.arrays import Array

PIPELINE = """
from support.pipelines import conv_pipeline

def pipeline(seed: int = 0):
    return conv_pipeline(epochs=2, seed=seed)
"""
EVERYTHING = [
    ["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"],
    ["reduce", "RUN", "--method", "hydra", "--by", "label", "--tests", "0-5"],
    ["export", "RUN", "--method", "hydra", "--top", "3", "--full"],
    ["export", "RUN", "--method", "hydra-by-label"],
]
RECORD, KEEP, REDUCE, EXPORT = "record", "keep hydra", "reduce hydra", "export hydra"
BY_LABEL = ("reduce hydra-by-label", "export hydra-by-label")
COMPUTED = (KEEP, REDUCE, EXPORT, *BY_LABEL)


def checksums_file(stage: str) -> str:
    return StageId.parse(stage).checksums_file


class Lines(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@contextmanager
def files_small() -> Iterator[None]:
    """Several files of every kind of array, and several chunks in each of the rows'.

    Not while others make runs that are shared.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MAX_SHARD_ROWS", 16)
        patch.setattr(chunking, "CHUNK_BYTES", 4096)
        patch.setattr("hydra_pipe.store.data.gradients_writer.STEP_SHARD_ROWS", 4)
        patch.setattr("hydra_pipe.store.data.relevance.CHUNK_SAMPLES", 8)
        patch.setattr("hydra_pipe.store.data.hypergradients.MOST_FILE_ROWS", 8)
        patch.setattr("hydra_pipe.reduction.solvers.sums.SAMPLE_MULTIPLE", 8)
        yield


@pytest.fixture
def small_files() -> Iterator[None]:
    with files_small():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of all stages, `run`, and one of another recording of the same shapes,
    `other`.
    """
    directory = tmp_path_factory.mktemp("verify")
    (directory / "pipe.py").write_text(PIPELINE)
    for name, seed in (("run", 0), ("other", 1)):
        options = ["--set", f"seed={seed}", "--encoding", "exact", "--dtype", "float16"]
        with files_small():
            for command in (["record", f"{directory}/pipe.py", "RUN", *options], *EVERYTHING):
                call(command, directory / name)
    return directory


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def other(made: Path) -> Path:
    return made / "other"


def call(command: list[str], run: Path) -> str:
    result = CliRunner().invoke(app, [str(run) if word == "RUN" else word for word in command])
    assert result.exit_code == 0, result.output
    return result.stdout


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def swap(one: Path, two: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    two.rename(one)
    between.rename(two)


def edit(run: Path, change: Callable[[dict], object]) -> None:
    """Change the stages in the manifest, and in its copy."""
    manifest = json.loads((run / "run.json").read_text())
    change(manifest["stages"])
    for file in (run / "run.json", run / "checksums/run.json"):
        file.write_text(json.dumps(manifest))


def rewrite(array: Path, row: int, value: int) -> None:
    """Change a value, with the checksum that belongs to it."""
    found = Array.open(array)
    first = row // found.file_rows * found.file_rows
    values = found.read(slice(first, first + found.file_rows))
    values[row - first] = value
    found.write_file((row // found.file_rows,), values)


def reshape(array: Path, length: int) -> None:
    metadata = json.loads((array / "zarr.json").read_text())
    metadata["shape"][0] = length
    (array / "zarr.json").write_text(json.dumps(metadata, indent=2))


def from_other(run: Path, other: Path, stage: str, *paths: str) -> None:
    """The result of another run, with all that the manifest says of it."""
    for path in (*paths, checksums_file(stage)):
        target = run / path
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(other / path, target)
        else:
            shutil.copy(other / path, target)
    stages = json.loads((other / "run.json").read_text())["stages"]
    edit(run, lambda own: own.update({stage: stages[stage]}))


def changed_since(run: Path, other: Path) -> None:
    """Another recording of the same run, as far as anybody can tell."""
    rewrite(run / ROWS / "sample", 20, 3)
    found = seal(RunDirectory.open(run), StageId.parse(RECORD))
    edit(run, lambda stages: stages[RECORD]["facts"].update(checksums=found))


def stale_rankings(run: Path, other: Path) -> None:
    old = shutil.copytree(run, run.with_name("old"))
    call(["reduce", "RUN", "--method", "hydra", "--tests", "0-4", "--overwrite"], run)
    shutil.copytree(old / RANKINGS, run / RANKINGS)
    shutil.copy(old / checksums_file(EXPORT), run / "checksums")
    stages = json.loads((old / "run.json").read_text())["stages"]
    edit(run, lambda own: own.update({EXPORT: stages[EXPORT]}))


def shorter_table(run: Path, other: Path) -> None:
    file = run / RANKINGS / "samples.parquet"
    pq.write_table(pq.read_table(file, partitioning=None).slice(0, 3), file)


def everything(run: Path, other: Path) -> None:
    for part in (ROWS, KEPT, RELEVANCE, "rankings"):
        for file in (run / part).rglob("*"):
            if file.is_file():
                flip(file)


ROWS, KEPT, RELEVANCE, RANKINGS = (
    "gradients.zarr",
    "hypergradients/hydra.zarr",
    "relevance.zarr",
    "rankings/method=hydra",
)
STEPS, TEST = f"{ROWS}/steps", f"{ROWS}/test/0000000008"
RECORD_AGAIN = "no relevance can be computed from this recording: record the run again"
REDUCE_AGAIN = (
    r"the relevance cannot be trusted: compute it again with hydra-pipe reduce \S+run "
    r"--method hydra --overwrite"
)
BY_LABEL_AGAIN = (
    r"compute it again with hydra-pipe reduce \S+run --by label --tests 0-5 --method hydra "
    r"--overwrite"
)
EXPORT_AGAIN = (
    r"the rankings cannot be trusted: write them again with hydra-pipe export \S+run --full "
    r"--method hydra --top 3"
)
KEEP_AGAIN = (
    r"no test samples can be answered .* keep it again with hydra-pipe reduce \S+run "
    r"--method hydra --keep-hypergradients --overwrite"
)
AGAIN = {RECORD: RECORD_AGAIN, KEEP: KEEP_AGAIN, REDUCE: REDUCE_AGAIN, EXPORT: EXPORT_AGAIN}
OLDER = "is not what was written"


@dataclass(frozen=True)
class Case:
    """Damage.

    Args:
        damage: does it, given the run and another one.
        where: file that must be named.
        found, consequence: what must be said of it.
        back: stages that repairing sets back.
    """

    damage: Callable[[Path, Path], object]
    where: str
    found: str
    consequence: str
    back: tuple[str, ...] = ()


def of_recording(damage: Callable[[Path, Path], object], where: str, found: str) -> Case:
    return Case(damage, where, found, RECORD_AGAIN, (RECORD,))


def of_export(damage: Callable[[Path, Path], object], name: str, found: str) -> Case:
    return Case(damage, f"{RANKINGS}/{name}".rstrip("/"), found, EXPORT_AGAIN, (EXPORT,))


def of_file(what: str, file: str, beside: str, consequence: str, *back: str) -> dict[str, Case]:
    """What can happen to one file of an array, beside which there is another."""
    kinds: dict[str, tuple[Callable[[Path, Path], object], str]] = {
        "missing": (lambda run, _: (run / file).unlink(), r"is missing, with its rows \d"),
        "flipped": (lambda run, _: flip(run / file), "are damaged"),
        "truncated": (lambda run, _: cut(run / file), r"are damaged .* bytes of \d"),
        "empty": (lambda run, _: (run / file).write_bytes(b""), "are damaged"),
        "swapped": (lambda run, _: swap(run / file, run / beside), f"written as {beside}"),
        "older": (lambda run, other: shutil.copy(other / file, run / file), OLDER),
    }
    return {
        f"{what}: {kind}": Case(damage, file, found, consequence, back)
        for kind, (damage, found) in kinds.items()
    }


def of_stray(path: str, where: str | None = None, found: str = "does not belong here") -> Case:
    def place(run: Path, _: Path) -> None:
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_bytes(b"mine")

    return Case(
        place, where or path, found, "move it elsewhere, or let hydra-pipe verify .* --repair do so"
    )


def of_lost_list(stage: str) -> Case:
    consequence = f"swapped and exchanged files of {stage} cannot be found"
    return Case(
        lambda run, _: (run / checksums_file(stage)).unlink(),
        checksums_file(stage),
        "is missing",
        consequence,
    )


DAMAGE: dict[str, Case] = {
    **of_file("rows", f"{ROWS}/gradient/c/1/0", f"{ROWS}/gradient/c/2/0", RECORD_AGAIN, RECORD),
    **of_file("hypergradients", f"{KEPT}/folded/c/1/0", f"{KEPT}/folded/c/2/0", KEEP_AGAIN, KEEP),
    **of_file(
        "relevance",
        f"{RELEVANCE}/hydra/c/1/0",
        f"{RELEVANCE}/hydra/c/2/0",
        REDUCE_AGAIN,
        REDUCE,
        EXPORT,
    ),
    # of the recording
    "arrays swapped": of_recording(
        lambda run, _: swap(run / STEPS / "loss", run / STEPS / "gradient_scale"),
        f"{STEPS}/loss/c/0",
        f"written as {STEPS}/gradient_scale/c/0",
    ),
    "samples flipped": of_recording(
        lambda run, _: flip(run / ROWS / "sample/c/0"), f"{ROWS}/sample/c/0", "damaged"
    ),
    "sample changed": of_recording(
        lambda run, _: rewrite(run / ROWS / "sample", 20, 3), f"{ROWS}/sample/c/1", OLDER
    ),
    "sample out of range": of_recording(
        lambda run, _: rewrite(run / ROWS / "sample", 20, 26),
        f"{ROWS}/sample",
        "row 20 is of sample 26, .* 0 to 25",
    ),
    "step falls": of_recording(
        lambda run, _: rewrite(run / ROWS / "step", 20, 0), f"{ROWS}/step", "falls to 0 at row 20"
    ),
    "step of another": of_recording(
        lambda run, _: rewrite(run / ROWS / "step", 23, 3),
        f"{ROWS}/step",
        "says 3 at row 23, which is of another",
    ),
    "steps do not add up": of_recording(
        lambda run, _: rewrite(run / STEPS / "n_rows", 2, 5), STEPS, "add up to 49 rows of 52"
    ),
    "first row is wrong": of_recording(
        lambda run, _: rewrite(run / STEPS / "first_row", 2, 5),
        f"{STEPS}/first_row",
        "step 2 begins at row 5",
    ),
    "array lost": of_recording(
        lambda run, _: shutil.rmtree(run / STEPS / "updated"), f"{STEPS}/updated", "is missing"
    ),
    "chunks lost": of_recording(
        lambda run, _: shutil.rmtree(run / ROWS / "scale/c"),
        f"{ROWS}/scale",
        "lacks 4 of its 4 files",
    ),
    "test gradients lost": of_recording(
        lambda run, _: shutil.rmtree(run / TEST), f"{TEST}/gradient", "is missing"
    ),
    "labels lost": of_recording(
        lambda run, _: shutil.rmtree(run / ROWS / "labels"), f"{ROWS}/labels/train", "is missing"
    ),
    "store lost": of_recording(lambda run, _: shutil.rmtree(run / ROWS), ROWS, "is missing"),
    "array shortened": of_recording(
        lambda run, _: reshape(run / ROWS / "sample", 40), f"{ROWS}/sample/zarr.json", OLDER
    ),
    "array lengthened": of_recording(
        lambda run, _: reshape(run / ROWS / "sample", 2**50), f"{ROWS}/sample/zarr.json", OLDER
    ),
    "metadata garbled": of_recording(
        lambda run, _: (run / STEPS / "loss/zarr.json").write_text("{"),
        f"{STEPS}/loss/zarr.json",
        OLDER,
    ),
    "metadata lost": of_recording(
        lambda run, _: (run / ROWS / "zarr.json").unlink(), f"{ROWS}/zarr.json", "is missing"
    ),
    "block directory of another": of_recording(
        lambda run, other: shutil.copy(other / ROWS / "zarr.json", run / ROWS),
        f"{ROWS}/zarr.json",
        OLDER,
    ),
    "wrong count": of_recording(
        lambda run, _: edit(run, lambda stages: stages[RECORD]["facts"].update(n_rows=51)),
        f"{ROWS}/gradient",
        "has length 52, 51 were recorded",
    ),
    "no count": of_recording(
        lambda run, _: edit(run, lambda stages: stages[RECORD]["facts"].pop("n_rows")),
        ROWS,
        "it says n_rows is None",
    ),
    "a count that is none": of_recording(
        lambda run, _: edit(run, lambda stages: stages[RECORD]["facts"].update(labels=3)),
        ROWS,
        "it says labels is 3",
    ),
    "recording of another run": Case(
        lambda run, other: from_other(run, other, RECORD, ROWS, "checkpoints"),
        ROWS,
        "belongs to run [0-9a-f]+, run.json to run [0-9a-f]+",
        RECORD_AGAIN,
        (RECORD, *COMPUTED),
    ),
    "rows changed since": Case(
        changed_since,
        f"{RELEVANCE}/hydra",
        "is stale: it was computed from another recording",
        REDUCE_AGAIN,
        COMPUTED,
    ),
    "final parameters flipped": Case(
        lambda run, _: flip(run / "checkpoints/final.pt"),
        "checkpoints/final.pt",
        "changed: .* are lost",
        "record the run again",
        (RECORD,),
    ),
    "final parameters lost": Case(
        lambda run, _: (run / "checkpoints/final.pt").unlink(),
        "checkpoints/final.pt",
        "missing",
        "record the run again",
        (RECORD,),
    ),
    # of hypergradients
    "kept rows of another": Case(
        lambda run, other: shutil.copy(
            other / KEPT / "factored/scale/c/0/0", run / KEPT / "factored/scale/c/0/0"
        ),
        f"{KEPT}/factored/scale/c/0/0",
        OLDER,
        KEEP_AGAIN,
        (KEEP,),
    ),
    "hypergradients lost": Case(
        lambda run, _: shutil.rmtree(run / KEPT), KEPT, "is missing", KEEP_AGAIN, (KEEP,)
    ),
    # of relevances
    "relevances swapped": Case(
        lambda run, _: swap(run / RELEVANCE / "hydra", run / RELEVANCE / "hydra-by-label"),
        f"{RELEVANCE}/hydra/zarr.json",
        OLDER,
        REDUCE_AGAIN,
        (REDUCE, EXPORT, *BY_LABEL),
    ),
    "stale relevance": Case(
        lambda run, other: from_other(run, other, BY_LABEL[0], f"{RELEVANCE}/hydra-by-label"),
        f"{RELEVANCE}/hydra-by-label",
        "is stale: it was computed from another recording",
        BY_LABEL_AGAIN,
        BY_LABEL,
    ),
    "relevances lost": Case(
        lambda run, _: shutil.rmtree(run / RELEVANCE),
        f"{RELEVANCE}/hydra",
        "is missing",
        REDUCE_AGAIN,
        (REDUCE, EXPORT, *BY_LABEL),
    ),
    "relevance of other tests": Case(
        lambda run, _: edit(run, lambda stages: stages[REDUCE]["facts"].update(n_columns=5)),
        f"{RELEVANCE}/hydra",
        r"has shape \(26, 7\), the recording has \(26, 5\)",
        REDUCE_AGAIN,
        (REDUCE, EXPORT),
    ),
    "group of relevances lost": Case(
        lambda run, _: (run / RELEVANCE / "zarr.json").unlink(),
        f"{RELEVANCE}/zarr.json",
        "is missing",
        "--repair writes it again",
    ),
    # of rankings
    "stale rankings": of_export(
        stale_rankings, "", "is stale: it was computed from another relevance"
    ),
    "table flipped": of_export(
        lambda run, _: flip(run / RANKINGS / "samples.parquet"), "samples.parquet", OLDER
    ),
    "table lost": of_export(
        lambda run, _: (run / RANKINGS / "part-00000.parquet").unlink(),
        "part-00000.parquet",
        "is missing",
    ),
    "table truncated": of_export(
        lambda run, _: cut(run / RANKINGS / "matrix/part-00000.parquet"),
        "matrix/part-00000.parquet",
        r"is not what was written: it has [\d,]+ bytes, [\d,]+ were written",
    ),
    "tables swapped": of_export(
        lambda run, _: swap(run / RANKINGS / "classes.parquet", run / RANKINGS / "samples.parquet"),
        "classes.parquet",
        f"written as {RANKINGS}/samples.parquet",
    ),
    "table shortened": of_export(shorter_table, "samples.parquet", OLDER),
    "tables of another run": of_export(
        lambda run, other: shutil.copytree(other / RANKINGS, run / RANKINGS, dirs_exist_ok=True),
        "samples.parquet",
        OLDER,
    ),
    "rankings lost": of_export(lambda run, _: shutil.rmtree(run / RANKINGS), "", "is missing"),
    "rankings of fewer rows": of_export(
        lambda run, _: edit(
            run, lambda stages: stages[EXPORT]["facts"]["files"].update({"samples.parquet": 3})
        ),
        "samples.parquet",
        "has 26 rows, 3 were written",
    ),
    # what does not belong there
    "extra chunk": of_stray(f"{ROWS}/gradient/c/9/0"),
    "extra array": of_stray(f"{STEPS}/gain/c/0"),
    "extra file of hypergradients": of_stray(f"{KEPT}/notes.txt"),
    "extra chunk of a relevance": of_stray(f"{RELEVANCE}/hydra/c/0/9"),
    "extra table": of_stray(f"{RANKINGS}/part-00009.parquet"),
    "extra relevance": of_stray(
        f"{RELEVANCE}/magic/c/0/0", f"{RELEVANCE}/magic", "belongs to no stage of the run"
    ),
    "extra rankings": of_stray(
        "rankings/method=magic/samples.parquet",
        "rankings/method=magic",
        "belongs to no stage of the run",
    ),
    "extra checksums": of_stray("checksums/notes.json", None, "belongs to no stage of the run"),
    "rankings of no stage": Case(
        lambda run, _: edit(run, lambda stages: stages.pop(EXPORT)),
        RANKINGS,
        "belongs to no stage",
        "move it elsewhere",
    ),
    # of checksums
    **{
        f"checksums of {stage} lost": of_lost_list(stage)
        for stage in (RECORD, KEEP, REDUCE, EXPORT)
    },
    "checksums flipped": Case(
        lambda run, _: flip(run / "checksums/record.json"),
        "checksums/record.json",
        "has another SHA-256",
        "cannot be found",
    ),
    "checksums and rows of another run": Case(
        lambda run, other: [
            shutil.copytree(other / p, run / p, dirs_exist_ok=True)
            for p in ("checksums", f"{ROWS}/gradient")
        ],
        "checksums/record.json",
        "has another SHA-256",
        "cannot be found",
        (RECORD,),
    ),
    "no checksums in the manifest": Case(
        lambda run, _: edit(run, lambda stages: stages[EXPORT]["facts"].pop("checksums")),
        checksums_file(EXPORT),
        "has another SHA-256",
        "cannot be found",
        (EXPORT,),
    ),
    "checksums lost, relevance flipped": Case(
        lambda run, _: [
            flip(run / RELEVANCE / "hydra/c/1/0"),
            (run / checksums_file(REDUCE)).unlink(),
        ],
        f"{RELEVANCE}/hydra/c/1/0",
        "are damaged",
        REDUCE_AGAIN,
        (REDUCE, EXPORT),
    ),
    "checksums lost, table truncated": of_export(
        lambda run, _: [
            cut(run / RANKINGS / "samples.parquet"),
            (run / checksums_file(EXPORT)).unlink(),
        ],
        "samples.parquet",
        "cannot be read",
    ),
    "checksums lost, store lost": of_recording(
        lambda run, _: [shutil.rmtree(run / ROWS), (run / checksums_file(RECORD)).unlink()],
        ROWS,
        "is missing",
    ),
    "all checksums lost": Case(
        lambda run, _: shutil.rmtree(run / "checksums"),
        "checksums/run.json",
        "is missing or damaged",
        "--repair writes it again",
    ),
    # of the manifest
    "manifest garbled": Case(
        lambda run, _: (run / "run.json").write_text('{"format": '),
        "run.json",
        "is damaged",
        "--repair has a copy",
    ),
    "manifest empty": Case(
        lambda run, _: (run / "run.json").write_bytes(b""),
        "run.json",
        "is damaged",
        "--repair has a copy",
    ),
    "manifest lost": Case(
        lambda run, _: (run / "run.json").unlink(),
        "run.json",
        "it has no run.json",
        "--repair has a copy",
    ),
    "manifest with a path for a stage": Case(
        lambda run, _: (run / "run.json").write_text(
            (run / "run.json").read_text().replace("reduce hydra", "reduce ../..")
        ),
        "run.json",
        r"a stage called 'reduce ../..'",
        "nothing of the run can be used",
    ),
    "copy of the manifest garbled": Case(
        lambda run, _: (run / "checksums/run.json").write_text("{"),
        "checksums/run.json",
        "is missing or damaged",
        "writes it again",
    ),
    "everything": Case(everything, f"{ROWS}/zarr.json", OLDER, RECORD_AGAIN, (RECORD, *COMPUTED)),
}


def unfinished(run: Path) -> list[str]:
    """What `verify` says of stages that are not finished, if that is all it says."""
    faults = hydra_pipe.verify(run)
    assert {fault.kind for fault in faults} <= {"unfinished"}, faults
    return [fault.what for fault in faults]


def stages_of(run: Path) -> dict[str, str]:
    try:
        found = RunDirectory.open(run)
    except HydraError:
        found = RunDirectory.from_copy(run)
    return {str(name): stage.state for name, stage in found.stages.items()}


def contents_of(run: Path) -> list[bytes]:
    return sorted(file.read_bytes() for file in run.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_with_file_and_consequence_and_repaired(
    run: Path, other: Path, name: str
) -> None:
    case = DAMAGE[name]
    case.damage(run, other)
    before, n_mine = stages_of(run), contents_of(run).count(b"mine")
    faults = hydra_pipe.verify(run)
    said_of_it = [fault.what for fault in faults if fault.where == case.where]
    assert any(re.search(f"{case.found}.*{case.consequence}", what) for what in said_of_it), faults

    said = Lines()
    assert hydra_pipe.verify(run, said, repair=True) == [], said.lines
    done = [line for line in said.lines if ": set back, because " in line]
    assert sorted(line.split(":")[0] for line in done) == sorted(case.back), said.lines
    recording_back = RECORD in case.back
    assert unfinished(run) == (
        ["record is not finished (state: failed): run it again"] if recording_back else []
    )
    kept = {stage: state for stage, state in before.items() if stage not in case.back}
    assert stages_of(run) == (kept | {RECORD: "failed"} if recording_back else kept)
    assert contents_of(run).count(b"mine") == n_mine

    for line in done:
        for command in re.findall(r"hydra-pipe [^,]+", line.split(": run ")[-1]):
            call(shlex.split(command)[1:], run)
    assert hydra_pipe.verify(run) == []
    if not recording_back:
        assert stages_of(run) == before


HEALTHY: dict[str, tuple[dict[str, object], list[list[str]]]] = {
    "recorded only": ({}, []),
    "exact": ({"encoding": "exact"}, EVERYTHING[:1]),
    "exact, int8": (
        {"encoding": "exact", "dtype": "int8"},
        [["reduce", "RUN", "--method", "hydra"], ["export", "RUN", "--method", "hydra"]],
    ),
    "exact, float32": (
        {"encoding": "exact", "dtype": "float32"},
        [["reduce", "RUN", "--method", "hydra"], ["export", "RUN", "--method", "hydra", "--full"]],
    ),
    "projected": (
        {"encoding": "projected", "dim": 32},
        [["reduce", "RUN", "--method", "hydra"], ["export", "RUN", "--method", "hydra"]],
    ),
    "projected, float32": ({"encoding": "projected", "dim": 20, "dtype": "float32"}, EVERYTHING),
    "auto, narrow": (
        {"dim": 64},
        [["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"]],
    ),
    "auto, float16": ({"dtype": "float16"}, [["reduce", "RUN", "--method", "hydra"]]),
    "by label": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra", "--by", "label"],
            ["export", "RUN", "--method", "hydra-by-label"],
        ],
    ),
    "mean": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra", "--mean"],
            ["export", "RUN", "--method", "hydra-mean", "--full"],
        ],
    ),
    "some tests": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra", "--tests", "0-2,5"],
            ["export", "RUN", "--method", "hydra", "--top", "1"],
        ],
    ),
    "all results": ({}, [*EVERYTHING, ["reduce", "RUN", "--method", "hydra", "--mean"]]),
    "kept": ({}, [["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"]]),
    "kept later": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra"],
            ["export", "RUN", "--method", "hydra"],
            ["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"],
        ],
    ),
    "pruned": (
        {},
        [["reduce", "RUN", "--method", "hydra", "--keep-hypergradients"], ["prune", "RUN"]],
    ),
    "pruned, and reduced again": (
        {"encoding": "exact"},
        [
            *EVERYTHING[:1],
            ["prune", "RUN"],
            ["reduce", "RUN", "--method", "hydra", "--tests", "1-3", "--overwrite"],
            ["export", "RUN", "--method", "hydra"],
        ],
    ),
    "reduced again": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra"],
            ["export", "RUN", "--method", "hydra"],
            ["reduce", "RUN", "--method", "hydra", "--overwrite"],
        ],
    ),
    "exported again": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra"],
            ["export", "RUN", "--method", "hydra", "--full"],
            ["export", "RUN", "--method", "hydra", "--top", "2", "--overwrite"],
        ],
    ),
    "in one thread": (
        {},
        [
            ["reduce", "RUN", "--method", "hydra", "--scheduler", "synchronous"],
            ["export", "RUN", "--method", "hydra"],
        ],
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_fault_is_invented_and_nothing_repaired(
    recorded: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    options, commands = HEALTHY[name]
    run = Path(shutil.copytree(recorded(**options), tmp_path / "run"))
    for command in commands:
        call(command, run)
    assert hydra_pipe.verify(run) == []
    files, said = contents_of(run), Lines()
    assert hydra_pipe.verify(run, said, repair=True) == []
    assert contents_of(run) == files
    assert said.lines == []


@pytest.mark.parametrize("labels", [[3, 1, 2], ["cat", "dog", "cat"], None])
def test_no_fault_is_invented_in_a_loop_of_ones_own(
    tmp_path: Path, small_files: None, labels: list | None
) -> None:
    pipeline = mlp_pipeline()
    recorder = Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", 40)
    inputs, targets = pipeline.train.tensors
    for ids in ([0, 1, 2], [5], [39, 4], [7, 8, 9, 10]):
        with recorder.step(ids):
            pipeline.loss(pipeline.model(inputs[ids]), targets[ids]).mean().backward()
            pipeline.optimizer.step()
            pipeline.optimizer.zero_grad()
        if len(ids) == 1:
            recorder.state_dict()
            recorder.record_test([(inputs[:3], targets[:3])], pipeline.loss)
    recorder.record_test([(inputs[:3], targets[:3])], pipeline.loss, labels=labels)
    if labels is not None:
        recorder.label_samples(labels * 13 + labels[:1])
    recorder.close()
    run = tmp_path / "run"
    call(["reduce", "RUN", "--method", "hydra"], run)
    call(["export", "RUN", "--method", "hydra"], run)
    assert hydra_pipe.verify(run) == []


def test_no_checkpoint_goes_on_with_what_is_damaged(tmp_path: Path, small_files: None) -> None:
    def train(recorder: Recorder, pipeline: hydra_pipe.Pipeline, steps: range) -> None:
        inputs, targets = pipeline.train.tensors
        for step in steps:
            ids = [(8 * step + i) % 26 for i in range(8)]
            with recorder.step(ids):
                pipeline.loss(pipeline.model(inputs[ids]), targets[ids]).mean().backward()
                pipeline.optimizer.step()
                pipeline.optimizer.zero_grad()

    pipeline, run = conv_pipeline(), tmp_path / "run"
    recorder = Recorder(pipeline.model, pipeline.optimizer, run, 26, encoding="exact")
    train(recorder, pipeline, range(6))
    state = recorder.state_dict()
    train(recorder, pipeline, range(6, 8))
    recorder.close()
    left = run / "checkpoints/step-0000000006-0123456789abcdef.pt"
    left.parent.mkdir()
    left.write_bytes(b"of a process that was killed when all was recorded")
    swap(run / ROWS / "gradient/c/0/0", run / ROWS / "gradient/c/1/0")
    assert hydra_pipe.verify(run, repair=True) == []
    again = conv_pipeline()
    recorder = Recorder(again.model, again.optimizer, run, 26, encoding="exact")
    with pytest.raises(StoreError, match="gradient lacks 2 chunk files"):
        recorder.load_state_dict(state)
    assert (run / "set-aside/gradients.zarr/gradient/c/0/0").exists()
    assert not left.exists()


def test_a_recording_is_whole_after_pruning_and_its_relevance_is_not_stale(run: Path) -> None:
    call(["prune", "RUN"], run)
    assert hydra_pipe.verify(run) == []
    flip(run / ROWS / "step/c/0")
    assert [fault.where for fault in hydra_pipe.verify(run)] == [f"{ROWS}/step/c/0"]


def test_rows_are_recorded_again_where_what_they_were_pruned_for_is_damaged(run: Path) -> None:
    call(["prune", "RUN"], run)
    flip(run / KEPT / "folded/c/0/0")
    before = stages_of(run)
    assert hydra_pipe.verify(run, repair=True) == []
    assert unfinished(run) == ["record is not finished (state: failed): run it again"]
    del before[KEEP]
    assert stages_of(run) == before | {RECORD: "failed"}


def test_what_a_stopped_writer_has_left_is_no_fault_and_repairing_removes_it(run: Path) -> None:
    left = run / ROWS / "gradient/c/1/0.123-7f00.partial"
    left.write_bytes(b"half a file")
    assert hydra_pipe.verify(run) == []
    assert hydra_pipe.verify(run, repair=True) == []
    assert not left.exists()


def test_a_lost_manifest_without_a_copy_cannot_be_repaired(run: Path) -> None:
    for file in ("run.json", "checksums/run.json"):
        (run / file).write_text("{")
    faults = hydra_pipe.verify(run, repair=True)
    assert [fault.where for fault in faults] == ["run.json"]
    assert "restore it, or record the run again elsewhere" in faults[0].what


def test_a_newer_version_is_not_repaired_by_an_old_copy(run: Path) -> None:
    newer = (run / "run.json").read_text().replace('"format_version": 1', '"format_version": 2')
    (run / "run.json").write_text(newer)
    with pytest.raises(StoreError, match=r"written in format version 2, .* upgrade hydra-pipe"):
        hydra_pipe.verify(run, repair=True)
    assert (run / "run.json").read_text() == newer


@pytest.mark.parametrize("stage", [RECORD, BY_LABEL[0]])
def test_what_another_process_writes_is_not_repaired(run: Path, stage: str) -> None:
    flip(run / ROWS / "gradient/c/1/0")
    files = contents_of(run)
    with (
        one_writer(run, StageId.parse(stage)),
        pytest.raises(RunError, match=f"is being written by this very process .{stage}"),
    ):
        hydra_pipe.verify(run, repair=True)
    assert contents_of(run) == files


@pytest.mark.parametrize("place", [ROWS, RELEVANCE, RANKINGS, "checkpoints"])
def test_files_that_a_link_leads_to_are_neither_moved_nor_removed(
    run: Path, tmp_path: Path, place: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / place).rename(elsewhere)
    (elsewhere / "thesis.partial").write_text("mine")
    (elsewhere / "thesis.txt").write_text("mine")
    (run / place).symlink_to(elsewhere, target_is_directory=True)
    before = contents_of(elsewhere)
    with pytest.raises(StoreError, match="is a link, and files behind a link are not repaired"):
        hydra_pipe.verify(run, repair=True)
    assert contents_of(elsewhere) == before


def test_where_there_is_no_run_nothing_is_repaired_or_made(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run at"):
        hydra_pipe.verify(tmp_path / "run", repair=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_repairs_and_exits_with_0(run: Path) -> None:
    (run / ROWS / "notes.txt").write_text("mine")
    cut(run / RANKINGS / "samples.parquet")
    found = CliRunner().invoke(app, ["verify", str(run)])
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (1, f"{run}: 2 faults")
    repaired = CliRunner().invoke(app, ["verify", str(run), "--repair"])
    assert (repaired.exit_code, repaired.stdout) == (0, f"{run}: in order\n")
    assert re.search(
        r"export hydra: set back, because \S+samples.parquet .*: run hydra-pipe export",
        repaired.stderr,
    )
    assert (run / "set-aside/gradients.zarr/notes.txt").read_text() == "mine"
    again = CliRunner().invoke(app, ["verify", str(run), "--json"])
    assert (again.exit_code, json.loads(again.stdout)) == (0, {"healthy": True, "faults": []})


def test_a_footprint_is_of_the_checksums_of_chunks(run: Path) -> None:
    """As docs/format.md has it, in plain Python."""
    import google_crc32c

    array = Array.open(run / ROWS / "gradient")
    listed = json.loads((run / "checksums/record.json").read_text())["arrays"][f"{ROWS}/gradient"]
    assert array.shards is not None
    n_files = -(-array.shape[0] // array.file_rows)
    assert len(listed) == 20 * n_files
    for number in range(n_files):
        content = (run / ROWS / f"gradient/c/{number}/0").read_bytes()
        n_chunks = int(np.prod([s // c for s, c in zip(array.shards, array.chunks, strict=True)]))
        index = np.frombuffer(content[-16 * n_chunks - 4 : -4], "<u8").reshape(n_chunks, 2)
        ends = [int(start + size) for start, size in index if start != 2**64 - 1]
        assert len(ends) > 1 or number > 0
        crc = google_crc32c.value(b"".join(content[end - 4 : end] for end in ends))
        assert listed[20 * number :][:20] == f"{crc:08x}{len(content):012x}"
