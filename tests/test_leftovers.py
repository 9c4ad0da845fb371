"""Whatever owns threads, processes, files, locks or hooks is closed by its user, and never by the
garbage collector.
"""

import ast
import gc
import multiprocessing.process
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from leftovers import STRIKES, Blow, Rounds, Watching, small_files, standing, uncollected
from support.pipelines import conv_pipeline, cross_entropy, mlp_pipeline
from torch.utils.data import DataLoader

import hydra_pipe
from hydra_pipe.plan.records import Reading
from hydra_pipe.progress import Progress, Task
from hydra_pipe.reduction import job, steps
from hydra_pipe.reduction.executors.distributed import ClusterHere
from hydra_pipe.reduction.solvers import influence
from hydra_pipe.reduction.weights import StepWeights, last_rows
from hydra_pipe.retraining import retrainer
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.streams import Stream
from hydra_pipe.training import batches

PACKAGE = Path(hydra_pipe.__file__).parent
LEFT_TO_THE_COLLECTOR = (
    "__del__",
    "finalize",
    "WeakValueDictionary",
    "WeakKeyDictionary",
    "WeakSet",
)


def test_a_few_interrupted_rounds_leave_what_one_leaves(tmp_path: Path) -> None:
    with small_files(), uncollected():
        rounds = Rounds(tmp_path)
        rounds.run(5)
        first = standing(rounds.models)
        rounds.run(5)
        assert standing(rounds.models) == first
    assert rounds.struck.total() > 5


def left_behind(source: str) -> list[str]:
    """Generators in `source` that the collector would have to close, and names of what runs when it
    comes.
    """
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any(
            "contextmanager" in ast.unparse(d) for d in node.decorator_list
        ):
            found += [f"{node.name}, line {line}" for line in _guarded_yields(node, guarded=False)]
        names = {getattr(node, key, None) for key in ("name", "id", "attr")}
        found += [name for name in LEFT_TO_THE_COLLECTOR if name in names]
    return found


def _guarded_yields(node: ast.AST, *, guarded: bool) -> Iterator[int]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if guarded and isinstance(child, ast.Yield | ast.YieldFrom):
            yield child.lineno
        closes = isinstance(child, ast.With) or (
            isinstance(child, ast.Try) and (child.finalbody or _catches_all(child))
        )
        yield from _guarded_yields(child, guarded=guarded or bool(closes))


def _catches_all(block: ast.Try) -> bool:
    return any(
        handler.type is None or "BaseException" in ast.unparse(handler.type)
        for handler in block.handlers
    )


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_nothing_is_left_to_the_collector(file: Path) -> None:
    assert left_behind(file.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    with pool:\n        yield 1", ["f, line 3"]),
        ("def f():\n    try:\n        yield 1\n    finally:\n        g()", ["f, line 3"]),
        ("def f():\n    try:\n        yield 1\n    except OSError:\n        g()", []),
        ("@contextmanager\ndef f():\n    with pool:\n        yield 1", []),
        ("class A:\n    def __del__(self):\n        pass", ["__del__"]),
        ("import weakref\nweakref.finalize(a, b)", ["finalize"]),
    ],
)
def test_what_is_left_to_the_collector_is_named(source: str, found: list[str]) -> None:
    assert left_behind(source) == found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    with small_files():
        hydra_pipe.record(mlp_pipeline(epochs=3), path)
    return path


class _Plan:
    """What readers of rows ask a plan for."""

    reading = Reading(rows=8, features=64)


def _job(store: Gradients) -> Any:
    class Job:
        plan, n_samples = _Plan, 40

    return Job


def _weights(store: Gradients) -> Any:
    schedule, series = store.schedules()
    return StepWeights(np.ones((store.n_steps, schedule.learning_rate.shape[1])), series)


def _last_rows(store: Gradients) -> Any:
    last = last_rows(store, 40)
    return influence._LastRows(_job(store), store, _weights(store), last, lambda n: None)


# what yields while a thread or processes are at work for it
STREAMS: dict[str, Callable[[Gradients], Stream[Any]]] = {
    "steps backward": lambda store: steps.backward(store, store.n_steps, 16),
    "steps forward": lambda store: steps.forward(store, 0, 16),
    "rows": lambda store: store.rows.stream((0, store.rows.n_rows), 8),
    "rows with weights": lambda store: job.rows_of(
        store, _job(store), (0, store.rows.n_rows), _weights(store)
    ),
    "last rows": lambda store: _last_rows(store).held(0, 40),
    "last rows counted": lambda store: _last_rows(store).pieces(),
    "batches": lambda store: batches.Samples(_with_workers(), "train").batches(
        batches.epoch_order(_with_workers(), 0)
    ),
    "test batches": lambda store: batches.test_batches(_with_workers(), Task(), None),
    "batches of a retraining": lambda store: retrainer._batches(_with_workers()),
}


def _with_workers() -> hydra_pipe.Pipeline:
    class Plain:
        """A dataset of which no one takes whole tensors."""

        def __init__(self, of: Any) -> None:
            self._of = of

        def __len__(self) -> int:
            return len(self._of)

        def __getitem__(self, i: int) -> Any:
            return self._of[i]

    pipeline = mlp_pipeline(num_workers=1)
    return mlp_pipeline(num_workers=1, train=Plain(pipeline.train), test=Plain(pipeline.test))


@contextmanager
def no_waiting(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A block in which nobody waits for a thread or a pool to end: who would is noted."""
    waited: list[str] = []

    def noted(self: Any, *_: Any, **__: Any) -> None:
        waited.append(repr(self))

    with patch.context() as inside:
        inside.setattr(threading.Thread, "join", noted)
        inside.setattr(ThreadPoolExecutor, "shutdown", noted)
        yield waited


def of_ours() -> list[str]:
    """Threads and processes that this package has begun."""
    threads = [
        thread.name for thread in threading.enumerate() if thread.name.startswith("hydra-pipe")
    ]
    return threads + [process.name for process in multiprocessing.process.active_children()]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_closed_by_its_user_in_the_middle(run: Path, name: str) -> None:
    with uncollected(), closing(STREAMS[name](Gradients(run / "gradients.zarr"))) as stream:
        next(stream)
        assert of_ours()
        stream.close()
        assert of_ours() == []
        assert list(stream) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_ends_what_it_began_at_its_end(run: Path, name: str) -> None:
    with uncollected():
        stream = STREAMS[name](Gradients(run / "gradients.zarr"))
        assert len(list(stream)) > 1
        assert of_ours() == []


# torch's own processes torch ends
@pytest.mark.parametrize("name", [name for name in STREAMS if "batches" not in name])
def test_of_a_stream_that_is_left_in_the_middle_the_collector_takes_the_memory_alone(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interrupted loop leaves it in the cycle of a traceback: the collector may come inside
    of threading's own locks.
    """
    gc.collect()
    stream = STREAMS[name](Gradients(run / "gradients.zarr"))
    next(stream)
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    del stream, cycle
    with no_waiting(monkeypatch) as waited:
        gc.collect()
    assert waited == []


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_an_interrupted_loop_leaves_no_thread(
    tmp_path: Path, *, tracked: bool, closed: bool
) -> None:
    pipeline = mlp_pipeline()
    model, optimizer, loader = pipeline.model, pipeline.optimizer, DataLoader(pipeline.train, 8)
    with small_files(), uncollected():
        recorder = hydra_pipe.Recorder(model, optimizer, tmp_path / "run", 40)

        def step(number: int, x: Any, y: Any) -> None:
            if number == 3:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            cross_entropy(model(x), y).mean().backward()
            optimizer.step()

        def loop() -> None:
            for number, (x, y) in enumerate(recorder.track(loader) if tracked else loader):
                if tracked:
                    step(number, x, y)
                else:
                    with recorder.step(range(number * 8, number * 8 + 8)):
                        step(number, x, y)

        with pytest.raises(KeyboardInterrupt):
            loop()
        if closed:
            recorder.fail(KeyboardInterrupt())
        for thread in threading.enumerate():
            if thread.name.startswith("hydra-pipe"):
                thread.join(10)  # it may be at the last rows that it was given
        assert of_ours() == []


def test_a_reduction_that_was_interrupted_gives_nothing_to_a_later_one(tmp_path: Path) -> None:
    """Its traceback, which a notebook keeps, still has the test gradients of the run that was
    there.
    """
    path = tmp_path / "run"
    hydra_pipe.record(conv_pipeline(), path)

    class Struck(Watching):
        def say(self, message: str) -> None:
            """Not here: among the rows."""

    with pytest.raises(RuntimeError) as kept:
        hydra_pipe.reduce(path, progress=Struck(Blow(1, STRIKES["exception"])), method="hydra")
    hydra_pipe.record(conv_pipeline(seed=5), path, overwrite=True)
    hydra_pipe.reduce(path, method="hydra")
    hydra_pipe.record(conv_pipeline(seed=5), tmp_path / "other")
    hydra_pipe.reduce(tmp_path / "other", method="hydra")
    found, expected = (
        zarr.open_array(p / "relevance.zarr" / "hydra", mode="r")[:]
        for p in (path, tmp_path / "other")
    )
    np.testing.assert_array_equal(found, expected)
    assert kept.value.__traceback__ is not None


def test_a_cluster_of_this_machine_that_is_interrupted_leaves_no_process(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: ClusterHere, graph: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClusterHere, "compute", interrupted)
    for _ in range(2):
        before = of_ours()
        with pytest.raises(KeyboardInterrupt):
            hydra_pipe.reduce(run, method="grad-dot", scheduler="processes", progress=Progress())
        assert of_ours() == before
