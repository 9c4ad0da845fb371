"""Checks for losses that mix samples, and for passes that nothing ties to the step's samples.

A row belongs to one sample if the loss is a sum of the samples' losses. The probes of
`hydra_pipe.recording.attribution` begin at the model's outputs, so they do not see the loss. The
loss is looked at just before a backward pass, when its graph is whole. The gradient at the output
of one sample must not change with the outputs of others: the second derivative of the loss between
the two outputs must be zero. One exception is allowed: a function of the sum of the samples'
losses, such as the root of a mean. In this case the second derivative is the gradient itself, times
one number. What has no second derivative shows in single entries within the loss
(`hydra_pipe.recording.loss_entries`).
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.recording.addresses import address_of
from hydra_pipe.recording.loss_entries import is_opaque, mixing_place, reached_directly
from hydra_pipe.recording.model_outputs import all_tensors_in
from hydra_pipe.recording.places import Origin, Pass
from hydra_pipe.recording.probes import origins_of

_LOG = logging.getLogger("hydra_pipe")

# Larger outputs (the logits of a language model) would take several times their memory again.
_MOST_ELEMENTS = 2**25
# Limit of the second derivative between two samples, relative to a sample's own second derivative.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Coupling:
    """Findings from the graph of a loss.

    Args:
        mixes: place of a sample whose gradient depends on the outputs of others; None if no such
            sample was found.
        tied: pairs of passes. The loss of one sample depends on its outputs in both passes.
    """

    mixes: int | None
    tied: Sequence[tuple[Pass, Pass]]


class BackwardWatch:
    """Watcher of the next call of torch.autograd.backward, which looks before the call runs.

    Args:
        look: function that gets the losses, and the gradient of each loss or None.
    """

    def __init__(self, look: Callable[[Sequence[Tensor], Sequence[Any]], None]) -> None:
        self.look = look
        self._usual: Callable[..., None] | None = None

    def begin(self) -> None:
        """Look at the next call."""
        if self._usual is None:
            self._usual = torch.autograd.backward
            torch.autograd.backward = self._backward

    def end(self) -> None:
        """Look at no call."""
        if self._usual is not None and torch.autograd.backward == self._backward:
            torch.autograd.backward = self._usual
            self._usual = None

    def _backward(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        usual = self._usual
        assert usual is not None
        self.end()
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = (
            [grad_tensors]
            if isinstance(grad_tensors, Tensor)
            else list(grad_tensors or [None] * len(losses))
        )
        self.look(losses, gradients)
        usual(tensors, grad_tensors, *args, **kwargs)


def coupling_of(
    losses: Sequence[Tensor],
    gradients: Sequence[Any],
    outputs: Sequence[tuple[Origin, Pass]],
    sample: int,
) -> Coupling | None:
    """Find out whether a loss couples the samples, or the passes, of its outputs.

    Args:
        losses: losses of the loop.
        gradients: gradient of each loss; None for a scalar loss.
        outputs: outputs that the losses may come from, with the places of their samples, and the
            pass of each output.
        sample: number of the sample to look at, in each pass.

    Returns:
        The findings. None if nothing can be found: the losses reach no output, or a loss has no
        second derivative and its entries do not mix samples.
    """
    values = [origin.output for origin, _ in outputs]
    terms = [
        loss.sum() if g is None else (loss * g).sum()
        for loss, g in zip(losses, gradients, strict=True)
        if loss.requires_grad
    ]
    if not terms or not values:
        return None
    mixes: int | None = None
    with torch.enable_grad():
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
    try:
        with torch.enable_grad():
            mixes = mixing_place(total, outputs)
            if mixes is None and is_opaque(total, outputs):
                _LOG.warning(
                    "one function makes the loss (compiled code, or a torch.autograd.Function): "
                    "whether it mixes the samples of the batch shows in its second derivative "
                    "only, if it has one. Rows are right if it is a sum over samples"
                )
            first = torch.autograd.grad(
                total, values, create_graph=True, retain_graph=True, allow_unused=True
            )
            used = [
                (origin, of_pass, g)
                for (origin, of_pass), g in zip(outputs, first, strict=True)
                if g is not None
            ]
            tied: list[tuple[Pass, Pass]] = []
            for number, (origin, of_pass, gradient) in enumerate(used):
                at = sample % of_pass.count
                own = origin.order.split(gradient, of_pass.count)[at]
                if not own.requires_grad:
                    continue
                direction = torch.randn(
                    own.shape, generator=torch.Generator().manual_seed(number)
                ).to(own)
                second = torch.autograd.grad(
                    (own * direction).sum(),
                    [o.output for o, *_ in used],
                    retain_graph=True,
                    allow_unused=True,
                )
                if _reaches_others(second, used, of_pass.first + at):
                    mixes = of_pass.first + at
                tied += [(of_pass, other) for other in _reached_passes(gradient, of_pass, used)]
    except (RuntimeError, NotImplementedError):  # the loss has no second derivative
        return None if mixes is None else Coupling(mixes, [])
    return Coupling(mixes, tied)


def _reached_passes(
    gradient: Tensor, of_pass: Pass, used: Sequence[tuple[Origin, Pass, Tensor]]
) -> list[Pass]:
    """Find the other passes on whose outputs the gradient at the output of `of_pass` depends.

    All samples are tested at once, because a hinge leaves some of them without a loss.
    """
    others = [(origin.output, other) for origin, other, _ in used if other is not of_pass]
    if not others:
        return []
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient)
    second = torch.autograd.grad(
        (gradient * direction).sum(), [x for x, _ in others], retain_graph=True, allow_unused=True
    )
    return [
        other
        for (_, other), h in zip(others, second, strict=True)
        if h is not None and bool(h.any())
    ]


def _reaches_others(
    second: Sequence[Tensor | None], used: Sequence[tuple[Origin, Pass, Tensor]], place: int
) -> bool:
    """Tell whether second derivatives show a loss that mixes a sample with others.

    Args:
        second: derivative of the sample's gradient in each output; None if there is none.
        used: each output with the places of its samples, its pass, and the gradient at the output.
        place: place of the sample in the step.
    """
    others, gradients, own = [], [], 0.0
    # a sample that is named twice, as for two views of it, may meet itself
    sample = next(p.samples[place - p.first] for _, p, _ in used if 0 <= place - p.first < p.count)
    for (origin, of_pass, gradient), h in zip(used, second, strict=True):
        if h is None:
            continue
        by_sample = origin.order.split(h.detach(), of_pass.count).flatten(1).double()
        of_gradient = origin.order.split(gradient.detach(), of_pass.count).flatten(1).double()
        is_other = torch.from_numpy(of_pass.samples != sample)
        if not bool(is_other.all()):
            own = max(own, float(torch.linalg.vector_norm(by_sample[~is_other])))
        others.append(by_sample[is_other].flatten())
        gradients.append(of_gradient[is_other].flatten())
    if not others:
        return False
    between, gradient = torch.cat(others), torch.cat(gradients)
    size = float(torch.linalg.vector_norm(between))
    if size <= _TOLERANCE * own or size == 0.0:
        return False
    factor = float(between @ gradient) / max(
        float(gradient @ gradient), torch.finfo(torch.float64).tiny
    )
    return float(torch.linalg.vector_norm(between - factor * gradient)) > 1e-2 * size


def _origins_in(output: Any, batch: int) -> list[Origin]:
    """Return the places of the samples in the result of a pass, as far as memory allows a look.

    The first output with samples counts. Of the others, which may be states of layers, those count
    that have one entry a sample.
    """
    with_history = [x for x in all_tensors_in(output) if x.requires_grad]
    found: list[Origin] = []
    left = _MOST_ELEMENTS
    for origin in origins_of(with_history, batch):
        tensor = origin.output
        left -= tensor.numel()
        if left >= 0 and (not found or len(tensor) == batch):
            found.append(origin)
    return found


def same_inputs(one: Pass, other: Pass) -> bool:
    """Tell whether two passes were given the same tensor."""
    ours = [x for reference in one.inputs if (x := reference()) is not None]
    theirs = [x for reference in other.inputs if (x := reference()) is not None]
    return any(
        address_of(a) == address_of(b) and a.shape == b.shape and a.numel() > 0
        for a in ours
        for b in theirs
    )


def references(tensors: Sequence[Tensor]) -> list["weakref.ref[Tensor]"]:
    """Return weak references to `tensors`, which do not keep them alive."""
    return [weakref.ref(x) for x in tensors]


class LossCoupling:
    """Check that the loop's losses give each sample its own row.

    Args:
        quiet: function that makes a block in which gradients are not recorded.
        allows_mixing: True if a loss may mix samples. A row is then the share of the loss's
            gradient that goes through the sample's outputs.
        looks: True if the check may walk through the graph of the loss.
    """

    def __init__(
        self,
        quiet: Callable[[], AbstractContextManager[None]],
        *,
        allows_mixing: bool,
        looks: bool = True,
    ) -> None:
        self._quiet, self._allows_mixing, self._looks = quiet, allows_mixing, looks
        self.watch = BackwardWatch(self._look)
        # passes of the step, and outputs of the passes whose backward pass is still to come
        self._passes: list[Pass] = []
        self._outputs: list[tuple[Any, Pass]] = []
        self._tied: set[tuple[int, int]] = set()
        self._is_known = False

    def add(self, of_pass: Pass, output: Any, *, is_due: bool) -> None:
        """Note a pass of the whole model that has ended.

        Args:
            of_pass: the pass.
            output: result of the pass.
            is_due: True if the loss of the pass is to be looked at.
        """
        passes = self._passes
        repeats = bool(passes) and any(
            p.first == of_pass.first and p.count == of_pass.count for p in passes
        )
        passes.append(of_pass)
        self._outputs.append((output, of_pass))
        if self._looks and (is_due or (repeats and not self._is_known)):
            self.watch.begin()

    def after_backward(self) -> None:
        """Release the outputs, whose graph is gone."""
        self._outputs = []

    def forget_gradients(self) -> None:
        """Note that the loop has thrown away the gradients of all passes so far."""
        for of_pass in self._passes:
            of_pass.has_gradient = False

    def release(self) -> None:
        """Forget all passes, as the step is over."""
        self.watch.end()
        self._passes, self._outputs, self._tied = [], [], set()

    def check_repeats(self, same_targets: Callable[[Pass, Pass], bool], when: str) -> None:
        """Refuse several passes over the same places of a step if nothing ties their samples.

        Args:
            same_targets: function that tells whether two passes had the same targets.
            when: the moment, in words such as "at step 3".

        Raises:
            LayerError: nothing shows that two passes are of the same samples.
        """
        if self._is_known or len(self._passes) < 2:
            return
        counted = [p for p in self._passes if p.has_gradient]
        for number, one in enumerate(counted):
            for other in counted[number + 1 :]:
                if (one.first, one.count) != (other.first, other.count):
                    continue
                tied = (
                    id(other) in self._tied_to(one)
                    or same_inputs(one, other)
                    or same_targets(one, other)
                )
                if not tied and not self._allows_mixing:
                    raise LayerError(
                        f"{when} the model was called twice with {one.count} samples, and nothing "
                        "shows that both calls have the same samples (a second batch, such as "
                        "unlabelled or generated samples, has samples of its own): name the "
                        "samples of both calls, one after the other, as in "
                        "recorder.step(torch.cat([ids, ids_of_the_second_call]))"
                    )
                self._is_known = True

    def _tied_to(self, one: Pass) -> set[int]:
        """Return the ids of all passes that a chain of ties connects with `one`.

        The positive and the negative of a triplet are both tied to the anchor, for example.
        """
        found, waiting = {id(one)}, [id(one)]
        while waiting:
            at = waiting.pop()
            further = {other for first, other in self._tied if first == at} - found
            found |= further
            waiting += further
        return found

    def _look(self, losses: Sequence[Tensor], gradients: Sequence[Any]) -> None:
        by_pass = [
            [(origin, of_pass) for origin in _origins_in(output, of_pass.count)]
            for output, of_pass in self._outputs
        ]
        firsts = [of_one[0] for of_one in by_pass if of_one]
        if not firsts:
            return
        direct = reached_directly(losses, list(chain(*by_pass)))
        others = [one for one in direct if one not in firsts]
        sample = firsts[0][1].count // 2
        with self._quiet():
            found = coupling_of(losses, gradients, [*firsts, *others], sample)
            if found is None and others:
                # they may lead through parts of the model that have no second derivative
                found = coupling_of(losses, gradients, firsts, sample)
        if found is None:
            return
        self._tied |= {
            pair
            for one, other in found.tied
            for pair in ((id(one), id(other)), (id(other), id(one)))
        }
        if found.mixes is not None and not self._allows_mixing:
            raise LayerError(
                "the loss of one sample depends on the outputs of others (in-batch negatives, or "
                "another contrastive or batch-wide loss): no row would be a sample's own. Take a "
                "loss that is a sum over samples, name a sample twice if both views of it are in "
                "the batch, or give Recorder(..., allow_mixed_loss=True): a row is then the share "
                "of the batch's gradient that goes through the sample's own outputs"
            )


def same_targets(outputs: Sequence[Any], one: Pass, other: Pass) -> bool:
    """Tell whether the gradients at the outputs of two passes come from the same targets.

    Only gradients of cross-entropy show their targets.

    Args:
        outputs: `SeenOutput` of each backward pass, in the order of the passes.
        one, other: two passes over the same places.
    """
    seen = [
        o.gradient
        for o in outputs
        if o.first == one.first and o.gradient.dim() == 2 and len(o.gradient) == one.count
    ]
    if len(seen) < 2:
        return False
    targets = []
    for gradient in seen:
        size = gradient.abs().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        if bool((gradient.sum(1).abs() > 1e-3 * size).any()) or bool(
            ((gradient < 0).sum(1) > 1).any()
        ):
            return False
        targets.append(gradient.argmin(1))
    return len(targets[0].unique()) > 1 and all(bool((t == targets[0]).all()) for t in targets)
