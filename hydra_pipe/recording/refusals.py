"""The parts of a model that cannot be recorded, refused before training.

No package is imported here to ask about its objects: if the package is not imported, none of its
objects can exist.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hydra_pipe.errors import LayerError
from hydra_pipe.recording.compiled import compiled_before, is_a, is_graphed

Trained = Mapping[nn.Parameter, tuple[str, int]]

#: the way out of sharding, as the end of a sentence
TRAIN_UNSHARDED = "train on one device, or with torch.nn.parallel.DistributedDataParallel"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Trained) -> None:
    """Refuse, before anything is trained, a model that cannot be recorded.

    Args:
        model: model in training, without DistributedDataParallel around it.
        optimizer: optimiser of the parameters.
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
            f"the trained parameters are on several devices ({places}): put the whole model on "
            "one, such as by "
            f'device_map={{"": 0}} in place of "auto", or freeze what is elsewhere'
        )
    if (compiled := compiled_before(model)) is not None:
        raise LayerError(
            f"{compiled} was compiled by torch.compile and called before the Recorder was made, "
            "and compiled code calls no hooks "
            "that come later: make the Recorder before the first call, or call "
            "torch._dynamo.reset() just before Recorder(...)"
        )


def sharding(model: nn.Module) -> str | None:
    """Return the message for a model whose parameters are spread over processes.

    None if no sharding is visible.
    """
    for path, module in model.named_modules():
        kind = _kind_of_shards(module)
        if kind is not None:
            return (
                f"{path or 'the model'} is sharded by {kind}, so that no process has its whole "
                f"gradients: {TRAIN_UNSHARDED}"
            )
    for name, parameter in model.named_parameters():
        kind = _shards_of(parameter)
        if kind is not None and parameter.requires_grad:
            return (
                f"parameter {name} is sharded by {kind}, so that no process has its whole "
                f"gradient: {TRAIN_UNSHARDED}"
            )
    return None


def _kind_of_shards(module: nn.Module) -> str | None:
    kinds = {(t.__module__.partition(".")[0], t.__name__) for t in type(module).__mro__}
    if ("torch", "FullyShardedDataParallel") in kinds or (
        "fairscale",
        "FullyShardedDataParallel",
    ) in kinds:
        return "FullyShardedDataParallel"
    if ("torch", "FSDPModule") in kinds:
        return "fully_shard"
    if ("deepspeed", "DeepSpeedEngine") in kinds:
        return "DeepSpeed"
    return None


def _shards_of(parameter: Tensor) -> str | None:
    if (
        type(parameter).__name__ == "DTensor"
        or type(getattr(parameter, "data", None)).__name__ == "DTensor"
    ):
        return "fully_shard or tensor parallelism (it is a DTensor)"
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO"
    return (
        "tensor parallelism (Megatron)"
        if getattr(parameter, "tensor_model_parallel", False)
        else None
    )


def _reason_of(module: nn.Module, parameters: Trained) -> str | None:
    """Return the reason why `module`'s trained parameters cannot be recorded, or None.

    The reason is the end of a sentence about the module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        if not _holds(module, parameters):
            return None
        how = "torch.jit.trace" if is_a(module, "TopLevelTracedModule") else "torch.jit.script"
        return (
            f"is made by {how}, and its parts call no hooks: train the module that it was made "
            "of, and convert it afterwards"
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f"copies the model to {len(module.device_ids)} GPUs at each pass, and the copies "
            "call no hooks: use one GPU, or one "
            f"process for each with torch.nn.parallel.DistributedDataParallel"
        )
    if isinstance(module, nn.SyncBatchNorm) and _holds(module, parameters):
        return (
            "takes its statistics over the batches of all processes, whose samples it mixes: "
            "build the model with BatchNorm "
            "instead, or freeze it"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and _holds(module, parameters):
        for option, why in (
            ("sparse", "so that its gradient is a sparse tensor"),
            (
                "scale_grad_by_freq",
                "so that one sample's share of its gradient depends on the other samples of the "
                "batch",
            ),
        ):
            if getattr(module, option):
                return f"has {option}=True, {why}: make it with {option}=False, or freeze it"
    if is_graphed(module, parameters):
        return (
            "runs as a CUDA graph, which calls hooks while it is captured and never again: train "
            "without "
            "make_graphed_callables and without mode='reduce-overhead' or 'max-autotune' of "
            "torch.compile"
        )
    return None


def _reason_of_parameter(parameter: nn.Parameter) -> str | None:
    if is_lazy(parameter):
        return (
            "has no shape yet (a lazy module): call the model once on a batch, then make the "
            "optimizer and the Recorder, in this "
            "order"
        )
    if parameter.device.type == "meta":
        return (
            "is on the meta device and has no values (init_empty_weights, or a device_map that "
            "offloads): load the model onto a "
            "device as a whole"
        )
    if parameter.numel() == 0:
        return "has no elements: freeze it, or leave it out of the optimizer"
    if parameter.dtype not in _DTYPES:
        return (
            f"is {parameter.dtype}: train it in float32 or bfloat16, quantise afterwards, or "
            "freeze it"
        )
    kind = type(parameter)
    # A plain subclass of Parameter is fine. A tensor with its own dispatch does not hold the values
    # that it shows, unless it is a device's own, written in Python.
    dispatches = (
        kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        and parameter.device.type != torch._C._get_privateuse1_backend_name()
    )
    if dispatches or kind.__module__.startswith(("bitsandbytes", "torchao")):
        return (
            f"is a {_path_of(kind)}, whose values are kept in another form: train a plain one, "
            "or freeze it and train adapters"
        )
    if parameter.device.type == "cpu" and _is_shared(parameter):
        return (
            "is in memory shared with other processes (share_memory(), or an argument of "
            "torch.multiprocessing), which may change "
            "it between two steps: train copy.deepcopy(model), whose parameters are this "
            "process's own, and load its state_dict "
            "where others want it"
        )
    if getattr(parameter, "_in_backward_optimizers", None):
        return (
            "is updated within the backward pass (optimizer in backward): call optimizer.step() "
            "after it"
        )
    return None


def _is_shared(parameter: Tensor) -> bool:
    # always True for CUDA tensors, so it tells nothing there
    return bool(parameter.untyped_storage().is_shared())


def _holds(module: nn.Module, parameters: Trained) -> bool:
    return any(p in parameters for p in module.parameters())


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
