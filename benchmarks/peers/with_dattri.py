"""dattri: attributors of `dattri.algorithm` on an `AttributionTask`; DVEmb, which records while
training.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from dattri import algorithm
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.task import AttributionTask
from subject import Hooks, Inputs, Method, Offer, State, losses, main
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def task(given: Inputs, states: list[State], *, single: bool = False) -> Any:
    """`single`: of samples without a dimension for the batch, as TracIn and TRAK take them."""

    def loss(params: Any, data: Any) -> Tensor:
        x, y = (part.unsqueeze(0) for part in data) if single else data
        return losses(torch.func.functional_call(given.model, params, (x,)), y).mean()

    return AttributionTask(
        loss_func=loss, model=given.model, checkpoints=states if len(states) > 1 else states[0]
    )


class Tracin(Method):
    """Args:
    columns: of the projection; None: none.
    """

    def __init__(self, given: Inputs, store: Path, columns: int | None) -> None:
        super().__init__(given, store)
        self._columns = columns

    def prepare(self) -> None:
        self._attributor = algorithm.TracInAttributor(
            task=task(self.given, self.given.states, single=True),
            weight_list=torch.tensor(self.given.interval_rates),
            normalized_grad=False,
            projector_kwargs={"proj_dim": self._columns, "device": "cpu"}
            if self._columns
            else None,
            device="cpu",
        )
        if self._columns is None:
            self._attributor.projector_kwargs = None  # without them the constructor takes its own

    def score(self, tests: TensorDataset) -> Tensor:
        given = self.given
        with torch.no_grad():
            return self._attributor.attribute(
                given.batches(given.train, 500), given.batches(tests, 200)
            )


class Influence(Method):
    """Args:
    kind: end of the class's name.
    size: of the batches; None: all samples at once, whose loss then is that of the whole training
    set.
    tests: at once; None: all.
    options: of the class.
    """

    def __init__(
        self,
        given: Inputs,
        store: Path,
        kind: str,
        *,
        size: int | None = None,
        tests: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(given, store)
        self._kind, self._size, self._tests, self._options = (
            kind,
            size or len(given.train),
            tests,
            options,
        )

    def prepare(self) -> None:
        kind = getattr(algorithm, f"IFAttributor{self._kind}")
        self._attributor = kind(
            task=task(self.given, self.given.states[-1:]), device="cpu", **self._options
        )
        self._attributor.cache(self.given.batches(self.given.train, self._size))

    def score(self, tests: TensorDataset) -> Tensor:
        given = self.given
        with torch.no_grad():
            return self._attributor.attribute(
                given.batches(given.train, len(given.train)),
                given.batches(tests, self._tests or len(tests)),
            )


class Trak(Method):
    """Args:
    checkpoints: the last so many.
    """

    def __init__(self, given: Inputs, store: Path, checkpoints: int) -> None:
        super().__init__(given, store)
        self._states = given.states[-checkpoints:]

    def prepare(self) -> None:
        given = self.given

        def log_probability(params: Any, data: Any) -> Tensor:
            x, y = (part.unsqueeze(0) for part in data)
            return -losses(torch.func.functional_call(given.model, params, (x,)), y).mean()

        def margin(params: Any, data: Any) -> Tensor:
            logp = log_probability(params, data)
            return logp - torch.log(1 - torch.exp(logp))

        def probability(params: Any, data: Any) -> Tensor:
            return torch.exp(log_probability(params, data))

        options: dict[str, Any] = {"device": "cpu"}
        if len(given.train) <= 512:
            options["proj_dim"] = (
                128  # with as many columns as samples its matrix is singular; 512 is its default
            )
        own = AttributionTask(loss_func=margin, model=given.model, checkpoints=self._states)
        self._attributor = algorithm.TRAKAttributor(
            task=own, correct_probability_func=probability, device="cpu", projector_kwargs=options
        )
        with torch.no_grad():
            self._attributor.cache(given.batches(given.train, len(given.train)))

    def score(self, tests: TensorDataset) -> Tensor:
        with torch.no_grad():
            return self._attributor.attribute(self.given.batches(tests, len(tests)))


def whole_loss(model: nn.Module, data: Any, device: Any) -> Tensor:
    """Of a batch, as DVEmb, LoGra and FactGraSS take it."""
    x, y = data
    return losses(model(x.to(device)), y.to(device)).mean()


class Projected(Method):
    """Args:
    kind: LoGra or FactGraSS.
    options: of the class.
    """

    def __init__(self, given: Inputs, store: Path, kind: str, **options: Any) -> None:
        super().__init__(given, store)
        self._kind, self._options = getattr(algorithm, f"{kind}Attributor"), options

    def prepare(self) -> None:
        given = self.given
        own = AttributionTask(loss_func=whole_loss, model=given.model, checkpoints=given.states[-1])
        self._attributor = self._kind(task=own, device="cpu", **self._options)
        self._attributor.cache(given.batches(given.train, 64))

    def score(self, tests: TensorDataset) -> Tensor:
        given = self.given
        return self._attributor.attribute(given.batches(given.train, 64), given.batches(tests, 50))


class Embedded(Hooks):
    """Gives each batch to `cache_gradients` before its step.

    Args:
        rates: that it is told, over those of training.
    """

    def __init__(self, given: Inputs, attributor: Any, rates: float) -> None:
        self._given, self._attributor, self._rates = given, attributor, rates

    @contextlib.contextmanager
    def step(self, epoch: int, ids: list[int], rate: float) -> Any:
        x, y = self._given.train.tensors
        self._attributor.cache_gradients(
            epoch, (x[ids], y[ids]), torch.tensor(ids), self._rates * rate
        )
        yield


class DVEmb(Method):
    """Args:
    form: of the factors, "elementwise" or "kronecker".
    rates: see `Embedded`.
    """

    def __init__(self, given: Inputs, store: Path, form: str, rates: float = 1.0) -> None:
        super().__init__(given, store)
        own = AttributionTask(loss_func=whole_loss, model=given.model, checkpoints=given.states[-1])
        self._attributor = DVEmbAttributor(task=own, proj_dim=4096, factorization_type=form)
        self.hooks = Embedded(given, self._attributor, rates)

    def prepare(self) -> None:
        self._attributor.cache()

    def score(self, tests: TensorDataset) -> Tensor:
        return self._attributor.attribute(self.given.batches(tests, 50))


def influence(title: str, kind: str, **options: Any) -> Offer:
    return Offer(title, lambda given, store: Influence(given, store, kind, **options))


OFFERS = {
    "tracin": Offer(
        "TracIn, 5 checkpoints, not projected", lambda given, store: Tracin(given, store, None)
    ),
    "tracin-512": Offer(
        "TracIn, 5 checkpoints, projected to 512", lambda given, store: Tracin(given, store, 512)
    ),
    "ekfac": influence("EK-FAC, damping 5e-3", "EKFAC", size=500, damping=5e-3),
    "arnoldi": influence(
        "influence, Arnoldi, 100 iterations, 5e-3", "Arnoldi", regularization=5e-3
    ),
    "datainf": influence("influence, DataInf, 1e-2", "DataInf", regularization=1e-2, tests=20),
    "trak": Offer("TRAK, last checkpoint", lambda given, store: Trak(given, store, 1)),
    "trak-5": Offer("TRAK, 5 checkpoints", lambda given, store: Trak(given, store, 5)),
    "dvemb": Offer(
        "DVEmb, elementwise, 4096", lambda given, store: DVEmb(given, store, "elementwise")
    ),
    "dvemb-momentum": Offer(
        "DVEmb, elementwise, 4096, rates over 1 - momentum",
        lambda g, store: DVEmb(g, store, "elementwise", g.lengthening),
    ),
    "dvemb-kronecker": Offer(
        "DVEmb, kronecker, 4096", lambda given, store: DVEmb(given, store, "kronecker")
    ),
    "logra": Offer(
        "LoGra, its defaults (4096)", lambda given, store: Projected(given, store, "LoGra")
    ),
    "logra-damped": Offer(
        "LoGra (4096), damping a tenth of the mean eigenvalue",
        lambda g, store: Projected(g, store, "LoGra", damping=0.1),
    ),
    "factgrass": Offer(
        "FactGraSS, its defaults (4096)", lambda given, store: Projected(given, store, "FactGraSS")
    ),
    "cg": influence("influence, CG, 10 iterations, 5e-3", "CG", regularization=5e-3, max_iter=10),
}

if __name__ == "__main__":
    main(OFFERS, "dattri")
