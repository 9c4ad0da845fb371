"""Test gradients: what each test sample's loss asks of the parameters, taken in the same columns as the rows."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hydra_pipe.errors import DataError, NonFiniteError, RecordError
from hydra_pipe.recording.collector import Collector
from hydra_pipe.recording.losses import per_sample_losses
from hydra_pipe.recording.slab import Slab
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.store import names
from hydra_pipe.store.table import TableWriter

Labels = Sequence[int] | Sequence[str] | NDArray[Any]


def digest_of(batches: Iterable[tuple[Tensor, Tensor]]) -> str:
    """The beginning of the SHA-256 of some samples, by which others are told."""
    found = hashlib.sha256()
    for pair in batches:
        for values in pair:
            found.update(f"{values.dtype} {tuple(values.shape)}\n".encode())
            found.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def record_test_gradients(
    model: nn.Module,
    collector: Collector,
    table: TableWriter,
    batches: Iterable[Any],
    loss: Any,
    labels: Labels | None,
    when: str,
    what: str = "test",
) -> tuple[int, Labels | None, float]:
    """Write h_j = grad l_j of each test sample at the present parameters.

    Args:
        model: in eval mode.
        collector: of its gradients, watching nothing.
        table: where they go; it is to be flushed.
        batches: of (inputs, targets) or (inputs, targets, anything); inputs are a tensor, or a tuple or a mapping of what the
            model is called with.
        loss: (output, target) -> losses of shape (batch,), or their mean or sum.
        labels: one for each test sample; taken from integer targets if absent.
        when: the moment, in words such as "after 3 steps".
        what: the samples are called.

    Returns:
        Test samples; their labels, None where unknown; the largest share of a gradient that its rows miss.

    Raises:
        RecordError: nothing to test. DataError: not one label for each.
        NonFiniteError, BooksError, LayerError: as in training. UserCodeError: the model or the loss raised.
    """
    device = collector.parameters[0].device
    targets_seen: list[NDArray[np.int64]] = []
    n_tests, worst = 0, 0.0
    slab: Slab | None = None
    for inputs, targets, *_ in batches:
        inputs, targets = tree_map(partial(_on, device), inputs), targets.to(device)
        collector.watch(n_tests + np.arange(len(targets)))
        with torch.enable_grad():
            among = f"{what} samples {n_tests} to {n_tests + len(targets) - 1}"
            with user_code(f"the model raised at {among}"):
                output = _called(model, inputs)
            with user_code(f"the loss raised at {among}"):
                losses = per_sample_losses(loss, output, targets)
            if not torch.isfinite(losses).all():
                bad = n_tests + int(torch.argmin(torch.isfinite(losses).int()))
                raise NonFiniteError(f"the loss of {what} sample {bad} is not finite {when}")
            given = torch.autograd.grad(losses.sum(), collector.parameters, allow_unused=True)
        collector.rest()
        columns = {names.LOSS: losses.detach().float().cpu().numpy()}
        slab = collector.add_to(slab, given, columns, f"in the {what} gradients {when}", at_step=False)
        collector.forget()
        checked = slab.check(first_id=n_tests)
        if checked.error is not None:
            raise checked.error
        worst = max(worst, float(checked.books.imbalance.max()))
        slab.write(checked, table)
        if not (targets.is_floating_point() or targets.is_complex()) and targets.dim() == 1:
            targets_seen.append(targets.cpu().numpy())
        n_tests += len(targets)
    if n_tests == 0:
        raise RecordError("there are no test samples: give record_test at least one batch")
    if labels is not None and len(labels) != n_tests:
        raise DataError(f"{what}_labels has {len(labels)} entries for {n_tests} {what} samples")
    if labels is None and sum(map(len, targets_seen)) == n_tests:
        labels = np.concatenate(targets_seen)
    return n_tests, labels, worst
