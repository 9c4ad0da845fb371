"""From the passes of one step to its rows: what the hooks see, kept until the optimiser acts, then checked and encoded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_pipe.errors import HydraError, LayerError, RecordError
from hydra_pipe.maths.layers import Contribution, Factors, may_couple
from hydra_pipe.plan.layout import EncodingChoice, Parameter, choose_layout
from hydra_pipe.recording.capture import Capture
from hydra_pipe.recording.encoder import Given, Reduced, RowEncoder, describe
from hydra_pipe.recording.optimizers import OptimizerRule
from hydra_pipe.recording.slab import Slab


class Collector:
    """Collects the contributions of a step's passes and makes rows of them.

    Args:
        model: that is watched.
        optimizer: whose state a preconditioner is taken from.
        rule: of the optimiser.
        trained: name and parameter group of every recorded parameter, in the order of the blocks.
        choice, dim, seed: how the layout is chosen, after the first step has shown what there is.
        on_error: see `Capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: OptimizerRule,
        trained: Mapping[nn.Parameter, tuple[str, int]],
        choice: EncodingChoice,
        dim: int,
        seed: int,
        on_error: Callable[[HydraError], None] | None = None,
    ) -> None:
        self.parameters = list(trained)
        self.encoder: RowEncoder | None = None
        self._model, self._optimizer, self._rule = model, optimizer, rule
        self._described = [Parameter(name, tuple(p.shape), group) for p, (name, group) in trained.items()]
        self._choice, self._dim, self._seed = choice, dim, seed
        self._waiting: dict[int, list[Given]] = {}
        self._reduced: dict[int, list[Reduced]] = {}
        self._batch = 0
        self._capture = Capture(model, {p: i for i, p in enumerate(self.parameters)}, on_error)

    def watch(self, batch: int) -> None:
        """Forget what was collected; from now on collect passes over `batch` samples."""
        self._batch = batch
        self._waiting, self._reduced = {}, {}
        self._capture.watch(batch, self._collect)

    def rest(self) -> None:
        """Take no notice of the model until the next `watch`. What was collected stays."""
        self._capture.rest()

    def detach(self) -> None:
        """Remove the hooks for good."""
        self._capture.detach()

    def group_of(self, index: int) -> dict[str, Any]:
        """The optimiser's group of block `index`."""
        return self._optimizer.param_groups[self._described[index].group]

    def add_to(
        self,
        slab: Slab | None,
        gradients: Sequence[Tensor | None],
        columns: Mapping[str, NDArray[np.generic]],
        when: str,
        *,
        at_step: bool,
    ) -> Slab:
        """Put the rows of what was collected into `slab`, or into a new one.

        Args:
            slab: with room for them.
            gradients: whole gradient of each block, None where there is none.
            columns: further columns of each row, each of shape (batch,).
            when: the moment, in words such as "at step 3".
            at_step: the optimiser is about to use `gradients`, which may have been scaled; else they are a sum of unscaled losses'.

        Raises:
            RecordError: the passes did not cover the samples.
            LayerError: a factored block no longer has one position a sample.
        """
        if self._capture.n_covered != self._batch:
            raise RecordError(
                f"the passes {when} took {self._capture.n_covered} samples, sample_ids names {self._batch}: give the ids of "
                f"every sample of the step, in the order in which they go through the model"
            )
        with torch.no_grad():
            encoder = self.encoder = self.encoder or self._choose_encoding()
            slab = slab or Slab(encoder, self.parameters, self._batch, None if at_step else 1.0)
            self._reduce_waiting(encoder, gradients if at_step else None)
            slab.add(self._reduced, gradients, columns, when, half=self._capture.half_precision)
        self._reduced = {}
        return slab

    def check_split(self, losses: Tensor) -> None:
        """See `Recorder.check_split`."""
        if len(losses) < 2 or any(may_couple(module) for module in self._model.modules()):
            return
        mixed: set[int] = set()

        def look(index: int, contribution: Contribution, _: int) -> None:
            # of factors the norms, which are zero where either is: the other may be the layer's input
            others = contribution.norms()[1:] if isinstance(contribution, Factors) else contribution[1:]
            # not a number is told later, by sample: 0 times an infinite slope is one
            if bool((others.nan_to_num(0.0, 0.0, 0.0) != 0).any()):
                mixed.add(index)

        with self._capture.sending_to(look):
            trained = [p for p in self.parameters if p.requires_grad]
            torch.autograd.grad(losses[0], trained, retain_graph=True, allow_unused=True)
        if mixed:
            raise LayerError(
                f"the loss of one sample alone reaches other rows of {self._described[min(mixed)].name}: the model mixes the "
                f"samples of a batch there, or the first dimension of that module's output is not the sample"
            )

    def overflowed(self) -> bool:
        """Whether the hooks saw a gradient that is not finite, which makes a gradient scaler leave out optimizer.step()."""
        # what the hooks saw, not `.grad`, which the loop may have cleared by now
        collected = [g.value for given in self._waiting.values() for g in given]
        collected += [g.value for reduced in self._reduced.values() for g in reduced]
        seen = [value.norms() if isinstance(value, Factors) else value for value in collected]
        return not all(bool(torch.isfinite(values).all()) for values in seen)

    def _collect(self, index: int, contribution: Contribution, first: int) -> None:
        given = Given(contribution, first)
        # In the first step nothing is reduced: the layout is chosen from what the whole step shows. And a preconditioner is
        # known only when the step's gradient is complete.
        if self.encoder is None or self._rule.preconditioned:
            self._waiting.setdefault(index, []).append(given)
        else:
            self._reduced.setdefault(index, []).append(self.encoder.reduce(index, given))

    def _reduce_waiting(self, encoder: RowEncoder, gradients: Sequence[Tensor | None] | None) -> None:
        """Reduce what waits, preconditioned for the step that is about to use `gradients`, or as it stands now."""
        while self._waiting:
            index, given = self._waiting.popitem()  # one at a time, so that whole rows of one block only are in memory
            parameter = self.parameters[index]
            gradient = gradients[index] if gradients is not None else None
            root = self._rule.root(parameter, gradient, self._optimizer.state.get(parameter, {}), self.group_of(index))
            self._reduced[index] = [encoder.reduce(index, g, root) for g in given]

    def _choose_encoding(self) -> RowEncoder:
        # elementwise preconditioning leaves no outer product, so nothing to factor
        described = self._described if self._rule.preconditioned else describe(self._waiting, self._described)
        layout = choose_layout(described, self._choice, self._dim, self._seed)
        return RowEncoder(layout, preconditioned=self._rule.preconditioned)
