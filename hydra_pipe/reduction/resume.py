"""Progress of an unfinished stage in the manifest, and the memory that its work was divided by."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from hydra_pipe.plan.records import Answered, Found
from hydra_pipe.store import names
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import Stage, StageId

# name of the fact of a stage that says how far the stage got
ANSWERED = "answered"
# functions that make one fact of the findings of all passes
_COMBINED: dict[str, Callable[[list[float]], float]] = {
    names.CURVATURE_LEFT: lambda values: sum(values) / len(values),
    names.DAMPING: min,
    names.LOSS_DIFFERENCE: max,
    names.GRADIENTS_HELD: min,
}


def marked(stage: Stage | None) -> tuple[Answered, dict[str, Any]] | None:
    """Return how far a stage got, and the whole fact of the manifest about it.

    None if the manifest has no such fact, or one that is not valid.
    """
    found = stage.facts.get(ANSWERED) if stage is not None else None
    if not isinstance(found, dict):
        return None
    order, done, base_bytes, passes = (
        found.get(name) for name in ("order", "done", "base_bytes", "found")
    )
    if not isinstance(order, str) or not is_count(done) or not is_count(base_bytes):
        return None
    if not isinstance(passes, list) or not all(map(_is_found, passes)):
        return None
    return Answered(order, done, base_bytes, tuple(passes)), found


def combined(passes: Sequence[Found]) -> Found:
    """Combine the findings of all passes into the facts that the manifest keeps."""
    found = {name: [of_pass[name] for of_pass in passes if name in of_pass] for name in _COMBINED}
    return {name: _COMBINED[name](values) for name, values in found.items() if values}


def _is_found(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in _COMBINED and isinstance(number, int | float) and not isinstance(number, bool)
        for name, number in value.items()
    )


def mark(directory: RunDirectory, stage: StageId, answered: Answered, **more: Any) -> None:
    """Note in the manifest how much of `stage` is safe on the disk."""
    directory.stages[stage].facts[ANSWERED] = asdict(answered) | more
    directory.save(stage)


def run_again(directory: RunDirectory, stage: StageId) -> None:
    """Note in the manifest that `stage` is resumed. Of its facts only the progress stays."""
    found = directory.stages[stage]
    found.state = "running"
    found.facts = {ANSWERED: found.facts[ANSWERED]}
    directory.save(stage)
