"""A buffer for the rows of several steps, which are checked, quantised and stored together.

One step of a small model is a few hundred small tensors. Treated one by one, their fixed cost
equals the cost of training itself. A row buffer takes the tensors in one copy. The rest of the work
is done on many steps at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import GradientMismatchError, NonFiniteError
from hydra_pipe.maths.gradient_check import Balance, balance, best_explained
from hydra_pipe.maths.quantise import Dtype, part_scale, scale_in_place
from hydra_pipe.plan.layout import Layout
from hydra_pipe.recording.checked_steps import (
    IMBALANCE_LIMIT,
    Checked,
    Entry,
    Finite,
    OnHost,
    imbalance_limit,
)
from hydra_pipe.recording.collectives import Processes, SingleProcess
from hydra_pipe.recording.encoder import RowEncoder
from hydra_pipe.recording.encodings import Reduced
from hydra_pipe.recording.explanations import Evidence, penalty_of
from hydra_pipe.recording.micro_batches import Mixture
from hydra_pipe.recording.precision import full_precision
from hydra_pipe.recording.transfer import copy_rows, to_host
from hydra_pipe.store import names
from hydra_pipe.store.zarr.table import TableWriter

# Largest size of a row buffer, unless one batch is larger: the fixed cost becomes small, and the
# row buffer stays in the cache.
BUFFER_BYTES = 8 * 2**20
# An error in a step is reported at most this many steps later.
BUFFER_STEPS = 16
# Most places of a batch with cached views. Batches of one size, with a shorter one at the end of
# each epoch, have fewer.
_MOST_VIEWS = 4 * BUFFER_STEPS

# Columns of a table of rows that the buffer itself fills.
_OWN = (names.GRADIENT, names.SCALE)


class RowBuffer:
    """A buffer for the rows of some steps.

    Args:
        encoder: encoder that gives the rows their columns.
        parameters: parameters of the blocks. The row buffer has their device, and their dtype or
            float32 if that is wider.
        batch: rows of a step; a larger step makes more room.
        scalar: ratio of the whole gradient to the sum of the rows, if known. None: it is found for
            each step.
        explain: (name of a block's parameter, evidence) -> words that say why its books may not
            balance.
    """

    def __init__(
        self,
        encoder: RowEncoder,
        parameters: Sequence[Tensor],
        batch: int,
        scalar: float | None = None,
        explain: Callable[[str, Evidence], str] | None = None,
    ) -> None:
        self._encoder, self._scalar, self._parameters, self._explain = (
            encoder,
            scalar,
            parameters,
            explain,
        )
        self._dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self._device = parameters[0].device
        # views of the columns at each place of a batch, made once
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._entries: list[Entry] = []
        self._on_host: OnHost | None = None
        self._room = self._room_for(batch)
        self._make_room()

    def _room_for(self, batch: int) -> int:
        """Return the number of rows before a flush, if the first step after the last has `batch`.

        The number depends on no earlier step.
        """
        wanted = BUFFER_BYTES // (self._encoder.layout.n_features * self._dtype.itemsize)
        return max(batch, min(wanted // batch, BUFFER_STEPS) * batch)

    def _make_room(self) -> None:
        self.features = self._empty(self._room, self._encoder.layout.n_features)
        width = self._encoder.check_columns[-1].stop
        # projections of the whole gradients
        self._actual = self._empty(BUFFER_STEPS, width)
        self._views.clear()
        self._actual_views = [
            [row[columns] for columns in self._encoder.check_columns] for row in self._actual
        ]

    def _grow(self, rows: int) -> None:
        """Make room for `rows` rows, including the rows in the buffer.

        With several ranks the number of steps decides when to flush, not the room.
        """
        larger = self._empty(rows, self._encoder.layout.n_features)
        larger[: self._filled] = self.features[: self._filled]
        self.features = larger
        self._views.clear()

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self._dtype, device=self._device)

    @property
    def layout(self) -> Layout:
        """The block directory of the rows."""
        return self._encoder.layout

    def capacity(self, batch: int) -> int:
        """Return the number of steps of `batch` rows that the row buffer has room for."""
        return min(BUFFER_STEPS, self._room_for(batch) // batch)

    @property
    def _filled(self) -> int:
        return self._entries[-1].rows.stop if self._entries else 0

    def fits(self, batch: int) -> bool:
        """Tell whether `batch` more rows may be added before a flush; true if it is empty."""
        return not self._entries or (
            len(self._entries) < BUFFER_STEPS and self._filled + batch <= self._room
        )

    def add(
        self,
        contributions: Mapping[int, Sequence[Reduced]],
        gradients: Sequence[Tensor | None],
        columns: Mapping[str, NDArray[np.generic]],
        when: str,
        *,
        half: bool,
        mixture: Mixture | None = None,
    ) -> None:
        """Add the rows of a step.

        Args:
            contributions: reduced contributions of each block that got a gradient.
            gradients: whole gradients of the blocks; None: the block has none.
            columns: further columns of each row, each of shape (batch,).
            when: moment in words, such as "at step 3".
            half: True if gradients went through half precision on their way.
            mixture: shares of other samples in the rows; then `columns` have the entries for these
                shares after those of the step's own samples.

        Raises:
            LayerError: a factored block no longer has one position a sample.
        """
        batch = len(next(iter(columns.values())))
        if not self._entries:
            self._room = self._room_for(batch)
            if self._room > len(self.features):
                self._make_room()
        elif self._filled + batch > len(self.features):
            self._grow(self._filled + batch)
        rows = slice(self._filled, self._filled + batch)
        own = rows if mixture is None else slice(rows.start, rows.stop - len(mixture.places))
        self._encoder.place(contributions, self._parts_at(own))
        if mixture is not None:
            self._share_out(own, rows.stop, mixture)
        step = len(self._entries)
        self._encoder.project_for_check(gradients, self._actual_views[step], contributions)
        present = np.zeros(len(gradients), bool)
        present[list(contributions)] = True
        norms = {}
        for index, given in contributions.items():
            # Terms of one row may cancel: those of several passes, or of several uses of one
            # parameter, as those of a sum over positions. So the norms of the terms are summed.
            meet = len({r.first for r in given}) < len(given)
            norms_of = [_norm_of(r) if meet and r.norm is None else r.norm for r in given]
            known = [norm for norm in norms_of if norm is not None]
            if known and len(known) == len(given):
                norms[index] = torch.stack(known).sum() if len(known) > 1 else known[0]
        dtypes = (
            {torch.bfloat16}
            if half
            else {gradient.dtype for gradient in gradients if gradient is not None}
        )
        limit = max([imbalance_limit(dtype) for dtype in dtypes])
        self._entries.append(Entry(rows, columns, when, limit, present, norms))

    def _share_out(self, own: slice, stop: int, mixture: Mixture) -> None:
        """Give other samples their shares of the rows at `own`, and leave the own samples the rest.

        The shares of others go into the places after `own`.
        """
        weights = torch.from_numpy(mixture.weights).to(self.features)[:, None]
        places = torch.from_numpy(mixture.places).to(self._device)
        values = self.features[own]
        others = self.features[own.stop : stop]
        torch.index_select(values, 0, places, out=others)
        for columns in self._encoder.linear_columns:
            others[:, columns] *= 1 - weights[places]
            values[:, columns] *= weights

    def _parts_at(self, rows: slice) -> list[Tensor]:
        key = (rows.start, rows.stop)
        views = self._views.get(key)
        if views is None:
            # batches of ever new sizes would fill the cache for the whole run
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            views = self._views[key] = self._encoder.views(self.features[rows])
        return views

    def check(self, ids: str | None = None, first_id: int = 0) -> Checked:
        """Check the steps in the row buffer, one at least, in order, and forget them.

        New steps may come once these are written.

        Args:
            ids: name of the entry in `columns` with the sample ids, for messages; None: samples are
                counted from `first_id` on.
            first_id: id of the first sample, if `ids` is None.
        """
        finite = self.check_finite(ids, first_id)
        checked = self.check_gradient(finite, len(finite.entries), SingleProcess())
        return replace(checked, error=checked.error or finite.error)

    def check_finite(self, ids: str | None = None, first_id: int = 0) -> Finite:
        """Find rows that are not finite: the first half of `check`."""
        if self._on_host is None:
            self.accept(to_host(self.prepare()))
        assert self._on_host is not None
        entries, self._entries = self._entries, []
        largest = self._on_host.largest
        per_part = largest.astype(np.float64)
        finite = np.isfinite(per_part)
        bad = next((k for k, entry in enumerate(entries) if not finite[entry.rows].all()), None)
        error = None if bad is None else self._not_finite(entries[bad], finite, ids, first_id)
        return Finite(entries[:bad], largest, per_part, error)

    def prepare(self) -> list[Tensor]:
        """Return the values that `check` needs on the host, on the device of the rows.

        Returns:
            The largest magnitudes, both sides of the gradient's check, and known norms.
        """
        entries = self._entries
        features = self.features[: entries[-1].rows.stop]
        sizes = [entry.rows.stop - entry.rows.start for entry in entries]
        norms = [norm for entry in entries for norm in entry.norms.values()]
        with full_precision(features):  # a loop may cast where it takes test gradients or closes
            return [
                self._largest(len(features)),
                self._encoder.sums(features, sizes),
                self._actual[: len(entries)],
                *([torch.stack([norm.to(self._dtype) for norm in norms])] if norms else []),
            ]

    def accept(self, values: Sequence[NDArray[Any]]) -> None:
        """Take the values of `prepare` from the host. No step may be added in between."""
        self._on_host = OnHost(*values)

    def check_gradient(self, finite: Finite, n_steps: int, processes: Processes) -> Checked:
        """Check the books of the first `n_steps` steps over all `processes`.

        This is the second half of `check`. DDP takes the mean of the ranks' gradients, so the rows
        are compared with this mean.
        """
        books, error = self._check_gradient(finite.entries[:n_steps], finite.per_part, processes)
        self._on_host = None
        return Checked(finite.entries[: len(books.scalar)], finite.largest, books, error)

    def write(self, checked: Checked, table: TableWriter) -> None:
        """Quantise the checked rows and append them to `table`."""
        if not checked.entries:
            return
        entries, n_rows = checked.entries, checked.entries[-1].rows.stop
        features = self.features[:n_rows]
        dtype = cast("Dtype", table.dtype_of(names.GRADIENT))
        scales = part_scale(torch.from_numpy(checked.largest[:n_rows]), dtype)
        if dtype != "float32":
            on_device = scales.to(self._device)
            for part, columns in enumerate(self._encoder.part_columns):
                scale_in_place(features[:, columns], on_device[:, part], dtype)
        of_blocks = self._encoder.products(scales.numpy())
        present = np.stack([e.present for e in entries])
        # a factored bias without a gradient shares its weight's columns: its scale becomes 0
        if not present.all():
            of_blocks *= np.repeat(present, [e.rows.stop - e.rows.start for e in entries], axis=0)
        further = {
            name: np.concatenate([entry.columns[name] for entry in entries])
            for name in entries[0].columns
        }
        for rows, views in table.reserve(n_rows):
            copy_rows(features[rows], views[names.GRADIENT], table.wait_for)
            views[names.SCALE][:] = of_blocks[rows]
            for name, view in views.items():
                if name in further:
                    view[:] = further[name][rows]
                elif name not in _OWN:  # another rank has seen what this rank has not
                    view[:] = -1 if view.dtype == np.int32 else np.nan

    def _largest(self, n_rows: int) -> Tensor:
        """Return the largest magnitude in each row of each part, shape (row, part)."""
        parts = [self.features[:n_rows, columns] for columns in self._encoder.part_columns]
        # amax and amin need no copy for the magnitudes: measured at three quarters of the time
        return torch.stack([torch.maximum(part.amax(1), -part.amin(1)) for part in parts], dim=1)

    def _not_finite(
        self, entry: Entry, finite: NDArray[np.bool_], ids: str | None, first_id: int
    ) -> NonFiniteError:
        rows = finite[entry.rows]
        columns = self._encoder.part_columns[int(rows.all(axis=0).argmin())]
        block = next(
            b
            for b in self._encoder.layout.blocks
            if (columns.start, columns.stop) in (b.columns, b.inputs)
        )
        numbers = (
            entry.columns[ids] if ids else first_id + np.arange(entry.rows.start, entry.rows.stop)
        )
        bad = numbers[~rows.all(axis=1)]
        shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        return NonFiniteError(
            f"the gradient of {block.name} is not finite {entry.when} for samples {shown}: lower "
            "the learning rate or clip; the "
            f"steps before it are recorded and readable"
        )

    def _check_gradient(
        self, entries: Sequence[Entry], per_part: NDArray[np.float64], processes: Processes
    ) -> tuple[Balance, GradientMismatchError | None]:
        """Return the balance of the steps before the first that is off, and its error or None."""
        if not entries:
            return Balance(np.empty(0), np.empty((0, len(self._encoder.layout.blocks)))), None
        assert self._on_host is not None
        n_rows, n_steps = entries[-1].rows.stop, len(entries)
        starts = np.array([columns.start for columns in self._encoder.check_columns])
        present = np.stack([entry.present for entry in entries])
        sums = self._on_host.sums[:n_steps].astype(np.float64)
        # a factored bias without a gradient shares its weight's columns, so its sum is set to 0
        if not present.all():
            sums = sums * np.repeat(
                present, [c.stop - c.start for c in self._encoder.check_columns], axis=1
            )
        grads = self._on_host.actual[:n_steps].astype(np.float64)
        magnitude = self._magnitude(entries, per_part[:n_rows]) * present
        sums, magnitude = processes.mean(sums), processes.mean(magnitude)
        limit = np.array([entry.limit for entry in entries])[:, None]
        eps = torch.finfo(self._dtype).eps
        books = balance(sums, grads, starts, magnitude, eps, self._scalar)
        for step in np.flatnonzero(~(books.imbalance <= limit).all(axis=1)).tolist():
            of_step = (sums[[step]], grads[[step]], starts, magnitude[[step]], eps)
            better = best_explained(*of_step, limit[step])
            if self._scalar is None and (better.imbalance <= limit[step]).all():
                books.scalar[step], books.imbalance[step] = better.scalar[0], better.imbalance[0]
            else:
                good = Balance(books.scalar[:step], books.imbalance[:step])
                missed = grads[step] - better.scalar[0] * sums[step]
                return good, self._off_balance(entries[step], better.imbalance[0], missed)
        return books, None

    def _off_balance(
        self, entry: Entry, imbalance: NDArray[np.float64], missed: NDArray[np.float64]
    ) -> GradientMismatchError:
        worst = int(np.argmax(np.nan_to_num(imbalance, nan=np.inf)))
        name = self._encoder.layout.blocks[worst].name
        if not np.isfinite(missed[self._encoder.check_columns[worst]]).all():
            return GradientMismatchError(
                f"the gradient of {name} is not finite {entry.when}, and each sample's share is: "
                "the sum overflowed, as in half "
                f"precision: use torch.amp.GradScaler, lower its init_scale, or train in bfloat16"
            )
        if not np.isfinite(imbalance[worst]):
            return GradientMismatchError(
                f"the books of {name} cannot be checked {entry.when}: norms of its rows are not "
                "finite, as in half precision: call "
                f"backward() outside of autocast, lower the learning rate, or clip"
            )
        said = (
            f"the books do not balance {entry.when}: the recorded rows of {name} miss "
            f"{imbalance[worst]:.2%} of its gradient"
        )
        if self._explain is None:
            return GradientMismatchError(said)
        off = np.flatnonzero(~(imbalance <= entry.limit)).tolist()
        values = [p.detach() if index in off else None for index, p in enumerate(self._parameters)]
        found = [
            self._projected_for_check(v, off)
            for v in (values, [None if p is None else p.sign() for p in values])
        ]
        evidence = Evidence(
            has_rows=bool(entry.present[worst]),
            penalty=penalty_of(
                np.concatenate([missed[self._encoder.check_columns[index]] for index in off]),
                *found,
            ),
            training=self._scalar is None,
            half=entry.limit >= IMBALANCE_LIMIT[torch.float16],
        )
        return GradientMismatchError(f"{said}. {self._explain(name, evidence)}")

    def _projected_for_check(
        self, values: Sequence[Tensor | None], wanted: Sequence[int]
    ) -> NDArray[np.float64]:
        """Project `values`, one for each block, as the books project gradients.

        Returns:
            The projections of the blocks `wanted`, side by side.
        """
        outs = [
            self._empty(1, columns.stop - columns.start)[0]
            for columns in self._encoder.check_columns
        ]
        self._encoder.project_for_check(values, outs, {})
        return torch.cat([outs[index] for index in wanted]).double().cpu().numpy()

    def _magnitude(
        self, entries: Sequence[Entry], per_part: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return an upper bound of the summed norms of each block's rows, shape (step, block)."""
        products = self._encoder.products(per_part)
        magnitude: NDArray[np.float64] = np.add.reduceat(
            products, [entry.rows.start for entry in entries], axis=0
        )
        magnitude *= np.sqrt([block.numel for block in self._encoder.layout.blocks])
        known = [(step, index) for step, entry in enumerate(entries) for index in entry.norms]
        if known:
            assert self._on_host is not None
            assert self._on_host.norms is not None
            values = self._on_host.norms[: len(known)].astype(np.float64)
            magnitude[[step for step, _ in known], [index for _, index in known]] = values
        return magnitude


def _norm_of(reduced: Reduced) -> Tensor | None:
    value = reduced.value
    return torch.linalg.vector_norm(value, dim=1).sum() if isinstance(value, Tensor) else None
