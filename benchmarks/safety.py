"""What it costs that nothing is lost: checkpoints, checksums and footprints, on Fashion-MNIST with
LeNet-5.

    python benchmarks/safety.py DATA [--n-train 20000] [--epochs 12]

DATA is the directory with Fashion-MNIST's four gzipped files. One recording with checkpoints as
they are taken by default; then, of its rows, every shard encoded and decoded with and without its
checksums, in turn, medians of the rounds; then verify.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np

import hydra_pipe
from hydra_pipe.store.run.footprints import footprints
from hydra_pipe.store.zarr import codec
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.store.zarr.codec import StoredFile

PIPELINE = str(Path(__file__).parents[1] / "pipelines" / "fashion_mnist.py")


def seconds_of_codec(array: Array, n_files: int) -> tuple[float, float]:
    """Seconds to encode, and to decode, the first `n_files` shards of an array."""
    encoded = decoded = 0.0
    for number in range(n_files):
        rows = slice(number * array.file_rows, (number + 1) * array.file_rows)
        values = array.read(rows, slice(None))
        whole = np.zeros((array.file_rows, array.shape[1]), values.dtype)
        whole[: len(values)] = values
        start = time.perf_counter()
        content = b"".join(array.codec.encode(whole))
        middle = time.perf_counter()
        StoredFile(np.frombuffer(content, np.uint8), array.codec).read(
            (slice(0, len(values)), slice(0, array.shape[1])), values
        )
        encoded, decoded = encoded + middle - start, decoded + time.perf_counter() - middle
    return encoded, decoded


def without_checksums() -> AbstractContextManager[object]:
    """Chunks get four zeros, and nobody looks at them."""
    return mock.patch.multiple(
        codec, checksum=lambda data: bytes(4), verified=lambda data: data[:-4]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--n-train", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    settings = {
        "data": Path(given.data),
        "n_train": given.n_train,
        "n_test": 500,
        "epochs": given.epochs,
    }
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        hydra_pipe.record(PIPELINE, run, settings=settings)
        facts = json.loads((run / "run.json").read_text())["stages"]["record"]["facts"]
        took, training, stalled = (
            facts[f"{name}_seconds"] for name in ("checkpoint", "train", "stalled")
        )
        print(
            f"recording {training:.1f} s, of which checkpoints {took:.2f} s, "
            f"{took / training:.2%}; stalled {stalled:.2f} s"
        )
        array = Array.open(run / "gradients.zarr" / "gradient")
        n_files = min(8, -(-array.shape[0] // array.file_rows))
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(given.rounds):
            for checked, seconds in found.items():
                if checked:
                    seconds.append(seconds_of_codec(array, n_files))
                else:
                    with without_checksums():
                        seconds.append(seconds_of_codec(array, n_files))
        for what, index in (("encoding", 0), ("decoding", 1)):
            with_, without = (
                statistics.median(seconds[index] for seconds in found[checked])
                for checked in (True, False)
            )
            print(
                f"{what} {n_files} shards: {with_:.3f} s with checksums, {without:.3f} s "
                f"without, {with_ / without:.3f}"
            )
        start = time.perf_counter()
        footprints(run, "record")
        print(f"footprints of the recording: {time.perf_counter() - start:.3f} s")
        start = time.perf_counter()
        faults = hydra_pipe.verify(run)
        n_bytes = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        print(
            f"verify: {time.perf_counter() - start:.2f} s for {n_bytes / 1e6:.0f} MB, "
            f"{len(faults)} faults"
        )


if __name__ == "__main__":
    main()
