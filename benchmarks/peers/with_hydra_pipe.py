"""hydra-pipe: a `Recorder` in the same loop as the peers have, `reduce`, and `probe` for tests that
come later.
"""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import Hooks, Inputs, Method, NotOffered, Offer, losses, main
from torch import Tensor
from torch.utils.data import TensorDataset

import hydra_pipe

# `reduce` imports it when it is called; the imports of the peers are not counted either
import hydra_pipe.reduction.run
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.errors import RecordWarning


class Recorded(Hooks):
    """As it records by default; test gradients after each epoch where they are asked for."""

    def __init__(self, given: Inputs, run: Path, *, on_the_way: bool) -> None:
        self._given, self._run, self._on_the_way = given, run, on_the_way
        self._epoch = 0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        self.recorder = Recorder(self._given.model, optimizer, self._run, len(self._given.train))

    @contextlib.contextmanager
    def step(self, epoch: int, ids: list[int], rate: float) -> Any:
        if self._on_the_way and epoch > self._epoch:
            self._epoch = epoch
            self.record_test()
        with self.recorder.step(ids):
            yield

    def record_test(self) -> None:
        # the runner loads the trained weights anew, which are the same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecordWarning)
            self._record_test()

    def _record_test(self) -> None:
        self.recorder.record_test(self._given.batches(self._given.test, 50), losses)

    def end(self) -> None:
        """The recorder stays open until the test gradients are taken, which are no part of
        training.
        """


class Reduced(Method):
    """Args:
    method: of `reduce`.
    """

    def __init__(self, given: Inputs, store: Path, method: str) -> None:
        super().__init__(given, store)
        self._method, self._run = method, store / "run"
        self.hooks: Recorded = Recorded(given, self._run, on_the_way=method == "tracin")

    def score(self, tests: TensorDataset) -> Tensor:
        name = self._method
        if tests is self.given.test:
            self.hooks.record_test()
            self.hooks.recorder.close()
            hydra_pipe.reduce(self._run, method=self._method)
        elif self._method == "tracin":
            # a probe has no test gradients that were taken on the way
            raise NotOffered("not offered")
        else:
            hydra_pipe.probe(self._run, tests, name="later", model=self.given.model, loss=losses)
            hydra_pipe.reduce(self._run, method=self._method, probe="later")
            name += "-of-later"
        return torch.tensor(np.asarray(hydra_pipe.open_run(self._run).relevance(name)))


class Exact(Method):
    """`hydra-exact`, which trains again, and so needs a pipeline."""

    def __init__(self, given: Inputs, store: Path) -> None:
        super().__init__(given, store)
        self._run = store / "run"

    def _pipeline(self) -> Pipeline:
        given = self.given
        given.model.load_state_dict(given.start)
        optimizer = given.optimizer(given.model)
        rates = [rate / given.rates[0] for rate in given.rates]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rates[min(step, len(rates) - 1)]
        )
        settings = {
            name: given.settings[name] for name in ("batch_size", "epochs", "max_grad_norm")
        }
        return Pipeline(
            given.model, optimizer, losses, given.train, given.test, scheduler=scheduler, **settings
        )

    def prepare(self) -> None:
        hydra_pipe.record(self._pipeline(), self._run)

    def score(self, tests: TensorDataset) -> Tensor:
        name, options = "hydra-exact-rank-20", {}
        if tests is self.given.later:
            hydra_pipe.probe(self._run, tests, name="later", pipeline=self._pipeline())
            name, options = f"{name}-of-later", {"probe": "later", "dataset": tests}
        hydra_pipe.reduce(
            self._run, method="hydra-exact", rank=20, pipeline=self._pipeline(), **options
        )
        return torch.tensor(np.asarray(hydra_pipe.open_run(self._run).relevance(name)))


METHODS = ("hydra", "influence", "grad-dot", "grad-cos", "tracin", "hydra-fisher")
OFFERS = {
    name: Offer(f"`{name}`", lambda given, store, name=name: Reduced(given, store, name))
    for name in METHODS
}
OFFERS["hydra-exact"] = Offer("`hydra-exact --rank 20`, `hydra-fisher` included", Exact)

if __name__ == "__main__":
    main(OFFERS)
