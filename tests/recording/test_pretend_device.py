"""Recording on an accelerator that this machine does not have: nothing is on the wrong device, rows
are those of the host, and the host waits at most once for the steps that are written together.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("on_pretend_device.py")
# operators of a recorded step beyond those of a plain one, views included
CEILINGS = {
    "MLP, SGD": 40,
    "MLP, AdamW, projected": 110,
    "LeNet-5, SGD": 150,
    "LeNet-5, AdamW": 150,
    "LeNet-5, SGD, projected": 440,
    "norms, AdamW, exact": 165,
    "text, SGD, exact": 105,
    "text, AdamW, accumulated": 250,
    "MLP, AdamW that counts there": 45,
    "language, AdamW": 165,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """In a process of its own: the device stays registered for the rest of a process."""
    directory = tmp_path_factory.mktemp("pretend")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", CEILINGS)
def test_a_run_on_the_device_is_that_of_the_host(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    assert found[name]["unlike"] == []


@pytest.mark.parametrize("name", CEILINGS)
def test_the_host_waits_once_for_the_steps_that_are_written_together(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    assert found[name]["most reads"] == 1
    assert found[name]["steps without a read"] >= 16


@pytest.mark.parametrize("name", CEILINGS)
def test_a_step_has_few_operators_more(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["operators"] - found[name]["plain"] <= CEILINGS[name]


def test_every_case_is_looked_at(found: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == CEILINGS.keys()
