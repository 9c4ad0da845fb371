"""The training loops that the benchmarks time: four models, plain, recorded by hydra-pipe, or
recorded by dattri-llm.
"""

import contextlib
import json
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe import Pipeline, Recorder

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import cifar10n
import fashion_mnist
import shakespeare

Batches = list[tuple[Tensor, Tensor]]
PEER_PACKAGE = "dattri-llm"


def mlp(data: Path, n_train: int = 6400, **settings: Any) -> Pipeline:
    """An MLP 784-256-128-10 in place of LeNet-5."""
    pipeline = fashion_mnist.pipeline(
        data / "fashion-mnist", n_train=n_train, epochs=1, **{"n_test": 10} | settings
    )
    pipeline.model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    (group,) = pipeline.optimizer.param_groups
    pipeline.optimizer = torch.optim.SGD(
        pipeline.model.parameters(), lr=0.02, momentum=group["momentum"]
    )
    return pipeline


def lenet(data: Path, n_train: int = 6400, **settings: Any) -> Pipeline:
    """LeNet-5 on Fashion-MNIST."""
    return fashion_mnist.pipeline(
        data / "fashion-mnist", n_train=n_train, epochs=1, **{"n_test": 10} | settings
    )


@dataclass(frozen=True)
class Workload:
    """A training loop.

    Args:
        title: of the model.
        build: from the directory of the data sets, the pipeline; its data are in memory.
        passes: over the data, of one timed run.
    """

    title: str
    build: Callable[[Path], Pipeline]
    passes: int


WORKLOADS = {
    "mlp": Workload("MLP 784-256-128-10", mlp, 15),
    "lenet": Workload("LeNet-5", lenet, 3),
    "resnet": Workload(
        "ResNet-8 on CIFAR-10",
        lambda data: cifar10n.pipeline(data / "cifar10", n_train=1280, n_test=10, epochs=1),
        2,
    ),
    "gpt": Workload(
        "GPT 4 x 128, context 64, AdamW",
        lambda data: shakespeare.pipeline(data / "text", n_train=512, n_test=10, epochs=1),
        2,
    ),
}


def chosen(names: str) -> dict[str, Workload]:
    """The workloads in a list such as "mlp,gpt". Raises: SystemExit: an unknown one."""
    unknown = [name for name in names.split(",") if name not in WORKLOADS]
    if unknown:
        raise SystemExit(
            f"there is no run called {', '.join(unknown)}: choose among {','.join(WORKLOADS)}"
        )
    return {name: WORKLOADS[name] for name in names.split(",")}


@dataclass
class Timed:
    """What one run of a loop took.

    Args:
        seconds: of the whole loop, its beginning and end included.
        steps: of the loop.
        first_seconds: of the first step, with everything that is made before it.
        last_seconds: from the last step until everything is on disk.
        rows: samples that went through.
        stored_bytes: of training rows and what belongs to them.
        facts: what the recording says of itself.
    """

    seconds: float
    steps: int
    first_seconds: float
    last_seconds: float
    rows: int
    stored_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, everything included."""
        return self.seconds / self.steps * 1e3

    @property
    def marginal_ms(self) -> float:
        """Milliseconds of one step more: without the first and what comes after the last."""
        return (
            (self.seconds - self.first_seconds - self.last_seconds) / max(1, self.steps - 1) * 1e3
        )


class Plain:
    """Training without recording."""

    def __init__(self, pipeline: Pipeline, store: Path) -> None:
        pass

    def step(self, ids: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def close(self) -> dict[str, Any]:
        """Finish, and say what the recording knows of itself."""
        return {}


class Hydra(Plain):
    """Recorded by hydra-pipe as by default: lossless where 4,096 columns allow it, float16."""

    def __init__(self, pipeline: Pipeline, store: Path) -> None:
        self.store = store
        self.recorder = Recorder(pipeline.model, pipeline.optimizer, store, len(pipeline.train))

    def step(self, ids: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        return self.recorder.step(ids)

    def close(self) -> dict[str, Any]:
        self.recorder.close()
        return json.loads((self.store / "run.json").read_text())["stages"]["record"]["facts"]


class Dattri(Plain):
    """Recorded by dattri-llm: `HookManager(...).collect()` with `OffloadCallback`, each step
    written when it is done.
    """

    asynchronous = False

    def __init__(self, pipeline: Pipeline, store: Path) -> None:
        from dattri_llm import (
            REGISTER_ALL,
            GradientStorageManager,
            HookManager,
            HookManagerConfig,
            OffloadCallback,
        )

        manager = GradientStorageManager(str(store))
        # one record a step, its default: the same bytes without an index entry for each sample
        offload = OffloadCallback(
            offload_interval=1, file_manager=manager, async_write=self.asynchronous
        )
        self.hooks = HookManager(
            pipeline.model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[offload]
        )
        self._context = self.hooks.collect()
        self._context.__enter__()

    def close(self) -> dict[str, Any]:
        self._context.__exit__(None, None, None)
        hooked = set(self.hooks.layer_names)
        self.hooks.remove()
        return {"layers": sorted(hooked)}


class DattriAsync(Dattri):
    """The same with `async_write=True`: a background thread writes."""

    asynchronous = True


PLAIN, HYDRA = "plain", "hydra-pipe"
PEERS: dict[str, type[Plain]] = {"dattri-llm": Dattri, "dattri-llm async": DattriAsync}
SIDES: dict[str, type[Plain]] = {PLAIN: Plain, HYDRA: Hydra, **PEERS}


def peer_version() -> str | None:
    """Version of dattri-llm, None where it is not installed."""
    return metadata.version(PEER_PACKAGE) if util.find_spec("dattri_llm") else None


def batches_of(pipeline: Pipeline) -> Batches:
    """The training set in order, cut into batches."""
    inputs, targets = pipeline.train.tensors
    return list(
        zip(inputs.split(pipeline.batch_size), targets.split(pipeline.batch_size), strict=True)
    )


def run_loop(pipeline: Pipeline, side: type[Plain], store: Path, passes: int) -> Timed:
    """Train `pipeline.model` for some passes and keep what `side` records in `store`."""
    model, optimizer, batches, size = (
        pipeline.model,
        pipeline.optimizer,
        batches_of(pipeline),
        pipeline.batch_size,
    )
    begin = first = time.perf_counter()
    recording = side(pipeline, store)
    for step in range(passes * len(batches)):
        at = step % len(batches)
        inputs, targets = batches[at]
        with recording.step(range(at * size, at * size + len(inputs))):
            pipeline.loss(model(inputs), targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            first = time.perf_counter()
    last = time.perf_counter()
    facts = recording.close()
    end = time.perf_counter()
    rows = passes * len(pipeline.train)
    return Timed(
        end - begin,
        passes * len(batches),
        first - begin,
        end - last,
        rows,
        disk_bytes(store),
        facts,
    )


def run_side(workload: Workload, data: Path, name: str, scratch: Path, passes: int) -> Timed:
    """One run of a side from the same start; its store is deleted again, before the kernel writes
    all of it to the disk.
    """
    torch.manual_seed(0)
    pipeline = workload.build(data)
    store = scratch / "store"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of full backward hooks on first layers
            return run_loop(pipeline, SIDES[name], store, passes)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def left_out(pipeline: Pipeline, layers: Sequence[str]) -> str:
    """What is trained in modules that are not among `layers`: modules by type and parameters.
    Empty: nothing.
    """
    owners = [
        (n, m)
        for n, m in pipeline.model.named_modules()
        if any(p.requires_grad for p in m.parameters(recurse=False))
    ]
    missed = [module for name, module in owners if name not in layers]
    if not missed:
        return ""
    numbers = {type(m).__name__: sum(type(o) is type(m) for o in missed) for m in missed}
    parameters = sum(p.numel() for m in missed for p in m.parameters(recurse=False))
    return f"{', '.join(f'{n} {kind}' for kind, n in numbers.items())}: {parameters:,} parameters"


def shuffled(names: Sequence[str], pairs: int, seed: int = 0) -> Iterator[list[str]]:
    """The order of the sides in each of `pairs` rounds."""
    order = random.Random(seed)
    for _ in range(pairs):
        yield order.sample(list(names), len(names))


def disk_bytes(path: Path) -> int:
    """Of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
