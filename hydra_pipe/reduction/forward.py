"""The transposed sweep of `sweep.py`: forward in time, with a column for each training sample.

The backward sweep has a column for each test sample instead. It is linear in h, and
R(i, j) = <H(i), h_j>. So H(i) itself can be carried through the steps: it is the change of the
parameters with the weight of sample i. The result equals a backward sweep of every feature. The
forward sweep is cheaper when there are fewer samples than features.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.fisher import FORMS, Form
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.reduction.sweep import Move, Recursion, Span
from hydra_pipe.types import F32


class ForwardSweep(Recursion):
    """The state of a forward sweep.

    Args:
        samples: the first training sample that has a column, and one past the last.
        width: number of features.
        schedule: settings of every step, shape (step, series).
        spans: spans of the features, in order. Together they cover all features.
        forms: forms of the curvature.
    """

    def __init__(
        self,
        samples: tuple[int, int],
        width: int,
        schedule: Schedule,
        spans: Sequence[Span],
        forms: Sequence[Form] = FORMS,
    ) -> None:
        super().__init__(samples[1] - samples[0], schedule, spans, forms)
        # x: change of the parameters with each sample's weight, shape (form and column, feature);
        # m: the same for the momentum buffer
        self.x: F32 = np.zeros((len(forms) * self._n_columns, width), np.float32)
        self.m = np.zeros_like(self.x)
        self._samples = samples
        # the latest step, which is applied together with the next one: its moves, the factors of
        # its rows in the change of the gradient, shape (form and column, row), and its rows
        self._last: tuple[dict[int, Move], F32, F32] | None = None

    def step(self, number: int, rows: F32, count: F32, rho: F32, sample: NDArray[np.int64]) -> None:
        """Take one step forward. See `Recursion`."""
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
        factors = self._pulls(
            grams, scores.reshape(len(rows), n_forms, self._n_columns), count, rho
        )
        mine = np.flatnonzero((sample >= self._samples[0]) & (sample < self._samples[1]))
        # the weight of a sample multiplies the sample's own rows in the gradient
        factors[:, sample[mine] - self._samples[0], mine] += 1
        self._last = moves, factors.reshape(len(self.x), len(rows)), held
        self.n_steps += 1

    def finish(self) -> None:
        """See `Recursion`."""
        for tile in self._tiles:
            self._take_last(*tile)
        self._last = None

    def arrays(self) -> dict[str, F32]:
        """See `Recursion`."""
        return {"x": self.x, "m": self.m}

    def restore(self, arrays: dict[str, F32]) -> None:
        """See `Recursion`."""
        np.copyto(self.x, arrays["x"])
        np.copyto(self.m, arrays["m"])

    def changes(self, features: slice) -> F32:
        """Return the change of some parameters with each weight, mean over the forms.

        Call `finish` before.

        Returns:
            Shape (sample, feature), float32.
        """
        of_forms = self.x[:, features].reshape(len(self._forms), self._n_columns, -1)
        found: F32 = np.einsum("fsc,f->sc", of_forms, self._shares)
        return found

    def _take_last(self, first: int, last: int, series: int) -> None:
        if self._last is not None:
            moves, factors, held = self._last
            moves[series].give(
                self.x[:, first:last], self.m[:, first:last], factors @ held[:, first:last]
            )
