"""Calls of a module in one pass, and the samples of the rows that the calls make.

Symbols: B is the number of samples in the pass. N is the number of rows of a module in the pass,
over all its calls. Rows are the entries of the first dimension of the module's outputs, one call
after the other. A module that is called once with the batch has N = B. A module that is called
sample by sample, window by window or view by view has another N. Its `SampleOrder` is the order of
the N rows.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.factors import Contribution, Factors, Summed, TokenRows
from hydra_pipe.per_sample.orders import FIRST, SampleOrder
from hydra_pipe.per_sample.registry import Rule, takes_any_leading_dimensions
from hydra_pipe.per_sample.unbatched import is_unbatched
from hydra_pipe.recording.routes import rows_at_node


@dataclass(eq=False)
class Watched:
    """A module with a layer rule, and the place of the samples in its outputs.

    Args:
        name: name of the module.
        module: module that owns recorded parameters.
        owned: block of each owned parameter, by the module's own name for the parameter.
        rule: layer rule of the module.
        order: order of the module's rows.
        is_known: True if a probe has found the order; otherwise the order is the usual one.
        is_single: True if the module had one row a sample at that probe.
    """

    name: str
    module: nn.Module
    owned: Mapping[str, int]
    rule: Rule
    order: SampleOrder = FIRST
    is_known: bool = False
    is_single: bool = True

    def wanted(self, by_graph: Collection[int]) -> list[str]:
        """Return the names of the parameters to split in the present pass."""
        own = self.module._parameters
        return [
            n
            for n, block in self.owned.items()
            if block not in by_graph and (p := own[n]) is not None and p.requires_grad
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """An output of a pass, where probes begin.

    Args:
        output: output tensor of the model.
        order: place of the samples in the output.
    """

    output: Tensor
    order: SampleOrder


@dataclass(slots=True, eq=False)
class Pass:
    """One pass of some samples through the model.

    Args:
        first: place of the pass's first sample in the step.
        count: B.
        inputs: weak references to the tensors that the model was called with.
        batch: ids of the samples of the micro-batch, shape (batch,), and the place of its first
            sample in the step. None: every place is a sample of its own.
        has_gradient: True if a gradient that counts has come back.
    """

    first: int
    count: int
    inputs: Sequence["weakref.ref[Tensor]"] = ()
    batch: tuple[NDArray[np.int64], int] | None = None
    has_gradient: bool = False
    seen: dict[Watched, int] = field(default_factory=dict)

    @property
    def samples(self) -> NDArray[np.int64]:
        """Numbers by which two places of the step show that they are of one sample, shape (B,)."""
        places = np.arange(self.first, self.first + self.count)
        if self.batch is None:
            return places
        ids, start = self.batch
        return ids[places - start] if places[-1] - start < len(ids) else places

    def next_rows(self, watched: Watched, n_rows: int) -> int:
        """Count the rows of a call. Return the module's number of rows before the call."""
        before = self.seen.get(watched, 0)
        self.seen[watched] = before + n_rows
        return before


class Call:
    """One call of a watched module, whose gradient is to come.

    Args:
        watched: the module.
        parameter: a trained parameter that the module owns.
        inputs: positional and keyword inputs, detached; kept until `release`.
        of_pass: the pass.
        is_recomputed: True if the backward pass itself makes the call.
        output: the output, which is not kept.
    """

    __slots__ = (
        "_inputs",
        "dtype",
        "is_recomputed",
        "is_unbatched",
        "n_rows",
        "of_pass",
        "offset",
        "parameter",
        "shape",
        "task",
        "watched",
    )

    def __init__(
        self,
        watched: Watched,
        parameter: nn.Parameter,
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
        of_pass: Pass,
        is_recomputed: bool,
        output: Tensor,
    ) -> None:
        self.watched, self.of_pass, self.is_recomputed = watched, of_pass, is_recomputed
        self.is_unbatched = is_unbatched(watched.module, output)
        #: shape of the output, with a dimension for samples
        self.shape = (1, *output.shape) if self.is_unbatched else tuple(output.shape)
        self.parameter, self.dtype = parameter, parameter.dtype
        self._inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = inputs
        self.n_rows = self.shape[0] if self.shape else 1
        self.offset = 0 if is_recomputed else of_pass.next_rows(watched, self.n_rows)
        #: number of the backward pass that the last gradient came from
        self.task = -1

    @property
    def inputs(self) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        """Positional and keyword inputs; None after `release`."""
        return self._inputs

    def release(self) -> None:
        """Drop the inputs."""
        self._inputs = None


def rows_of_call(
    call: Call, gradient: Tensor, wanted: Sequence[str]
) -> list[tuple[int, dict[int, Contribution]]]:
    """Return a call's contributions by block, each with the step's place of its first sample.

    Args:
        call: the call, with its inputs.
        gradient: gradient at the output. It may have been flattened.
        wanted: names of the module's parameters to split.

    Raises:
        LayerError: the samples of the output cannot be told apart.
    """
    watched, batch = call.watched, call.of_pass.count
    assert call.inputs is not None
    args, kwargs = call.inputs
    gradient = gradient.reshape(call.shape)
    if call.is_unbatched:
        args, kwargs = _unsqueezed(args, kwargs)
    if gradient.dtype != call.dtype or any(
        _is_narrower(x, call.dtype) for x in (*args, *kwargs.values())
    ):
        gradient, args = gradient.to(call.dtype), tuple(_in_dtype(x, call.dtype) for x in args)
        kwargs = {key: _in_dtype(x, call.dtype) for key, x in kwargs.items()}
    dim = watched.order.dim if batch > 1 else 0
    if (
        dim
        and gradient.dim() > dim
        and gradient.shape[dim] == batch
        and takes_any_leading_dimensions(watched.rule)
    ):
        gradient, args = gradient.movedim(dim, 0), tuple(_moved(x, dim, batch) for x in args)
        kwargs = {key: _moved(x, dim, batch) for key, x in kwargs.items()}
        where: tuple[int, int, bool] | None = (0, batch, True)
    else:
        where = _where(call, batch) if not dim else None
    if where is None:
        if not bool(gradient.any()):
            return []  # the gradient is zero, also in the probes: there is nothing to split
        raise _unclear(call)
    place, n_samples, is_major = where
    if gradient.dim() == 1:  # the output of a batch of one has no sample dimension
        gradient, (args, kwargs) = gradient.unsqueeze(0), _unsqueezed(args, kwargs)
    found = watched.rule(watched.module, args, kwargs, gradient, wanted)
    rows = {
        watched.owned[name]: _merged(value, n_samples, is_major) for name, value in found.items()
    }
    return [(call.of_pass.first + place, rows)]


def _unsqueezed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs of one sample with a dimension for samples."""
    return (
        tuple(x.unsqueeze(0) if isinstance(x, Tensor) else x for x in args),
        {key: x.unsqueeze(0) if isinstance(x, Tensor) else x for key, x in kwargs.items()},
    )


def rows_by_node(
    call: Call, node: Any, gradient: Tensor, blocks: Mapping[nn.Parameter, int]
) -> list[tuple[int, dict[int, Contribution]]]:
    """Return the contributions of `rows_of_call` for a call whose inputs were released.

    They are computed from the tensors that autograd saved at the node that makes the output.

    Raises:
        LayerError: the samples of the output cannot be told apart.
    """
    if call.n_rows != call.of_pass.count or call.watched.order.dim:
        raise _unclear(call)
    found = rows_at_node(node, gradient, FIRST, call.of_pass.count, blocks)
    return [
        (call.of_pass.first, {block: value})
        for block, value in found
        if block in call.watched.owned.values()
    ]


def _where(call: Call, batch: int) -> tuple[int, int, bool] | None:
    """Return the place of a call's first sample, the number of its samples, and the row order.

    The third value is True if the rows of a sample are neighbours. None if the place is not known.
    """
    order, offset, n_rows = call.watched.order, call.offset, call.n_rows
    if batch == 1 or (len(call.shape) < 2 and n_rows != batch):
        return (0, 1, True) if batch == 1 else None
    total = call.of_pass.seen.get(call.watched, n_rows)
    if not call.watched.is_known or call.is_recomputed:
        return (0, batch, True) if n_rows == batch else None
    if order.major:
        if total % batch:
            return None
        k = total // batch
        if offset % k == 0 and n_rows % k == 0:
            return offset // k, n_rows // k, True
        if offset // k == (offset + n_rows - 1) // k:
            return offset // k, 1, True
        return None
    if n_rows % batch == 0 and offset % batch == 0:
        return 0, batch, False
    return (offset % batch, n_rows, False) if offset % batch + n_rows <= batch else None


def _unclear(call: Call) -> LayerError:
    kind = type(call.watched.module).__name__
    return LayerError(
        f"{call.watched.name} ({kind}) has an output of shape {call.shape} in a batch of "
        f"{call.of_pass.count}: its "
        f"first dimension must be "
        f"the sample, or its gradient cannot be split by sample"
    )


def _merged(value: Contribution, n_samples: int, is_major: bool) -> Contribution:
    """Merge the contributions of a call's rows into contributions of `n_samples` samples."""
    if isinstance(value, TokenRows):
        if len(value.tokens) == n_samples:
            return value
        tokens = _side_by_side(value.tokens[..., None], n_samples, is_major)[..., 0]
        return TokenRows(tokens, _side_by_side(value.values, n_samples, is_major), value.n_lines)
    if isinstance(value, Summed):
        bounds = _merged(value.bounds[:, None], n_samples, is_major)
        rows = _merged(value.rows, n_samples, is_major)
        assert isinstance(bounds, Tensor)
        assert isinstance(rows, Tensor)
        return Summed(rows, bounds[:, 0])
    n_rows = len(value.left) if isinstance(value, Factors) else len(value)
    if n_rows == n_samples:
        return value
    if isinstance(value, Tensor):
        return (
            value.reshape(n_samples, -1, value.shape[1]).sum(1)
            if is_major
            else value.reshape(-1, n_samples, value.shape[1]).sum(0)
        )
    if value.given_right is not None and not isinstance(value.given_right, Tensor):
        return _merged(value.rows(), n_samples, is_major)
    right = (
        None if value.given_right is None else _side_by_side(value.given_right, n_samples, is_major)
    )
    return Factors(_side_by_side(value.left, n_samples, is_major), right)


def _side_by_side(values: Tensor, n_samples: int, is_major: bool) -> Tensor:
    """Reshape (n, P, C) to (n_samples, k P, C): the positions of all rows of a sample."""
    if not is_major:
        values = values.reshape(-1, n_samples, *values.shape[1:]).transpose(0, 1)
    return values.reshape(n_samples, -1, values.shape[-1])


def _is_narrower(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(value: Any, dim: int, batch: int) -> Any:
    return (
        value.movedim(dim, 0)
        if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == batch
        else value
    )
