"""Trainings of a moment by optimisers beside SGD and Adam."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hydra_pipe import OptimizerRule, Pipeline, SeveralOptimizers
from support.pipelines import conv_net, conv_pipeline, cross_entropy, likelihood

Kind = Callable[..., torch.optim.Optimizer]
T = torch.optim


def muon_and_adamw(
    groups: list[dict[str, Any]], lr: float, eps: float = 1e-8, **options: Any
) -> SeveralOptimizers:
    """Muon of the matrices, and AdamW of the rest with the settings of its group."""
    matrices: list[nn.Parameter] = []
    others = []
    for group in groups:
        params = list(group["params"])
        matrices += [p for p in params if p.dim() == 2]
        others.append({**group, "params": [p for p in params if p.dim() != 2]})
    return SeveralOptimizers(
        [T.Muon(matrices, lr=lr, **options), T.AdamW(others, lr=lr, eps=eps, weight_decay=0.1)]
    )


class Lion(torch.optim.Optimizer):
    """As Chen et al. (2023) have it."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"weight_decay": 0.0} | options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * average.lerp(p.grad, 1 - beta1).sign())
                average.lerp_(p.grad, 1 - beta2)


class Lars(torch.optim.Optimizer):
    """As You et al. (2017) have it."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"weight_decay": 0.0, "momentum": 0.0, "trust": 0.02} | options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                used = self.rate(p, group) * (p.grad + group["weight_decay"] * p)
                buffer.mul_(group["momentum"]).add_(used)
                p.sub_(group["lr"] * buffer)

    @staticmethod
    def rate(p: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        assert p.grad is not None
        return group["trust"] * p.norm() / (p.grad.norm() + group["weight_decay"] * p.norm())


class LarsRule(OptimizerRule):
    """As docs/optimiser.md has it."""

    has_paces = measures_gain = True
    is_elementwise = False

    def settings(self, group: Mapping[str, Any]) -> dict[str, float]:
        found = {name: float(group[name]) for name in ("momentum", "weight_decay")}
        none = {"dampening": 0.0, "nesterov": 0.0, "decoupled_decay": 0.0}
        return {"learning_rate": float(group["lr"])} | found | none

    def measured_factor(
        self,
        parameter: nn.Parameter,
        gradient: torch.Tensor,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
    ) -> torch.Tensor:
        norm = parameter.detach().norm()
        return group["trust"] * norm / (gradient.norm() + float(group["weight_decay"]) * norm)


# optimizers whose rules users register
TAUGHT = (Lion, Lars)
# optimiser and options; two parameter groups, whose options differ as `OF_OTHERS` says
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "amsgrad": (T.AdamW, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5)}),
    "NAdam": (T.NAdam, {"lr": 0.01, "momentum_decay": 0.4, "weight_decay": 0.1}),
    "NAdam, decoupled": (
        T.NAdam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "NAdam without momentum": (T.NAdam, {"lr": 0.01, "betas": (0.0, 0.99)}),
    "RAdam": (T.RAdam, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "RMSprop": (T.RMSprop, {"lr": 0.003, "alpha": 0.9, "weight_decay": 0.1}),
    "RMSprop with momentum": (T.RMSprop, {"lr": 0.003, "alpha": 0.9, "momentum": 0.8}),
    "RMSprop, centred": (T.RMSprop, {"lr": 0.003, "alpha": 0.9, "centered": True}),
    "Adagrad": (T.Adagrad, {"lr": 0.03, "lr_decay": 0.2, "weight_decay": 0.1}),
    "Adagrad, begun above 0": (T.Adagrad, {"lr": 0.03, "initial_accumulator_value": 0.1}),
    "Muon beside AdamW": (muon_and_adamw, {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.2}),
    "Muon without Nesterov": (
        muon_and_adamw,
        {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    ),
    "Adafactor": (T.Adafactor, {"lr": 0.05, "eps": (1e-3, 1e-3), "weight_decay": 0.1}),
    "Adafactor, seldom clipped": (T.Adafactor, {"lr": 0.3, "d": 3.0, "beta2_decay": -0.5}),
    "Lion": (Lion, {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "Lion with equal betas": (Lion, {"lr": 1e-3, "betas": (0.9, 0.9)}),
    "LARS": (Lars, {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1}),
    "LARS without momentum": (Lars, {"lr": 0.5}),
    "climbing by AdamW": (T.AdamW, {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "climbing by SGD": (T.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
}
OF_OTHERS = {"weight_decay": 0.0}


def pipeline_of(case: str, **changes: Any) -> Pipeline:
    kind, options = CASES[case]
    model = conv_net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    own = {} if kind in (T.SGD, T.Adafactor, Lion, Lars) else {"eps": 1e-3}
    optimizer = kind(
        [{"params": weights}, {"params": others, "lr": options["lr"] / 2, **OF_OTHERS}],
        **(own | options),
    )
    fields: dict[str, Any] = {
        "scheduler": T.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        "loss": likelihood if options.get("maximize") else cross_entropy,
    }
    return conv_pipeline(model=model, optimizer=optimizer, **(fields | changes))


def muon_without_rounding(patch: pytest.MonkeyPatch) -> None:
    """Let torch.optim.Muon work in the dtype of its parameters: its bfloat16 is no smooth function,
    and makes float32 and float64 two trainings.
    """
    made = torch.optim._muon._zeropower_via_newtonschulz

    def whole(*arguments: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            return made(*arguments)

    patch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", whole)
