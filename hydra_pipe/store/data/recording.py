"""The first steps of a recording, for `reduce --up-to-step`.

The recording may continue meanwhile.
"""

from dataclasses import dataclass
from typing import Any

from hydra_pipe.errors import RunError, StoreError, UsageError, shown
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients, Prefix
from hydra_pipe.store.data.recording_counts import Counts, checked_counts
from hydra_pipe.store.data.rows import ROWS_UNREADABLE
from hydra_pipe.store.files import remove
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.run.listing import Listed, listed
from hydra_pipe.store.run.manifest import COMMITTED, PRUNED, RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE, TOPS, Stage


@dataclass(frozen=True)
class Committed:
    """The part of a recording that is safe on the disk, whatever happens to its process.

    Args:
        prefix: steps and rows of the part.
        n_tests: number of test samples.
        tests: steps after which test gradients were taken. None: all that exist.
        labels: names of the arrays of labels. None: all that exist.
    """

    prefix: Prefix
    n_tests: int
    tests: list[int] | None
    labels: list[str] | None

    def has(self, name: str) -> bool:
        """Tell whether the recording owns a group or an array of `gradients.zarr`, by its name."""
        place, _, member = name.partition("/")
        member = member.partition("/")[0]
        if place == names.TEST and member and self.tests is not None:
            return member in map(names.checkpoint_name, self.tests)
        return place != names.LABELS or not member or self.labels is None or member in self.labels


def open_recording(run: RunDirectory, up_to_step: int | None) -> tuple[Gradients, Counts]:
    """Return the complete recording, or the recording as it was after `up_to_step` steps.

    Raises:
        RunError, UsageError, StoreError: the errors of `open_first_steps`.
    """
    if up_to_step is not None:
        return open_first_steps(run, up_to_step)
    recording = run.require_recording()
    gradients = open_gradients(run)
    return gradients, checked_counts(gradients, recording)


@dataclass(frozen=True)
class SoFar:
    """A recording as far as it is safe on the disk, complete or not.

    Args:
        gradients: the recording. Its rows may be pruned.
        n_samples: number of training samples.
        tests: steps after which test gradients were taken, ascending.
        pruned: True if the gradients of the rows were deleted.
    """

    gradients: Gradients
    n_samples: int
    tests: list[int]
    pruned: bool


def open_so_far(run: RunDirectory) -> SoFar:
    """Return the recording as far as it is safe on the disk.

    Raises:
        RunError: no step is committed yet.
        StoreError: damaged.
    """
    recording = run.stages.get(RECORD)
    if recording is None or recording.state == "complete":
        gradients, counts = open_recording(run, None)
        tests = [step for step in gradients.test_steps() if gradients.test_rows(step).n_rows]
        pruned = bool(run.stages[RECORD].facts.get(PRUNED))
        return SoFar(gradients, counts.n_samples, tests, pruned)
    found = committed(recording)
    if found is None or not found.prefix.n_steps:
        raise RunError(
            f"{run.path}: no step is committed yet: wait for the first checkpoint of the recording"
        )
    gradients = open_gradients(run, found.prefix)
    tests = _steps_with_tests(gradients, found)
    return SoFar(gradients, recording.count("n_samples", least=1), tests, False)


def open_gradients(run: RunDirectory, prefix: Prefix | None = None) -> Gradients:
    """Open the rows of `run` and all beside them that its manifest lists.

    Raises:
        StoreError: the store is missing or damaged, or the list is.
    """
    recording = run.stages.get(RECORD)
    own: Listed | None = None
    if recording is not None and recording.state == "complete":
        own = listed(run, RECORD)
    elif recording is not None and (found := committed(recording)) is not None:
        own = found.has
    return Gradients(run.path / names.GRADIENTS, prefix, own)


def open_first_steps(run: RunDirectory, step: int) -> tuple[Gradients, Counts]:
    """Return the recording as it was after `step` steps, with the test gradients of that time.

    Reads metadata and the tables of the steps.

    Raises:
        RunError: nothing was recorded yet, or the rows were pruned.
        UsageError: no test gradients were taken after that step. The message lists the steps
            that have some.
        StoreError: damaged.
    """
    recording = run.stages.get(RECORD)
    found = None if recording is None else committed(recording)
    if recording is None or found is None:
        raise RunError(
            f"{run.path}: no step is committed yet: wait for the first checkpoint or test "
            "gradients (hydra-pipe record --test-every epoch, or recorder.record_test() on the "
            "way in a loop of your own)"
        )
    if recording.facts.get(PRUNED):
        raise RunError(
            f"{run.path}: its rows were pruned, and its hypergradients are kept for all steps: "
            "leave out --up-to-step"
        )
    whole = open_gradients(run, found.prefix)
    tests = _steps_with_tests(whole, found)
    if step not in tests:
        there = f"after {_listed(tests)} steps" if tests else "after no step so far"
        raise UsageError(
            f"--up-to-step {step}: test gradients were taken {there}: choose one, or record with "
            "--test-every"
        )
    _, counts = whole.rows_of_steps()
    if (counts < 0).any():
        raise StoreError(
            f"{whole.path}/{names.STEPS} has steps of negative length: {ROWS_UNREADABLE}"
        )
    part_rows = tuple(int(n) for n in counts[:step].sum(axis=0))
    gradients = open_gradients(run, Prefix(step, part_rows))
    n_tests = _check_first_steps(gradients, step, part_rows, found.n_tests)
    return gradients, Counts(recording.count("n_samples", least=1), n_tests, step)


def _steps_with_tests(whole: Gradients, found: Committed) -> list[int]:
    """Return the committed steps after which test gradients were taken."""
    tests = [
        step
        for step in whole.test_steps()
        if step <= found.prefix.n_steps and (found.tests is None or step in found.tests)
    ]
    if found.tests is None and not found.n_tests:
        # Without test gradients at the end, the group there has only digests of the parameters.
        return [step for step in tests if step < found.prefix.n_steps]
    return tests


def _check_first_steps(
    gradients: Gradients, step: int, part_rows: tuple[int, ...], n_tests: int
) -> int:
    """Check that the arrays hold `step` steps and the test gradients after them.

    Args:
        gradients: the recording, cut after `step` steps.
        part_rows: rows of these steps, by part.
        n_tests: number of test samples of the recording. 0: as many as the test gradients have.

    Returns:
        The number of test samples.

    Raises:
        StoreError: an array is missing or too short.
    """
    path = str(gradients.path)
    lengths = gradients.lengths(step)
    wanted = gradients.expected_rows(part_rows, step, 0)
    checkpoint = f"{names.TEST}/{names.checkpoint_name(step)}"
    test = {f"{checkpoint}/{name}" for name in (names.GRADIENT, names.SCALE, names.LOSS)}
    # A complete recording counts the test gradients of its end, and may have none there.
    n_tests = n_tests or lengths.get(f"{checkpoint}/{names.LOSS}", 0)
    for name, n in (wanted | dict.fromkeys(test, n_tests)).items():
        there_are = lengths.get(name, -1)
        if there_are < n or (name in test and there_are != n):
            raise StoreError(
                f"{path}/{name} is missing or has too few rows, {n} were recorded: "
                f"{ROWS_UNREADABLE}"
            )
    for name, array in gradients.arrays():
        if (name in wanted or name in test) and (fault := array.shortfall()) is not None:
            raise StoreError(f"{path}: {name} {fault}: {ROWS_UNREADABLE}")
    return n_tests


def _listed(steps: list[int]) -> str:
    first = [f"{step:,}" for step in steps[:10]]
    return ", ".join(first) if len(steps) <= 10 else f"{', '.join(first)} ... {steps[-1]:,}"


def committed(recording: Stage) -> Committed | None:
    """Return what the manifest says of a recording, finished or not. None: nothing.

    Raises:
        StoreError: the manifest is damaged.
    """
    if recording.state == "complete":
        prefix = Prefix(recording.count("n_steps"), tuple(recording.rank_rows()))
        return Committed(prefix, recording.count("n_tests"), None, None)
    found = recording.facts.get(COMMITTED)
    return None if found is None else _parsed(found)


def _parsed(found: Any) -> Committed:
    try:
        n_steps, n_tests, part_rows, tests = (
            found[name] for name in ("n_steps", "n_tests", "part_rows", "tests")
        )
        labels = found.get("labels")
        if not all(map(is_count, (n_steps, n_tests, *part_rows, *tests))):
            raise ValueError(f"counts {shown(found)}")
        return Committed(
            Prefix(n_steps, tuple(part_rows)),
            n_tests,
            list(tests),
            None if labels is None else list(labels),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{names.MANIFEST} is damaged ({shown(error)}): {ROWS_UNREADABLE}"
        ) from error


def forget_upto(run: RunDirectory, n_steps: int) -> None:
    """Discard results of more than `n_steps` steps of an unfinished recording.

    The steps after `n_steps` are recorded anew.
    """
    for which, stage in list(run.stages.items()):
        up_to_step = stage.settings.get(names.UPTO)
        if which.kind in (REDUCE, TOPS) and is_count(up_to_step) and up_to_step > n_steps:
            gone = (which, *which.results)
            run.forget(*gone)
            for place in (place for one in gone for place in one.places):
                remove(run.path / place)
