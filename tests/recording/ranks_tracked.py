"""What test_ranks.py has two ranks do beyond `step`: tracked loops, states and going on."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ranks_worker
import torch
from ranks_worker import (
    ADAMW,
    SGD,
    TEST,
    TRAIN,
    Switched,
    X,
    Y,
    infinite,
    loop,
    mlp,
    plain,
    run_group,
    switched,
)
from support.pipelines import cross_entropy
from support.small_files import make_files_small
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from hydra_pipe import Recorder
from hydra_pipe.errors import HydraError
from hydra_pipe.recording import collector


@dataclass(frozen=True)
class Tracked:
    """A training run that is recorded by its loader, and by naming its samples.

    Args:
        accumulate: batches of a step; all but the last without synchronisation.
        sizes: samples of each rank in a batch; the last of an epoch may be smaller.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    accumulate: int = 1
    sizes: tuple[int, int] = (4, 4)
    options: tuple[tuple[str, object], ...] = (("encoding", "exact"), ("dtype", "float32"))


TRACKED = {
    "one batch": Tracked(SGD),
    "one uneven batch": Tracked(ADAMW, sizes=(5, 4)),
    "two batches": Tracked(SGD, 2, sizes=(5, 4)),
    "three batches": Tracked(ADAMW, 3, options=()),
    "dtype left open": Tracked(SGD, 3, options=(("dim", 60),)),
}
# Groups of batches, counted over all epochs: of which the loop throws the gradients away; in which
# that rank's loss of the last batch is infinite, so that the scaler leaves the step out; in which
# the loss of the first batch of rank 1 is zero; in which test gradients are taken.
CLEARED, OVERFLOWED, ZERO, TESTED = (2, 6), {(0, 1), (5, 0), (7, 0), (8, 1)}, (3, 6, 7), (5, 11, 12)
EPOCHS = 14


def batches_of(case: Tracked) -> DataLoader:
    rank = distributed.get_rank()
    numbered = TensorDataset(X, Y, torch.arange(24))
    return DataLoader(
        numbered,
        batch_sampler=BatchSampler(DistributedSampler(numbered, seed=1), case.sizes[rank], False),
    )


def train_group(case, k, group, model, optimizer, scaler, between=lambda: None) -> bool:
    """The passes of one step, or of what becomes none. Returns whether the optimiser was called."""
    rank = distributed.get_rank()
    for position, (x, y, _) in enumerate(group):
        last = position == case.accumulate - 1
        with nullcontext() if last else model.no_sync():
            factor = float("inf") if last and (k, rank) in OVERFLOWED else 1.0
            factor *= 0.0 if rank == 1 and k in ZERO and position == 0 else 1.0
            scaler.scale(cross_entropy(model(x), y).sum() / 8 * factor).backward()
        if position == 0:
            between()
    taken = last and k not in CLEARED
    if taken:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return taken


def train_tracked(case: Tracked, form: str, run: Path | None) -> tuple[nn.Module, Recorder | None]:
    model = DistributedDataParallel(mlp())
    optimizer = case.optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorder = (
        Recorder(model, optimizer, run, 24, sample_labels=Y.tolist(), **dict(case.options))
        if run
        else None
    )
    loader = batches_of(case)
    if form == "tracked":
        loader = recorder.track(loader)
    k = 0

    def test() -> None:
        if recorder and k in TESTED:
            recorder.record_test(DataLoader(TEST, 2), cross_entropy)

    for epoch in range(EPOCHS):
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches = iter(loader)
        sizes = [
            min(case.accumulate, len(loader) - first)
            for first in range(0, len(loader), case.accumulate)
        ]
        for size in sizes:
            named = form == "named" and size == case.accumulate and k not in CLEARED
            group = (next(batches) for _ in range(size))
            if form == "named":
                group = list(group)
                test()
            with recorder.step(torch.cat([ids for *_, ids in group])) if named else nullcontext():
                train_group(
                    case,
                    k,
                    group,
                    model,
                    optimizer,
                    scaler,
                    test if form == "tracked" else lambda: None,
                )
            k += 1
    return model.module, recorder


def record_tracked(name: str, directory: Path) -> object:
    """Whether the weights are those of a run that is not recorded, and what was counted; the runs
    are for the test.
    """
    plain, _ = train_tracked(TRACKED[name], "plain", None)
    counts = {}
    for form in ("named", "tracked"):
        model, recorder = train_tracked(TRACKED[name], form, directory / f"{name}, {form}")
        recorder.record_test(DataLoader(TEST, 2), cross_entropy)
        recorder.close()
        same = all(
            torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items()
        )
        counts[form] = [same, recorder.n_steps, recorder.n_skipped, recorder.n_tests]
    return counts


def tracked_loop(
    directory: Path,
    body: Callable[..., None],
    *,
    name: str,
    sampler: Callable[[], object] = lambda: [*range(24)],
    dataset: Callable[[], object] = lambda: TRAIN,
) -> object:
    """Record `body(rank, step, model, optimizer, inputs, targets)`, or what it does with the
    iterator of the batches.
    """
    rank = distributed.get_rank()
    model = DistributedDataParallel(Switched())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, directory / name, 24, dtype="float32")
    batches = iter(recorder.track(DataLoader(dataset(), batch_size=3, sampler=sampler())))
    for step, (x, y) in enumerate(batches):
        body(rank, step, model, optimizer, x, y, recorder=recorder, batches=batches)
        optimizer.zero_grad()
    recorder.close()
    return {"n_steps": recorder.n_steps}


def unnamed(body: Callable[..., None]) -> Callable[..., None]:
    return lambda *args, recorder, batches: body(*args)


def draws_ahead(rank, step, model, optimizer, x, y, *, recorder, batches) -> None:
    if (rank, step) == (1, 2):
        next(batches)
    if step < 7:
        plain(rank, step, model, optimizer, x, y)


def names_too(rank, step, model, optimizer, x, y, *, recorder, batches) -> None:
    with recorder.step([0, 1, 2]) if (rank, step) == (1, 2) else nullcontext():
        plain(rank, step, model, optimizer, x, y)


def leaves_out(rank, step, model, optimizer, x, y) -> None:
    kept = slice(2 if (rank, step) == (1, 2) else 3)
    plain(rank, step, model, optimizer, x[kept], y[kept])


def twice(directory: Path) -> object:
    """Two steps of the optimiser within one `step`, and more of them than fit into a row buffer."""
    model = DistributedDataParallel(mlp())
    optimizer = SGD(model.parameters())
    recorder = Recorder(model, optimizer, directory / "twice", 24)
    for _ in range(20):
        with recorder.step([0, 1, 2]) as note:
            for loss in (1.0, 2.0):
                note.loss = loss
                optimizer.zero_grad()
                plain(0, 0, model, optimizer, X[:3], Y[:3])
    recorder.close()
    return recorder.n_steps


def unlike_dtypes(directory: Path) -> object:
    """Which no two ranks choose of one layout; but then the store would be of two kinds."""
    choose = collector.choose_recording
    if distributed.get_rank() == 1:
        collector.choose_recording = lambda *args, **options: (choose(*args, **options)[0], "int8")
    try:
        return loop(directory, plain, name="unlike dtypes")
    finally:
        collector.choose_recording = choose


def states_of_skipped_steps(directory: Path) -> object:
    """States where only one rank has seen why a step is left out, where batches wait, and where
    only one rank's are not finite.
    """
    rank = distributed.get_rank()
    model = DistributedDataParallel(mlp())
    optimizer = SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorder = Recorder(model, optimizer, directory / "skipped", 24)
    found: list[object] = []
    for k, (x, y) in enumerate(recorder.track(DataLoader(TRAIN, 3))):
        accumulates = k in (3, 5)
        with model.no_sync() if accumulates else nullcontext():
            factor = float("inf") if (k, rank) in ((1, 1), (2, 0), (5, 1)) else float(k != 2)
            scaler.scale(cross_entropy(model(x), y).mean() * factor).backward()
        if not accumulates:
            scaler.step(optimizer)
            scaler.update()
        if k == 2:
            optimizer.zero_grad()
        try:
            state = recorder.state_dict()
            found.append([state["n_steps"], state["n_skipped"], state["part_rows"]])
        except HydraError as error:
            found.append(f"{type(error).__name__}: {error}")
        if not accumulates:
            optimizer.zero_grad()
    recorder.close()
    return [*found, recorder.n_steps, recorder.n_skipped]


KEPT = {"sgd": (SGD, {"dim": 200}), "adamw": (ADAMW, {"dim": 200, "dtype": "int8"})}
STATES, TESTS, KILLED, STEPS = (6, 12), (5, 6, 8, 13), 14, 24


def with_states(run: Path, which: str, *, until: int = STEPS, resume: bool = False) -> object:
    """A tracked loop with checkpoints, of batches that grow once; what its states were."""
    make_files_small(setattr)
    rank = distributed.get_rank()
    model = DistributedDataParallel(mlp())
    optimizer = KEPT[which][0](model.parameters())
    recorder = Recorder(model, optimizer, run, 24, sample_labels=["a", "b"] * 12, **KEPT[which][1])
    loader = recorder.track(
        DataLoader(TRAIN, batch_sampler=BatchSampler(DistributedSampler(TRAIN), 3 + rank, False))
    )
    checkpoint = run.with_name(f"{run.name} {rank}.pt")
    at, done, states = 0, 0, []
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        recorder.load_state_dict(saved["recorder"])
        done, states = saved["done"], saved["states"]
    while at < until:
        loader.batch_sampler.sampler.set_epoch(at)
        for k, (x, y) in enumerate(loader):
            if k == 3 or at == until:
                break
            at += 1
            if at <= done:
                continue
            cross_entropy(model(x), y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if at in TESTS:
                recorder.record_test(DataLoader(TEST, 3), cross_entropy)
            if at in STATES:
                states.append(recorder.state_dict())
                own = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "done": at,
                    "states": states,
                }
                torch.save(own | {"recorder": states[-1]}, checkpoint)
    if until < STEPS:
        return None
    recorder.record_test(DataLoader(TEST, 3), cross_entropy)
    recorder.close()
    return [states, [value.sum().item() for value in model.state_dict().values()]]


def die(directory: Path) -> object:
    """Two recordings past their last states, both left as they are."""
    try:
        for which in KEPT:
            with_states(directory / which, which, until=KILLED)
    finally:
        os._exit(7)


def unlike_states(directory: Path) -> object:
    """Each rank loads another one."""
    states = torch.load(directory / f"sgd {distributed.get_rank()}.pt", weights_only=True)["states"]
    model = DistributedDataParallel(mlp())
    recorder = Recorder(model, SGD(model.parameters()), directory / "sgd", 24, **KEPT["sgd"][1])
    recorder.load_state_dict(states[distributed.get_rank()])
    return None


def bad_state(directory: Path) -> object:
    """One rank has lost what it loads."""
    model = DistributedDataParallel(mlp())
    recorder = Recorder(model, SGD(model.parameters()), directory / "sgd", 24, **KEPT["sgd"][1])
    state = torch.load(directory / f"sgd {distributed.get_rank()}.pt", weights_only=True)[
        "recorder"
    ]
    recorder.load_state_dict({} if distributed.get_rank() == 1 else state)
    return None


GROUPS: dict[str, dict[str, Callable[[Path], object]]] = {
    "tracked": {
        **{name: partial(record_tracked, name) for name in TRACKED},
        "tracked ids": partial(
            tracked_loop,
            body=unnamed(plain),
            name="tracked ids",
            sampler=lambda: [*range(7), -1 if distributed.get_rank() else 7, *range(8, 24)],
        ),
        "tracked in part": partial(tracked_loop, body=unnamed(leaves_out), name="tracked in part"),
        "drawn ahead": partial(tracked_loop, body=draws_ahead, name="drawn ahead"),
        "tracked and named": partial(tracked_loop, body=names_too, name="tracked and named"),
        "tracked, not finite": partial(
            tracked_loop, body=unnamed(infinite), name="tracked, not finite"
        ),
        "tracked, mixing": partial(
            tracked_loop, body=unnamed(partial(switched, "mixing", 0)), name="tracked, mixing"
        ),
        "tracked, another set": partial(
            tracked_loop,
            body=unnamed(plain),
            name="tracked, another set",
            dataset=lambda: TEST if distributed.get_rank() else TRAIN,
        ),
        "unlike dtypes": unlike_dtypes,
        "twice": twice,
        "skipped": states_of_skipped_steps,
    },
    "killed": {"die": die},
    "resumed": {
        "unlike states": unlike_states,
        "bad state": bad_state,
        **{
            which: lambda d, which=which: with_states(d / which, which, resume=True)
            for which in KEPT
        },
        **{
            f"{which}, whole": lambda d, which=which: with_states(d / f"{which}, whole", which)
            for which in KEPT
        },
    },
}


def as_rank(group: str, rank: int, directory: Path) -> None:
    """What a process is to do."""
    run_group(group, (ranks_worker.GROUPS | GROUPS)[group], rank, directory)
