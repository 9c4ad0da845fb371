"""Source of the tables: a result, checked against its recording."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, UsageError
from hydra_pipe.maths.ranking import Ranked
from hydra_pipe.plan.exporting import GROUP_ROWS
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.rankings import key_columns, spread_columns
from hydra_pipe.store.data.reduced_run import ReducedRun, ReducedTops, SamplesOfColumns
from hydra_pipe.store.data.relevance import (
    RELEVANCE_UNREADABLE,
    columns_of,
    open_relevance,
    read_columns,
    read_relevance,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ITSELF, ResultName
from hydra_pipe.store.run.stages import REDUCE, TOPS


@dataclass(frozen=True, kw_only=True)
class TableSource(SamplesOfColumns):
    """Content of the tables of a result, beside the relevance.

    Args:
        method: name of the result.
        meta: method, sign, unit and run, for every table's schema.
        train_labels, test_labels: labels of samples and columns. None: unknown.
        train_keys, test_keys: keys of samples and test samples. None: they have none, or columns
            are means.
    """

    method: str
    meta: dict[str, str]
    train_labels: NDArray[Any] | None
    test_labels: NDArray[Any] | None
    train_keys: Keys | None
    test_keys: Keys | None

    @property
    def n_samples(self) -> int:
        """Number of training samples."""
        return self.samples.n_samples

    @property
    def n_tests(self) -> int:
        """Number of columns."""
        return self.columns.n_columns

    @cached_property
    def test_ids(self) -> NDArray[np.int64]:
        """Ids of the columns."""
        return self.columns.ids

    @cached_property
    def train_type(self) -> pa.DataType:
        """Type of the samples' labels."""
        return rankings.label_type(self.train_labels)

    @property
    def samples_schema(self) -> pa.Schema:
        """Schema of the table of samples."""
        return rankings.samples_schema(
            self.train_type, self.meta, has_keys=self.train_keys is not None
        )

    @property
    def ranking_schema(self) -> pa.Schema:
        """Schema of the rankings."""
        return rankings.ranking_schema(
            self.test_type,
            self.train_type,
            self.meta,
            test_keys=self.test_keys is not None,
            train_keys=self.train_keys is not None,
            combined=self.combined is not None,
        )

    @property
    def key_bytes(self) -> int:
        """The most bytes of keys in memory."""
        return sum(
            0 if keys is None else keys.most_bytes(GROUP_ROWS)
            for keys in (self.train_keys, self.test_keys)
        )

    @cached_property
    def test_type(self) -> pa.DataType:
        """Type of the columns' labels."""
        return rankings.label_type(self.test_labels)

    def ranking_table(self, ranked: Ranked) -> pa.Table:
        """Return rankings as a table of `ranking_schema`.

        Raises:
            StoreError: keys or the spread of combined runs are damaged.
        """
        sides = pa.DictionaryArray.from_arrays(
            pa.array(np.where(ranked.helpful, 0, 1).astype(np.int8)),
            pa.array(["helpful", "harmful"]),
        )
        columns = [
            pa.array(self.test_ids[ranked.test]),
            sides,
            pa.array(ranked.rank),
            pa.array(ranked.train),
            pa.array(ranked.relevance),
            rankings.label_column(self.test_labels, ranked.test, self.test_type),
            rankings.label_column(self.train_labels, ranked.train, self.train_type),
            *key_columns(
                (self.test_keys, self.test_ids[ranked.test]),
                (self.train_keys, ranked.train),
            ),
            *spread_columns(self.combined, ranked.train, ranked.test),
        ]
        return pa.Table.from_arrays(columns, schema=self.ranking_schema)


@dataclass(frozen=True, kw_only=True)
class TopSource(TableSource, ReducedTops):
    """Top samples and their recording, which agree in their numbers of samples and columns."""


@dataclass(frozen=True, kw_only=True)
class ExportSource(TableSource, ReducedRun):
    """A result and its recording, which agree in their numbers of samples and columns.

    Args:
        own: relevance of the samples for themselves, float32 (sample,). None: it was not computed.
    """

    own: NDArray[np.float32] | None

    def blocks(
        self, spans: Iterable[tuple[slice, slice]], pool: Executor
    ) -> Iterator[tuple[NDArray[np.float32], slice, slice]]:
        """Yield blocks of the relevance with their test and training samples.

        A block has the shape (test, sample).

        Args:
            spans: test samples and training samples of each block, in order.
            pool: pool that reads the next block meanwhile.

        Raises:
            StoreError: the relevance is damaged.
        """
        waiting: Future[NDArray[np.float32]] | None = None
        listed = list(spans)
        for number, (tests, samples) in enumerate(listed):
            block = (
                read_columns(self.relevance, samples, tests)
                if waiting is None
                else waiting.result()
            )
            if number + 1 < len(listed):
                after, low = listed[number + 1]
                waiting = pool.submit(read_columns, self.relevance, low, after)
            yield block, tests, samples
            del block  # free it before the block after the next is read


def open_source(directory: RunDirectory, method: str) -> ExportSource:
    """Return the relevance of `method` and its recording.

    Raises:
        RunError: the relevance was not computed, or the recording is not complete.
        StoreError: one of the two is damaged, or they do not belong together.
        UsageError: `method` has the top samples alone.
    """
    directory.require(REDUCE.of(method), f"hydra-pipe reduce {directory.path} --method {method}")
    found = ReducedRun.open(directory, method)
    facts = _table_facts(directory, method, found, found.relevance.attributes)
    own = _own_relevance(directory, method, found.samples.n_samples)
    return ExportSource(**vars(found), **facts, own=own)


def open_top_source(directory: RunDirectory, method: str) -> TopSource:
    """Return the top samples of `method` and their recording. Raises: as `open_source`."""
    stage = TOPS.of(method)
    directory.require(stage, directory.command(stage))
    found = ReducedTops.open(directory, method)
    return TopSource(**vars(found), **_table_facts(directory, method, found, found.tops.attributes))


def _table_facts(
    directory: RunDirectory, method: str, found: SamplesOfColumns, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of `TableSource` that every result has."""
    meta = rankings.metadata(
        method, attributes[names.SIGN], attributes[names.UNIT], directory.run_id
    )
    return {
        "method": method,
        "meta": meta,
        "train_labels": found.samples.labels(),
        "test_labels": found.labels_of_columns(),
        "train_keys": found.samples.keys(),
        "test_keys": found.keys_of_tests(),
    }


def check_ranks(method: str) -> None:
    """Refuse a result that is not for test samples.

    Raises:
        UsageError: `method` is the relevance of samples for themselves.
    """
    if ResultName.parse(method).is_of_itself:
        raise UsageError(
            f"--method {method} ranks nothing: its values are the column self_relevance of other "
            "methods' samples.parquet"
        )


def own_checksums(directory: RunDirectory, method: str) -> object:
    """Return the checksums of the relevance of samples for themselves.

    The relevance is over the same steps as `method`. None: it was not computed.
    """
    return directory.checksums(REDUCE.of(ResultName.parse(method).itself))


def _own_relevance(
    directory: RunDirectory, method: str, n_samples: int
) -> NDArray[np.float32] | None:
    """Return the relevance of samples for themselves, shape (sample,). None: it was not computed.

    Raises:
        StoreError: the relevance is damaged.
    """
    if own_checksums(directory, method) is None:
        return None
    array = open_relevance(directory.path / names.RELEVANCE, str(ResultName.parse(method).itself))
    if array.shape != (n_samples, 1) or columns_of(array).by != ITSELF:
        raise StoreError(
            f"{array.path} has not one value for each of {n_samples} samples: "
            f"{RELEVANCE_UNREADABLE}"
        )
    return read_relevance(array, slice(None))[:, 0]
