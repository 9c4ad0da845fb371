"""Hooks that see each module's input and the gradient at its output, and leave no trace when they are gone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hydra_pipe.errors import HydraError, LayerError
from hydra_pipe.maths.factors import Contribution
from hydra_pipe.maths.layers import rule_for
from hydra_pipe.maths.sequences import ANSWERS_FOR_CHILDREN, is_sequence_module, sequence_rows, several_rows
from hydra_pipe.recording.portions import Portion

# (contributions of one call of one module by index of the parameter's block, place of their first sample in the step)
Sink = Callable[[Mapping[int, Contribution], int], None]

_NOTHING = nullcontext()


@dataclass(slots=True)
class SeenOutput:
    """One backward pass as it was at the model's output.

    Args:
        output: detached.
        version: of `output` when the model returned it: the loop may change it later.
        gradient: that arrived at it.
        first: place of its first sample in the step.
    """

    output: Tensor
    version: int
    gradient: Tensor
    first: int


@dataclass(slots=True, eq=False)
class _OutputWatch:
    """Whether an output is the one that the loss is taken of, and not a part's whose whole returned another."""

    is_used: bool = True


class Capture:
    """Watches the modules of `model` that own one of `parameters`.

    Forward hooks on those modules, and a tensor hook on each output during a watched pass: the real backward pass calls it.

    Args:
        model: stays as it is.
        parameters: index of the block of each recorded parameter, by parameter.
        on_error: takes what hooks raise; None: they raise it into the training's passes.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[nn.Parameter, int], on_error: Callable[[HydraError], None] | None = None
    ) -> None:
        self._on_error = on_error
        self._sink: Sink | None = None
        self._portion = Portion(np.empty(0, np.int64))
        self.half_precision = False
        self.outputs: list[SeenOutput] = []
        self._handles = [model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        answered: set[nn.Module] = set()
        for name, module in model.named_modules():
            whole = isinstance(module, ANSWERS_FOR_CHILDREN)
            answered |= set(module.modules()) - {module} if whole else set()
            owned = {n: parameters[p] for n, p in module.named_parameters(recurse=whole) if p in parameters}
            if owned and module not in answered:
                hook = self._forward_hook(name or type(module).__name__, owned, whole=whole)
                self._handles.append(module.register_forward_hook(self._guarded(hook), with_kwargs=True))
        self._handles.append(model.register_forward_hook(partial(self._watch_output, whole=True)))
        self._inner: _OutputWatch | None = None
        for child in model.children():
            # a trainer's module may call the network that it holds, and leave out its own forward
            if parameters.keys() <= set(child.parameters()):
                self._handles.append(child.register_forward_hook(partial(self._watch_output, whole=False)))

    def watch(self, portion: Portion, sink: Sink) -> None:
        """From now on send the contributions of passes over `portion` to `sink`. One whose place is 0 begins a step."""
        self._portion, self._sink = portion, sink
        if portion.first == 0:
            self.half_precision = False
            self.outputs = []

    def rest(self) -> None:
        """Take no notice of what the model does until the next `watch`."""
        self._sink = None

    @contextmanager
    def sending_to(self, sink: Sink | None) -> Iterator[None]:
        """Send contributions to `sink` instead, or nowhere, while the block runs."""
        usual, self._sink = self._sink, sink
        try:
            yield
        finally:
            self._sink = usual

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let the block watch other passes, then go on with the present ones."""
        kept = self._portion, self._sink, self.half_precision, self.outputs
        try:
            yield
        finally:
            self._portion, self._sink, self.half_precision, self.outputs = kept

    def detach(self) -> None:
        """Remove every hook."""
        self.rest()
        for handle in self._handles:
            handle.remove()

    def _guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook`, but what it raises goes where it is wanted: other processes may wait for this pass to go on."""
        on_error = self._on_error
        if on_error is None:
            return hook

        def guarded(*args: Any) -> Any:
            try:
                return hook(*args)
            except HydraError as error:
                on_error(error)
                return None

        return guarded

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._watching():
            sizes = (len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0)
            self._portion.begin_pass(next(sizes, None))

    def _watching(self) -> bool:
        """Whether the call that is being made is one of a pass to record."""
        if self._sink is None:
            return False
        self._portion.met = True
        if not torch.is_grad_enabled():
            return False
        self._portion.live = True
        return True

    def _watch_output(self, model: nn.Module, args: Any, output: Any, *, whole: bool) -> None:
        """The model has returned `output`, or, if not `whole`, the one part of it that holds everything that is trained."""
        sink, (first, _) = self._sink, self._portion.of_pass
        # what a model of transformers returns is a mapping, the loss in it
        logits = output.get("logits") if isinstance(output, Mapping) else output
        # a scalar is of no sample: the loss, where a trainer calls the model for its training step
        if sink is None or not isinstance(logits, Tensor) or not logits.requires_grad or logits.dim() == 0:
            return
        watch = _OutputWatch()
        if whole and self._inner is not None:
            self._inner.is_used = False
        self._inner = None if whole else watch
        value, version = logits.detach(), logits._version

        def on_gradient(gradient: Tensor) -> None:
            if self._sink is sink and watch.is_used:
                self.outputs.append(SeenOutput(value.to(gradient.dtype), version, gradient.detach(), first))

        if logits is output:
            logits.register_hook(on_gradient)
            return
        # Accelerate gives back a copy of what autocast has made, and the loss is of the original
        node, place = logits.grad_fn, logits.output_nr
        if isinstance(node, torch.autograd.graph.Node) and node.name() == "ToCopyBackward0":
            node, place = node.next_functions[0]
        if node is not None:
            node.register_prehook(lambda gradients: on_gradient(gradients[place]) if gradients[place] is not None else None)

    def _forward_hook(
        self, name: str, owned: Mapping[str, int], *, whole: bool
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor | None]:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not self._watching():
                return None
            # without the search by name that get_parameter makes, where there is nothing to search
            own = module._parameters
            present = {n: module.get_parameter(n) if whole else cast("Tensor", own[n]) for n in owned}
            wanted = [n for n, parameter in present.items() if parameter.requires_grad]
            if not wanted:
                return None
            samples = self._portion.of_pass
            if isinstance(module, nn.Embedding) and output.shape[0] == 1 < samples[1]:
                # positions, looked up once for all samples, to be added to what is each one's own: as autograd broadcasts them,
                # but by sample
                output = output.expand(samples[1], *output.shape[1:])
                args = tuple(x.expand(samples[1], *x.shape[1:]) for x in args)
                kwargs = {key: x.expand(samples[1], *x.shape[1:]) for key, x in kwargs.items()}
            if is_sequence_module(module) or not isinstance(output, Tensor):
                self._watch_several(module, args, kwargs, output, wanted, owned, samples)
                return None
            if not output.requires_grad:
                return None
            # A view that is later changed in place (Linear with a bias returns one, ReLU(inplace=True) changes it) gets a new
            # history, which leaves out the hook. The same memory that autograd does not take for a view keeps its own. A view
            # of something that the model still holds must stay one, or changing it would go unseen.
            fresh = output._is_view() and (
                type(module) is nn.Linear or not _shares_memory(output, (*args, *kwargs.values(), *module.parameters()))
            )
            watched: Tensor = torch.ops.aten._unsafe_view(output, output.shape) if fresh else output
            inputs = tuple([_detached(x) for x in args])
            keywords = {key: _detached(x) for key, x in kwargs.items()} if kwargs else kwargs
            # under autocast outputs are in half precision, and parameters and their gradients are not
            dtype = present[wanted[0]].dtype
            hook = partial(self._backward, name, module, inputs, keywords, wanted, owned, samples, dtype)
            watched.register_hook(self._guarded(hook))  # type: ignore[no-untyped-call]
            return watched

        return forward_hook

    def _watch_several(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        wanted: list[str],
        owned: Mapping[str, int],
        samples: tuple[int, int],
    ) -> None:
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        # the hook must not hold the outputs: they hold the hook, in a ring that nothing collects
        n_leaves, at = len(leaves), {k for k, x in enumerate(leaves) if x.requires_grad}
        inputs, keywords = tree_map(_detached, (args, dict(kwargs)))

        def on_gradients(gradients: Sequence[Tensor | None]) -> None:
            sink = self._sink
            if sink is None:
                return
            known = iter(gradients)
            every = [next(known) if k in at else None for k in range(n_leaves)]
            with self.sending_to(None), torch.no_grad():
                rows_of = sequence_rows if is_sequence_module(module) else several_rows
                rows = rows_of(module, inputs, keywords, every, wanted, samples[1])
            sink({owned[parameter]: row for parameter, row in rows.items()}, samples[0])

        if at:
            torch.autograd.graph.register_multi_grad_hook([leaves[k] for k in sorted(at)], self._guarded(on_gradients))

    def _backward(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: list[str],
        owned: Mapping[str, int],
        samples: tuple[int, int],
        dtype: torch.dtype,
        gradient: Tensor,
    ) -> None:
        sink = self._sink
        if sink is None:
            return
        first, count = samples
        if gradient.dim() == 0 or gradient.shape[0] != count:
            raise LayerError(
                f"{name} ({type(module).__name__}) has an output of shape {tuple(gradient.shape)} in a batch of {count}: "
                f"its first dimension must be the sample, or its gradient cannot be split by sample"
            )
        # A rule may run the module, or parts of it, again: those passes are not the training's.
        self._sink = None
        try:
            # gradients are on here only where the loop wants to differentiate this backward pass again
            with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
                if gradient.dtype != dtype:
                    self.half_precision = True
                    gradient, args = gradient.to(dtype), tuple(_in_dtype(x, dtype) for x in args)
                    kwargs = {key: _in_dtype(x, dtype) for key, x in kwargs.items()}
                contributions = rule_for(module)(module, args, kwargs, gradient.detach(), wanted)
        finally:
            self._sink = sink
        sink({owned[parameter]: contribution for parameter, contribution in contributions.items()}, first)


def _shares_memory(output: Tensor, others: Iterable[Any]) -> bool:
    storage = output.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage for x in others)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
