"""A run as an object, for reading."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import HydraError, StoreError
from hydra_pipe.notebook.frames import dynamics_frame, samples_frame, top_frame
from hydra_pipe.notebook.plots import Plots
from hydra_pipe.notebook.results import Results
from hydra_pipe.notebook.summary import html, html_of_failure, next_commands, plain
from hydra_pipe.progress import Progress
from hydra_pipe.rewinding.spikes import Spikes, spikes_of
from hydra_pipe.rewinding.step import Rewind, rewound
from hydra_pipe.store import names
from hydra_pipe.store.data.combined import Combined, open_combined
from hydra_pipe.store.data.gradients import (
    GROUP_COLUMNS,
    STEP_COLUMNS,
    Gradients,
    Prefix,
)
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.recording import committed, open_so_far
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.data.relevance import open_relevance, read_relevance
from hydra_pipe.store.files import is_remote, tree_bytes
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD
from hydra_pipe.store.run.stages import COMBINE, OWNED, RECORD, Holds
from hydra_pipe.store.zarr.arrays import Array

if TYPE_CHECKING:
    import pandas
    import xarray
    import zarr


def open_run(run: str | os.PathLike[str]) -> "Run":
    """Open the run at `run`, for reading.

    Raises:
        RunError: there is no run.
        StoreError: its manifest is damaged, or of a newer format version.
    """
    return Run(RunDirectory.open(run))


class Run:
    """A run directory, for reading. Made by `open_run`.

    Each answer shows the run as it is now. Results that are reduced or exported later appear
    without opening the run again.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._results = Results(directory)
        self.plot = Plots(self._results)

    def __repr__(self) -> str:
        return plain(self._results.directory(), self.methods)

    def _repr_html_(self) -> str:
        """Return the HTML that notebooks show."""
        directory = self._results.directory()
        try:
            return html(directory, self._recording())
        except HydraError as error:
            return html_of_failure(directory, error)

    @property
    def path(self) -> Path:
        """Path of the run."""
        return self._results.path

    @property
    def run_id(self) -> str:
        """Name of the run in every table written from it."""
        return self._results.directory().run_id

    @property
    def methods(self) -> list[str]:
        """Names of the results that are there, those of the top samples alone last."""
        return self._results.methods()

    @property
    def gradients(self) -> Gradients:
        """The recorded rows.

        Raises:
            StoreError: the recording is missing or damaged.
        """
        return self._results.gradients

    @property
    def sample_keys(self) -> Keys | None:
        """Keys of the training samples, a sequence that is read as it is asked for.

        None: the samples have no keys.

        Raises:
            StoreError: the recording is missing or damaged.
        """
        combined = self._combined()
        return self.gradients.keys(names.TRAIN_KEYS) if combined is None else combined.keys()

    @property
    def test_keys(self) -> Keys | None:
        """Keys of the run's own test samples, in the form of `sample_keys`."""
        combined = self._combined()
        return self.gradients.keys(names.TEST_KEYS) if combined is None else combined.test_keys()

    def _combined(self) -> Combined | None:
        """Return a combination of the run. All of them have the same samples. None: it has none."""
        directory = self._results.directory()
        found = directory.complete(COMBINE)
        return open_combined(directory, found[0]) if found else None

    def combined(self, method: str = DEFAULT_METHOD) -> Combined:
        """Return what combining runs has found beside the mean (docs/combining.md).

        Its arrays are read as they are sliced: `standard_error` and `agreeing` (sample, test).
        `column_facts()` and `scales()` tell of each test sample.

        Raises:
            RunError: the run combines no runs, or not by this method.
            StoreError: damaged.
        """
        directory = self._results.directory()
        stage = COMBINE.of(method)
        directory.require(stage, directory.command(stage))
        return open_combined(directory, method)

    @property
    def steps(self) -> dict[str, NDArray[Any]]:
        """The per-step tables: shape (step,), (step, group) or (step, block).

        `n_rows` counts the rows of all processes. `first_row` is there only if one process
        recorded, because only then are a step's rows together. Otherwise
        `gradients.rows_of_steps` gives their places.
        """
        first, counts = self.gradients.rows_of_steps()
        rows = {names.FIRST_ROW: first[:, 0]} if self.gradients.n_ranks == 1 else {}
        rows[names.N_ROWS] = counts.sum(axis=1)
        return rows | {
            name: self.gradients.step_table(name)
            for name in (*STEP_COLUMNS, *GROUP_COLUMNS, *self.gradients.block_columns)
        }

    def relevance_array(self, method: str = DEFAULT_METHOD) -> "zarr.Array[Any]":
        """Return the relevance on disk, (sample, test) float32, read as it is sliced.

        Raises:
            RunError: the relevance was not computed.
        """
        import zarr  # takes half a second to import, and is needed only here

        array = self._relevance(method)
        if is_remote(array.path):
            store: Any = zarr.storage.FsspecStore.from_url(str(array.path), read_only=True)
        else:
            store = zarr.storage.LocalStore(array.path, read_only=True)
        return zarr.open_array(store, mode="r", zarr_format=3)

    def _relevance(self, method: str) -> Array:
        self._results.check(method)
        return open_relevance(self.path / names.RELEVANCE, method)

    def relevance(self, method: str = DEFAULT_METHOD) -> "NDArray[np.float32] | xarray.DataArray":
        """Return the whole relevance matrix, in memory, float32, dimensions (sample, test).

        If `method` names means over test samples, "hydra-fisher-by-label" or "hydra-fisher-mean",
        the dimensions are (sample, test_group). The result for the samples of the probe `wrong` is
        called "hydra-fisher-of-wrong". `relevance_array` reads a part of the matrix.

        R > 0 means helpful: leaving the training sample out raises the test loss. The unit is
        the test loss for most methods (docs/methods.md). Method "self" has one column, the
        relevance of each training sample to itself.

        Returns:
            An xarray.DataArray if xarray is installed, else a NumPy array. Its coordinates are
            `sample` and `test`, the ids, `sample_label` and `test_label` if labels are known, and
            `sample_key` and `test_key` if there are keys. For means they are `test_group` and
            `test_group_label` instead. Its attributes are `method`, `sign`, `unit` and `run_id`.

        Raises:
            RunError: the relevance was not computed.
            StoreError: the relevance is damaged.
        """
        array = self._relevance(method)
        values = read_relevance(array, slice(None))
        try:
            import xarray
        except ImportError:
            return values
        found = ReducedRun.open(self._results.directory(), method)
        columns = found.columns
        sign, unit = (array.attributes[name] for name in (names.SIGN, names.UNIT))
        dimension = names.TEST_DIM if columns.by is None else names.TEST_GROUP_DIM
        coordinates: dict[str, Any] = {
            names.SAMPLE_DIM: np.arange(values.shape[0]),
            dimension: columns.ids,
        }
        sizes = {names.SAMPLE_DIM: values.shape[0], dimension: values.shape[1]}
        for which, labels in (
            (names.SAMPLE_DIM, found.samples.labels()),
            (dimension, found.labels_of_columns()),
        ):
            if labels is not None:
                if len(labels) != sizes[which]:
                    raise StoreError(
                        f"{array.path} has {sizes[which]} x {which}, and there are {len(labels)} "
                        "labels"
                    )
                coordinates[f"{which}_label"] = (which, labels)
        for which, keys in (
            (names.SAMPLE_DIM, found.samples.keys()),
            (dimension, found.keys_of_tests()),
        ):
            if keys is not None:
                coordinates[f"{which}_key"] = (which, keys.take(coordinates[which]))
        return xarray.DataArray(
            values,
            dims=(names.SAMPLE_DIM, dimension),
            coords=coordinates,
            name="relevance",
            attrs={
                names.METHOD: method,
                names.SIGN: sign,
                names.UNIT: unit,
                names.RUN_ID: self._results.directory().run_id,
            },
        )

    def top(
        self,
        test_id: int | str,
        k: int = 10,
        side: str = "both",
        method: str = DEFAULT_METHOD,
    ) -> "pandas.DataFrame":
        """Return the training samples that helped or harmed one test sample most.

        Reads the column of the test sample, and at most the rest of its chunk.

        Args:
            test_id: id or key of the test sample, or number of the column for means.
            k: most samples on each side. There are fewer if fewer have the sign. A result of the
                top samples alone has as many as `reduce --top` kept.
            side: "helpful", "harmful" or "both".
            method: name of the result.

        Returns:
            Columns `rank` (from 1), `train_id`, `label`, `relevance`, like the exported
            rankings, ties by `train_id`, and `key` if samples have keys. With both sides, `side`
            comes before these. `attrs` has `method`, `sign`, `unit`, `run_id` and `test_id`.

        Raises:
            UsageError: there is no such test sample, side or number.
            RunError: the relevance was not computed.
            StoreError: the relevance is damaged.
            ExtraError: pandas is not installed.
        """
        return top_frame(self._results, method, test_id, k, side)

    def samples(
        self, method: str = DEFAULT_METHOD, *, progress: Progress | None = None
    ) -> "pandas.DataFrame":
        """Return every training sample with its relevance over all test samples.

        An export of the current relevance is read if there is one. Otherwise the relevance is
        added up out of core.

        Args:
            method: name of the result.
            progress: place to show progress. Default: nowhere.

        Returns:
            The columns of `samples.parquet`, in order of `train_id`: `train_id`, `label`,
            `relevance_sum`, `relevance_mean`, `rank` (1 = most harmful), `self_relevance` (not a
            number before `reduce --method self`), `visits`, and of the sample's visits `mean_loss`,
            `last_loss`, `mean_margin`, `mean_el2n`, `variability`, `visits_wrong` and
            `first_learnt` (docs/parquet.md), and `key` if samples have keys. `attrs` has
            `method`, `sign`, `unit` and `run_id`.

        Raises:
            UsageError: the method has no test samples.
            RunError: the relevance was not computed.
            StoreError: the relevance is damaged.
            ExtraError: pandas is not installed.
        """
        return samples_frame(self._results, method, progress or Progress())

    def dynamics(self) -> "pandas.DataFrame":
        """Return what the network thought of each sample at each of its steps.

        Returns:
            A row for each sample and step, in the order of the steps of a process: `train_id`,
            `step`, `loss` (not a number where it is not known) and `target` (class that the loss
            compared with, -1 where it is not known). For a classifier of whole samples also
            `predicted` (class with the largest logit, -1 where logits are not known), and
            `confidence` and `label_confidence`, the chances of the predicted class and of the
            target.

        Raises:
            RunError: there is no complete recording.
            StoreError: damaged.
            ExtraError: pandas is not installed.
        """
        return dynamics_frame(self.gradients)

    def rewind(self, step: int) -> Rewind:
        """Return the samples of one step, their shares of it, and what it did to the tests.

        Reads the rows of the step, the losses of all steps, and the nearest test gradients. A
        recording that still runs answers for its committed steps.

        Args:
            step: number of the step, from 0.

        Raises:
            UsageError: there is no such step.
            RunError: nothing is recorded yet.
            StoreError: damaged.
        """
        return rewound(open_so_far(self._results.directory()), step)

    def spikes(self, by: str | None = None, *, progress: Progress | None = None) -> Spikes:
        """Return the steps whose loss stands out, and the samples behind them.

        Args:
            by: "loss", or "gradient" for the norm of the gradient, which reads all rows. Default:
                the loss if it is known.
            progress: place to show progress. Default: nowhere.

        Raises:
            UsageError: there is no such series.
            RunError: nothing is recorded yet, or the series is not known.
            StoreError: damaged.
        """
        directory = self._results.directory()
        return spikes_of(self.path, open_so_far(directory), by, progress or Progress())

    def info(self) -> dict[str, Any]:
        """Return the facts of the run: sizes, encodings, progress of every stage, settings.

        The values are plain, like those that `info --json` prints.
        """
        directory = self._results.directory()
        stages = {
            str(which): {"state": s.state, "settings": s.settings, "facts": s.facts}
            for which, s in directory.stages.items()
        }
        places = dict.fromkeys(
            [*OWNED, *(stage.area for stage in directory.stages if stage.kind.holds is Holds.FILE)]
        )
        found: dict[str, Any] = {
            "path": str(self.path),
            "run_id": self.run_id,
            "versions": directory.versions,
            "stages": stages,
            "next": next_commands(directory),
            "bytes": {
                place: tree_bytes(self.path / place)
                for place in places
                if (self.path / place).exists()
            },
        }
        recording = self._recording()
        return found if recording is None else found | {"recording": recording}

    def _recording(self) -> dict[str, Any] | None:
        """Return the facts of the recording so far, or None if there is none."""
        directory = self._results.directory()
        if RECORD not in directory.stages or not (self.path / names.GRADIENTS).is_dir():
            return None
        store = self.gradients
        item_bytes = store.rows.dtype.itemsize
        blocks = [
            {
                "name": block.name,
                "shape": list(block.shape),
                "group": block.group,
                "encoding": block.encoding,
                "columns": own,
                "bytes_a_row": own * item_bytes + 4,
                "exact": block.exact,
            }
            for block in store.layout.blocks
            for own in [_own_columns(block)]
        ]
        n_parameters = sum(block.numel for block in store.layout.blocks)
        # A recording that goes on, or was interrupted, counts as far as it is safe, because its
        # arrays grow one after the other.
        recording = directory.stages[RECORD]
        safe = None if recording.state == "complete" else committed(recording)
        prefix = Prefix(store.n_steps, store.rows.part_rows) if safe is None else safe.prefix
        tests = store.test_steps() if safe is None or safe.tests is None else safe.tests
        return {
            "rows": sum(prefix.part_rows),
            "ranks": store.n_ranks,
            "steps": prefix.n_steps,
            "features": store.layout.n_features,
            "parameters": n_parameters,
            "dtype": str(store.rows.dtype),
            "test_checkpoints": tests,
            "blocks": blocks,
        }


def _own_columns(block: Any) -> int:
    if block.encoding == "factored" and block.inputs is None:
        return 0  # its columns belong to its weight
    own = block.columns[1] - block.columns[0]
    return int(own if block.inputs is None else own + block.inputs[1] - block.inputs[0])
