"""The batches that a pipeline is trained and tested on: their samples and their order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Task
from hydra_pipe.recording.datasets import Batch, Batches, batches_of
from hydra_pipe.streams import Stream
from hydra_pipe.training.checkpointing import Checkpoints
from hydra_pipe.training.pipeline import Pipeline


def epoch_order(pipeline: Pipeline, epoch: int) -> list[NDArray[np.int64]]:
    """Return the batches of sample ids of one epoch.

    The order is a function of (seed, epoch) alone, so the order of any epoch can be computed again.
    """
    generator = np.random.default_rng([pipeline.seed, epoch])
    return batches_of(generator.permutation(len(pipeline.train)), pipeline.batch_size)


def test_batches(
    pipeline: Pipeline, task: Task, checkpoints: Checkpoints | None
) -> Stream[tuple[Any, Any]]:
    """Yield the test set in order, in batches of the pipeline's size. The caller closes the stream.

    Raises:
        InterruptedRunError: during iteration, if `checkpoints` asks to stop.
    """
    batches = Samples(pipeline, "test").batches(
        batches_of(np.arange(len(pipeline.test)), pipeline.batch_size)
    )
    return Stream(_heeding(batches, task, checkpoints), batches.close)


def _heeding(
    batches: Stream[Batch], task: Task, checkpoints: Checkpoints | None
) -> Iterator[tuple[Any, Any]]:
    for ids, inputs, targets in batches:
        if checkpoints is not None:
            checkpoints.raise_if_stopped()
        yield inputs, targets
        task.advance(len(ids))


class Samples(Batches):
    """Batches of one of a pipeline's datasets, "train" or "test"."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        is_train = name == "train"
        key = pipeline.seed, int(is_train)
        super().__init__(
            pipeline.train if is_train else pipeline.test,
            name,
            key,
            pipeline.num_workers,
            alike=is_train,
        )
