"""Relevance against the truth on small runs: the exact hypergradient, and leaving each sample out
and training again.

    python benchmarks/truth.py [--saturation 0.1,0.3,1] [--damping 0.1,1,10] [--runs "SGD, 20
    epochs"]

scikit-learn's 8x8 digits, 400 samples of which 40 are mislabelled, 100 test samples, an MLP
64-24-10 with tanh in float64, batch
40. Exact: full autograd through every step, of SGD with momentum or AdamW, second moment included.
Left out: 400 trainings in which a sample has weight zero in its batches, all at once (torch.func).
For each method Spearman's rank correlation with both, mean over the tests, with an interval of 95 %
by drawing tests anew; the ratio of its norm to the exact one's; how well it finds mislabelled
samples (ROC-AUC of the mean relevance over tests, of `self` its own). `tracin` is taken with the
test gradients of every epoch, and with the last ones alone.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.maths import influence
from hydra_pipe.maths.fisher import Form
from hydra_pipe.reduction.sweep import Sweep
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.training.batches import epoch_order

N, M, WRONG, BATCH = 400, 100, 40, 40
BETAS, EPS = (0.9, 0.999), 1e-8
SGD_DECAY, ADAM_RATE, ADAM_DECAY = 5e-4, 3e-3, 1e-2
# optimiser, learning rate, momentum, epochs
RUNS: dict[str, tuple[str, float, float, int]] = {
    "SGD 0.1, 5 epochs": ("sgd", 0.1, 0.0, 5),
    "SGD 0.05, momentum, 20 epochs": ("sgd", 0.05, 0.9, 20),
    "SGD 0.1, momentum, 60 epochs": ("sgd", 0.1, 0.9, 60),
    "AdamW, 15 epochs": ("adamw", ADAM_RATE, 0.0, 15),
}
Values = dict[str, Tensor]


def make(kind: str, rate: float, momentum: float, epochs: int, n_test: int = M) -> Pipeline:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    inputs = torch.tensor(digits.data[order] / 16)
    targets = torch.tensor(digits.target[order])
    targets[:WRONG] = (
        targets[:WRONG] + torch.tensor(np.random.default_rng(1).integers(1, 10, WRONG))
    ) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum, weight_decay=SGD_DECAY
    )
    if kind == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, weight_decay=ADAM_DECAY, betas=BETAS, eps=EPS
        )
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(inputs[:N], targets[:N]),
        test=TensorDataset(inputs[N : N + n_test], targets[N : N + n_test]),
        batch_size=BATCH,
        epochs=epochs,
    )


def losses(pipeline: Pipeline, values: Values, x: Tensor, y: Tensor) -> Tensor:
    return pipeline.loss(torch.func.functional_call(pipeline.model, values, (x,)), y)


def updated(
    kind: str,
    rate: float,
    momentum: float,
    t: int,
    state: tuple[Values, Values, Values],
    gradients: Values,
) -> Values:
    """Parameters after step `t`, from 1, given (parameters, first, second); the last two are
    changed.
    """
    parameters, first, second = state
    found = {}
    for name, p in parameters.items():
        g = gradients[name]
        if kind == "sgd":
            first[name] = momentum * first[name] + g + SGD_DECAY * p
            found[name] = p - rate * first[name]
            continue
        first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
        second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g**2
        # the tiny number keeps the derivative of the root finite where a gradient is exactly zero
        root = (second[name] / (1 - BETAS[1] ** t) + 1e-30).sqrt() + EPS
        found[name] = p * (1 - rate * ADAM_DECAY) - rate / (1 - BETAS[0] ** t) * first[name] / root
    return found


def trained(
    pipeline: Pipeline,
    settings: tuple[str, float, float],
    weight: Tensor,
    take: Callable[..., Values],
) -> Values:
    """Parameters at the end, with a weight for each training sample."""
    inputs, targets = pipeline.train.tensors
    stack = weight.shape[:-1]
    parameters = {
        name: p.detach().expand(*stack, *p.shape).clone().requires_grad_()
        for name, p in pipeline.model.named_parameters()
    }
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    for t, ids in enumerate(order, start=1):
        gradients = take(parameters, weight[..., ids], inputs[ids], targets[ids])
        parameters = updated(*settings, t, (parameters, first, second), gradients)
    return parameters


def exact_relevance(pipeline: Pipeline, settings: tuple[str, float, float]) -> np.ndarray:
    """- d l_j(theta_T) / d w_i through every step."""
    weight = torch.ones(N, dtype=torch.float64, requires_grad=True)

    def take(values: Values, own: Tensor, x: Tensor, y: Tensor) -> Values:
        loss = (own * losses(pipeline, values, x, y)).mean()
        return dict(
            zip(
                values,
                torch.autograd.grad(loss, list(values.values()), create_graph=True),
                strict=True,
            )
        )

    tests = losses(pipeline, trained(pipeline, settings, weight, take), *pipeline.test.tensors)
    columns = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in tests]
    return -torch.stack(columns, dim=1).numpy()


def left_out(pipeline: Pipeline, settings: tuple[str, float, float]) -> np.ndarray:
    """l_j without sample i, less l_j with it."""
    weight = torch.cat([torch.ones(1, N), torch.ones(N, N) - torch.eye(N)]).double()

    def loss(values: Values, own: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (own * losses(pipeline, values, x, y)).mean()

    take = torch.vmap(torch.func.grad(loss), in_dims=(0, 0, None, None))
    with torch.no_grad():
        end = trained(pipeline, settings, weight, take)
        tests = torch.vmap(lambda values: losses(pipeline, values, *pipeline.test.tensors))(end)
    return (tests[1:] - tests[:1]).numpy()


def interval(per_test: np.ndarray) -> str:
    draw = np.random.default_rng(0).integers(0, len(per_test), (2000, len(per_test)))
    low, high = np.quantile(per_test[draw].mean(axis=1), (0.025, 0.975))
    return f"{per_test.mean():.3f} ({low:.3f} to {high:.3f})"


def spearmans(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.array([spearmanr(found[:, j], truth[:, j]).statistic for j in range(M)])


@contextmanager
def forms_of(forms: tuple[Form, ...]) -> Iterator[None]:
    with mock.patch.object(Sweep.__init__, "__defaults__", (forms,)):
        yield


@contextmanager
def last_tests_only() -> Iterator[None]:
    """As if no test gradients had been taken on the way."""
    steps = Gradients.test_steps
    with mock.patch.object(Gradients, "test_steps", lambda store: steps(store)[-1:]):
        yield


def ways(given: argparse.Namespace) -> Iterator[tuple[str, str, AbstractContextManager[object]]]:
    """Title and result of each line, and what it is computed within."""
    yield "hydra-exact", "hydra-exact", nullcontext()
    for rank in (20, 40):
        yield f"hydra-exact, rank {rank}", f"hydra-exact-rank-{rank}", nullcontext()
    yield "hydra", "hydra", nullcontext()
    yield "hydra-fisher", "hydra-fisher", nullcontext()
    for factor in filter(None, given.saturation.split(",")):
        yield (
            f"hydra-fisher, f = {factor}",
            "hydra-fisher",
            forms_of((Form(float(factor), 0.0, np.inf, 1.0),)),
        )
    yield "tracin", "tracin", nullcontext()
    yield "tracin, last test gradients", "tracin", last_tests_only()
    yield "grad-dot", "grad-dot", nullcontext()
    yield "grad-cos", "grad-cos", nullcontext()
    for fraction in map(float, given.damping.split(",")):
        yield (
            f"influence, damping x {fraction:g}",
            "influence",
            mock.patch.object(influence, "DAMPING", fraction),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--saturation",
        default="",
        help="f of single forms, trace-matched, besides the default forms",
    )
    parser.add_argument("--damping", default=str(influence.DAMPING))
    parser.add_argument("--runs", default=";".join(RUNS))
    given = parser.parse_args()
    print("| run, method | exact | left out | norm over exact | mislabelled, ROC-AUC | seconds |")
    print("| --- " * 6 + "|")
    for name in given.runs.split(";"):
        settings = RUNS[name][:3]
        exact, truth = (of(make(*RUNS[name]), settings) for of in (exact_relevance, left_out))
        wrong = np.arange(N) < WRONG

        def show(method: str, found: np.ndarray, seconds: float | None = None) -> None:
            ratio = np.linalg.norm(found) / np.linalg.norm(exact)  # noqa: B023 - called at once
            auc = roc_auc_score(wrong, -found.mean(axis=1))  # noqa: B023
            correlations = " | ".join(interval(spearmans(found, t)) for t in (exact, truth))  # noqa: B023
            took = "" if seconds is None else f"{seconds:.2f}"
            print(
                f"| {name}: {method} | {correlations} | {ratio:.2f} | {auc:.3f} | {took} |",  # noqa: B023
                flush=True,
            )

        with tempfile.TemporaryDirectory() as run:
            hydra_pipe.record(
                make(*RUNS[name]), run, encoding="exact", dtype="float32", test_every="epoch"
            )
            for title, result, within in ways(given):
                parts = ResultName.parse(result)
                options = {"pipeline": make(*RUNS[name])} if parts.method == "hydra-exact" else {}
                with within:
                    start = time.perf_counter()
                    hydra_pipe.reduce(
                        run, method=parts.method, rank=parts.rank, overwrite=True, **options
                    )
                    seconds = time.perf_counter() - start
                show(title, np.asarray(hydra_pipe.open_run(run).relevance(result)), seconds)
            hydra_pipe.reduce(run, method="self")
            own = np.asarray(hydra_pipe.open_run(run).relevance("self"))[:, 0]
            print(f"| {name}: self | | | | {roc_auc_score(wrong, own):.3f} | |", flush=True)


if __name__ == "__main__":
    main()
