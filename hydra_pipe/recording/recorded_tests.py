"""The test gradients of a recording, taken at the present parameters.

They are stored with the data that later probes need.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from hydra_pipe.errors import DataError
from hydra_pipe.recording.collectives import Processes
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.datasets import given_batches
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.optimizer_reader import OptimizerReader
from hydra_pipe.recording.recording_stage import RecordingStage
from hydra_pipe.recording.settings import Labels, checked_keys
from hydra_pipe.recording.test_gradients import record_test_gradients
from hydra_pipe.recording.untouched import untouched
from hydra_pipe.store import names
from hydra_pipe.store.data.checkpoints import state_digests
from hydra_pipe.store.data.gradients_writer import GradientsWriter

# Name of the keys of test samples, for messages.
_KEYS = "test_keys"


class TestGradients:
    """Takes test gradients during a recording or at its end, and leaves the training as it was.

    Args:
        model: the module in training.
        parameters: the recorded parameters.
        collector: collector of their gradients.
        updates: reader of the optimiser, whose preconditioner is kept beside the test gradients.
        output: destination of the test gradients.
        processes: processes that record together; the first does the work.
        seed: seed of the order in which a dataset's samples are read.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        collector: Collector,
        updates: OptimizerReader,
        output: RecordingStage,
        processes: Processes,
        seed: int,
    ) -> None:
        self._model, self._parameters, self._collector = model, parameters, collector
        self._updates = updates
        self._output, self._processes, self._seed = output, processes, seed

    def take(
        self,
        n_steps: int,
        tests: Any,
        loss: Any,
        labels: Labels | None,
        keys: Sequence[str] | None,
    ) -> None:
        """Take the gradients of `tests` after `n_steps` steps, and store them. Collective.

        Raises: as `Recorder.record_test`.
        """
        # A parameter that was trained and then frozen still has earlier rows. Its test gradient is
        # multiplied with them.
        frozen = [p for p in self._parameters if not p.requires_grad]
        n_tests, worst = 0, 0.0
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            aside = self._collector.set_aside()
            with (
                self._processes.together(),
                aside,
                untouched(self._model, loss, tests),
                eval_mode(self._model),
            ):
                if self._processes.is_first:
                    n_tests, worst = self._write(n_steps, tests, loss, labels, keys)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        self._output.note_tests(n_steps, n_tests, worst)

    def _write(
        self,
        n_steps: int,
        tests: Any,
        loss: Any,
        labels: Labels | None,
        keys: Sequence[str] | None,
    ) -> tuple[int, float]:
        """Return the number of test samples, and the largest share of a gradient that rows miss."""
        if keys is not None:
            keys = checked_keys(keys, _KEYS)  # refuse bad keys before the work
        elif self._output.has_test_keys:
            raise DataError(
                "the test samples had keys before: give record_test their keys in each call"
            )
        writer = self._writer
        table = writer.test_rows(n_steps, state_digests(self._model))
        try:
            batches, when = given_batches(tests, self._seed), f"after {n_steps} steps"
            n_tests, labels, worst = record_test_gradients(
                self._model, self._collector, table, batches, loss, labels, when
            )
            if keys is not None:
                checked_keys(keys, _KEYS, n_tests, "test samples")
            self._write_preconditioner()
            writer.flush_test(table)
        except BaseException:
            with suppress(Exception):  # report the first error only
                writer.drop_test()
            raise
        if labels is not None:
            self._output.write_labels(names.TEST_LABELS, labels)
        if keys is not None:
            self._output.write_keys(names.TEST_KEYS, keys)
        return n_tests, worst

    def keep_what_probes_need(self, n_steps: int) -> None:
        """Write the data that later probes need. Only the first process calls this.

        These data are test gradients of no sample, with digests of the parameters, and the
        preconditioner.
        """
        table = self._writer.test_rows(n_steps, state_digests(self._model))
        self._write_preconditioner()
        self._writer.flush_test(table)

    @property
    def _writer(self) -> GradientsWriter:
        assert self._output.writer is not None  # made at the first step
        return self._output.writer

    def _write_preconditioner(self) -> None:
        roots, encoder = self._updates.roots(), self._collector.encoder
        if roots is not None and encoder is not None:
            self._writer.write_preconditioner(encoder.preconditioner(roots))
