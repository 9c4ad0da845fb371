"""captum: `TracInCP`, `TracInCPFast` and `ArnoldiInfluenceFunction` on checkpoints in files."""

from pathlib import Path
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFast

# which the package does not export
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from subject import Inputs, Method, Offer, losses, main
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Captum(Method):
    """Args:
    kind: class of captum.
    last: the final checkpoint alone.
    options: of the class.
    """

    def __init__(
        self, given: Inputs, store: Path, kind: Any, *, last: bool = False, **options: Any
    ) -> None:
        super().__init__(given, store)
        self._kind, self._last, self._options = kind, last, options

    def prepare(self) -> None:
        given = self.given
        rates = dict(zip(map(str, range(len(given.states))), given.interval_rates, strict=True))
        for name, state in zip(rates, given.states, strict=True):
            torch.save(state, self.store / name)

        def load(model: nn.Module, path: str) -> float:
            model.load_state_dict(torch.load(path))
            return rates[Path(path).name]

        # per-sample gradients of a batch at once, as its documentation recommends where layers
        # allow, and so of the layers that are linear and convolutional
        trained = {
            type(m) for m in given.model.modules() if any(True for _ in m.parameters(recurse=False))
        }
        together = trained <= {nn.Linear, nn.Conv2d}
        options: dict[str, Any] = {
            "batch_size": 500,
            "checkpoints_load_func": load,
            **self._options,
        }
        files = [str(self.store / name) for name in rates]
        if self._kind is TracInCPFast:
            options |= {
                "final_fc_layer": list(given.model.children())[-1],
                "loss_fn": SumOfLosses(),
            }
        elif together:
            options |= {"sample_wise_grads_per_batch": True, "loss_fn": SumOfLosses()}
        else:
            options |= {"loss_fn": losses}
        self._found = self._kind(
            model=given.model,
            train_dataset=given.train,
            **{"checkpoint": files[-1]} if self._last else {"checkpoints": files},
            **options,
        )

    def score(self, tests: TensorDataset) -> Tensor:
        found: Tensor = self._found.influence(tests.tensors)
        return found.T


class SumOfLosses(nn.Module):
    """Of a batch. captum asks a loss what its reduction is."""

    reduction = "sum"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return losses(output, target).sum()


OFFERS = {
    "arnoldi": Offer(
        "ArnoldiInfluenceFunction, its defaults (rank 50 of 200)",
        lambda given, store: Captum(given, store, ArnoldiInfluenceFunction, last=True),
    ),
    "tracin": Offer("TracInCP, 5 checkpoints", lambda given, store: Captum(given, store, TracInCP)),
    "tracin-fast": Offer(
        "TracInCPFast (last layer), 5 checkpoints",
        lambda given, store: Captum(given, store, TracInCPFast),
    ),
}

if __name__ == "__main__":
    main(OFFERS, "captum")
