"""Reads damaged copies of a run, with little memory to spare.

A process of its own: `python hostile_reader.py RUN WHICH N`.

`WHICH` is "random" for N random changes to one JSON file at a time, "crafted" for files that lie in
agreement, or "both".
"""

import copy
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hydra_pipe
from hydra_pipe.errors import HydraError
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.zarr import arrays

SPARE_BYTES = 200 * 2**20
# Processor seconds, which other processes change little. A call takes a hundredth of a second, a
# page up to one: so a call may also take as many times what it takes on a run that is not damaged.
# A call that waits is ended by a signal.
MOST_SECONDS, MOST_TIMES, MOST_WAITING = 1.0, 3, 60
BUDGET = {"scheduler": "synchronous", "memory": "400MiB"}
REDUCTIONS: list[dict[str, Any]] = [
    {"tests": "0-3,5"},
    {"by": "label"},
    {"keep_hypergradients": True},
    {"by": "mean", "tests": "1"},
    {},
]
# One of these beside what is always called: they cost as much as all of the rest.
ALSO = ["steps", "relevance", "rewind", "export before", "nothing"]
# what is not damaged: no call fails, and some take long, for they load modules
HEALTHY = "nothing at all"
# calls that import what later ones have: they may take as long as they take
FIRST = "nothing"
PROBE = "late"
# What is called of a run that was probed, each with the options of one reduction.
OF_PROBED: list[dict[str, Any]] = [
    {"call": "reduce", "probe": PROBE, "method": "hydra", "overwrite": True},
    {"call": "reduce", "probe": PROBE, "method": "hydra-fisher", "overwrite": True},
    {"call": "reduce", "probe": PROBE, "method": "hydra", "by": "label"},
    {"call": "reduce", "method": "hydra-fisher", "keep_hypergradients": True},
    {"call": "export", "probe": PROBE, "method": "hydra", "overwrite": True},
    {"call": "clean", "method": "hydra"},
    {"call": "clean", "method": "hydra", "lowest": 3, "overwrite": True},
    {"call": "report", "method": "hydra", "overwrite": True},
    {"call": "report", "probe": PROBE, "method": "hydra", "top": 2},
    {"call": "probe"},
    {"call": "prune"},
]
# and where what these read is: of the rest there is enough in the other runs
PLACES_OF_PROBED = (
    "probes",
    "hypergradients",
    "cleaning",
    "relevance.zarr",
    "run.json",
    "checksums",
)
BOMB = json.loads("[" * 60 + "]" * 60)
VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        7,
        -1,
        -(2**70),
        10**15,
        2**31,
        2**62,
        2**63 - 1,
        2**64,
        10**4000,
        0.5,
        26.0,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "7",
        "NaN",
        "object",
        "float64",
        "int64",
        "complete",
        "score first",
        "\ud800\x00\x1b[2J",
    ),
    *(
        "../../x",
        "/etc/passwd",
        "..",
        "reduce ../../x",
        "export ../x",
        "0-9223372036854775806",
        "lz4",
        "[/bold]",
        "a" * 100_000,
    ),
    *(
        [],
        {},
        [0],
        [1, 1],
        [10**15],
        [2**62, 2**62],
        [[]],
        {"": {}},
        ["a", 1],
        {"../../x": 1},
        BOMB,
        {"name": "bytes"},
    ),
]
KEYS = [
    "",
    "..",
    "../../x",
    "reduce ../../x",
    "export ../../x",
    "rank_rows",
    "pruned",
    "n_ranks",
    "answered",
    "files",
    "by",
    "names",
]


class Run:
    """A run that is changed and put back.

    Args:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_probed = (path / "probes").exists()
        self.json = sorted(file for file in path.rglob("*.json"))
        if self.is_probed:
            self.json = [
                file for file in self.json if file.relative_to(path).parts[0] in PLACES_OF_PROBED
            ]
        self._files = {file: file.read_bytes() for file in self._all()}
        self._stats = {file: _stat(file) for file in self._files}
        # the least processor seconds of each call before anything is damaged; the first ones load
        # modules
        self._usual: dict[str, float] = {}

    def _all(self) -> Iterator[Path]:
        for directory, _, files in os.walk(self.path):
            for file in files:
                yield Path(directory, file)

    def put_back(self) -> None:
        """Everything as it was."""
        found = set(self._all())
        for file in found - set(self._files):
            file.unlink()
        for file, content in self._files.items():
            if file not in found or _stat(file) != self._stats[file]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                self._stats[file] = _stat(file)

    def use(self, reduction: dict[str, Any], also: str, what: Any) -> None:
        """Everything that reads a run, or one of `ALSO`.

        Raises: whatever is not an error of ours in one line, and soon.
        """
        by = {"label": "hydra-by-label", "mean": "hydra-mean"}.get(reduction.get("by"), "hydra")
        calls: dict[str, Callable[[], Any]] = {
            "info": lambda: hydra_pipe.open_run(self.path).info(),
            "verify": lambda: hydra_pipe.verify(self.path),
            "steps": lambda: hydra_pipe.open_run(self.path).steps,
            "relevance": lambda: hydra_pipe.open_run(self.path).relevance("hydra"),
            "rewind": lambda: (
                hydra_pipe.open_run(self.path).rewind(1),
                hydra_pipe.open_run(self.path).spikes(by="gradient"),
            ),
            "export before": lambda: hydra_pipe.export(
                self.path, overwrite=True, full=True, top=3, method="hydra"
            ),
            "reduce": lambda: hydra_pipe.reduce(
                self.path,
                **BUDGET,
                overwrite="by" not in reduction,
                **({"method": "hydra"} | reduction),
            ),
            "export": lambda: hydra_pipe.export(self.path, method=by, top=5, overwrite=True),
        }
        self._perform(
            {name: call for name, call in calls.items() if name not in ALSO or name == also}, what
        )

    def use_probed(self, options: dict[str, Any], what: Any) -> None:
        """What reads a run that was probed, one of `OF_PROBED`. Raises: as `use`."""
        options = dict(options)
        name = options.pop("call")
        if name == "reduce":
            options |= BUDGET
        if name == "probe":
            # torch takes memory, which is not to spare
            from support.pipelines import conv_pipeline, images

            options = {
                "dataset": images(3, 5),
                "name": PROBE,
                "pipeline": conv_pipeline(),
                "overwrite": True,
            }
        calls = {
            "info": lambda: hydra_pipe.open_run(self.path).info(),
            "verify": lambda: hydra_pipe.verify(self.path),
            name: lambda: getattr(hydra_pipe, name)(self.path, **options),
        }
        self._perform(calls, what)

    def _perform(self, calls: dict[str, Callable[[], Any]], what: Any) -> None:
        """Call after call. Raises: whatever is not an error of ours in one line, and soon."""
        for name, call in calls.items():
            start = time.process_time()
            signal.alarm(MOST_WAITING)
            try:
                call()
            except HydraError as error:
                if what is HEALTHY:
                    raise
                message = str(error)
                assert "\n" not in message, (name, what, message)
                assert len(message) < 2000, (name, what, message)
                assert message.isprintable(), (name, what, message)
            except BaseException:
                print(f"{name} of {what}", file=sys.stderr)
                raise
            seconds = time.process_time() - start
            if what in (HEALTHY, FIRST):
                self._usual[name] = min(seconds, self._usual.get(name, seconds))
            else:
                most = max(MOST_SECONDS, MOST_TIMES * self._usual.get(name, 0.0))
                assert seconds < most, (name, what, seconds, most)


def remember_metadata() -> None:
    """Parse metadata anew only where they have changed: all but one file are what they were."""
    read, known = arrays.read_metadata, {}

    def remembered(path: Path) -> dict[str, Any]:
        try:
            stat = _stat(path / arrays.METADATA)
        except OSError:
            return read(path)
        if stat not in known:
            known[stat] = read(path)
        return known[stat]

    arrays.read_metadata = remembered


def _stat(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in a JSON tree."""
    yield at
    for key, value in (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    ):
        yield from places(value, (*at, key))


@st.composite
def damages(draw: st.DrawFn, files: dict[Path, Any]) -> tuple[Path, str, bytes | None]:
    """A file, what is done to it, and its content then; None: a directory is in its place."""
    file = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["value"] * 12 + ["number"] * 6 + ["key"] * 3 + ["bytes"] * 3))
    data = copy.deepcopy(files[file])
    if how == "bytes":
        content = bytearray(json.dumps(data).encode())
        action = draw(
            st.sampled_from(["cut", "flip", "empty", "directory", "deep", "not UTF-8", "digits"])
        )
        at = draw(st.integers(0, len(content) - 1))
        if action == "directory":
            return file, action, None
        content[at] ^= 1 << draw(st.integers(0, 7)) if action == "flip" else 0
        new = {"cut": content[:at], "empty": b"", "deep": b"[" * 100_000, "digits": b"9" * 10_000}
        new["not UTF-8"] = content[:at] + b"\xff\xfe" + content[at:]
        return file, f"{action} at {at}", bytes(new.get(action, content))
    found = list(places(data))[1:]
    if how == "number":
        numbers = [at for at in found if isinstance(value_at(data, at), int)]
        found = numbers or found
    *parents, last = draw(st.sampled_from(found))
    holder = value_at(data, tuple(parents))
    old = holder[last]
    if how == "number" and isinstance(old, int):
        holder[last] = draw(
            st.sampled_from(
                [old + 1, old - 1, -old, 2 * old, old * 10**3, old * 10**6, old * 10**12, old + 0.5]
            )
        )
        done = f"{last} of {parents} {old} -> {holder[last]}"
    elif how == "key":
        action = draw(st.sampled_from(["delete", "rename", "twice"]))
        done = f"{action} {last} of {parents}"
        if action == "twice" and isinstance(holder, dict):
            value = json.dumps(draw(st.sampled_from(VALUES)))
            mark = json.dumps("\x01")
            holder[last] = "\x01"
            text = json.dumps(data).replace(
                mark, f"{json.dumps(old)}, {json.dumps(last)}: {value}", 1
            )
            return file, done, text.encode()
        holder.pop(last)
        if action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = old
    else:
        holder[last] = copy.deepcopy(
            draw(st.sampled_from([*VALUES, *(value_at(data, at) for at in found[:30])]))
        )
        done = f"{last} of {parents} {str(old)[:50]} -> {str(holder[last])[:50]}"
    return file, done, json.dumps(data).encode()


def value_at(data: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        data = data[key]
    return data


def damaged_at_random(run: Run, n: int) -> None:
    files = {file: json.loads(file.read_bytes()) for file in run.json}

    @settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        damage=damages(files),
        reduction=st.sampled_from(OF_PROBED if run.is_probed else REDUCTIONS),
        also=st.sampled_from(ALSO),
    )
    def check(damage: tuple[Path, str, bytes | None], reduction: dict[str, Any], also: str) -> None:
        file, what, content = damage
        try:
            file.unlink()
            if content is None:
                file.mkdir()
            else:
                file.write_bytes(content)
            of = (str(file.relative_to(run.path)), what, reduction)
            if run.is_probed:
                run.use_probed(reduction, of)
            else:
                run.use(reduction, also, of)
        finally:
            if file.is_dir():
                file.rmdir()
            run.put_back()

    check()


def change(file: Path, how: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_bytes())
    how(data)
    file.write_bytes(json.dumps(data).encode())


def of_facts(run: Path, **facts: Any) -> None:
    change(run / "run.json", lambda data: data["stages"]["record"]["facts"].update(facts))


def of_shapes(run: Path, wanted: Callable[[str], bool], n: int, axis: int = 0) -> None:
    for file in run.rglob("zarr.json"):
        data = json.loads(file.read_bytes())
        if (
            "shape" in data
            and len(data["shape"]) > axis
            and wanted(file.parent.relative_to(run).as_posix())
        ):
            data["shape"][axis] = n
            file.write_bytes(json.dumps(data).encode())


ROWS = [f"gradients.zarr/{name}" for name in ("gradient", "scale", "sample", "step", "curvature")]


def rows_in_agreement(run: Path, n: int) -> None:
    of_shapes(run, lambda name: name in ROWS, n)
    of_facts(run, n_rows=n)


def steps_in_agreement(run: Path, n: int) -> None:
    of_shapes(run, lambda name: "/steps/" in name, n)
    of_facts(run, n_steps=n)


def tests_in_agreement(run: Path, n: int) -> None:
    of_shapes(run, lambda name: "/test/" in name or name.endswith("labels/test"), n)
    of_facts(run, n_tests=n, labels={"train": 26, "test": n})


def samples_in_agreement(run: Path, n: int, labels: bool = True) -> None:
    of_shapes(
        run,
        lambda name: name.endswith(("labels/train", "folded")) or name.startswith("relevance"),
        n,
    )
    change(run / "run.json", lambda data: data["stages"]["record"]["settings"].update(n_samples=n))
    of_facts(run, labels={"train": n, "test": 7} if labels else {})
    if not labels:
        for file in (run / "gradients.zarr/labels").rglob("*.json"):
            file.unlink()


def width_in_agreement(run: Path, n: int, factored: bool = False) -> None:
    """One block more, of n columns, and one for its inputs where it is factored."""
    root = run / "gradients.zarr/zarr.json"
    layout = json.loads(root.read_bytes())["attributes"]["hydra_pipe_blocks"]
    first = layout["n_features"]
    middle, last = first + n, first + n + factored
    new = {
        "name": "x",
        "shape": [n],
        "group": 0,
        "encoding": "dense",
        "columns": [first, middle],
        "inputs": None,
        "kron": None,
    }
    if factored:
        new |= {"encoding": "factored", "inputs": [middle, last]}
    blocks = [*layout["blocks"], new]

    change(
        root,
        lambda data: data["attributes"]["hydra_pipe_blocks"].update(n_features=last, blocks=blocks),
    )
    of_shapes(run, lambda name: name.endswith("/gradient"), last, axis=1)
    of_shapes(run, lambda name: name.endswith("/scale"), len(blocks), axis=1)
    for table in ("updated", "momentum_started", "step_factor"):
        of_shapes(run, lambda name, table=table: name.endswith(table), len(blocks), axis=1)
    if not factored:
        of_shapes(run, lambda name: name.endswith("folded"), n, axis=1)
    # what is factored of it
    own = [
        b["inputs"][1] - b["inputs"][0] + b["columns"][1] - b["columns"][0]
        for b in blocks
        if b["inputs"]
    ]
    of_shapes(run, lambda name: name.endswith("factored/gradient"), sum(own), axis=1)
    for file in run.rglob("gradient/zarr.json"):
        change(file, in_wide_files)
    n_own = sum(b["encoding"] == "factored" for b in blocks)
    of_shapes(run, lambda name: name.endswith("factored/scale"), n_own, axis=1)


def in_wide_files(data: Any) -> None:
    """Let an array have files of whole rows, of as many chunks as that takes."""
    width = min(data["shape"][1], 60_000)
    codecs = data["codecs"][0].get("configuration", {}).get("codecs", data["codecs"])
    data["chunk_grid"]["configuration"]["chunk_shape"][1] = -(-data["shape"][1] // width) * width
    rows = data["chunk_grid"]["configuration"]["chunk_shape"][0]
    sharding = {"chunk_shape": [rows, width], "codecs": codecs, "index_location": "end"}
    data["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]


def chunks_in_agreement(run: Path, n: int) -> None:
    """Chunks, shards and their index of any size."""
    for file in run.rglob("zarr.json"):
        data = json.loads(file.read_bytes())
        if "shape" in data:
            grid = data["chunk_grid"]["configuration"]["chunk_shape"]
            grid[0] *= n
            for codec in data["codecs"]:
                if codec["name"] == "sharding_indexed" and n % 2:
                    codec["configuration"]["chunk_shape"][0] *= n
            file.write_bytes(json.dumps(data).encode())


def thin_chunks(run: Path, n: int) -> None:
    """As many files as there are values, and more."""
    for file in run.rglob("zarr.json"):
        data = json.loads(file.read_bytes())
        if "shape" in data:
            data["chunk_grid"]["configuration"]["chunk_shape"] = [1] * len(data["shape"])
            data["codecs"] = (
                data["codecs"][0].get("configuration", {}).get("codecs", data["codecs"])
            )
            data["shape"] = [n] * len(data["shape"])
            file.write_bytes(json.dumps(data).encode())


def many_ranks(run: Path, n: int) -> None:
    change(run / "gradients.zarr/zarr.json", lambda data: data["attributes"].update(n_ranks=n))
    of_facts(run, rank_rows=[1] * 78)


def resumed(run: Path, n: int) -> None:
    """A reduction that says how far it got."""

    def begun(data: Any) -> None:
        for name in ("reduce hydra", "reduce hydra-by-label", "reduce hydra-mean"):
            if (stage := data["stages"].get(name)) is not None:
                stage["state"] = "running"
                stage["facts"] = {
                    "answered": {
                        "order": ["score first", "fold first", "x"][n % 3],
                        "done": n,
                        "keeping": True,
                    }
                }

    change(run / "run.json", begun)


def loop_of_links(run: Path, n: int) -> None:
    for number in range(n % 10):
        (run / "gradients.zarr" / f"link{number}").symlink_to(".", target_is_directory=True)


CRAFTED = [
    *(
        rows_in_agreement,
        steps_in_agreement,
        tests_in_agreement,
        samples_in_agreement,
        width_in_agreement,
        chunks_in_agreement,
    ),
    *(thin_chunks, many_ranks, resumed, loop_of_links),
    lambda run, n: samples_in_agreement(run, n, labels=False),
    lambda run, n: (of_facts(run, pruned=True), width_in_agreement(run, n)),
    lambda run, n: (of_facts(run, pruned=True), width_in_agreement(run, n, factored=True)),
    lambda run, n: (of_facts(run, pruned=True), rows_in_agreement(run, n)),
]
SIZES = [0, 1, 5, 100, 8001, 10**6, 10**9 + 7, 10**12, 10**15, 2**62, 2**63 - 1]


def of_stage(run: Path, name: str, **facts: Any) -> None:
    change(run / "run.json", lambda data: data["stages"][name]["facts"].update(facts))


def probed_in_agreement(run: Path, n: int) -> None:
    of_shapes(run, lambda name: name.startswith("probes/"), n)
    of_stage(run, f"probe {PROBE}", n_tests=n)


def matrix_in_agreement(run: Path, n: int) -> None:
    """Of more features than the recording has."""
    of_shapes(run, lambda name: name.endswith("/swept"), n, axis=1)


def proposal_in_agreement(run: Path, n: int) -> None:
    of_stage(run, "clean hydra", n_samples=n, n_proposed=n)


def keeping_resumed(run: Path, n: int) -> None:
    """Hypergradients that say how far they got."""

    def begun(data: Any) -> None:
        stage = data["stages"]["keep hydra-fisher"]
        answered = {
            "order": ["backward", "forward", "x"][n % 3],
            "done": n,
            "base_bytes": n,
            "found": [{"x": n}],
        }
        stage |= {"state": "running", "facts": {"answered": answered}}

    change(run / "run.json", begun)


CRAFTED_OF_PROBED = [
    *(probed_in_agreement, matrix_in_agreement, proposal_in_agreement, keeping_resumed),
    *(samples_in_agreement, chunks_in_agreement, thin_chunks),
]


def crafted_of_probed(run: Run) -> None:
    able = [options for options in OF_PROBED if options["call"] != "probe"]
    for (number, craft), (i, n) in product(enumerate(CRAFTED_OF_PROBED), enumerate(SIZES)):
        options = able[(number + i) % len(able)]
        try:
            craft(run.path, n)
            run.use_probed(options, (craft.__name__, n, options))
        finally:
            run.put_back()


def crafted(run: Run) -> None:
    for (number, craft), (i, n) in product(enumerate(CRAFTED), enumerate(SIZES)):
        reduction, also = REDUCTIONS[(number + i) % len(REDUCTIONS)], ALSO[(number + i) % len(ALSO)]
        try:
            craft(run.path, n)
            run.use(reduction, also, (number, n, reduction))
        finally:
            for link in (run.path / "gradients.zarr").glob("link*"):
                link.unlink()
            run.put_back()


def main(path: str, which: str, n: int) -> None:
    # jemalloc, which Arrow takes otherwise, reserves what it may need
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    os.fsync = lambda _: None
    remember_metadata()
    run = Run(Path(path))
    if run.is_probed:
        for options in OF_PROBED:
            run.use_probed(options, HEALTHY)
            run.put_back()
    else:
        for reduction, also in zip_longest(REDUCTIONS, ALSO, fillvalue="nothing"):
            run.use(reduction, also, FIRST)
            run.put_back()
    assert RunDirectory.open(path).stages
    in_use = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if "VmData" in line
    )
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + SPARE_BYTES, in_use + SPARE_BYTES))
    with suppress(MemoryError):  # the limit holds
        bytearray(SPARE_BYTES + 2**26)
        raise AssertionError("there is more memory than there should be")
    if which in ("random", "both"):
        damaged_at_random(run, n)
    if which in ("crafted", "both"):
        (crafted_of_probed if run.is_probed else crafted)(run)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
