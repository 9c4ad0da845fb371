"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hydra_pipe.cli.app import app

ROOT = Path(__file__).parents[1]
MARK = "<!-- executed by tests/test_readme.py -->\n```python\n"
BLOCKS = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split(MARK)[1:]]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_readmes_pipeline_and_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    call("run", "mine.py", "runs/mine", "--set", "lr=0.05", "--set", "epochs=1")
    call("run", str(ROOT / "pipelines" / "digits.py"), "runs/digits", "--set", "epochs=2")
    assert len(BLOCKS) == 5
    for block in BLOCKS[1:]:
        exec(compile(block, "README.md", "exec"), {})
    assert "relevance" in capsys.readouterr().out


def test_every_command_and_option_has_help_with_an_example() -> None:
    listing = call("--help")
    commands = re.findall(r"^  (\w+) +\S", listing.split("Commands:")[1], flags=re.MULTILINE)
    known = {"record", "reduce", "export", "report", "run", "probe", "clean", "evaluate", "info", "verify", "prune"}
    assert set(commands) == known
    readme = (ROOT / "README.md").read_text()
    for command in commands:
        assert "Example: hydra-pipe " + command in call(command, "--help")
        assert f"hydra-pipe {command}" in readme, f"the README does not mention {command}"
