"""dattri-llm: `HookManager(...).collect()` around training, `attribute_from_cache` on what it has
stored.
"""

import contextlib
from pathlib import Path
from typing import Any

import dattri_llm
import torch
from dattri_llm import (
    REGISTER_ALL,
    AttributionArguments,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    OffloadCallback,
    OptimizerStateCallback,
)
from subject import Hooks, Inputs, Method, Offer, losses, main
from torch import Tensor
from torch.utils.data import TensorDataset


class Recorded(Hooks):
    """What is trained within `collect()`, one record a step; with the moments of Adam where they
    are asked for.
    """

    def __init__(self, given: Inputs, store: Path, *, moments: bool) -> None:
        self._given, self._store, self._with_moments = given, store, moments
        self._moments: Any = None

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        callbacks: list[Any] = [
            OffloadCallback(
                offload_interval=1, file_manager=GradientStorageManager(str(self._store))
            )
        ]
        if self._with_moments:
            self._moments = OptimizerStateCallback(self._given.model, lambda: optimizer)
            callbacks.append(self._moments)
        self._hooks = HookManager(
            self._given.model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=callbacks
        )
        self._collecting = self._hooks.collect()
        self._collecting.__enter__()
        self._step = -1

    @contextlib.contextmanager
    def step(self, epoch: int, ids: list[int], rate: float) -> Any:
        yield
        self._step += 1
        if self._moments is not None:
            self._moments.record_post(self._step)

    def end(self) -> None:
        self._collecting.__exit__(None, None, None)
        self._hooks.remove()

    def dynamics(self) -> Any:
        """Moments of Adam at each step."""
        return self._moments.dynamics()


class Attributor(Method):
    """Args:
    kind: name of the attributor.
    trajectory: score the gradients of training; if not, those at the final parameters.
    rates: that DVEmb is told, over those of training.
    options: of `attribute_from_cache`.
    """

    def __init__(
        self,
        given: Inputs,
        store: Path,
        kind: str,
        *,
        trajectory: bool = True,
        rates: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(given, store)
        self._kind, self._trajectory, self._rates, self._options = kind, trajectory, rates, options
        self._train, self._sets = store / "train", 0
        if trajectory:
            self.hooks = Recorded(given, self._train, moments=kind == "AdamWInfluence")

    def _at_the_end(self, data: TensorDataset, store: Path) -> None:
        """Gradients of each sample's own loss at the final parameters."""
        model = self.given.model
        offload = OffloadCallback(
            offload_interval=1, file_manager=GradientStorageManager(str(store))
        )
        hooks = HookManager(
            model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[offload]
        )
        with hooks.collect():
            for x, y in self.given.batches(data, 100):
                model.zero_grad()
                losses(model(x), y).sum().backward()
        hooks.remove()

    def prepare(self) -> None:
        if not self._trajectory:
            self._at_the_end(self.given.train, self._train)

    def score(self, tests: TensorDataset) -> Tensor:
        given, options = self.given, dict(self._options)
        self._sets += 1
        test, out = self.store / f"test-{self._sets}", self.store / f"scores-{self._sets}"
        self._at_the_end(tests, test)
        if self._kind == "DVEmb":
            options["learning_rate"] = {
                step: self._rates * rate for step, rate in enumerate(given.rates)
            }
        if self._kind == "AdamWInfluence":
            options["dynamics"] = self.hooks.dynamics()  # type: ignore[union-attr] # it is Recorded
        arguments = AttributionArguments(
            output_dir=str(out), use_cpu=True, dataloader_pin_memory=False
        )
        attributor = getattr(dattri_llm, f"{self._kind}Attributor")(arguments)
        _, matrix = attributor.attribute_from_cache(
            str(self._train), str(test), **options
        ).agnostic_matrix()
        return self._by_sample(matrix, tests)

    def _by_sample(self, matrix: Tensor, tests: TensorDataset) -> Tensor:
        """Rows in the order of the samples.

        It takes samples with the same content for one, and adds up what they score.
        """
        # rows are in the order in which samples were first met, and these two walk from the last
        # step to the first
        steps = (
            reversed(self.given.order)
            if self._kind in ("DVEmb", "AdamWInfluence")
            else self.given.order
        )
        met = (
            [i for ids in steps for i in ids] if self._trajectory else range(len(self.given.train))
        )
        contents = [x.numpy().tobytes() + y.numpy().tobytes() for x, y in self.given.train]
        rows = {content: row for row, content in enumerate(dict.fromkeys(contents[i] for i in met))}
        if matrix.shape != (len(rows), len(tests)):
            raise RuntimeError(f"scored {tuple(matrix.shape)}")
        shares = torch.tensor([contents.count(content) for content in contents])
        return matrix[[rows[content] for content in contents]] / shares[:, None]


def offer(title: str, kind: str, **options: Any) -> Offer:
    return Offer(title, lambda given, store: Attributor(given, store, kind, **options))


OFFERS = {
    "ekfac": offer("EK-FAC at the end, damping 1e-3 (its default)", "EKFAC", trajectory=False),
    "ekfac-relative": offer(
        "EK-FAC at the end, damping a tenth of the mean eigenvalue",
        "EKFAC",
        trajectory=False,
        damping=0.1,
        relative_damping=True,
    ),
    "tracin": offer("TracIn, every step", "TracIn"),
    "gradcos": offer("GradCos at the end", "TracIn", trajectory=False, normalized_grad=True),
    "dvemb": offer("DVEmb, every parameter", "DVEmb", propagation="test"),
    "dvemb-momentum": Offer(
        "DVEmb, every parameter, rates over 1 - momentum",
        lambda given, store: Attributor(
            given, store, "DVEmb", rates=given.lengthening, propagation="test"
        ),
    ),
    "adamw": offer("AdamW-influence, every parameter", "AdamWInfluence", propagation="test"),
}

if __name__ == "__main__":
    main(OFFERS, "dattri-llm")
