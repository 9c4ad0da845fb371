"""Explanations for books that do not balance: the causes found, or else the possible causes."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from hydra_pipe.recording.compiled import anything_compiled, compiled_before, is_a
from hydra_pipe.recording.several_optimizers import optimizers_in

# Smallest cosine between the missed gradient and a penalty's gradient to name the penalty. Rounding
# and one step's change of the parameter leave a larger cosine.
_SAME_DIRECTION = 0.99
# Smallest number of features to name a penalty. With as many features two directions are hardly
# that close by chance. With two features any gradient of two classes may be that close.
_FEWEST_FEATURES = 8
# Number of elements of one magnitude that clipping by value leaves and that chance hardly does.
_FEWEST_CLIPPED = 3


@dataclass(frozen=True)
class Evidence:
    """Facts about a block whose books do not balance, besides its model.

    Args:
        has_rows: True if hooks saw any gradient of the block in the step.
        penalty: known penalty whose gradient has the direction of the missed gradient, see
            `penalty_of`; None if there is none.
        training: True for the gradient of a step, False for the gradient of test samples.
        half: True if gradients went through half precision.
        passes: number of passes of the model in the step, with gradients; None if not counted.
        batches: number of batches that the step was told of; None if not counted.
    """

    has_rows: bool = True
    penalty: Literal["L1", "L2"] | None = None
    training: bool = True
    half: bool = False
    passes: int | None = None
    batches: int | None = None


def penalty_of(
    missed: NDArray[np.float64], value: NDArray[np.float64], sign: NDArray[np.float64]
) -> Literal["L1", "L2"] | None:
    """Return the penalty whose gradient the rows miss.

    Args:
        missed: gradient in use minus the gradient that the rows account for, in the form of the
            books, of every block that is off, shape (feature,).
        value: values of the parameters in the same features, shape (feature,).
        sign: signs of the parameters in the same features, shape (feature,).

    Returns:
        None if no known penalty fits.
    """

    def along(direction: NDArray[np.float64]) -> float:
        norms = float(np.linalg.norm(missed) * np.linalg.norm(direction))
        return abs(float(missed @ direction)) / norms if norms > 0.0 and np.isfinite(norms) else 0.0

    l2, l1 = along(value), along(sign)
    if len(missed) < _FEWEST_FEATURES or max(l1, l2) < _SAME_DIRECTION:
        return None
    return "L2" if l2 >= l1 else "L1"


def explain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    name: str,
    evidence: Evidence | None = None,
) -> str:
    """Explain why the rows of parameter `name` do not sum to its gradient.

    The explanation is the cause if it can be known, else all causes that remain possible.

    Args:
        model: the recorded model.
        optimizer: optimiser of the model's parameters; None if it is not known.
        name: name of the parameter in `model.named_parameters()`.
        evidence: further facts about the block.

    Returns:
        Sentences. Each cause comes with a remedy.
    """
    evidence = evidence or Evidence()
    parameter = dict(model.named_parameters())[name]
    known = [*_certain(model, optimizer, name, parameter, evidence)]
    if known:
        return " ".join(known)
    left = [*_possible(model, name, parameter, evidence)]
    return (
        left[0]
        if len(left) == 1
        else "One of these is the cause: " + "; ".join(f"({i}) {s}" for i, s in enumerate(left, 1))
    )


def _certain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    name: str,
    parameter: nn.Parameter,
    evidence: Evidence,
) -> Iterator[str]:
    """Yield the causes that were found, each as a sentence."""
    _, module, _ = _owner(model, name)
    if evidence.penalty is not None:
        instead = (
            ""
            if evidence.penalty == "L1"
            else "use the optimizer's weight_decay instead of it, or "
        )
        yield (
            f"The missing part has the direction of an {evidence.penalty} penalty on {name} in "
            f"the loss, which belongs to no sample: {instead}leave it out."
        )
        return
    if (found := reparametrization(model, name)) is not None:
        yield found
        return
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        yield (
            f"{name} is in a {type(module).__name__}, which is never called: keep it as an "
            "attribute of the module whose forward "
            f"uses it, or freeze it."
        )
        return
    if not evidence.has_rows and (_is_functional_graph(module) or _is_functional_graph(model)):
        yield (
            "The model is a graph of torch.export or torch.fx, which calls functions, not "
            "modules: train the module that it was made of."
        )
        return
    if not evidence.has_rows and (compiled := compiled_before(model)) is not None:
        yield (
            f"{compiled} runs as code that torch.compile made before the Recorder was, which "
            "calls no hook: make the Recorder "
            f"before the first call, or call torch._dynamo.reset() just before Recorder(...)."
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        yield (
            f"A hook on {name} itself (Tensor.register_hook or "
            "register_post_accumulate_grad_hook) changes its gradient after "
            "hydra-pipe has seen it: change the loss or the module's output instead, or freeze "
            "the parameter."
        )
    if (
        evidence.training
        and optimizer is not None
        and any(len(one._optimizer_step_pre_hooks) > 1 for one in optimizers_in(optimizer))
    ):  # one of the hooks is the recorder's
        yield (
            "Another hook of the optimizer (register_step_pre_hook) may change gradients just "
            "before the step: change the loss "
            "instead, or take the hook away."
        )


def _possible(
    model: nn.Module, name: str, parameter: nn.Parameter, evidence: Evidence
) -> Iterator[str]:
    """Yield the possible causes if none was found, likeliest first, each without a full stop."""
    path, module, own = _owner(model, name)
    where = f"{path or 'the model'} ({type(module).__name__})"
    others = [
        n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and n != name
    ]
    if (
        evidence.passes is not None
        and evidence.batches is not None
        and evidence.passes > evidence.batches
    ):
        yield (
            f"the model was called {evidence.passes} times for {evidence.batches} batches: put "
            "passes whose gradients the loop "
            "throws away (FGSM, SAM, Grad-CAM, another network's loss) into `with "
            "recorder.paused():`"
        )
    if evidence.training and (largest := _clipped_at(model)) is not None:
        yield (
            f"the largest elements of the gradient are all of magnitude {largest:.6g}, as after "
            "clip_grad_value_, and such a gradient cannot be split by sample: use clip_grad_norm_"
        )
    if evidence.has_rows:
        yield (
            f"{own} is used by a function too, beside {where}, as in F.linear(x, module.{own}): "
            "call the module instead"
            + (f" (it is also {' and '.join(others)}: call that module)" if others else "")
        )
        if evidence.training:
            yield (
                "the gradient of an earlier step is still there: call optimizer.zero_grad() in "
                "each step"
            )
        yield (
            "the loss has a term of the weights alone (a penalty): use the optimizer's "
            "weight_decay instead"
        )
        if not evidence.training:
            return
        if evidence.passes is None:
            yield (
                "a pass whose gradient the loop throws away, or a pass over another batch (FGSM, "
                "SAM, a GAN's other half), added its share to the gradient or removed it: put it "
                "into `with recorder.paused():`"
            )
        yield (
            "the loop changed .grad by hand (noise, a mask, a mean over processes): change the "
            "loss instead"
        )
        if evidence.half:
            yield (
                "half precision rounded the gradient away: unscale it before clipping, or train "
                "in bfloat16"
            )
        return
    if parameter.is_cuda:
        yield (
            "the loop replays a CUDA graph (torch.cuda.graph), which calls no hooks: train without"
        )
    if anything_compiled():
        yield (
            "the loop calls it within a function that torch.compile made: call "
            "torch._dynamo.reset() just before Recorder(...), or "
            "train without torch.compile"
        )
    heads = (
        ' (in trainers set loss_type="nll" (TRL) and use_liger_kernel=False)'
        if "transformers" in sys.modules
        else ""
    )
    yield (
        f"{where} was not called, and its {own} is used by a function, as in F.linear(x, "
        f"module.{own}) or a fused or chunked "
        f"cross-entropy: call the module{heads}"
        + (f"; it is also {' and '.join(others)}" if others else "")
    )
    if evidence.training:
        yield (
            "its gradient was left by an earlier step or pass that was not recorded: call "
            "optimizer.zero_grad() before the step"
        )


def reparametrization(model: nn.Module, name: str) -> str | None:
    """Explain that a module's weight is computed from parameter `name`.

    Args:
        model: model with the parameter.
        name: name of the parameter in `model.named_parameters()`.

    Returns:
        The explanation; None if no weight is computed from the parameter.
    """
    path, module, own = _owner(model, name)
    return _parametrized(model, path, module) or _computed_before(path, module, own)


def _owner(model: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """Return the path of the module of parameter `name`, the module, and the name in the module."""
    path, _, own = name.rpartition(".")
    return path, model.get_submodule(path), own


def _parametrized(model: nn.Module, path: str, module: nn.Module) -> str | None:
    # `MODULE.parametrizations.TENSOR` holds original, original0, ...; the parameters of a
    # parametrization are one module further down
    parts = path.split(".")
    if parametrize.ParametrizationList not in type(module).__mro__:
        holder = next((i for i, part in enumerate(parts) if part == "parametrizations"), None)
        if holder is None or holder + 1 >= len(parts):
            return None
        module = model.get_submodule(".".join(parts[: holder + 2]))
        parts = parts[: holder + 2]
    target, tensor = ".".join(parts[:-2]), parts[-1]
    kinds = (
        ", ".join(type(part).__name__.lstrip("_") for part in module.children())
        or "a parametrization"
    )
    return (
        f"{tensor} of {target or 'the model'} is parametrized ({kinds}): the trained parameter is "
        "not the weight that its module uses. Remove the parametrization before training by "
        f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}), or freeze it."
    )


def _computed_before(path: str, module: nn.Module, own: str) -> str | None:
    """Explain that a forward pre-hook computes the weight, if one does.

    The old weight_norm and spectral_norm, and pruning, do so.
    """
    stem = own.rpartition("_")[0]
    for hook in module._forward_pre_hooks.values():
        kind = type(hook)
        if not isinstance(hook, BasePruningMethod) and kind.__name__ not in (
            "WeightNorm",
            "SpectralNorm",
        ):
            continue
        if stem != getattr(hook, "_tensor_name", getattr(hook, "name", None)):
            continue
        if isinstance(hook, BasePruningMethod):
            return (
                f"{stem} of {path or 'the model'} is pruned ({kind.__name__}): it is multiplied "
                "by a mask. Make the mask permanent before training by "
                f"torch.nn.utils.prune.remove(module, {stem!r}), or freeze {own}."
            )
        what = "weight_norm" if kind.__name__ == "WeightNorm" else "spectral_norm"
        return (
            f"{stem} of {path or 'the model'} is computed from {own} by {what}: remove this "
            f"before training by torch.nn.utils.remove_{what}(module, {stem!r}), or freeze it."
        )
    return None


def _is_functional_graph(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None) if is_a(module, "GraphModule") else None
    return graph is not None and any(node.op == "get_attr" for node in graph.nodes)


def _clipped_at(model: nn.Module) -> float | None:
    """Return the magnitude to which clipping by value has cut the largest elements of the gradient.

    Returns:
        None if no clipping can be seen.
    """
    gradients = [
        p.grad.detach()
        for p in model.parameters()
        if p.grad is not None and p.grad.layout == torch.strided
    ]
    magnitudes = [g.abs() for g in gradients if g.numel()]
    largest = max((float(m.max()) for m in magnitudes), default=0.0)
    at_it = sum(int((m == largest).sum()) for m in magnitudes)
    return largest if 0.0 < largest < inf and at_it >= _FEWEST_CLIPPED else None
