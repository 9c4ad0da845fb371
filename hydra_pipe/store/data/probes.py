"""`probes/NAME.zarr`: gradients of new test samples.

They are taken at the parameters at which the recording's last test gradients were taken.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, UsageError, shown
from hydra_pipe.plan.layout import Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients, read_labels
from hydra_pipe.store.data.gradients_writer import put_labels, test_table
from hydra_pipe.store.data.keys import Keys, put_keys
from hydra_pipe.store.data.rows import Rows, check_kind, read_array
from hydra_pipe.store.run.discarding import discard
from hydra_pipe.store.run.listing import Listed, listed
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import PROBE, StageId
from hydra_pipe.store.zarr.arrays import Array, Group
from hydra_pipe.store.zarr.table import BackgroundWriter, TableWriter

PROBE_UNREADABLE = "the probe is not readable: take it again with hydra-pipe probe --overwrite"
# Settings of the stage: digests of the samples, and of labels and keys if they were given.
SAMPLES, LABELS, KEYS = "samples", "labels", "keys"
# A probe's name is a part of the names of results, whose parts are separated by hyphens.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,49}")


def check_name(name: str) -> None:
    """Refuse a name that no probe can have. Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {shown(name)}: give up to 50 letters, digits and _, and a letter or a digit "
            "first"
        )


class Probe:
    """A probe, opened for reading.

    Args:
        path: path of the probe's store.
        gradients: recording of the same run. Its rows may be gone.
        listed: function that tells by its name whether an array belongs to the probe
            (`store/run/listing.py`). None: every one that exists belongs.

    Raises:
        StoreError: the store is missing or damaged, or belongs to another run.
    """

    def __init__(self, path: Path, gradients: Gradients, listed: Listed | None = None) -> None:
        self.path = path
        self._root = Group.open(path, PROBE_UNREADABLE, listed)
        kind, run_id = (self._root.attributes.get(name) for name in (names.KIND, names.RUN_ID))
        if kind != "probe" or run_id != gradients.run_id:
            raise StoreError(f"{path} is no probe of this recording: {PROBE_UNREADABLE}")
        layout = gradients.layout
        self.rows = Rows(
            [self._root], layout.n_features, len(layout.blocks), None, PROBE_UNREADABLE
        )

    def losses(self) -> NDArray[np.float32]:
        """Return the loss of each test sample. Raises: StoreError: damaged."""
        array = self._root.array(names.LOSS)
        check_kind(array, ("float32",), None, PROBE_UNREADABLE)
        return read_array(array, consequence=PROBE_UNREADABLE)

    @property
    def has_labels(self) -> bool:
        """True if the probe's test samples have labels."""
        return self._root.has(names.LABELS)

    def labels(self) -> NDArray[Any] | None:
        """Return labels of the test samples: int64, or str objects if they are names.

        None if they are unknown.

        Raises:
            StoreError: damaged.
        """
        return read_labels(self._root.array(names.LABELS)) if self.has_labels else None

    @property
    def has_keys(self) -> bool:
        """True if the probe's test samples have keys."""
        return self._root.has(names.TEST_KEYS)

    def keys(self) -> Keys | None:
        """Return the keys of the test samples. None if they have none. Raises: StoreError."""
        return Keys(self._root.array(names.TEST_KEYS)) if self.has_keys else None

    def arrays(self) -> list[tuple[str, Array]]:
        """Return every array with its name."""
        return [(name, self._root.array(name)) for name in self._root.array_names()]

    def check(self, n_tests: int) -> None:
        """Compare lengths with the manifest's count, and with the files. Reads no values.

        Raises:
            StoreError: a length is wrong, or files are missing.
        """
        for name, array in self.arrays():
            fault = (
                f"has {array.shape[0]} rows, {n_tests} were written"
                if array.shape[0] != n_tests
                else array.shortfall()
            )
            if fault is not None:
                raise StoreError(f"{self.path / name} {fault}: {PROBE_UNREADABLE}")


@dataclass(frozen=True)
class WhichTests:
    """The test samples that relevance is for, and the place of their gradients.

    Args:
        step: number of steps after which the recording took its own test gradients.
        probe: path of the store of a probe, taken at the same parameters. None: the test
            samples are the recording's own.
        probe_labelled, probe_keyed: True if the probe has labels, and keys.
    """

    step: int
    probe: Path | None = None
    probe_labelled: bool = False
    probe_keyed: bool = False

    def rows(self, store: Gradients) -> Rows:
        """Return the gradients of the test samples. Raises: StoreError: there are none."""
        return store.test_rows(self.step) if self.probe is None else Probe(self.probe, store).rows

    def losses(self, store: Gradients) -> NDArray[np.float32]:
        """Return the loss of each test sample. Raises: StoreError: damaged."""
        return (
            store.test_losses(self.step)
            if self.probe is None
            else Probe(self.probe, store).losses()
        )

    def labels(self, store: Gradients) -> NDArray[Any] | None:
        """Return the label of each test sample. None if labels are unknown.

        Raises:
            StoreError: damaged.
        """
        if self.probe is None:
            return store.labels(names.TEST_LABELS)
        return Probe(self.probe, store).labels() if self.probe_labelled else None

    def keys(self, store: Gradients) -> Keys | None:
        """Return the keys of the test samples. None if they have none. Raises: StoreError."""
        if self.probe is None:
            return store.keys(names.TEST_KEYS)
        return Probe(self.probe, store).keys() if self.probe_keyed else None


def open_probe(run: RunDirectory, store: Gradients, name: str) -> Probe:
    """Open probe `name`, with an absolute path.

    Raises:
        UsageError: no probe can have this name.
        RunError: there is no such probe.
        StoreError: the probe is damaged.
    """
    check_name(name)
    stage = PROBE.of(name)
    taken = run.require(stage, f"hydra-pipe probe {run.path} FILE.py:FUNCTION --name {name}")
    probe = Probe(run.path.absolute() / stage.area, store, listed(run, stage))
    probe.check(taken.count("n_tests", least=1))
    return probe


def tested_by(
    run: RunDirectory, store: Gradients, step: int, n_tests: int, name: str | None
) -> tuple[WhichTests, int]:
    """Return the test samples to compute relevance for, and their number.

    Args:
        run: the run.
        store: recording of the run.
        step: number of steps after which the recording took its own test gradients.
        n_tests: number of the recording's own test samples.
        name: name of a probe. None: the recording's own test samples are used.

    Raises:
        UsageError, RunError, StoreError: the errors of `open_probe`.
    """
    if name is None:
        return WhichTests(step), n_tests
    probe = open_probe(run, store, name)
    return WhichTests(step, probe.path, probe.has_labels, probe.has_keys), probe.rows.n_rows


@contextmanager
def probe_table(
    path: Path, attributes: Mapping[str, Any], layout: Layout, dtype: str
) -> Iterator[TableWriter]:
    """Create a store at `path` and yield its table of test gradients, which the block fills.

    Args:
        path: path of the store.
        attributes: attributes of the store.
        layout: block directory of the recording.
        dtype: dtype of the recording's rows.

    Raises:
        StoreError: at the end of the block: writing failed.
    """
    writer = BackgroundWriter()
    try:
        table = test_table(
            Group.create(path, {names.KIND: "probe", **attributes}), layout, dtype, writer
        )
        yield table
        table.flush()
    finally:
        writer.close()


def write_probe_labels(path: Path, labels: Sequence[int] | Sequence[str] | NDArray[Any]) -> None:
    """Write one label for each test sample of the probe that is written at `path`."""
    put_labels(path / names.LABELS, labels, names.TEST_DIM)


def write_probe_keys(path: Path, keys: Sequence[str]) -> None:
    """Write one key for each test sample of the probe that is written at `path`."""
    put_keys(path / names.TEST_KEYS, keys, names.TEST_DIM)


def results_of(run: RunDirectory, name: str) -> list[StageId]:
    """Return the stages that hold results for probe `name`."""
    return [stage for stage in run.stages if ResultName.parse(stage.name).probe == name]


def drop_results(run: RunDirectory, name: str) -> None:
    """Discard the results for probe `name`."""
    discard(run, *results_of(run, name))
