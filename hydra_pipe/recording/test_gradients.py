"""Test gradients: the gradient of each test sample's loss, in the same columns as the rows."""

import hashlib
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hydra_pipe.errors import DataError, NonFiniteError, RecordError, RecordWarning
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.datasets import called, on_device, size_of
from hydra_pipe.recording.eval_mode import eval_mode
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.recording.settings import Labels, checked_labels
from hydra_pipe.recording.untouched import untouched
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.recording.walk import gradients_of
from hydra_pipe.store import names
from hydra_pipe.store.zarr.table import TableWriter

_EMPTY = CellType()


def digest_of(batches: Iterable[tuple[Any, Any]]) -> str:
    """Return the first 16 hex digits of the samples' SHA-256, to tell them from other samples."""
    found = hashlib.sha256()
    for pair in batches:
        for values in tree_leaves(pair):
            found.update(f"{values.dtype} {tuple(values.shape)}\n".encode())
            found.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def try_test(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Any,
    device: torch.device,
    *sources: Any,
) -> None:
    """Take the losses of the first test samples before training, to report errors early.

    Training is not changed: parameters, buffers and generators are as they were.

    Args:
        model: model to be trained.
        batches: batches of (inputs, targets); only the first is drawn.
        loss: loss in the form of `record_test_gradients`.
        device: device of the model.
        sources: objects that `batches` draw from, for `untouched`.

    Raises:
        DataError: there are no test samples, or they are of the wrong kind.
        UserCodeError: the model, the loss or a dataset raised.
        PipelineError: the loss is not one per sample.
    """
    with untouched(model, loss, *sources), eval_mode(model), torch.no_grad():
        first = next(iter(batches), None)
        if first is None:
            raise DataError("there are no test samples: give at least one")
        inputs, targets = (on_device(values, device) for values in first)
        # The state that a function keeps between its calls cannot be restored: such a loss is not
        # called.
        known = loss if _keeps_nothing(loss) else _zeros
        _losses(model, known, inputs, targets, "the first test samples, before training")


def _keeps_nothing(loss: Any) -> bool:
    """Tell whether no call of `loss` can change the next call.

    True for a module, whose state can be restored, and for a function over plain values.
    """
    if isinstance(loss, partial):
        return all(map(_keeps_nothing, (loss.func, *loss.args, *loss.keywords.values())))
    if isinstance(loss, FunctionType):
        cells = [cell.cell_contents for cell in loss.__closure__ or () if cell != _EMPTY]
        return all(map(_keeps_nothing, cells))
    if isinstance(loss, MethodType):
        return isinstance(loss.__self__, nn.Module)
    plain = (
        nn.Module,
        Tensor,
        BuiltinFunctionType,
        ModuleType,
        type,
        str,
        int,
        float,
        type(None),
        torch.dtype,
        torch.device,
    )
    return isinstance(loss, plain)


def _zeros(output: Any, targets: Any) -> Tensor:
    return torch.zeros(size_of(targets))


def say_without_tests(error: BaseException, path: Path) -> None:
    """Warn that a recording is complete without test gradients, because of `error`."""
    warnings.warn(
        f"the test gradients of {path} were not taken: {error}. The training is recorded, and "
        "complete without them: mend the "
        f"test samples or their loss, and take them by hydra-pipe probe {path} FILE:FUNCTION "
        "--name NAME, or hydra_pipe.probe(...)",
        RecordWarning,
        stacklevel=2,
    )


def _losses(model: nn.Module, loss: Any, inputs: Any, targets: Any, among: str) -> Tensor:
    with user_code(f"the model raised at {among}"):
        output = called(model, inputs)
    with user_code(f"the loss raised at {among}"):
        return per_sample_losses(loss, output, targets)


def record_test_gradients(
    model: nn.Module,
    collector: Collector,
    table: TableWriter,
    batches: Iterable[tuple[Any, Any]],
    loss: Any,
    labels: Labels | None,
    when: str,
    what: str = "test",
) -> tuple[int, Labels | None, float]:
    """Write h_j = grad l_j of each test sample at the present parameters.

    Args:
        model: model in eval mode.
        collector: collector of its gradients, watching nothing.
        table: destination of the gradients; the caller flushes it.
        batches: batches of (inputs, targets); inputs are a tensor, or a tuple or mapping of the
            model's arguments.
        loss: (output, target) -> losses of shape (batch,), or their mean or sum.
        labels: one label for each test sample; taken from integer targets if absent.
        when: moment in words, such as "after 3 steps".
        what: word for the samples in messages.

    Returns:
        Number of test samples; their labels, None if unknown; the largest share of a gradient that
        its rows miss.

    Raises:
        RecordError: nothing to test.
        DataError: not one label for each.
        NonFiniteError, GradientMismatchError, LayerError: the reasons known from training.
        UserCodeError: the model or the loss raised.
    """
    if labels is not None:
        checked_labels(labels, f"{what}_labels")  # refuse bad labels before the work
    device = collector.parameters[0].device
    targets_seen: list[NDArray[np.int64]] = []
    n_tests, worst = 0, 0.0
    buffer: RowBuffer | None = None
    for pair in batches:
        inputs, targets = (on_device(values, device) for values in pair)
        size = size_of(targets)
        collector.watch(n_tests + np.arange(size))
        with torch.enable_grad():
            losses = _losses(
                model, loss, inputs, targets, f"{what} samples {n_tests} to {n_tests + size - 1}"
            )
            if not torch.isfinite(losses).all():
                bad = n_tests + int(torch.argmin(torch.isfinite(losses).int()))
                raise NonFiniteError(f"the loss of {what} sample {bad} is not finite {when}")
            given = gradients_of(model, losses.sum(), collector.parameters)
        collector.pause()
        columns = {names.LOSS: losses.detach().float().cpu().numpy()}
        buffer = collector.add_to(
            buffer, given, columns, f"in the {what} gradients {when}", at_step=False
        )
        collector.forget()
        checked = buffer.check(first_id=n_tests)
        if checked.error is not None:
            raise checked.error
        worst = max(worst, float(checked.books.imbalance.max()))
        buffer.write(checked, table)
        if (
            isinstance(targets, Tensor)
            and not (targets.is_floating_point() or targets.is_complex())
            and targets.dim() == 1
        ):
            targets_seen.append(targets.cpu().numpy())
        n_tests += size
    if n_tests == 0:
        raise RecordError("there are no test samples: give record_test at least one batch")
    if labels is not None:
        labels = checked_labels(labels, f"{what}_labels", n_tests, f"{what} samples")
    if labels is None and sum(map(len, targets_seen)) == n_tests:
        labels = np.concatenate(targets_seen)
    return n_tests, labels, worst
