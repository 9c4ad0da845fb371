"""kronfluence: `prepare_model`, `Analyzer.fit_all_factors`, `compute_pairwise_scores`."""

from pathlib import Path
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from subject import Inputs, Method, Offer, losses, main
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Losses(Task):  # type: ignore[misc] # no stubs
    """The loss of training, and that of a test sample."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:  # the true Fisher, its default: of labels that the model itself would give
            with torch.no_grad():
                odds = torch.softmax(logits.detach(), dim=-1)
                y = torch.multinomial(odds.flatten(0, -2), 1).reshape(y.shape)
        return losses(logits, y).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class Kronfluence(Method):
    """Args:
    strategy: of the factors.
    damping: None: a tenth of the mean eigenvalue, as its documentation has it.
    """

    def __init__(
        self, given: Inputs, store: Path, strategy: str, damping: float | None = 1e-8
    ) -> None:
        super().__init__(given, store)
        self._strategy, self._damping, self._sets = strategy, damping, 0

    def prepare(self) -> None:
        model = prepare_model(self.given.model, Losses())
        self._analyzer = Analyzer(
            "peers", model, Losses(), cpu=True, disable_tqdm=True, output_dir=str(self.store)
        )
        arguments = FactorArguments(strategy=self._strategy)
        self._analyzer.fit_all_factors(
            "factors", self.given.train, per_device_batch_size=500, factor_args=arguments
        )

    def score(self, tests: TensorDataset) -> Tensor:
        self._sets += 1
        name = f"scores-{self._sets}"
        self._analyzer.compute_pairwise_scores(
            scores_name=name,
            factors_name="factors",
            query_dataset=tests,
            train_dataset=self.given.train,
            per_device_query_batch_size=len(tests),
            per_device_train_batch_size=500,
            score_args=ScoreArguments(damping_factor=self._damping),
        )
        found: Tensor = self._analyzer.load_pairwise_scores(name)["all_modules"]
        return found.T


OFFERS = {
    "ekfac": Offer(
        "EK-FAC, its defaults (damping 1e-8)",
        lambda given, store: Kronfluence(given, store, "ekfac"),
    ),
    "ekfac-heuristic": Offer(
        "EK-FAC, damping a tenth of the mean eigenvalue",
        lambda given, store: Kronfluence(given, store, "ekfac", None),
    ),
    "kfac": Offer(
        "K-FAC, damping a tenth of the mean eigenvalue",
        lambda given, store: Kronfluence(given, store, "kfac", None),
    ),
}

if __name__ == "__main__":
    main(OFFERS, "kronfluence")
