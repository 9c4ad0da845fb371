"""The recorder's state in the user's own checkpoint, and the checks of a run before a resume."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hydra_pipe.errors import RecordError, RunError
from hydra_pipe.plan.layout import Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients, ResumePoint
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, Settings

# version of the fields of a state and of their meaning
STATE_VERSION = 1


@dataclass(frozen=True)
class RecorderState:
    """The state of a recording between two steps.

    It has plain values only, so that `torch.load(weights_only=True)` reads it.

    Args:
        run_id: id of the run; None if nothing was recorded yet.
        layout: SHA-256 of the block directory; None if nothing was recorded yet.
        n_steps, n_skipped: numbers of steps taken and skipped so far.
        part_rows, curved_rows: rows of each rank so far, and rows of each rank with a known
            curvature.
        meet_every: number of steps after which the ranks meet; None if one process records.
        worst_imbalance: largest imbalance so far.
        tests: steps after which test gradients were taken.
        n_tests: test samples at the last of these steps, 0 if there is none.
        labels: lengths of the arrays of labels and keys that are written, by name.
    """

    run_id: str | None
    layout: str | None
    n_steps: int
    part_rows: list[int]
    curved_rows: list[int]
    meet_every: int | None
    n_skipped: int
    worst_imbalance: float
    tests: list[int]
    n_tests: int
    labels: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a dict for a checkpoint."""
        return {"hydra_pipe_state": STATE_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "RecorderState":
        """Read a state from a checkpoint's dict.

        Raises:
            RecordError: not a value of `Recorder.state_dict`, or from a newer version.
        """
        version = state.get("hydra_pipe_state") if isinstance(state, Mapping) else None
        wanted = {field.name for field in fields(cls)}
        if not isinstance(version, int) or (
            version == STATE_VERSION and set(state) != {"hydra_pipe_state", *wanted}
        ):
            raise RecordError(
                "this is no value of recorder.state_dict(): put that value into the checkpoint "
                "as it is"
            )
        if version != STATE_VERSION:
            raise RecordError(
                f"the state is of version {version}, this hydra-pipe reads {STATE_VERSION}: "
                "upgrade hydra-pipe"
            )
        return cls(**{name: state[name] for name in wanted})

    @property
    def kept(self) -> ResumePoint:
        """The part of the store that the state counts."""
        return ResumePoint(self.part_rows, self.n_steps, self.tests, list(self.labels))


def digest(layout: Layout) -> str:
    """Return the SHA-256 of a block directory."""
    return hashlib.sha256(json.dumps(layout.to_json(), sort_keys=True).encode()).hexdigest()


def open_to_go_on(
    path: str | os.PathLike[str],
    state: RecorderState,
    settings: Settings,
    *,
    n_groups: int,
    preconditioned: bool,
    paced: bool,
) -> tuple[RunDirectory, Gradients]:
    """Open the run at `path`, if it is the run of `state` and has all its rows. Write nothing.

    Raises:
        RunError: no run, another run, a finished one, or one with other settings or another
            optimizer.
        StoreError: the run is damaged, or lacks rows.
    """
    directory = RunDirectory.open(path)
    if directory.run_id != state.run_id:
        raise RunError(
            f"{path} holds run {directory.run_id}, the state is of run {state.run_id}: the "
            "directory was recorded again since, or is another one. Give the right one, or start "
            "again without the state"
        )
    if not directory.has_work(RECORD, settings):
        raise RunError(f"{path} is recorded completely: there is nothing to resume")
    store = Gradients(directory.path / names.GRADIENTS)
    if store.run_id != state.run_id or digest(store.layout) != state.layout:
        raise RunError(
            f"{store.path} was replaced since the state was taken: start again without the state"
        )
    if store.n_ranks != len(state.part_rows):
        raise RunError(
            f"{path} was recorded by {store.n_ranks} processes, the state counts "
            f"{len(state.part_rows)}: load the state of this run"
        )
    then = store.n_groups, store.preconditioned, store.paced
    if then != (n_groups, preconditioned, paced):
        raise RunError(
            f"{path} was recorded with {_kind(*then)}; the optimizer has "
            f"{_kind(n_groups, preconditioned, paced)}: build the optimizer as it was"
        )
    store.check_kept(state.kept)
    return directory, store


def _kind(n_groups: int, preconditioned: bool, paced: bool) -> str:
    what = "with a preconditioner" if preconditioned else "without a preconditioner"
    pace = ", and a momentum that differs by step" if paced else ""
    return f"{n_groups} parameter groups, {what}{pace}"
