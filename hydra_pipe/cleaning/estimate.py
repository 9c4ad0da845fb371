"""The number of labels that look wrong, in one line at the end of a recording."""

import os

from hydra_pipe.cleaning.visits import dynamics_of
from hydra_pipe.labels.judging import judge
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory

# Most samples, pairs of sample and class, and pairs of row and class: 20,000 samples of ten
# classes and 20 epochs take 13 s of one core, and 200 MiB.
MOST_SAMPLES, MOST_CHANCES, MOST_LOGITS = 20_000, 2_000_000, 20_000_000


def wrong_labels_line(run: str | os.PathLike[str]) -> str | None:
    """Return a line for a person on the labels of a complete recording, and the next command.

    None where labels cannot be judged, or hardly. No failure of the judgement is raised: the
    recording is complete without it.
    """
    try:
        return _line(RunDirectory.open(run))
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - a recording has not failed by it
        return None


def _line(directory: RunDirectory) -> str | None:
    gradients, counts = open_recording(directory, None)
    n_classes = gradients.dynamics_shape.n_outputs
    if n_classes < 2:
        return None
    command = f"hydra-pipe clean {directory.path}"
    if (
        counts.n_samples > MOST_SAMPLES
        or counts.n_samples * n_classes > MOST_CHANCES
        or gradients.rows.n_rows * n_classes > MOST_LOGITS
    ):
        return f"labels that look wrong are found by {command}"
    verdict = judge(dynamics_of(gradients)[1])
    if verdict.warnings:
        return None
    n_wrong = verdict.n_wrong
    if n_wrong.low <= 0:
        return f"few labels look wrong, or none: {command} lists the most suspicious"
    return (
        f"about {n_wrong.value:,.0f} labels look wrong ({n_wrong.low:,.0f} to "
        f"{n_wrong.high:,.0f}): {command}"
    )
