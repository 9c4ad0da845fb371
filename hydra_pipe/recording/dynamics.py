"""Dynamics of a training: the logits, the last layer's input and the loss of each row's sample.

Nothing is computed while the passes run. Outputs and inputs wait, and those of several steps are
converted together.

Symbols: B samples in a pass, K outputs of a sample, d numbers of the last layer's input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.maths.sketch import philox_of, random_signs
from hydra_pipe.recording.precision import full_precision
from hydra_pipe.recording.seen_outputs import SeenOutput, placed_once
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import LAST_INPUTS, TOP, DynamicsShape
from hydra_pipe.store.zarr.table import TableColumn

_LARGEST = float(torch.finfo(torch.float16).max)
# Outputs and inputs of at most this many bytes wait.
_WAITING_BYTES = 2**20

Columns = dict[str, NDArray[np.generic]]


def projection(seed: int, n_inputs: int) -> Tensor:
    """Return the matrix that projects the last layer's input, shape (d, 32), float32.

    Its elements are random signs over the root of 32, so that inner products are kept on average.
    They are a function of the seed and d alone: bits of Philox, as in `hydra_pipe.maths.sketch`.

    Args:
        seed: seed of the run.
        n_inputs: d, more than 32.
    """
    philox = philox_of(f"{seed}\n{names.LAST_INPUT}\n{n_inputs}")
    signs = random_signs(philox, n_inputs * LAST_INPUTS).float()
    return signs.view(n_inputs, LAST_INPUTS).div(LAST_INPUTS**0.5)


@dataclass(slots=True)
class _Waiting:
    """A pass, and the arrays that its dynamics go to."""

    seen: SeenOutput
    columns: Mapping[str, NDArray[np.generic]]


class DynamicsWatch:
    """Collector of the logits and of the last layer's inputs of a training's rows.

    Args:
        seed: seed of the projection of inputs.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        #: sizes of the dynamics, from the first pass; None until a pass was seen
        self.shape: DynamicsShape | None = None
        self._projections: dict[tuple[int, torch.device], Tensor] = {}
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        # converted values on their device, and the arrays that they go to
        self._converted: list[tuple[Tensor, list[NDArray[np.generic]]]] = []

    def observe(self, passes: Sequence[SeenOutput], batch: int, *, mixed: bool) -> Columns:
        """Take the passes of a step that is about to be recorded.

        Args:
            passes: passes of the step.
            batch: number of rows of the step, shares of other samples included.
            mixed: True if rows are shared: no output is of one sample alone.

        Returns:
            An array for each column of the shape, of `batch` rows. `fill` fills the arrays in.
            Unknown values are NaN, and class -1.
        """
        alone = [] if mixed else placed_once(passes, batch)
        if self.shape is None and passes:
            self.shape = _shape_of(passes[0])
        shape = self.shape or DynamicsShape()
        columns = {c.name: _unknown(c.dtype, batch, c.width) for c in _columns_of(shape)}
        for seen in alone:
            if columns and _shape_of(seen).n_outputs == shape.n_outputs:
                rows = slice(seen.first, seen.first + len(seen.output))
                own = {name: values[rows] for name, values in columns.items()}
                self._waiting.append(_Waiting(seen, own))
                self._waiting_bytes += _nbytes(seen.output) + _nbytes(seen.last_input)
        if self._waiting_bytes > _WAITING_BYTES:
            self._convert()
        return columns

    def take(self) -> list[Tensor]:
        """Return the values that `fill` needs on the host, on their devices."""
        self._convert()
        return [values for values, _ in self._converted]

    def fill(self, values: Sequence[NDArray[np.generic]]) -> None:
        """Fill in the arrays that `observe` has returned so far.

        Args:
            values: values of the last `take`.
        """
        converted, self._converted = self._converted, []
        for found, (_, outs) in zip(values, converted, strict=True):
            first = 0
            for out in outs:
                out[:] = found[first : first + len(out)]
                first += len(out)

    def _convert(self) -> None:
        """Convert the waiting outputs and inputs, on their devices."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        # the loop may have overwritten an output since then
        waiting = [w for w in waiting if w.seen.output._version == w.seen.version]
        for group in _groups(waiting, lambda seen: (seen.output.dtype, seen.output.device)):
            self._keep_outputs(group)
        with_inputs = [w for w in waiting if w.seen.last_input is not None]
        for group in _groups(with_inputs, lambda seen: _form(seen.last_input)):
            self._keep_inputs(group)

    def _keep_outputs(self, group: Sequence[_Waiting]) -> None:
        assert self.shape is not None
        outputs = torch.cat([w.seen.output for w in group])
        if self.shape.keeps_all:
            self._note(group, names.LOGITS, _as_float16(outputs))
            return
        gradients = torch.cat([w.seen.gradient for w in group])
        least, target = gradients.min(1, keepdim=True)
        label = torch.where(least < 0, outputs.gather(1, target), torch.nan)
        top, classes = outputs.topk(TOP, dim=1)
        total = outputs.float().logsumexp(1, keepdim=True).to(outputs.dtype)
        self._note(group, names.LOGITS, _as_float16(torch.cat([label, total, top], 1)))
        self._note(group, names.TOP_CLASSES, classes.int())

    def _keep_inputs(self, group: Sequence[_Waiting]) -> None:
        assert self.shape is not None
        inputs = torch.cat([w.seen.last_input for w in group if w.seen.last_input is not None])
        inputs = inputs.float()
        if inputs.shape[1] > LAST_INPUTS:
            with full_precision(inputs):
                inputs = inputs @ self._projection(inputs)
        if inputs.shape[1] == self.shape.n_inputs:
            self._note(group, names.LAST_INPUT, _as_float16(inputs))

    def _note(self, group: Sequence[_Waiting], name: str, values: Tensor) -> None:
        self._converted.append((values, [one.columns[name] for one in group]))

    def _projection(self, inputs: Tensor) -> Tensor:
        key = (inputs.shape[1], inputs.device)
        if key not in self._projections:
            self._projections[key] = projection(self._seed, key[0]).to(inputs.device)
        return self._projections[key]


def _shape_of(seen: SeenOutput) -> DynamicsShape:
    if seen.output.dim() != 2 or not seen.output.is_floating_point():
        return DynamicsShape()
    n_inputs = 0 if seen.last_input is None else min(LAST_INPUTS, seen.last_input.shape[1])
    return DynamicsShape(seen.output.shape[1], n_inputs)


@lru_cache
def _columns_of(shape: DynamicsShape) -> list[TableColumn]:
    """Return the columns of a shape, but for the loss and the target: the curvature finds these."""
    return [c for c in shape.columns if c.name not in (names.LOSS, names.TARGET)]


def _unknown(dtype: str, batch: int, width: tuple[int, str] | None) -> NDArray[np.generic]:
    shape = (batch,) if width is None else (batch, width[0])
    return np.full(shape, -1 if dtype == "int32" else np.nan, dtype)


def _nbytes(values: Tensor | None) -> int:
    # a view keeps the whole storage of its base in memory
    return 0 if values is None else values.untyped_storage().nbytes()


def _form(values: Tensor | None) -> tuple[object, ...]:
    assert values is not None
    return values.dtype, values.device, values.shape[1:]


def _groups(
    waiting: Sequence[_Waiting], key: Callable[[SeenOutput], object]
) -> list[list[_Waiting]]:
    found: dict[object, list[_Waiting]] = {}
    for one in waiting:
        found.setdefault(key(one.seen), []).append(one)
    return list(found.values())


def _as_float16(values: Tensor) -> Tensor:
    return values.float().clamp(-_LARGEST, _LARGEST).half()
