"""Storage of factored columns, row by row, while the other columns are folded."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import factored_part
from hydra_pipe.plan.rank_rows import ends_of, split
from hydra_pipe.reduction.scores import ReadWindow
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.hypergradients import write_factored
from hydra_pipe.types import F32


class FactoredKeeper:
    """Writer of the factored columns of rows, a whole shard at a time. Rows must come in order.

    Args:
        store: store of the rows.
        path: path of the hypergradients that are kept.
    """

    def __init__(self, store: Gradients, path: Path) -> None:
        self._store, self._path = store, path
        _, self._columns, self._blocks = factored_part(store.layout)
        self._pending: list[dict[str, NDArray[Any]]] = []

    def add(self, rows: slice, read: ReadWindow, weight: F32, samples: NDArray[np.int64]) -> None:
        """Keep some rows. Earlier rows of the same shard must have been added before.

        Args:
            rows: range of the rows in the store.
            read: function that returns their stored columns.
            weight: weight of each block in each row, shape (row, block).
            samples: sample of each row, shape (row,), int64.
        """
        if not self._columns:
            return
        stored = read(0, self._store.layout.n_features)[:, self._columns]
        self._pending.append(
            {names.GRADIENT: stored, names.SCALE: weight[:, self._blocks], names.SAMPLE: samples}
        )
        if rows.stop == self._store.rows.end_of_file(rows.start):
            [(part, first, _)] = split((rows.start, rows.stop), ends_of(self._store.rows.part_rows))
            values = {
                name: np.concatenate([piece[name] for piece in self._pending])
                for name in self._pending[0]
            }
            shard = first // self._store.rows.shard_rows
            write_factored(self._path, self._store.n_ranks, part, shard, values)
            self._pending = []
