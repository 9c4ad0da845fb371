"""Reading and writing the shards of a run: by this package, and by zarr with each of its pipelines,
in turn.

    python benchmarks/codec_pipelines.py RUN [RUN ...]

Every shard of `gradient` is read and decoded into memory, then encoded and written to a scratch
array of the same layout. Rounds alternate; the median of five is given, in milliseconds a shard of
the clock and of processor time, and over the time of this package. Reads of damaged
values that raise no error are named. No torch is needed, so that an environment with another zarr
will do.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.core.codec_pipeline
from zarr.storage import LocalStore

from hydra_pipe.store.zarr.arrays import Array

ROUNDS = 5
OURS = "hydra-pipe"
PIPELINES = {
    "zarr, batched": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarr, fused": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}
Side = tuple[Callable[[slice], np.ndarray], Callable[[int, np.ndarray], Any]]


def ours(source: Path, target: Path) -> Side:
    """This package: reading rows of `source`, and writing values as a shard of `target`."""
    read, written = Array.open(source), Array.open(target)
    columns = len(read.shape) - 1
    return read.read, lambda i, values: written.write_file((i, *(0,) * columns), values)


def theirs(pipeline: str, source: Path, target: Path, size: int) -> Side:
    """The same by zarr with `pipeline`, which zarr looks up when it opens an array."""
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        read = zarr.open_array(LocalStore(source, read_only=True), mode="r")
        written = zarr.open_array(LocalStore(target), mode="r+")

    def write(i: int, values: np.ndarray) -> None:
        written[i * size : (i + 1) * size] = values

    return lambda rows: np.asarray(read[rows]), write


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that `work` takes: of the clock, of processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def silent_reads(side: Callable[[Path], Side], source: Path, scratch: Path) -> list[str]:
    """Reads that give values of a chunk in which one byte has changed, without an error."""
    damaged = scratch / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(source, damaged)
    shard = sorted(
        file for file in damaged.rglob("*") if file.is_file() and file.name != "zarr.json"
    )[0]
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1  # in the compressed values of the first chunk
    shard.write_bytes(content)
    chunk_rows, shard_rows = (
        zarr.open_array(source, mode="r").chunks[0],
        Array.open(source).file_rows,
    )
    reads = {"a shard": shard_rows, "a chunk": chunk_rows, "a part of a chunk": chunk_rows // 2}
    return [
        what for what, n_rows in reads.items() if _is_silent(side(damaged)[0], slice(0, n_rows))
    ]


def _is_silent(read: Callable[[slice], np.ndarray], rows: slice) -> bool:
    try:
        read(rows)
    except Exception:  # noqa: BLE001 - each library has errors of its own
        return False
    return True


def compare(run: Path) -> None:
    source = run / "gradients.zarr" / "gradient"
    array = Array.open(source)
    size = array.file_rows
    n_shards = array.shape[0] // size  # whole ones
    print(
        f"{run}: {array.shape[0]:,} rows x {array.shape[1]:,} {array.dtype}, {n_shards} shards "
        f"of {size:,} rows"
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        target = scratch / "target"
        target.mkdir()
        shutil.copy(source / "zarr.json", target)
        openers: dict[str, Callable[[Path], Side]] = {OURS: lambda path: ours(path, target)}
        for label, pipeline in PIPELINES.items():
            module, _, attribute = pipeline.rpartition(".")
            if module == "zarrs" or hasattr(zarr.core.codec_pipeline, attribute):
                openers[label] = lambda path, pipeline=pipeline: theirs(
                    pipeline, path, target, size
                )
        for label, opener in openers.items():
            for what in silent_reads(opener, source, scratch):
                print(f"  {label} reads {what} that is damaged without an error")
        sides = {label: opener(source) for label, opener in openers.items()}
        shards = [slice(i * size, (i + 1) * size) for i in range(n_shards)]
        values = [array.read(rows) for rows in shards]
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for label, (read, write) in sides.items():
                found.setdefault((label, "read"), []).append(
                    seconds(lambda r=read: [r(rows) for rows in shards])
                )
                found.setdefault((label, "write"), []).append(
                    seconds(lambda w=write: [w(i, values[i]) for i in range(n_shards)])
                )
    for what in ("read", "write"):
        base = [statistics.median(pair[i] for pair in found[OURS, what]) for i in (0, 1)]
        for label in sides:
            clock, cpu = (statistics.median(pair[i] for pair in found[label, what]) for i in (0, 1))
            print(
                f"  {what:5s} {label:14s} clock {clock / n_shards * 1e3:7.1f} ms "
                f"({clock / base[0]:4.2f})"
                f"  processor {cpu / n_shards * 1e3:7.1f} ms ({cpu / base[1]:4.2f})"
            )


if __name__ == "__main__":
    print(f"zarr {zarr.__version__}, Python {sys.version.split()[0]}")
    for argument in sys.argv[1:]:
        compare(Path(argument))
