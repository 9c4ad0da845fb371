"""Decisions of a person in place of proposals: files, what is refused, and what stays."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.mislabelled import N, small
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import RunError, UsageError
from hydra_pipe.retraining import campaign
from hydra_pipe.store.run.stages import CLEAN

GIVEN = small().train.tensors[1].numpy()


def written(path: Path, *lines: str, head: str = "sample,decision,label") -> Path:
    path.write_text("\n".join([head, *lines, ""]))
    return path


def place(run: Path, method: str = "dynamics") -> Path:
    return run / CLEAN.of(method).area


def proposed_of(run: Path) -> list[int]:
    ids = hydra_pipe.clean(run, lowest=8).drop.column("train_id").to_pylist()
    assert len(ids) == 8
    return ids


def test_decisions_replace_proposals_in_every_file_and_the_rest_stays_proposed(
    run: Path, tmp_path: Path
) -> None:
    first, second, third, *rest = proposed_of(run)
    kept = hydra_pipe.clean(run, lowest=8).keep.tolist()
    file = written(
        tmp_path / "own.csv",
        f"{first},keep,",
        f"{second},drop,",
        f"{third},relabel,{(GIVEN[third] + 2) % 4}",
        f"{kept[0]},relabel,{(GIVEN[kept[0]] + 1) % 4}",
        f"{kept[1]},relabel,{GIVEN[kept[1]]}",
    )
    found = hydra_pipe.clean(run, decisions=file)
    assert found.is_new
    ids = [int(line) for line in (place(run) / "keep.txt").read_text().split()]
    assert set(ids) == set(kept) - {kept[0]} | {first}, "the given class as new one keeps a sample"
    drop = {row["train_id"]: row for row in pq.read_table(place(run) / "drop.parquet").to_pylist()}
    assert drop.keys() == {second, third, kept[0], *rest}
    assert {i: row["action"] for i, row in drop.items()} == {
        second: "drop", third: "relabel", kept[0]: "relabel", **dict.fromkeys(rest, "relabel")
    }  # fmt: skip
    assert {i for i, row in drop.items() if row["decided"]} == {second, third, kept[0]}
    table = str(place(run) / "relabel.parquet")
    relabel = duckdb.sql(f"SELECT train_id, given, suggested, suggested_class FROM '{table}'")
    new = {i: (given, s, c) for i, given, s, c in relabel.fetchall()}
    other = (GIVEN[third] + 2) % 4
    assert new.keys() == {third, kept[0], *rest}
    assert new[third] == (GIVEN[third], other, other)
    assert "5 samples decided: 1 to keep, 3 to relabel, 1 to drop" in str(found.summary)
    assert "5 proposals are undecided: they stay proposed" in str(found.summary)
    assert not hydra_pipe.clean(run, decisions=file).is_new
    assert hydra_pipe.clean(run, lowest=8).drop.equals(found.drop), "decisions stay"
    assert hydra_pipe.verify(run) == []


def test_undecided_proposals_may_be_kept_and_other_decisions_begin_anew(
    run: Path, tmp_path: Path
) -> None:
    first, second, *_ = proposed_of(run)
    file = written(tmp_path / "own.csv", f"{first},drop,")
    found = hydra_pipe.clean(run, decisions=file, undecided="keep")
    assert found.drop.column("train_id").to_pylist() == [first]
    assert found.drop.column("action").to_pylist() == ["drop"]
    again = hydra_pipe.clean(run, decisions=written(tmp_path / "b.csv", f"{second},keep,"))
    assert again.drop.num_rows == 7
    assert first in again.drop.column("train_id").to_pylist()
    assert hydra_pipe.clean(run, lowest=8, overwrite=True).drop.num_rows == 8


def test_decisions_need_no_proposal_and_serve_relevance_too(run: Path, tmp_path: Path) -> None:
    new = (GIVEN[7] + 1) % 4
    file = written(tmp_path / "own.csv", f"7,relabel,{new}", "9,drop,")
    for method in ("dynamics", "hydra"):
        found = hydra_pipe.clean(run, method=method, decisions=file, undecided="keep")
        rows = {row["train_id"]: row for row in found.drop.to_pylist()}
        assert (rows[7]["suggested_class"], rows[7]["action"]) == (new, "relabel")
        assert rows[9]["action"] == "drop"
        assert set(rows) == {7, 9}


def test_a_spreadsheet_may_have_saved_the_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_bytes(b"\xef\xbb\xbfsample,decision,label\r\n3,keep,\r\n\r\n4,drop,\r\n")
    assert hydra_pipe.clean(run, decisions=file).summary["decisions"]["n_decided"] == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x,keep,"], "line 2 is no decision on a sample"),
        (["1,keep"], "line 2 is no decision on a sample"),
        (["1,throw,"], "line 2: the decision is 'throw': write keep, relabel or drop"),
        (["1,relabel,"], "line 2: relabel with the label ''"),
        (["1,drop,3"], "line 2: drop with the label '3'"),
        (["1,keep,", "1,drop,"], "line 3: sample 1 is decided twice"),
        ([f"{N},keep,"], "the run has the samples 0 to 59"),
        (["1,relabel,4"], "label 4: the classes are 0 to 3"),
        ([f"{i},drop," for i in range(N)], "some must stay"),
    ],
)
def test_what_is_no_decision_is_refused_by_its_line_and_changes_nothing(
    run: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    before = hydra_pipe.clean(run).drop
    with pytest.raises(UsageError, match=message):
        hydra_pipe.clean(run, decisions=written(tmp_path / "own.csv", *lines))
    after = hydra_pipe.clean(run)
    assert not after.is_new
    assert after.drop.equals(before)


def test_a_file_of_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not begin with sample,decision,label"):
        hydra_pipe.clean(run, decisions=written(tmp_path / "own.csv", "1,2", head="a,b"))
    with pytest.raises(UsageError, match="cannot be read"):
        hydra_pipe.clean(run, decisions=tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="--undecided maybe"):
        hydra_pipe.clean(run, decisions=written(tmp_path / "b.csv"), undecided="maybe")
    hydra_pipe.clean(run, lowest=8)
    with pytest.raises(RunError, match="lowest=8"):
        hydra_pipe.clean(run, decisions=written(tmp_path / "b.csv"), lowest=9)


def test_retraining_measures_the_decisions_and_an_interrupt_keeps_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = proposed_of(run)
    file = written(tmp_path / "own.csv", f"{first},keep,", f"{second},drop,")
    decided = hydra_pipe.clean(run, decisions=file)

    def killed(*_: object, **__: object) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(campaign.Retrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            hydra_pipe.clean(run, lowest=8, retrain=True, seeds=1)
    assert hydra_pipe.clean(run, lowest=8).drop.equals(decided.drop)
    assert len(hydra_pipe.cleaned(small().train, run)) == N - 1
    found = hydra_pipe.clean(run, lowest=8, retrain=True, seeds=1)
    assert found.drop.equals(decided.drop)
    names = [row["trained on"] for row in found.retraining]
    assert "proposed" in names
    assert "mixed" not in names
    assert [row["changed"] for row in found.retraining if row["trained on"] == "proposed"] == [7]
    assert hydra_pipe.verify(run) == []
    moved = written(tmp_path / "c.csv", f"{first},drop,")
    assert hydra_pipe.clean(run, decisions=moved).retraining == []
    assert hydra_pipe.verify(run) == []


def test_the_command_says_what_was_decided(run: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "own.csv", "3,keep,")
    found = CliRunner().invoke(app, ["clean", str(run), "--decisions", str(file)])
    assert found.exit_code == 0, found.output
    assert "1 samples decided: 1 to keep" in found.stdout
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    wrong = CliRunner().invoke(app, ["clean", str(copy), "--decisions", str(tmp_path)])
    assert wrong.exit_code == 2
