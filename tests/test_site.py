"""The documentation builds as a site without a warning, nothing is missing from its reference, and
its code runs as it stands.
"""

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.per_sample import registry
from hydra_pipe.recording import optimizers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# pages whose Python runs from top to bottom; parquet.md, notebook.md and tutorial.ipynb have tests
# of their own
MIGRATING = ("bergson", "captum", "dattri", "dattri-llm", "kronfluence", "logix", "trak")
EXECUTED = (
    "own-loop.md",
    "layer-rule.md",
    "optimiser.md",
    *(f"migrating/{peer}.md" for peer in MIGRATING),
)


class Page(HTMLParser):
    """Ids of a page's elements, and what each of its sections says."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id")
        if name is not None:
            self.ids.add(name)
        if tag == "section":
            assert name is not None
            self._open.append(name)
            self.sections[name] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in self._open:
            self.sections[name] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(out / "doctrees"),
        str(DOCS),
        str(out / "html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    sections = Page(site / "reference" / "commands.html").sections
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) > {"record", "reduce", "export", "run", "info", "verify"}
    for name, command in commands.items():
        said = sections[f"hydra-pipe-{name}"]
        assert f"Example: hydra-pipe {name}" in said
        for parameter in command.params:
            shown = parameter.opts if parameter.opts[0].startswith("-") else [parameter.metavar]
            for option in shown:
                assert re.search(rf"^{re.escape(option)}( |:|/|$)", said, flags=re.MULTILINE), (
                    name,
                    option,
                )


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = Page(site / "reference" / "python.html").ids
    callbacks = (ROOT / "hydra_pipe" / "integrations").glob("*.py")
    for module in [path.stem for path in callbacks if "class HydraCallback(" in path.read_text()]:
        assert f"hydra_pipe.integrations.{module}.HydraCallback" in ids
    for name in hydra_pipe.__all__:
        assert f"hydra_pipe.{name}" in ids
        found = getattr(hydra_pipe, name)
        assert (found.__doc__ or "").strip(), f"{name} has no docstring"
        if isinstance(found, type):
            members = [
                m for m in vars(found) if not m.startswith("_") and callable(getattr(found, m))
            ]
            assert {f"hydra_pipe.{name}.{m}" for m in members} <= ids, name


def test_every_page_is_reached_from_the_first(site: Path) -> None:
    first = (site / "index.html").read_text()
    for page in [*DOCS.glob("*.md"), *DOCS.glob("migrating/*.md"), *DOCS.glob("architecture/*.md")]:
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert name == "index.html" or f'href="{name}"' in first, name


@pytest.mark.parametrize("page", EXECUTED)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for registered in (optimizers, registry):  # what a page registers is gone with its test
        monkeypatch.setattr(registered, "_RULES", dict(registered._RULES))
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    assert any(path.name == "run.json" for path in tmp_path.rglob("run.json"))


def test_a_newcomer_can_follow_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(DOCS.parent / "pipelines")
    page = (DOCS / "getting-started.md").read_text()
    steps = re.findall(
        r"^    hydra-pipe ([^\n]*)$|^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE
    )
    assert len(steps) > 10
    for command, code in steps:
        if command:
            done = CliRunner().invoke(app, shlex.split(command))
            assert done.exit_code == 0, done.stderr
        elif "def " in code:
            (tmp_path / "mine.py").write_text(code)
        else:
            exec(compile(code, "getting-started.md", "exec"), {})
    assert "relevance_sum" in capsys.readouterr().out
    for name in (
        "report.html",
        "report-hydra-fisher-of-shifted.html",
        "cleaning/method=dynamics/keep.txt",
    ):
        assert (tmp_path / "runs" / "digits" / name).exists()
