"""The backward sweep with the saturated empirical Fisher, for one block of columns.

Method `hydra-fisher`, docs/architecture.md. A column is a test sample, or a mean of several. For
each column the sweep carries two adjoints from the last step to the first: a of the parameters and
v of the momentum buffer. They are float32, in the features that the rows are recorded in.

The adjoints are larger than any cache. So each step goes over them once, tile by tile. A tile first
gets the addition of the curvature of the step after, then the step itself, then its products with
the rows. Each form of the curvature has adjoints of its own. The sweep returns the mean over forms.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.fisher import FORMS, Form, saturated, saturation
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.reduction.kernels import Workspace, add_rows
from hydra_pipe.types import F32, F64

# features [first, last), and the series of the schedule that applies to them
Span = tuple[int, int, int]

# values of an adjoint that are worked on at once: four such arrays fit a core's cache
_TILE_VALUES = 2**17
_LEAST_TILE, _MOST_TILE = 256, 4096


class Recursion(ABC):
    """Recursion over the steps, with one vector of features for each curvature form and column.

    Args:
        n_columns: number of columns for each form.
        schedule: settings of every step, shape (step, series).
        spans: spans of the features, in order. Together they cover all features.
        forms: forms of the curvature.
    """

    def __init__(
        self, n_columns: int, schedule: Schedule, spans: Sequence[Span], forms: Sequence[Form]
    ) -> None:
        # number of steps taken; sum over them of the share of curvature that saturation left, mean
        # over the forms
        self.n_steps, self.left = 0, 0.0
        self._schedule, self._forms, self._n_columns = schedule, forms, n_columns
        width = min(max(_TILE_VALUES // max(1, n_columns * len(forms)), _LEAST_TILE), _MOST_TILE)
        self._tiles = [
            (low, min(low + width, last), series)
            for first, last, series in spans
            for low in range(first, last, width)
        ]
        self._series = sorted({series for _, _, series in spans})
        self._shares = np.array([form.share for form in forms], np.float32)
        # buffers for the rows of two steps, used in turn
        self._held = [Workspace(), Workspace()]

    @abstractmethod
    def step(self, number: int, rows: F32, count: F32, rho: F32, sample: NDArray[np.int64]) -> None:
        """Take one step.

        Args:
            number: number of the step.
            rows: rows c r(i, t), as the update used them, shape (row, feature).
            count: n / c of each row, shape (row,), not negative. The curvature is the sum of
                n rho / c (c r)(c r).T.
            rho: curvature weight of each row, shape (row,), not negative.
            sample: sample of each row, shape (row,), int64.
        """

    @abstractmethod
    def finish(self) -> None:
        """Complete the state. Part of each step is otherwise applied with the next step."""

    @abstractmethod
    def arrays(self) -> dict[str, F32]:
        """Return the arrays of the state by name. Call `finish` before."""

    @abstractmethod
    def restore(self, arrays: dict[str, F32]) -> None:
        """Resume from the arrays that `arrays` returned."""

    def _moves(self, number: int) -> "dict[int, Move]":
        return {
            series: Move(self._schedule, number, series, self._forms) for series in self._series
        }

    def _pulls(self, grams: F64, scores: F32, count: F32, rho: F32) -> F32:
        """Return what the curvature of a step adds, as factors of the step's rows.

        Args:
            grams: products of rows with rows, times kappa, shape (form, row, row).
            scores: products of rows with columns, shape (row, form, column).
            count: n / c of each row, shape (row,), not negative.
            rho: curvature weight of each row, shape (row,), not negative.

        Returns:
            Shape (form, column, row).
        """
        factors = np.empty((len(self._forms), scores.shape[2], len(scores)), np.float32)
        for form, gram, found, factor in zip(
            self._forms, grams, scores.swapaxes(0, 1), factors, strict=True
        ):
            root = np.sqrt((count * form.weight(rho)).astype(np.float64))[:, None]
            pulled, left = saturated(gram * root * root.T, root * found)
            factor[:] = (root * pulled).T
            self.left += form.share * left
        return factors


class Sweep(Recursion):
    """The state of a sweep, and its sums.

    Args:
        tests: test gradients h, shape (column, feature), float32.
        schedule: settings of every step, shape (step, series).
        spans: spans of the features, in order. Together they cover all features.
        n_samples: number of training samples.
        forms: forms of the curvature.
    """

    def __init__(
        self,
        tests: F32,
        schedule: Schedule,
        spans: Sequence[Span],
        n_samples: int,
        forms: Sequence[Form] = FORMS,
    ) -> None:
        super().__init__(len(tests), schedule, spans, forms)
        # shape (form and column, feature): the columns of a form lie together
        self.a: F32 = np.tile(tests, (len(forms), 1))
        self.v = np.zeros_like(self.a)
        # - R: the sum of the products with the rows of each sample, shape (sample, column)
        self.sums: F32 = np.zeros((n_samples, len(tests)), np.float32)
        # addition of the latest step's curvature to the adjoint: factors, shape
        # (form and column, row), and the rows that they multiply
        self._pull: tuple[F32, F32] | None = None
        self._g = Workspace()

    def step(self, number: int, rows: F32, count: F32, rho: F32, sample: NDArray[np.int64]) -> None:
        """Take one step back. See `Recursion`."""
        moves = self._moves(number)
        held = self._held[self.n_steps % 2].matrix(*rows.shape)
        scores, n_forms = np.zeros((len(rows), len(self.a)), np.float32), len(self._forms)
        grams = np.zeros((n_forms, len(rows), len(rows)))
        for first, last, series in self._tiles:
            a, move = self.a[:, first:last], moves[series]
            self._add_pull(a, first, last)
            g = self._g.matrix(len(a), last - first)
            move.take(a, self.v[:, first:last], g)
            own = held[:, first:last]
            np.copyto(own, rows[:, first:last])
            scores += own @ g.T
            if any(move.kappas):
                product = own @ own.T
                for gram, kappa in zip(grams, move.kappas, strict=True):
                    gram += kappa * product
        of_forms = scores.reshape(len(rows), n_forms, self._n_columns)
        add_rows(
            np.ascontiguousarray(np.einsum("rfc,f->rc", of_forms, self._shares)), sample, self.sums
        )
        self._pull = self._pulls(grams, of_forms, count, rho).reshape(len(self.a), len(rows)), held
        self.n_steps += 1

    def finish(self) -> None:
        """Add the pending curvature to `a`. Otherwise the next step adds it."""
        for first, last, _ in self._tiles:
            self._add_pull(self.a[:, first:last], first, last)
        self._pull = None

    def arrays(self) -> dict[str, F32]:
        """See `Recursion`."""
        return {"a": self.a, "v": self.v, "sums": self.sums}

    def restore(self, arrays: dict[str, F32]) -> None:
        """See `Recursion`."""
        for own, kept in (
            (self.a, arrays["a"]),
            (self.v, arrays["v"]),
            (self.sums, arrays["sums"]),
        ):
            np.copyto(own, kept)

    def _add_pull(self, a: F32, first: int, last: int) -> None:
        if self._pull is not None:
            factors, held = self._pull
            a += factors @ held[:, first:last]


class Move:
    """One step of one series.

    Args:
        schedule: settings of all steps.
        number: number of the step.
        series: index of the series.
        forms: forms of the curvature.
    """

    def __init__(self, schedule: Schedule, number: int, series: int, forms: Sequence[Form]) -> None:
        at: Any = (number, series)
        settings = (
            schedule.learning_rate,
            schedule.momentum,
            schedule.dampening,
            schedule.weight_decay,
            schedule.decoupled_decay,
        )
        self._eta, self._mu, tau, self._decay, self._shrink = (
            float(values[at]) for values in settings
        )
        self._nesterov, started = bool(schedule.nesterov[at]), bool(schedule.momentum_started[at])
        self._updated = bool(schedule.updated[at])
        self._gain, self._rest = (1.0, 0.0) if started else (1.0 - tau, self._mu)
        # kappa of each form; 0 if the step did not update the series
        self.kappas = [
            saturation(self._eta, self._mu, tau, nesterov=self._nesterov, factor=form.factor)
            if self._updated
            else 0.0
            for form in forms
        ]

    def take(self, a: F32, v: F32, g: F32) -> None:
        """Fill g, and move a and v from after the step to before it. The curvature is left out."""
        if not self._updated:
            g[:] = 0
            return
        np.multiply(a, -self._eta, out=g)
        if self._mu:
            v += self._mu * g if self._nesterov else g
            if self._nesterov:
                g += self._gain * v
            else:
                np.multiply(v, self._gain, out=g)
            v *= self._rest
        if self._shrink:
            a *= 1.0 - self._shrink
        if self._decay:
            a += self._decay * g

    def give(self, x: F32, m: F32, q: F32) -> None:
        """Move x and m from before the step to after it. The transpose of `take`, with curvature.

        Args:
            x: change of the parameters, the counterpart of a.
            m: change of the momentum buffer, the counterpart of v.
            q: change of the gradient, with the curvature and without the decay. Overwritten.
        """
        if not self._updated:
            return
        if self._decay:
            q += self._decay * x
        if self._mu:
            m *= self._rest
            m += self._gain * q
            q = q + self._mu * m if self._nesterov else m
        if self._shrink:
            x *= 1.0 - self._shrink
        x -= self._eta * q
