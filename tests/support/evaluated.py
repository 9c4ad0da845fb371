"""Runs that are evaluated: relevance that a test has made up, and the files of an evaluation."""

from pathlib import Path

import numpy as np

from hydra_pipe.store.data.relevance import ResultColumns, create_relevance, write_relevance
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import REDUCE


def put(run: Path, name: str, values: np.ndarray, columns: ResultColumns | None = None) -> None:
    """A relevance array called `name`, as if it had been reduced."""
    directory = RunDirectory.open(run)
    words = {"method": "made up", "sign": "positive is helpful", "unit": "test loss"}
    columns = columns or ResultColumns(((0, values.shape[1]),))
    array = create_relevance(
        run / "relevance.zarr", name, words, len(values), columns, 64, directory.run_id
    )
    write_relevance(array, 0, 0, values.astype(np.float32))
    setting = {"upto": int(name.partition("-upto-")[2])} if "-upto-" in name else {}
    directory.begin(REDUCE.of(name), setting)
    directory.end(REDUCE.of(name), "complete", checksums=str(values.sum()))


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }
