"""The facts of an optimiser that the sweep needs, read at each step just before the update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import OptimizerError
from hydra_pipe.maths.adam import root_preconditioner

# a parameter's entry in `optimizer.state`, and its group in `optimizer.param_groups`
State = Mapping[str, Any]
Group = Mapping[str, Any]


class OptimizerRule:
    """A rule that writes one optimiser's update as momentum SGD, possibly in its own coordinates.

    A subclass and `register_optimizer_rule` teach a new rule. The sweep (docs/architecture.md)
    is exact for an update of the form

        v = mu v + (1 - tau) G,   G = gradient + weight_decay theta,
        theta = (1 - decoupled_decay) theta - learning_rate * step_factor * P v

    with P = 1, or with an elementwise P that is not negative. Of P, the recording keeps the one of
    its end, and of each moment at which test gradients are taken.
    """

    #: True if P is not 1; then the root of P is stored beside the test gradients.
    preconditioned = False

    def check(self, group: Group, index: int) -> None:
        """Refuse options whose update is of another form. Raises: OptimizerError."""

    def settings(self, group: Group) -> dict[str, float]:
        """Return the group's columns of the step tables.

        The columns are learning_rate, momentum, dampening, weight_decay, nesterov and
        decoupled_decay.
        """
        raise NotImplementedError

    def starts_momentum(self, state: State, group: Group) -> bool:
        """Tell whether this step sets v to G, whatever tau is."""
        return False

    def step_factor(self, state: State, group: Group) -> float:
        """Return the further factor of the learning rate at this step."""
        return 1.0

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        """Return the root of P after the latest step, the shape of `parameter`; None if P is 1."""
        return None


class SgdRule(OptimizerRule):
    """torch.optim.SGD with momentum, dampening, Nesterov and weight decay."""

    def settings(self, group: Group) -> dict[str, float]:
        return {
            "learning_rate": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": float(group["nesterov"]),
            "decoupled_decay": 0.0,
        }

    def starts_momentum(self, state: State, group: Group) -> bool:
        return bool(group["momentum"] != 0.0) and state.get("momentum_buffer") is None


class AdamRule(OptimizerRule):
    """The rule of torch.optim.Adam and AdamW, with coupled or decoupled weight decay."""

    preconditioned = True

    def check(self, group: Group, index: int) -> None:
        if group.get("amsgrad"):
            raise OptimizerError(
                f"parameter group {index} has amsgrad=True, whose update is not handled: use "
                "amsgrad=False"
            )

    def settings(self, group: Group) -> dict[str, float]:
        rate, decay, beta1 = (
            float(group["lr"]),
            float(group["weight_decay"]),
            float(group["betas"][0]),
        )
        decoupled = bool(group.get("decoupled_weight_decay"))
        return {
            "learning_rate": rate,
            "momentum": beta1,
            "dampening": beta1,
            "weight_decay": 0.0 if decoupled else decay,
            "nesterov": 0.0,
            "decoupled_decay": rate * decay if decoupled else 0.0,
        }

    def step_factor(self, state: State, group: Group) -> float:
        return float(1.0 / (1.0 - float(group["betas"][0]) ** (self._updates(state) + 1)))

    def root(self, parameter: nn.Parameter, state: State, group: Group) -> Tensor | None:
        moment = state.get("exp_avg_sq")
        if moment is None:  # never updated, so that it has no rows either
            return torch.zeros_like(parameter)
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        return root_preconditioner(moment, self._updates(state), beta2, eps)

    @staticmethod
    def _updates(state: State) -> int:
        return int(state.get("step", 0))


_RULES: dict[type[torch.optim.Optimizer], OptimizerRule] = {
    torch.optim.SGD: SgdRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
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


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of Accelerate and Lightning.

    The inner optimizer takes the step: its hooks are called, the wrapper's hooks are not. Other
    wrappers change the update, such as lookahead or sharpness-aware minimisation. They are not
    removed.
    """
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
        return (
            "several optimizers or none; give one of all parameters, in groups where their "
            "settings differ"
        )
    home = type(optimizer).__module__.partition(".")[0]
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        return (
            "sharded over processes, of which each updates a part; wrap the model in "
            "DistributedDataParallel, not the optimizer"
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

    A fused optimiser itself divides by the scale of a gradient scaler.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return list(gradients)
    return [None if g is None else g.detach() / scale.to(g) for g in gradients]


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
    rule = rule_of(optimizer)
    groups = {}
    for index, group in enumerate(optimizer.param_groups):
        if group.get("maximize"):
            raise OptimizerError(
                f"parameter group {index} has maximize=True: minimise the negative of the loss "
                "instead"
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
