"""Rows of a recording beside the gradients that they should be, taken without hydra-pipe.

Used by `tests/recording/random_models.py` and `benchmarks/zoo.py`. Only the store's own format is
read (docs/format.md).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# one sample's gradient of each parameter, flattened, by the parameter's name
Row = Mapping[str, Tensor]

# A difference is measured against the larger of the row and this share of the sample's gradient of
# all parameters together: a gradient that is zero in exact arithmetic has a row of rounding error.
FLOOR = 3e-3
# The same, and the largest difference, in bfloat16.
HALF_FLOOR, HALF_TOLERANCE = 0.1, 0.25


def stored_rows(run: Path | str, step: int = 0) -> tuple[np.ndarray, list[dict[str, Tensor]]]:
    """Samples and rows of one step of a run with encoding="exact", dtype="float32".

    Empty where the step was not written.
    """
    group = zarr.open_group(Path(run) / "gradients.zarr", mode="r")
    blocks = dict(group.attrs)["hydra_pipe_blocks"]["blocks"]
    places = np.flatnonzero(np.asarray(group["step"][:]) == step)
    samples = np.asarray(group["sample"][:])[places]
    rows = [
        _row(blocks, np.asarray(group["gradient"][int(k)]), np.asarray(group["scale"][int(k)]))
        for k in places
    ]
    return samples, rows


def _row(
    blocks: Sequence[Mapping[str, Any]], values: np.ndarray, scales: np.ndarray
) -> dict[str, Tensor]:
    """One line of the store, decoded."""
    row = {}
    for block, scale in zip(blocks, scales, strict=True):
        found = torch.from_numpy(values[slice(*block["columns"])].copy())
        if block["encoding"] == "factored" and block["inputs"]:
            found = torch.outer(
                found, torch.from_numpy(values[slice(*block["inputs"])].copy())
            ).flatten()
        row[block["name"]] = found * float(scale)
    return row


def gradients_of_losses(
    losses: Tensor, parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Tensor]]:
    """One backward pass from each of `losses`, shape (batch,), of one pass over the whole batch."""
    result = []
    for loss in losses:
        found = _gradients(loss, list(parameters.values()))
        result.append(
            {
                name: torch.zeros(p.numel()) if g is None else g.detach().flatten().float()
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return result


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """By way of `.grad`, since reentrant checkpointing knows no other."""
    kept = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)
    found = [p.grad for p in parameters]
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    return found


def couples(model: nn.Module) -> bool:
    """Whether a batch normalisation takes the statistics of the batch."""
    kinds = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(m, kinds) and (m.training or m.running_mean is None) for m in model.modules()
    )


def shares_of_outputs(
    model: nn.Module, losses: Callable[[], Tensor], n: int
) -> list[dict[str, Tensor]]:
    """Each sample's share of the gradient of `losses().sum()`, for models in which samples meet
    (batch normalisation).

    A share goes through the sample's own part of the output of the module that owns the parameter:
    the module is run once more on its inputs, over the whole batch and with its own random state,
    and a backward pass taken from that part of the gradient there. The first dimension of an output
    is the sample, or the sample and positions. A parameter used elsewhere has shares that do not
    sum to its gradient.
    """
    calls = []
    owned = {}
    for module in model.modules():
        below = {p for child in module.children() for p in child.parameters()}
        own = {p for p in module.parameters(recurse=False) if p.requires_grad} - below
        if own:
            owned[module] = list(own)
    handles = []
    stack: list = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=torch.is_autocast_enabled("cpu"))
        stack.append(
            (torch.get_rng_state(), {k: b.clone() for k, b in module.named_buffers()}, cast)
        )

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        state, buffers, cast = stack.pop()
        leaves, tree = tree_flatten(output)
        places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        calls.append(
            (module, args, kwargs, state, buffers, cast, [leaves[k] for k in places], places)
        )
        return tree_unflatten([x.clone() if k in places else x for k, x in enumerate(leaves)], tree)

    for module in owned:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        total = losses().sum()
    finally:
        for handle in handles:
            handle.remove()
    watched = [x for call in calls for x in call[6]]
    flowing = dict(
        zip(map(id, watched), torch.autograd.grad(total, watched, allow_unused=True), strict=True)
    )
    names = {p: name for name, p in model.named_parameters()}
    shares = [
        {name: torch.zeros(p.numel()) for name, p in model.named_parameters() if p.requires_grad}
        for _ in range(n)
    ]
    for module, args, kwargs, state, buffers, cast, outputs, places in calls:
        leaves, tree = tree_flatten((args, kwargs))
        detached = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in leaves
        ]
        given, keywords = tree_unflatten(detached, tree)
        kept = {k: b.clone() for k, b in module.named_buffers()}
        torch.set_rng_state(state)
        for name, buffer in module.named_buffers():
            buffer.data.copy_(buffers[name])  # without a trace in the graph
        with cast:
            again = tree_leaves(module(*given, **keywords))
        for name, buffer in module.named_buffers():
            buffer.data.copy_(kept[name])
        pairs = [
            (again[k], flowing[id(x)])
            for k, x in zip(places, outputs, strict=True)
            if flowing[id(x)] is not None
        ]
        pairs = [(y, g) for y, g in pairs if g.dim() and len(g) % n == 0 and y.requires_grad]
        if not pairs:
            continue
        for i in range(n):
            masked = []
            for _, g in pairs:
                alone = torch.zeros_like(g)
                part = slice(i * len(g) // n, (i + 1) * len(g) // n)
                alone[part] = g[part]
                masked.append(alone)
            found = torch.autograd.grad(
                [y for y, _ in pairs], owned[module], masked, retain_graph=True, allow_unused=True
            )
            for p, g in zip(owned[module], found, strict=True):
                if g is not None:
                    shares[i][names[p]] += g.detach().flatten().float()
    return shares


def differences(
    rows: Sequence[Row], truth: Sequence[Row], floor: float = FLOOR
) -> dict[str, float]:
    """For each parameter the largest difference between a row and what it should be, relative (see
    `FLOOR`).
    """
    worst: dict[str, float] = {}
    wholes = [
        float(torch.stack([wanted[name].norm() for name in row]).norm())
        for row, wanted in zip(rows, truth, strict=True)
    ]
    # a sample whose gradient vanishes has rounding of the others' size
    least = 1e-4 * max(wholes, default=0.0)
    for row, wanted, whole in zip(rows, truth, wholes, strict=True):
        for name, values in row.items():
            size = max(float(wanted[name].norm()), floor * whole, least, 1e-30)
            off = float((values - wanted[name]).norm()) / size
            worst[name] = max(worst.get(name, 0.0), off if off == off else float("inf"))
    return worst


def stored_tests(run: Path | str) -> list[dict[str, Tensor]]:
    """Gradients of the test samples that were taken last, of a run with encoding="exact",
    dtype="float32".
    """
    group = zarr.open_group(Path(run) / "gradients.zarr", mode="r")
    blocks = dict(group.attrs)["hydra_pipe_blocks"]["blocks"]
    last = group[f"test/{max(group['test'].group_keys())}"]
    return [
        _row(blocks, *pair)
        for pair in zip(np.asarray(last["gradient"][:]), np.asarray(last["scale"][:]), strict=True)
    ]
