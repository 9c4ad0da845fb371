"""docs/scaling.md says what the planner says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_tables_is_the_planners() -> None:
    script = ROOT / "benchmarks" / "scaling.py"
    printed = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    ).stdout
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert len(lines) == 3 * 7
    assert [line for line in lines if line not in document] == []
