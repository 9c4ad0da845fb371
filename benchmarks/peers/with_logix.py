"""LogIX (package logix-ai): `LogIXScheduler` over the training samples, then
`compute_influence_all`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from logix import LogIX, LogIXScheduler
from logix.statistic import Log
from subject import Inputs, Method, Offer, losses, main
from torch import Tensor
from torch.utils.data import TensorDataset


class Logged(Method):
    """Args:
    hessian: "ekfac" or "raw".
    lora: "none", or "random" for LoGra.
    damping: None: a tenth of the mean eigenvalue.
    """

    def __init__(
        self,
        given: Inputs,
        store: Path,
        hessian: str,
        lora: str = "none",
        damping: float | None = None,
    ) -> None:
        super().__init__(given, store)
        self._hessian, self._lora, self._damping = hessian, lora, damping

    def _log(self, x: Tensor, y: Tensor, ids: Sequence[str]) -> None:
        with self._logix(data_id=ids):
            self.given.model.zero_grad()
            losses(self.given.model(x), y).sum().backward()

    def prepare(self) -> None:
        given = self.given
        os.chdir(self.store)  # it writes below the working directory
        self._logix = LogIX(project="peers")
        self._logix.watch(given.model)
        for _ in LogIXScheduler(self._logix, lora=self._lora, hessian=self._hessian, save="grad"):
            first = 0
            for x, y in given.batches(given.train, 100):
                self._log(x, y, [str(first + row) for row in range(len(x))])
                first += len(x)
        self._logix.finalize()

    def score(self, tests: TensorDataset) -> Tensor:
        self._logix.setup({"grad": [Log]})
        self._logix.eval()
        (x, y), n_train = tests.tensors, len(self.given.train)
        # all at once: each call of EK-FAC adds the damping to the eigenvalues that it keeps, once
        # more
        self._log(x, y, [f"test {row}" for row in range(len(x))])
        found = self._logix.compute_influence_all(
            self._logix.get_log(), self._logix.build_log_dataloader(), damping=self._damping
        )
        scores = torch.empty(n_train, len(tests))
        scores[[int(name) for name in found["tgt_ids"]]] = found["influence"].T
        return scores


OFFERS = {
    "ekfac": Offer(
        "EK-FAC, damping a tenth of the mean eigenvalue",
        lambda given, store: Logged(given, store, "ekfac"),
    ),
    "logra": Offer(
        "LoGra: random LoRA of rank 64, raw covariance",
        lambda given, store: Logged(given, store, "raw", "random"),
    ),
}

if __name__ == "__main__":
    main(OFFERS, "logix-ai")
