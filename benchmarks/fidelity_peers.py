"""How well attribution predicts trainings on random halves of the data: every method here, and other libraries on the same model.

    python benchmarks/fidelity_peers.py DATA [--runs fashion,gpt] [--peers PYTHON] [--keep DIRECTORY]

One training is recorded, and its linear datamodelling score taken by `hydra_pipe.evaluate` (100 trainings on random halves, the
loss of a batch the mean over the samples kept). Other libraries get the model, its checkpoints after each epoch and the data as
files, in an interpreter of their own (benchmarks/requirements.txt), run by benchmarks/peers.py, one process for each; what
they score is held against the losses of the very same trainings, by the same functions. Seconds are of the calls that score,
without imports, with one thread; those of hydra-pipe are of `reduce`, and of `record` where that is said.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers import MODELS, PEERS

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.evaluation.lds import half
from hydra_pipe.evaluation.retraining import LOSS
from hydra_pipe.maths.ranks import bootstrap_interval, spearmans
from hydra_pipe.recording.batches import Samples, epoch_order
from hydra_pipe.store.evaluations import N_FOUND

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import fashion_mnist
import shakespeare

RETRAININGS = 100
OURS = ("hydra", "hydra-fisher", "tracin", "grad-dot", "grad-cos", "influence", "hydra-exact")


def fashion(data: Path) -> Pipeline:
    """An MLP on 5,000 pictures, 200 tests, 5 epochs of SGD with momentum and a cosine schedule."""
    pipeline = fashion_mnist.pipeline(data / "fashion-mnist", n_train=5000, n_test=200, epochs=5)
    torch.manual_seed(0)
    pipeline.model = MODELS["fashion"]()
    (group,) = pipeline.optimizer.param_groups
    chosen = {key: group[key] for key in ("momentum", "weight_decay")}
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=group["initial_lr"], **chosen)
    assert pipeline.scheduler is not None
    steps = pipeline.epochs * -(-5000 // pipeline.batch_size)
    pipeline.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(pipeline.optimizer, steps)
    return pipeline


def gpt(data: Path) -> Pipeline:
    """A GPT of 2 layers of width 64 on 500 passages of 32 characters, 50 tests, 5 epochs of AdamW."""
    given = {"n_train": 500, "n_test": 50, "epochs": 5, "layers": 2, "width": 64, "context": 32, "warm_up": 10, "batch_size": 16}
    torch.manual_seed(0)
    return shakespeare.pipeline(data / "text", lr=3e-3, **given)


BUILDERS: dict[str, Callable[[Path], Pipeline]] = {"fashion": fashion, "gpt": gpt}


def write_inputs(name: str, data: Path, directory: Path) -> NDArray[np.float64]:
    """Train once more without recording, and write what the peers need. Returns: the final test losses of this training."""
    pipeline = BUILDERS[name](data)
    samples, model, optimizer = Samples(pipeline, "train"), pipeline.model, pipeline.optimizer
    (x, y), (test_x, test_y) = pipeline.train.tensors, pipeline.test.tensors
    arrays = {key: value.numpy() for key, value in {"x": x, "y": y, "test_x": test_x, "test_y": test_y}.items()}

    def keep(state: str) -> None:
        arrays.update({f"{state}/{key}": value.detach().numpy().copy() for key, value in model.state_dict().items()})

    (group,) = optimizer.param_groups
    chosen = ("momentum", "weight_decay") if "momentum" in group else ("betas", "eps", "weight_decay")
    settings = {
        "optimizer": type(optimizer).__name__,
        "options": {key: group[key] for key in chosen},
        "max_grad_norm": pipeline.max_grad_norm,
        "epochs": pipeline.epochs,
    }
    order, rates = [], []
    torch.manual_seed(pipeline.seed)
    keep("start")
    for epoch in range(pipeline.epochs):
        for ids, inputs, targets in samples.batches(epoch_order(pipeline, epoch), epoch):
            order.append(ids)
            rates.append(group["lr"])
            optimizer.zero_grad()
            pipeline.loss(model(inputs), targets).mean().backward()
            if pipeline.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), pipeline.max_grad_norm)
            optimizer.step()
            if pipeline.scheduler is not None:
                pipeline.scheduler.step()
        keep(str(epoch))
    arrays |= {"order": np.concatenate(order), "sizes": np.array([len(ids) for ids in order]), "rates": np.array(rates)}
    np.savez(directory / "inputs.npz", settings=json.dumps(settings), **arrays)
    with torch.no_grad():
        return pipeline.loss(model(test_x), test_y).double().numpy()


def retrained(run: Path, n_tests: int) -> NDArray[np.float64]:
    """Losses of all retrainings that `evaluate` has kept. Shape (retraining, test)."""
    pieces = sorted(file for file in (run / "evaluation" / "lds").rglob("*-*-*.npy"))
    found = np.concatenate([np.load(file) for file in pieces])
    assert found.shape == (RETRAININGS, N_FOUND, n_tests), found.shape
    return found[:, LOSS]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of `call`."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(title: str, per_test: NDArray[np.float64] | None, seconds: float | None, note: str = "") -> None:
    score = "failed"
    if per_test is not None:
        low, high = bootstrap_interval(per_test)
        score = f"{per_test.mean():.3f} ({low:.3f} to {high:.3f})"
    print(f"| {title} | {score} | {'' if seconds is None else f'{seconds:.1f}'} | {note} |", flush=True)


class Truth:
    """The retrainings of one run."""

    def __init__(self, run: Path, n_samples: int, n_tests: int) -> None:
        self.losses = retrained(run, n_tests)
        self.kept = np.stack([half(index, n_samples) for index in range(RETRAININGS)]).astype(np.float64)

    def score(self, relevance: NDArray[np.floating]) -> NDArray[np.float64]:
        """Spearman's correlation for each test sample, as `hydra-pipe evaluate ... lds` takes it."""
        return spearmans(-(self.kept @ relevance.astype(np.float64)), self.losses)


class Kept:
    """Seconds of what was done already, in a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def timed(self, what: str, call: Callable[[], Any]) -> float:
        """Seconds of `call`, which is made where it was not before."""
        if what not in self._seconds:
            self.keep(what, timed(call))
        return self._seconds[what]

    def keep(self, what: str, seconds: float) -> None:
        self._seconds[what] = seconds
        self._path.write_text(json.dumps(self._seconds, indent=2))

    def get(self, what: str) -> float | None:
        return self._seconds.get(what)


def ours(name: str, given: argparse.Namespace, work: Path, kept: Kept) -> Truth:
    """Record, retrain, reduce and show."""
    run, build = work / "run", lambda: BUILDERS[name](given.data)
    encoding: dict[str, Any] = {"encoding": given.encoding} if given.encoding else {}
    recorded = kept.timed("record", lambda: hydra_pipe.record(build(), run, test_every="epoch", **encoding))
    hydra_pipe.reduce(run, method="hydra")
    halves = kept.timed("retrain", lambda: hydra_pipe.evaluate(build(), run, "lds", methods="hydra", retrainings=RETRAININGS))
    pipeline = build()
    truth = Truth(run, len(pipeline.train), len(pipeline.test))
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    print(
        f"{name}: {parameters:,} parameters; recorded in {recorded:.1f} s; {RETRAININGS} trainings in {halves:.1f} s\n", flush=True
    )
    print("| method | LDS | seconds | |\n| --- | --- | --- | --- |", flush=True)
    for method in OURS:
        exact = method == "hydra-exact"
        for rank in given.rank if exact else [None]:
            extra: dict[str, Any] = {"rank": rank, "pipeline": build()} if exact else {}
            array = f"{method}-rank-{rank}" if rank else method
            seconds = kept.timed(array, lambda: hydra_pipe.reduce(run, method=method, overwrite=True, **extra))  # noqa: B023
            show(f"`{array}`", truth.score(np.asarray(hydra_pipe.open_run(run).relevance(array))), seconds)
    return truth


def theirs(name: str, given: argparse.Namespace, work: Path, truth: Truth, kept: Kept) -> None:
    """Each peer in a process of its own."""
    losses = write_inputs(name, given.data, work)
    gradients = hydra_pipe.open_run(work / "run").gradients
    recorded = gradients.test_losses(gradients.n_steps)
    apart = np.linalg.norm(losses - recorded) / np.linalg.norm(recorded)
    if not apart < 1e-4:
        raise SystemExit(f"trained without recording the test losses are {apart:.1e} apart")
    script = Path(__file__).with_name("peers.py").resolve()
    for peer in given.only.split(",") if given.only else PEERS:
        out = work / f"{peer}.npz"
        if kept.get(peer) is None:
            command = [given.peers, str(script), name, peer, str(work / "inputs.npz"), str(out)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, cwd=work, timeout=given.limit)
                error = done.stderr if done.returncode else ""
            except subprocess.TimeoutExpired:
                error = f"not done after {given.limit} s"
            if error:
                (work / f"{peer}.err").write_text(error)
                show(PEERS[peer].title, None, None, error.strip().splitlines()[-1][:200])
                continue
            kept.keep(peer, float(np.load(out)["seconds"]))
        show(PEERS[peer].title, truth.score(np.load(out)["scores"]), kept.get(peer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default=",".join(BUILDERS))
    parser.add_argument("--peers", help="interpreter of an environment with benchmarks/requirements.txt")
    parser.add_argument("--only", help="these peers only")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a peer may take")
    parser.add_argument("--rank", default="20", help="of hydra-exact, with commas between them; 0: no rank, every test sample")
    parser.add_argument("--encoding", help="as of hydra-pipe record")
    parser.add_argument("--keep", type=Path, help="directory for runs and scores, which a later call goes on with")
    given = parser.parse_args()
    given.rank = [int(rank) or None for rank in given.rank.split(",") if rank]
    torch.set_num_threads(1)
    for name in given.runs.split(","):
        with contextlib.ExitStack() as stack:
            work = (given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / name
            work.mkdir(parents=True, exist_ok=True)
            work = work.resolve()
            kept = Kept(work / "seconds.json")
            truth = ours(name, given, work, kept)
            if given.peers:
                theirs(name, given, work, truth, kept)


if __name__ == "__main__":
    main()
