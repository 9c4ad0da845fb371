"""An export stays within its plan's bound, whatever of the relevance fits the budget."""

import subprocess
import sys
from pathlib import Path

import pytest
from made import made_run

PEAK = """
import sys
from hydra_pipe.exporting import run
from hydra_pipe.plan import exporting as planning
planning.MOST_WHOLE = int(sys.argv[3])
plans, plan = [], run.plan_export
run.plan_export = lambda given: plans.append(plan(given)) or plans[-1]
run.export_run(sys.argv[1], method="hydra", memory=sys.argv[2], full=True, overwrite=True)
# not ru_maxrss, which a process inherits from the one that started it
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(int(peak) * 1024, plans[0].peak_bytes, plans[0].block_tests, plans[0].slab_samples)
"""
N_SAMPLES, N_TESTS = 600_000, 64


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relevance of 150 MiB, full of ties, which take the most memory to rank."""
    return made_run(tmp_path_factory.mktemp("large") / "run", N_SAMPLES, N_TESTS, n_values=4)


@pytest.mark.parametrize(
    ("memory", "whole", "block_tests", "slab"),
    [
        ("4GiB", 2**20, 64, N_SAMPLES),
        ("400MiB", 2**20, 16, N_SAMPLES),
        ("500MiB", 2**18, 64, 2**18),
    ],
)
def test_the_process_stays_within_what_the_plan_says(
    large_run: Path, memory: str, whole: int, block_tests: int, slab: int
) -> None:
    command = [sys.executable, "-c", PEAK, str(large_run), memory, str(whole)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, planned, *division = map(int, found.split())
    assert division == [block_tests, slab]
    assert (
        planned / 2
        < peak
        <= planned
        <= int(memory[:-3]) * 2 ** (20 if memory.endswith("MiB") else 30)
    )
