"""Reduction never holds the store in memory: the process stays within the plan's bound, and the
plan within the budget.
"""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import hydra_pipe
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.data.sweep_state import load_state, save_state
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import Rank, ResultName
from hydra_pipe.store.run.stages import RECORD, reduces_to
from hydra_pipe.units import parse_bytes

PIPELINE = str(Path(__file__).with_name("heavy_pipeline.py"))


def random_rows(n: int, width: int, seed: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).standard_normal((n, width), np.float32).astype(np.float16)


def made_up(
    path: Path,
    n_samples: int,
    n_rows: int,
    n_tests: int,
    width: int,
    batch: int,
    checkpoints: int = 1,
    n_random: int | None = None,
) -> Path:
    """A finished recording.

    Columns from `n_random` on are zeros, which take no room on the disk.
    """
    run = RunDirectory.create(path)
    run.begin(RECORD, {"n_samples": n_samples})
    layout = Layout((Block("w", (width,), 0, "dense", (0, width)),), width, 0)
    writer = GradientsWriter(run.path / names.GRADIENTS, layout, "float16", 1, run.run_id)
    n_steps = n_rows // batch
    block, tests_after = (
        random_rows(batch, width, 0),
        [n_steps * (i + 1) // checkpoints for i in range(checkpoints)],
    )
    block[:, n_random:] = 0
    for step in range(n_steps):
        for rows, views in writer.rows.reserve(batch):
            views[names.GRADIENT][:] = block[rows]
            views[names.SCALE][:] = 1.0
            views[names.SAMPLE][:] = (np.arange(batch)[rows] + step * batch) % n_samples
            views[names.STEP][:] = step
            views[names.CURVATURE][:] = 1.0
        zero = {
            "learning_rate": 1e-3,
            "momentum": 0.9,
            "dampening": 0,
            "weight_decay": 0,
            "decoupled_decay": 0,
            "nesterov": 0,
        }
        rest = {"updated": 1, "momentum_started": step == 0, "step_factor": 1}
        rest |= {names.GRADIENT_SCALE: 1, names.LOSS: 0, names.IMBALANCE: 0}
        writer.append_step(zero | rest | {names.FIRST_ROW: step * batch, names.N_ROWS: batch})
        if step + 1 in tests_after:
            tests = writer.test_rows(step + 1)
            for rows, views in tests.reserve(n_tests):
                views[names.GRADIENT][:] = random_rows(n_tests, width, 1)[rows]
                views[names.SCALE][:] = 1.0
                views[names.LOSS][:] = 0.0
            writer.flush_test(tests)
    writer.close()
    run.end(RECORD, "complete", n_steps=n_steps, n_rows=n_rows, n_tests=n_tests)
    return run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A recording, once for each name."""
    made: dict[str, Path] = {}

    def make(path: Path, name: str) -> Path:
        if name == "heavy":
            hydra_pipe.record(PIPELINE, path, dim=64)
            return path
        if name == "large":  # 260 MiB
            return made_up(path, 3000, 90_000, 600, 1500, 200)
        # larger: 340 MiB, 115 on the disk; more features than samples
        return made_up(path, 2000, 60_000, 64, 3000, 100, checkpoints=3, n_random=1000)

    def of(name: str) -> Path:
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp(name) / "run", name)
        return made[name]

    return of


# states are kept often, for what is in memory then
PEAK = """
import json, sys
from hydra_pipe.api import reduce
from hydra_pipe.store.data import save_interval
save_interval.KEEP_SECONDS = 0.5
reduce(sys.argv[1], **json.loads(sys.argv[2]))
# not ru_maxrss, which a process inherits from the one that started it
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def check_peak(run: Path, memory: str, **options: Any) -> None:
    command = [sys.executable, "-c", PEAK, str(run), json.dumps({"memory": memory} | options)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peak = int(ended.stdout) * 1024
    result = ResultName(
        options.get("method", "hydra"), rank=options.get("rank"), is_top="top" in options
    )
    stage = reduces_to(str(result))
    planned = RunDirectory.open(run).stages[stage].facts["plan"]["peak_bytes"]
    assert peak <= planned <= parse_bytes(memory), (peak / 2**20, planned / 2**20)


@pytest.mark.parametrize(
    ("memory", "chunks"),
    [("240MiB", "auto"), ("320MiB", "auto"), ("2GiB", "auto"), ("400MiB", "300x1")],
)
def test_the_process_stays_within_what_the_plan_says(
    runs: Callable[[str], Path], memory: str, chunks: str
) -> None:
    check_peak(runs("large"), memory, method="hydra", chunks=chunks, overwrite=True)


@pytest.mark.parametrize(
    ("name", "method", "memory"),
    [
        ("larger", "tracin", "240MiB"),
        ("larger", "self", "230MiB"),
        ("larger", "influence", "330MiB"),  # by samples
        ("large", "influence", "280MiB"),  # by features
    ],
)
def test_other_methods_stay_within_what_their_plans_say(
    runs: Callable[[str], Path], name: str, method: str, memory: str
) -> None:
    check_peak(runs(name), memory, method=method)


@pytest.mark.parametrize(
    ("name", "rank", "memory"),
    [("larger", "full", "260MiB"), ("larger", 64, "400MiB"), ("large", 200, "400MiB")],
)
def test_a_sweep_over_all_features_or_in_a_basis_stays_within_what_its_plan_says(
    runs: Callable[[str], Path], name: str, rank: Rank, memory: str
) -> None:
    check_peak(runs(name), memory, method="hydra-fisher", rank=rank)


@pytest.mark.parametrize(
    ("name", "method", "memory", "top"),
    [
        ("large", "hydra", "300MiB", 1000),
        ("larger", "tracin", "400MiB", 1000),
        ("larger", "influence", "400MiB", 10),
        ("larger", "hydra-fisher", "400MiB", 1000),
    ],
)
def test_top_samples_stay_within_what_their_plans_say(
    runs: Callable[[str], Path], name: str, method: str, memory: str, top: int
) -> None:
    check_peak(runs(name), memory, method=method, top=top, overwrite=True)


def test_what_a_sweep_has_kept_is_read_once(tmp_path: Path) -> None:
    """The plans count it once more beside what a sweep carries: as it is written, and as it is
    read.
    """
    arrays = {
        name: np.full((4, 2**18), value, np.float32) for name, value in (("a", 1.0), ("v", 2.0))
    }
    n_bytes = sum(a.nbytes for a in arrays.values())

    def peak_of(act: Callable[[], Any]) -> tuple[Any, int]:
        tracemalloc.start()
        found = act()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, peak

    for directory in (tmp_path, tmp_path / "array"):  # of which a state is
        directory.mkdir(exist_ok=True)
        (directory / "zarr.json").write_text("{}")
    tmp_path = tmp_path / "array"
    _, written = peak_of(lambda: save_state(tmp_path, (0, 4), {"step": 3}, arrays))
    found, read = peak_of(lambda: load_state(tmp_path, (0, 4), arrays))
    assert found[0] == {"step": 3}
    assert all(np.array_equal(found[1][name], a) for name, a in arrays.items())
    assert max(written, read) < 1.1 * n_bytes


@pytest.mark.parametrize(("tests", "rank"), [("0-7", None), ("0-149", None), ("0-59", 20)])
def test_training_again_stays_within_what_the_plan_says(
    runs: Callable[[str], Path], tests: str, rank: int | None
) -> None:
    """The process has torch and the pipeline's data beside what the plan carries."""
    check_peak(runs("heavy"), "1GiB", method="hydra-exact", tests=tests, rank=rank, overwrite=True)
