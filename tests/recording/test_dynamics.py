"""The dynamics of a recording against plain training: logits, last inputs, losses and targets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recordings import arrays
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import StoreError
from hydra_pipe.recording.dynamics import projection
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import TOP, DynamicsShape
from hydra_pipe.store.data.gradients import Gradients

N, BATCH, EPOCHS = 24, 6, 2
EVERYTHING = slice(0, N * EPOCHS)


def data(n_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 8, generator=generator)
    return x, torch.randint(0, n_classes, (N,), generator=generator)


def network(width: int, n_classes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, n_classes))


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [ids for _ in range(EPOCHS) for ids in np.split(rng.permutation(N), N // BATCH)]


def trained(
    path: Path,
    width: int,
    n_classes: int,
    *,
    micro: int = 1,
    adam: bool = False,
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
) -> tuple[Gradients, dict[str, np.ndarray]]:
    """A recorded run, and what a training without a recorder thought at the same visits."""
    found = {}
    for recorded in (False, True):
        x, y = data(n_classes)
        model = network(width, n_classes)
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.05)
        recorder = Recorder(model, optimizer, path, N) if recorded else None
        thought: dict[str, list[Tensor]] = {"logits": [], "inputs": [], "loss": []}
        for ids in batches():
            optimizer.zero_grad()
            if recorder is not None:
                with recorder.step(ids):
                    for part in np.split(ids, micro):
                        (F.cross_entropy(forward(model, x[part]), y[part]) / micro).backward()
                    optimizer.step()
                continue
            with torch.no_grad():
                thought["logits"].append(model(x[ids]))
                thought["inputs"].append(model[1](model[0](x[ids])))
                thought["loss"].append(F.cross_entropy(model(x[ids]), y[ids], reduction="none"))
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
        if recorder is not None:
            recorder.close()
        else:
            found = {name: torch.cat(values).numpy() for name, values in thought.items()}
            found["target"] = y[np.concatenate(batches())].numpy()
    assert hydra_pipe.verify(path) == []
    return Gradients(path / names.GRADIENTS), found


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("width", [12, 40])
def test_each_row_has_what_the_network_thought_of_its_sample(
    tmp_path: Path, width: int, micro: int, adam: bool
) -> None:
    store, expected = trained(tmp_path / "run", width, 5, micro=micro, adam=adam)
    assert store.dynamics_shape == DynamicsShape(5, min(width, 32))
    inputs = (
        expected["inputs"] if width <= 32 else expected["inputs"] @ projection(0, width).numpy()
    )
    for name, values in (
        (names.LOGITS, expected["logits"]),
        (names.LAST_INPUT, inputs),
        (names.LOSS, expected["loss"]),
    ):
        found = store.row_dynamics(name, EVERYTHING)
        np.testing.assert_allclose(found, values, rtol=2e-3, atol=2e-3, err_msg=name)
    assert (store.row_dynamics(names.TARGET, EVERYTHING) == expected["target"]).all()
    of_steps = expected["loss"].reshape(-1, BATCH).mean(axis=1)
    np.testing.assert_allclose(store.step_table(names.LOSS), of_steps, rtol=1e-5)


def test_of_many_classes_the_labels_logit_the_largest_and_their_sum_are_kept(
    tmp_path: Path,
) -> None:
    store, expected = trained(tmp_path / "run", 16, 70)
    logits = expected["logits"]
    found = store.row_dynamics(names.LOGITS, EVERYTHING).astype(np.float64)
    own = logits[np.arange(len(logits)), expected["target"]]
    order = np.argsort(-logits, axis=1)[:, :TOP]
    np.testing.assert_allclose(found[:, 0], own, atol=2e-3)
    np.testing.assert_allclose(found[:, 1], np.log(np.exp(logits).sum(axis=1)), atol=5e-3)
    np.testing.assert_allclose(found[:, 2:], np.take_along_axis(logits, order, 1), atol=2e-3)
    assert (store.row_dynamics(names.TOP_CLASSES, EVERYTHING) == order).all()


def test_the_inputs_of_a_head_that_ends_in_a_log_softmax_are_kept(tmp_path: Path) -> None:
    x, y = data(5)
    model = nn.Sequential(*network(12, 5), nn.LogSoftmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, optimizer, tmp_path / "run", N) as recorder, recorder.step(range(N)):
        expected = model[:2](x).detach()
        F.nll_loss(model(x), y).backward()
        optimizer.step()
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    found = store.row_dynamics(names.LAST_INPUT, slice(0, N))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_rows_that_are_mixed_are_of_no_sample_alone(tmp_path: Path) -> None:
    x, y = data(5)
    model = network(12, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = np.roll(np.arange(N), 1)
    with Recorder(model, optimizer, tmp_path / "run", N) as recorder, recorder.step(range(N)):
        recorder.mixed(order, 0.7)
        out = model(0.7 * x + 0.3 * x[order])
        (0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y[order])).backward()
        optimizer.step()
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    rows = slice(0, 2 * N)
    for name in (names.LOGITS, names.LAST_INPUT, names.LOSS):
        assert np.isnan(store.row_dynamics(name, rows)).all(), name
    assert (store.row_dynamics(names.TARGET, rows) == -1).all()


def test_of_a_regression_the_outputs_are_kept_and_no_target_is_known(tmp_path: Path) -> None:
    x, _ = data(5)
    model = network(12, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, optimizer, tmp_path / "run", N) as recorder, recorder.step(range(N)):
        expected = model(x)
        expected.pow(2).mean().backward()
        optimizer.step()
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    found = store.row_dynamics(names.LOGITS, slice(0, N))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3, atol=1e-3)
    assert np.isnan(store.row_dynamics(names.LOSS, slice(0, N))).all()
    assert (store.row_dynamics(names.TARGET, slice(0, N)) == -1).all()


def test_of_tokens_the_mean_loss_of_a_text_is_kept_and_no_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (N, 7))
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, optimizer, tmp_path / "run", N) as recorder, recorder.step(range(N)):
        out = model(tokens)[:, :-1].transpose(1, 2)
        expected = F.cross_entropy(out, tokens[:, 1:], reduction="none").mean(1)
        expected.mean().backward()
        optimizer.step()
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    assert store.dynamics_shape == DynamicsShape()
    found = store.row_dynamics(names.LOSS, slice(0, N))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)


def test_dynamics_survive_pruning(tmp_path: Path) -> None:
    x, y = data(5)
    model = network(12, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, optimizer, tmp_path / "run", N) as recorder:
        with recorder.step(range(N)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        recorder.record_test([(x[:4], y[:4])], F.cross_entropy)
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    before = {c.name: store.row_dynamics(c.name, slice(0, N)) for c in store.dynamics_shape.columns}
    hydra_pipe.reduce(tmp_path / "run", keep_hypergradients=True, method="hydra")
    assert hydra_pipe.prune(tmp_path / "run") > 0
    store = Gradients(tmp_path / "run" / names.GRADIENTS)
    for name, values in before.items():
        np.testing.assert_array_equal(store.row_dynamics(name, slice(0, N)), values)
    assert hydra_pipe.verify(tmp_path / "run") == []


@pytest.mark.parametrize("sizes", [None, {"n_outputs": 5}, {"n_outputs": -1, "n_inputs": 3}, 7])
def test_a_store_without_the_sizes_of_its_dynamics_is_damaged(
    tmp_path: Path, sizes: object
) -> None:
    import json

    trained(tmp_path / "run", 12, 5)
    file = tmp_path / "run" / names.GRADIENTS / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"][names.DYNAMICS] = sizes
    file.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="no sizes of the dynamics"):
        Gradients(tmp_path / "run" / names.GRADIENTS)


def test_the_projection_keeps_inner_products_on_average() -> None:
    """Over seeds: mean of (x S) . (y S) is x . y, and its variance that of random signs."""
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = np.array(
        [float((x @ s) @ (y @ s)) for s in (projection(k, 50).double() for k in range(2000))]
    )
    expected = float(x @ y)
    theory = float((x @ x) * (y @ y) + expected**2 - 2 * (x**2 * y**2).sum()) / 32
    assert abs(found.mean() - expected) < 4 * np.sqrt(theory / len(found))
    assert found.var() == pytest.approx(theory, rel=0.15)


@pytest.mark.parametrize("n_classes", [5, 70])
def test_the_data_frame_has_each_visit(tmp_path: Path, n_classes: int) -> None:
    _, expected = trained(tmp_path / "run", 16, n_classes)
    frame = hydra_pipe.open_run(tmp_path / "run").dynamics()
    p = np.exp(expected["logits"]) / np.exp(expected["logits"]).sum(axis=1, keepdims=True)
    assert (frame["train_id"] == np.concatenate(batches())).all()
    assert (frame["step"] == np.repeat(np.arange(len(batches())), BATCH)).all()
    assert (frame["predicted"] == p.argmax(axis=1)).all()
    assert (frame["target"] == expected["target"]).all()
    np.testing.assert_allclose(frame["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(frame["confidence"], p.max(axis=1), rtol=1e-2)
    own = p[np.arange(len(p)), expected["target"]]
    np.testing.assert_allclose(frame["label_confidence"], own, rtol=1e-2)


def test_steps_that_are_written_under_autocast_are_those_written_outside(tmp_path: Path) -> None:
    found = {}
    for name in ("usual", "cast"):
        model = network(36, 4)  # inputs of the head are projected
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = data(4)
        recorder = Recorder(model, optimizer, tmp_path / name, n_samples=N)
        for _ in range(3):
            with recorder.step(np.arange(N)):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "cast"):
            recorder.close()
        found[name] = arrays(tmp_path / name)
    for name, values in found["usual"].items():
        np.testing.assert_array_equal(found["cast"][name], values, err_msg=name)
