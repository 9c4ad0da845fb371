"""Which compression pays on gradients: bytes, and the time to write and to read, on real rows.

    python benchmarks/codecs.py RUN [RUN ...]

RUN is a recorded run. Its rows are copied to scratch arrays, a shard at a time, through the zarrs
pipeline, each codec in turn, several rounds; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

CODECS = {
    "none": [],
    "lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle")],
    "lz4, byte shuffle": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")],
    "lz4, bit shuffle": [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")],
    "zstd 1": [ZstdCodec(level=1)],
    "blosc zstd 1, byte shuffle": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")],
}


def measure(
    values: np.ndarray, chunks: tuple[int, int], shards: tuple[int, int], codecs: list
) -> tuple[float, float, float]:
    """Seconds to write, seconds to read, bytes over bytes of the values."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}),
    ):
        array = zarr.create_array(
            scratch + "/a",
            shape=values.shape,
            chunks=chunks,
            shards=shards,
            dtype=values.dtype,
            compressors=[*codecs, Crc32cCodec()],
            fill_value=np.nan,
        )
        pieces = [slice(first, first + shards[0]) for first in range(0, len(values), shards[0])]
        start = time.perf_counter()
        for piece in pieces:
            array[piece] = values[piece]
        written = time.perf_counter()
        for piece in pieces:
            array[piece]
        read = time.perf_counter()
        stored = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        return written - start, read - written, stored / values.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for run in given.runs:
        source = zarr.open_array(Path(run) / "gradients.zarr" / "gradient", mode="r")
        shard_rows = source.shards[0]
        n_shards = max(1, source.shape[0] // shard_rows)
        chosen = sorted({i * (n_shards - 1) // 4 for i in range(5)})
        values = np.concatenate([source[i * shard_rows : (i + 1) * shard_rows] for i in chosen])
        print(
            f"{Path(run).name}: {values.shape[0]} of {source.shape[0]} rows, {values.shape[1]} "
            f"features, {values.dtype}"
        )
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CODECS}
        for _ in range(given.rounds):
            for name, codecs in CODECS.items():
                results[name].append(measure(values, source.chunks, source.shards, codecs))
        for name, rounds in results.items():
            write, read, size = (statistics.median(r[i] for r in rounds) for i in range(3))
            rates = (
                f"write {values.nbytes / write / 1e9:5.2f} GB/s  read "
                f"{values.nbytes / read / 1e9:5.2f} GB/s"
            )
            print(f"  {name:28s} {rates}  size {size:.3f}")


if __name__ == "__main__":
    main()
