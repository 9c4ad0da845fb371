"""Reduction never holds the store in memory: the process stays within the plan's bound, and the plan within the budget."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.store import names
from hydra_pipe.store.run import RECORD, RunDirectory
from hydra_pipe.store.writing import GradientsWriter

N_SAMPLES, N_ROWS, N_TESTS, WIDTH = 3000, 90_000, 600, 1500


def random_rows(n: int, seed: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).standard_normal((n, WIDTH), np.float32).astype(np.float16)


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording of 260 MiB, made up."""
    run = RunDirectory.create(tmp_path_factory.mktemp("large") / "run")
    run.begin(RECORD, {"n_samples": N_SAMPLES})
    layout = Layout((Block("w", (WIDTH,), 0, "dense", (0, WIDTH)),), WIDTH, 0)
    writer = GradientsWriter(run.path / names.GRADIENTS, layout, "float16", 1, run.run_id)
    block, batch = random_rows(1000, 0), 1000
    for step in range(N_ROWS // batch):
        for rows, views in writer.rows.reserve(batch):
            views[names.GRADIENT][:] = block[rows]
            views[names.SCALE][:] = 1.0
            views[names.SAMPLE][:] = (np.arange(batch)[rows] + step * batch) % N_SAMPLES
            views[names.STEP][:] = step
        zero = {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "decoupled_decay": 0, "nesterov": 0}
        rest = {"updated": 1, "momentum_started": step == 0, "step_factor": 1}
        rest |= {names.GRADIENT_SCALE: 1, names.LOSS: 0, names.IMBALANCE: 0}
        writer.append_step(zero | rest | {names.FIRST_ROW: step * batch, names.N_ROWS: batch})
    tests = writer.test_rows(N_ROWS // batch)
    for rows, views in tests.reserve(N_TESTS):
        views[names.GRADIENT][:] = random_rows(N_TESTS, 1)[rows]
        views[names.SCALE][:] = 1.0
        views[names.LOSS][:] = 0.0
    writer.flush_test(tests)
    writer.close()
    run.end(RECORD, "complete", n_steps=N_ROWS // batch, n_rows=N_ROWS, n_tests=N_TESTS)
    return run.path


PEAK = """
import sys
from hydra_pipe.api import reduce
reduce(sys.argv[1], memory=sys.argv[2], chunks=sys.argv[3], overwrite=True)
# not ru_maxrss, which a process inherits from the one that started it
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.parametrize(("memory", "chunks"), [("240MiB", "auto"), ("320MiB", "auto"), ("2GiB", "auto"), ("400MiB", "300x1")])
def test_the_process_stays_within_what_the_plan_says(large_run: Path, memory: str, chunks: str) -> None:
    command = [sys.executable, "-c", PEAK, str(large_run), memory, chunks]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    planned = RunDirectory.open(large_run).stages["reduce hydra"].facts["plan"]["peak_bytes"]
    assert peak <= planned <= int(memory[:-3]) * 2 ** (20 if memory.endswith("MiB") else 30)
