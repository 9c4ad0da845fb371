"""What `reduce` takes: beside reading and decoding alone, beside NumPy, by workers, tests, rows,
features and memory.

    python benchmarks/reduce.py DATA SCRATCH [--parts speed,numpy,memory,growth] [--times 18]
    [--rounds 3] [--json FILE]

Rows are real: LeNet-5 on all of Fashion-MNIST, two epochs of 60,000 (made in SCRATCH once), and the
same steps `--times` over, which are 10 GB on disk with 18. All sides of a comparison alternate in
one run, in an order drawn at random, and the median of the rounds' ratios is given. "cold": the
operating system's cache of the store is dropped before each. Times are without the start of Python.

speed    wall time over that of decoding the same store with as many threads and dropping it;
         share of the machine's own float32 matrix product, measured in the same round, by
         operations done and by those of scoring every row; two workers over one
numpy    the same relevance by the obvious NumPy script: memory-mapped float16 rows, a product for
         each batch, np.add.at
memory   peak memory of a process of its own, over --memory, for 512 MiB to 4 GiB, on the long
         store, 64 tests
growth   time with more rows, tests and features, and the exponent
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from stretching import stretch
from threadpoolctl import threadpool_limits

import hydra_pipe
from hydra_pipe.api import reduce
from hydra_pipe.reduction.methods import METHODS
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.files import tree_bytes
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE

PIPELINE = str(Path(__file__).parents[1] / "pipelines" / "fashion_mnist.py")
WORKERS = len(os.sched_getaffinity(0))
PEAK = """
import sys
from hydra_pipe.api import reduce
reduce(sys.argv[1], memory=sys.argv[2], tests=sys.argv[3], overwrite=True)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def recorded(
    data: Path, scratch: Path, n_train: int = 60_000, epochs: int = 2, **more: Any
) -> Path:
    """A finished recording, made if it is not there."""
    settings = {
        "data": data / "fashion-mnist",
        "n_train": n_train,
        "n_test": 2000,
        "epochs": epochs,
    }
    run = scratch / (f"lenet-{n_train}-{epochs}" + "".join(f"-{value}" for value in more.values()))
    if run.exists() and RunDirectory.open(run).stages[RECORD].state == "complete":
        return run
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    options += [word for key, value in more.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hydra_pipe.cli.app", "record", PIPELINE, str(run), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return run


def stretched(run: Path, times: int) -> Path:
    """`run` `times` over, made if it is not there."""
    target = run.with_name(f"{run.name}-x{times}")
    if not target.exists():
        stretch(run, target, times)
    return target


def drop_cache(run: Path) -> None:
    """Let the operating system forget the files of a store."""
    for file in (run / "gradients.zarr").rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode_all(run: Path, workers: int = WORKERS) -> None:
    """Read and decode every row, as the workers of a reduction do, and drop it."""
    store = Gradients(run / "gradients.zarr")
    shards = -(-store.rows.n_rows // store.rows.shard_rows)
    bounds = [
        min(i * shards // workers * store.rows.shard_rows, store.rows.n_rows)
        for i in range(workers + 1)
    ]

    def decode(number: int) -> None:
        for piece in store.rows.stream((bounds[number], bounds[number + 1]), 512):
            piece.read(0, store.layout.n_features)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(decode, range(workers)))


def reduced(
    run: Path, n_tests: int, scheduler: str = "threads", memory: str = "4GiB"
) -> dict[str, Any]:
    """Reduce for the first test samples. Returns the plan that was followed."""
    reduce(run, tests=f"0-{n_tests - 1}", overwrite=True, scheduler=scheduler, memory=memory)
    return dict(RunDirectory.open(run).stages[REDUCE.of("hydra")].facts["plan"])


def matrix_rate() -> float:
    """Operations a second of a large float32 matrix product with all threads."""
    a, b = (np.random.default_rng(i).standard_normal((4096, 4096), np.float32) for i in (0, 1))
    with threadpool_limits(WORKERS, user_api="blas"):
        return 2 * 4096**3 / min(timed(lambda: a @ b) for _ in range(2))


def by_numpy(rows: Path, run: Path, n_tests: int) -> np.ndarray:
    """The obvious script: whole batches of float16 rows in memory order, products, np.add.at. BLAS
    with all threads.
    """
    store = Gradients(run / "gradients.zarr")
    gradient = np.load(rows, mmap_mode="r")
    n_samples = RunDirectory.open(run).stages[RECORD].count("n_samples")
    weights = METHODS["hydra"].rows.weigh(store)
    tests = store.test_rows(store.test_steps()[-1])
    h = tests.features(slice(0, n_tests), slice(0, store.layout.n_features)).astype(np.float32)
    h_scale = tests.scales(slice(0, n_tests))
    relevance = np.zeros((n_samples, n_tests), np.float32)
    batch = 4096
    for first in range(0, len(gradient), batch):
        own = slice(first, min(first + batch, len(gradient)))
        r = gradient[own].astype(np.float32)
        weight = weights.of_rows(store.step_of_rows(own), store.rows.scales(own))
        scores = np.zeros((len(r), n_tests), np.float32)
        for index, block in enumerate(store.layout.blocks):
            a, b = block.columns
            product = r[:, a:b] @ h[:, a:b].T
            if block.inputs is not None:
                c, d = block.inputs
                product *= r[:, c:d] @ h[:, c:d].T
            scores += weight[:, index, None] * h_scale[None, :, index] * product
        np.add.at(relevance, store.samples(own), scores)
    return relevance


def rounds(sides: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Each side once a round, in random order; a round more is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count + 1):
        for name in random.sample(list(sides), len(sides)):
            found[name].append(sides[name]())
    # the first round has had the system find memory that it had not yet given to anyone, which
    # takes longer than the work here
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def speed(short: Path, long: Path, count: int) -> Iterator[tuple[str, Any]]:
    for name, run, cold in (("short, warm", short, False), ("long, cold", long, True)):
        store = Gradients(run / "gradients.zarr")
        n_bytes = tree_bytes(run / "gradients.zarr")
        decoded = store.rows.n_rows * store.layout.n_features * store.rows.dtype.itemsize
        print(
            f"{name}: {store.rows.n_rows:,} rows, {n_bytes / 1e9:.2f} GB on disk, "
            f"{decoded / 1e9:.2f} GB decoded"
        )

        def side(work: Callable[[], object], run: Path = run, cold: bool = cold) -> float:
            if cold:
                drop_cache(run)
            return timed(work)

        def work(n: int, run: Path = run) -> Callable[[], object]:
            return lambda: reduced(run, n)

        sides = {"decode": lambda: side(lambda: decode_all(run))}  # noqa: B023 - called within this round of the loop
        sides |= {f"{n} tests": lambda n=n: side(work(n)) for n in (1, 8, 64)}
        found = rounds(sides, count if not cold else max(1, count - 1))
        alone = statistics.median(found["decode"])
        print(f"  decode and drop: {alone:.2f} s, {decoded / alone / 1e9:.2f} GB/s")
        for label, seconds in found.items():
            if label != "decode":
                print(
                    f"  {label}: {statistics.median(seconds):.2f} s, "
                    f"{ratio(seconds, found['decode']):.2f} times that"
                )
        yield name, found
    for run in (short, long):
        rates, seconds, plans = [], [], []
        for _ in range(count if run == short else 1):
            rates.append(matrix_rate())
            seconds.append(timed(lambda: plans.append(reduced(run, 2000))))  # noqa: B023
        store = Gradients(run / "gradients.zarr")
        scored = 2 * store.rows.n_rows * store.layout.n_features * 2000
        share = statistics.median(
            plan["operations"] / s / r for plan, s, r in zip(plans, seconds, rates, strict=True)
        )
        nominal = statistics.median(scored / s / r for s, r in zip(seconds, rates, strict=True))
        print(
            f"2,000 tests, {store.rows.n_rows:,} rows ({plans[0]['order']}): "
            f"{statistics.median(seconds):.2f} s; matrix product "
            f"{statistics.median(rates) / 1e9:.0f} GFLOP/s; share by operations done "
            f"{share:.2f}, by those of scoring {nominal:.2f}"
        )
        yield (
            f"2000 tests, {store.rows.n_rows} rows",
            {"seconds": seconds, "rates": rates, "share": share, "nominal": nominal},
        )
    for n in (1, 64, 2000):
        found = rounds(
            {
                "one": lambda n=n: timed(lambda: reduced(short, n, "synchronous")),
                "two": lambda n=n: timed(lambda: reduced(short, n)),
            },
            count,
        )
        print(
            f"{n} tests: {WORKERS} workers {ratio(found['one'], found['two']):.2f} times as fast "
            "as one"
        )
        yield f"workers, {n} tests", found


def numpy_script(short: Path, count: int) -> Iterator[tuple[str, Any]]:
    rows = short.parent / "rows.npy"
    store = Gradients(short / "gradients.zarr")
    whole = np.lib.format.open_memmap(
        rows, "w+", np.float16, (store.rows.n_rows, store.layout.n_features)
    )
    for piece in store.rows.stream((0, store.rows.n_rows), 2048):
        whole[piece.rows] = piece.read(0, store.layout.n_features)
    whole.flush()
    del whole
    for n in (64, 2000):
        results: dict[str, np.ndarray] = {}
        found = rounds(
            {
                "numpy": lambda n=n, results=results: timed(
                    lambda: results.update(numpy=by_numpy(rows, short, n))
                ),
                "ours": lambda n=n: timed(lambda: reduced(short, n)),
            },
            count,
        )
        reduced(short, n)
        ours = np.asarray(hydra_pipe.open_run(short).relevance())
        difference = float(
            np.linalg.norm(ours - results["numpy"]) / np.linalg.norm(results["numpy"])
        )
        script, own = (statistics.median(found[side]) for side in ("numpy", "ours"))
        print(
            f"{n} tests: the NumPy script {script:.2f} s, hydra-pipe {own:.2f} s, "
            f"{ratio(found['numpy'], found['ours']):.2f} times as fast; they differ by "
            f"{difference:.1e} of the norm"
        )
        yield f"numpy, {n} tests", found
    rows.unlink()


def memory(run: Path) -> Iterator[tuple[str, Any]]:
    n_bytes = tree_bytes(run / "gradients.zarr")
    for mib in (512, 1024, 2048, 4096):
        command = [sys.executable, "-c", PEAK, str(run), f"{mib}MiB", "0-63"]
        start = time.perf_counter()
        peak = (
            int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
        )
        plan = RunDirectory.open(run).stages[REDUCE.of("hydra")].facts["plan"]
        over, planned, seconds = (
            peak / (mib * 2**20),
            plan["peak_bytes"] / 2**20,
            time.perf_counter() - start,
        )
        print(
            f"--memory {mib} MiB, a store of {n_bytes / mib / 2**20:.1f} times that: peak "
            f"{peak / 2**20:.0f} MiB, {over:.2f} of "
            f"it; planned {planned:.0f} MiB, {plan['order']}, {plan['passes']} passes, "
            f"{seconds:.0f} s"
        )
        yield f"memory {mib}", {"peak": peak, "over": over, "plan": plan}


def growth(data: Path, scratch: Path, short: Path, count: int) -> Iterator[tuple[str, Any]]:
    def series(what: str, points: dict[int, Callable[[], object]]) -> tuple[str, Any]:
        found = rounds({str(n): lambda work=work: timed(work) for n, work in points.items()}, count)
        seconds = {n: statistics.median(found[str(n)]) for n in points}
        least, most = min(points), max(points)
        exponent = math.log(seconds[most] / seconds[least]) / math.log(most / least)
        print(
            f"{what}: {', '.join(f'x{n} {s:.2f} s' for n, s in seconds.items())}; exponent "
            f"{exponent:.2f}"
        )
        return what, seconds

    longer = {n: short if n == 1 else stretched(short, n) for n in (1, 2, 4, 8)}
    yield series(
        "rows, 64 tests", {n: lambda run=run: reduced(run, 64) for n, run in longer.items()}
    )
    yield series("tests, from 20", {n: lambda n=n: reduced(short, 20 * n) for n in (1, 10, 100)})
    narrow, wide = (
        recorded(data, scratch, 20_000, 1, encoding="projected", dim=dim, dtype="float16")
        for dim in (2048, 8192)
    )
    yield series(
        "features, 64 tests", {1: lambda: reduced(narrow, 64), 4: lambda: reduced(wide, 64)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--parts", default="speed,numpy,memory,growth")
    parser.add_argument(
        "--times", type=int, default=18, help="how often the steps are repeated in the long store"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    given = parser.parse_args()
    short = recorded(given.data, given.scratch)
    parts: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
        "speed": lambda: speed(short, stretched(short, given.times), given.rounds),
        "numpy": lambda: numpy_script(short, given.rounds),
        "memory": lambda: memory(stretched(short, given.times)),
        "growth": lambda: growth(given.data, given.scratch, short, given.rounds),
    }
    results: dict[str, Any] = {}
    for part in given.parts.split(","):
        print(f"\n{part}")
        results |= dict(parts[part]())
    if given.json:
        given.json.write_text(json.dumps(results, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
