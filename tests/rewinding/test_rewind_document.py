"""The page about `rewind` can be followed, and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hydra_pipe.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "rewind.md").read_text()
NUMBERS = re.compile(r"[-+]?\d[\d.,e-]*%?")


def without_figures(lines: list[str]) -> list[str]:
    """Lines without what a little rounding may change."""
    return [" ".join(NUMBERS.sub("0", line).split()) for line in lines]


def test_the_page_of_rewind_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    training, look = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {}
    exec(compile(training, "rewind.md", "exec"), scope)
    (console,) = re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    for session in console.split("$ hydra-pipe ")[1:]:
        command, *shown = session.splitlines()
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, done.output
        printed = done.stdout.splitlines()
        if "--spikes" in command:
            steps = [[line.split()[0] for line in lines[1:7]] for lines in (printed, shown)]
            assert sorted(steps[0]) == sorted(steps[1])
        assert without_figures(printed) == without_figures(shown)
    assert (tmp_path / "spikes.png").exists()
    exec(compile(look, "rewind.md", "exec"), scope)
    assert float(capsys.readouterr().out) > 0
    repeaters = scope["spikes"].repeaters  # type: ignore[attr-defined]
    assert set(repeaters["train_id"].to_pylist()) <= set(range(640, 672))
