"""The training run that a user's pipeline file returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import DataError, PipelineError
from hydra_pipe.recording.settings import checked_keys, checked_labels, setting_of_keys
from hydra_pipe.store import names


@dataclass
class Pipeline:
    """A training run that hydra-pipe can repeat, record and explain.

    Args:
        model: the network, trained in place.
        optimizer: torch.optim.SGD, Adam, AdamW or another that is known (docs/optimiser.md), over
            the model's parameters.
        loss: (output, target) -> one loss per sample, shape (batch,).
        train: map-style dataset of (input, target) pairs, or of mappings with the targets under
            "labels" or a similar key. Its indices are the sample ids. An input is a tensor, or a
            tuple or mapping of the model's arguments.
        test: dataset of test samples, in the same form as `train`. Its indices are the test ids.
            None: no test gradients are taken; `hydra_pipe.probe` can take some later.
        batch_size: samples a step. The last step of an epoch takes the remaining samples.
        epochs: passes over `train`.
        seed: seed of the order of the batches, and of dropout and other random layers.
        scheduler: learning-rate scheduler, stepped once after each optimiser step.
        max_grad_norm: norm to which the gradient is clipped before each step, by
            `torch.nn.utils.clip_grad_norm_`.
        sample_labels: a label, integer or string, for each training sample; taken from integer
            targets if absent.
        test_labels: a label for each test sample, in the same form.
        sample_keys, test_keys: a string for each sample that names no other one, such as a path,
            the id of a document, or a hash. Tables have the keys beside the ids.
        num_workers: number of processes that fetch batches, as in torch's DataLoader; 0: this
            process fetches them. A dataset may draw from the global generators of Python, NumPy and
            torch. Its draws are a function of the seed, the epoch and the batch, whatever the
            number of workers.
        true_labels: the correct label of each training sample, if known. Only `evaluate ... noise`
            uses them, not the training.
        render: function that shows a person an input, for `report` only, not for the training. It
            returns an image (a Pillow image, or an array or tensor of shape (height, width) or with
            1, 3 or 4 channels first or last), a str, or a mapping of column name to value. If
            absent, an input is drawn by its kind (docs/report.md).

    Raises:
        PipelineError: a field is of the wrong kind; the message names it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Any], Tensor]
    train: Any
    test: Any
    batch_size: int
    epochs: int
    seed: int = 0
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    max_grad_norm: float | None = None
    sample_labels: Sequence[int] | Sequence[str] | None = None
    test_labels: Sequence[int] | Sequence[str] | None = None
    sample_keys: Sequence[str] | None = None
    test_keys: Sequence[str] | None = None
    num_workers: int = 0
    true_labels: Sequence[int] | Sequence[str] | None = None
    render: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.model, nn.Module), "model", self.model, "a torch.nn.Module")
        _require(
            isinstance(self.optimizer, torch.optim.Optimizer),
            "optimizer",
            self.optimizer,
            "a torch.optim.Optimizer",
        )
        _require(
            callable(self.loss),
            "loss",
            self.loss,
            "a function (output, target) -> losses of shape (batch,)",
        )
        is_render = self.render is None or callable(self.render)
        _require(
            is_render,
            "render",
            self.render,
            "a function of an input that returns an image, a str or a mapping",
        )
        check_dataset("the pipeline's train dataset", self.train)
        if self.test is not None:
            check_dataset("the pipeline's test dataset", self.test)
        for name, number in (("batch_size", self.batch_size), ("epochs", self.epochs)):
            _require(isinstance(number, int) and number > 0, name, number, "a positive integer")
        workers = self.num_workers
        _require(
            isinstance(workers, int) and workers >= 0,
            "num_workers",
            workers,
            "0 or a positive integer",
        )
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise PipelineError(
                "the pipeline's scheduler is ReduceLROnPlateau, which needs a metric: use one "
                "that counts steps"
            )
        for name, check, of_samples, dataset in (
            ("sample_labels", checked_labels, self.sample_labels, self.train),
            ("test_labels", checked_labels, self.test_labels, self.test),
            ("true_labels", checked_labels, self.true_labels, self.train),
            ("sample_keys", checked_keys, self.sample_keys, self.train),
            ("test_keys", checked_keys, self.test_keys, self.test),
        ):
            if of_samples is None:
                continue
            try:
                check(of_samples, f"the pipeline's {name}", 0 if dataset is None else len(dataset))
            except DataError as error:
                raise PipelineError(str(error)) from error

    @property
    def n_steps(self) -> int:
        """Number of optimiser steps of the whole run."""
        return self.epochs * -(-len(self.train) // self.batch_size)


def check_dataset(what: str, dataset: Any) -> None:
    """Refuse a dataset that is not map-style, and an empty one. Raises: PipelineError."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise PipelineError(
            f"{what} is {type(dataset).__name__} {dataset!r:.60}: it must be a map-style dataset "
            "with __getitem__ and __len__"
        )
    if len(dataset) == 0:
        raise PipelineError(f"{what} is empty: give it at least one (input, target)")


def described(pipeline: Pipeline) -> dict[str, Any]:
    """Describe a pipeline in plain values. A different description means a different run."""
    plain = (int, float, bool, str)
    groups = [
        {name: value for name, value in group.items() if isinstance(value, plain)}
        for group in pipeline.optimizer.param_groups
    ]
    return {
        "epochs": pipeline.epochs,
        "batch_size": pipeline.batch_size,
        "max_grad_norm": pipeline.max_grad_norm,
        "n_tests": 0 if pipeline.test is None else len(pipeline.test),
        "optimizer": {"type": type(pipeline.optimizer).__name__, "groups": groups},
        "scheduler": type(pipeline.scheduler).__name__ if pipeline.scheduler is not None else None,
        "parameters": {name: list(p.shape) for name, p in pipeline.model.named_parameters()},
    } | setting_of_keys(names.TEST_KEYS_GIVEN, pipeline.test_keys)


def _require(condition: bool, name: str, value: object, kind: str) -> None:
    if not condition:
        raise PipelineError(
            f"the pipeline's {name} is {type(value).__name__} {value!r:.60}: it must be {kind}"
        )
