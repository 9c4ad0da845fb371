"""Layer rules: from a module's input and the gradient at its output to each sample's gradient of its parameters.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input channels or features.

A rule is "obviously correct, but fast": `tests/oracles.py` holds the slow twin, one backward pass a sample.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.factors import Contribution, Factors, Summed, TokenRows
from hydra_pipe.maths.patches import Conv, ConvTranspose, Patches, norms

# (module, positional inputs, keyword inputs, gradient at the output, names of the wanted parameters) -> by parameter name
Rule = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Tensor, Collection[str]], dict[str, Contribution]]

_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(module_type: type[nn.Module], rule: Rule) -> None:
    """Use `rule` for modules of exactly `module_type`, and for subclasses that keep its `forward`.

    Raises:
        LayerError: that type has a rule already; the message names both.
    """
    present = _rule_of_type(module_type)
    if present is not None:
        raise LayerError(
            f"{module_type.__name__} has the rule {present.__qualname__} already; "
            f"{rule.__qualname__} cannot be registered beside it"
        )
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The registered rule that splits `module`'s gradient by sample; None: it has none, and is left to the graph.

    A module with a rule from here and parameters of other names (a reparametrised weight, say) has none either.
    """
    for module_type in type(module).__mro__:
        rule = _rule_of_type(module_type)
        if rule is not None:
            # A subclass that computes something else must not be taken for its parent.
            same_forward = getattr(type(module), "forward", None) is getattr(module_type, "forward", None)
            usual = rule not in _OWN or set(module._parameters) <= {"weight", "bias"}
            return rule if same_forward and usual and "forward" not in module.__dict__ else None
    return None


def takes_any_leading_dimensions(rule: Rule) -> bool:
    """Tell whether `rule` takes samples and positions in any order, so that the samples may be moved to the front."""
    return rule in (linear_rule, conv1d_of_transformers_rule, embedding_rule, last_dims_norm_rule)


def _rule_of_type(module_type: type) -> Rule | None:
    return _RULES.get(module_type) or _RULES_BY_PATH.get(f"{module_type.__module__}.{module_type.__qualname__}")


def linear_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Linear, y = W x + b: dW_i = sum_p g_ip x_ip^T, db_i = sum_p g_ip. Inputs of shape (B, ..., I)."""
    (inputs,) = args or kwargs.values()
    left = _by_position(grad_output)
    if "weight" not in wanted:
        return {name: Factors(left, None) for name in wanted}
    weight = Factors(left, _by_position(inputs))
    return {name: weight if name == "weight" else Factors(left, None, weight) for name in wanted}


def _by_position(values: Tensor) -> Tensor:
    """(B, ..., n) to (B, P, n)."""
    return values.unsqueeze(1) if values.dim() == 2 else values.reshape(len(values), -1, values.shape[-1])


def conv1d_of_transformers_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """A Linear whose weight has the shape (I, O), y = x W + b: dW_i = sum_p x_ip g_ip^T. What GPT-2 in transformers is made of."""
    (inputs,) = args or kwargs.values()
    batch = grad_output.shape[0]
    grads = grad_output.reshape(batch, -1, grad_output.shape[-1])
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    return {name: Factors(inputs, grads) if name == "weight" else Factors(grads, None) for name in wanted}


def conv_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Convolution as a Linear on patches: dW_i = sum_p g_ip patch_ip^T, any stride, padding, dilation and groups."""
    assert isinstance(module, Conv)
    (inputs,) = args or kwargs.values()
    grads = grad_output.flatten(2)
    result: dict[str, Contribution] = {name: Factors(grads.transpose(1, 2), None) for name in wanted if name == "bias"}
    if "weight" in wanted:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # torch keeps the widths, "same" resolved, in the order that F.pad takes
        widths = tuple(module._reversed_padding_repeated_twice)
        patches = Patches(inputs, module, grad_output.shape[2:], widths, mode)
        result["weight"] = _grouped(grads, patches, module.groups, result.get("bias"))
    return result


def conv_transpose_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Transposed convolution: the roles of input and output gradient are changed, dW_i = sum_p x_ip patch(g)_ip^T."""
    assert isinstance(module, ConvTranspose)
    inputs = args[0] if args else kwargs["input"]
    result: dict[str, Contribution] = {
        name: Factors(grad_output.flatten(2).transpose(1, 2), None) for name in wanted if name == "bias"
    }
    if "weight" in wanted:
        padding = cast("tuple[int, ...]", module.padding)
        widths = tuple(width for n in reversed(padding) for width in (n, n))
        patches = Patches(grad_output, module, inputs.shape[2:], widths)
        result["weight"] = _grouped(inputs.flatten(2), patches, module.groups)
    return result


def _grouped(lefts: Tensor, patches: Patches, groups: int, bias: Contribution | None = None) -> Contribution:
    """Products of (B, O, P) and patches, group by group; `bias` has the same output factor, if it is given."""
    if groups == 1:
        left = bias.left if isinstance(bias, Factors) else lefts.transpose(1, 2)
        return Factors(left, patches)
    batch, positions = len(lefts), lefts.shape[2]
    rows = lefts.new_empty(batch * groups, lefts.shape[1] // groups, patches.n_pixels // groups)
    for samples in patches.pieces():
        rights = patches.written_out(samples).transpose(1, 2).reshape(-1, patches.n_pixels // groups, positions)
        of_piece = lefts[samples].reshape(len(rights), -1, positions)
        torch.bmm(of_piece, rights.transpose(1, 2), out=rows[samples.start * groups :][: len(rights)])
    return rows.reshape(batch, -1)


def embedding_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Embedding: the gradient at each position goes to the row of its token; repeated tokens add up, padding gets none.

    Raises:
        LayerError: scale_grad_by_freq, which counts tokens across samples, or sparse gradients.
    """
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq or module.sparse:
        raise LayerError("an Embedding with scale_grad_by_freq or sparse=True cannot be recorded: make it without")
    (tokens,) = args or kwargs.values()
    batch = len(tokens)
    values = grad_output.reshape(batch, -1, module.embedding_dim)
    lines = token_rows(tokens.reshape(batch, -1), values, module.num_embeddings, module.padding_idx)
    return dict.fromkeys(wanted, lines)


def token_rows(tokens: Tensor, values: Tensor, n_lines: int, padding: int | None) -> TokenRows:
    """Lines of a table, without those of padding. See `TokenRows`."""
    if padding is not None and padding >= 0:
        values = values * (tokens != padding).unsqueeze(2)
    return TokenRows(tokens.long(), values, n_lines)


def last_dims_norm_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """LayerNorm and RMSNorm, y = w * n(x) + b over the last dimensions: dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    (inputs,) = args or kwargs.values()
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        normed = F.layer_norm(inputs, shape, None, None, module.eps)
    else:
        normed = F.rms_norm(inputs, shape, None, module.eps)
    size = math.prod(shape)
    lefts = grad_output.reshape(len(inputs), -1, size)
    return {
        name: _over_positions(lefts * normed.reshape(lefts.shape)) if name == "weight" else Factors(lefts, None) for name in wanted
    }


def _over_positions(terms: Tensor) -> Contribution:
    """Sum terms of shape (B, P, n) over positions, and keep what is summed.

    Where a softmax over positions follows, nothing but rounding may be left of the sum.
    """
    if terms.shape[1] == 1:
        return terms[:, 0]
    return Summed(terms.sum(1), norms(terms).mul_(terms.shape[1] ** 0.5))


def channel_norm_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """GroupNorm, InstanceNorm and BatchNorm, y = w * n(x) + b by channel: dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip.

    In training mode BatchNorm's n(x) and the gradients below it depend on the whole batch. A row is then the sample's *share* of
    the batch gradient, what goes through its own activations; the shares sum to the gradient, but are not each sample's own.
    """
    (inputs,) = args or kwargs.values()
    rows: dict[str, Contribution] = {}
    for name in wanted:
        if name == "weight":
            # in place: another array of that size costs more than the product
            terms = _channel_normed(module, inputs).mul_(grad_output)
            rows[name] = _over_positions(terms.reshape(*inputs.shape[:2], -1).transpose(1, 2))
        else:
            # of factors the books know what is summed: where a mean over positions is taken off, nothing but rounding is left of it
            rows[name] = Factors(grad_output.reshape(*inputs.shape[:2], -1).transpose(1, 2), None)
    return rows


def _channel_normed(module: nn.Module, inputs: Tensor) -> Tensor:
    """n(x), in memory of its own."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, None, None, module.eps)
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    own = module.training or module.running_mean is None
    kept = (None, None) if own else (module.running_mean, module.running_var)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(inputs, *kept, training=own, eps=module.eps)
    return F.instance_norm(inputs, *kept, use_input_stats=own, eps=module.eps)


_BUILT_IN: dict[Rule, tuple[type[nn.Module], ...]] = {
    linear_rule: (nn.Linear,),
    conv_rule: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    conv_transpose_rule: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    embedding_rule: (nn.Embedding,),
    last_dims_norm_rule: (nn.LayerNorm, nn.RMSNorm),
    channel_norm_rule: (
        nn.GroupNorm,
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    ),
}
# Types of libraries that need not be there.
_RULES_BY_PATH: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": conv1d_of_transformers_rule}
_OWN = {*_BUILT_IN, *_RULES_BY_PATH.values()}
for _rule, _types in _BUILT_IN.items():
    for _type in _types:
        register_rule(_type, _rule)
