"""Losses of many models of one kind on the same batch, from stacked parameters.

torch.vmap adds a dimension to the forward pass of a model. Autograd then finds the gradients of
all models in one backward pass of the sum of their losses, because each model's parameters
affect only its own loss.

Some models cannot be stacked, such as those whose control flow looks at values. They are run one
after the other, and a message says why.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from hydra_pipe.progress import Progress
from hydra_pipe.recording.datasets import arguments
from hydra_pipe.recording.user_code import user_code
from hydra_pipe.training.pipeline import Pipeline

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """Outputs of the models for a batch.

    Args:
        losses: losses, shape (model, sample).
        hits: 1 if the largest output is the target, else 0, shape (model, sample). Not a number
            if outputs or targets are not classes.
        buffers: buffers after the pass, by name.
    """

    losses: Tensor
    hits: Tensor
    buffers: Values


class Models:
    """Runner of a pipeline's model on stacked parameters.

    Args:
        pipeline: pipeline with the model and the loss. The model itself stays unchanged.
        progress: place to say why models are run one by one.
        stacked: True to try all models at once.
    """

    def __init__(self, pipeline: Pipeline, progress: Progress, *, stacked: bool = True) -> None:
        self._pipeline, self._progress, self.stacked = pipeline, progress, stacked

    def __call__(
        self,
        parameters: Values,
        buffers: Values,
        inputs: Tensor,
        targets: Tensor,
        *,
        own_targets: bool = False,
    ) -> Found:
        """Run the models on a batch.

        Dropout and other random layers draw the same for all models, and the same as the one
        model of the run would draw.

        Args:
            parameters, buffers: stacked values by name, shape (model, ...).
            inputs: inputs of the batch, the same for all models.
            targets: targets of the batch, the same for all models. With `own_targets`: a stack of
                targets, shape (model, sample).
            own_targets: True if each model has targets of its own.

        Raises:
            UserCodeError: the model or the loss raised.
        """
        of_targets = 0 if own_targets else None
        if self.stacked:
            before = self._generators()
            try:
                with warnings.catch_warnings():
                    # The warning is about an operation that torch runs model by model, which the
                    # user cannot change.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    one = torch.vmap(self._one, in_dims=(0, 0, None, of_targets), randomness="same")
                    return Found(*one(parameters, buffers, inputs, targets))
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                self._restore(before)
                self.stacked = False
                reason = str(error).strip().splitlines()[0]
                self._progress.say(
                    "the models are trained one after the other, which takes longer: torch.vmap "
                    f"cannot stack them ({reason})"
                )
        with user_code("the model or the loss raised in a retraining"):
            return self._one_by_one(parameters, buffers, inputs, targets, own_targets)

    def _one_by_one(
        self,
        parameters: Values,
        buffers: Values,
        inputs: Tensor,
        targets: Tensor,
        own_targets: bool,
    ) -> Found:
        before = self._generators()
        found = []
        for index in range(len(next(iter(parameters.values())))):
            self._restore(before)  # each model draws what the first has drawn
            own, own_buffers = (
                {name: value[index] for name, value in values.items()}
                for values in (parameters, buffers)
            )
            wanted = targets[index] if own_targets else targets
            found.append(self._one(own, own_buffers, inputs, wanted))
        losses, hits, after = zip(*found, strict=True)
        return Found(
            torch.stack(losses),
            torch.stack(hits),
            {name: torch.stack([b[name] for b in after]) for name in buffers},
        )

    def _generators(self) -> list[Tensor]:
        """Return the generator states that dropout draws from: on the CPU, and on the device."""
        device = next(self._pipeline.model.parameters()).device
        return [
            torch.get_rng_state(),
            *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
        ]

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], next(self._pipeline.model.parameters()).device)

    def _one(
        self, parameters: Values, buffers: Values, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Values]:
        # Batch normalisation changes its buffers in place, so it gets copies.
        state = parameters | {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(self._pipeline.model, state, *arguments(inputs))
        losses = self._pipeline.loss(output, targets)
        return losses, _hits(output, targets, losses), {name: state[name] for name in buffers}


def _hits(output: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    is_class = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    if not is_class or targets.is_floating_point() or targets.dim() != 1:
        return torch.full_like(losses, float("nan"))
    return (output.argmax(1) == targets).to(losses.dtype)
