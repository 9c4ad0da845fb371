"""Detection of code that torch.compile or CUDA graphs have made of a model.

Such code calls no hooks, and not all of it can be detected. This module does not import
torch._dynamo: if no other module has imported it, nothing was compiled.
"""

import gc
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def is_a(module: nn.Module, name: str) -> bool:
    """Tell whether the class of `module`, or one of its base classes, has `name`."""
    return any(t.__name__ == name for t in type(module).__mro__)


def is_graphed(module: nn.Module, parameters: Iterable[Tensor]) -> bool:
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


def compiled_before(model: nn.Module) -> str | None:
    """Return the part of `model` that is compiled and was called already, in words.

    Returns:
        None if there is no such part, as far as can be seen.
    """
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
        is_a(module, "OptimizedModule")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _compiled_around(model: nn.Module) -> list[nn.Module]:
    """Find the wrappers that torch.compile made of `model`, or of a module that holds `model`.

    The loop may call such a wrapper. The search looks at all objects of the process.
    """
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if kind is None or not anything_compiled():
        return []
    # by type(): isinstance runs code of proxies, which may do anything
    wrappers: list[nn.Module] = [o for o in gc.get_objects() if issubclass(type(o), kind)]
    return [wrapper for wrapper in wrappers if any(module is model for module in wrapper.modules())]


def _has_code(module: nn.Module) -> bool:
    """Tell whether compiled code of the forward pass of `module` exists.

    Modules of one class share the code, so another module of the class may have been compiled.
    """
    entries = getattr(torch._C._dynamo.eval_frame, "_debug_get_cache_entry_list", None)
    if entries is None:
        return False
    forward = getattr(module.forward, "_torchdynamo_orig_callable", module.forward)
    functions = [getattr(forward, "__func__", forward)]
    if getattr(module, "_compiled_call_impl", None) is not None:
        functions.append(nn.Module._call_impl)
    codes = [code for f in functions if (code := getattr(f, "__code__", None)) is not None]
    return any(bool(entries(code)) for code in codes)


def anything_compiled() -> bool:
    """Tell whether torch.compile has compiled anything in this process."""
    convert = sys.modules.get("torch._dynamo.convert_frame")
    return bool(getattr(getattr(convert, "input_codes", None), "seen", ()))
