"""Sentences about a step, and about how far its numbers hold."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.spikes import CUT
from hydra_pipe.store.data.recording import SoFar


def caveats(recording: SoFar, summary: dict[str, Any], losses: NDArray[np.float32]) -> list[str]:
    """Return lines for a person on one step.

    Args:
        recording: the recording.
        summary: facts of the step, as `Rewind.summary` has them.
        losses: loss of each row of the step, shape (row,).
    """
    store = recording.gradients
    says = [_of_loss(summary)]
    if not np.isfinite(losses).all():
        says.append("the loss of some samples is not known: shares are of the known ones")
    if recording.pruned:
        says.append("the rows were pruned: shares of the gradient and the tests are not known")
        return says
    if any(not block.exact for block in store.layout.blocks):
        says.append("some gradients are projected: their norms and shares are estimates")
    if store.preconditioned:
        says.append(
            "the optimiser divides the gradient, as Adam does: norms and shares are those before "
            "the division; the change of the tests is with the preconditioner of these tests"
        )
    says.append(_of_tests(recording, summary))
    return says


def _of_loss(summary: dict[str, Any]) -> str:
    loss, expected, score = (summary[name] for name in ("loss", "expected_loss", "score"))
    if loss is None:
        return "the loss of this step is not known"
    if score is None:
        return f"loss {loss:.4g}: too few steps before it to say whether it stands out"
    stands = "a spike" if summary["is_spike"] else "no spike"
    return (
        f"loss {loss:.4g}, and {expected:.4g} were expected by the steps before: {stands} (score "
        f"{score:.1f}, spikes are above {CUT:g})"
    )


def _of_tests(recording: SoFar, summary: dict[str, Any]) -> str:
    at, change = summary["tests_step"], summary["tests_change"]
    if at is None:
        return (
            "no test gradients were taken: record with --test-every epoch, or call "
            "recorder.record_test, to see what a step did to the tests"
        )
    away = min(abs(at - summary["step"]), abs(at - summary["step"] - 1))
    where = "at this step" if not away else f"taken {away:,} steps away, after step {at:,}"
    return (
        f"tests: the step changed their mean loss by {change:+.3g}, and harmed "
        f"{summary['n_tests_harmed']:,} of them: minus the learning rate times the products of "
        f"gradients, to first order, with test gradients {where} (TracIn)"
    )
