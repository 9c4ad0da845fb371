"""Names of causes: what a model has that cannot be recorded, told before training, and why the books of a block do not balance.

Nothing here imports a package to ask about it: where the package is not imported, no object of it can be there.
"""

import gc
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from hydra_pipe.errors import LayerError, UsageError

Trained = Mapping[nn.Parameter, tuple[str, int]]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAIN_UNSHARDED = "train on one device, or with torch.nn.parallel.DistributedDataParallel"
# cosine beyond which what the rows miss is the gradient of a penalty: rounding and one step's change of the parameter leave more
_SAME_DIRECTION = 0.99
# features of which hardly any two directions are that close by chance: of two any gradient of two classes may be
_FEWEST_FEATURES = 8
# elements of one magnitude that clipping by value leaves and that hardly come by chance
_FEWEST_CLIPPED = 3


def refuse(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Trained) -> None:
    """Refuse, before anything is trained, a model that cannot be recorded.

    Args:
        model: that is trained, without DistributedDataParallel around it.
        optimizer: of the parameters.
        parameters: name and parameter group of every parameter to record.

    Raises:
        LayerError: names the module or parameter, what it is, and a way out.
    """
    if found := sharding(model):
        raise LayerError(found)
    for path, module in model.named_modules():
        reason = _reason_of(module, parameters)
        if reason is not None:
            raise LayerError(f"{path or 'the model'} ({type(module).__name__}) {reason}")
    for parameter, (name, _) in parameters.items():
        reason = _reason_of_parameter(parameter)
        if reason is not None:
            raise LayerError(f"parameter {name} {reason}")
    devices: dict[torch.device, str] = {}
    for parameter, (name, _) in parameters.items():
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise LayerError(
            f"the trained parameters are on several devices ({places}): put the whole model on one, such as by "
            f'device_map={{"": 0}} in place of "auto", or freeze what is elsewhere'
        )
    if (compiled := _compiled_before(model)) is not None:
        raise LayerError(
            f"{compiled} was compiled by torch.compile and called before the Recorder was made, and compiled code calls no hooks "
            f"that come later: make the Recorder before the first call, or call torch._dynamo.reset() just before Recorder(...)"
        )


def sharding(model: nn.Module) -> str | None:
    """What is to be said of a model whose parameters are spread over processes; None: they are not, as far as can be seen."""
    for path, module in model.named_modules():
        kind = _kind_of_shards(module)
        if kind is not None:
            return f"{path or 'the model'} is sharded by {kind}, so that no process has its whole gradients: {_TRAIN_UNSHARDED}"
    for name, parameter in model.named_parameters():
        kind = _shards_of(parameter)
        if kind is not None and parameter.requires_grad:
            return f"parameter {name} is sharded by {kind}, so that no process has its whole gradient: {_TRAIN_UNSHARDED}"
    return None


def _kind_of_shards(module: nn.Module) -> str | None:
    kinds = {(t.__module__.partition(".")[0], t.__name__) for t in type(module).__mro__}
    if ("torch", "FullyShardedDataParallel") in kinds or ("fairscale", "FullyShardedDataParallel") in kinds:
        return "FullyShardedDataParallel"
    if ("torch", "FSDPModule") in kinds:
        return "fully_shard"
    if ("deepspeed", "DeepSpeedEngine") in kinds:
        return "DeepSpeed"
    return None


def _shards_of(parameter: Tensor) -> str | None:
    if type(parameter).__name__ == "DTensor" or type(getattr(parameter, "data", None)).__name__ == "DTensor":
        return "fully_shard or tensor parallelism (it is a DTensor)"
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO"
    return "tensor parallelism (Megatron)" if getattr(parameter, "tensor_model_parallel", False) else None


def _reason_of(module: nn.Module, parameters: Trained) -> str | None:
    """Why what `module` trains cannot be recorded, as the end of a sentence about it."""
    if isinstance(module, torch.jit.ScriptModule):
        if not _holds(module, parameters):
            return None
        how = "torch.jit.trace" if _is_a(module, "TopLevelTracedModule") else "torch.jit.script"
        return f"is made by {how}, and its parts call no hooks: train the module that it was made of, and convert it afterwards"
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f"copies the model to {len(module.device_ids)} GPUs at each pass, and the copies call no hooks: use one GPU, or one "
            f"process for each with torch.nn.parallel.DistributedDataParallel"
        )
    if isinstance(module, nn.SyncBatchNorm) and _holds(module, parameters):
        return (
            "takes its statistics over the batches of all processes, whose samples it mixes: build the model with BatchNorm "
            "instead, or freeze it"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and _holds(module, parameters):
        for option, why in (
            ("sparse", "so that its gradient is a sparse tensor"),
            ("scale_grad_by_freq", "so that one sample's share of its gradient depends on the other samples of the batch"),
        ):
            if getattr(module, option):
                return f"has {option}=True, {why}: make it with {option}=False, or freeze it"
    if _is_graphed(module, parameters):
        return (
            "runs as a CUDA graph, which calls hooks while it is captured and never again: train without "
            "make_graphed_callables and without mode='reduce-overhead' or 'max-autotune' of torch.compile"
        )
    return None


def _reason_of_parameter(parameter: nn.Parameter) -> str | None:
    if is_lazy(parameter):
        return (
            "has no shape yet (a lazy module): call the model once on a batch, then make the optimizer and the Recorder, in this "
            "order"
        )
    if parameter.device.type == "meta":
        return (
            "is on the meta device and has no values (init_empty_weights, or a device_map that offloads): load the model onto a "
            "device as a whole"
        )
    if parameter.numel() == 0:
        return "has no elements: freeze it, or leave it out of the optimizer"
    if parameter.dtype not in _DTYPES:
        return f"is {parameter.dtype}: train it in float32 or bfloat16, quantise afterwards, or freeze it"
    kind = type(parameter)
    # a plain subclass of Parameter is one; a tensor that dispatches for itself holds something else than it shows
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or kind.__module__.startswith(("bitsandbytes", "torchao")):
        return f"is a {_path_of(kind)}, whose values are kept in another form: train a plain one, or freeze it and train adapters"
    if parameter.device.type == "cpu" and _is_shared(parameter):
        return (
            "is in memory shared with other processes (share_memory(), or an argument of torch.multiprocessing), which may change "
            "it between two steps: train copy.deepcopy(model), whose parameters are this process's own, and load its state_dict "
            "where others want it"
        )
    if getattr(parameter, "_in_backward_optimizers", None):
        return "is updated within the backward pass (optimizer in backward): call optimizer.step() after it"
    return None


def _is_shared(parameter: Tensor) -> bool:
    # of the storage; the tensor's own method says the same
    return bool(parameter.untyped_storage().is_shared())  # of CUDA tensors it says nothing


def _holds(module: nn.Module, parameters: Trained) -> bool:
    return any(p in parameters for p in module.parameters())


def _is_a(module: nn.Module, name: str) -> bool:
    return any(t.__name__ == name for t in type(module).__mro__)


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# compiled code


def _is_graphed(module: nn.Module, parameters: Trained) -> bool:
    """Tell whether CUDA graphs run `module`, as far as can be seen."""
    if "make_graphed_callables" in getattr(module.__dict__.get("forward"), "__qualname__", ""):
        return True
    context = module.__dict__.get("dynamo_ctx") or getattr(module, "_compiled_call_impl", None)
    if context is None or not any(p.is_cuda for p in parameters):
        return False
    config = getattr(context, "compiler_config", None)
    ask = getattr(context, "get_compiler_config", None)
    if config is None and ask is not None:
        config = ask()
    return isinstance(config, Mapping) and bool(config.get("triton.cudagraphs"))


def _compiled_before(model: nn.Module) -> str | None:
    """The part of `model` that is compiled and was called already, in words; None: there is none, as far as can be seen."""
    if "torch._dynamo" not in sys.modules:
        return None
    for path, module in model.named_modules():
        if _is_compiled(module) and any(_has_code(part) for part in module.modules()):
            return f"{path} ({type(module).__name__})" if path else "the model"
    if any(_has_code(part) for wrapper in _compiled_around(model) for part in wrapper.modules()):
        return f"the model ({type(model).__name__})"
    return None


def _is_compiled(module: nn.Module) -> bool:
    return (
        _is_a(module, "OptimizedModule")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _compiled_around(model: nn.Module) -> list[nn.Module]:
    """What torch.compile has made of `model` or of a module that holds it, and the loop may call. Looks at all objects."""
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if kind is None or not _anything_compiled():
        return []
    # by type(), for isinstance asks proxies, which may do anything
    wrappers: list[nn.Module] = [o for o in gc.get_objects() if issubclass(type(o), kind)]
    return [wrapper for wrapper in wrappers if any(module is model for module in wrapper.modules())]


def _has_code(module: nn.Module) -> bool:
    """Tell whether there is compiled code of the forward pass of `module`, or of another of its class, with which it is shared."""
    entries = getattr(torch._C._dynamo.eval_frame, "_debug_get_cache_entry_list", None)
    if entries is None:
        return False
    forward = getattr(module.forward, "_torchdynamo_orig_callable", module.forward)
    functions = [getattr(forward, "__func__", forward)]
    if getattr(module, "_compiled_call_impl", None) is not None:
        functions.append(nn.Module._call_impl)
    codes = [code for f in functions if (code := getattr(f, "__code__", None)) is not None]
    return any(bool(entries(code)) for code in codes)


def _anything_compiled() -> bool:
    """Tell whether torch.compile has compiled anything in this process."""
    convert = sys.modules.get("torch._dynamo.convert_frame")
    return bool(getattr(getattr(convert, "input_codes", None), "seen", ()))


# books that do not balance


@dataclass(frozen=True)
class Evidence:
    """What is known of a block whose books do not balance, beside its model.

    Args:
        has_rows: whether hooks saw any gradient of the block in the step.
        penalty: the direction of what the rows miss, if it is one of a known penalty's gradient, see `penalty_of`.
        training: whether it is the gradient of a step; else it is that of test samples.
        half: whether gradients went through half precision.
        passes: passes of the model in the step, with gradients; None: not counted.
        batches: batches that the step was told of; None: not counted.
    """

    has_rows: bool = True
    penalty: Literal["L1", "L2"] | None = None
    training: bool = True
    half: bool = False
    passes: int | None = None
    batches: int | None = None


def penalty_of(missed: NDArray[np.float64], value: NDArray[np.float64], sign: NDArray[np.float64]) -> Literal["L1", "L2"] | None:
    """The penalty on a parameter whose gradient is what the rows miss; None: none that is known.

    Args:
        missed: the gradient in use less what the rows account for, as the books have it, of every block that is off, shape
            (feature,).
        value: the parameters in the same features.
        sign: their signs in the same features.
    """

    def along(direction: NDArray[np.float64]) -> float:
        norms = float(np.linalg.norm(missed) * np.linalg.norm(direction))
        return abs(float(missed @ direction)) / norms if norms > 0.0 and np.isfinite(norms) else 0.0

    l2, l1 = along(value), along(sign)
    if len(missed) < _FEWEST_FEATURES or max(l1, l2) < _SAME_DIRECTION:
        return None
    return "L2" if l2 >= l1 else "L1"


def explain(model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str, evidence: Evidence | None = None) -> str:
    """Why rows of parameter `name` may not sum to its gradient: the cause where it can be known, else those that are left.

    Args:
        model: that is recorded.
        optimizer: of its parameters; None: not known.
        name: of the parameter in `model.named_parameters()`.
        evidence: see `Evidence`.

    Returns:
        Sentences, of which each cause has its way out.
    """
    evidence = evidence or Evidence()
    parameter = dict(model.named_parameters())[name]
    known = [*_certain(model, optimizer, name, parameter, evidence)]
    if known:
        return " ".join(known)
    left = [*_possible(model, name, parameter, evidence)]
    return left[0] if len(left) == 1 else "One of these is the cause: " + "; ".join(f"({i}) {s}" for i, s in enumerate(left, 1))


def _certain(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str, parameter: nn.Parameter, evidence: Evidence
) -> Iterator[str]:
    """Causes that were found, each a sentence."""
    _, module, _ = _owner(model, name)
    if evidence.penalty is not None:
        instead = "" if evidence.penalty == "L1" else "use the optimizer's weight_decay instead of it, or "
        yield (
            f"What is missed has the direction of an {evidence.penalty} penalty on {name} in the loss, which is of no sample: "
            f"{instead}leave it out."
        )
        return
    if (found := reparametrization(model, name)) is not None:
        yield found
        return
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        yield (
            f"{name} is in a {type(module).__name__}, which is never called: keep it as an attribute of the module whose forward "
            f"uses it, or freeze it."
        )
        return
    if not evidence.has_rows and (_is_functional_graph(module) or _is_functional_graph(model)):
        yield "The model is a graph of torch.export or torch.fx, which calls functions, not modules: train what it was made of."
        return
    if not evidence.has_rows and (compiled := _compiled_before(model)) is not None:
        yield (
            f"{compiled} runs as code that torch.compile made before the Recorder was, which calls no hook: make the Recorder "
            f"before the first call, or call torch._dynamo.reset() just before Recorder(...)."
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        yield (
            f"A hook on {name} itself (Tensor.register_hook or register_post_accumulate_grad_hook) changes its gradient after "
            f"hydra-pipe has seen it: change the loss or the module's output instead, or freeze the parameter."
        )
    if (
        evidence.training and optimizer is not None and len(optimizer._optimizer_step_pre_hooks) > 1
    ):  # of which the recorder's is one
        yield (
            "Another hook of the optimizer (register_step_pre_hook) may change gradients just before the step: change the loss "
            "instead, or take the hook away."
        )


def _possible(model: nn.Module, name: str, parameter: nn.Parameter, evidence: Evidence) -> Iterator[str]:
    """Causes that are left where none was found, the likeliest first, each without a full stop."""
    path, module, own = _owner(model, name)
    where = f"{path or 'the model'} ({type(module).__name__})"
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and n != name]
    if evidence.passes is not None and evidence.batches is not None and evidence.passes > evidence.batches:
        yield (
            f"the model was called {evidence.passes} times for {evidence.batches} batches: put passes whose gradients the loop "
            f"throws away (FGSM, SAM, Grad-CAM, another network's loss) into `with recorder.paused():`"
        )
    if evidence.training and (largest := _clipped_at(model)) is not None:
        yield (
            f"the largest elements of the gradient are all of magnitude {largest:.6g}, as clip_grad_value_ leaves them, and then "
            f"no share of it is a sample's: use clip_grad_norm_"
        )
    if evidence.has_rows:
        yield (
            f"{own} is used by a function too, beside {where}, as in F.linear(x, module.{own}): call the module instead"
            + (f" (it is also {' and '.join(others)}: call that module)" if others else "")
        )
        if evidence.training:
            yield "the gradient of an earlier step is still there: call optimizer.zero_grad() in each step"
        yield "the loss has a term of the weights alone (a penalty): use the optimizer's weight_decay instead"
        if not evidence.training:
            return
        if evidence.passes is None:
            yield (
                "a pass whose gradient the loop throws away, or that is not the batch's (FGSM, SAM, a GAN's other half), left its "
                "share there or took it: put it into `with recorder.paused():`"
            )
        yield "the loop changed .grad by hand (noise, a mask, a mean over processes): change the loss instead"
        if evidence.half:
            yield "half precision rounded the gradient away: unscale it before clipping, or train in bfloat16"
        return
    if parameter.is_cuda:
        yield "the loop replays a CUDA graph (torch.cuda.graph), which calls no hooks: train without"
    if _anything_compiled():
        yield (
            "the loop calls it within a function that torch.compile made: call torch._dynamo.reset() just before Recorder(...), or "
            "train without torch.compile"
        )
    heads = ' (in trainers set loss_type="nll" (TRL) and use_liger_kernel=False)' if "transformers" in sys.modules else ""
    yield (
        f"{where} was not called, and its {own} is used by a function, as in F.linear(x, module.{own}) or a fused or chunked "
        f"cross-entropy: call the module{heads}" + (f"; it is also {' and '.join(others)}" if others else "")
    )
    if evidence.training:
        yield "its gradient was left by an earlier step or pass that was not recorded: call optimizer.zero_grad() before the step"


def reparametrization(model: nn.Module, name: str) -> str | None:
    """What is to be said of a parameter from which another tensor, the weight that a module uses, is computed; None: none is.

    Args:
        model: that has it.
        name: of the parameter in `model.named_parameters()`.
    """
    path, module, own = _owner(model, name)
    return _parametrized(model, path, module) or _computed_before(path, module, own)


def _owner(model: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """Path of the module that has parameter `name`, the module, and the parameter's name there."""
    path, _, own = name.rpartition(".")
    return path, model.get_submodule(path), own


def _parametrized(model: nn.Module, path: str, module: nn.Module) -> str | None:
    # original, original0, ... are in `MODULE.parametrizations.TENSOR`; parameters of a parametrization one module further down
    parts = path.split(".")
    if parametrize.ParametrizationList not in type(module).__mro__:
        holder = next((i for i, part in enumerate(parts) if part == "parametrizations"), None)
        if holder is None or holder + 1 >= len(parts):
            return None
        module = model.get_submodule(".".join(parts[: holder + 2]))
        parts = parts[: holder + 2]
    target, tensor = ".".join(parts[:-2]), parts[-1]
    kinds = ", ".join(type(part).__name__.lstrip("_") for part in module.children()) or "a parametrization"
    return (
        f"{tensor} of {target or 'the model'} is parametrized ({kinds}): what is trained is not the weight that its module uses. "
        f"Take it away before training by torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}), or freeze it."
    )


def _computed_before(path: str, module: nn.Module, own: str) -> str | None:
    """The old weight_norm and spectral_norm, and pruning, compute the weight in a forward pre-hook."""
    stem = own.rpartition("_")[0]
    for hook in module._forward_pre_hooks.values():
        kind = type(hook)
        if not isinstance(hook, BasePruningMethod) and kind.__name__ not in ("WeightNorm", "SpectralNorm"):
            continue
        if stem != getattr(hook, "_tensor_name", getattr(hook, "name", None)):
            continue
        if isinstance(hook, BasePruningMethod):
            return (
                f"{stem} of {path or 'the model'} is pruned ({kind.__name__}), times a mask: make that permanent before training "
                f"by torch.nn.utils.prune.remove(module, {stem!r}), or freeze {own}."
            )
        what = "weight_norm" if kind.__name__ == "WeightNorm" else "spectral_norm"
        return (
            f"{stem} of {path or 'the model'} is computed from {own} by {what}: take it away before training by "
            f"torch.nn.utils.remove_{what}(module, {stem!r}), or freeze it."
        )
    return None


def _is_functional_graph(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None) if _is_a(module, "GraphModule") else None
    return graph is not None and any(node.op == "get_attr" for node in graph.nodes)


def _clipped_at(model: nn.Module) -> float | None:
    """The magnitude that clipping by value has left of the largest elements of the gradient; None: none, as far as can be seen."""
    gradients = [p.grad.detach() for p in model.parameters() if p.grad is not None and p.grad.layout == torch.strided]
    magnitudes = [g.abs() for g in gradients if g.numel()]
    largest = max((float(m.max()) for m in magnitudes), default=0.0)
    at_it = sum(int((m == largest).sum()) for m in magnitudes)
    return largest if 0.0 < largest < inf and at_it >= _FEWEST_CLIPPED else None


# trainers


def refuse_training_arguments(args: Any) -> None:
    """Refuse options of transformers' trainer, and of TRL's, under which its batches cannot be recorded.

    Args:
        args: of transformers.TrainingArguments or a subclass.

    Raises:
        UsageError: names the option and a way out.
    """
    for option, why in (
        ("packing", "puts several samples into one sequence, whose gradient cannot be split between them"),
        ("padding_free", "puts the batch's samples into one sequence, whose gradient cannot be split between them"),
        ("use_liger_kernel", "takes the loss from the weight of the head without calling the head, where no hook sees it"),
    ):
        if getattr(args, option, False):
            raise UsageError(f"{option}=True {why}: train with {option}=False")
    parallelism = getattr(args, "parallelism_config", None)
    sizes = {n: getattr(parallelism, n, 1) for n in ("tp_size", "cp_size", "sp_size", "dp_shard_size")}
    if sharded := [n for n, size in sizes.items() if isinstance(size, int) and size > 1]:
        raise UsageError(f"parallelism_config has {sharded[0]}={sizes[sharded[0]]}, which shards the model: {_TRAIN_UNSHARDED}")
    kind = next((t for t in type(args).__mro__ if t.__module__.partition(".")[0] == "trl"), None)
    if kind is None:
        return
    if kind.__name__ not in ("SFTConfig", "PRMConfig"):
        raise UsageError(
            f"the trainer of {kind.__name__} puts its batches together itself (pairs, generated texts, a reference model), and "
            f"their samples cannot be told: write the loop with hydra_pipe.Recorder, a pair being one sample"
        )
    if hasattr(args, "loss_type") and args.loss_type in (None, "chunked_nll"):
        raise UsageError(
            f"loss_type={args.loss_type!r} of {kind.__name__} takes the loss from the weight of the head in chunks, without "
            f'calling the head, where no hook sees it: give SFTConfig(..., loss_type="nll")'
        )


def unnamed_pass(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """What is said where a trainer's loss calls the model without the ids of the batch, which the batch itself holds.

    Args:
        model: that was called.
        inputs: its named arguments.
    """
    given = ", ".join(f"{name}=" for name in inputs) or "unnamed arguments only"
    return (
        f"the trainer called {type(model).__name__} with {given}, without the ids of its samples, which the batch holds: let "
        f"compute_loss call model(**inputs) with the whole batch (take labels out of a copy first if need be), and name a batch of "
        f"its own making by callback.recorder.next_batch(ids)"
    )
