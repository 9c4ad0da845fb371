"""The rule of each kind of optimiser, and what of an optimiser cannot be recorded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import OptimizerError
from hydra_pipe.recording.optimizer_rules import (
    AdafactorRule,
    AdagradRule,
    AdamRule,
    MuonRule,
    NAdamRule,
    OptimizerRule,
    RAdamRule,
    RmsPropRule,
    SgdRule,
)
from hydra_pipe.recording.several_optimizers import (
    SeveralOptimizers,
    optimizers_in,
    owners_of_groups,
)

_RULES: dict[type[torch.optim.Optimizer], OptimizerRule] = {
    torch.optim.SGD: SgdRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
    torch.optim.NAdam: NAdamRule(),
    torch.optim.RAdam: RAdamRule(),
    torch.optim.RMSprop: RmsPropRule(),
    torch.optim.Adagrad: AdagradRule(),
    torch.optim.Adafactor: AdafactorRule(),
    torch.optim.Muon: MuonRule(),
}


# (package, class) of wrappers that pass the step on, unchanged, to the optimizer that they hold as
# `optimizer`
_THIN_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"),
    ("lightning", "_FabricOptimizer"),
    ("lightning_fabric", "_FabricOptimizer"),
    ("lightning", "LightningOptimizer"),
    ("pytorch_lightning", "LightningOptimizer"),
}
# packages whose optimizers have the same names as torch's
_NAMESAKES = {"apex", "bitsandbytes", "torchao"}


def register_optimizer_rule(
    optimizer_type: type[torch.optim.Optimizer], rule: OptimizerRule
) -> None:
    """Use `rule` for optimisers of exactly `optimizer_type`.

    Raises:
        OptimizerError: the type has a rule already; the message names both rules.
    """
    if optimizer_type in _RULES:
        raise OptimizerError(
            f"{optimizer_type.__name__} has the rule {type(_RULES[optimizer_type]).__name__} "
            f"already; {type(rule).__name__} "
            f"cannot be registered beside it"
        )
    _RULES[optimizer_type] = rule


def rule_of(optimizer: torch.optim.Optimizer) -> OptimizerRule:
    """Return the rule for `optimizer`.

    Raises:
        OptimizerError: there is no rule. A subclass may do anything, so it needs a rule of its own.
    """
    kind = type(optimizer)
    rule = _RULES.get(kind)
    if rule is not None:
        return rule
    known = ", ".join(map(_path_of, _RULES))
    base = next((t for t in kind.__mro__ if t in _RULES), None)
    what = (
        f"a subclass of {_path_of(base)}, whose update may be another"
        if base is not None
        else _kind_in_words(optimizer)
    )
    raise OptimizerError(
        f"{_path_of(kind)} is not handled{what and f': it is {what}'}. hydra-pipe knows the "
        f"update rules of {known}: use one of "
        f"them, or teach it yours with hydra_pipe.register_optimizer_rule"
    )


def rules_of_groups(optimizer: torch.optim.Optimizer) -> list[OptimizerRule]:
    """Return the rule for each parameter group of `optimizer`.

    Raises:
        OptimizerError: an optimiser has no rule.
    """
    rules = {one: rule_of(one) for one in optimizers_in(optimizer)}
    return [rules[one] for one in owners_of_groups(optimizer)]


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of Accelerate and Lightning.

    Several optimizers in a list become one `SeveralOptimizers`.

    The inner optimizer takes the step: its hooks are called, the wrapper's hooks are not. Other
    wrappers change the update, such as lookahead or sharpness-aware minimisation. They are not
    removed.
    """
    if isinstance(optimizer, list | tuple) and len(optimizer):
        several = [innermost(one) for one in optimizer]
        for one in several:
            rule_of(one)
        return several[0] if len(several) == 1 else SeveralOptimizers(several)
    while any(
        (t.__module__.partition(".")[0], t.__name__) in _THIN_WRAPPERS
        for t in type(optimizer).__mro__
    ):
        optimizer = optimizer.optimizer
    return optimizer


def _path_of(kind: type) -> str:
    """Return the import path of `kind`: for torch's own classes, the path that users import.

    A name alone does not tell classes of different packages apart.
    """
    module = "torch.optim" if getattr(torch.optim, kind.__name__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _kind_in_words(optimizer: Any) -> str:
    """Describe an optimizer without a rule, beside its name; empty if nothing is known."""
    if isinstance(optimizer, (list, tuple, dict)):
        return "no optimizer; give the optimizer of the model's parameters, or a list of several"
    home = type(optimizer).__module__.partition(".")[0]
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        return (
            "sharded over processes, of which each updates a part; wrap the model in "
            "DistributedDataParallel, not the optimizer"
        )
    if type(optimizer).__name__ == "Lion":
        return (
            "an optimizer that moves by a sign, whose derivative is 0. If it takes the steps of "
            "Chen et al. (2023), register_optimizer_rule(Lion, hydra_pipe.LionRule()) lets the "
            "sign count as a multiple of its average"
        )
    if home == "schedulefree":
        return (
            "schedule-free, which takes gradients at other weights than it averages; use the "
            "optimizer of the same name with a schedule"
        )
    if home == "deepspeed":
        return (
            "DeepSpeed's, which holds gradients in shards; train without it, with "
            "DistributedDataParallel"
        )
    if home in _NAMESAKES:
        return (
            f"of {home}, whose state hydra-pipe does not read; in transformers' trainer set "
            'optim="adamw_torch"'
        )
    held = (getattr(optimizer, name, None) for name in ("optimizer", "base_optimizer"))
    inner = next((o for o in held if isinstance(o, torch.optim.Optimizer)), None)
    if inner is not None:
        return f"a wrapper around {_path_of(type(inner))}, and may change its update"
    return "" if isinstance(optimizer, torch.optim.Optimizer) else "not a torch.optim.Optimizer"


def leaves_out_step(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether this optimizer.step() will change nothing.

    A gradient scaler calls a fused optimiser also for a step to be skipped, and sets `found_inf`.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def gradients_in_use(
    optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return `gradients` as the step will use them.

    A fused optimiser itself divides by the scale of a gradient scaler. An optimiser that maximises
    descends along the negative of the gradient.
    """
    scale = getattr(optimizer, "grad_scale", None)
    used = list(gradients)
    if scale is not None:
        used = [None if g is None else g.detach() / scale.to(g) for g in used]
    if maximizes(optimizer):
        used = [None if g is None else -g.detach() for g in used]
    return used


def maximizes(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimiser climbs: then all of its parameter groups do."""
    return any(group.get("maximize") for group in optimizer.param_groups)


def check_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[nn.Parameter, tuple[str, int]]:
    """Refuse an optimiser whose update cannot be differentiated, before anything is trained.

    Returns:
        Name and parameter group of every parameter to record, in the model's order. These are the
        parameters that the optimiser trains.

    Raises:
        OptimizerError: an optimiser or an option that is not handled, or parameters that are not
            the model's.
    """
    groups = {}
    for index, (rule, group) in enumerate(
        zip(rules_of_groups(optimizer), optimizer.param_groups, strict=True)
    ):
        if bool(group.get("maximize")) != maximizes(optimizer):
            raise OptimizerError(
                f"parameter group {index} has maximize=False and another one has maximize=True: "
                "rows are of one loss, so give all groups the same, or train the groups that "
                "maximise in a run of their own"
            )
        rule.check(group, index)
        for parameter in group["params"]:
            groups[parameter] = index
    named = {parameter: name for name, parameter in model.named_parameters()}
    strangers = [p for p in groups if p not in named]
    if strangers:
        raise OptimizerError(
            f"the optimizer holds {len(strangers)} parameters that are not the model's, the "
            "first of shape "
            f"{tuple(strangers[0].shape)} in parameter group {groups[strangers[0]]}: build it "
            "from model.parameters() of the "
            f"model given here"
        )
    trained = {p: (name, groups[p]) for p, name in named.items() if p in groups and p.requires_grad}
    if not trained:
        raise OptimizerError(
            "there is no trainable parameter: the optimizer holds no parameter of the model with "
            "requires_grad=True"
        )
    for parameter, (name, _) in trained.items():
        if parameter.is_complex() or parameter.is_sparse:
            raise OptimizerError(
                f"parameter {name} is {parameter.dtype}, {parameter.layout}: only dense real "
                "ones are handled, freeze it"
            )
    return trained
