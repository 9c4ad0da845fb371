"""The part of a sweep outside of its core: each test's own gradient in each shell.

Outside of the core an adjoint stays in the span of the test's own gradient in each shell, h_s. So
it is a number for each shell s. Curvature acts on these numbers as C does on the span (Galerkin):
with the unit vectors e_s = h_s / |h_s| as columns of E, C becomes E.T C E, a small matrix for each
test. It is saturated as in `maths/fisher.py`: (I + B K)^-1 B g with B = E.T C E.

Directions outside of the core have little curvature each, and are many. No curvature at all would
overstate what they keep of early steps; the curvature along the test's own gradient does not.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hydra_pipe.maths.fisher import FORMS, Form
from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.reduction.sweep import Move
from hydra_pipe.types import F32


class Shells:
    """The adjoints of tests in shells.

    Args:
        squares: squared norm of the test gradient in each shell, shape (shell, test), float32.
        series: series of each shell, ascending, shape (shell,).
        schedule: settings of every step, shape (step, series).
        forms: forms of the curvature.
    """

    def __init__(
        self,
        squares: F32,
        series: Sequence[int],
        schedule: Schedule,
        forms: Sequence[Form] = FORMS,
    ) -> None:
        lengths = np.sqrt(squares).T
        # 1 / |h_s|, shape (test, shell); 0 where the test gradient has nothing in the shell
        self._inverse: F32 = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        # coordinates along the unit vectors, shape (form, test, shell)
        self.a: F32 = np.tile(lengths, (len(forms), 1, 1))
        self.v = np.zeros_like(self.a)
        self._schedule, self._forms = schedule, forms
        bounds = np.searchsorted(series, sorted(set(series)), side="right").tolist()
        self._places = [
            (number, slice(first, last))
            for number, first, last in zip(
                sorted(set(series)), [0, *bounds[:-1]], bounds, strict=True
            )
        ]

    def step(self, number: int, scores: F32, count: F32, rho: F32) -> F32:
        """Take one step back, and return the products of its rows with g, mean over the forms.

        Args:
            number: number of the step.
            scores: products of the rows c r(i, t) with h_s, shape (shell, row, test). Overwritten.
            count: n / c of each row, shape (row,). See `Recursion.step`.
            rho: curvature weight of each row, shape (row,).

        Returns:
            Shape (row, test), float32.
        """
        g = np.empty_like(self.a)
        kappas = np.zeros((len(self._forms), len(scores)), np.float32)
        for series, own in self._places:
            move = Move(self._schedule, number, series, self._forms)
            move.take(self.a[..., own], self.v[..., own], g[..., own])
            kappas[:, own] = np.array(move.kappas)[:, None]
        scores *= self._inverse.T[:, None, :]
        mean = sum(form.share * of_form for form, of_form in zip(self._forms, g, strict=True))
        found: F32 = np.einsum("srt,ts->rt", scores, mean)
        by_test = np.ascontiguousarray(scores.transpose(2, 0, 1))
        for form, kappa, of_form, a in zip(self._forms, kappas, g, self.a, strict=True):
            weight = count * form.weight(rho)
            curvature = (by_test * weight) @ by_test.swapaxes(1, 2)
            pulled = curvature @ of_form[:, :, None]
            curvature *= kappa
            np.einsum("tss->ts", curvature)[:] += 1
            a += np.linalg.solve(curvature, pulled)[:, :, 0]
        return found

    def arrays(self) -> dict[str, F32]:
        """Return the arrays of the state by name."""
        return {"a of shells": self.a, "v of shells": self.v}

    def restore(self, arrays: Mapping[str, F32]) -> None:
        """Resume from the arrays that `arrays` returned."""
        for name, own in self.arrays().items():
            np.copyto(own, arrays[name])
