"""Many models of one kind at once: their losses on the same batch, from stacked parameters.

torch.vmap takes a model's forward pass as it is and gives it a dimension more; autograd then finds the gradients of all of them in
one backward pass, for the sum of their losses has in each model's parameters the gradient of its own loss. Where torch cannot do so
(control flow that looks at values, say), they are taken one after the other, and it is said why.
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
    """What models make of a batch.

    Args:
        losses: shape (model, sample).
        hits: 1 where the largest output is the target, else 0; not a number where outputs or targets are not classes. Shape
            (model, sample).
        buffers: after the pass.
    """

    losses: Tensor
    hits: Tensor
    buffers: Values


class Models:
    """Runs a pipeline's model on stacked parameters.

    Args:
        pipeline: whose model and loss; the model itself stays as it is.
        progress: told why models are taken one by one.
        stacked: whether to try them all at once.
    """

    def __init__(self, pipeline: Pipeline, progress: Progress, *, stacked: bool = True) -> None:
        self._pipeline, self._progress, self.stacked = pipeline, progress, stacked

    def __call__(self, parameters: Values, buffers: Values, inputs: Tensor, targets: Tensor) -> Found:
        """Of a batch. Dropout and the like draw the same for all models, and what the one model of the run would draw.

        Args:
            parameters, buffers: by name, stacked: shape (model, ...).
            inputs, targets: the same for all models.

        Raises:
            UserCodeError: the model or the loss raised.
        """
        if self.stacked:
            before = self._generators()
            try:
                with warnings.catch_warnings():
                    # of an operation that torch takes model by model: nothing that a user could change
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    one = torch.vmap(self._one, in_dims=(0, 0, None, None), randomness="same")
                    return Found(*one(parameters, buffers, inputs, targets))
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                self._restore(before)
                self.stacked = False
                reason = str(error).strip().splitlines()[0]
                self._progress.say(
                    f"the models are trained one after the other, which takes longer: torch.vmap cannot stack them ({reason})"
                )
        with user_code("the model or the loss raised in a retraining"):
            return self._one_by_one(parameters, buffers, inputs, targets)

    def _one_by_one(self, parameters: Values, buffers: Values, inputs: Tensor, targets: Tensor) -> Found:
        before = self._generators()
        found = []
        for index in range(len(next(iter(parameters.values())))):
            self._restore(before)  # each draws what the first has drawn
            own, own_buffers = ({name: value[index] for name, value in values.items()} for values in (parameters, buffers))
            found.append(self._one(own, own_buffers, inputs, targets))
        losses, hits, after = zip(*found, strict=True)
        return Found(torch.stack(losses), torch.stack(hits), {name: torch.stack([b[name] for b in after]) for name in buffers})

    def _generators(self) -> list[Tensor]:
        """State of those that dropout draws from: on the CPU, and on the model's device."""
        device = next(self._pipeline.model.parameters()).device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], next(self._pipeline.model.parameters()).device)

    def _one(self, parameters: Values, buffers: Values, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Values]:
        # batch normalisation changes its buffers in place
        state = parameters | {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(self._pipeline.model, state, *arguments(inputs))
        losses = self._pipeline.loss(output, targets)
        return losses, _hits(output, targets, losses), {name: state[name] for name in buffers}


def _hits(output: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    is_class = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    if not is_class or targets.is_floating_point() or targets.dim() != 1:
        return torch.full_like(losses, float("nan"))
    return (output.argmax(1) == targets).to(losses.dtype)
