"""Probes that find the sample of each gradient, independently of the books.

The books compare sums, so the books also balance if rows belong to the wrong samples. A *probe* is
a gradient at the output of one sample alone. The probe is sent back through the graph of the
training's own pass. Every place that the probe reaches belongs to that sample. The first probe
finds where each module and each node keeps its samples. The next probe is of another sample and
compares the rows that the recorder would make with torch's own gradients. Probes go through the
first pass of each mode, and later through a pass now and then. Probes draw no random number, touch
no `.grad` and change nothing.

If a layer rule makes wrong rows of a parameter, the parameter is left to the graph
(`hydra_pipe.recording.routes`). If the graph cannot split the parameter either, one backward pass a
sample splits it. A module that mixes the samples of a batch is refused by name.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.orders import SampleOrder
from hydra_pipe.per_sample.registry import takes_any_leading_dimensions
from hydra_pipe.recording.node_orders import OrderProbe, mixing_block
from hydra_pipe.recording.one_by_one import take_one_by_one
from hydra_pipe.recording.places import Pass, Watched
from hydra_pipe.recording.plans import Plan, plan_of, whole_plan
from hydra_pipe.recording.precision import full_precision
from hydra_pipe.recording.probes import PassGraph, Probe, origins_of
from hydra_pipe.recording.routes import RouteCall
from hydra_pipe.recording.verdicts import RowCheck, Rows
from hydra_pipe.recording.walk import Walk

if TYPE_CHECKING:
    from hydra_pipe.recording.capture import Capture

_LOG = logging.getLogger("hydra_pipe")

# Number of the pass of a mode that is probed again, as is each later pass of four times the number.
# A probe costs about a step, so that probes of a run of 1,000 steps cost some 0.3 % of it.
_FIRST_AGAIN = 64
# In a batch of at most _SMALL samples a random order may be the original one by chance. So the
# first _AT_FIRST passes of such batches are probed.
_SMALL, _AT_FIRST = 4, 8
# Samples to probe for their places in the graph, if branches were dropped for the first sample.
_MOST_ASKED = 4


class Attribution:
    """Places of the samples in each pass, and a split of the parameters that layer rules leave out.

    Args:
        capture: the watcher of the modules.
        model: the trained model.
        parameters: block of each recorded parameter, in the order of the blocks.
        names: names of the parameters.
        probes: True if probes may be sent.
    """

    def __init__(
        self,
        capture: "Capture",
        model: nn.Module,
        parameters: Mapping[nn.Parameter, int],
        names: Sequence[str],
        *,
        probes: bool,
    ) -> None:
        self.parameters, self.trained = dict(parameters), list(parameters)
        #: the present probe; None if the pass is the training's own
        self.probe: Probe | None = None
        #: blocks that no layer rule splits
        self.by_graph: set[int] = set(parameters.values())
        self._capture, self._model, self._names, self._probes = capture, model, names, probes
        self._watched: list[Watched] = []
        self._plans: dict[tuple[Any, ...], Plan] = {}
        # number of passes of each mode: (model is in training mode, pass has one sample)
        self._n_passes: dict[tuple[bool, bool], int] = {}
        # samples and calls of the last pass whose calls were those of the probes
        self._as_known: tuple[int, Mapping[Watched, int]] = 0, {}
        self._told: set[int] = set()
        self._is_routed = False

    def add(self, watched: Watched) -> None:
        """Leave the parameters of a module to its layer rule."""
        self._watched.append(watched)
        self.by_graph -= set(watched.owned.values())

    def leave_to_graph(self, blocks: Iterable[int]) -> None:
        """Take the parameters of `blocks` from their layer rules."""
        self.by_graph |= set(blocks)

    def any_trained(self) -> nn.Parameter | None:
        """Return one parameter that the backward pass should reach; None if all are frozen."""
        return next((p for p in self.trained if p.requires_grad), None)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Set the present probe aside while the block runs other passes."""
        kept, self.probe = self.probe, None
        try:
            yield
        finally:
            self.probe = kept

    def end(self, outputs: Sequence[Tensor], of_pass: Pass) -> bool:
        """Probe an ended pass, if a probe is due, and watch the parameters left to the graph.

        Args:
            outputs: tensors with a history that the pass has returned.
            of_pass: the pass.

        Returns:
            True if a probe was due.

        Raises:
            LayerError: the model mixes the samples of a batch, or one of its parameters cannot be
                split by sample.
        """
        is_due = self._is_due(of_pass)
        is_due = 1 if self._is_routed and of_pass.count > 1 else is_due
        if is_due or self.by_graph:
            with full_precision(outputs[0]):
                self._look_into(outputs, of_pass, is_due)
        return is_due > 0

    def _look_into(self, outputs: Sequence[Tensor], of_pass: Pass, is_due: int) -> None:
        origins = origins_of(outputs, of_pass.count)
        graph = PassGraph(Walk(outputs, self.parameters), origins, of_pass)
        # if samples take other routes at each step, one pass tells nothing about the next pass
        self._is_routed = self._is_routed or (
            is_due > 0 and graph.walk.routes_samples(of_pass.count)
        )
        can_probe = (
            self._probes
            and bool(origins)
            and not (graph.walk.is_checkpointed and self._accumulates_elsewhere())
        )
        if is_due and can_probe:
            self._attribute(graph, is_first=is_due == 1)
        if self.by_graph:
            plan = self._plan(graph, can_probe=can_probe)
            self._watch_routes(graph, plan)
            if plan.slow and origins:
                self._take_slowly(graph, sorted(plan.slow))

    def _is_due(self, of_pass: Pass) -> int:
        """Count the pass. Return its number in its mode if a probe is due, else 0."""
        count = of_pass.count
        mode = self._model.training, count == 1
        number = self._n_passes[mode] = self._n_passes.get(mode, 0) + 1
        if self._as_known != (count, of_pass.seen):
            for watched, total in of_pass.seen.items():
                if watched.is_known and watched.is_single != (total == count):
                    return 1  # a module is called with other parts of the batch than before
            self._as_known = count, dict(of_pass.seen)
        if number == 1 or (number <= _AT_FIRST and count <= _SMALL):
            return number
        is_power_of_four = number & (number - 1) == 0 and number.bit_length() % 2 == 1
        return number if number >= _FIRST_AGAIN and is_power_of_four else 0

    def _attribute(self, graph: PassGraph, *, is_first: bool) -> None:
        """Find where each module keeps its samples, and compare the rows with torch's gradients."""
        batch = graph.batch
        sample = (batch // 2 + sum(self._n_passes.values())) % batch
        for attempt in range(3):
            if attempt == 0 and is_first and batch > 1:
                self._find_orders(graph, sample)
            plan = self._plan(graph, can_probe=batch > 1)
            check = RowCheck(
                self.trained,
                graph,
                partial(self._rows, graph, plan),
                plan.slow,
                sum(self._n_passes.values()),
                lambda: self._capture.half_precision,
            )
            try:
                wrong = check.wrong_blocks(thoroughly=is_first or attempt > 0)
            except CheckpointError:
                # In a backward pass a checkpoint hands out each saved tensor once. Routes take
                # some, which the pass itself needs.
                wrong = plan.routed
                if not wrong:
                    raise
            if not wrong:
                return
            _LOG.debug("left to the graph: %s", [self._names[block] for block in wrong])
            if wrong <= self.by_graph:
                self._plans[self._key(graph)] = plan.without(frozenset(wrong))
            self.leave_to_graph(wrong)

    def _key(self, graph: PassGraph) -> tuple[Any, ...]:
        return graph.walk.signature, graph.batch == 1, frozenset(self.by_graph)

    def _plan(self, graph: PassGraph, *, can_probe: bool) -> Plan:
        """Return how to split the parameters that are left to the graph.

        Raises:
            LayerError: a parameter cannot be split by sample.
        """
        key, wanted, walk = self._key(graph), frozenset(self.by_graph), graph.walk
        if key not in self._plans:
            if graph.batch == 1:
                self._plans[key] = whole_plan(walk, wanted)
            elif can_probe:
                self._plans[key] = self._asked_plan(graph, wanted)
            else:
                self._plans[key] = Plan(
                    slow=frozenset(b for b in wanted if b in walk.leaves.values())
                )
        plan = self._plans[key]
        if plan.slow and walk.is_checkpointed:
            raise LayerError(
                f"{self._names[min(plan.slow)]} is used inside of reentrant checkpointing, by a "
                "module without a layer "
                f"rule: its gradient "
                f"cannot be split by sample there. Checkpoint with use_reentrant=False"
            )
        return plan

    def _accumulates_elsewhere(self) -> bool:
        """Tell whether something besides `.grad` gets gradients, such as the ranks' reducer."""
        return self._capture.has_ranks or any(
            getattr(p, "_post_accumulate_grad_hooks", None) for p in self._model.parameters()
        )

    def _asked_plan(self, graph: PassGraph, wanted: frozenset[int]) -> Plan:
        """Find where the nodes of the graph keep their samples, and make the plan from that.

        Raises:
            LayerError: the model mixes the samples of the batch.
        """
        if not wanted:
            return Plan()
        batch = graph.batch
        nodes = OrderProbe(graph.walk, batch, wanted)
        try:
            for n_asked in range(min(_MOST_ASKED, batch)):
                if n_asked > 1 and nodes.is_complete and not nodes.may_mix:
                    break
                sample = (batch // 2 + n_asked) % batch
                nodes.look_at(sample)
                self._send(graph, Probe.of_one(sample, batch))
        finally:
            nodes.remove()
        inputs = [
            x
            for reference in graph.of_pass.inputs
            if (x := reference()) is not None and x.is_floating_point()
        ]
        mixing = mixing_block(graph.walk, nodes, inputs, wanted)
        if mixing is not None:
            raise _mixes(self._names[mixing])
        return plan_of(graph.walk, nodes, wanted)

    def _find_orders(self, graph: PassGraph, sample: int) -> None:
        self._as_known = 0, {}
        probe = Probe.of_one(sample, graph.batch)
        self._send(graph, probe)
        for watched in probe.reached:
            total = graph.of_pass.seen.get(watched, 0)
            order = probe.order_of_rows(watched, total)
            if (
                order is None
                and takes_any_leading_dimensions(watched.rule)
                and probe.other_dims[watched]
            ):
                order = SampleOrder(min(probe.other_dims[watched]))
            if order is not None:
                watched.order, watched.is_known, watched.is_single = (
                    order,
                    True,
                    total in (0, graph.batch),
                )
                continue
            if total == graph.batch:
                self._refuse_mixing(watched, probe.numbers_reached(watched), sample)
            self.leave_to_graph(watched.owned.values())

    def _refuse_mixing(self, watched: Watched, rows: Tensor, sample: int) -> None:
        mixes = len(rows) > 1 and bool((rows == sample).any())
        if mixes and not isinstance(watched.module, nn.Embedding):
            raise _mixes(watched.name)

    def _rows(self, graph: PassGraph, plan: Plan, probe: Probe) -> tuple[Rows, list[Tensor | None]]:
        """Return the rows, by block, that the recorder makes of a probe, and torch's gradients."""
        handles = self._watch_routes(graph, plan)
        try:
            totals = self._send(graph, probe)
        finally:
            for handle in handles:
                handle.remove()
        for block in probe.failed:  # a block without rows is seen to differ from torch's gradient
            probe.rows.pop(block, None)
        return probe.rows, totals

    def _send(self, graph: PassGraph, probe: Probe) -> list[Tensor | None]:
        """Send a probe. Return torch's gradients of the recorded parameters."""
        self.probe = probe
        try:
            with self._capture.sending_to(probe.take):
                return probe.send(graph, self._model, self.trained)
        finally:
            self.probe = None

    def _watch_routes(self, graph: PassGraph, plan: Plan) -> list[Any]:
        """Watch the nodes of a plan in the next backward pass. Return the handles of the hooks."""
        handles = []
        for route in plan.routes:
            call = RouteCall(route, self.trained, graph.batch)
            handles.append(
                graph.walk.nodes[route.node].register_prehook(
                    partial(self._on_node, call, graph.of_pass)
                )
            )
        return handles

    def _on_node(self, call: RouteCall, of_pass: Pass, gradients: Sequence[Tensor | None]) -> None:
        given = next((g for g in gradients if g is not None), None)
        if given is not None:
            node = torch._C._current_autograd_node()
            self._capture.on_route(partial(call.rows, node, gradients), call.blocks, of_pass, given)

    def _take_slowly(self, graph: PassGraph, blocks: Sequence[int]) -> None:
        """Split `blocks` by one backward pass a sample, during the next backward pass.

        Neither a layer rule nor the graph can split these blocks.
        """
        new = [block for block in blocks if block not in self._told]
        if new:
            self._told |= set(new)
            _LOG.warning(
                "recorded by one backward pass a sample, which is slow: %s",
                ", ".join(self._names[b] for b in new[:5]),
            )
        of_pass = graph.of_pass
        take_one_by_one(
            graph.origins,
            self.trained,
            blocks,
            graph.batch,
            lambda rows, gradient: self._capture.on_route(rows, blocks, of_pass, gradient),
        )


def _mixes(name: str) -> LayerError:
    return LayerError(
        f"the output of one sample alone depends on other rows of {name}: the model mixes the "
        "samples of a batch "
        f"there, and no row is a "
        f"sample's own. Leave the mixing out while recording, or freeze {name}"
    )
