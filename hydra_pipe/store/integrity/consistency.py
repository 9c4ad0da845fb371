"""Consistency of a recording: its counts and orders.

A recording can be wrong although every file is as it was written.
"""

from collections.abc import Iterator

import numpy as np

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.rank_rows import ends_of
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.integrity.faults import Fault
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD

# The most rows that are read at once.
_ROWS = 2**20


def check_rows(run: RunDirectory, store: Gradients, consequence: str) -> Iterator[Fault]:
    """Yield every fault of the lengths, steps and samples of the recording in `store`.

    Raises:
        StoreError: a part that is needed cannot be read.
    """
    recording = run.stages[RECORD]
    if store.run_id != run.run_id:
        yield Fault(
            names.GRADIENTS,
            f"belongs to run {store.run_id}, {names.MANIFEST} to run {run.run_id}",
            consequence,
            stage=RECORD,
        )
    n_rows, n_steps, n_samples = (
        recording.count("n_rows"),
        recording.count("n_steps"),
        recording.count("n_samples"),
    )
    expected = store.expected_rows(recording.rank_rows(), n_steps, recording.count("n_tests"))
    expected |= {f"{names.LABELS}/{which}": n for which, n in recording.counts("labels").items()}
    lengths = {name: array.shape[0] for name, array in store.arrays()}
    wrong = {name: count for name, count in expected.items() if lengths.get(name) != count}
    for name, count in wrong.items():
        found = (
            f"has length {lengths[name]}, {count} were recorded"
            if name in lengths
            else "is missing"
        )
        yield _fault(name, found, consequence)
    if not wrong:
        yield from _check_steps(store, n_rows, consequence)
        yield from _check_samples(store, n_rows, n_samples, consequence)
        yield from _check_keys(store, consequence)


def _check_steps(store: Gradients, n_rows: int, consequence: str) -> Iterator[Fault]:
    """Check that each part has its rows in order of step, and that each row says its step."""
    first, counts = store.rows_of_steps()
    if (counts < 0).any() or counts.sum() != n_rows:
        yield _fault(names.STEPS, f"steps add up to {counts.sum()} rows of {n_rows}", consequence)
        return
    start = 0
    for part, length in enumerate(store.rows.part_rows):
        group, ends = _group(store, part), np.cumsum(counts[:, part])
        begins = start + ends - counts[:, part]
        if ends[-1] != length:
            yield _fault(
                f"{group}{names.STEPS}/{names.N_ROWS}",
                f"steps add up to {ends[-1]} rows of {length}",
                consequence,
            )
        elif (astray := np.flatnonzero(first[:, part] != begins)).size:
            step = int(astray[0])
            what = (
                f"step {step} begins at row {first[step, part] - start}, those before it end at "
                f"{begins[step] - start}"
            )
            yield _fault(f"{group}{names.STEPS}/{names.FIRST_ROW}", what, consequence)
        else:
            found = _wrong_step(store, start, length, ends)
            if found is not None:
                yield _fault(
                    f"{group}{names.STEP}", f"{found}: rows are not in order of step", consequence
                )
        start += length


def _wrong_step(store: Gradients, start: int, length: int, ends: np.ndarray) -> str | None:
    """Describe the first row of a part whose recorded step is wrong; None if none is."""
    before = 0
    for low in range(0, length, _ROWS):
        rows = np.arange(low, min(low + _ROWS, length))
        found = store.step_of_rows(slice(start + low, start + low + len(rows)))
        falls = np.flatnonzero(np.diff(found, prepend=before) < 0)
        if falls.size:
            return f"falls to {found[falls[0]]} at row {low + falls[0]}"
        wrong = np.flatnonzero(found != np.searchsorted(ends, rows, side="right"))
        if wrong.size:
            return f"says {found[wrong[0]]} at row {low + wrong[0]}, which is of another"
        before = found[-1]
    return None


def _check_samples(
    store: Gradients, n_rows: int, n_samples: int, consequence: str
) -> Iterator[Fault]:
    for low in range(0, n_rows, _ROWS):
        found = store.samples(slice(low, low + _ROWS))
        outside = np.flatnonzero((found < 0) | (found >= n_samples))
        if outside.size:
            row = low + int(outside[0])
            part = int(np.searchsorted(ends_of(store.rows.part_rows), row, side="right"))
            what = (
                f"row {row} is of sample {found[outside[0]]}, and samples are 0 to {n_samples - 1}"
            )
            yield _fault(f"{_group(store, part)}{names.SAMPLE}", what, consequence)
            return


def _check_keys(store: Gradients, consequence: str) -> Iterator[Fault]:
    for which in (names.TRAIN_KEYS, names.TEST_KEYS):
        try:
            if (keys := store.keys(which)) is not None:
                keys.check()
        except StoreError as error:
            yield _fault(f"{names.LABELS}/{which}", str(error), consequence)


def _group(store: Gradients, part: int) -> str:
    return f"{names.rank_name(part)}/" if store.n_ranks > 1 else ""


def _fault(name: str, found: str, consequence: str) -> Fault:
    return Fault(f"{names.GRADIENTS}/{name}", found, consequence, stage=RECORD)
