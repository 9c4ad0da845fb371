"""Method `hydra-fisher`: the backward sweep with the saturated empirical Fisher, for one block of columns (docs/architecture.md).

Carried, for each column (a test sample, or a mean of some), from the last step to the first: the adjoint a of the parameters and v
of the momentum buffer, float32, in the features that the rows are recorded in.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.fisher import saturated, saturation
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.reduction.loops import add_rows

Floats = NDArray[np.float32]
# features [first, last), and the series of the schedule that they follow
Span = tuple[int, int, int]


class Sweep:
    """The state of a sweep, and its sums.

    Args:
        tests: h, shape (column, feature), float32: becomes the adjoint, and is changed.
        schedule: of every step, shape (step, series).
        spans: of the features, in order; together all of them.
        n_samples: training samples.
    """

    def __init__(self, tests: Floats, schedule: Schedule, spans: Sequence[Span], n_samples: int) -> None:
        self.a, self.v = tests, np.zeros_like(tests)
        # what training samples have added up to, - R, shape (sample, column)
        self.sums: Floats = np.zeros((n_samples, len(tests)), np.float32)
        # steps that were taken, and the sum of the shares of their curvature that were left
        self.n_steps, self.left = 0, 0.0
        self._schedule, self._spans = schedule, spans
        self._g, self._pull = np.empty_like(tests), np.zeros_like(tests)

    def step(self, number: int, rows: Floats, weight: Floats, sample: NDArray[np.int64]) -> None:
        """Go one step back.

        Args:
            number: of the step.
            rows: c r(i, t), as the update used them, shape (row, feature).
            weight: of each row in the curvature, sum of weight (c r)(c r).T, shape (row,), not negative.
            sample: of each row, shape (row,).
        """
        kappas = [self._advance(number, span) for span in self._spans]
        scores = rows @ self._g.T
        add_rows(scores, sample, self.sums)
        root = np.sqrt(weight)[:, None]
        scaled = rows * root
        gram = np.zeros((len(rows), len(rows)))
        for kappa, (first, last, _) in zip(kappas, self._spans, strict=True):
            if kappa:
                own = scaled[:, first:last]
                gram += kappa * (own @ own.T)
        pulled, left = saturated(gram, (root * scores).astype(np.float64))
        np.matmul(pulled.T.astype(np.float32), scaled, out=self._pull)
        self.a += self._pull
        self.n_steps, self.left = self.n_steps + 1, self.left + left

    def _advance(self, number: int, span: Span) -> float:
        """g of some features, and a and v before the step but for its curvature. Returns: kappa; 0 where nothing was updated."""
        first, last, series = span
        a, v, g = self.a[:, first:last], self.v[:, first:last], self._g[:, first:last]
        s = self._schedule
        at: Any = (number, series)
        eta, mu, tau, decay = (float(x[at]) for x in (s.learning_rate, s.momentum, s.dampening, s.weight_decay))
        nesterov, started = bool(s.nesterov[at]), bool(s.momentum_started[at])
        if not s.updated[at]:
            g[:] = 0
            return 0.0
        np.multiply(a, -eta, out=g)
        if mu:
            gain = 1.0 if started else 1.0 - tau
            v += mu * g if nesterov else g
            if nesterov:
                g += gain * v
            else:
                np.multiply(v, gain, out=g)
            v *= 0.0 if started else mu
        if (shrink := float(s.decoupled_decay[at])) != 0:
            a *= 1.0 - shrink
        if decay:
            a += decay * g
        return saturation(eta, mu, tau, nesterov=nesterov)
