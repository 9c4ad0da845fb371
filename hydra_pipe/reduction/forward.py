"""The sweep of `sweep.py` transposed: forward in time, with a column for each training sample in place of one for each test sample.

The sweep is linear in h, R(i, j) = <H(i), h_j>; so H(i) itself can be carried through the steps, as the change of the parameters by
the weight of sample i. What it comes to is that of the sweep of every feature; it is cheaper where there are fewer samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.fisher import FORMS, Form
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.reduction.sweep import Floats, Move, Recursion, Span


class ForwardSweep(Recursion):
    """The state of a forward sweep.

    Args:
        samples: first training sample that there is a column for, and one past the last.
        width: features.
        schedule, spans, forms: see `Recursion`.
    """

    def __init__(
        self, samples: tuple[int, int], width: int, schedule: Schedule, spans: Sequence[Span], forms: Sequence[Form] = FORMS
    ) -> None:
        super().__init__(samples[1] - samples[0], schedule, spans, forms)
        # what a weight changes of the parameters, and of the momentum buffer, shape (form and column, feature)
        self.x: Floats = np.zeros((len(forms) * self._n_columns, width), np.float32)
        self.m = np.zeros_like(self.x)
        self._samples = samples
        # the last step, which is taken with the next one: factors (form and column, row) of its rows, of what changes the gradient
        self._last: tuple[dict[int, Move], Floats, Floats] | None = None

    def step(self, number: int, rows: Floats, count: Floats, rho: Floats, sample: NDArray[np.int64]) -> None:
        """Go one step on. See `Recursion`."""
        moves, n_forms = self._moves(number), len(self._forms)
        held = self._held[self.n_steps % 2].matrix(*rows.shape)
        scores = np.zeros((len(rows), len(self.x)), np.float32)
        grams = np.zeros((n_forms, len(rows), len(rows)))
        for first, last, series in self._tiles:
            self._take_last(first, last, series)
            own = held[:, first:last]
            np.copyto(own, rows[:, first:last])
            scores += own @ self.x[:, first:last].T
            if any(moves[series].kappas):
                product = own @ own.T
                for gram, kappa in zip(grams, moves[series].kappas, strict=True):
                    gram += kappa * product
        factors = self._pulls(grams, scores.reshape(len(rows), n_forms, self._n_columns), count, rho)
        mine = np.flatnonzero((sample >= self._samples[0]) & (sample < self._samples[1]))
        # a row is added to the gradient by the weight of its own sample
        factors[:, sample[mine] - self._samples[0], mine] += 1
        self._last = moves, factors.reshape(len(self.x), len(rows)), held
        self.n_steps += 1

    def settle(self) -> None:
        """See `Recursion`."""
        for tile in self._tiles:
            self._take_last(*tile)
        self._last = None

    def arrays(self) -> dict[str, Floats]:
        """See `Recursion`."""
        return {"x": self.x, "m": self.m}

    def restore(self, arrays: dict[str, Floats]) -> None:
        """See `Recursion`."""
        np.copyto(self.x, arrays["x"])
        np.copyto(self.m, arrays["m"])

    def changes(self, features: slice) -> Floats:
        """Mean over the forms of what a weight changes of some parameters, shape (sample, feature), once it is settled."""
        of_forms = self.x[:, features].reshape(len(self._forms), self._n_columns, -1)
        found: Floats = np.einsum("fsc,f->sc", of_forms, self._shares)
        return found

    def _take_last(self, first: int, last: int, series: int) -> None:
        if self._last is not None:
            moves, factors, held = self._last
            moves[series].give(self.x[:, first:last], self.m[:, first:last], factors @ held[:, first:last])
