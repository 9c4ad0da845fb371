"""Agreement of several ranks on their steps.

All ranks meet after the same steps, and never in between. A rank holds an error until all ranks
meet. If the rank raised the error at once, the others would wait for it in the middle of a backward
pass. The meetings depend on the number of steps alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from hydra_pipe.errors import HydraError, RecordError
from hydra_pipe.maths.gradient_check import Balance
from hydra_pipe.recording.checked_steps import Checked
from hydra_pipe.recording.collectives import Collectives, Processes
from hydra_pipe.recording.one_process import OneProcess, Pending, without_step
from hydra_pipe.recording.row_buffer import BUFFER_STEPS, RowBuffer
from hydra_pipe.store import names
from hydra_pipe.types import F64

# outcome of a step
_RECORDED, _NOT_TAKEN, _OVERFLOWED, _FAILED, _NONE = 0.0, 1.0, 2.0, 3.0, 4.0
# relative difference between the scalars of the same gradients on ranks that round differently
_SCALAR_TOLERANCE = 1e-6


class ManyProcesses:
    """Steps since the last meeting of the ranks, and the error that this rank holds.

    Args:
        ranks: ranks that record together.
    """

    flushes_at_will = False

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._outcomes: list[float] = []
        self._n_steps = 0
        # The ranks meet after every step until a step is recorded. The size of this step tells how
        # many steps fit into a row buffer.
        self._interval = 1
        self._n_recorded = 0
        self.held: HydraError | None = None
        self.n_skipped = 0

    @property
    def interval(self) -> int:
        """Number of steps after which the ranks meet."""
        return self._interval

    def resume(self, n_recorded: int, interval: int | None) -> None:
        """Resume after `n_recorded` steps, with a meeting every `interval` steps.

        Args:
            n_recorded: number of steps that the ranks have recorded.
            interval: number of steps after which the ranks meet; None if they have not agreed yet.
        """
        if interval is not None:
            self._n_recorded, self._interval = n_recorded, interval

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold an error of the block until the ranks meet. Only the first error is raised."""
        try:
            yield
        except HydraError as error:
            self.held = self.held or error

    def guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return `hook` with its errors held until the ranks meet.

        The other ranks may be waiting for this pass to go on.
        """

        def guarded(*args: Any) -> Any:
            try:
                return hook(*args)
            except HydraError as error:
                self.held = self.held or error
                return None

        return guarded

    def end_step(self, step: int, *, taken: bool, left_out: bool) -> bool:
        """Note the outcome of a step.

        Args:
            step: number of the step on this rank.
            taken: True if the optimiser took the step.
            left_out: True if this rank saw that the step was left out on purpose.

        Returns:
            True if the ranks have to meet now.
        """
        self._n_steps += 1
        outcome = (
            _FAILED
            if self.held
            else _RECORDED
            if taken
            else _OVERFLOWED
            if left_out
            else _NOT_TAKEN
        )
        self._outcomes.append(outcome)
        return len(self._outcomes) >= self._interval

    def synchronize(
        self, buffer: RowBuffer | None, pending: Sequence[Pending]
    ) -> tuple[Checked | None, list[Pending], HydraError | None]:
        """Agree on the waiting steps. All ranks call this together.

        Args:
            buffer: rows of the waiting steps; None if there are none.
            pending: loss of each step, and the other values of its line in the step tables.

        Returns:
            The steps to write, the same on every rank; their `pending`, with losses averaged over
            the ranks; and the error that every rank raises after the steps are written, or None.

        Raises:
            RecordError: the ranks are not recording the same run.
        """
        finite = buffer.check_finite(names.SAMPLE) if buffer is not None and pending else None
        outcomes, self._outcomes = self._outcomes, []
        recorded = [k for k, outcome in enumerate(outcomes) if outcome == _RECORDED]
        if finite is not None and finite.error is not None and len(finite.entries) < len(recorded):
            outcomes[recorded[len(finite.entries)]] = _FAILED
            self.held = finite.error  # this error is of an earlier step than the held one
        of_ranks, limits = self._exchange(outcomes, finite.limits if finite is not None else [])
        n_good, error = self._judge(of_ranks)
        if n_good == 0 or buffer is None or finite is None:
            return None, [], error
        if self._n_recorded == 0:
            self._agree_on_layout(buffer, finite.largest_batch)
        checked = buffer.check_gradient(finite.with_limits(limits), n_good, self._ranks)
        scalars, imbalance, off = self._compare(checked, pending[:n_good])
        n_good = len(scalars)
        if n_good == 0:
            return None, [], off
        self._n_recorded += n_good
        losses = self._ranks.mean(np.array([loss for loss, _ in pending[:n_good]])).tolist()
        agreed = replace(
            checked,
            entries=checked.entries[:n_good],
            books=Balance(scalars / self._ranks.size, imbalance),
            error=None,
        )
        return (
            agreed,
            [(loss, values) for loss, (_, values) in zip(losses, pending, strict=False)],
            off or error,
        )

    def _exchange(self, outcomes: list[float], limits: list[float]) -> tuple[F64, list[float]]:
        """Exchange the outcomes and the limits of the ranks.

        Args:
            outcomes: outcomes of the waiting steps on this rank.
            limits: limit of the books of each step on this rank.

        Returns:
            The outcomes of all ranks, shape (rank, step + 1), float64. The last column tells
            whether a rank holds an error. And for each step the widest limit of the books over the
            ranks.
        """
        held = _FAILED if self.held else _NONE
        own = [float(self._n_steps), *_padded(outcomes, _NONE), held, *_padded(limits, 0.0)]
        found = self._ranks.gather(own)
        if len(set(found[:, 0])) > 1:
            steps = ", ".join(f"{int(n)} on rank {rank}" for rank, n in enumerate(found[:, 0]))
            raise RecordError(
                f"the ranks have taken different numbers of steps ({steps}): give each rank as "
                "many batches"
            )
        return found[:, 1 : BUFFER_STEPS + 2], found[:, BUFFER_STEPS + 2 :].max(axis=0).tolist()

    def _judge(self, of_ranks: F64) -> tuple[int, HydraError | None]:
        """Count the steps that every rank recorded, before the first step that some rank did not.

        Args:
            of_ranks: outcomes of all ranks, shape (rank, step + 1).

        Returns:
            The number of steps, and the error of the step that failed or None.
        """
        n_good = 0
        for of_step in of_ranks.T:
            kinds = set(of_step.tolist()) - {_NONE}
            step = self._n_recorded + n_good
            if _FAILED in kinds:
                return n_good, self._ranks.first_error(
                    self.held, int((of_step == _FAILED).argmax())
                )
            if kinds == {_RECORDED}:
                n_good += 1
            elif _RECORDED in kinds:
                idle = int((of_step != _RECORDED).argmax())
                return n_good, RecordError(
                    f"rank {idle} left out optimizer.step() at step {step}, others did not: all "
                    "ranks must do the same"
                )
            elif _OVERFLOWED in kinds:
                self.n_skipped += 1
            elif kinds:
                return n_good, without_step(step)
        return n_good, None

    def _agree_on_layout(self, buffer: RowBuffer, batch: int) -> None:
        texts = self._ranks.gather_text(
            json.dumps([buffer.layout.to_json(), buffer.capacity(batch)])
        )
        found = [json.loads(text) for text in texts]
        for rank, (layout, _) in enumerate(found):
            if layout != found[0][0]:
                raise RecordError(_unlike_layouts(found[0][0], layout, rank))
        self._interval = max(1, min(capacity for _, capacity in found))

    def _compare(
        self, checked: Checked, pending: Sequence[Pending]
    ) -> tuple[F64, F64, HydraError | None]:
        """Compare the books and the step tables of the ranks.

        Args:
            checked: checked steps of this rank.
            pending: loss of each step, and the other values of its line in the step tables.

        Returns:
            The scalars, shape (step,), and the imbalances, shape (step, 1), of the steps whose
            books balance on all ranks. And the error of the next step, or None.

        Raises:
            RecordError: the ranks differ in their settings, or in the scale of their gradients.
        """
        table = json.dumps(
            [{k: v for k, v in values.items() if k != names.N_ROWS} for _, values in pending]
        )
        # 48 bits, which a float holds
        digest = float(int.from_bytes(hashlib.sha256(table.encode()).digest()[:6], "big"))
        scalars, imbalance = checked.books.scalar, checked.books.imbalance.max(axis=1)
        padded = [*_padded(scalars.tolist(), 0.0), *_padded(imbalance.tolist(), 0.0)]
        found = self._ranks.gather([float(len(scalars)), digest, *padded])
        if len(set(found[:, 1])) > 1:
            raise RecordError(
                _unlike_settings(
                    [json.loads(text) for text in self._ranks.gather_text(table)], self._n_recorded
                )
            )
        n_good = int(found[:, 0].min())
        of_ranks, worst = (
            found[:, 2 : n_good + 2],
            found[:, BUFFER_STEPS + 2 : BUFFER_STEPS + n_good + 2].max(axis=0),
        )
        unlike = np.argwhere(~np.isclose(of_ranks, of_ranks[0], rtol=_SCALAR_TOLERANCE, atol=0.0))
        if unlike.size:
            rank, step = unlike[unlike[:, 1].argmin()]
            raise RecordError(
                f"at step {self._n_recorded + step} the gradient in use is "
                f"{of_ranks[rank, step]:.6g} times the mean over the "
                f"ranks on rank {rank} and {of_ranks[0, step]:.6g} times on rank 0: clip and "
                "scale it alike on all ranks"
            )
        error: HydraError | None = None
        if n_good < len(pending):
            off = found[:, 0] == n_good
            error = (
                checked.error
                if off.all()
                else self._ranks.first_error(checked.error, int(off.argmax()))
            )
        return of_ranks[0], worst[:, None], error


StepSync = OneProcess | ManyProcesses


def steps_of(processes: Processes) -> StepSync:
    """Return the agreement of `processes` on their steps."""
    return ManyProcesses(processes) if isinstance(processes, Collectives) else OneProcess()


def _padded(values: list[float], filler: float) -> list[float]:
    return values + [filler] * (BUFFER_STEPS - len(values))


def _unlike_layouts(first: dict[str, Any], other: dict[str, Any], rank: int) -> str:
    pairs = zip(first["blocks"], other["blocks"], strict=False)
    nothing: dict[str, Any] = {}
    mine, theirs = next(((a, b) for a, b in pairs if a != b), (nothing, nothing))
    return (
        f"{mine.get('name')} is recorded as {mine.get('encoding')} in columns "
        f"{mine.get('columns')} on rank 0 and as "
        f"{theirs.get('encoding')} in {theirs.get('columns')} on rank {rank}: the ranks must "
        "have the same model and "
        f"use it in the same way in the first step, by calling its modules"
    )


def _unlike_settings(tables: list[list[dict[str, Any]]], first_step: int) -> str:
    for rank, table in enumerate(tables):
        for step, (mine, theirs) in enumerate(zip(tables[0], table, strict=True)):
            for name, value in mine.items():
                if theirs[name] != value:
                    return (
                        f"{name} is {value} on rank 0 and {theirs[name]} on rank {rank} at step "
                        f"{first_step + step}: the "
                        f"optimizers of all ranks must have the same settings at every step"
                    )
    return "the optimizers of the ranks differ"
