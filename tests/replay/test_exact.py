"""Method `hydra-exact` against finite differences of real training, the paper's forward form, and
itself under other divisions.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import forward_relevance, one_by_one_gradients, record_by_loop
from support.compare import relative_error
from support.optimizers import muon_and_adamw, muon_without_rounding
from support.pipelines import conv_pipeline, cross_entropy, images, likelihood
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline, SeveralOptimizers
from hydra_pipe.errors import BudgetError, OptimizerError, PipelineError, RunError, UsageError
from hydra_pipe.replay import products, solver
from hydra_pipe.replay.lowrank import Basis
from hydra_pipe.store.data import save_interval
from hydra_pipe.store.run import stage_runner
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import REDUCE
from hydra_pipe.training.batches import epoch_order

N_TRAIN, N_TEST, BATCH, EPOCHS = 14, 5, 5, 3
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def small(
    optimizer: Optimizer,
    dropout: float = 0.0,
    clip: float | None = None,
    cosine: bool = False,
    **changes: Any,
) -> Pipeline:
    """A small MLP in float64."""
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)
    ).double()
    own = optimizer(layers)
    data = [
        TensorDataset(inputs.double(), targets)
        for inputs, targets in (images(n, i, 4).tensors for i, n in ((1, N_TRAIN), (2, N_TEST)))
    ]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(own, 12) if cosine else None
    options = {
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "scheduler": scheduler,
        "max_grad_norm": clip,
    } | changes
    fields = {"loss": cross_entropy} | options
    return Pipeline(model=layers, optimizer=own, train=data[0], test=data[1], **fields)  # type: ignore[arg-type]


def losses_of(pipeline: Pipeline, weight: Tensor) -> np.ndarray:
    """Train for real, with a weight for each training sample, by a loop that shares nothing with
    the package but the order.
    """
    torch.manual_seed(pipeline.seed)
    inputs, targets = pipeline.train.tensors
    for epoch in range(pipeline.epochs):
        for ids in epoch_order(pipeline, epoch):
            pipeline.model.zero_grad()
            (
                weight[ids] * pipeline.loss(pipeline.model(inputs[ids]), targets[ids])
            ).mean().backward()
            if pipeline.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(pipeline.model.parameters(), pipeline.max_grad_norm)
            pipeline.optimizer.step()
            if pipeline.scheduler is not None:
                pipeline.scheduler.step()
    pipeline.model.eval()
    with torch.no_grad():
        x, y = pipeline.test.tensors
        found: np.ndarray = pipeline.loss(pipeline.model(x), y).numpy()
    return found


def finite_differences(build: Callable[[], Pipeline], size: float = 1e-4) -> np.ndarray:
    """- d l_j / d w_i by central differences, of fourth order."""
    found = []
    for i in range(N_TRAIN):
        losses = []
        for step in (-2, -1, 1, 2):
            weight = torch.ones(N_TRAIN, dtype=torch.float64)
            weight[i] += step * size
            losses.append(losses_of(build(), weight))
        found.append(-(losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * size))
    return np.array(found)


def sgd(**options: Any) -> Optimizer:
    return lambda model: torch.optim.SGD(model.parameters(), **({"lr": 0.3} | options))


def adam(kind: type[torch.optim.Optimizer], **options: Any) -> Optimizer:
    # eps of the gradients' own size: that of a usual run makes its first steps signs, which have no
    # derivative worth a difference
    return lambda model: kind(model.parameters(), **({"lr": 0.02, "eps": 1e-3} | options))  # type: ignore[call-arg]


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.SGD(
        [{"params": weights, "momentum": 0.8, "nesterov": True}, {"params": others, "lr": 0.05}],
        lr=0.2,
    )


def part_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[1].parameters(), lr=0.3, momentum=0.5)  # type: ignore[index]


def muon(**options: Any) -> Optimizer:
    return lambda model: muon_and_adamw(
        [{"params": model.parameters()}], **({"lr": 0.02, "eps": 1e-3} | options)
    )


def sgd_and_adam(model: nn.Module) -> torch.optim.Optimizer:
    first, second = model[1], model[4]  # type: ignore[index]
    return SeveralOptimizers(
        [
            torch.optim.SGD(first.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01),
            torch.optim.Adam(second.parameters(), lr=0.02, eps=1e-3),
        ]
    )


CASES: dict[str, Callable[[], Pipeline]] = {
    "plain": lambda: small(sgd()),
    "momentum and decay": lambda: small(sgd(momentum=0.9, weight_decay=0.01, lr=0.1)),
    "dampening": lambda: small(sgd(momentum=0.8, dampening=0.3)),
    "nesterov, cosine": lambda: small(
        sgd(momentum=0.8, nesterov=True, weight_decay=0.02, lr=0.1), cosine=True
    ),
    "clipped": lambda: small(sgd(momentum=0.9, weight_decay=0.01), clip=0.3),
    "clipped, a part is trained": lambda: small(part_of, clip=0.3),
    "two groups, clipped now and then": lambda: small(two_groups, clip=0.8),
    "dropout": lambda: small(sgd(momentum=0.5), dropout=0.4),
    "Adam": lambda: small(adam(torch.optim.Adam)),
    "Adam, coupled decay": lambda: small(
        adam(torch.optim.Adam, weight_decay=0.05, betas=(0.8, 0.95))
    ),
    "AdamW": lambda: small(adam(torch.optim.AdamW, weight_decay=0.1)),
    "amsgrad": lambda: small(
        adam(torch.optim.AdamW, weight_decay=0.1, amsgrad=True, betas=(0.8, 0.6)), clip=0.3
    ),
    "NAdam, coupled decay": lambda: small(
        adam(torch.optim.NAdam, weight_decay=0.05, momentum_decay=0.4), cosine=True
    ),
    "NAdam, decoupled decay": lambda: small(
        adam(torch.optim.NAdam, weight_decay=0.05, decoupled_weight_decay=True), clip=0.3
    ),
    "RAdam, coupled decay": lambda: small(
        adam(torch.optim.RAdam, weight_decay=0.05, lr=0.1), epochs=4
    ),
    "RAdam, decoupled decay": lambda: small(
        adam(torch.optim.RAdam, weight_decay=0.05, decoupled_weight_decay=True, lr=0.1), epochs=4
    ),
    "RMSprop": lambda: small(adam(torch.optim.RMSprop, weight_decay=0.05, lr=0.005)),
    "RMSprop, centred, with momentum": lambda: small(
        adam(torch.optim.RMSprop, centered=True, momentum=0.8, alpha=0.9, lr=0.003), clip=0.3
    ),
    "Adagrad": lambda: small(adam(torch.optim.Adagrad, weight_decay=0.05, lr_decay=0.1)),
    "Adagrad, begun above 0": lambda: small(
        adam(torch.optim.Adagrad, initial_accumulator_value=0.01), dropout=0.3
    ),
    "Muon": lambda: small(muon(momentum=0.8, weight_decay=0.2), clip=0.3, cosine=True),
    "Muon without Nesterov": lambda: small(muon(nesterov=False, adjust_lr_fn="match_rms_adamw")),
    "Adafactor": lambda: small(
        adam(torch.optim.Adafactor, lr=0.05, eps=(1e-3, 1e-3), weight_decay=0.1), clip=0.3
    ),
    "Adafactor, seldom clipped": lambda: small(
        adam(torch.optim.Adafactor, lr=0.1, eps=(1e-3, 0.5), d=3.0), cosine=True
    ),
    "SGD beside Adam": lambda: small(sgd_and_adam, clip=0.3, cosine=True),
    "climbing by SGD": lambda: small(
        sgd(momentum=0.9, weight_decay=0.01, lr=0.1, maximize=True), clip=0.3, loss=likelihood
    ),
    "climbing by AdamW": lambda: small(
        adam(torch.optim.AdamW, weight_decay=0.1, maximize=True), loss=likelihood
    ),
    "climbing by NAdam": lambda: small(
        adam(torch.optim.NAdam, weight_decay=0.1, maximize=True), loss=likelihood
    ),
    "AdamW, clipped, dropout": lambda: small(
        adam(torch.optim.AdamW, weight_decay=0.1), clip=0.3, dropout=0.3, cosine=True
    ),
}


def exact(build: Callable[[], Pipeline], run: Path, **options: Any) -> np.ndarray:
    if not run.exists():
        hydra_pipe.record(build(), run)
    hydra_pipe.reduce(run, method="hydra-exact", pipeline=build(), **options)
    name = str(
        ResultName("hydra-exact", options.get("by"), options.get("up_to_step"), options.get("rank"))
    )
    return np.asarray(hydra_pipe.open_run(run).relevance(name))


@pytest.mark.filterwarnings("ignore:the optimizer has maximize=True")
@pytest.mark.parametrize("case", CASES)
def test_relevance_is_that_of_finite_differences_of_training(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    muon_without_rounding(monkeypatch)
    # the store keeps float32: the sums themselves are held against the differences
    sums: list[np.ndarray] = []
    real = solver.Replay._sweep

    def kept(self: Any, *arguments: Any) -> np.ndarray:
        sums.append(real(self, *arguments))
        return sums[-1]

    monkeypatch.setattr(solver.Replay, "_sweep", kept)
    found = exact(CASES[case], tmp_path / "run")
    expected = finite_differences(CASES[case])
    assert relative_error(-sums[0], expected) < 1e-6
    assert relative_error(found, expected) < 1e-6


def test_the_derivative_of_clipping_matters(tmp_path: Path) -> None:
    """Without it the case above would not see it: it is no rounding."""
    clipped, free = (
        exact(CASES[case], tmp_path / case) for case in ("clipped", "momentum and decay")
    )
    assert relative_error(clipped, free) > 0.1


def test_adams_second_moment_is_differentiated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exact(CASES["AdamW"], tmp_path / "whole")
    real = solver.ExactSweep._through_optimizer

    def frozen(self: Any, own: Any, gradient: Tensor) -> Tensor:
        found = real(self, own, gradient)
        own.states[1].zero_()
        return found

    monkeypatch.setattr(solver.ExactSweep, "_through_optimizer", frozen)
    assert relative_error(exact(CASES["AdamW"], tmp_path / "frozen"), whole) > 0.1


def test_relevance_is_that_of_the_papers_forward_form(tmp_path: Path) -> None:
    def build() -> Pipeline:
        return small(sgd(momentum=0.8, nesterov=True, weight_decay=0.02, lr=0.1), cosine=True)

    found = exact(build, tmp_path / "run")
    pipeline = build()
    inputs, targets = pipeline.train.tensors
    model, names = pipeline.model, [n for n, _ in pipeline.model.named_parameters()]
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    hessians: list[Tensor] = []

    def batches() -> Any:
        for ids in order:
            values = torch.cat([p.detach().flatten() for p in model.parameters()])

            def loss(flat: Tensor) -> Tensor:
                pieces = torch.split(flat, [p.numel() for p in model.parameters()])
                own = {
                    n: piece.view_as(p)
                    for n, piece, p in zip(names, pieces, model.parameters(), strict=True)
                }
                return cross_entropy(
                    torch.func.functional_call(model, own, (inputs[ids],)),  # noqa: B023
                    targets[ids],  # noqa: B023
                ).mean()

            hessians.append(torch.autograd.functional.hessian(loss, values))
            yield ids, inputs[ids], targets[ids]

    steps = record_by_loop(model, pipeline.optimizer, cross_entropy, batches(), pipeline.scheduler)
    tests = one_by_one_gradients(model, cross_entropy, *pipeline.test.tensors, names)
    expected = forward_relevance(steps, tests, N_TRAIN, lambda t, moved: moved @ hessians[t])
    assert relative_error(found, expected) < 1e-6


# ---------------------------------------------------------------------- divisions of the work


@pytest.fixture
def run(tmp_path: Path) -> Path:
    hydra_pipe.record(conv_pipeline(), tmp_path / "run")
    return tmp_path / "run"


def planned(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    real = solver.plan_replay
    carried = {"carried": changes["columns"]} if "columns" in changes else {}
    patch.setattr(solver, "plan_replay", lambda what: replace(real(what), **changes, **carried))


@pytest.mark.parametrize(
    "changes",
    [
        {"most_states": 2, "levels": 4},
        {"most_states": 3, "levels": 3},
        {"most_states": 20, "levels": 1},
        {"columns": ((0, 4), (4, 7))},
        {"at_once": 1},
        {"at_once": 3, "columns": ((0, 3), (3, 6), (6, 7))},
    ],
)
def test_any_division_of_the_work_gives_the_same(
    run: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exact(conv_pipeline, run)
    planned(monkeypatch, **changes)
    assert relative_error(exact(conv_pipeline, run, overwrite=True), expected) < 1e-4  # float32
    assert hydra_pipe.verify(run) == []


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 5, 11, 15, 23])
def test_it_goes_on_in_its_middle_to_the_same_bytes(
    run: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, columns=((0, 4), (4, 7)), most_states=3, levels=3)
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    expected = exact(conv_pipeline, Path(shutil.copytree(run, run.with_name("other"))))
    real, taken = solver.ExactSweep.step, []

    def step(self: Any, given: Any) -> None:
        if len(taken) == after:
            raise InterruptedHereError
        taken.append(given.number)
        real(self, given)

    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(solver.ExactSweep, "step", step)
        with pytest.raises(InterruptedHereError):
            exact(conv_pipeline, run)
    again: list[int] = []
    monkeypatch.setattr(
        solver.ExactSweep,
        "step",
        lambda self, given: (again.append(given.number), real(self, given)),
    )
    assert np.array_equal(exact(conv_pipeline, run), expected)
    assert len(again) == 24 - after  # twelve steps of two blocks
    assert not list((run / "relevance.zarr").rglob("sweep-*"))
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    ("method", "rank"), [("hydra-fisher", None), ("hydra-exact", None), ("hydra-exact", 3)]
)
def test_what_passes_found_is_told_where_only_the_end_is_left(
    run: Path, method: str, rank: int | None
) -> None:
    hydra_pipe.reduce(run, method="hydra-fisher")
    other = Path(shutil.copytree(run, run.with_name("other")))
    stage = REDUCE.of(ResultName(method, rank=rank))
    real = stage_runner.seal

    def reduce(path: Path, **options: Any) -> None:
        own = {"pipeline": conv_pipeline()} if method == "hydra-exact" else {}
        hydra_pipe.reduce(path, method=method, rank=rank, **own, **options)

    def interrupted(directory: RunDirectory, sealed: str) -> str:
        if sealed == stage:
            raise InterruptedHereError
        return real(directory, sealed)

    reduce(other, overwrite=True)
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(stage_runner, "seal", interrupted)
        with pytest.raises(InterruptedHereError):
            reduce(run, overwrite=True)
    reduce(run)
    found, expected = (RunDirectory.open(path).stages[stage].facts for path in (run, other))
    facts = (
        {"curvature_left"}
        if method == "hydra-fisher"
        else {"loss_difference"} | ({"gradients_held"} if rank else set())
    )
    assert {name: found.get(name) for name in facts} == {name: expected[name] for name in facts}
    assert hydra_pipe.verify(run) == []


def test_a_rank_goes_on_with_the_directions_that_it_began_with(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular vectors have no sign of their own: another machine, or number of threads, may find
    the other one.
    """
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    expected = exact(conv_pipeline, Path(shutil.copytree(run, run.with_name("other"))), rank=3)
    step, basis_of, taken = solver.ExactSweep.step, solver.basis_of, []

    def stopped(self: Any, given: Any) -> None:
        if len(taken) == 5:
            raise InterruptedHereError
        taken.append(given.number)
        step(self, given)

    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(solver.ExactSweep, "step", stopped)
        with pytest.raises(InterruptedHereError):
            exact(conv_pipeline, run, rank=3)

    def turned(gradients: list[Tensor], rank: int) -> Basis:
        found = basis_of(gradients, rank)
        return Basis([-v for v in found.vectors], -found.mixing, -found.coefficients, found.held)

    monkeypatch.setattr(solver, "basis_of", turned)
    assert np.array_equal(exact(conv_pipeline, run, rank=3), expected)


def test_means_and_selections_are_those_of_the_columns(run: Path) -> None:
    whole = exact(conv_pipeline, run)
    labels = np.asarray(hydra_pipe.open_run(run).gradients.labels("test"))
    by_label = exact(conv_pipeline, run, by="label")
    assert (
        relative_error(
            by_label, np.stack([whole[:, labels == k].mean(1) for k in np.unique(labels)], axis=1)
        )
        < 1e-5
    )
    assert relative_error(exact(conv_pipeline, run, by="mean")[:, 0], whole.mean(1)) < 1e-5
    some = exact(conv_pipeline, run, tests="1-2,5", overwrite=True)
    assert relative_error(some, whole[:, [1, 2, 5]]) < 1e-5


def test_of_the_first_steps_is_a_shorter_training(tmp_path: Path) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "run", test_every="5")
    found = exact(conv_pipeline, tmp_path / "run", up_to_step=5)
    sweep_all = exact(conv_pipeline, tmp_path / "run")
    assert relative_error(found, sweep_all) > 0.1
    assert hydra_pipe.verify(tmp_path / "run") == []
    # an epoch has four steps: a training of five by a loop of its own, with the third sample's
    # weight changed a little
    losses = []
    for weight in (0.999, 1.001):
        pipeline = conv_pipeline()
        inputs, targets = pipeline.train.tensors
        for ids in [ids for epoch in range(2) for ids in epoch_order(pipeline, epoch)][:5]:
            each = pipeline.loss(pipeline.model(inputs[ids]), targets[ids])
            pipeline.optimizer.zero_grad()
            (torch.where(torch.from_numpy(ids) == 3, weight, 1.0) * each).mean().backward()
            torch.nn.utils.clip_grad_norm_(pipeline.model.parameters(), 0.5)
            pipeline.optimizer.step()
            pipeline.scheduler.step()
        with torch.no_grad():
            losses.append(
                pipeline.loss(
                    pipeline.model.eval()(pipeline.test.tensors[0]), pipeline.test.tensors[1]
                ).numpy()
            )
    assert relative_error(found[3], (losses[0] - losses[1]) / 0.002) < 0.01


def test_ranks_lead_from_the_approximation_to_the_exact_one(run: Path) -> None:
    whole = exact(conv_pipeline, run)
    hydra_pipe.reduce(run, method="hydra-fisher")
    errors = [relative_error(np.asarray(hydra_pipe.open_run(run).relevance("hydra-fisher")), whole)]
    errors += [relative_error(exact(conv_pipeline, run, rank=k), whole) for k in (2, 4, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert errors[1] < 0.9 * errors[0]
    facts = RunDirectory.open(run).stages[REDUCE.of("hydra-exact-rank-4")].facts
    assert 0.5 < facts["gradients_held"] < 1
    assert hydra_pipe.verify(run) == []


def test_a_rank_computes_the_approximation_that_it_needs(run: Path) -> None:
    exact(conv_pipeline, run, rank=2, tests="0-3")
    assert RunDirectory.open(run).stages[REDUCE.of("hydra-fisher")].state == "complete"


# ---------------------------------------------------------------------- what cannot be


def test_without_batching_rules_it_goes_one_by_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exact(conv_pipeline, run)
    real = torch.autograd.grad

    def without(*arguments: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented for aten::something")
        return real(*arguments, **options)

    monkeypatch.setattr(products.torch.autograd, "grad", without)
    assert relative_error(exact(conv_pipeline, run, overwrite=True), expected) < 1e-4


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OnceDifferentiable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)  # type: ignore[no-any-return]


def test_a_model_that_has_no_second_derivative_is_told(tmp_path: Path) -> None:
    def build() -> Pipeline:
        pipeline = small(sgd())
        pipeline.model[2] = OnceDifferentiable()  # type: ignore[operator]
        return pipeline

    with pytest.raises(
        PipelineError,
        match=r"cannot be differentiated twice, which hydra-exact needs .* hydra-fisher",
    ):
        exact(build, tmp_path / "run")


def test_another_training_is_refused_at_its_first_step(run: Path) -> None:
    other = conv_pipeline()
    other.train = TensorDataset(other.train.tensors[0] + 1, other.train.tensors[1])
    with pytest.raises(
        RunError, match=r"the loss of step 0 is .* now, and was .* when it was recorded"
    ):
        hydra_pipe.reduce(run, method="hydra-exact", pipeline=other)
    other = conv_pipeline()
    other.test = TensorDataset(other.test.tensors[0] + 1, other.test.tensors[1])
    with pytest.raises(RunError, match=r"the loss of test sample \d is .* now"):
        hydra_pipe.reduce(run, method="hydra-exact", pipeline=other)
    trained = conv_pipeline()
    trained.model.load_state_dict(torch.load(run / "checkpoints/final.pt"))
    with pytest.raises(RunError, match="a Pipeline object is newly built"):
        hydra_pipe.reduce(run, method="hydra-exact", pipeline=trained)
    with pytest.raises(
        RunError,
        match=(
            "was recorded with epochs 3, and the pipeline has 2: give the pipeline of the recording"
        ),
    ):
        hydra_pipe.reduce(run, method="hydra-exact", pipeline=conv_pipeline(epochs=2))


def test_what_it_cannot_do_is_refused(run: Path, tmp_path: Path) -> None:
    for options, message in (
        (
            {"scheduler": "processes"},
            "--scheduler processes: hydra-exact trains again, in this process",
        ),
        ({"keep_hypergradients": True}, "--keep-hypergradients is for --method hydra"),
        ({"chunks": "64x64"}, "--chunks is for methods that read rows as they come"),
        ({"rank": 0}, "--rank 0: give 1 or more"),
        ({"rank": 2, "by": "label"}, "--rank: means by label are few columns already"),
    ):
        with pytest.raises(UsageError, match=message):
            hydra_pipe.reduce(run, method="hydra-exact", pipeline=conv_pipeline(), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--rank is for --method hydra-fisher and hydra-exact"):
        hydra_pipe.reduce(run, rank=2, method="hydra")
    with pytest.raises(UsageError, match="--pipeline is for --method hydra-exact"):
        hydra_pipe.reduce(run, pipeline=conv_pipeline(), method="hydra")
    with pytest.raises(
        RunError, match=r"hydra-exact trains the pipeline again\. Build .* give it as"
    ):
        hydra_pipe.reduce(run, method="hydra-exact")
    with pytest.raises(
        BudgetError,
        match=r"hydra-exact of one column, 12 steps of .* needs .* raise --memory to \d+MiB",
    ):
        hydra_pipe.reduce(run, method="hydra-exact", pipeline=conv_pipeline(), memory="30MiB")


def test_half_precision_is_refused(tmp_path: Path) -> None:
    pipeline = small(sgd())
    pipeline.model.bfloat16()
    with pytest.raises(
        PipelineError, match=r"parameters of torch\.bfloat16: hydra-exact needs float32 or float64"
    ):
        solver.moving(pipeline)


def test_an_optimizer_of_ones_own_is_refused() -> None:
    class Own(torch.optim.SGD):
        pass

    with pytest.raises(
        OptimizerError,
        match=r"hydra-exact differentiates SGD, Adam, AdamW, RMSprop, .*, not Own: use --method",
    ):
        solver.moving(small(lambda model: Own(model.parameters(), lr=0.1)))
