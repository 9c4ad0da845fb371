"""What `export --full` takes on a large made-up relevance, and what questions to its tables take.

    python benchmarks/export.py SCRATCH [--samples 50000] [--tests 2000] [--rounds 3] [--memory
    4GiB] [--json FILE]
    python benchmarks/export.py SCRATCH --choices  # row groups, encodings, compression of matrix/

The run (SCRATCH/SAMPLESxTESTS, made once) is a finished recording of one row a sample with labels
of ten classes, and a relevance array whose values have heavy tails, as those of real runs have. The
export runs in a process of its own, whose peak memory the kernel tells. Questions are asked of
DuckDB and Polars, warm, in a process each with two threads; the median of `--rounds`.

top       the ten most harmful samples of one test
mean      mean relevance of every training sample over all tests
tail      pairs of ten tests with a relevance beyond four standard deviations
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hydra_pipe.plan.id_ranges import parse_selection
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.data.relevance import (
    CHUNK_SAMPLES,
    CHUNK_TESTS,
    ResultColumns,
    create_relevance,
    write_relevance,
)
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT, RECORD, REDUCE
from hydra_pipe.units import format_bytes

CLASSES = 10
# on the clock, and of processors
Times = tuple[float, float]
EXPORTING = """
import json, sys, time
from hydra_pipe.exporting.run import export_run
start, used = time.perf_counter(), time.process_time()
export_run(sys.argv[1], full=True, overwrite=True, **json.loads(sys.argv[2]))
seconds, cpu = time.perf_counter() - start, time.process_time() - used
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": int(peak) * 1024}))
"""
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from export import asked
print(json.dumps(asked(*sys.argv[2:5], int(sys.argv[5]))))
"""


def made_run(path: Path, n_samples: int, n_tests: int) -> Path:
    """A finished recording and a relevance of method `hydra`, made if it is not there."""
    stage = REDUCE.of("hydra")
    if (
        path.exists()
        and stage in (there := RunDirectory.open(path)).stages
        and there.stages[stage].state == "complete"
    ):
        return path
    run = RunDirectory.create(path)
    record_one_row_each(run, n_samples, n_tests)
    run.begin(stage, {})
    columns = ResultColumns(parse_selection(f"0-{n_tests - 1}", n_tests))
    words = {names.METHOD: "hydra", names.SIGN: names.SIGN_TEXT, names.UNIT: names.UNIT_TEXT}
    array = create_relevance(
        run.path / names.RELEVANCE, "hydra", words, n_samples, columns, CHUNK_TESTS, run.run_id
    )
    generator = np.random.default_rng(0)
    scale = np.exp(generator.standard_normal((n_samples, 1), np.float32))
    for first in range(0, n_samples, CHUNK_SAMPLES):
        own = scale[first : first + CHUNK_SAMPLES]
        write_relevance(
            array,
            first,
            0,
            generator.standard_normal((len(own), n_tests), np.float32) * own * np.float32(1e-3),
        )
    run.end(
        stage,
        "complete",
        n_tests=n_tests,
        n_columns=n_tests,
        checksums=seal(run, stage),
        **run.origin(stage),
    )
    return path


def record_one_row_each(
    run: RunDirectory, n_samples: int, n_tests: int, n_features: int = 1, batch: int | None = None
) -> None:
    """A recording in which each sample has one row of random values.

    Args:
        run: an empty run.
        n_samples, n_tests, n_features: sizes.
        batch: rows of each step. None: one step has all rows.
    """
    batch, generator = batch or n_samples, np.random.default_rng(2)
    run.begin(RECORD, {"n_samples": n_samples})
    writer = GradientsWriter(
        run.path / names.GRADIENTS,
        Layout((Block("w", (n_features,), 0, "dense", (0, n_features)),), n_features, 0),
        "float16",
        1,
        run.run_id,
    )
    settings = {
        "learning_rate": 0.1,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "decoupled_decay": 0,
        "nesterov": 0,
    }
    rest = {"updated": 1, "momentum_started": 0, "step_factor": 1}
    rest |= {names.GRADIENT_SCALE: 1, names.LOSS: 0, names.IMBALANCE: 0}
    n_steps, samples = -(-n_samples // batch), generator.permutation(n_samples)
    for step in range(n_steps):
        first, n_rows = step * batch, min(batch, n_samples - step * batch)
        for rows, views in writer.rows.reserve(n_rows):
            size = (rows.stop - rows.start, n_features)
            views[names.GRADIENT][:] = generator.standard_normal(size)
            views[names.SCALE][:] = 1
            views[names.SAMPLE][:] = samples[rows]
            views[names.STEP][:] = step
            views[names.CURVATURE][:] = 1
        writer.append_step(settings | rest | {names.FIRST_ROW: first, names.N_ROWS: n_rows})
    tests = writer.test_rows(n_steps)
    for rows, views in tests.reserve(n_tests):
        size = (rows.stop - rows.start, n_features)
        views[names.GRADIENT][:] = generator.standard_normal(size)
        views[names.SCALE][:] = 1
        views[names.LOSS][:] = 0
    writer.flush_test(tests)
    generator = np.random.default_rng(1)
    labels = {}
    for which, n in ((names.TRAIN_LABELS, n_samples), (names.TEST_LABELS, n_tests)):
        writer.write_labels(which, generator.integers(0, CLASSES, n))
        labels[which] = n
    writer.close()
    run.end(
        RECORD,
        "complete",
        n_steps=n_steps,
        n_rows=n_samples,
        n_tests=n_tests,
        labels=labels,
        checksums=seal(run, RECORD),
    )


def duckdb_questions(files: str, n_tests: int) -> dict[str, Callable[[], Any]]:
    tests = ", ".join(map(str, range(0, n_tests, max(1, n_tests // 10))))
    duckdb.sql("SET threads = 2; SET enable_progress_bar = false")
    middle = n_tests // 2
    return {
        "top": lambda: duckdb.sql(
            f"SELECT train_id, relevance FROM '{files}' WHERE test_id = {middle} ORDER BY "
            "relevance, train_id LIMIT 10"
        ).fetchall(),
        "mean": lambda: duckdb.sql(
            f"SELECT train_id, avg(relevance) FROM '{files}' GROUP BY train_id"
        ).fetchnumpy(),
        "tail": lambda: duckdb.sql(
            f"SELECT test_id, train_id, relevance FROM '{files}' WHERE test_id IN ({tests}) AND "
            "relevance > 8e-3"
        ).fetchnumpy(),
    }


def polars_questions(files: str, n_tests: int) -> dict[str, Callable[[], Any]]:
    tests = list(range(0, n_tests, max(1, n_tests // 10)))
    scan = pl.scan_parquet(files)
    test, relevance = pl.col("test_id"), pl.col("relevance")
    mean = scan.group_by("train_id").agg(relevance.mean())
    return {
        "top": lambda: (
            scan.filter(test == n_tests // 2).sort("relevance", "train_id").head(10).collect()
        ),
        "mean": lambda: mean.collect(engine="streaming"),
        "tail": lambda: scan.filter(test.is_in(tests) & (relevance > 8e-3)).collect(),
    }


def asked(tool: str, files: str, n_tests: str, rounds: int) -> dict[str, Times]:
    """Median times of each question; the first one does not count."""
    questions = {"duckdb": duckdb_questions, "polars": polars_questions}[tool](files, int(n_tests))
    return {
        name: medians([timed(ask) for _ in range(rounds + 1)][1:])
        for name, ask in questions.items()
    }


def timed(work: Callable[[], object]) -> Times:
    """Seconds on the clock, and of processors. Other work hardly moves the latter."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


def medians(times: list[Times]) -> Times:
    clock, cpu = zip(*times, strict=True)
    return statistics.median(clock), statistics.median(cpu)


def in_a_process(code: str, *arguments: str) -> dict[str, Any]:
    environment = os.environ | {"POLARS_MAX_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def questions(files: str, n_tests: int, rounds: int) -> dict[str, dict[str, Times]]:
    here = str(Path(__file__).parent)
    return {
        tool: in_a_process(ASK, here, tool, files, str(n_tests), str(rounds))
        for tool in ("duckdb", "polars")
    }


def measured(
    run: Path, n_samples: int, n_tests: int, rounds: int, options: dict[str, Any]
) -> dict[str, Any]:
    exports = [in_a_process(EXPORTING, str(run), json.dumps(options)) for _ in range(rounds)]
    seconds, cpu = medians([(e["seconds"], e["cpu"]) for e in exports])
    peak = max(e["peak"] for e in exports)
    tables = run / EXPORT.of("hydra").area
    parts = sorted((tables / "matrix").glob("*.parquet"))
    n_bytes = sum(part.stat().st_size for part in parts)
    pairs = n_samples * n_tests
    print(
        f"export --full of {pairs:,} pairs: {seconds:.1f} s, {cpu:.1f} s of processors, peak "
        f"{format_bytes(peak)}"
    )
    groups = sum(pq.read_metadata(part).num_row_groups for part in parts)
    print(
        f"matrix: {format_bytes(n_bytes)}, {n_bytes / pairs:.2f} bytes a pair, {len(parts)} "
        f"files, {groups} row groups"
    )
    found = questions(str(tables / "matrix" / "*.parquet"), n_tests, rounds)
    for tool, times in found.items():
        print(
            f"{tool}: "
            + ", ".join(
                f"{name} {1e3 * clock:.0f} ({1e3 * cpu:.0f})"
                for name, (clock, cpu) in times.items()
            )
            + " ms (of processors)"
        )
    return {
        "exports": exports,
        "n_bytes": n_bytes,
        "files": len(parts),
        "groups": groups,
        "questions": found,
    }


# name -> row group of so many pairs, and what the writer is told
DELTA = {
    "use_dictionary": ["test_id"],
    "column_encoding": {"train_id": "DELTA_BINARY_PACKED", "relevance": "PLAIN"},
}
SPLIT = {
    "use_dictionary": ["test_id"],
    "column_encoding": {"train_id": "DELTA_BINARY_PACKED", "relevance": "BYTE_STREAM_SPLIT"},
}
CHOICES: dict[str, tuple[int, dict[str, Any]]] = {
    "as before: dictionaries, Snappy, 2^20": (2**20, {}),
    "delta, no compression, 2^20": (2**20, DELTA | {"compression": "none"}),
    "delta, no compression, 2^17": (2**17, DELTA | {"compression": "none"}),
    "delta, no compression, 2^15": (2**15, DELTA | {"compression": "none"}),
    "delta, Snappy, 2^17": (2**17, DELTA | {"compression": "snappy"}),
    "delta, LZ4, 2^17": (2**17, DELTA | {"compression": "lz4"}),
    "delta, Zstandard 1, 2^17": (2**17, DELTA | {"compression": "zstd", "compression_level": 1}),
    "delta, Zstandard 3, 2^17": (2**17, DELTA | {"compression": "zstd", "compression_level": 3}),
    "delta, bytes split, Zstandard 1, 2^17": (
        2**17,
        SPLIT | {"compression": "zstd", "compression_level": 1},
    ),
    "delta, bytes split, LZ4, 2^17": (2**17, SPLIT | {"compression": "lz4"}),
}


def choices(
    relevance: np.ndarray, scratch: Path, rounds: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same pairs written with each of `CHOICES`: rate, size, questions. `relevance` has shape
    (test, sample).
    """
    n_tests, n_samples = relevance.shape
    file = scratch / "choice.parquet"
    schema = pa.schema(
        [
            pa.field(n, t, nullable=False)
            for n, t in zip(
                ("test_id", "train_id", "relevance"),
                (pa.int64(), pa.int64(), pa.float32()),
                strict=True,
            )
        ]
    )
    for name, (group, options) in CHOICES.items():
        at_once = max(1, group // n_samples)

        def write(at_once: int = at_once, options: dict[str, Any] = options) -> None:
            with pq.ParquetWriter(file, schema, write_page_index=True, **options) as writer:
                for low in range(0, n_tests, at_once):
                    rows = relevance[low : low + at_once]
                    test = np.repeat(np.arange(low, low + len(rows)), n_samples)
                    train = np.tile(np.arange(n_samples), len(rows))
                    writer.write_table(
                        pa.table([test, train, rows.ravel()], schema=schema), row_group_size=2**20
                    )

        seconds, cpu = medians([timed(write) for _ in range(rounds)])
        found = questions(str(file), n_tests, rounds)
        size = file.stat().st_size / relevance.size
        times = "; ".join(
            f"{tool} " + ", ".join(f"{1e3 * t:.0f}" for _, t in asked.values())
            for tool, asked in found.items()
        )
        rate = relevance.size / cpu / 1e6
        print(
            f"{name}: {rate:.0f} million pairs a processor second, {size:.2f} bytes a pair, ms "
            f"of processors: {times}",
            flush=True,
        )
        yield name, {"seconds": seconds, "cpu": cpu, "bytes_a_pair": size, "questions": found}
    file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    if given.choices:
        run = made_run(given.scratch / f"{given.samples}x{given.tests}", given.samples, given.tests)
        from hydra_pipe.view import open_run

        relevance = np.ascontiguousarray(np.asarray(open_run(run).relevance()).T)
        found: Any = dict(choices(relevance, given.scratch, given.rounds))
    else:
        run = made_run(given.scratch / f"{given.samples}x{given.tests}", given.samples, given.tests)
        options = {} if given.memory is None else {"memory": given.memory}
        found = measured(run, given.samples, given.tests, given.rounds, options)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
