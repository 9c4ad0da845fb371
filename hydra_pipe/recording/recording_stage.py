"""The record stage on disk: its directory, its store, and its entry in the manifest."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RecordError, RunError
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import Layout
from hydra_pipe.recording.checked_steps import Checked
from hydra_pipe.recording.collectives import Processes
from hydra_pipe.recording.one_process import Pending
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.recording.state import RecorderState, digest, open_to_go_on
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import DynamicsShape
from hydra_pipe.store.data.gradients import Gradients, ResumePoint
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.data.keys import digest_of_keys
from hydra_pipe.store.data.recording import forget_upto
from hydra_pipe.store.files import remove_partials
from hydra_pipe.store.run.locks import Lock
from hydra_pipe.store.run.manifest import COMMITTED, RunDirectory
from hydra_pipe.store.run.stage_runner import Work
from hydra_pipe.store.run.stages import RECORD, Settings
from hydra_pipe.store.zarr.table import Allocate


class RecordingStage:
    """The recording stage of a run: it makes the run directory for the first rows, and writes rows.

    Args:
        path: directory of the run.
        settings: settings of the stage.
        n_groups: parameter groups of the optimiser.
        preconditioned: True if the optimiser has a preconditioner, which is stored beside the rows.
        paced: True if the momentum differs by step and block.
        processes: processes that record together.
        allocate: maker of buffers, passed to `GradientsWriter`.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        n_groups: int,
        *,
        preconditioned: bool,
        paced: bool,
        processes: Processes,
        allocate: Allocate,
    ) -> None:
        self.path = path
        self.writer: GradientsWriter | None = None
        self._settings, self._n_groups, self._preconditioned = settings, n_groups, preconditioned
        self._paced = paced
        self._processes, self._allocate = processes, allocate
        # the run directory with the manifest, which only rank 0 writes
        self._directory: RunDirectory | None = None
        self._run_id: str | None = None
        self._lock: Lock | None = None
        # rows with a known curvature; the largest share of a gradient that rows miss; steps with
        # test gradients
        self._n_curved, self._worst_imbalance = 0, 0.0
        self.tests: list[int] = []
        self.n_tests = 0
        self._n_labels: dict[str, int] = {}
        # digests of the keys that are stored, by the name of their array
        self._keys_written: dict[str, str] = {}

    def of_ranks(self, count: int) -> list[int]:
        """Return the `count` of every rank. Collective."""
        found: list[int] = self._processes.gather([count])[:, 0].astype(int).tolist()
        return found

    def open(self, layout: Layout, dtype: Dtype, dynamics: DynamicsShape) -> GradientsWriter:
        """Return the store, made anew at the first call. Collective.

        Args:
            layout: block directory.
            dtype: dtype of the rows.
            dynamics: sizes of the dynamics of a row. The sizes of rank 0 count.

        Raises:
            UsageError: the ranks chose different dtypes.
            RunError, StoreError: the run or its store cannot be made.
        """
        if self.writer is not None:
            return self.writer
        self._processes.require_same({"dtype": dtype})  # each rank chose its dtype alone
        sizes = self._processes.gather_text(json.dumps(dynamics.to_json()))[0]
        dynamics = DynamicsShape.from_json(json.loads(sizes))
        with self._processes.together():
            if self._processes.is_first:
                self._lock = Lock(self.path, RECORD, take_over=True)
                directory = RunDirectory.open_or_none(self.path)
                if directory is not None:
                    # an unfinished recording too, with its id: its states must not fit the new
                    # recording
                    directory.clear()
                self._directory = directory = RunDirectory.create(self.path)
                directory.begin(RECORD, self._settings)
                self._run_id = directory.run_id
                self.writer = self._part_of_store(layout, dtype, dynamics, directory.run_id)
        self._run_id = self._processes.gather_text(self._run_id or "")[0]
        with self._processes.together():
            self.writer = self.writer or self._part_of_store(layout, dtype, dynamics, self._run_id)
        assert self.writer is not None
        return self.writer

    def _part_of_store(
        self,
        layout: Layout,
        dtype: Dtype,
        dynamics: DynamicsShape,
        run_id: str,
        kept: ResumePoint | None = None,
    ) -> GradientsWriter:
        return GradientsWriter(
            self.path / names.GRADIENTS,
            layout,
            dtype,
            self._n_groups,
            run_id,
            dynamics=dynamics,
            preconditioned=self._preconditioned,
            paced=self._paced,
            rank=self._processes.rank,
            n_ranks=self._processes.size,
            kept=kept,
            allocate=self._allocate,
        )

    def write(
        self,
        writer: GradientsWriter,
        buffer: RowBuffer,
        checked: Checked,
        waiting: Sequence[Pending],
    ) -> None:
        """Write the rows of the checked steps, and their lines of the step tables.

        Raises:
            RunError: a later recorder has taken over the run.
        """
        if self._lock is not None and self._lock.lost:
            raise RunError(
                f"{self.path} is recorded by a later Recorder of this process: use one at a time"
            )
        first_row = writer.rows.n_rows
        buffer.write(checked, writer.rows)
        self._n_curved += sum(
            int(np.isfinite(entry.columns[names.CURVATURE]).sum()) for entry in checked.entries
        )
        imbalance = checked.books.imbalance.max(axis=1)
        self._worst_imbalance = max(self._worst_imbalance, float(imbalance.max()))
        for (loss, values), scalar, worst in zip(
            waiting, checked.books.scalar, imbalance, strict=False
        ):
            found = {
                names.FIRST_ROW: first_row,
                names.GRADIENT_SCALE: scalar,
                names.IMBALANCE: worst,
            }
            writer.append_step({**values, **found, names.LOSS: loss})
            first_row += values[names.N_ROWS]

    def note_tests(self, step: int, n_tests: int, worst_imbalance: float) -> None:
        """Note that rank 0 took test gradients after `step` steps. Collective."""
        self._worst_imbalance = max(self._worst_imbalance, worst_imbalance)
        self.n_tests = self.of_ranks(n_tests)[0]
        self.tests = [s for s in self.tests if s != step] + [step]

    def write_labels(
        self, which: str, labels: Sequence[int] | Sequence[str] | NDArray[Any]
    ) -> None:
        """Store labels, see `GradientsWriter.write_labels`. Only rank 0 calls this."""
        assert self.writer is not None
        self.writer.write_labels(which, labels)
        self._n_labels[which] = len(labels)

    def write_keys(self, which: str, keys: Sequence[str]) -> None:
        """Store keys, see `GradientsWriter.write_keys`. Only rank 0 calls this.

        The same keys again are left as they are: somebody may be reading them.
        """
        assert self.writer is not None
        found = digest_of_keys(keys)
        if self._keys_written.get(which) != found:
            self.writer.write_keys(which, keys)
        self._keys_written[which] = found
        self._n_labels[which] = len(keys)

    @property
    def has_test_keys(self) -> bool:
        """True if keys of the test samples are stored."""
        return names.TEST_KEYS in self._n_labels

    def state(self, n_steps: int, n_skipped: int, meet_every: int | None) -> dict[str, Any]:
        """Put everything on the disk, and return the state of the recording.

        Collective; all ranks get the same state.

        Raises:
            StoreError: writing failed.
        """
        writer = self.writer
        with self._processes.together():
            if writer is not None:
                writer.sync()
        state = RecorderState(
            run_id=self._run_id,
            layout=digest(writer.layout) if writer else None,
            n_steps=n_steps,
            part_rows=self.of_ranks(writer.rows.n_rows if writer else 0),
            curved_rows=self.of_ranks(self._n_curved),
            meet_every=meet_every,
            n_skipped=max(self.of_ranks(n_skipped)),
            worst_imbalance=self._worst_imbalance,
            tests=list(self.tests),
            n_tests=self.n_tests,
            labels=dict(self._n_labels),
        )
        self._commit(state)
        # only rank 0 knows the tests and labels
        found: dict[str, Any] = json.loads(
            self._processes.gather_text(json.dumps(state.to_dict()))[0]
        )
        return found

    def _commit(self, state: RecorderState) -> None:
        """Record in the manifest what is safe on the disk, for readers of the unfinished run.

        Rank 0 does this; on other ranks nothing happens.
        """
        if self._directory is not None:
            parts = {"n_steps": state.n_steps, "part_rows": state.part_rows}
            beside = {
                "tests": state.tests,
                "n_tests": state.n_tests,
                "labels": sorted(state.labels),
            }
            self._directory.stages[RECORD].facts[COMMITTED] = parts | beside
            self._directory.save(RECORD)

    def resume(self, wanted: RecorderState, check: Callable[[Layout, Dtype], None]) -> None:
        """Cut the run down to the rows that `wanted` counts, and resume after them. Collective.

        Args:
            wanted: state to resume from.
            check: function that is called with the layout and the dtype of the run, before anything
                is changed.

        Raises:
            RunError, StoreError: the reasons given at `open_to_go_on`.
        """
        if wanted.run_id is not None:
            with self._processes.together():
                directory, store = open_to_go_on(
                    self.path,
                    wanted,
                    self._settings,
                    n_groups=self._n_groups,
                    preconditioned=self._preconditioned,
                    paced=self._paced,
                )
                dtype = _dtype_of(store)
                check(store.layout, dtype)
                if self._processes.is_first:
                    self._lock = Lock(self.path, RECORD, take_over=True)
                    remove_partials(self.path)
                    # Remove claims from the manifest first, then the data that they claim.
                    directory.begin(RECORD, self._settings)
                    forget_upto(directory, wanted.n_steps)
                    self._directory = directory
            with self._processes.together():
                self.writer = self._part_of_store(
                    store.layout, dtype, store.dynamics_shape, wanted.run_id, wanted.kept
                )
                if self._processes.is_first:
                    self._commit(wanted)
            self._run_id = wanted.run_id
            self._n_curved = wanted.curved_rows[self._processes.rank]
        self._worst_imbalance = wanted.worst_imbalance
        self.tests, self.n_tests, self._n_labels = (
            list(wanted.tests),
            wanted.n_tests,
            dict(wanted.labels),
        )

    def close(self) -> None:
        """Write the contents of the buffers. Raises: StoreError."""
        if self.writer is not None:
            self.writer.close()

    def complete(
        self, close: Callable[[], None], n_steps: int, n_skipped: int, facts: Mapping[str, Any]
    ) -> None:
        """Mark the recording as complete. Collective.

        Args:
            close: function that ends the recording. It is called before the mark, when everything
                to write has been handed over.
            n_steps, n_skipped: numbers of steps taken and skipped.
            facts: further entries for the manifest.

        Raises:
            RecordError: nothing was recorded.
            StoreError: writing failed.
        """
        with self._processes.together():
            if self.writer is None:
                raise RecordError("nothing was recorded: no step was taken")
            if n_steps not in self.tests:
                self.n_tests = 0  # earlier test gradients were taken at other parameters
            # copied: closing always waits for the writer
            rows, stalls = self.writer.rows.n_rows, replace(self.writer.stalls)
            close()
        part_rows, curved, skipped = map(self.of_ranks, (rows, self._n_curved, n_skipped))
        with self._processes.together():
            if self._directory is not None:
                found = {
                    "n_steps": n_steps,
                    "n_skipped": max(skipped),
                    "n_rows": sum(part_rows),
                    "n_curved_rows": sum(curved),
                    "n_tests": self.n_tests,
                    "worst_imbalance": self._worst_imbalance,
                    "stalls": stalls.count,
                    "stalled_seconds": stalls.seconds,
                    "labels": self._n_labels,
                }
                found |= {"rank_rows": part_rows} if len(part_rows) > 1 else {}
                Work(self._directory, RECORD, found | dict(facts)).complete()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def fail(self, error: BaseException) -> None:
        """Mark the recording as failed, if there is one. Not collective."""
        try:
            self._fail(error)
        finally:
            self._unlock()

    def _fail(self, error: BaseException) -> None:
        if (
            self._directory is None
            or self.writer is None
            or (self._lock is not None and self._lock.lost)
        ):
            # nothing was written, or a later recorder has taken the run: leave the directory as it
            # is
            return
        found = {
            "n_steps": self.writer.n_steps_written,
            "error": str(error) or type(error).__name__,
        }
        if self._processes.size == 1:
            found["n_rows"] = self.writer.rows.n_written
        # on a full or read-only disk the stage stays "running", which readers take as unfinished
        # too
        with suppress(OSError):
            self._directory.end(RECORD, "failed", **found)


def _dtype_of(store: Gradients) -> Dtype:
    return cast("Dtype", str(store.rows.dtype))
