"""How long a question about new predictions takes on a finished run, and what the answer finds.

    python benchmarks/probe.py DATA RUN

RUN is recorded first: LeNet-5 on Fashion-MNIST, 5,000 samples of which 500 are mislabelled, 5
epochs. The question: pictures of the test file that the run has not tested, and that its model gets
wrong. Each command is a process of its own, as a user starts it. Of each: seconds from its start to
its end, seconds of a processor, which other work on the machine changes less, and what it says that
its own work took; the rest is starting Python and torch, and reading the data. Then the same from
kept hypergradients, with the rows deleted.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from fashion_mnist import flip, lenet5, load

import hydra_pipe

ROOT = Path(__file__).parents[1]
N_TRAIN, N_TEST, EPOCHS, NOISE = 5_000, 500, 5, 0.1
METHODS = ("hydra", "grad-dot", "grad-cos", "influence", "hydra-fisher")
# most harmful samples of each wrong prediction that are looked at
TOP = 10


def wrong(data: Path, run: Path, n: int = 20) -> TensorDataset:
    """The first `n` pictures after those that the run has tested that its model takes for something
    else.

    Args:
        data: directory of the IDX files.
        run: that has the model.
        n: pictures.
    """
    model = lenet5()
    model.load_state_dict(torch.load(run / "checkpoints" / "final.pt", weights_only=True))
    images, labels = load(data, "t10k", 10_000).tensors
    images, labels = images[N_TEST:], labels[N_TEST:]
    with torch.no_grad():
        places = torch.nonzero(model(images).argmax(1) != labels)[:n, 0]
    return TensorDataset(images[places], labels[places])


def command(*words: object) -> tuple[float, float]:
    """Run it. Returns: seconds, and those of a processor."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "hydra_pipe.cli.app", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.perf_counter() - start,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def measured(what: str, run: Path, stage: str, *words: object) -> None:
    """Run a command and print a line of the table."""
    seconds, processor = command(*words)
    took = hydra_pipe.open_run(run).info()["stages"][stage]["facts"]["seconds"]
    print(f"| {what} | {seconds:.1f} | {processor:.1f} | {took:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    data, run = given.data / "fashion-mnist", given.run
    settings = {
        "data": data,
        "n_train": N_TRAIN,
        "n_test": N_TEST,
        "epochs": EPOCHS,
        "noise": NOISE,
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    print("| command | s | of a processor | took |\n| --- | --- | --- | --- |")
    seconds, processor = command("record", ROOT / "pipelines/fashion_mnist.py", run, *sets)
    print(f"| record | {seconds:.1f} | {processor:.1f} | |", flush=True)
    for name, n in (("wrong", 20), ("more", 200)):
        question = ("--set", f"data={data}", "--set", f"run={run}", "--set", f"n={n}")
        taking = ("probe", run, f"{ROOT}/benchmarks/probe.py:wrong", "--name", name, *question)
        measured(f"probe of {n}", run, f"probe {name}", *taking)
        for method in METHODS if name == "wrong" else METHODS[:-1]:
            stage, words = (
                f"reduce {method}-of-{name}",
                ("reduce", run, "--method", method, "--probe", name),
            )
            measured(f"{method} of {n}", run, stage, *words)
    measured(
        "hydra of 500 tests, kept", run, "reduce hydra", "reduce", run, "--keep-hypergradients"
    )
    before = found_in(run, data)
    command("prune", run)
    for name, n in (("wrong", 20), ("more", 200)):
        words = ("reduce", run, "--probe", name, "--overwrite")
        measured(f"hydra of {n}, from what was kept", run, f"reduce hydra-of-{name}", *words)
    print(before)
    sizes = hydra_pipe.open_run(run).info()["bytes"]
    print("bytes: " + ", ".join(f"{name} {n:,}" for name, n in sizes.items()))


def found_in(run: Path, data: Path) -> str:
    """Of the most harmful samples of each wrong prediction: how many are mislabelled, and how many
    are labelled as it came out.
    """
    truth = load(data, "train", N_TRAIN).tensors[1]
    labels = flip(truth, NOISE, 0)
    mislabelled = (labels != truth).numpy()
    asked = wrong(data, run)
    model = lenet5()
    model.load_state_dict(torch.load(run / "checkpoints" / "final.pt", weights_only=True))
    with torch.no_grad():
        predicted = model(asked.tensors[0]).argmax(1).numpy()
    lines = [
        f"\nof the {TOP} most harmful samples of each of {len(asked)} wrong predictions, mean:\n"
    ]
    lines.append("| method | mislabelled | labelled as predicted |\n| --- | --- | --- |")
    lines.append(
        f"| chance | {mislabelled.mean():.2f} | "
        f"{np.mean([(labels.numpy() == p).mean() for p in predicted]):.2f} |"
    )
    for method in METHODS:
        relevance = np.asarray(hydra_pipe.open_run(run).relevance(f"{method}-of-wrong"))
        worst = np.argsort(relevance, axis=0)[:TOP]
        lines.append(
            f"| {method} | {mislabelled[worst].mean():.2f} | "
            f"{(labels.numpy()[worst] == predicted).mean():.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
