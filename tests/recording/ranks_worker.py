"""What the processes do that test_ranks.py starts: train small models under
DistributedDataParallel, with gloo.
"""

import copy
import json
import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from support.pipelines import conv_net, cross_entropy, images, mlp_pipeline
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import HydraError
from hydra_pipe.recording.pending import StepNote

WORLD = 2
TRAIN, TEST = images(24, 1), images(5, 2)
X, Y = TRAIN.tensors
EVEN, UNEVEN = (4, 4), (3, 5)
N_STEPS = 21  # more than the steps that go without a flush


@dataclass(frozen=True)
class Case:
    """A training run, as two ranks do it and as one process does.

    Args:
        split: samples of each rank in a step; every third step the other way round, so that rank 0
            needs more room than its first batch shows.
        optimizer: built over the parameters.
        clip: gradient norm, or None.
        passes: that a step's samples go through the model in; all but the last without
            synchronisation.
        options: of the recorder.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    split: tuple[int, int] = EVEN
    clip: float | None = None
    passes: int = 1
    options: tuple[tuple[str, object], ...] = (("encoding", "exact"), ("dtype", "float32"))

    def batches(self) -> list[list[np.ndarray]]:
        """Sample ids of each step, for each rank."""
        generator = np.random.default_rng(0)
        result = []
        for step in range(N_STEPS):
            ids = generator.permutation(24)[: sum(self.split)]
            first = self.split[1] if step % 3 == 2 else self.split[0]
            result.append([ids[:first], ids[first:]])
        return result


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
PROJECTED = (("encoding", "projected"), ("dim", 120), ("dtype", "float32"))
CASES = {
    "even": Case(conv_net, SGD),
    "uneven": Case(conv_net, SGD, UNEVEN, clip=0.3),
    "sketched": Case(mlp, SGD, UNEVEN, options=PROJECTED),
    "adamw": Case(mlp, ADAMW, EVEN, clip=0.3),
    "adamw, sketched": Case(mlp, ADAMW, UNEVEN, options=PROJECTED),
    "accumulated": Case(conv_net, SGD, UNEVEN, clip=0.3, passes=2),
    "float16": Case(conv_net, SGD, EVEN, options=(("encoding", "exact"),)),
}
PROBED = ("uneven", "adamw, sketched")


def train(case: Case, run: Path | None) -> nn.Module:
    """Train as one of the ranks, recorded where there is a `run`; the model, wrapped."""
    model = DistributedDataParallel(case.build())
    optimizer = case.optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, N_STEPS)
    recorder = (
        Recorder(model, optimizer, run, 24, sample_labels=Y.tolist(), **dict(case.options))
        if run
        else None
    )
    for ids in case.batches():
        own = ids[distributed.get_rank()]
        with recorder.step(own) if recorder else nullcontext(StepNote()) as note:
            parts = np.array_split(own, case.passes)
            note.loss = 0.0
            for k, part in enumerate(parts):
                with model.no_sync() if k < len(parts) - 1 else nullcontext():
                    loss = cross_entropy(model(X[part]), Y[part]).sum() / len(own)
                    loss.backward()
                note.loss += loss.item()
            if case.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if recorder and recorder.n_steps == 7:
            recorder.record_test(DataLoader(TEST, 2), cross_entropy)
    if recorder:
        recorder.record_test(DataLoader(TEST, 2), cross_entropy)
        recorder.close()
    return model


def record_case(name: str, directory: Path) -> object:
    """Whether the recorded run ends in the very weights of one that is not recorded.

    Of some a copy is probed, by one rank.
    """
    plain, model = (train(CASES[name], run) for run in (None, directory / name))
    if name in PROBED and distributed.get_rank() == 0:
        probed = shutil.copytree(directory / name, directory / f"{name}, probed")
        hydra_pipe.probe(probed, TEST, name="again", model=model, loss=cross_entropy)
    recorded = model.state_dict()
    return all(torch.equal(recorded[key], value) for key, value in plain.state_dict().items())


class Switched(nn.Module):
    """Does something else where `switch` says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 4)
        self.switch = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.switch == "mixing":
            x = self.first(x)
            x = x - x.mean(0)
        elif self.switch == "positions":
            x = self.first(torch.stack([x, 0 * x], 1)).sum(1)
        else:
            x = self.first(x)
        return self.second(torch.relu(x))


def loop(
    directory: Path,
    body: Callable[..., None],
    *,
    name: str,
    steps: int = 20,
    rate: float = 0.1,
    ids: Callable[[int], list[int]] = lambda step: [step, step + 1, step + 2],
    **options: object,
) -> dict[str, object]:
    """Record `steps` steps of `body(rank, step, model, optimizer, inputs, targets)`."""
    rank = distributed.get_rank()
    model = DistributedDataParallel(Switched())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    recorder = Recorder(model, optimizer, directory / name, 24, **options)
    for step in range(steps):
        with recorder.step(ids(step)):
            body(rank, step, model, optimizer, X[ids(0)], Y[ids(0)])
        # not inside: gradients that are cleared there are those of a step that is left out on
        # purpose
        optimizer.zero_grad()
    recorder.close()
    return {"n_steps": recorder.n_steps, "n_skipped": recorder.n_skipped}


def plain(
    rank: int,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    cross_entropy(model(x), y).mean().backward()
    optimizer.step()


def infinite(rank, step, model, optimizer, x, y) -> None:
    plain(rank, step, model, optimizer, x * (float("inf") if (rank, step) == (1, 5) else 1.0), y)


def switched(to: str, at: int, rank, step, model, optimizer, x, y) -> None:
    model.module.switch = to if rank == 1 and step >= at else ""
    plain(rank, step, model, optimizer, x, y)


def penalised(at: int, rank, step, model, optimizer, x, y) -> None:
    penalty = model.module.first.weight.square().sum() if rank == 1 and step >= at else 0.0
    (cross_entropy(model(x), y).mean() + penalty).backward()
    optimizer.step()


def other_rate(rank, step, model, optimizer, x, y) -> None:
    optimizer.param_groups[0]["lr"] = 0.5 if (rank, step) == (1, 3) else 0.1
    plain(rank, step, model, optimizer, x, y)


def own_scale(rank, step, model, optimizer, x, y) -> None:
    cross_entropy(model(x), y).mean().backward()
    for parameter in model.parameters():
        parameter.grad *= 1 + rank * (step == 3)
    optimizer.step()


def own_change(rank, step, model, optimizer, x, y) -> None:
    cross_entropy(model(x), y).mean().backward()
    if (rank, step) == (1, 3):
        model.module.second.bias.grad += 1.0
    optimizer.step()


def left_out(who: tuple[int, ...], rank, step, model, optimizer, x, y) -> None:
    cross_entropy(model(x), y).mean().backward()
    if step != 4 or rank not in who:
        optimizer.step()


def scaled(directory: Path) -> dict[str, object]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def body(rank, step, model, optimizer, x, y) -> None:
        # the first step and one in between overflow, on one rank only
        overflow = float("inf") if (rank, step) in ((1, 0), (0, 6)) else 1.0
        scaler.scale(cross_entropy(model(x), y).mean() * overflow).backward()
        scaler.step(optimizer)
        scaler.update()

    return loop(directory, body, name="scaled")


def unlike(what: str, directory: Path) -> object:
    return loop(directory, plain, name="unlike", **{what: 64 + distributed.get_rank()})


def again(directory: Path, **options: object) -> object:
    return loop(directory, plain, name="scaled", **options)


def unwrapped(directory: Path) -> object:
    model = mlp()
    return Recorder(model, SGD(model.parameters()), directory / "unwrapped", 24)


def pipeline(directory: Path) -> object:
    return hydra_pipe.record(mlp_pipeline(), directory / "pipeline")


class Optional(Switched):
    """Leaves its second half out of every other step of rank 1, and has a parameter that is never
    used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x.flatten(1)))
        return x[:, :4] if self.switch else self.second(x)


def unused(directory: Path) -> dict[str, object]:
    """Parameters that one rank does not use in some steps get the other's gradient all the same."""
    rank = distributed.get_rank()
    model = DistributedDataParallel(Optional(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, directory / "unused", 24, dtype="float32")
    for step in range(6):
        model.module.switch = "without" if rank == 1 and step % 2 else ""
        with recorder.step(range(3 * rank, 3 * rank + 3)):
            plain(rank, step, model, optimizer, X[:3], Y[:3])
            optimizer.zero_grad()
    recorder.close()
    return {"n_steps": recorder.n_steps}


def wrong_ids(step: int) -> list[int]:
    return [0, 1, 99 if (distributed.get_rank(), step) == (1, 2) else 2]


def bad_test(directory: Path) -> object:
    model = DistributedDataParallel(mlp())
    optimizer = SGD(model.parameters())
    recorder = Recorder(model, optimizer, directory / "test", 24)
    with recorder.step([0, 1, 2]):
        plain(0, 0, model, optimizer, X[:3], Y[:3])
    bad = TensorDataset(torch.full((2, 1, 8, 8), float("nan")), Y[:2])
    recorder.record_test(DataLoader(bad if distributed.get_rank() == 0 else TEST, 2), cross_entropy)
    return None


def own_passes(directory: Path, *, static_graph: bool) -> bool:
    """Whether the recorder's own passes leave DDP's reducer alone, in the middle of a step."""
    model = DistributedDataParallel(conv_net(), static_graph=static_graph)
    twin = copy.deepcopy(model.module)
    optimizer = SGD(model.parameters())
    fired: list[str] = []
    recorder = Recorder(model, optimizer, directory / f"between {static_graph}", 24)
    own = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
    for step in range(3):
        with recorder.step(np.arange(24)[own]):
            handles = [
                p.register_post_accumulate_grad_hook(lambda p, n=n: fired.append(n))
                for n, p in model.module.named_parameters()
            ]
            losses = cross_entropy(model(X[own]), Y[own])  # probes go through the first pass
            for handle in handles:
                handle.remove()
            losses.mean().backward()
            if step == 0:  # what DDP makes of it is the mean over both ranks' samples
                cross_entropy(twin(X[:8]), Y[:8]).mean().backward()
                pairs = zip(model.module.parameters(), twin.parameters(), strict=True)
                right = all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)
            optimizer.step()
            optimizer.zero_grad()
        recorder.record_test(DataLoader(TEST, 2), cross_entropy)
    recorder.close()
    return right and not fired


def broken_loop(directory: Path) -> object:
    """The user's loop raises on one rank, which ends: the other one finds out by itself."""

    def body(rank, step, model, optimizer, x, y) -> None:
        if (rank, step) == (1, 18):
            raise KeyError("the user's")
        plain(rank, step, model, optimizer, x, y)

    return loop(directory, body, name="broken loop")


GROUPS: dict[str, dict[str, Callable[[Path], object]]] = {
    "runs": {name: partial(record_case, name) for name in CASES},
    "faults": {
        "unwrapped": unwrapped,
        "pipeline": pipeline,
        "unused": unused,
        "own passes": partial(own_passes, static_graph=False),
        "own passes, static graph": partial(own_passes, static_graph=True),
        "scaled": scaled,
        "again": again,
        "again, other settings": partial(again, seed=3),
        "over again": partial(again, overwrite=True),
        "not finite": partial(loop, body=infinite, name="not finite"),
        "penalty at once": partial(loop, body=partial(penalised, 0), name="penalty at once"),
        "penalty, projected": partial(
            loop,
            body=partial(penalised, 0),
            name="penalty, projected",
            encoding="projected",
            dim=64,
        ),
        "penalty later": partial(loop, body=partial(penalised, 4), name="penalty later"),
        "mixing": partial(loop, body=partial(switched, "mixing", 0), name="mixing"),
        "layouts": partial(
            loop, body=partial(switched, "positions", 0), name="layouts", encoding="exact"
        ),
        "rates": partial(loop, body=other_rate, name="rates"),
        "scales": partial(loop, body=own_scale, name="scales"),
        "changed": partial(loop, body=own_change, name="changed"),
        "left out by one": partial(loop, body=partial(left_out, (0,)), name="left out by one"),
        "left out": partial(loop, body=partial(left_out, (0, 1)), name="left out"),
        "ids": partial(loop, body=plain, name="ids", ids=wrong_ids),
        "unlike seeds": partial(unlike, "seed"),
        "one bad dim": lambda directory: loop(
            directory, plain, name="dim", dim=-distributed.get_rank() or 64
        ),
        "test": bad_test,
        "broken loop": broken_loop,
    },
}


def run_group(
    group: str, functions: Mapping[str, Callable[[Path], object]], rank: int, directory: Path
) -> None:
    """Be one of the ranks: call every function, in order, and write what each returned or raised to
    DIRECTORY/RANK.json.

    What is printed goes to DIRECTORY/RANK.log.
    """
    with (directory / f"{rank}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)
    store = distributed.FileStore(str(directory / f"store of {group}"), WORLD)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    found: dict[str, object] = {}
    for name, run in functions.items():
        try:
            found[name] = run(directory)
        except HydraError as error:
            found[name] = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - what the loop or the process group raised, for the test to judge
            traceback.print_exc()
            found[name] = type(error).__name__
        (directory / f"{rank}.json").write_text(json.dumps(found))
    # the other rank may have ended: leave without a word to it
