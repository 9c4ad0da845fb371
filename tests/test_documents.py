"""Documents for users agree with the code: classes of errors, extras, versions, platforms."""

import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hydra_pipe
from hydra_pipe import errors

ROOT = Path(__file__).parents[1]
TEMPLATES = [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "refused", "config")]
ARCHITECTURE = sorted((ROOT / "docs" / "architecture").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def first_column(page: str) -> list[str]:
    """Code in the first column of the tables of a page."""
    return re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)


def test_the_page_of_errors_has_each_class_once() -> None:
    classes = [
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HydraError)
    ]
    assert sorted(first_column("errors.md")) == classes


def test_the_page_of_installation_has_each_extra_once() -> None:
    assert sorted(first_column("installation.md")) == sorted(PROJECT["optional-dependencies"])


def test_the_advice_of_a_missing_package_is_an_extra_that_exists() -> None:
    assert set(errors._EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_a_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert f"\n## {hydra_pipe.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {hydra_pipe.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_change_stands_in_the_changelog_once() -> None:
    entries = re.split(r"^- ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    begins = [" ".join(re.findall(r"\w+", entry)[:3]) for entry in entries]
    assert [begin for begin in begins if begins.count(begin) > 1] == []


def test_the_map_of_the_code_has_each_part_of_it() -> None:
    floors = (ROOT / "docs" / "architecture.md").read_text().split("## Floors")[1].split("## ")[0]
    on_the_map = set(re.findall(r"^    (\w+(?:, \w+)*)", floors, flags=re.MULTILINE))
    named = {name for names in on_the_map for name in names.split(", ")}
    named |= set(re.findall(r"(\w+)/ ", floors))
    parts = {
        path.stem
        for path in (ROOT / "hydra_pipe").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= named


@pytest.mark.parametrize(
    "page", ["architecture.md", *(f"architecture/{page.name}" for page in ARCHITECTURE)]
)
def test_a_page_of_architecture_names_files_that_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    files = re.findall(r"`((?:\w+/)*\w+\.(?:py|c))`", text)
    package = ROOT / "hydra_pipe"
    missing = [
        file
        for file in files
        if not ((ROOT / file).exists() or (package / file).exists() or [*package.rglob(file)])
    ]
    missing = [file for file in missing if not [*(ROOT / "tests").rglob(file)]]
    assert missing == []


def test_windows_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(
        ImportError, match=r"hydra-pipe runs on Linux and macOS.*Windows Subsystem for Linux"
    ):
        importlib.reload(hydra_pipe)


def yaml_of(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("path", ["test.yml", "wheels.yml"])
def test_a_workflow_is_one_that_can_run(path: str) -> None:
    workflow = yaml_of(f".github/workflows/{path}")
    assert workflow[True]  # YAML 1.1 takes the word `on` for a truth value
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert {*job.get("needs", [])} <= {*workflow["jobs"]}


def test_the_workflow_tests_each_version_of_python_that_the_package_names() -> None:
    tested = yaml_of(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested == named


@pytest.mark.parametrize("path", [".pre-commit-config.yaml", "CITATION.cff", *TEMPLATES])
def test_other_files_of_yaml_can_be_read(path: str) -> None:
    assert yaml_of(path)


def test_the_tests_of_lowest_versions_need_what_the_extra_dev_needs() -> None:
    needed = [
        line
        for line in (ROOT / "tests" / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert {*needed} <= {*PROJECT["optional-dependencies"]["dev"]}
