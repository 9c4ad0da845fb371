"""What every peer is given, what is asked of it, and how that is measured.

Needs torch and NumPy, not hydra-pipe.

A script of a peer calls `main` with its methods. `run.py` then calls it, in the peer's own
interpreter, as

    PYTHON with_PEER.py                                  # prints its methods
    PYTHON with_PEER.py SUBJECT METHOD INPUTS.npz OUT    # runs one method

INPUTS.npz has data, parameters, the order of the training samples and the optimiser's settings. OUT
gets `scores.npz`, shape (train, test), positive for helpful, and `facts.json`: seconds on the clock
and of the processor for each part, bytes, peak memory.
"""

import contextlib
import json
import os
import platform
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

State = dict[str, Tensor]
# what a process may take, so that one that wants more fails and not the machine
MOST_BYTES = 12 * 2**30


def mlp() -> nn.Module:
    """784-64-32-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def small() -> nn.Module:
    """64-24-10, as benchmarks/truth.py has it."""
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def gpt() -> nn.Module:
    """2 layers of width 64 on 32 characters, of pipelines/shakespeare.py."""
    # the pipeline names it, and this interpreter needs but the model
    if util.find_spec("hydra_pipe") is None:
        sys.modules["hydra_pipe"] = types.SimpleNamespace(Pipeline=None)  # type: ignore[assignment]
    sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
    import shakespeare

    return shakespeare.Gpt(65, 32, 2, 64)


MODELS: dict[str, Callable[[], nn.Module]] = {"fashion": mlp, "digits": small, "gpt": gpt}


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Of each sample; of a passage the mean over its characters."""
    if output.ndim == 3:
        return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)
    return F.cross_entropy(output, target, reduction="none")


@dataclass
class Inputs:
    """What a peer is given.

    Args:
        model: with the final parameters.
        states: parameters after each fifth of training, the final ones last.
        start: parameters before the first step.
        train, test, later: samples; the tests that are asked for first, and as many more.
        order: sample ids of each step.
        rates: learning rate of each step.
        settings: of the optimiser.
    """

    model: nn.Module
    states: list[State]
    start: State
    train: TensorDataset
    test: TensorDataset
    later: TensorDataset
    order: list[list[int]]
    rates: list[float]
    settings: dict[str, Any]

    @classmethod
    def read(cls, subject: str, path: Path) -> "Inputs":
        arrays = dict(np.load(path))
        settings = json.loads(str(arrays["settings"]))
        model = MODELS[subject]()

        def state(prefix: str) -> State:
            return {key: torch.tensor(arrays[f"{prefix}/{key}"]) for key in model.state_dict()}

        states = [state(str(number)) for number in range(settings["checkpoints"])]
        model.load_state_dict(states[-1])
        train, test, later = (
            TensorDataset(*(torch.tensor(arrays[f"{of}{part}"]) for part in "xy"))
            for of in ("", "test_", "later_")
        )
        order = [ids.tolist() for ids in np.split(arrays["order"], np.cumsum(arrays["sizes"])[:-1])]
        return cls(
            model.eval(),
            states,
            state("start"),
            train,
            test,
            later,
            order,
            arrays["rates"].tolist(),
            settings,
        )

    @property
    def interval_rates(self) -> list[float]:
        """Mean learning rate of the steps that led to each of `states`."""
        return [
            float(part.mean()) for part in np.array_split(np.array(self.rates), len(self.states))
        ]

    @property
    def lengthening(self) -> float:
        """What momentum multiplies a step by, in the long run: for methods that know of plain SGD
        only.
        """
        return 1 / (1 - float(self.settings["options"].get("momentum", 0)))

    def batches(self, data: TensorDataset, size: int) -> DataLoader[Any]:
        """In order."""
        return DataLoader(data, size)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """That of the training, anew."""
        kind: Any = getattr(torch.optim, self.settings["optimizer"])
        return kind(model.parameters(), lr=self.rates[0], **self.settings["options"])

    def train_again(self, hooks: "Hooks") -> None:
        """The same training from the start, in `self.model`.

        Raises: RuntimeError: it comes to other parameters.
        """
        self.model.load_state_dict(self.start)
        self.model.train()
        x, y = self.train.tensors
        optimizer = self.optimizer(self.model)
        per_epoch = len(self.order) // self.settings["epochs"]
        hooks.begin(optimizer)
        for step, (ids, rate) in enumerate(zip(self.order, self.rates, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            with hooks.step(step // per_epoch, ids, rate):
                optimizer.zero_grad()
                losses(self.model(x[ids]), y[ids]).mean().backward()
                if self.settings["max_grad_norm"] is not None:
                    nn.utils.clip_grad_norm_(
                        self.model.parameters(), self.settings["max_grad_norm"]
                    )
                optimizer.step()
        hooks.end()
        self.model.eval()
        for name, value in self.model.state_dict().items():
            apart = float((value - self.states[-1][name]).norm() / self.states[-1][name].norm())
            if not apart < 1e-2:
                raise RuntimeError(f"trained again {name} is {apart:.1e} apart")


class Hooks:
    """What a peer does while the model is trained. As it stands: nothing."""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step."""

    def step(
        self, epoch: int, ids: list[int], rate: float
    ) -> contextlib.AbstractContextManager[Any]:
        """Around a step."""
        return contextlib.nullcontext()

    def end(self) -> None:
        """After the last step; everything is to be on disk, or where the peer keeps it."""


class NotOffered(Exception):  # noqa: N818 - nothing went wrong
    """The peer has no way to do this; the message says why."""


class Method:
    """One method of a peer.

    Args:
        given: the subject.
        store: directory for what the peer keeps; its bytes are counted.
    """

    hooks: Hooks | None = None

    def __init__(self, given: Inputs, store: Path) -> None:
        self.given, self.store = given, store

    def prepare(self) -> None:
        """Whatever can be done after training and before a test sample is known."""

    def score(self, tests: TensorDataset) -> Tensor:
        """Shape (train, test), positive for helpful.

        Called once for `given.test`, then for `given.later`. Raises: NotOffered.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Offer:
    """A method to run.

    Args:
        title: of it, with what was chosen.
        make: from the subject and the directory.
    """

    title: str
    make: Callable[[Inputs, Path], Method]


@contextlib.contextmanager
def timed(seconds: dict[str, list[float]], part: str) -> Iterator[None]:
    """Adds to `seconds` what passes on the clock, and in the processor, for this process and those
    it waits for.
    """

    def now() -> list[float]:
        return [time.perf_counter(), sum(os.times()[:4])]

    before = now()
    yield
    seconds[part] = [after - was for after, was in zip(now(), before, strict=True)]


def peak_bytes() -> int:
    """Most memory that was resident; not ru_maxrss, which a process inherits from the one that
    started it.
    """
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024


def disk_bytes(path: Path) -> int:
    """Of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(
    method: Method, facts: dict[str, Any], keep: Callable[[dict[str, np.ndarray]], None]
) -> None:
    """Runs it, fills `facts`, and calls `keep` with the scores there are, after the first tests and
    after the later ones.
    """
    given, seconds = method.given, facts.setdefault("seconds", {})
    if method.hooks is not None:
        given.train_again(Hooks())  # which warms torch up
        for part, hooks in (
            ("plain", Hooks()),
            ("capture", method.hooks),
            ("plain again", Hooks()),
        ):
            with timed(seconds, part):
                given.train_again(hooks)
    else:
        given.model.load_state_dict(given.states[-1])
    facts["peak_before"] = peak_bytes()
    with timed(seconds, "prepare"):
        method.prepare()
    found: dict[str, np.ndarray] = {}
    facts["later"] = "not done"  # should it come to that
    for part, tests in (("score", given.test), ("later", given.later)):
        try:
            with timed(seconds, part):
                scores = method.score(tests).detach().numpy()
        except NotOffered as reason:
            if part == "score":
                raise
            facts[part] = str(reason)
            keep(found)
            return
        if scores.shape != (len(given.train), len(tests)):
            raise RuntimeError(f"scored {scores.shape}")
        if not np.isfinite(scores).all():
            raise RuntimeError(f"{np.mean(~np.isfinite(scores)):.0%} of its scores are not finite")
        found[part] = scores
        if part == "score":
            facts["bytes"] = disk_bytes(method.store)
        else:
            del facts["later"]
        facts["peak"] = peak_bytes()
        keep(found)


def main(offers: dict[str, Offer], *packages: str) -> None:
    """The command line of a peer's script. `packages`: whose versions are told."""
    if len(sys.argv) == 1:
        print(json.dumps({name: offer.title for name, offer in offers.items()}))
        return
    subject, name, inputs, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (out / "store").mkdir()
    versions = {package: metadata.version(package) for package in (*packages, "torch", "numpy")}
    facts: dict[str, Any] = {"versions": versions | {"python": platform.python_version()}}
    # the fused kernel has no second derivative on the CPU
    fused = (
        contextlib.nullcontext()
        if subject != "gpt"
        else torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    )

    def keep(found: dict[str, np.ndarray]) -> None:
        np.savez(out / "scores.npz", **found)  # type: ignore[arg-type] # of savez's own options
        (out / "facts.json").write_text(json.dumps(facts, indent=2))

    with fused:
        measure(offers[name].make(Inputs.read(subject, inputs), out / "store"), facts, keep)
