"""Layer rules by module type.

A layer rule returns each sample's gradient of a module's parameters. It needs the module's inputs
and the gradient at its output. A rule is "obviously correct, but fast": `tests/oracles.py` holds
the slow twin, one backward pass a sample.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.conv import conv_rule, conv_transpose_rule
from hydra_pipe.per_sample.embedding import embedding_bag_rule, embedding_rule
from hydra_pipe.per_sample.factors import Contribution
from hydra_pipe.per_sample.linear import conv1d_of_transformers_rule, linear_rule
from hydra_pipe.per_sample.normalization import channel_norm_rule, last_dims_norm_rule

# (module, positional inputs, keyword inputs, gradient at the output, names of the wanted
# parameters) -> contribution of each parameter, by name
Rule = Callable[
    [nn.Module, tuple[Any, ...], Mapping[str, Any], Tensor, Collection[str]],
    dict[str, Contribution],
]

_RULES: dict[type[nn.Module], Rule] = {}


def register_layer_rule(module_type: type[nn.Module], rule: Rule) -> None:
    """Use `rule` for modules of exactly `module_type`, and for subclasses that keep its `forward`.

    Raises:
        LayerError: `module_type` has a rule already. The message names both rules.
    """
    present = _rule_of_type(module_type)
    if present is not None:
        raise LayerError(
            f"{module_type.__name__} has the rule {present.__qualname__} already; "
            f"{rule.__qualname__} cannot be registered beside it"
        )
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """Return the registered rule of `module`. None: it has no rule, and is left to the graph.

    A built-in rule does not serve a module with parameters of other names, such as a reparametrised
    weight.
    """
    for module_type in type(module).__mro__:
        rule = _rule_of_type(module_type)
        if rule is not None:
            # A subclass that computes something else must not be taken for its parent.
            same_forward = getattr(type(module), "forward", None) is getattr(
                module_type, "forward", None
            )
            usual = rule not in _OWN or set(module._parameters) <= {"weight", "bias"}
            return rule if same_forward and usual and "forward" not in module.__dict__ else None
    return None


def takes_any_leading_dimensions(rule: Rule) -> bool:
    """Tell whether `rule` takes samples and positions in any order.

    Then the samples may be moved to the front.
    """
    return rule in (linear_rule, conv1d_of_transformers_rule, embedding_rule, last_dims_norm_rule)


def _rule_of_type(module_type: type) -> Rule | None:
    return _RULES.get(module_type) or _RULES_BY_PATH.get(
        f"{module_type.__module__}.{module_type.__qualname__}"
    )


_BUILT_IN: dict[Rule, tuple[type[nn.Module], ...]] = {
    linear_rule: (nn.Linear,),
    conv_rule: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    conv_transpose_rule: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    embedding_rule: (nn.Embedding,),
    embedding_bag_rule: (nn.EmbeddingBag,),
    last_dims_norm_rule: (nn.LayerNorm, nn.RMSNorm),
    channel_norm_rule: (
        nn.GroupNorm,
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    ),
}
# Types of libraries that need not be installed.
_RULES_BY_PATH: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": conv1d_of_transformers_rule}
_OWN = {*_BUILT_IN, *_RULES_BY_PATH.values()}
for _rule, _types in _BUILT_IN.items():
    for _type in _types:
        register_layer_rule(_type, _rule)
