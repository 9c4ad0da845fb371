"""hydra-pipe beside other libraries: what attribution costs and how well it predicts, on one
training, for everyone to run again.

    python benchmarks/peers/run.py DATA WORK [--subjects fashion,digits,gpt] [--peers captum,trak]
    [--only ekfac,tracin]

DATA is the directory of the shared data sets (fashion-mnist, text). WORK keeps environments, inputs
and results: a later call goes on with them, and computes only what is not there; delete a directory
of it to have that again. Each peer gets an environment of its own from requirements/PEER.txt under
constraints.txt, each method a process of its own, one after the other, one thread each; hydra-pipe
runs in the interpreter that runs this.

Subjects: `fashion`, an MLP on 5,000 x 200 pictures, and `gpt`, a small GPT on 500 x 50 passages,
are held against 100 trainings on random halves (linear datamodelling score; the loss of a batch is
the mean over the samples kept). `digits`, an MLP on 400 x 100 8x8 digits, against training again
without each sample in turn, in float64 (leave-one-out), which takes seconds there, and on `fashion`
would be drowned by chance. Both are Spearman's correlation over trainings or samples, mean over the
tests.

Tables are written to WORK/results.md, everything to WORK/results.json.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from subject import MODELS

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.evaluation.lds import half
from hydra_pipe.maths.rank_statistics import bootstrap_interval, spearmans
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.store.data.evaluations import N_FOUND
from hydra_pipe.training.batches import Samples, epoch_order

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
import fashion_mnist
import shakespeare
import truth

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RETRAININGS = 100
CHECKPOINTS = 5
OURS = "hydra_pipe"


@dataclass(frozen=True)
class Environment:
    """What a peer's environment needs beside its requirements.

    Args:
        options: of pip install.
        removed: packages that it asks for and that, as the index has them, do not load beside torch
            for the CPU.
    """

    options: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


PEERS = {
    "dattri_llm": Environment(),
    "dattri": Environment(),
    "trak": Environment(),
    "captum": Environment(),
    "kronfluence": Environment(),
    # transformers imports them where they are there; nothing here uses them
    "bergson": Environment(removed=("torchvision", "torchaudio")),
    # it asks for Python below 3.11, and runs with 3.11
    "logix": Environment(options=("--ignore-requires-python",)),
}
DIGITS = truth.RUNS["SGD 0.05, momentum, 20 epochs"]


def fashion(data: Path) -> Pipeline:
    """An MLP on 5,000 pictures, 5 epochs of SGD with momentum and a cosine schedule.

    400 tests: 200, and 200 later.
    """
    pipeline = fashion_mnist.pipeline(data / "fashion-mnist", n_train=5000, n_test=400, epochs=5)
    torch.manual_seed(0)
    pipeline.model = MODELS["fashion"]()
    (group,) = pipeline.optimizer.param_groups
    chosen = {key: group[key] for key in ("momentum", "weight_decay")}
    pipeline.optimizer = torch.optim.SGD(
        pipeline.model.parameters(), lr=group["initial_lr"], **chosen
    )
    assert pipeline.scheduler is not None
    pipeline.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        pipeline.optimizer, pipeline.n_steps
    )
    return pipeline


def gpt(data: Path) -> Pipeline:
    """A GPT of 2 layers of width 64 on 500 passages of 32 characters, 5 epochs of AdamW.

    100 tests: 50, and 50 later.
    """
    given = {
        "n_train": 500,
        "n_test": 100,
        "epochs": 5,
        "layers": 2,
        "width": 64,
        "context": 32,
        "warm_up": 10,
        "batch_size": 16,
    }
    torch.manual_seed(0)
    return shakespeare.pipeline(data / "text", lr=3e-3, **given)


def digits(data: Path) -> Pipeline:
    """That of benchmarks/truth.py, in float32 and from the same parameters.

    200 tests: 100, and 100 later.
    """
    pipeline = truth.make(*DIGITS, n_test=2 * truth.M)
    for set_of in (pipeline.train, pipeline.test):
        inputs, targets = set_of.tensors
        set_of.tensors = (inputs.float(), targets)
    pipeline.model.float()
    return pipeline


@dataclass(frozen=True)
class Subject:
    """A training that everyone explains.

    Args:
        title: of it.
        build: its pipeline, with twice as many tests as are scored first.
        truth: what is held against: "halves" or "left out".
    """

    title: str
    build: Callable[[Path], Pipeline]
    truth: str


SUBJECTS = {
    "fashion": Subject(
        "Fashion-MNIST, 5,000 x 200, MLP 784-64-32-10, SGD with momentum, 5 epochs",
        fashion,
        "halves",
    ),
    "digits": Subject(
        "8x8 digits, 400 x 100, MLP 64-24-10, SGD with momentum, 20 epochs", digits, "left out"
    ),
    "gpt": Subject("Shakespeare, 500 x 50, GPT 2 x 64, AdamW, 5 epochs", gpt, "halves"),
}


def half_of_tests(pipeline: Pipeline) -> tuple[Any, Any]:
    """The tests that are asked for first, and the later ones."""
    x, y = pipeline.test.tensors
    middle = len(x) // 2
    return (x[:middle], y[:middle]), (x[middle:], y[middle:])


def write_inputs(subject: Subject, data: Path, path: Path) -> None:
    """Train without recording, and write what the peers need."""
    pipeline = subject.build(data)
    samples, model, optimizer = Samples(pipeline, "train"), pipeline.model, pipeline.optimizer
    arrays = {}
    for name, (x, y) in zip(
        ("", "test_", "later_"), (pipeline.train.tensors, *half_of_tests(pipeline)), strict=True
    ):
        arrays |= {f"{name}x": x.numpy(), f"{name}y": y.numpy()}

    def keep(state: str) -> None:
        arrays.update(
            {
                f"{state}/{key}": value.detach().numpy().copy()
                for key, value in model.state_dict().items()
            }
        )

    (group,) = optimizer.param_groups
    chosen = (
        ("momentum", "weight_decay") if "momentum" in group else ("betas", "eps", "weight_decay")
    )
    settings = {
        "optimizer": type(optimizer).__name__,
        "options": {key: group[key] for key in chosen},
        "max_grad_norm": pipeline.max_grad_norm,
        "epochs": pipeline.epochs,
        "batch_size": pipeline.batch_size,
        "checkpoints": CHECKPOINTS,
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
        fifth, rest = divmod((epoch + 1) * CHECKPOINTS, pipeline.epochs)
        if not rest:
            keep(str(fifth - 1))
    arrays |= {
        "order": np.concatenate(order),
        "sizes": np.array([len(ids) for ids in order]),
        "rates": np.array(rates),
    }
    np.savez(path, settings=json.dumps(settings), **arrays)


def write_truth(subject: Subject, data: Path, work: Path) -> None:
    """What relevance is to predict, for the tests that are asked for first."""
    if subject.truth == "left out":
        changes = truth.left_out(truth.make(*DIGITS, n_test=2 * truth.M), DIGITS[:3])
        np.savez(work / "truth.npz", changes=changes[:, : truth.M])
        return
    run = work / "run"
    hydra_pipe.record(subject.build(data), run)
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.evaluate(subject.build(data), run, "lds", methods="hydra", retrainings=RETRAININGS)
    pieces = sorted(file for file in (run / "evaluation" / "lds").rglob("*-*-*.npy"))
    found = np.concatenate([np.load(file) for file in pieces])
    pipeline = subject.build(data)
    assert found.shape == (RETRAININGS, N_FOUND, len(pipeline.test)), found.shape
    kept = np.stack([half(index, len(pipeline.train)) for index in range(RETRAININGS)])
    np.savez(work / "truth.npz", kept=kept, losses=found[:, LOSS, : len(pipeline.test) // 2])


def correlations(relevance: NDArray[np.floating], of: Path) -> NDArray[np.float64]:
    """Spearman's correlation with the truth, for each test sample."""
    found, known = relevance.astype(np.float64), np.load(of)
    if "changes" in known:
        return spearmans(found, known["changes"])
    return spearmans(-(known["kept"].astype(np.float64) @ found), known["losses"])


def run(command: Sequence[str], log: Path, limit: float, cwd: Path = ROOT) -> str:
    """Output of a command; what it says on the way goes to `log`. Raises: Failed: it fails, or is
    not done after `limit` s.
    """
    with open(log, "w") as said:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=cwd, timeout=limit
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {limit:.0f} s") from None
    if done.returncode < 0:
        raise Failed(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise Failed(lines[-1].strip()[:300] if lines else f"ended with {done.returncode}")
    return done.stdout


class Failed(Exception):  # noqa: N818 - of a peer, and told in the table
    """The message says how."""


def interpreter(peer: str, work: Path) -> str:
    """Of the peer's environment, which is made where it is not there. Raises: Failed."""
    if peer == OURS:
        return sys.executable
    home = work / "env" / peer
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        run([sys.executable, "-m", "venv", "--clear", str(home)], work / f"{peer}.venv.log", 300)
        needed = [
            "-c",
            str(ROOT / "constraints.txt"),
            "-r",
            str(HERE / "requirements" / f"{peer}.txt"),
        ]
        run(
            [str(python), "-m", "pip", "install", "--quiet", *PEERS[peer].options, *needed],
            work / f"{peer}.pip.log",
            1800,
        )
        if PEERS[peer].removed:
            run(
                [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *PEERS[peer].removed],
                work / f"{peer}.removed.log",
                300,
            )
        done.touch()
    return str(python)


@dataclass
class Found:
    """Of one method on one subject.

    Args:
        peer, method, title: what it is.
        facts: what its process wrote.
        failure: why there are none.
        score, low, high: of the correlation with the truth, and its interval of 95 %.
    """

    peer: str
    method: str
    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    score: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")


def measured(
    name: str, peer: str, method: str, title: str, python: str, work: Path, limit: float
) -> Found:
    """Run one method where that was not done, and hold it against the truth."""
    out, found = work / f"{peer}-{method}", Found(peer, method, title)
    failure = out / "failure.txt"
    if not failure.exists() and not (out / "facts.json").exists():
        subprocess.run(["rm", "-rf", str(out)], check=True)  # of a call that was killed
        out.mkdir()
        command = [
            python,
            str(HERE / f"with_{peer}.py"),
            name,
            method,
            str(work / "inputs.npz"),
            str(out),
        ]
        try:
            run(command, out / "log.txt", limit, cwd=out)
        except Failed as error:
            if not (out / "facts.json").exists():
                failure.write_text(str(error))
        subprocess.run(["rm", "-rf", str(out / "store")], check=True)
    if failure.exists():
        found.failure = failure.read_text()
        return found
    found.facts = json.loads((out / "facts.json").read_text())
    per_test = correlations(np.load(out / "scores.npz")["score"], work / "truth.npz")
    found.score = float(per_test.mean())
    found.low, found.high = bootstrap_interval(per_test)
    return found


def offers(peer: str, python: str, work: Path) -> dict[str, str]:
    """Names and titles of the methods of a peer. Raises: Failed: its script does not start."""
    found: dict[str, str] = json.loads(
        run([python, str(HERE / f"with_{peer}.py")], work / f"{peer}.log", 300, cwd=work)
    )
    return found


def explained(name: str, given: argparse.Namespace, work: Path) -> list[Found]:
    """Every method of every peer on one subject."""
    subject, own = SUBJECTS[name], work / name
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "inputs.npz").exists():
        write_inputs(subject, given.data, own / "inputs.npz")
    if not (own / "truth.npz").exists():
        write_truth(subject, given.data, own)
    found = []
    for peer in given.peers:
        try:
            python = interpreter(peer, work)
            titles = offers(peer, python, work)
        except Failed as error:
            found.append(Found(peer, "", "", failure=str(error)))
            continue
        for method, title in titles.items():
            if given.only and method not in given.only:
                continue
            found.append(measured(name, peer, method, title, python, own, given.limit))
            print(peer, method, told(found[-1]), found[-1].failure, flush=True)
    return found


def told(found: Found) -> str:
    """The score, or what went wrong."""
    return "failed" if found.failure else f"{found.score:.3f} ({found.low:.3f} to {found.high:.3f})"


def spent(found: Found, *parts: str) -> str:
    """Seconds of the processor, and on the clock in brackets."""
    if isinstance(found.facts.get(parts[-1]), str):
        return found.facts[parts[-1]]
    clock, used = (sum(found.facts["seconds"][part][which] for part in parts) for which in (0, 1))
    return f"{used:.1f} ({clock:.1f})"


def overhead(found: Found) -> str:
    """Training with capture over training without, in seconds of the processor and on the clock."""
    seconds = found.facts["seconds"]
    if "capture" not in seconds:
        return ""
    clock, used = (
        seconds["capture"][which] * 2 / (seconds["plain"][which] + seconds["plain again"][which])
        for which in (0, 1)
    )
    return f"{used:.1f} ({clock:.1f})"


def costs(found: Found) -> list[str]:
    """Cells of what it took."""
    if not found.facts:
        return [""] * 6
    facts = found.facts
    memory = f"{facts['peak'] / 2**20:.0f} ({facts['peak_before'] / 2**20:.0f})"
    parts = [spent(found, "prepare"), spent(found, "prepare", "score"), spent(found, "later")]
    return [overhead(found), *parts, f"{facts['bytes'] / 1e6:.1f}", memory]


def table(found: dict[str, list[Found]]) -> str:
    """A line for each method, best first; costs are those of the first subject. Then what failed,
    and why.
    """
    first, *others = found
    heads = [
        f"{name}, {'LDS' if SUBJECTS[name].truth == 'halves' else 'leave-one-out'}"
        for name in found
    ]
    heads += [
        "capture over plain",
        "features",
        "to the matrix",
        "next tests",
        "MB on disk",
        "peak MiB (before)",
    ]
    rows = [f"| peer | method | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    by_name = {name: {(one.peer, one.method): one for one in of} for name, of in found.items()}
    for one in sorted(found[first], key=lambda one: float("inf") if one.failure else -one.score):
        elsewhere = [by_name[name].get((one.peer, one.method)) for name in others]
        cells = [
            one.peer.replace("_", "-"),
            one.title or "all",
            told(one),
            *("" if o is None else told(o) for o in elsewhere),
        ]
        rows.append(f"| {' | '.join([*cells, *costs(one)])} |")
    failed = [
        f"- {one.peer.replace('_', '-')}, {one.title or 'all'}, {name}: {one.failure}"
        for name, of in found.items()
        for one in of
        if one.failure
    ]
    return "\n".join(
        [*(f"{name}: {SUBJECTS[name].title}." for name in found), "", *rows, "", *failed, ""]
    )


def versions(found: Sequence[Found]) -> str:
    """Of every package that was measured."""
    told = {
        f"{one.peer}: " + ", ".join(f"{k} {v}" for k, v in one.facts["versions"].items())
        for one in found
        if one.facts
    }
    return "\n".join(sorted(told)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--subjects", default="fashion,digits")
    parser.add_argument("--peers", default=",".join([OURS, *PEERS]))
    parser.add_argument("--only", help="methods of these names, with commas between them")
    parser.add_argument(
        "--limit", type=float, default=1200, help="seconds on the clock that one method may take"
    )
    given = parser.parse_args()
    given.peers = given.peers.split(",")
    given.only = given.only.split(",") if given.only else []
    unknown = [name for name in given.subjects.split(",") if name not in SUBJECTS]
    unknown += [peer for peer in given.peers if peer not in (OURS, *PEERS)]
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(unknown)}; subjects are {', '.join(SUBJECTS)}, peers "
            f"{', '.join((OURS, *PEERS))}"
        )
    torch.set_num_threads(1)
    work = given.work.resolve()
    found = {name: explained(name, given, work) for name in given.subjects.split(",")}
    everything = [one for of in found.values() for one in of]
    (work / "results.json").write_text(
        json.dumps({name: [vars(one) for one in of] for name, of in found.items()}, indent=2)
    )
    text = table(found) + "\n" + versions(everything)
    (work / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
