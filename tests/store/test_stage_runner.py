"""The frame that every stage is worked on in: who may, what the manifest says meanwhile, and what
is left where work fails.
"""

import json
from pathlib import Path

import pytest

from hydra_pipe.errors import RunError
from hydra_pipe.progress import Progress
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stage_runner import alone, completing, running, taken_up
from hydra_pipe.store.run.stages import EXPORT, RECORD, REDUCE, StageId

STAGE = EXPORT.of("hydra")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """With a relevance that was computed, as far as its manifest says."""
    found = RunDirectory.create(tmp_path / "run")
    for stage, checksums in ((RECORD, "a" * 64), (REDUCE.of("hydra"), "b" * 64)):
        found.begin(stage, {})
        found.end(stage, "complete", checksums=checksums)
    return found


def on_disk(run: RunDirectory, stage: StageId = STAGE) -> dict:
    return json.loads((run.path / "run.json").read_text())["stages"].get(str(stage))


def export(run: RunDirectory, text: str) -> None:
    with running(run, STAGE, {"top": 3}) as work, work.replaced() as partial:
        (partial / "table").write_text(text)
        work.facts["n_tables"] = 1


def test_a_stage_is_running_until_all_of_it_is_sealed_and_then_complete(run: RunDirectory) -> None:
    with running(run, STAGE, {"top": 3}) as work, work.replaced() as partial:
        assert on_disk(run) == {"state": "running", "settings": {"top": 3}, "facts": {}}
        (partial / "table").write_text("ranks")
        assert not work.place.exists()
    found = on_disk(run)
    seconds, checksums = found["facts"].pop("seconds"), found["facts"].pop("checksums")
    assert found == {"state": "complete", "settings": {"top": 3}, "facts": {"of_reduce": "b" * 64}}
    assert seconds >= 0
    assert (work.place / "table").read_text() == "ranks"
    assert list(json.loads((run.path / STAGE.checksums_file).read_text())["files"]) == [
        "rankings/method=hydra/table"
    ]
    assert run.checksums(STAGE) == checksums
    assert run.stale(STAGE) == []
    run.stages[REDUCE.of("hydra")].facts["checksums"] = "c" * 64
    assert [source.what for source in run.stale(STAGE)] == ["relevance"]


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"]
)
def test_work_that_raises_leaves_a_failed_stage_and_the_old_files(
    run: RunDirectory, error: BaseException
) -> None:
    export(run, "old")

    def work_in_vain() -> None:
        with running(run, STAGE, {"top": 4}) as work, work.replaced() as partial:
            (partial / "table").write_text("half")
            raise error

    with pytest.raises(type(error)):
        work_in_vain()
    assert on_disk(run) == {
        "state": "failed",
        "settings": {"top": 4},
        "facts": {"error": str(error) or "KeyboardInterrupt"},
    }
    assert (run.path / STAGE.area / "table").read_text() == "old"


def test_a_stage_that_cannot_be_sealed_has_failed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> str:
        raise OSError("disk")

    monkeypatch.setattr("hydra_pipe.store.run.stage_runner.seal", broken)
    with pytest.raises(OSError, match="disk"), running(run, STAGE, {}):
        pass
    assert on_disk(run)["state"] == "failed"


def test_what_a_stage_had_found_goes_when_it_is_complete(run: RunDirectory) -> None:
    run.begin(STAGE, {})
    run.stages[STAGE].facts["answered"] = {"done": 3}
    with pytest.raises(ValueError, match="no"), completing(run, STAGE):
        raise ValueError("no")
    # by which it is gone on with
    assert on_disk(run)["facts"] == {
        "answered": {"done": 3},
        "error": "no",
    }
    with completing(run, STAGE) as work, work.replaced() as partial:
        (partial / "table").write_text("ranks")
    assert set(on_disk(run)["facts"]) == {"seconds", "checksums", "of_reduce"}


def test_what_may_not_be_replaced_is_told_before_anything_is_withdrawn(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, "old")
    before = on_disk(run)

    def refused(*args: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("hydra_pipe.store.run.stage_runner.check_stages", refused)
    with pytest.raises(PermissionError, match="read-only"), running(run, STAGE, {}):
        pass
    assert on_disk(run) == before


def test_one_process_alone_takes_a_stage_up(run: RunDirectory) -> None:
    other = RunDirectory.open(run.path)
    with taken_up(
        run, STAGE, RECORD, STAGE, has_work=lambda: True, progress=Progress()
    ) as is_needed:
        assert is_needed
        for stage in (STAGE, RECORD):
            with pytest.raises(RunError, match="is being written"), alone(other, stage):
                pass
    with alone(other, STAGE, RECORD):
        pass


def test_without_work_nothing_is_locked(run: RunDirectory) -> None:
    with (
        alone(RunDirectory.open(run.path), STAGE),
        taken_up(run, STAGE, has_work=lambda: False, progress=Progress()) as is_needed,
    ):
        assert not is_needed


def test_what_another_has_done_meanwhile_is_not_done_again(run: RunDirectory) -> None:
    """The manifest is read anew when the lock is held: until then the other may have been at it."""
    other = RunDirectory.open(run.path)
    asked = []

    def has_work() -> bool:
        asked.append(STAGE in run.stages)
        if len(asked) == 1:
            export(other, "by another")
        return run.has_work(STAGE, {"top": 3})

    with taken_up(run, STAGE, has_work=has_work, progress=Progress()) as is_needed:
        assert not is_needed
    assert asked == [False, True]
