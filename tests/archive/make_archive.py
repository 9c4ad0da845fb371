"""Make the archive: tiny runs in the format of today, with every stage there is, and what others
must read in them.

    python tests/archive/make_archive.py tests/archive/v1

An archive is made once for a version of the format, and never again: the test reads what an older
hydra-pipe has written.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

import hydra_pipe
from hydra_pipe.cli.app import app

HERE = Path(__file__).parent
RUNS = ("whole", "pruned", "keyed/seed-0", "together")
# lossless rows, and everything that can be computed from them
WHOLE = """
record pipeline.py whole --encoding exact --test-every epoch
probe whole pipeline.py:new_samples --name new
reduce whole --method hydra --keep-hypergradients
reduce whole
reduce whole --rank 20
reduce whole --method tracin
reduce whole --method self
reduce whole --method hydra --probe new
reduce whole --method hydra --by label
export whole --method hydra --full --top 3
export whole --method hydra --probe new
clean whole --method hydra --lowest 2 --retrain --seeds 2
clean whole --lowest 3
evaluate pipeline.py whole loo --samples 0-3
evaluate pipeline.py whole lds --retrainings 10
evaluate pipeline.py whole noise --left-out 1
evaluate pipeline.py whole smoothness
report whole --method hydra --tests 0-1 --top 2
"""
# projected rows in int8, preconditioned, and a matrix of hypergradients whose rows are deleted
PRUNED = """
record pipeline.py:adam pruned --encoding projected --dim 40 --dtype int8
reduce pruned --keep-hypergradients
export pruned
prune pruned
"""


# two runs with keys, and the mean of both
TOGETHER = """
record pipeline.py:keyed keyed --seeds 2 --encoding projected --dim 40
reduce keyed/seed-0
reduce keyed/seed-1
export keyed/seed-0 --top 2
combine keyed/seed-0 keyed/seed-1 --into together
export together --top 2
clean together --method hydra-fisher --lowest 2
"""


def main(target: Path) -> None:
    """Write the archive to `target`, which must not exist."""
    target.mkdir()
    shutil.copy(HERE / "pipeline.py", target)
    os.chdir(target)  # so that no path of this machine is recorded
    for command in (WHOLE + PRUNED + TOGETHER).split("\n"):
        with unplotted() if command.startswith("evaluate") else nullcontext():
            if command and app(command.split(), standalone_mode=False):
                raise SystemExit(f"failed: {command}")
    Path("pipeline.py").unlink()
    Path("expected.json").write_text(
        json.dumps({run: said_by(run) for run in RUNS}, indent=1) + "\n"
    )


@contextmanager
def unplotted() -> Iterator[None]:
    """Without Matplotlib: the plots of evaluations would be larger than all else, and a report
    needs it.
    """
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        yield


def said_by(run: str) -> dict[str, Any]:
    """Every number of a run that its users look at."""
    opened = hydra_pipe.open_run(run)
    tables = sorted(path for path in Path(run).rglob("*.parquet"))
    return {
        "relevance": {
            method: opened.relevance_array(method)[:].tolist() for method in opened.methods
        },
        "tables": {
            str(path.relative_to(run)): pq.ParquetFile(path).read().to_pydict() for path in tables
        },
        "stages": sorted(json.loads((Path(run) / "run.json").read_text())["stages"]),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
