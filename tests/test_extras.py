"""Packages that hydra-pipe does not depend on: where one is missing, the message has the extra to
install.
"""

import sys
from pathlib import Path

import pytest

from hydra_pipe.errors import ExtraError, HydraError, UserCodeError, extra_of
from hydra_pipe.loading import load_pipeline
from hydra_pipe.reduction.executors import executor_of


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("package", ["transformers", "lightning"])
def test_an_integration_without_its_trainer_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    without(monkeypatch, package)
    monkeypatch.delitem(sys.modules, f"hydra_pipe.integrations.{package}", raising=False)
    with pytest.raises(ExtraError, match=rf"pip install 'hydra-pipe\[{package}\]'") as found:
        __import__(f"hydra_pipe.integrations.{package}")
    # as where nothing is caught but what Python itself raises
    assert isinstance(found.value, ModuleNotFoundError)
    assert isinstance(found.value, HydraError)
    assert (found.value.name or "").partition(".")[0] == package


@pytest.mark.parametrize(
    ("package", "extra"), [("sklearn.datasets", "pipelines"), ("transformers", "transformers")]
)
def test_a_pipeline_whose_package_is_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    without(monkeypatch, package.partition(".")[0])
    (tmp_path / "mine.py").write_text(f"import {package}\n")
    with pytest.raises(UserCodeError, match=rf"pip install 'hydra-pipe\[{extra}\]'"):
        load_pipeline(str(tmp_path / "mine.py"))


def test_worker_processes_without_distributed_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "distributed")
    monkeypatch.delitem(sys.modules, "hydra_pipe.reduction.executors.distributed", raising=False)
    with pytest.raises(
        ExtraError,
        match=r"--scheduler processes cannot be used .*pip install 'hydra-pipe\[cluster\]'",
    ):
        executor_of("processes")


def test_a_package_that_no_extra_has_is_named_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(UserCodeError, match=r"No module named 'no_such_package'$"):
        load_pipeline(str(tmp_path / "mine.py"))
    assert extra_of(ImportError("cannot import name")) is None
