"""Hooks that see each module's input and the gradient at its output.

The hooks change nothing, and removed hooks leave no trace. No hook replaces a module's output. The
place of a gradient tells its sample. Probes (`hydra_pipe.recording.attribution`), gradients of one
sample's output alone, check the places.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.factors import Contribution
from hydra_pipe.per_sample.registry import rule_for
from hydra_pipe.recording.addresses import storage_of
from hydra_pipe.recording.attribution import Attribution
from hydra_pipe.recording.collating import check_arrangement
from hydra_pipe.recording.coupling import LossCoupling, references, same_targets
from hydra_pipe.recording.micro_batches import MicroBatch
from hydra_pipe.recording.model_outputs import predicted_in, tensors_in, watch_gradient
from hydra_pipe.recording.module_hooks import Hook, do_nothing
from hydra_pipe.recording.places import Call, Pass, Watched, rows_by_node, rows_of_call
from hydra_pipe.recording.precision import full_precision, without_gradients
from hydra_pipe.recording.seen_outputs import SeenOutput

# Arguments: the contributions of one call, by index of the parameter's block; the place of their
# first sample in the step; True if the loop asked for these gradients by torch.autograd.grad, which
# adds nothing to `.grad`. Result: True if the contributions count.
Sink = Callable[[Mapping[int, Contribution], int, bool], bool]


@dataclass(slots=True, eq=False)
class _OutputWatch:
    """Mark of an output: False if it is a part's output and the whole model returned its own."""

    is_used: bool = True


def _raising(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


@dataclass(frozen=True)
class Watching:
    """Settings for watching the passes of a model.

    Args:
        guard: wrapper of each hook that may raise. By default the hook is not wrapped, and its
            errors are raised inside the training's passes.
        has_ranks: True if several processes train the model together.
        probes: True if probes may be sent through the model.
        allows_mixing: True if the loss may mix samples.
    """

    guard: Callable[[Callable[..., Any]], Callable[..., Any]] = _raising
    has_ranks: bool = False
    probes: bool = True
    allows_mixing: bool = False


@dataclass(slots=True)
class _Depth:
    """Nesting of calls of watched modules.

    Args:
        value: number of watched modules that the present call is inside of.
        outermost: modules that were called from outside of all other watched modules.
    """

    value: int = 0
    outermost: set[nn.Module] = field(default_factory=set)


class Capture:
    """Watcher of the modules of `model` that own one of `parameters`.

    Each such module gets a forward hook. During a watched pass, each output of such a module gets a
    tensor hook, which the training's own backward pass calls.

    Args:
        model: the model, which is not changed.
        parameters: index of the block of each recorded parameter, in the order of the blocks.
        names: names of the parameters.
        how: settings for watching the passes.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[nn.Parameter, int],
        names: Sequence[str],
        how: Watching,
    ) -> None:
        self._guarded = how.guard
        self.has_ranks = how.has_ranks
        self.coupling = LossCoupling(
            partial(self.sending_to, None), allows_mixing=how.allows_mixing, looks=how.probes
        )
        self.coupling.watch.look = self._guarded(self.coupling.watch.look)
        self._sink: Sink | None = None
        self._micro_batch = MicroBatch(np.empty(0, np.int64))
        self._model = model
        self.half_precision = False
        #: called when a backward pass has added its gradients to `.grad`
        self.on_backward_end: Callable[[], None] = do_nothing
        self.outputs: list[SeenOutput] = []
        # shape of the output of the last module that was called, and its input
        self._last_called: tuple[torch.Size, Tensor] | None = None
        self._pass = Pass(0, 0)
        # calls whose inputs are kept, and the backward passes whose ends release the inputs
        self._calls: list[Call] = []
        self._releasing: set[int] = set()
        self._passes_open = 0
        # nodes that add to `.grad`: to look one up takes longer than to ask for it
        self._nodes: dict[nn.Parameter, Any] = {}
        self._attribution = Attribution(self, model, parameters, names, probes=how.probes)
        self._depth = _Depth()
        self._handles: list[Any] = []
        self._container_handles: dict[nn.Module, list[Any]] = {}
        self._hook_containers(model, parameters)
        for name, module in model.named_modules():
            owned = {
                n: parameters[p]
                for n, p in module._parameters.items()
                if p is not None and p in parameters
            }
            rule = rule_for(module)
            if owned and rule is not None:
                watched = Watched(name or type(module).__name__, module, owned, rule)
                self._attribution.add(watched)
                hook = partial(self._forward, watched)
                # before the hooks of others, which may change the output
                self._handles.append(
                    module.register_forward_hook(
                        Hook(self._guarded(hook)), prepend=True, with_kwargs=True
                    )
                )
        self._inner: _OutputWatch | None = None
        for part in (model, *model.children()):
            # a trainer's module may call its network directly, without its own forward
            if part is model or parameters.keys() <= set(part.parameters()):
                self._handles.append(
                    part.register_forward_hook(Hook(partial(self._watch_output, part is model)))
                )

    def watch(self, micro_batch: MicroBatch, sink: Sink) -> None:
        """Send the contributions of passes over `micro_batch` to `sink` from now on.

        A micro-batch whose first place is 0 begins a step.
        """
        self._micro_batch, self._sink = micro_batch, sink
        self._depth.value = 0
        if micro_batch.first == 0:
            self.half_precision = False
            self.outputs = []
        self._pass = Pass(*micro_batch.of_pass)

    def pause(self) -> None:
        """Ignore the model's passes until the next `watch`."""
        self._sink = None

    def release(self) -> None:
        """Release the inputs of all passes so far."""
        for call in self._calls:
            call.release()
        self._calls = []
        self._last_called = None
        self.coupling.release()
        self._forget_containers()

    @contextmanager
    def sending_to(self, sink: Sink | None) -> Iterator[None]:
        """Send contributions to `sink` while the block runs; None: to nothing."""
        usual, self._sink = self._sink, sink
        try:
            yield
        finally:
            self._sink = usual

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Watch other passes while the block runs, then return to the present ones."""
        kept = (
            self._micro_batch,
            self._sink,
            self.half_precision,
            self.outputs,
            self._pass,
            self._calls,
            self._passes_open,
        )
        self._calls, self._passes_open = [], 0
        coupling, self.coupling = (
            self.coupling,
            LossCoupling(partial(self.sending_to, None), allows_mixing=True),
        )
        try:
            with self._attribution.set_aside():
                yield
        finally:
            self.coupling = coupling
            (
                self._micro_batch,
                self._sink,
                self.half_precision,
                self.outputs,
                self._pass,
                self._calls,
                self._passes_open,
            ) = kept

    def detach(self) -> None:
        """Remove every hook."""
        self.pause()
        self.release()
        self._nodes.clear()
        for handle in self._handles:
            handle.remove()
        for handles in self._container_handles.values():
            for handle in handles:
                handle.remove()

    def check_passes(self, when: str) -> None:
        """Refuse several passes over the same places of the step, if their samples may differ.

        Raises:
            LayerError: two passes may be of different samples.
        """
        self.coupling.check_repeats(partial(same_targets, self.outputs), when)

    def _hook_containers(self, model: nn.Module, parameters: Mapping[nn.Parameter, int]) -> None:
        """Hook the modules that tell where a pass begins and ends.

        A pass is the call of a module that no other watched module has called.
        """
        for module in model.modules():
            holds = any(p in parameters for p in module.parameters())
            if module is model or (holds and next(module.children(), None) is not None):
                begin, end = (
                    self._guarded(partial(self._begin_call, module)),
                    partial(self._end_call, module),
                )
                self._container_handles[module] = [
                    module.register_forward_pre_hook(Hook(begin), with_kwargs=True),
                    module.register_forward_hook(Hook(self._guarded(end)), always_call=True),
                ]

    def _begin_call(
        self, module: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._depth.value += 1
        if self._depth.value == 1 and torch._C._current_graph_task_id() == -1 and self._watching():
            self._depth.outermost.add(module)
            tensors = [
                x
                for x in tree_leaves((args, dict(kwargs)))
                if isinstance(x, Tensor) and x.dim() > 0
            ]
            if module is self._model or self._holds_all(module):
                self._micro_batch.begin_pass(_samples_in(tensors, len(self._micro_batch.samples)))
            batch = self._micro_batch.samples, self._micro_batch.first
            self._pass = Pass(*self._micro_batch.of_pass, references(tensors), batch)
            self._check_arrangement(tensors)

    def _check_arrangement(self, inputs: Sequence[Tensor]) -> None:
        micro_batch = self._micro_batch
        if micro_batch.partners is not None:
            return
        for reference in micro_batch.tensors:
            batch = reference()
            for given in inputs:
                if (
                    batch is not None
                    and len(given) == len(batch)
                    and given.numel() == batch.numel()
                    and not micro_batch.seen
                ):
                    check_arrangement(given, batch, micro_batch.samples)

    def _end_call(self, module: nn.Module, _: nn.Module, args: Any, output: Any) -> None:
        self._depth.value = max(0, self._depth.value - 1)
        if (
            self._depth.value
            or self._sink is None
            or not torch.is_grad_enabled()
            or torch._C._current_graph_task_id() != -1
        ):
            return
        self._passes_open += 1
        leaves = [x for x in tensors_in(output) if x.requires_grad]
        batch, of_pass = len(self._micro_batch.samples), self._pass
        if of_pass.count != batch and self._holds_batch(leaves, batch):
            self._micro_batch.correct_pass(batch)
            of_pass.count = batch
        if leaves:
            is_due = self._attribution.end(leaves, of_pass)
            if module is self._model or self._holds_all(module):
                self.coupling.add(of_pass, output, is_due=is_due)

    def _holds_batch(self, outputs: Sequence[Tensor], batch: int) -> bool:
        """Tell whether the present pass holds the whole batch, whatever comes first in its inputs.

        Another dimension may come first, or parts of samples: nodes of graphs, points of clouds.
        """
        lengths = [len(x) for x in outputs if x.dim()]
        if self._pass.count > batch:
            return lengths.count(batch) == len(lengths) > 0
        inputs = (reference() for reference in self._pass.inputs)
        return batch in lengths and any(batch in x.shape for x in inputs if x is not None)

    def _holds_all(self, module: nn.Module) -> bool:
        return self._attribution.parameters.keys() <= set(module.parameters())

    def _forget_containers(self) -> None:
        """Unhook all containers that no code outside of the model has called.

        The modules that are called from outside are known after the first step.
        """
        outermost = self._depth.outermost
        if not outermost:
            return
        for module in [
            m for m in self._container_handles if m not in outermost and m is not self._model
        ]:
            for handle in self._container_handles.pop(module):
                handle.remove()

    def _watching(self) -> bool:
        """Tell whether the present call is of a pass to record. Mark its micro-batch as met."""
        if self._sink is None:
            return False
        self._micro_batch.met = True
        if not torch.is_grad_enabled():
            return False
        self._micro_batch.live = True
        return True

    def _watch_output(self, is_whole: bool, model: nn.Module, args: Any, output: Any) -> None:
        """Note the output of the model, to keep it with the gradient that arrives there.

        Args:
            is_whole: True if `model` is the whole model; False if `model` is a part that holds all
                trained parameters.
            model: the module that was called.
            args: positional arguments of the call.
            output: returned value of the call.
        """
        sink, (first, _) = self._sink, self._micro_batch.of_pass
        predicted = predicted_in(output)
        # a scalar belongs to no sample: it is the loss, if the model's forward is a training step
        if sink is None or predicted is None or not predicted.requires_grad or predicted.dim() == 0:
            return
        watch = _OutputWatch()
        if is_whole and self._inner is not None:
            self._inner.is_used = False
        self._inner = None if is_whole else watch
        value, version = predicted.detach(), predicted._version
        last_input = self._input_of(predicted)

        def on_gradient(gradient: Tensor) -> None:
            if self._sink is sink and watch.is_used and self._destination(None) is not False:
                output = value.to(gradient.dtype)
                self.outputs.append(
                    SeenOutput(output, version, gradient.detach(), first, last_input)
                )

        watch_gradient(output, predicted, on_gradient)

    def _input_of(self, predicted: Tensor) -> Tensor | None:
        """Return the input of the last module that was called, if its output is `predicted`.

        The model may have changed the output without changing its shape, such as by a softmax.
        """
        if predicted.dim() != 2 or self._last_called is None:
            return None
        shape, given = self._last_called
        return given if shape == predicted.shape else None

    def _forward(
        self,
        watched: Watched,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not self._watching():
            return
        if not isinstance(output, Tensor):
            self._attribution.leave_to_graph(watched.owned.values())
            return
        if output.dim() == 2 and args and isinstance(args[0], Tensor) and args[0].dim() == 2:
            self._last_called = output.shape, args[0].detach()
        wanted = watched.wanted(self._attribution.by_graph)
        if not wanted or not output.requires_grad or not output.numel():
            return
        is_recomputed = torch._C._current_graph_task_id() != -1
        parameter = cast("nn.Parameter", module._parameters[wanted[0]])
        inputs = (
            tuple([_detached(x) for x in args]),
            {key: _detached(x) for key, x in kwargs.items()} if kwargs else kwargs,
        )
        call = Call(watched, parameter, inputs, self._pass, is_recomputed, output)
        self._calls.append(call)
        hook = self._guarded(partial(self._backward, call))
        # Linear with a bias returns a view. When ReLU(inplace=True) changes the view, autograd
        # gives the view a new history without the hooks that were set before. The base of the view
        # keeps its own history, hooks included.
        base = output._base if output._is_view() else None
        is_own = (
            base is not None
            and base.numel() == output.numel()
            and base.is_contiguous()
            and output.is_contiguous()
        )
        if (
            is_own
            and base is not None
            and not _shares_memory(base, (*args, *kwargs.values(), *module.parameters()))
        ):
            base.register_hook(hook)  # type: ignore[no-untyped-call]
        else:
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _destination(self, parameter: nn.Parameter | None) -> bool | None:
        """Tell whether the running backward pass adds to `.grad` of `parameter`.

        Returns:
            None if the loop asked for gradients by `torch.autograd.grad`.
        """
        parameter = parameter if parameter is not None else self._attribution.any_trained()
        if parameter is None:
            return True
        try:
            known = self._nodes.get(parameter)
            if known is not None and torch._C._will_engine_execute_node(known):
                return True
            # autograd has made another node if the parameter's data have another type since
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            # on a device, a node that is kept would be bound to the stream of its first use
            if parameter.device.type == "cpu":
                self._nodes[parameter] = node
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:
            return None

    def _backward(self, call: Call, gradient: Tensor) -> None:
        sink = self._sink
        if sink is None:
            return
        attribution = self._attribution
        if attribution.probe is not None:
            attribution.probe.saw(call, gradient)
            is_asked = False
            if not attribution.probe.wants_rows:
                return
        else:
            destination = self._destination(call.parameter)
            if destination is False:
                return  # the pass differentiates something else, such as an input
            is_asked = destination is None
            self._release_at_end(call)
        wanted = call.watched.wanted(attribution.by_graph)
        if not wanted:
            return  # the module was left to the graph after its forward pass
        if call.is_recomputed and self._passes_open > 1:
            raise LayerError(
                f"reentrant checkpointing recomputes {call.watched.name} after "
                f"{self._passes_open} passes, and it cannot be known for which of them: call "
                "backward() after each pass, or checkpoint with use_reentrant=False"
            )
        with without_gradients(), full_precision(gradient):  # contributions may be encoded at once
            for place, contributions in self._rows(call, gradient, wanted, sink):
                if sink(contributions, place, is_asked):
                    call.of_pass.has_gradient = True

    def _rows(
        self, call: Call, gradient: Tensor, wanted: Sequence[str], sink: Sink
    ) -> list[tuple[int, dict[int, Contribution]]]:
        """Return the contributions of a call. Raises: LayerError: they cannot be split."""
        attribution = self._attribution
        # A rule may run the module, or parts of it, again. Such a pass is not the training's.
        self._sink = None
        try:
            # under autocast outputs are half precision; parameters and their gradients are not
            if gradient.dtype != call.dtype:
                self.half_precision = True
            if call.inputs is not None:
                return rows_of_call(call, gradient.detach(), wanted)
            # a second backward pass through a graph that the loop has retained
            return rows_by_node(
                call, torch._C._current_autograd_node(), gradient, attribution.parameters
            )
        except LayerError:
            if attribution.probe is None:
                raise
            # the graph may be able to split these parameters
            attribution.probe.failed |= {call.watched.owned[name] for name in wanted}
            return []
        finally:
            self._sink = sink

    def on_route(
        self,
        rows: Callable[[], list[tuple[int, Contribution]]],
        blocks: Iterable[int],
        of_pass: Pass,
        gradient: Tensor,
    ) -> None:
        """Collect the contributions at a node that uses parameters without a layer rule.

        The node is about to run.

        Args:
            rows: function that makes the contributions of the pass's samples.
            blocks: blocks that get contributions.
            of_pass: the pass.
            gradient: gradient at the node.
        """
        sink = self._sink
        if sink is None:
            return
        is_asked = False
        if self._attribution.probe is None:
            destination = self._destination(self._attribution.trained[next(iter(blocks))])
            if destination is False:
                return
            is_asked = destination is None
        elif not self._attribution.probe.wants_rows:
            return
        with without_gradients(), full_precision(gradient):
            self._sink = None
            try:
                if gradient.dtype in (torch.float16, torch.bfloat16):
                    self.half_precision = True
                found = rows()
            finally:
                self._sink = sink
            for block, contribution in found:
                if sink({block: contribution}, of_pass.first, is_asked):
                    of_pass.has_gradient = True

    def _release_at_end(self, call: Call) -> None:
        """Release all inputs when the backward pass ends, as autograd releases its own then."""
        task = torch._C._current_graph_task_id()
        call.task = task
        if task not in self._releasing:  # a recomputed part has its own pass within another
            self._releasing.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(
                partial(self._after_backward, task)
            )

    def _after_backward(self, task: int) -> None:
        self._releasing.discard(task)
        if not self._releasing:
            self._passes_open = 0
            self.coupling.after_backward()
            self.on_backward_end()
        for call in self._calls:
            if call.task == task:
                call.release()
        self._calls = [call for call in self._calls if call.task != task]


def _samples_in(tensors: Sequence[Tensor], batch: int) -> int | None:
    """Return the number of samples in a call of the model; None if the call has no tensors.

    The number is `batch` if one of the inputs may hold `batch` samples.
    """
    if not tensors:
        return None
    # a first dimension longer than the batch is another dimension, such as time
    is_whole = any(len(x) == batch for x in tensors) or (
        len(tensors[0]) > batch and any(batch in x.shape for x in tensors)
    )
    return batch if is_whole else len(tensors[0])


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _shares_memory(output: Tensor, others: Iterable[Any]) -> bool:
    storage = storage_of(output)
    return any(isinstance(x, Tensor) and storage_of(x) == storage for x in others)
