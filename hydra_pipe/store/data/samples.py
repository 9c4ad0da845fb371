"""The samples that a result is about: their labels, keys, visits, and the losses of the tests."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.recording_counts import Counts
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.types import F32, I64

_VISIT_ROWS = 2**20


class ResultSamples(Protocol):
    """Training samples and test samples of a result. Each method raises StoreError: damaged."""

    @property
    def gradients(self) -> Gradients | None:
        """The recording of the samples. None: the result combines several runs."""

    @property
    def n_samples(self) -> int:
        """Number of training samples."""

    @property
    def n_tests(self) -> int:
        """Number of test samples, with a column or without."""

    def labels(self) -> NDArray[Any] | None:
        """Return the labels of the training samples, int64 or str objects. None: unknown."""

    def keys(self) -> Keys | None:
        """Return the keys of the training samples. None: they have none."""

    def test_labels(self) -> NDArray[Any] | None:
        """Return the labels of the test samples, int64 or str objects. None: unknown."""

    def test_keys(self) -> Keys | None:
        """Return the keys of the test samples. None: they have none."""

    def test_losses(self) -> F32:
        """Return the loss of each test sample, shape (test,), not a number where unknown."""

    def visits(self, progress: Progress) -> I64:
        """Return the number of steps that used each training sample, shape (sample,)."""


@dataclass(frozen=True)
class RecordedSamples:
    """Samples of a recording. See `ResultSamples`.

    Args:
        gradients, counts: the recording, or its first steps.
        tested: test samples of the result.
    """

    gradients: Gradients
    counts: Counts
    tested: WhichTests

    @property
    def n_samples(self) -> int:
        return self.counts.n_samples

    @property
    def n_tests(self) -> int:
        return self.counts.n_tests if self.tested.probe is None else len(self.test_losses())

    def labels(self) -> NDArray[Any] | None:
        return self.gradients.labels(names.TRAIN_LABELS)

    def keys(self) -> Keys | None:
        return self.gradients.keys(names.TRAIN_KEYS)

    def test_labels(self) -> NDArray[Any] | None:
        return self.tested.labels(self.gradients)

    def test_keys(self) -> Keys | None:
        return self.tested.keys(self.gradients)

    def test_losses(self) -> F32:
        if self.tested.probe is None and not self.counts.n_tests:
            return np.zeros(0, np.float32)
        return self.tested.losses(self.gradients)

    def visits(self, progress: Progress) -> I64:
        visits = np.zeros(self.counts.n_samples, np.int64)
        n_rows = self.gradients.rows.n_rows
        with progress.task("visits", n_rows, "rows") as task:
            for first in range(0, n_rows, _VISIT_ROWS):
                samples = self.gradients.samples(slice(first, first + _VISIT_ROWS))
                check_within(samples, len(visits), f"samples of {self.gradients.path}")
                visits += np.bincount(samples, minlength=len(visits))
                task.advance(len(samples))
        return visits
