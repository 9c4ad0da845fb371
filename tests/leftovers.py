"""Recordings, reductions and exports that are interrupted anywhere and then finished, round after
round; and what stays behind.

`benchmarks/leftovers.py` runs many rounds, `test_leftovers.py` a few.
"""

import atexit
import gc
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from support.pipelines import cross_entropy, mlp_pipeline
from torch import nn
from torch.utils.data import DataLoader

import hydra_pipe
from hydra_pipe.errors import HydraError
from hydra_pipe.plan import chunking
from hydra_pipe.progress import Progress, Task
from hydra_pipe.reduction import sharing
from hydra_pipe.store.run import locks
from hydra_pipe.store.zarr.appender import Appender
from hydra_pipe.store.zarr.codec import StoredFile


def _raised(error: type[BaseException]) -> Callable[[], None]:
    def strike() -> None:
        raise error("struck")

    return strike


# how work is struck: in the thread that does it, or, as by Ctrl-C, in the main thread wherever that
# is
STRIKES: dict[str, Callable[[], None]] = {
    "exception": _raised(RuntimeError),
    "interrupt": _raised(KeyboardInterrupt),
    "signal": lambda: signal.raise_signal(signal.SIGINT),
}


class Blow:
    """Strikes once, at the `n`-th call."""

    def __init__(self, n: int, strike: Callable[[], None]) -> None:
        self._left, self._strike, self._lock = n, strike, threading.Lock()

    def __call__(self, *_: Any) -> None:
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now:
            self._strike()

    @property
    def has_struck(self) -> bool:
        return self._left <= 0


class Watching(Progress):
    """Progress that calls `blow` whenever it is told of something."""

    def __init__(self, blow: Blow) -> None:
        self._blow = blow

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        task = Task()
        task.advance = self._blow  # type: ignore[method-assign]
        yield task

    def say(self, message: str) -> None:
        self._blow()


@contextmanager
def blows(owner: Any, name: str, blow: Blow) -> Iterator[None]:
    """A block in which `blow` is called before method `name` of `owner`."""
    real = getattr(owner, name)

    def before(*args: Any, **options: Any) -> Any:
        blow()
        return real(*args, **options)

    setattr(owner, name, before)
    try:
        yield
    finally:
        setattr(owner, name, real)


REDUCTIONS: list[dict[str, Any]] = [
    {},
    {"scheduler": "synchronous"},
    {"keep_hypergradients": True},
    {"method": "hydra-fisher"},
    {"method": "hydra-fisher", "scheduler": "synchronous"},
    {"method": "influence"},
    {"method": "grad-cos"},
    {"method": "self"},
    {"method": "hydra-exact"},
]


@dataclass
class Rounds:
    """Rounds in one directory.

    Args:
        directory: empty.
        seed: of what is done, and where it is struck.
    """

    directory: Path
    seed: int = 0
    n_done: int = 0
    #: how many of each kind were struck, before they were finished
    struck: Counter[str] = field(default_factory=Counter)
    #: what was raised last, as a notebook keeps it
    kept: list[BaseException] = field(default_factory=list)
    models: list[tuple[nn.Module, torch.optim.Optimizer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._whole = self.directory / "whole"
        hydra_pipe.record(self._pipeline(), self._whole)
        hydra_pipe.reduce(self._whole, method="hydra")

    def run(self, n: int) -> None:
        """Do `n` more rounds."""
        kinds = [self._record, self._loop, self._reduce, self._reduce, self._export]
        for _ in range(n):
            kinds[self.n_done % len(kinds)]()
            self.n_done += 1

    def _pipeline(self) -> hydra_pipe.Pipeline:
        pipeline = mlp_pipeline(epochs=2, n_train=48, n_test=9)
        self.models = [*self.models[-3:], (pipeline.model, pipeline.optimizer)]
        return pipeline

    def _attempt(self, kind: str, most: int, work: Callable[[Blow], Any]) -> None:
        """Strike `work` at a call drawn from the first `most`, and keep what it raises."""
        name = self._random.choice(list(STRIKES))
        blow = Blow(self._random.randint(1, most), STRIKES[name])
        try:
            work(blow)
        except (HydraError, RuntimeError, KeyboardInterrupt) as error:
            self.kept = [*self.kept[-3:], error]
        if blow.has_struck:
            self.struck[f"{kind}, {name}"] += 1

    def _record(self) -> None:
        run = self.directory / "recorded"
        shutil.rmtree(run, ignore_errors=True)
        options: dict[str, Any] = {"checkpoint_every": "4"}
        self._attempt(
            "record",
            14,
            lambda blow: hydra_pipe.record(
                self._pipeline(), run, progress=Watching(blow), **options
            ),
        )

        def in_writer(blow: Blow) -> None:
            with blows(Appender, "write", blow):
                hydra_pipe.record(self._pipeline(), run, **options)

        self._attempt("record, in the writer", 30, in_writer)
        hydra_pipe.record(self._pipeline(), run, **options)

    def _loop(self) -> None:
        run = self.directory / "loop"
        self._attempt("loop", 18, lambda blow: self._train(run, blow))
        self._train(run, Blow(0, _raised(RuntimeError)))

    def _train(self, run: Path, blow: Blow) -> None:
        """A loop of one's own, by `step` or by `track`, which calls `blow` everywhere in a step,
        between steps, and among tests.
        """
        pipeline, tracked = self._pipeline(), self._random.random() < 0.5
        model, optimizer = pipeline.model, pipeline.optimizer
        recorder = hydra_pipe.Recorder(model, optimizer, run, len(pipeline.train), overwrite=True)
        loader = DataLoader(pipeline.train, 8)

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            blow()
            loss = cross_entropy(model(x), y).mean()
            blow()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            blow()

        def tests() -> Iterator[Any]:
            for batch in DataLoader(pipeline.test, 3):
                blow()
                yield batch

        try:
            if tracked:
                for x, y in recorder.track(loader):
                    step(x, y)
            else:
                for number, (x, y) in enumerate(loader):
                    with recorder.step(range(number * 8, number * 8 + 8)):
                        step(x, y)
                    blow()
            recorder.record_test(tests(), cross_entropy)
            recorder.close()
        except BaseException as error:
            recorder.fail(error)
            raise

    def _reduce(self) -> None:
        options = self._random.choice(REDUCTIONS)
        if options.get("method") == "hydra-exact":
            options = options | {"pipeline": self._pipeline()}
        again = {"overwrite": True}

        def watched(blow: Blow) -> None:
            hydra_pipe.reduce(self._whole, progress=Watching(blow), **options, **again)

        def in_reader(blow: Blow) -> None:
            with blows(StoredFile, "read", blow):
                hydra_pipe.reduce(self._whole, **options, **again)

        self._attempt("reduce", 8, watched)
        if "pipeline" in options:
            options = options | {"pipeline": self._pipeline()}
        self._attempt("reduce, in a reader", 8, in_reader)
        if "pipeline" in options:
            options = options | {"pipeline": self._pipeline()}
        hydra_pipe.reduce(self._whole, **options)

    def _export(self) -> None:
        hydra_pipe.reduce(self._whole, method="hydra")

        def watched(blow: Blow) -> None:
            hydra_pipe.export(
                self._whole, full=True, overwrite=True, progress=Watching(blow), method="hydra"
            )

        def in_writer(blow: Blow) -> None:
            with blows(pq.ParquetWriter, "write_table", blow):
                hydra_pipe.export(self._whole, full=True, overwrite=True, method="hydra")

        self._attempt("export", 2, watched)
        self._attempt("export, in the writer", 4, in_writer)
        hydra_pipe.export(self._whole, full=True, overwrite=True, method="hydra")


@contextmanager
def small_files() -> Iterator[None]:
    """A block in which files hold few rows: so there are several, and threads that read and write
    them.
    """
    before, chunking.MAX_SHARD_ROWS = chunking.MAX_SHARD_ROWS, 16
    try:
        yield
    finally:
        chunking.MAX_SHARD_ROWS = before


@contextmanager
def uncollected() -> Iterator[None]:
    """A block without the garbage collector: what is let go there is let go by its user."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def standing(models: list[tuple[nn.Module, torch.optim.Optimizer]]) -> dict[str, Any]:
    """What there is in this process: threads, processes, files, locks, hooks of `models` and of
    torch, handlers of signals.
    """
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": sorted(_children()),
        "files": sorted(_files()),
        "locks": sorted(str(held.path) for held in locks._HELD),
        "shared": len(sharing._SHARED),
        "hooks": sum(_n_hooks(*of) for of in models)
        + len(torch.nn.modules.module._global_forward_hooks),
        "at exit": atexit._ncallbacks(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def _children() -> Iterator[str]:
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended since
            for pid in (task / "children").read_text().split():
                with suppress(OSError):
                    yield Path(f"/proc/{pid}/comm").read_text().strip()


def _files() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            yield os.readlink(f"/proc/self/fd/{name}").split(":")[0]


def _n_hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    of_optimizer = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]  # type: ignore[attr-defined]
    of_modules = [
        getattr(module, name)
        for module in model.modules()
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ]
    of_parameters = [p._backward_hooks or {} for p in model.parameters()]
    own_forward = sum("forward" in vars(module) for module in model.modules())
    return sum(map(len, [*of_optimizer, *of_modules, *of_parameters])) + own_forward
