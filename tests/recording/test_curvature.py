"""rho of every row against the Hessian of each sample's loss in the model's output, float64, one
sample at a time.
"""

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pipelines import cross_entropy, images, mlp_pipeline
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.maths.curvature import curvature_weights
from hydra_pipe.recording.curvature import CurvatureWatch
from hydra_pipe.recording.seen_outputs import SeenOutput
from hydra_pipe.recording.targets import TargetCheck

N = 8
Loss = Callable[[Tensor, Tensor], Tensor]


def sums(loss: Tensor) -> Tensor:
    return loss.flatten(1).sum(1)


def yes_or_no(output: Tensor, target: Tensor) -> Tensor:
    return sums(
        F.binary_cross_entropy_with_logits(
            output, (target[:, None] == torch.arange(output.shape[1])).to(output), reduction="none"
        )
    )


def by_pixel(output: Tensor, target: Tensor) -> Tensor:
    maps = target[:, None, None].expand(-1, *output.shape[2:])
    return F.cross_entropy(output, maps, reduction="none").mean((1, 2))


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none", label_smoothing=0.1)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(
        output, target, torch.tensor([1.0, 2.0, 3.0, 0.5]).to(output), reduction="none"
    )


def focal(output: Tensor, target: Tensor) -> Tensor:
    p = torch.softmax(output, 1).gather(1, target[:, None])[:, 0]
    return -((1 - p) ** 2) * torch.log(p)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return sums((output - target[:, None].expand_as(output).to(output)) ** 2)


def halved(output: Tensor, target: Tensor) -> Tensor:
    return (
        F.mse_loss(output, target.to(output)[:, None].expand_as(output), reduction="none").mean(1)
        / 2
    )


def robust(output: Tensor, target: Tensor) -> Tensor:
    return sums(
        F.smooth_l1_loss(output, target.to(output)[:, None].expand_as(output), reduction="none")
    )


def hinge(output: Tensor, target: Tensor) -> Tensor:
    own = output.gather(1, target[:, None])
    return sums(F.relu(1 + output - own))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))


def pixels() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3))


def oracle(loss: Loss, outputs: Tensor, targets: Tensor) -> np.ndarray:
    """tr H / |g|^2 of each sample's own loss, by autograd's whole Hessian."""
    found = []
    for output, target in zip(outputs.double(), targets, strict=True):

        def of_one(o: Tensor, y: Tensor = target) -> Tensor:
            return loss(o[None], y[None])[0]

        (gradient,) = torch.autograd.grad(of_one(leaf := output.clone().requires_grad_()), leaf)
        gradient = gradient.flatten()
        hessian = torch.autograd.functional.hessian(of_one, output).reshape(len(gradient), -1)
        square = gradient.square().sum()
        found.append((hessian.trace() / square).item() if square > 0 else 0.0)
    return np.array(found)


def record(
    run: Path,
    model: nn.Module,
    loss: Loss,
    step: Callable[..., None],
    *,
    tell: bool,
    n_steps: int = 3,
) -> np.ndarray:
    """What is stored, and beside it what the oracle says of the outputs that the model gave, shape
    (2, row).
    """
    inputs, targets = images(24, 1).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    recorder = Recorder(model, optimizer, run, n_samples=24)
    truth = []
    for t in range(n_steps):
        ids = np.arange(t * N, (t + 1) * N) % 24
        truth.append(oracle(loss, model(inputs[ids]).detach(), targets[ids]))

        def forward(samples: slice, ids: np.ndarray = ids) -> Tensor:
            output, target = model(inputs[ids][samples]), targets[ids][samples]
            if tell:
                recorder.set_loss(loss, output, target)
            return loss(output, target)

        with recorder.step(ids):
            step(forward)
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    return np.stack(
        [hydra_pipe.open_run(run).gradients.curvature(slice(None)), np.concatenate(truth)]
    )


def mean(forward: Callable[[slice], Tensor]) -> None:
    forward(slice(None)).mean().backward()


def total(forward: Callable[[slice], Tensor]) -> None:
    forward(slice(None)).sum().backward()


def in_parts(forward: Callable[[slice], Tensor]) -> None:
    for samples in (slice(0, 3), slice(3, 8)):
        (forward(samples).sum() / N).backward()


@pytest.mark.parametrize(("step", "factor"), [(mean, 1), (total, 1 / N), (in_parts, 1)])
@pytest.mark.parametrize(
    ("loss", "model", "positions"),
    [(cross_entropy, mlp, 1), (yes_or_no, mlp, 4), (by_pixel, pixels, 16)],
)
def test_cross_entropy_is_known_from_its_gradient(
    tmp_path: Path, loss, model, positions, step, factor
) -> None:
    stored, truth = record(tmp_path / "run", model(), loss, step, tell=False)
    np.testing.assert_allclose(stored, truth * factor / positions, rtol=1e-3)


@pytest.mark.parametrize(("step", "factor"), [(mean, 1), (total, 1 / N), (in_parts, 1)])
@pytest.mark.parametrize("loss", [smoothed, weighted, focal, squared, halved, robust, hinge])
def test_any_other_loss_is_known_where_it_is_told(tmp_path: Path, loss, step, factor) -> None:
    stored, truth = record(tmp_path / "run", mlp(), loss, step, tell=True)
    np.testing.assert_allclose(stored, truth * factor, rtol=1e-3, atol=1e-6 * np.abs(truth).max())


@pytest.mark.parametrize("loss", [smoothed, weighted, focal, squared, robust])
def test_a_loss_that_is_not_told_is_taken_for_no_other(tmp_path: Path, loss) -> None:
    stored, _ = record(tmp_path / "run", mlp(), loss, mean, tell=False)
    assert np.isnan(stored).all()
    assert (
        hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]["facts"]["n_curved_rows"]
        == 0
    )


def test_another_loss_than_the_one_told_is_found_out(tmp_path: Path) -> None:
    model, (inputs, targets) = mlp(), images(N, 1).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=N)
    with recorder.step(range(N)):
        output = model(inputs)
        recorder.set_loss(squared, output, targets)
        robust(output, targets).mean().backward()
        optimizer.step()
    recorder.close()
    assert np.isnan(hydra_pipe.open_run(tmp_path / "run").gradients.curvature(slice(None))).all()


def test_a_sample_that_was_seen_twice_has_no_weight(tmp_path: Path) -> None:
    def twice(forward: Callable[[slice], Tensor]) -> None:
        (forward(slice(None)) + forward(slice(None))).mean().backward()

    stored, _ = record(tmp_path / "run", mlp(), cross_entropy, twice, tell=True)
    assert np.isnan(stored).all()


def test_an_output_that_the_loop_writes_over_is_left_out(tmp_path: Path) -> None:
    model, (inputs, targets) = mlp(), images(N, 1).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=N)
    for _ in range(2):
        with recorder.step(range(N)):
            output = model(inputs)
            cross_entropy(output, targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                output.zero_()
    recorder.close()
    # the first step is looked at before the loop goes on
    weights = hydra_pipe.open_run(tmp_path / "run").gradients.curvature(slice(None))
    assert np.isnan(weights).tolist() == [False] * N + [True] * N


def test_a_loss_without_a_second_derivative_has_no_weight(tmp_path: Path) -> None:
    def margin(output: Tensor, target: Tensor) -> Tensor:
        return F.multi_margin_loss(output, target, reduction="none")

    hydra_pipe.record(mlp_pipeline(loss=margin), tmp_path / "run")
    assert np.isnan(hydra_pipe.open_run(tmp_path / "run").gradients.curvature(slice(None))).all()


def test_under_autocast_the_weights_are_right_to_its_rounding(tmp_path: Path) -> None:
    def half(forward: Callable[[slice], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(slice(None)).mean()
        loss.backward()

    stored, truth = record(tmp_path / "run", mlp(), cross_entropy, half, tell=False)
    np.testing.assert_allclose(stored, truth, rtol=0.1)


def test_for_squared_error_the_weighted_fisher_is_the_gauss_newton_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs, targets = torch.randn(N, 5).double(), torch.randn(N).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target) ** 2

    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    recorder = Recorder(
        model,
        optimizer,
        tmp_path / "run",
        n_samples=N,
        encoding="projected",
        dim=100,
        dtype="float32",
    )
    with recorder.step(range(N)):
        output = model(inputs)
        recorder.set_loss(loss, output, targets)
        loss(output, targets).mean().backward()
        optimizer.step()
    recorder.close()
    store = hydra_pipe.open_run(tmp_path / "run").gradients
    assert all(block.encoding == "dense" for block in store.layout.blocks)
    rows = store.rows.features(slice(0, N), slice(0, store.layout.n_features))
    fisher = N * (rows.T * store.curvature(slice(None))) @ rows

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (inputs,))[:, 0]

    jacobians = torch.func.jacrev(outputs)(parameters)
    jacobian = torch.cat([jacobians[name].reshape(N, -1) for name in parameters], dim=1).numpy()
    np.testing.assert_allclose(fisher, 2 / N * jacobian.T @ jacobian, rtol=1e-4, atol=1e-6)


def test_a_loss_that_draws_random_numbers_does_not_change_training(tmp_path: Path) -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return squared(output + 0.1 * torch.randn_like(output), target)

    with_it, without = mlp_pipeline(loss=noisy), mlp_pipeline(loss=noisy)
    hydra_pipe.train(without)
    hydra_pipe.record(with_it, tmp_path / "run")
    for a, b in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert np.isnan(hydra_pipe.open_run(tmp_path / "run").gradients.curvature(slice(None))).all()


def test_an_output_of_many_coordinates_has_an_unbiased_trace() -> None:
    from hydra_pipe.maths.curvature import curvature_weights

    torch.manual_seed(0)
    output, mixing = torch.randn(3, 300), torch.randn(300, 300) / 300

    def quadratic(o: Tensor, y: Tensor) -> Tensor:
        return ((o @ mixing.to(o)) ** 2).sum(1) + (o**2).sum(1)

    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(quadratic(leaf, leaf).mean(), leaf)
    found, _ = curvature_weights(quadratic, output, torch.zeros(3), gradient, 3)
    np.testing.assert_allclose(found, oracle(quadratic, output, torch.zeros(3)), rtol=1e-2)


def test_what_is_told_of_no_training_is_not_kept(tmp_path: Path) -> None:
    model, (inputs, targets) = mlp(), images(N, 1).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=N)
    told = []

    def tell() -> None:
        output = model(inputs)
        recorder.set_loss(squared, output, targets)
        told.append(weakref.ref(output))

    with recorder.step(range(N)):
        cross_entropy(model(inputs), targets).mean().backward()
        optimizer.step()
    with torch.no_grad():
        tell()  # an evaluation by the function that the loop trains with
    recorder.close()
    tell()
    assert [output() for output in told] == [None, None]
    assert recorder._curvature._told == []


def test_outputs_that_are_views_are_counted_with_all_that_they_keep_in_memory() -> None:
    whole = torch.randn(N, 40000, 4)  # 5 MiB, of which 128 bytes are the output
    watch = CurvatureWatch(TargetCheck())
    column = watch.observe([SeenOutput(whole[:, -1], 0, torch.ones(N, 4), 0)], np.arange(N))
    assert not watch._waiting
    assert len(column.losses) == N


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_targets_far_from_zero_do_not_make_another_loss_look_like_squared_error(
    offset: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    target = offset + torch.randn(N, 1, generator=generator)
    output = target + torch.randn(N, 1, generator=generator) / 20

    def weights(loss: Loss) -> np.ndarray:
        leaf = output.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, target).mean(), leaf)
        return curvature_weights(loss, output, target, gradient, N)[0]

    assert not weights(lambda o, y: sums((o - y).abs())).any()  # piecewise linear
    squares = weights(lambda o, y: sums((o - y) ** 2))
    np.testing.assert_allclose(squares, 2 / (4 / N * (output - target)[:, 0] ** 2) / N, rtol=1e-4)
