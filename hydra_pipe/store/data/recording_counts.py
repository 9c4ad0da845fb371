"""Counts of the manifest, compared with the arrays.

The comparison comes before anything is made as large as the manifest says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra_pipe.errors import RunError, StoreError, shown
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import ROWS_UNREADABLE
from hydra_pipe.store.run.manifest import PRUNED
from hydra_pipe.store.run.stages import Stage

_LABELS_OF = {
    names.TRAIN_LABELS: "n_samples",
    names.TRAIN_KEYS: "n_samples",
    names.TEST_LABELS: "n_tests",
    names.TEST_KEYS: "n_tests",
}


@dataclass(frozen=True)
class Counts:
    """Counts of a recording, on which its manifest and its arrays agree.

    Args:
        n_samples, n_tests: numbers of training samples and of test samples. No test samples
            where no test gradients were taken.
        checkpoint: step of the last test gradients. Without any, the last step.
    """

    n_samples: int
    n_tests: int
    checkpoint: int

    def require_tests(self, path: Path) -> None:
        """Refuse a recording without test gradients of its own.

        Raises:
            RunError: the recording has none. The message says how to take some.
        """
        if not self.n_tests:
            raise RunError(
                f"{path} was recorded without test gradients: take some at the final parameters, "
                f"by hydra-pipe probe {path} FILE:FUNCTION --name NAME or hydra_pipe.probe(...), "
                "then reduce --probe NAME. Test gradients that were taken on the way answer "
                "--up-to-step STEP"
            )


def checked_counts(gradients: Gradients, recording: Stage) -> Counts:
    """Return the counts of a complete recording. Lists files, and reads only metadata.

    Only the manifest counts samples that have neither a row nor a label.

    Raises:
        StoreError: manifest and arrays do not agree, arrays lack files, or arrays claim more
            than their files can hold.
    """
    steps = gradients.test_steps()
    if not steps:
        raise StoreError(
            f"{gradients.path} has no test gradients, and does not say at which parameters they "
            "could be taken: record again, with recorder.record_test(...) before recorder.close()"
        )
    counts = {
        name: recording.count(name, least=name != "n_tests")
        for name in ("n_samples", "n_tests", "n_rows", "n_steps")
    }
    lengths = gradients.lengths(steps[-1])
    for name, n in gradients.expected_rows(recording.rank_rows(), counts["n_steps"], 0).items():
        _compare(gradients, name, lengths, n)
    for name in (names.GRADIENT, names.SCALE, names.LOSS):
        _compare(
            gradients,
            f"{names.TEST}/{names.checkpoint_name(steps[-1])}/{name}",
            lengths,
            counts["n_tests"],
        )
    for which, n in recording.counts("labels").items():
        # Test labels may belong to test gradients that were taken during the training.
        if which not in _LABELS_OF or (
            n != counts[_LABELS_OF[which]] and counts[_LABELS_OF[which]]
        ):
            raise StoreError(
                f"{names.MANIFEST} is damaged: it counts {n} labels {shown(which)}: "
                f"{ROWS_UNREADABLE}"
            )
        _compare(gradients, f"{names.LABELS}/{which}", lengths, n)
    missing = gradients.missing(pruned=bool(recording.facts.get(PRUNED)))
    if missing:
        raise StoreError(f"{gradients.path}: {missing[0]}: {ROWS_UNREADABLE}")
    return Counts(counts["n_samples"], counts["n_tests"], steps[-1])


def _compare(gradients: Gradients, name: str, lengths: Mapping[str, int], n: int) -> None:
    if lengths.get(name) != n:
        found = f"has {lengths[name]} rows, {n} were recorded" if name in lengths else "is missing"
        raise StoreError(f"{gradients.path}/{name} {found}: {ROWS_UNREADABLE}")
