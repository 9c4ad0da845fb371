"""TRAK (package traker): `featurize`, `finalize_features`, `score`, `finalize_scores`, with the
projector that it has for a CPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import Inputs, Method, Offer, losses, main
from torch import Tensor
from torch.utils.data import TensorDataset
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput


class Passage(AbstractModelOutput):  # type: ignore[misc] # no stubs
    """Margin of a passage's mean log-probability; of pictures "image_classification" is what the
    package has.
    """

    def __init__(self) -> None:
        """There is nothing to keep; the base class has it abstract."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0))
        logp = -losses(logits, y.unsqueeze(0)).mean()
        return logp - torch.log(1 - torch.exp(logp))

    @staticmethod
    def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
        x, y = batch
        return (
            (1 - torch.exp(-losses(torch.func.functional_call(model, (weights, buffers), x), y)))
            .clone()
            .detach()[:, None]
        )


class Trak(Method):
    """Args:
    checkpoints: the last so many.
    columns: of the projection.
    """

    def __init__(
        self, given: Inputs, store: Path, checkpoints: int, columns: int | None = None
    ) -> None:
        super().__init__(given, store)
        self._states = given.states[-checkpoints:]
        # 2048 is its default; with as many columns as samples its matrix is singular
        self._columns = columns or (2048 if len(given.train) > 4096 else 128)
        self._size, self._sets = min(500, len(given.train)), 0

    def prepare(self) -> None:
        given = self.given
        pictures = given.train.tensors[1].ndim == 1
        self._traker = TRAKer(
            model=given.model,
            task="image_classification" if pictures else Passage(),
            train_set_size=len(given.train),
            save_dir=str(self.store),
            device="cpu",
            use_half_precision=False,
            proj_dim=self._columns,
        )
        for number, state in enumerate(self._states):
            self._traker.load_checkpoint(state, model_id=number)
            for batch in given.batches(given.train, self._size):
                self._traker.featurize(batch=batch, num_samples=len(batch[0]))
        self._traker.finalize_features()

    def score(self, tests: TensorDataset) -> Tensor:
        self._sets += 1
        name = f"tests-{self._sets}"
        for number, state in enumerate(self._states):
            self._traker.start_scoring_checkpoint(
                exp_name=name, checkpoint=state, model_id=number, num_targets=len(tests)
            )
            for batch in self.given.batches(tests, self._size):
                self._traker.score(batch=batch, num_samples=len(batch[0]))
        return torch.tensor(np.array(self._traker.finalize_scores(exp_name=name)))


OFFERS = {
    "trak": Offer("TRAK, last checkpoint", lambda given, store: Trak(given, store, 1)),
    "trak-5": Offer("TRAK, 5 checkpoints", lambda given, store: Trak(given, store, 5)),
    "trak-5-512": Offer(
        "TRAK, 5 checkpoints, a quarter of the columns",
        lambda g, s: Trak(g, s, 5, 512 if len(g.train) > 4096 else 32),
    ),
}

if __name__ == "__main__":
    main(OFFERS, "traker")
