"""From the passes of one step to its rows: what the hooks see, kept until the optimiser acts, then checked and encoded."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_pipe.errors import RunError
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.per_sample.factors import Contribution, Factors, TokenRows, bounds_of, rows_of
from hydra_pipe.plan.choice import choose_recording
from hydra_pipe.plan.layout import EncodingChoice, Layout, Parameter
from hydra_pipe.recording.capture import Capture, SeenOutput, Watching
from hydra_pipe.recording.encoder import RowEncoder, describe, key_of_side_by_side, side_by_side
from hydra_pipe.recording.encodings import Given, Reduced
from hydra_pipe.recording.explanations import explain
from hydra_pipe.recording.portions import Mixture, Portion, check_covered
from hydra_pipe.recording.slab import Slab

# (number of a block, its gradient that the optimiser is about to use, lines of it) -> root of its preconditioner
# then; without a gradient as it stands now; without lines of the whole block
Root = Callable[[int, Tensor | None, Tensor | None], Tensor]

# Contributions of one parameter that are reduced together.
_MOST_HELD = 64


class Collector:
    """Collects the contributions of a step's passes and makes rows of them.

    Args:
        model: that is watched.
        root: of the preconditioner that rows are times; None: there is none.
        trained: name and parameter group of every recorded parameter, in the order of the blocks.
        choice, dim, seed, dtype: how the layout is chosen, after the first step has shown what there is.
        optimizer: that is about to use the gradients, for messages.
        watching: how the model is watched.
    """

    def __init__(
        self,
        model: nn.Module,
        root: Root | None,
        trained: Mapping[nn.Parameter, tuple[str, int]],
        choice: EncodingChoice,
        dim: int,
        seed: int,
        dtype: Dtype | None,
        optimizer: torch.optim.Optimizer | None = None,
        watching: Watching = Watching(),  # noqa: B008 - a value
    ) -> None:
        self.parameters = list(trained)
        self._smallest_first = sorted(self.parameters, key=Tensor.numel)
        self.encoder: RowEncoder | None = None
        self._model, self._root, self._optimizer = model, root, optimizer
        self._described = [Parameter(name, tuple(p.shape), group) for p, (name, group) in trained.items()]
        self._choice, self._dim, self._seed = choice, dim, seed
        #: of the stored rows; None as long as it is not chosen
        self.dtype = dtype
        self._waiting: dict[int, list[Given]] = {}
        self._reduced: dict[int, list[Reduced]] = {}
        # contributions of the present backward pass that wait for others of their key; a key is there from its first on
        self._held: dict[tuple[int, ...], list[Given]] = {}
        self._portions: list[Portion] = []
        # of the backward pass that the last contribution came from, and how many dropped steps were seen
        self._backward = -1
        self.n_dropped = 0
        # whether all that was collected are gradients that the loop has asked for itself, which need not be those of the step
        self._only_asked = True
        self._block_names = [name for name, _ in trained.values()]
        self._watching = watching
        self.attach()

    def watch(self, samples: NDArray[np.int64], *, tracked: bool = False) -> Portion:
        """Collect the passes over one more portion of the present step, after the earlier ones."""
        if self._portions and not self._portions[-1].live:
            self._portions.pop()  # nothing can come of it any more
        first = self._portions[-1].stop if self._portions else 0
        portion = Portion(samples, first, tracked)
        self._portions.append(portion)
        self._capture.watch(portion, self._collect)
        return portion

    @property
    def portions(self) -> Sequence[Portion]:
        """Those that take part in the present step: all that a gradient came from, or else the last."""
        return [p for p in self._portions if p.seen] or self._portions[-1:]

    @property
    def portion(self) -> Portion | None:
        """The batch that was named last in the present step; None: there is none."""
        return self._portions[-1] if self._portions else None

    def forget(self) -> None:
        """The step is over: forget what was collected, and take no notice of the model until the next `watch`."""
        self._portions, self._waiting, self._reduced, self._held, self._only_asked = [], {}, {}, {}, True
        self._capture.rest()
        self._capture.release()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let the block collect something else, then go on with the present step."""
        kept = self._portions, self._waiting, self._reduced, self._held, self._backward, self._only_asked
        self._portions, self._waiting, self._reduced, self._held, self._only_asked = [], {}, {}, {}, True
        try:
            with self._capture.set_aside():
                yield
        finally:
            self._portions, self._waiting, self._reduced, self._held, self._backward, self._only_asked = kept

    @property
    def n_waiting(self) -> int:
        """Portions whose gradients wait for the optimiser: none where the loop has cleared them, or a scaler will not use them."""
        waiting = sum(p.seen for p in self._portions)
        return 0 if waiting and (self._gradients_dropped() or self.overflowed()) else waiting

    def drop_seen(self) -> None:
        """Forget the portions that a gradient came from: the loop will not use it."""
        if any(p.seen for p in self._portions):
            self._drop()

    def rest(self) -> None:
        """Take no notice of the model until the next `watch`. What was collected stays."""
        self._capture.rest()

    def paused(self) -> AbstractContextManager[None]:
        """A block whose passes are none of the step's, be they forward or backward."""
        return self._capture.sending_to(None)

    def attach(self) -> None:
        """Hook the model, at first and after `detach`."""
        blocks = {p: i for i, p in enumerate(self.parameters)}
        self._capture = Capture(self._model, blocks, self._block_names, self._watching)

    def detach(self) -> None:
        """Remove the hooks."""
        self._capture.detach()

    @property
    def outputs(self) -> Sequence[SeenOutput]:
        """What the passes of the present step were at the model's output, in the places that their rows will have."""
        portions = self.portions
        seen = [o for o in self._capture.outputs if any(p.holds(o.first) for p in portions)]
        place = _places(portions)
        return seen if place is None else [replace(o, first=place(o.first)) for o in seen]

    def roots(self) -> list[NDArray[Any]] | None:
        """Root of the preconditioner of each block as it stands now, flattened; None: there is none."""
        if self._root is None:
            return None
        found = [self._root(index, None, None) for index in range(len(self.parameters))]
        return [root.detach().flatten().float().cpu().numpy() for root in found]

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
        portions = self.portions
        check_covered(portions, when)
        self._capture.check_passes(when)
        with torch.no_grad():
            encoder = self.encoder = self.encoder or self._choose_encoding()
            batch = sum(len(p.samples) for p in portions)
            why = partial(explain, self._model, self._optimizer)
            slab = slab or Slab(encoder, self.parameters, batch, None if at_step else 1.0, why)
            self._reduce_held()
            self._reduce_waiting(encoder, gradients if at_step else None)
            self._move_up(portions)
            mixture = Mixture.of(portions)
            slab.add(self._reduced, gradients, columns, when, half=self._capture.half_precision, mixture=mixture)
        self._reduced = {}
        return slab

    def resume(self, layout: Layout, dtype: Dtype) -> None:
        """Go on with the encoding and the dtype of an earlier recording. Raises: RunError: it is of other parameters."""
        for block, parameter in zip_longest(layout.blocks, self._described):
            was = (block.name, block.shape, block.group) if block else None
            now = (parameter.name, parameter.shape, parameter.group) if parameter else None
            if was != now:
                raise RunError(
                    f"the recording has {_in_words(was)} where the optimizer now has {_in_words(now)}: build the model and the "
                    f"optimizer as they were, or record from the beginning"
                )
        self.encoder, self.dtype = RowEncoder(layout, preconditioned=self._root is not None), dtype

    def left_out(self, *, begun: bool) -> bool:
        """Tell whether the loop, or a gradient scaler, left the present step out on purpose: gradients that are not
        finite, or cleared.

        Args:
            begun: whether a step was taken before. A loop that has taken none, and clears gradients of full precision, has
                forgotten optimizer.step().
        """
        if not any(p.seen for p in self._portions):
            return False
        return self.overflowed() or ((begun or self._capture.half_precision) and self._gradients_dropped())

    def overflowed(self) -> bool:
        """Tell whether a gradient is not finite, which makes a gradient scaler leave out optimizer.step().

        Hooks see what is lost from `.grad` where the loop has cleared it. `.grad` has what they do not see: a sum over the batch
        that overflowed in half precision, of finite shares; and what the hooks of another rank saw.
        """
        collected = all(bool(torch.isfinite(values).all()) for values in self._collected())
        return not collected or not all(bool(torch.isfinite(p.grad).all()) for p in self.parameters if p.grad is not None)

    def _collected(self) -> Iterator[Tensor]:
        """Values of everything that was collected, of factors their norms."""
        given = chain(*self._waiting.values(), *self._reduced.values(), *self._held.values())
        return (bounds_of(g.value) if isinstance(g.value, Factors | TokenRows) else rows_of(g.value) for g in given)

    def _collect(self, contributions: Mapping[int, Contribution], first: int, is_asked: bool) -> bool:
        backward = torch._C._current_graph_task_id()
        if is_asked != self._only_asked:
            if is_asked:
                return False  # what is added to `.grad` is the step's, and gradients beside it are the loop's own affair
            if self._waiting or self._reduced:
                self._drop()
            self._only_asked = False
        portion = self._portions[-1] if self._portions else None
        if portion is None or not portion.holds(first):
            portion = next((p for p in reversed(self._portions) if p.holds(first)), None)
        if portion is None:
            return False  # of a portion that was dropped: the books tell if its gradient is used after all
        # Hooks come before what they see is added to `.grad`. So where an earlier pass has left gradients to accumulate they are
        # there; where they are not, the loop has thrown them away. One pass adds nothing up before its end.
        is_new = backward != self._backward and not is_asked
        if is_new and any(p.seen for p in self._portions) and self._gradients_dropped():
            self._drop(but=portion)
        if backward != self._backward:
            self._reduce_held()
            if self.encoder is None and self._root is None and any(p.seen for p in self._portions if p is not portion):
                with torch.no_grad():
                    self.encoder = self._choose_encoding()
                    self._reduce_waiting(self.encoder, None)
        portion.seen = True
        self._backward = backward
        # Nothing of the first batch is reduced: the layout is chosen from what all of its passes show. And a preconditioner
        # is known only when the step's gradient is complete.
        encoder = None if self._root is not None else self.encoder
        for index, contribution in contributions.items():
            given = Given(contribution, first)
            if encoder is None:
                self._waiting.setdefault(index, []).append(given)
            else:
                self._reduce(encoder, index, given)
        return True

    def _reduce(self, encoder: RowEncoder, index: int, given: Given) -> None:
        """Reduce a contribution, or hold it until others of its backward pass can be reduced together with it.

        The first one of a parameter is reduced at once: most parameters have no other, and nothing of theirs is kept in memory.
        """
        key = None if encoder.encodings[index].is_factored else key_of_side_by_side(index, given)
        if key is None or key not in self._held:
            self._reduced.setdefault(index, []).append(encoder.encodings[index].reduce(given))
            if key is not None:
                self._held[key] = []
            return
        self._held[key].append(given)
        if len(self._held[key]) == _MOST_HELD:
            self._reduced[index].append(encoder.encodings[index].reduce(side_by_side(self._held[key])))
            self._held[key] = []

    def _reduce_held(self) -> None:
        """Reduce what is held: its backward pass is over."""
        for (index, *_), given in self._held.items():
            if given:
                assert self.encoder is not None
                self._reduced[index].append(self.encoder.encodings[index].reduce(side_by_side(given)))
        self._held = {}

    def _gradients_dropped(self) -> bool:
        """Whether the loop has cleared `.grad`, or a fresh one, of what was collected."""
        gradients = [p.grad for p in self._smallest_first if p.grad is not None]
        if any(bool(gradient.any()) for gradient in gradients):
            return False
        # a loss of zero leaves zeros, but leaves them: other ranks, which know by their own values, must not be alone with it
        return not gradients or any(bool((values != 0).any()) for values in self._collected())

    def _drop(self, but: Portion | None = None) -> None:
        self._portions = [p for p in self._portions if not p.seen or p is but]
        self._waiting, self._reduced, self._held = {}, {}, {}
        self._capture.coupling.forget_gradients()
        # the output's hook comes before all others: what is there may be of the pass that has found this out
        outputs = self._capture.outputs
        self._capture.outputs = [o for o in outputs if any(p.holds(o.first) for p in self._portions)]
        self.n_dropped += 1

    def _move_up(self, portions: Sequence[Portion]) -> None:
        """Move what was collected to where it is without the portions that do not take part."""
        place = _places(portions)
        if place is not None:
            self._reduced = {index: [replace(r, first=place(r.first)) for r in given] for index, given in self._reduced.items()}

    def _reduce_waiting(self, encoder: RowEncoder, gradients: Sequence[Tensor | None] | None) -> None:
        """Reduce what waits, preconditioned for the step that is about to use `gradients`, or as it stands now."""
        while self._waiting:
            index, given = self._waiting.popitem()  # one at a time, so that whole rows of one block only are in memory
            gradient = gradients[index] if gradients is not None else None
            lines = None
            if self._root is not None and encoder.encodings[index].takes_lines(given):
                lines = torch.unique(torch.cat([g.value.tokens.flatten() for g in given if isinstance(g.value, TokenRows)]))
            root = self._root(index, gradient, lines) if self._root is not None else None
            self._reduced[index] = [encoder.encodings[index].reduce(g, root, lines) for g in self._grouped(encoder, index, given)]

    @staticmethod
    def _grouped(encoder: RowEncoder, index: int, given: Sequence[Given]) -> list[Given]:
        """Contributions of one block, those side by side that may stand so."""
        if len(given) == 1 or encoder.encodings[index].is_factored:
            return list(given)
        groups: dict[Any, list[Given]] = {}
        for number, one in enumerate(given):
            groups.setdefault(key_of_side_by_side(index, one) or number, []).append(one)
        return [side_by_side(group[k : k + _MOST_HELD]) for group in groups.values() for k in range(0, len(group), _MOST_HELD)]

    def _choose_encoding(self) -> RowEncoder:
        # elementwise preconditioning leaves no outer product, so nothing to factor
        described = self._described if self._root is not None else describe(self._waiting, self._described)
        layout, self.dtype = choose_recording(described, self._choice, self._dim, self._seed, self.dtype)
        return RowEncoder(layout, preconditioned=self._root is not None)


def _places(portions: Sequence[Portion]) -> Callable[[int], int] | None:
    """From a place in the step as it was collected to that without the portions that do not take part; None: all are in place."""
    firsts = [p.first for p in portions]
    starts = [0, *accumulate(len(p.samples) for p in portions)]
    if firsts == starts[:-1]:
        return None

    def place(first: int) -> int:
        at = bisect_right(firsts, first) - 1
        return starts[at] + first - firsts[at]

    return place


def _in_words(parameter: tuple[str, tuple[int, ...], int] | None) -> str:
    return "nothing" if parameter is None else f"{parameter[0]} {parameter[1]} in group {parameter[2]}"
