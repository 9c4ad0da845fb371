"""Methods tracin, grad-dot, grad-cos, influence and self against plain float64 loops; how they go
on, divide work and refuse.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from made_up import adamw, made_up, root_of, whole
from support.compare import relative_error
from support.pipelines import conv_pipeline, mlp_pipeline

import hydra_pipe
from hydra_pipe import Pipeline, api
from hydra_pipe.errors import BudgetError, RunError, UsageError
from hydra_pipe.plan import chunking
from hydra_pipe.plan import influence as influence_plan
from hydra_pipe.plan.influence import SolveInput
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.progress import Progress
from hydra_pipe.reduction import answers
from hydra_pipe.reduction.methods import METHODS
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.reduction.weights import checkpoint_of_steps
from hydra_pipe.store.data.gradients import BLOCK_COLUMNS, GROUP_COLUMNS, Gradients
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE
from hydra_pipe.training.batches import epoch_order

NEW = ("tracin", "grad-dot", "grad-cos", "influence", "self")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the last rows of samples are in several files, and some files have none."""
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 12)


def relevance(run: Path, method: str) -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


def by_training(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """What each method is of a pipeline, from batch-of-one gradients in float64, with test
    gradients after every epoch.
    """
    model = oracles.in_float64(pipeline.model)
    named = dict(zip(pipeline.model.parameters(), model.parameters(), strict=True))
    groups = [
        g | {"params": [named[p] for p in g["params"]]} for g in pipeline.optimizer.param_groups
    ]
    for group in groups:
        group["lr"] = group.pop("initial_lr")
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, pipeline.scheduler.T_max)
    inputs, targets = (
        tensor.double() if tensor.is_floating_point() else tensor
        for tensor in pipeline.train.tensors
    )
    batches = [
        (ids, inputs[ids], targets[ids])
        for epoch in range(pipeline.epochs)
        for ids in epoch_order(pipeline, epoch)
    ]
    tests, a_epoch = {}, len(batches) // pipeline.epochs

    def after(n_steps: int) -> None:
        if n_steps % a_epoch == 0:
            x, y = pipeline.test.tensors
            trained = [n for n, _ in model.named_parameters()]
            tests[n_steps] = oracles.one_by_one_gradients(
                model, pipeline.loss, x.double(), y, trained
            )

    steps = oracles.record_by_loop(
        model, optimizer, pipeline.loss, batches, scheduler, pipeline.max_grad_norm, after
    )
    n = len(pipeline.train)
    found, weights = oracles.last_gradients(steps)
    last = np.stack([found[i] for i in range(n)])
    h = np.stack([oracles.in_one(test) for test in tests[len(batches)]])
    dot = last @ h.T
    return {
        "tracin": oracles.tracin(steps, tests, n),
        "grad-dot": dot,
        "grad-cos": dot / np.linalg.norm(last, axis=1)[:, None] / np.linalg.norm(h, axis=1),
        "influence": oracles.influence(
            last, np.array([weights[i] for i in range(n)]), h, oracles.damping(steps)
        ),
        "self": oracles.self_relevance(steps, n),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Convolutions, a factored Linear, norms; clipped, a rate of its own in each step and group, a
    short batch.
    """
    path = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MAX_SHARD_ROWS", 12)
        hydra_pipe.record(
            conv_pipeline(), path, encoding="exact", dtype="float32", test_every="epoch"
        )
    return path, by_training(conv_pipeline())


@pytest.mark.parametrize("method", NEW)
def test_a_method_is_that_of_batch_of_one_gradients(
    tmp_path: Path, trained: tuple[Path, dict[str, np.ndarray]], method: str
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    hydra_pipe.reduce(run, method=method)
    assert relative_error(relevance(run, method), trained[1][method]) < 1e-4
    assert hydra_pipe.verify(run) == []


def by_store(run: Path, up_to_step: int | None = None) -> dict[str, np.ndarray]:
    """Each method from what is stored, multiplied out, row by row in float64."""
    store = hydra_pipe.open_run(run).gradients
    everything = slice(None)
    rows = whole(store.rows.features(everything, everything), store.rows.scales(everything), store)
    steps, samples, rho = (
        store.step_of_rows(everything),
        store.samples(everything),
        store.curvature(everything),
    )
    n_samples = RunDirectory.open(run).stages[RECORD].count("n_samples")
    n_steps = store.n_steps if up_to_step is None else up_to_step
    part = np.repeat(np.arange(store.n_ranks), store.rows.part_rows)
    widths = [
        b.columns[1] - b.columns[0] if b.inputs is None else b.numel for b in store.layout.blocks
    ]
    block = np.repeat(np.arange(len(widths)), widths)
    group = np.array([b.group for b in store.layout.blocks])[block]
    tests = {}
    for s in store.test_steps():
        if s <= n_steps:
            stored = store.test_rows(s)
            tests[s] = whole(
                stored.features(everything, everything), stored.scales(everything), store
            )
    roots = {s: root_of(store, s, factored=True) for s in tests}
    last, total, alone = {}, np.zeros((n_samples, len(tests[n_steps]))), np.zeros((n_samples, 1))
    table = {
        name: store.step_table(name) for name in (*GROUP_COLUMNS, *BLOCK_COLUMNS, "gradient_scale")
    }
    lengths, decay, eta = np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), []
    for t in range(n_steps):
        of = {name: table[name][t][group] for name in GROUP_COLUMNS}
        gain = np.where(of["momentum"] > 0, (1 - of["dampening"]) / (1 - of["momentum"]), 1.0)
        eta.append(
            of["learning_rate"] * table["step_factor"][t][block] * table["updated"][t][block]
        )
        lengths += eta[t] * gain
        decay += (
            eta[t] * gain * of["weight_decay"] + of["decoupled_decay"] * table["updated"][t][block]
        )
    for k in range(len(rows)):
        t, i = int(steps[k]), int(samples[k])
        if t >= n_steps:
            continue
        c, n, own = (
            table["gradient_scale"][t],
            np.sum(steps == t),
            np.sum((steps == t) & (part == part[k])),
        )
        at = max(tests, key=lambda s, t=t: (-abs(s - t), s))
        total[i] += tests[at] @ (eta[t] * c * rows[k] * roots[at] ** 2)
        alone[i] += c**2 * n * rows[k] @ (eta[t] * rows[k] * roots[n_steps] ** 2)
        if i not in last or t >= last[i][0]:
            weight = 1.0 if np.isnan(rho[k]) else float(rho[k])
            last[i] = t, c * n * rows[k], weight / (c * n / own)
    used = sorted(last)
    g, h = (
        values * roots[n_steps] for values in (np.stack([last[i][1] for i in used]), tests[n_steps])
    )
    rho_of = np.array([last[i][2] for i in used])
    cosine = g @ h.T / (np.linalg.norm(g, axis=1)[:, None] * np.linalg.norm(h, axis=1))
    of_used = {
        "grad-dot": g @ h.T,
        "grad-cos": cosine,
        "influence": oracles.influence(g, rho_of, h, (1 + decay) / lengths),
    }
    result = {"tracin": total, "self": alone}
    for method, values in of_used.items():
        result[method] = np.zeros((n_samples, len(h)))
        result[method][used] = values
    return result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Random rows of two processes, samples twice in a step, curvature that is not known, a tie
    between test checkpoints.
    """
    return made_up(tmp_path / "run", 2, tested=(0, 4))


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_rows_of_several_processes_groups_and_repeated_samples_count_as_they_should(
    tmp_path: Path, n_ranks: int
) -> None:
    run = made_up(tmp_path / "run", n_ranks, tested=(0, 4))
    for method, expected in by_store(run).items():
        hydra_pipe.reduce(run, method=method)
        assert relative_error(relevance(run, method), expected) < 1e-4, method
        if method != "self":
            hydra_pipe.reduce(run, method=method, by="label", tests="1-4,8")
            of_labels = [[k for k in (1, 2, 3, 4, 8) if k % 3 == label] for label in range(3)]
            means = np.stack([expected[:, tests].mean(axis=1) for tests in of_labels], axis=1)
            assert relative_error(relevance(run, f"{method}-by-label"), means) < 1e-4, method


def test_a_tie_between_test_checkpoints_goes_to_the_later_one(run: Path) -> None:
    checkpoints = np.array([0, 4, 7])
    assert checkpoint_of_steps(checkpoints, np.arange(7)).tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert checkpoint_of_steps(np.array([7]), np.arange(7)).tolist() == [0] * 7


PROJECTED = {"encoding": "projected", "dim": 60}


@pytest.mark.parametrize(
    ("builder", "options"),
    [(adamw, {"dtype": "int8"}), (mlp_pipeline, {}), (lambda: conv_pipeline(epochs=1), PROJECTED)],
    ids=["AdamW, int8", "factored alone, float16", "projected"],
)
def test_methods_work_in_the_columns_that_were_recorded(
    tmp_path: Path, builder: Callable[[], Pipeline], options: dict[str, object]
) -> None:
    hydra_pipe.record(builder(), tmp_path / "run", test_every="3", **options)
    for method, expected in by_store(tmp_path / "run").items():
        hydra_pipe.reduce(tmp_path / "run", method=method)
        assert relative_error(relevance(tmp_path / "run", method), expected) < 1e-4, method


def test_the_first_steps_are_those_of_a_training_that_ends_there(
    tmp_path: Path, trained: tuple[Path, object]
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    for method, expected in by_store(run, up_to_step=8).items():
        hydra_pipe.reduce(run, method=method, up_to_step=8)
        assert relative_error(relevance(run, f"{method}-upto-8"), expected) < 1e-4, method


DIVISIONS = [
    {"scheduler": "synchronous", "chunks": "1x1"},
    {"scheduler": "threads", "chunks": "4x7"},
    {"chunks": "12x1"},
]


def test_sums_are_independent_of_how_the_work_is_divided(run: Path) -> None:
    for method, expected in by_store(run).items():
        for options in DIVISIONS if method != "influence" else []:
            hydra_pipe.reduce(run, method=method, overwrite=True, **options)
            assert relative_error(relevance(run, method), expected) < 1e-4, (method, options)


def in_test_blocks(patch: pytest.MonkeyPatch, width: int) -> None:
    """Passes of so many test samples."""
    plan = CommonSolver._planned

    def changed(solver: CommonSolver, given: ReductionInput, after: Answered | None):
        given, found = plan(solver, given, after)
        done = 0 if after is None else after.done
        blocks = tuple(
            (first, min(first + width, given.n_tests))
            for first in range(done, given.n_tests, width)
        )
        return given, dataclasses.replace(found, test_blocks=blocks)

    patch.setattr(CommonSolver, "_planned", changed)


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize(("held", "tests"), [(20, 11), (7, 11), (1, 4)])
def test_a_linear_system_is_solved_alike_by_samples_and_by_features(
    run: Path, by_features: bool, held: int, tests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SolveInput, "by_features", by_features)
    monkeypatch.setattr(
        SolveInput, "size", property(lambda what: what.width if by_features else what.n_last)
    )
    monkeypatch.setattr(influence_plan, "_held_widths", lambda what: [held])
    in_test_blocks(monkeypatch, tests)
    hydra_pipe.reduce(run, method="influence")
    assert relative_error(relevance(run, "influence"), by_store(run)["influence"]) < 1e-4
    facts = RunDirectory.open(run).stages[REDUCE.of("influence")].facts
    assert facts["plan"]["order"] == ("by features" if by_features else "by samples")
    assert facts["damping"] > 0


def test_processes_give_the_same_as_threads(run: Path) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    for path, scheduler in ((run, "processes"), (other, "threads")):
        hydra_pipe.reduce(path, method="influence", scheduler=scheduler)
    assert relative_error(relevance(run, "influence"), relevance(other, "influence")) < 1e-5


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("method", NEW)
def test_the_same_call_goes_on_to_the_same_bytes(
    run: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    if method != "self":
        in_test_blocks(monkeypatch, 4)
    hydra_pipe.reduce(other, method=method)
    real, written = answers.write_relevance, []

    def write(*arguments: object) -> None:
        if len(written) == (method != "self"):
            raise InterruptedHereError
        written.append(arguments)
        real(*arguments)

    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(answers, "write_relevance", write)
        with pytest.raises(InterruptedHereError):
            hydra_pipe.reduce(run, method=method)
    hydra_pipe.reduce(run, method=method)
    assert relevance(run, method).tobytes() == relevance(other, method).tobytes()
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos", "influence"])
def test_files_without_a_last_row_are_not_read(
    tmp_path: Path, method: str, trained: tuple[Path, object]
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "gradients.zarr/gradient/c/0/0").write_bytes(b"damaged")
    plan = str(api.plan_reduction(run, method=method))
    assert plan.startswith("rows x features  30 x 258 ")  # of 78 rows
    hydra_pipe.reduce(run, method=method)
    assert relative_error(relevance(run, method), relevance_of(trained[0], tmp_path, method)) == 0


def relevance_of(recorded: Path, tmp_path: Path, method: str) -> np.ndarray:
    run = shutil.copytree(recorded, tmp_path / "whole")
    hydra_pipe.reduce(run, method=method)
    return relevance(run, method)


def test_a_gradient_of_zero_has_a_cosine_of_zero(tmp_path: Path) -> None:
    pipeline = mlp_pipeline()
    pipeline.loss = lambda output, target: hydra_loss(output, target) * (target != 0)
    hydra_pipe.record(pipeline, tmp_path / "run")
    hydra_pipe.reduce(tmp_path / "run", method="grad-cos")
    hydra_pipe.reduce(tmp_path / "run", method="influence")
    found, labels = relevance(tmp_path / "run", "grad-cos"), pipeline.train.tensors[1].numpy()
    assert (found[labels == 0] == 0).all()
    assert np.abs(found).max() <= 1 + 1e-6
    assert (found[labels != 0] != 0).any()
    assert np.isfinite(relevance(tmp_path / "run", "influence")).all()


def hydra_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output, target, reduction="none")


def test_what_means_nothing_to_a_method_is_refused(run: Path) -> None:
    for method in NEW:
        with pytest.raises(UsageError, match="--keep-hypergradients is for --method hydra"):
            hydra_pipe.reduce(run, method=method, keep_hypergradients=True)
    for options, message in (
        ({"tests": "0"}, "--tests"),
        ({"by": "label"}, "--by"),
        ({"by": "mean"}, "--mean"),
    ):
        with pytest.raises(
            UsageError,
            match=(
                f"{message} is for methods with test samples: self has one value for each "
                "training sample"
            ),
        ):
            hydra_pipe.reduce(run, method="self", **options)
    with pytest.raises(UsageError, match="--chunks is for methods that read rows as they come"):
        hydra_pipe.reduce(run, method="influence", chunks="64x64")
    with pytest.raises(
        UsageError,
        match="--method trak is unknown: choose one of hydra, hydra-fisher, hydra-exact, tracin",
    ):
        hydra_pipe.reduce(run, method="trak")
    with pytest.raises(UsageError, match="--method self ranks nothing"):
        hydra_pipe.export(run, method="self")
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(run)
    for method in NEW:
        with pytest.raises(
            RunError,
            match=("its gradients were pruned: only hydra and hydra-exact work without them"),
        ):
            hydra_pipe.reduce(run, method=method)


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_written(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    with pytest.raises(
        BudgetError,
        match=(
            r"a matrix of (\d+) x \1 samples needs .* while it is solved, --memory is 100 MiB: "
            r"raise --memory to \d+MiB"
        ),
    ):
        hydra_pipe.reduce(run, method="influence", memory="100MiB")
    assert (run / "run.json").read_bytes() == before
    assert not (run / "relevance.zarr").exists()


def test_tracin_says_that_it_had_the_last_test_gradients_alone(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    for tested, name in (((), "once"), ((4,), "on the way")):
        hydra_pipe.reduce(
            made_up(tmp_path / name, 1, tested=tested), method="tracin", progress=Heard()
        )
    assert sum("record with --test-every epoch" in line for line in said) == 1


def test_tracin_refuses_test_gradients_of_other_test_samples(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Gradients.test_rows

    def fewer(store: Gradients, step: int):
        rows = real(store, step)
        if step == 4:
            rows.part_rows = (10,)
        return rows

    monkeypatch.setattr(Gradients, "test_rows", fewer)
    with pytest.raises(UsageError, match="has 10 test gradients after 4 steps and 11 after 7"):
        hydra_pipe.reduce(run, method="tracin")


def test_the_unit_is_said_wherever_relevance_is(run: Path) -> None:
    # which needs the pipeline
    for method in (name for name, found in METHODS.items() if found.solvers is not None):
        hydra_pipe.reduce(run, method=method)
        attributes = dict(hydra_pipe.open_run(run).relevance_array(method).attrs)
        assert (attributes["method"], attributes["unit"], attributes["sign"]) == (
            method,
            METHODS[method].unit,
            METHODS[method].sign,
        )
        assert (attributes["unit"] == "test loss") == (
            method in ("hydra", "hydra-fisher", "tracin", "influence")
        )
        assert hydra_pipe.open_run(run).relevance(method).attrs["unit"] == METHODS[method].unit
