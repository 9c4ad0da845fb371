"""What the README says to do can be done, and prints what the README says."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from hydra_pipe.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MARK = "<!-- executed by tests/test_readme.py -->\n```python\n"
MOST_LINES = 110


def python_of(text: str) -> list[str]:
    return [block.split("```")[0] for block in text.split(MARK)[1:]]


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def without_figures(line: str) -> str:
    """A line of output without what differs from machine to machine."""
    line = re.sub(r"(\d+ (min|h) )?[\d.,]+ s\b", "TIME", line)
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,]*", "0", line)).strip()


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout + result.stderr


def test_the_readme_is_short_and_its_pictures_and_pages_exist() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if ":" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_loop_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16).float().flatten(1), torch.tensor(digits.target)
    y[:1400:10] = (y[:1400:10] + 1) % 10
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    scope = {
        "F": F,
        "DataLoader": DataLoader,
        "train": TensorDataset(x[:1400], y[:1400]),
        "test": TensorDataset(x[1400:], y[1400:]),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    (block,) = python_of(README)
    assert block.count("# new\n") == 5
    exec(compile(block, "README.md", "exec"), scope)
    (shown,) = blocks_of("text")
    printed = capsys.readouterr().out
    assert [*map(without_figures, printed.splitlines())] == [
        *map(without_figures, shown.splitlines())
    ]


def test_the_readmes_commands_print_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (console,) = blocks_of("console")
    sessions = re.findall(
        r"^\$ hydra-pipe ([^\n]*)\n((?:[^$][^\n]*\n)+)", console, flags=re.MULTILINE
    )
    assert [command.split()[0] for command, _ in sessions] == ["record", "reduce", "report"]
    for command, shown in sessions:
        printed = {*map(without_figures, call(*shlex.split(command)).splitlines())}
        assert [
            line for line in shown.splitlines() if without_figures(line) not in printed
        ] == [], printed


def test_the_page_of_pipelines_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    blocks = python_of((ROOT / "docs" / "pipelines.md").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(blocks[0])
    call("run", "mine.py", "runs/mine", "--set", "lr=0.05", "--set", "epochs=1")
    call("run", str(ROOT / "pipelines" / "digits.py"), "runs/digits", "--set", "epochs=2")
    assert len(blocks) == 5
    for block in blocks[1:]:
        exec(compile(block, "pipelines.md", "exec"), {})
    assert "relevance" in capsys.readouterr().out


def test_every_command_and_option_has_help_with_an_example() -> None:
    listing = call("--help")
    commands = re.findall(r"^  (\w+) +\S", listing.split("Commands:")[1], flags=re.MULTILINE)
    known = {
        "record",
        "reduce",
        "export",
        "report",
        "run",
        "probe",
        "clean",
        "combine",
        "evaluate",
        "rewind",
        "info",
        "verify",
        "prune",
    }
    assert set(commands) == known
    for command in commands:
        assert "Example: hydra-pipe " + command in call(command, "--help")
        assert f"hydra-pipe {command}" in README, f"the README does not mention {command}"
