"""Rows of one step from its passes.

The hooks' contributions are kept until the optimiser acts. Then they are checked and encoded.
"""

import weakref
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
from hydra_pipe.plan.dtype_choice import choose_recording
from hydra_pipe.plan.layout import EncodingChoice, Layout, Parameter
from hydra_pipe.recording.capture import Capture, Watching
from hydra_pipe.recording.encoder import RowEncoder, describe, key_of_side_by_side, side_by_side
from hydra_pipe.recording.encodings import Given, Reduced
from hydra_pipe.recording.explanations import explain
from hydra_pipe.recording.micro_batches import MicroBatch, Mixture, check_covered
from hydra_pipe.recording.precision import full_precision
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.recording.seen_outputs import SeenOutput

# Contributions of one parameter that are reduced together.
_MOST_HELD = 64


class Collector:
    """Collector of the contributions of a step's passes, which makes rows of them.

    Args:
        model: the watched model.
        trained: name and parameter group of every recorded parameter, in the order of the blocks.
        choice, dim, seed, dtype: settings for the choice of the layout. The layout is chosen from
            the contributions of the first step.
        optimizer: the optimiser that will use the gradients, for messages.
        watching: settings for watching the model.
        preconditioned: True if rows will be multiplied by an elementwise preconditioner when they
            are reduced.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[nn.Parameter, tuple[str, int]],
        choice: EncodingChoice,
        dim: int,
        seed: int,
        dtype: Dtype | None,
        optimizer: torch.optim.Optimizer | None = None,
        watching: Watching = Watching(),  # noqa: B008 - a value
        *,
        preconditioned: bool = False,
    ) -> None:
        self.parameters = list(trained)
        self._smallest_first = sorted(self.parameters, key=Tensor.numel)
        self.encoder: RowEncoder | None = None
        self._model, self._optimizer = model, optimizer
        self._described = [
            Parameter(name, tuple(p.shape), group) for p, (name, group) in trained.items()
        ]
        self._choice, self._dim, self._seed = choice, dim, seed
        self._preconditioned = preconditioned
        #: dtype of the stored rows; None until it is chosen
        self.dtype = dtype
        self._waiting: dict[int, list[Given]] = {}
        self._reduced: dict[int, list[Reduced]] = {}
        # contributions of the present backward pass that wait for others of the same key; the first
        # contribution of a key enters the key
        self._held: dict[tuple[int, ...], list[Given]] = {}
        self._micro_batches: list[MicroBatch] = []
        # id of the backward pass of the last contribution, and number of dropped steps
        self._backward = -1
        self.n_dropped = 0
        # a gradient after the last backward pass, and its version counter
        self._noted: tuple[weakref.ref[Tensor], int] | None = None
        # whether all contributions so far are of gradients that the loop has asked for itself;
        # these need not be the gradients of the step
        self._only_asked = True
        self._block_names = [name for name, _ in trained.values()]
        self._watching = watching
        self.attach()

    def watch(self, samples: NDArray[np.int64], *, tracked: bool = False) -> MicroBatch:
        """Collect the passes over one more micro-batch of the present step.

        Args:
            samples: ids of the samples, shape (batch,), int64.
            tracked: True if a tracked loader handed the micro-batch over.

        Returns:
            The new micro-batch. Its places follow those of the earlier micro-batches.
        """
        if self._micro_batches and not self._micro_batches[-1].live:
            self._micro_batches.pop()  # the model was not called with it, so no gradient can follow
        first = self._micro_batches[-1].stop if self._micro_batches else 0
        micro_batch = MicroBatch(samples, first, tracked)
        self._micro_batches.append(micro_batch)
        self._capture.watch(micro_batch, self._collect)
        return micro_batch

    @property
    def micro_batches(self) -> Sequence[MicroBatch]:
        """Micro-batches that count in the present step: all with a gradient, or else the last."""
        return [p for p in self._micro_batches if p.seen] or self._micro_batches[-1:]

    @property
    def micro_batch(self) -> MicroBatch | None:
        """The last named micro-batch of the present step; None if there is none."""
        return self._micro_batches[-1] if self._micro_batches else None

    def forget(self) -> None:
        """Forget all contributions of the step, and ignore the model until the next `watch`."""
        self._micro_batches, self._waiting, self._reduced, self._held, self._only_asked = (
            [],
            {},
            {},
            {},
            True,
        )
        self._capture.pause()
        self._capture.release()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Collect something else while the block runs, then return to the present step."""
        kept = (
            self._micro_batches,
            self._waiting,
            self._reduced,
            self._held,
            self._backward,
            self._only_asked,
        )
        self._micro_batches, self._waiting, self._reduced, self._held, self._only_asked = (
            [],
            {},
            {},
            {},
            True,
        )
        try:
            with self._capture.set_aside():
                yield
        finally:
            (
                self._micro_batches,
                self._waiting,
                self._reduced,
                self._held,
                self._backward,
                self._only_asked,
            ) = kept

    @property
    def n_waiting(self) -> int:
        """Number of micro-batches whose gradients wait for the optimiser.

        The number is 0 if the loop has cleared the gradients, or a scaler will not use them.
        """
        waiting = sum(p.seen for p in self._micro_batches)
        return 0 if waiting and (self._gradients_dropped() or self.overflowed()) else waiting

    def drop_seen(self) -> None:
        """Forget the micro-batches that have a gradient: the loop will not use the gradient."""
        if any(p.seen for p in self._micro_batches):
            self._drop()

    def pause(self) -> None:
        """Ignore the model until the next `watch`. Contributions so far stay."""
        self._capture.pause()

    def paused(self) -> AbstractContextManager[None]:
        """Return a block whose passes, forward and backward, are not part of the step."""
        return self._capture.sending_to(None)

    def attach(self) -> None:
        """Hook the model, at the beginning and after `detach`."""
        blocks = {p: i for i, p in enumerate(self.parameters)}
        self._capture = Capture(self._model, blocks, self._block_names, self._watching)
        self._capture.on_backward_end = self._note_gradient

    def detach(self) -> None:
        """Remove the hooks."""
        self._capture.detach()

    @property
    def outputs(self) -> Sequence[SeenOutput]:
        """Outputs and gradients of the present step's passes, at the places of their rows."""
        micro_batches = self.micro_batches
        seen = [o for o in self._capture.outputs if any(p.holds(o.first) for p in micro_batches)]
        place = _places(micro_batches)
        return seen if place is None else [replace(o, first=place(o.first)) for o in seen]

    def add_to(
        self,
        buffer: RowBuffer | None,
        gradients: Sequence[Tensor | None],
        columns: Mapping[str, NDArray[np.generic]],
        when: str,
        *,
        at_step: bool,
    ) -> RowBuffer:
        """Put the rows of the contributions into `buffer`, or into a new row buffer.

        Args:
            buffer: row buffer with room for the rows; None for a new row buffer.
            gradients: whole gradient of each block; None for a block without a gradient.
            columns: further columns of each row, each of shape (batch,).
            when: the moment, in words such as "at step 3".
            at_step: True if the optimiser is about to use `gradients`, which may have been scaled.
                Otherwise `gradients` are gradients of a sum of unscaled losses.

        Returns:
            The row buffer with the rows.

        Raises:
            RecordError: the passes did not cover the samples.
            LayerError: a factored block no longer has one position a sample.
        """
        micro_batches = self.micro_batches
        check_covered(micro_batches, when)
        self._capture.check_passes(when)
        with torch.no_grad(), full_precision(self.parameters[0]):
            encoder = self.encoder = self.encoder or self._choose_encoding()
            batch = sum(len(p.samples) for p in micro_batches)
            why = partial(explain, self._model, self._optimizer)
            buffer = buffer or RowBuffer(
                encoder, self.parameters, batch, None if at_step else 1.0, why
            )
            self._reduce_held()
            self._reduce_waiting(encoder)
            self._move_up(micro_batches)
            mixture = Mixture.of(micro_batches)
            buffer.add(
                self._reduced,
                gradients,
                columns,
                when,
                half=self._capture.half_precision,
                mixture=mixture,
            )
        self._reduced = {}
        return buffer

    def resume(self, layout: Layout, dtype: Dtype) -> None:
        """Resume with the encoding and the dtype of an earlier recording.

        Raises:
            RunError: the earlier recording has other parameters.
        """
        for block, parameter in zip_longest(layout.blocks, self._described):
            was = (block.name, block.shape, block.group) if block else None
            now = (parameter.name, parameter.shape, parameter.group) if parameter else None
            if was != now:
                raise RunError(
                    f"the recording has {_in_words(was)} where the optimizer now has "
                    f"{_in_words(now)}: build the model and the "
                    f"optimizer as they were, or record from the beginning"
                )
        self.encoder, self.dtype = RowEncoder(layout), dtype

    def left_out(self, *, begun: bool) -> bool:
        """Tell whether the loop, or a gradient scaler, left the present step out on purpose.

        The step was left out on purpose if its gradients are not finite, or were cleared.

        Args:
            begun: True if a step was taken before. If a loop has taken no step and clears gradients
                of full precision, it has forgotten optimizer.step().
        """
        if not any(p.seen for p in self._micro_batches):
            return False
        return self.overflowed() or (
            (begun or self._capture.half_precision) and self._gradients_dropped()
        )

    def overflowed(self) -> bool:
        """Tell whether a gradient is not finite.

        A gradient scaler leaves out optimizer.step() in this case.

        Both the contributions and `.grad` are looked at. The loop may have cleared `.grad`. And
        `.grad` has values that the hooks do not see: a sum over the batch that overflowed in half
        precision although its terms are finite, and gradients of other ranks.
        """
        collected = all(bool(torch.isfinite(values).all()) for values in self._collected())
        return not collected or not all(
            bool(torch.isfinite(p.grad).all()) for p in self.parameters if p.grad is not None
        )

    def _collected(self) -> Iterator[Tensor]:
        """Yield the values of each contribution; norms in place of factors."""
        given = chain(*self._waiting.values(), *self._reduced.values(), *self._held.values())
        return (
            bounds_of(g.value) if isinstance(g.value, Factors | TokenRows) else rows_of(g.value)
            for g in given
        )

    def _collect(
        self, contributions: Mapping[int, Contribution], first: int, is_asked: bool
    ) -> bool:
        backward = torch._C._current_graph_task_id()
        if is_asked != self._only_asked:
            if is_asked:
                # the step's gradients are added to `.grad`; the loop uses others for itself
                return False
            if self._waiting or self._reduced:
                self._drop()
            self._only_asked = False
        micro_batch = self._micro_batches[-1] if self._micro_batches else None
        if micro_batch is None or not micro_batch.holds(first):
            micro_batch = next((p for p in reversed(self._micro_batches) if p.holds(first)), None)
        if micro_batch is None:
            # the micro-batch was dropped; if its gradient is used after all, the books tell
            return False
        # A hook runs before its gradient is added to `.grad`. So if an earlier pass has left
        # gradients to accumulate, they are in `.grad` now. If they are not, the loop has thrown
        # them away. A single pass adds nothing to `.grad` before its end.
        is_new = backward != self._backward and not is_asked
        if is_new and any(p.seen for p in self._micro_batches) and self._gradients_dropped():
            self._drop(but=micro_batch)
        if backward != self._backward:
            self._reduce_held()
            if self.encoder is None and any(
                p.seen for p in self._micro_batches if p is not micro_batch
            ):
                with torch.no_grad():
                    self.encoder = self._choose_encoding()
                    self._reduce_waiting(self.encoder)
        micro_batch.seen = True
        self._backward = backward
        # Contributions of the first batch are not reduced yet: the layout is chosen from all of its
        # passes.
        encoder = self.encoder
        for index, contribution in contributions.items():
            given = Given(contribution, first)
            if encoder is None:
                self._waiting.setdefault(index, []).append(given)
            else:
                self._reduce(encoder, index, given)
        return True

    def _reduce(self, encoder: RowEncoder, index: int, given: Given) -> None:
        """Reduce a contribution, or hold it to reduce it with others of its backward pass.

        The first contribution of a parameter is reduced at once. Most parameters have only one, so
        that most contributions are not kept in memory.
        """
        key = None if encoder.encodings[index].is_factored else key_of_side_by_side(index, given)
        if key is None or key not in self._held:
            self._reduced.setdefault(index, []).append(encoder.encodings[index].reduce(given))
            if key is not None:
                self._held[key] = []
            return
        self._held[key].append(given)
        if len(self._held[key]) == _MOST_HELD:
            self._reduced[index].append(
                encoder.encodings[index].reduce(side_by_side(self._held[key]))
            )
            self._held[key] = []

    def _reduce_held(self) -> None:
        """Reduce the held contributions, as their backward pass is over."""
        for (index, *_), given in self._held.items():
            if given:
                assert self.encoder is not None
                self._reduced[index].append(
                    self.encoder.encodings[index].reduce(side_by_side(given))
                )
        self._held = {}

    def _note_gradient(self) -> None:
        """Note a gradient, to see later without its values that the loop has not touched it."""
        gradient = next((p.grad for p in self._smallest_first if p.grad is not None), None)
        self._noted = None if gradient is None else (weakref.ref(gradient), gradient._version)

    def _gradients_dropped(self) -> bool:
        """Tell whether the loop has cleared or replaced the `.grad` of the contributions."""
        if self._noted is not None:
            gradient, version = self._noted[0](), self._noted[1]
            if (
                gradient is not None
                and gradient._version == version
                and any(p.grad is gradient for p in self._smallest_first)
            ):
                return False
        gradients = [p.grad for p in self._smallest_first if p.grad is not None]
        if any(bool(gradient.any()) for gradient in gradients):
            return False
        # A loss of zero leaves a `.grad` of zeros, which was not cleared. Other ranks decide by
        # their own values, so this rank must not call its zeros dropped.
        return not gradients or any(bool((values != 0).any()) for values in self._collected())

    def _drop(self, but: MicroBatch | None = None) -> None:
        self._micro_batches = [p for p in self._micro_batches if not p.seen or p is but]
        self._waiting, self._reduced, self._held = {}, {}, {}
        self._capture.coupling.forget_gradients()
        # The output's hook runs before all others. So an output may already belong to the pass that
        # has found the gradients dropped: that output stays.
        outputs = self._capture.outputs
        self._capture.outputs = [
            o for o in outputs if any(p.holds(o.first) for p in self._micro_batches)
        ]
        self.n_dropped += 1

    def _move_up(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Move the contributions to their places among the micro-batches that count."""
        place = _places(micro_batches)
        if place is not None:
            self._reduced = {
                index: [replace(r, first=place(r.first)) for r in given]
                for index, given in self._reduced.items()
            }

    def _reduce_waiting(self, encoder: RowEncoder) -> None:
        """Reduce the contributions that have waited for the encoder."""
        while self._waiting:
            # one block at a time, so that memory holds whole rows of one block only
            index, given = self._waiting.popitem()
            self._reduced[index] = [
                encoder.encodings[index].reduce(g) for g in self._grouped(encoder, index, given)
            ]

    @staticmethod
    def _grouped(encoder: RowEncoder, index: int, given: Sequence[Given]) -> list[Given]:
        """Return the contributions of one block, with contributions of one key side by side."""
        if len(given) == 1 or encoder.encodings[index].is_factored:
            return list(given)
        groups: dict[Any, list[Given]] = {}
        for number, one in enumerate(given):
            groups.setdefault(key_of_side_by_side(index, one) or number, []).append(one)
        return [
            side_by_side(group[k : k + _MOST_HELD])
            for group in groups.values()
            for k in range(0, len(group), _MOST_HELD)
        ]

    def _choose_encoding(self) -> RowEncoder:
        described = describe(self._waiting, self._described)
        layout, self.dtype = choose_recording(
            described,
            self._choice,
            self._dim,
            self._seed,
            self.dtype,
            preconditioned=self._preconditioned,
        )
        return RowEncoder(layout)


def _places(micro_batches: Sequence[MicroBatch]) -> Callable[[int], int] | None:
    """Return a map from a place among all collected micro-batches to a place among `micro_batches`.

    Returns:
        None if no micro-batch was dropped, so that all places stay.
    """
    firsts = [p.first for p in micro_batches]
    starts = [0, *accumulate(len(p.samples) for p in micro_batches)]
    if firsts == starts[:-1]:
        return None

    def place(first: int) -> int:
        at = bisect_right(firsts, first) - 1
        return starts[at] + first - firsts[at]

    return place


def _in_words(parameter: tuple[str, tuple[int, ...], int] | None) -> str:
    return (
        "nothing" if parameter is None else f"{parameter[0]} {parameter[1]} in group {parameter[2]}"
    )
