"""Reading and decoding the rows of a run: by this package, and by zarrs, in turn.

    python benchmarks/decoding.py RUN [RUN ...]

Every shard of `gradient` is read and decoded into memory and dropped, by one thread and by two that share the shards. Rounds
alternate; the median of five is given, as decoded GB a second of the clock and of processor time. zarrs has threads of its own.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import LocalStore

from hydra_pipe.store.arrays import Array

ROUNDS = 5


def rates(read: Callable[[int], int], n_shards: int, threads: int) -> tuple[float, float]:
    """Bytes a second: of the clock, of processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        n_bytes = sum(pool.map(read, range(n_shards)))
    return n_bytes / (time.perf_counter() - start), n_bytes / (time.process_time() - cpu)


def compare(run: Path) -> None:
    path = run / "gradients.zarr" / "gradient"
    ours = Array.open(path)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        theirs = zarr.open_array(LocalStore(path, read_only=True), mode="r")
    size = ours.file_rows
    n_shards = -(-ours.shape[0] // size)
    sides: dict[str, Callable[[int], int]] = {
        "hydra-pipe": lambda i: ours.read(slice(i * size, (i + 1) * size)).nbytes,
        "zarrs": lambda i: np.asarray(theirs[i * size : (i + 1) * size]).nbytes,
    }
    print(f"{run}: {ours.shape[0]:,} rows x {ours.shape[1]:,} {ours.dtype}, {ours.n_bytes / 1e6:,.0f} MB decoded")
    for threads in (1, 2):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, read in sides.items():
                found[name].append(rates(read, n_shards, threads))
        for name, pairs in found.items():
            clock, cpu = (statistics.median(pair[i] for pair in pairs) / 1e9 for i in (0, 1))
            print(f"  {threads} thread{'s' if threads > 1 else ' '} {name:12s} {clock:5.2f} GB/s, {cpu:5.2f} GB a processor second")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compare(Path(argument))
