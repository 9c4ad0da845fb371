"""Many models trained side by side are each what torch trains by itself."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.optimizers import muon_and_adamw
from support.pipelines import conv_pipeline, cross_entropy, images, mlp_pipeline
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from hydra_pipe import Pipeline
from hydra_pipe.errors import DataError, PipelineError
from hydra_pipe.progress import Progress, Task
from hydra_pipe.retraining.retrainer import AS_GIVEN, HIT, LOSS, Retrainer
from hydra_pipe.training.batches import Samples, epoch_order

Build = Callable[[], Pipeline]


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def double(pipeline: Pipeline) -> Pipeline:
    pipeline.model.double()
    for name in ("train", "test"):
        inputs, targets = getattr(pipeline, name).tensors
        setattr(pipeline, name, TensorDataset(inputs.double(), targets))
    return pipeline


def sgd() -> Pipeline:
    """Nesterov, momentum, dampening, weight decay, two groups, cosine, clipping, a short batch."""
    return double(conv_pipeline())


def adamw() -> Pipeline:
    pipeline = double(mlp_pipeline())
    pipeline.optimizer = torch.optim.AdamW(pipeline.model.parameters(), lr=3e-3, weight_decay=0.1)
    pipeline.scheduler = torch.optim.lr_scheduler.OneCycleLR(
        pipeline.optimizer, 0.02, total_steps=pipeline.n_steps
    )
    return pipeline


def adagrad() -> Pipeline:
    """Its state begins before its first step."""
    model = double(mlp_pipeline()).model
    optimizer = torch.optim.Adagrad(model.parameters(), 0.05, initial_accumulator_value=0.1)
    return double(mlp_pipeline(model=model, optimizer=optimizer))


def nadam() -> Pipeline:
    pipeline = double(mlp_pipeline())
    pipeline.optimizer = torch.optim.NAdam(pipeline.model.parameters(), 0.01, momentum_decay=0.4)
    return pipeline


def muon() -> Pipeline:
    """An update that is not elementwise, beside one that is."""
    pipeline = double(mlp_pipeline())
    pipeline.optimizer = muon_and_adamw([{"params": pipeline.model.parameters()}], lr=0.02)
    pipeline.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(pipeline.optimizer, 10)
    return pipeline


def adafactor() -> Pipeline:
    pipeline = double(mlp_pipeline())
    pipeline.optimizer = torch.optim.Adafactor(pipeline.model.parameters(), 0.1)
    return pipeline


def dropout_and_norm() -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(27, 4),
    ).double()
    return double(
        mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    )


class Branches(nn.Module):
    """Looks at values, which torch.vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.inner(x.flatten(1)))
        return out if out.sum().item() > 0 else 2 * out


def branches() -> Pipeline:
    torch.manual_seed(0)
    model = Branches().double()
    return double(mlp_pipeline(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)))


def trained_by_torch(pipeline: Pipeline, weights: np.ndarray, mean_over: str) -> np.ndarray:
    """The obvious loop: losses of the test samples after training with a weight for each sample."""
    torch.manual_seed(pipeline.seed)
    own = torch.from_numpy(weights)
    for epoch in range(pipeline.epochs):
        for ids, inputs, targets in Samples(pipeline, "train").batches(
            epoch_order(pipeline, epoch), epoch
        ):
            w = own[ids].double()
            losses = w * pipeline.loss(pipeline.model(inputs), targets)
            (
                losses.mean()
                if mean_over == "batch"
                else losses.sum() / (w.sum() if w.any() else 1)
            ).backward()
            if pipeline.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(pipeline.model.parameters(), pipeline.max_grad_norm)
            pipeline.optimizer.step()
            if pipeline.scheduler is not None:
                pipeline.scheduler.step()
            pipeline.model.zero_grad()
    pipeline.model.eval()
    with torch.no_grad():
        inputs, targets = pipeline.test.tensors
        return np.asarray(pipeline.loss(pipeline.model(inputs), targets))


@pytest.mark.parametrize("mean_over", ["batch", "weights"])
@pytest.mark.parametrize(
    "build", [sgd, adamw, adagrad, nadam, muon, adafactor, dropout_and_norm, branches]
)
def test_each_model_of_a_stack_is_what_torch_trains_alone(build: Build, mean_over: str) -> None:
    n = len(build().train)
    weights = np.random.default_rng(0).integers(0, 2, (3, n)).astype(np.float32)
    weights[0] = 1.0
    weights[2] *= 0.5
    pipeline, said = build(), Said()
    retrainer = Retrainer(pipeline, said, mean_over)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    found = retrainer.train(weights, Task())
    assert bool(said.lines) == (build is branches)
    for row, own in zip(found, weights, strict=True):
        np.testing.assert_allclose(row[LOSS], trained_by_torch(build(), own, mean_over), rtol=1e-9)
    assert set(np.unique(found[:, HIT])) <= {0.0, 1.0}
    # the pipeline is as it was, so that the next stack begins where this one did
    assert all(
        torch.equal(value, before[name]) for name, value in pipeline.model.state_dict().items()
    )
    assert pipeline.model.training
    np.testing.assert_array_equal(retrainer.train(weights, Task()), found)


@pytest.mark.parametrize("build", [sgd, branches])
def test_classes_replace_the_targets_of_each_model_alone(build: Build) -> None:
    n = len(build().train)
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (3, n)).astype(np.float32)
    classes = np.where(rng.random((3, n)) < 0.3, rng.integers(0, 4, (3, n)), AS_GIVEN)
    classes[1] = AS_GIVEN
    found = Retrainer(build(), Said(), "weights").train(
        weights, Task(), classes=classes.astype(np.int32)
    )
    for row, own, numbers in zip(found, weights, classes, strict=True):
        pipeline = build()
        inputs, targets = pipeline.train.tensors
        given = torch.where(torch.from_numpy(numbers) < 0, targets, torch.from_numpy(numbers))
        pipeline.train = TensorDataset(inputs, given)
        expected = trained_by_torch(pipeline, own, "weights")
        np.testing.assert_allclose(row[LOSS], expected, rtol=1e-9)


def test_targets_that_are_no_classes_are_not_replaced() -> None:
    pipeline = sgd()
    inputs, targets = pipeline.train.tensors
    pipeline.train = TensorDataset(inputs, targets.double())
    pipeline.loss = lambda output, target: (output[:, 0] - target) ** 2
    n = len(pipeline.train)
    with pytest.raises(DataError, match="not class numbers"):
        Retrainer(pipeline, Progress()).train(
            np.ones((1, n), np.float32), Task(), classes=np.zeros((1, n), np.int32)
        )


class Augmented(Dataset):  # type: ignore[type-arg]
    """Draws noise for each picture."""

    def __init__(self) -> None:
        self.inner = images(24, 1)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.inner[index]
        return (x + 0.1 * torch.randn(x.shape)).double(), y


def test_what_a_dataset_draws_is_what_it_draws_in_the_run() -> None:
    def build() -> Pipeline:
        pipeline = double(mlp_pipeline())
        pipeline.train = Augmented()
        return pipeline

    found = Retrainer(build(), Progress()).train(np.ones((2, 24), np.float32), Task())
    np.testing.assert_allclose(
        found[1, LOSS], trained_by_torch(build(), np.ones(24), "batch"), rtol=1e-9
    )


def test_no_gradient_comes_of_a_batch_of_which_nothing_is_left() -> None:
    pipeline = mlp_pipeline(epochs=1)
    pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), 0.1)
    found = Retrainer(pipeline, Progress(), "weights").train(np.zeros((1, 40), np.float32), Task())
    inputs, targets = pipeline.test.tensors
    with torch.no_grad():
        expected = cross_entropy(pipeline.model(inputs), targets)
    np.testing.assert_allclose(found[0, LOSS], expected, rtol=1e-6)


def test_a_pipeline_that_was_trained_is_refused() -> None:
    pipeline = mlp_pipeline()
    pipeline.model(pipeline.train.tensors[0]).sum().backward()
    pipeline.optimizer.step()
    with pytest.raises(PipelineError, match="trained already: build it anew"):
        Retrainer(pipeline, Progress())
