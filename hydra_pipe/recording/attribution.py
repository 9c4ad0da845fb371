"""Whose a gradient is, known from outside of the books.

The books see sums: rows of the wrong sample balance as well. So gradients of one sample's output alone, a *probe*,
are sent back through the graph of the training's own pass. Wherever they arrive belongs to that sample: the first
probe finds where each module and each node keeps its samples, the next one, of another sample, holds the rows that
the recorder would make against torch's own gradients. Probes go through the first pass of each mode, and through one
now and then. They draw no random number, touch no `.grad` and change nothing.

A parameter whose rows are wrong by its layer rule is left to the graph (`hydra_pipe.recording.routes`), and one that
the graph cannot split to one backward pass a sample. A module that mixes the samples of a batch is refused by name.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.factors import Contribution, Factors, TokenRows, bounds_of, rows_of
from hydra_pipe.per_sample.orders import FIRST, SampleOrder, order_of
from hydra_pipe.per_sample.registry import takes_any_leading_dimensions
from hydra_pipe.recording.node_orders import OrderProbe, mixing_block
from hydra_pipe.recording.places import Call, Origin, Pass, Watched, order_of_rows
from hydra_pipe.recording.plans import Plan, plan_of, whole_plan
from hydra_pipe.recording.routes import RouteCall
from hydra_pipe.recording.walk import Walk, gradients_by_backward

if TYPE_CHECKING:
    from hydra_pipe.recording.capture import Capture

_LOG = logging.getLogger("hydra_pipe")

# Passes of a mode after which one is probed again: this one, and each that has twice the number.
_FIRST_AGAIN = 64
# Of batches so small that samples in a random order are in their own by chance: so many of the first passes.
_SMALL, _AT_FIRST = 4, 8
# Samples that are asked where the graph keeps them, if branches were dropped for the first.
_MOST_ASKED = 4
# Difference between rows and gradient, over the larger of the gradient and the sum of what cancels in it.
_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LIMIT = 5e-2


@dataclass
class Probe:
    """Gradients of the outputs of some samples, on their way through the graph.

    Args:
        weights: of the samples' gradients, shape (B,); zero for those that take no part.
        wants_rows: whether rows are to be made; else one sample takes part, and it is only seen where its gradients arrive.
    """

    weights: Tensor
    wants_rows: bool
    reached: dict[Watched, list[tuple[int, Tensor]]] = field(default_factory=dict)
    other_dims: dict[Watched, set[int]] = field(default_factory=dict)
    in_batches: dict[Watched, bool] = field(default_factory=dict)
    rows: dict[int, list[tuple[int, Contribution]]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @classmethod
    def of_one(cls, sample: int, batch: int) -> "Probe":
        """A probe that finds where the gradients of `sample` arrive."""
        return cls(torch.zeros(batch).index_fill_(0, torch.tensor(sample), 1.0), wants_rows=False)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.weights)

    @property
    def sample(self) -> int:
        """The first that takes part."""
        return int(self.weights.argmax())

    def saw(self, call: Call, gradient: Tensor) -> None:
        """Gradients have arrived at the output of a call."""
        if self.wants_rows:
            return
        gradient = gradient.detach().reshape(call.shape)
        if gradient.dim() == 0 or not bool(gradient.any()):
            return
        rows = (gradient != 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0
        watched = call.watched
        self.reached.setdefault(watched, []).append((call.offset, rows.nonzero()[:, 0].cpu()))
        self.in_batches[watched] = self.in_batches.get(watched, True) and call.n_rows == self.batch
        dims = {
            dim
            for dim in range(1, gradient.dim())
            if gradient.shape[dim] == self.batch
            and order_of(gradient, self.batch, self.sample, SampleOrder(dim)) == SampleOrder(dim)
        }
        self.other_dims[watched] = self.other_dims.get(watched, dims) & dims

    def take(self, contributions: Mapping[int, Contribution], first: int, _: bool) -> bool:
        """Rows were made."""
        for block, value in contributions.items():
            self.rows.setdefault(block, []).append((first, value))
        return False


class Attribution:
    """Knows where samples are in each pass, and sees to what layer rules leave out.

    Args:
        capture: that watches the modules.
        model: that is trained.
        parameters: block of each recorded parameter, in the order of the blocks.
        names: of the parameters.
        probes: whether probes may be sent.
    """

    def __init__(
        self, capture: "Capture", model: nn.Module, parameters: Mapping[nn.Parameter, int], names: Sequence[str], *, probes: bool
    ) -> None:
        self.parameters, self.trained = dict(parameters), list(parameters)
        #: the present probe; None: the pass is the training's
        self.probe: Probe | None = None
        #: blocks that no layer rule splits
        self.by_graph: set[int] = set(parameters.values())
        self._capture, self._model, self._names, self._probes = capture, model, names, probes
        self._watched: list[Watched] = []
        self._plans: dict[tuple[Any, ...], Plan] = {}
        # passes of each mode: training or not, of one sample or of more
        self._n_passes: dict[tuple[bool, bool], int] = {}
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
        """One parameter that the backward pass should reach."""
        return next((p for p in self.trained if p.requires_grad), None)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let the block take other passes."""
        kept, self.probe = self.probe, None
        try:
            yield
        finally:
            self.probe = kept

    def end(self, outputs: Sequence[Tensor], of_pass: Pass) -> tuple[bool, list[Origin]]:
        """A pass has ended: probe it if it is time, and see to the parameters that are left to the graph.

        Args:
            outputs: tensors that it has returned, with a history.
            of_pass: the pass.

        Returns:
            Whether it was time for a probe, and the outputs that keep the samples apart.

        Raises:
            LayerError: the model mixes the samples of a batch, or one of its parameters cannot be split by sample.
        """
        is_due = self._is_due(of_pass)
        is_due = 1 if self._is_routed and of_pass.count > 1 else is_due
        origins = _origins(outputs, of_pass.count)
        if not is_due and not self.by_graph:
            return False, origins
        walk = Walk(outputs, self.parameters)
        # where samples take other ways at each step, what one pass has shown says nothing of the next
        self._is_routed = self._is_routed or (is_due > 0 and walk.routes_samples(of_pass.count))
        can_probe = self._probes and bool(origins) and not (walk.is_checkpointed and self._accumulates_elsewhere())
        if is_due and can_probe:
            self._attribute(walk, origins, of_pass, is_first=is_due == 1)
        if self.by_graph:
            self._take_routes(walk, self._plan(walk, origins, of_pass, can_probe=can_probe), origins, of_pass)
        return is_due > 0, origins

    def _is_due(self, of_pass: Pass) -> int:
        """Number of the pass among those of its mode, if it is to be probed; else 0."""
        mode = self._model.training, of_pass.count == 1
        number = self._n_passes[mode] = self._n_passes.get(mode, 0) + 1
        if any(w.is_known and w.is_single != (total == of_pass.count) for w, total in of_pass.seen.items()):
            return 1  # a module is called with other parts of the batch than before
        again = number & (number - 1) == 0 if number >= _FIRST_AGAIN else number <= _AT_FIRST and of_pass.count <= _SMALL
        return number if number == 1 or again else 0

    def _attribute(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, *, is_first: bool) -> None:
        """Find where each module keeps its samples, and hold the rows against torch's gradients."""
        batch = of_pass.count
        sample = (batch // 2 + sum(self._n_passes.values())) % batch
        for attempt in range(3):
            if attempt == 0 and is_first and batch > 1:
                self._find_orders(walk, origins, of_pass, sample)
            self._plan(walk, origins, of_pass, can_probe=batch > 1)
            wrong = self._wrong_blocks(walk, origins, of_pass, thoroughly=is_first or attempt > 0)
            if not wrong:
                return
            _LOG.debug("left to the graph: %s", [self._names[block] for block in wrong])
            if wrong <= self.by_graph:
                key = self._key(walk, of_pass)
                self._plans[key] = self._plans[key].without(frozenset(wrong))
            self.leave_to_graph(wrong)

    @contextmanager
    def _order_probe(self, walk: Walk, batch: int) -> Iterator[OrderProbe]:
        probe = OrderProbe(walk, batch, frozenset(self.parameters.values()))
        try:
            yield probe
        finally:
            probe.remove()

    def _key(self, walk: Walk, of_pass: Pass) -> tuple[Any, ...]:
        return walk.signature, of_pass.count == 1, frozenset(self.by_graph)

    def _plan(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, *, can_probe: bool) -> Plan:
        key = self._key(walk, of_pass)
        if key not in self._plans:
            wanted = frozenset(self.by_graph)
            if of_pass.count == 1:
                self._plans[key] = whole_plan(walk, wanted)
            elif can_probe:
                with self._order_probe(walk, of_pass.count) as nodes:
                    self._ask_nodes(walk, origins, of_pass, nodes, of_pass.count // 2)
            else:
                self._plans[key] = Plan(slow=frozenset(b for b in wanted if b in walk.leaves.values()))
        plan = self._plans[key]
        if plan.slow and walk.is_checkpointed:
            raise LayerError(
                f"{self._names[min(plan.slow)]} is used inside of reentrant checkpointing, by a module without a layer "
                f"rule: its gradient "
                f"cannot be split by sample there. Checkpoint with use_reentrant=False"
            )
        return plan

    def _accumulates_elsewhere(self) -> bool:
        """Tell whether something else than `.grad` hears of gradients, such as a reducer of several ranks."""
        return self._capture.has_ranks or any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self._model.parameters())

    def _ask_nodes(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, nodes: OrderProbe, sample: int) -> None:
        """Find where the nodes of the graph keep their samples, and plan by it."""
        for n_asked in range(min(_MOST_ASKED, of_pass.count)):
            if n_asked > 1 and nodes.is_complete and not nodes.may_mix:
                break
            of_next = (sample + n_asked) % of_pass.count
            nodes.look_at(of_next)
            self._send(walk, origins, Probe.of_one(of_next, of_pass.count))
        inputs = [x for reference in of_pass.inputs if (x := reference()) is not None and x.is_floating_point()]
        mixing = mixing_block(walk, nodes, inputs, frozenset(self.by_graph))
        if mixing is not None:
            raise _mixes(self._names[mixing])
        self._plans[self._key(walk, of_pass)] = plan_of(walk, nodes, frozenset(self.by_graph))

    def _find_orders(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, sample: int) -> None:
        probe = Probe.of_one(sample, of_pass.count)
        self._send(walk, origins, probe)
        for watched, reached in probe.reached.items():
            total = of_pass.seen.get(watched, 0)
            order = (
                order_of_rows(watched, reached, total, of_pass.count, sample, in_batches=probe.in_batches[watched])
                if total
                else FIRST
            )
            if order is None and takes_any_leading_dimensions(watched.rule) and probe.other_dims[watched]:
                order = SampleOrder(min(probe.other_dims[watched]))
            if order is not None:
                watched.order, watched.is_known, watched.is_single = order, True, total in (0, of_pass.count)
                continue
            self._refuse_mixing(watched, reached, of_pass, sample)
            self.leave_to_graph(watched.owned.values())

    def _refuse_mixing(self, watched: Watched, reached: Sequence[tuple[int, Tensor]], of_pass: Pass, sample: int) -> None:
        rows = torch.cat([offset + numbers for offset, numbers in reached])
        mixes = len(rows) > 1 and bool((rows == sample).any()) and of_pass.seen.get(watched) == of_pass.count
        if mixes and not isinstance(watched.module, nn.Embedding):
            raise _mixes(watched.name)

    def _wrong_blocks(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, *, thoroughly: bool) -> set[int]:
        """Blocks whose rows are not the samples' own.

        Thoroughly: all outputs' gradients at once, and again with a weight for each sample, with which its row has to grow. Where a
        batch normalisation couples the samples: gradients of half of the samples, by each bit of their numbers. Else: of one half.
        """
        batch = of_pass.count
        numbers = torch.arange(batch)
        generator = torch.Generator().manual_seed(sum(self._n_passes.values()))
        if batch == 1:
            return self._wrong_in_parts(walk, origins, of_pass, [torch.ones(1)])
        if not thoroughly:
            return self._wrong_in_parts(walk, origins, of_pass, [(torch.randperm(batch, generator=generator) < batch // 2).float()])
        if any("BatchNorm" in node.name() for node in walk.nodes):
            halves = [(numbers >> bit & 1).float() for bit in range((batch - 1).bit_length())]
            return self._wrong_in_parts(walk, origins, of_pass, [halves[0], *(1 - half for half in halves)])
        weights = 0.5 + 1.5 * torch.rand(batch, generator=generator)
        plain, totals = self._rows(walk, origins, of_pass, Probe(torch.ones(batch), wants_rows=True))
        weighted, _ = self._rows(walk, origins, of_pass, Probe(weights, wants_rows=True))
        wrong = self._unlike(plain, totals, of_pass, torch.ones(batch), walk)
        for block, parameter in enumerate(self.trained):
            grown, size = (_sizes(rows.get(block, ()), of_pass) for rows in (weighted, plain))
            limit = self._limit(parameter)
            if bool(
                (
                    (grown - weights.double() * size).abs() > limit * weights.double() * size.clamp(min=float(size.max()) * 1e-3)
                ).any()
            ):
                wrong.add(block)
        return wrong - self._slow_of(walk, of_pass)

    def _wrong_in_parts(self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, parts: Sequence[Tensor]) -> set[int]:
        """Blocks whose rows of samples that take no part in a probe are not zero, or whose rows do not sum to torch's gradient."""
        wrong: set[int] = set()
        for part in parts:
            rows, totals = self._rows(walk, origins, of_pass, Probe(part, wants_rows=True))
            wrong |= self._unlike(rows, totals, of_pass, part, walk)
        return wrong

    def _rows(
        self, walk: Walk, origins: Sequence[Origin], of_pass: Pass, probe: Probe
    ) -> tuple[dict[int, list[tuple[int, Contribution]]], list[Tensor | None]]:
        """The rows that the recorder would make of a probe, by block, and torch's gradients."""
        plan = self._plans.get(self._key(walk, of_pass), Plan())
        handles = self._take_routes(walk, plan, [], of_pass)
        try:
            totals = self._send(walk, origins, probe)
        finally:
            for handle in handles:
                handle.remove()
        for block in probe.failed:  # no row at all is told from torch's gradient
            probe.rows.pop(block, None)
        return probe.rows, totals

    def _slow_of(self, walk: Walk, of_pass: Pass) -> frozenset[int]:
        return self._plans.get(self._key(walk, of_pass), Plan()).slow

    def _limit(self, parameter: nn.Parameter) -> float:
        return _HALF_LIMIT if self._capture.half_precision else _LIMIT.get(parameter.dtype, _HALF_LIMIT)

    def _unlike(
        self,
        rows: Mapping[int, Sequence[tuple[int, Contribution]]],
        totals: Sequence[Tensor | None],
        of_pass: Pass,
        part: Tensor,
        walk: Walk,
    ) -> set[int]:
        wrong = set()
        slow = self._slow_of(walk, of_pass)
        for block, (parameter, total) in enumerate(zip(self.trained, totals, strict=True)):
            if block in slow:
                continue
            of_block = rows.get(block, ())
            sizes = _sizes(of_block, of_pass)
            others = float(sizes[part == 0].sum())
            error, size = _missing(of_block, total, parameter)
            size = max(size, float(sizes.sum()))
            if not math.isfinite(error + others + size):
                continue  # it is told of the step's own gradients; an overflow of the probe says nothing of the rows
            if not error + others <= self._limit(parameter) * size + torch.finfo(torch.float32).tiny:
                wrong.add(block)
        return wrong

    def _send(self, walk: Walk, origins: Sequence[Origin], probe: Probe) -> list[Tensor | None]:
        """Send a probe. Returns: torch's gradients of the recorded parameters."""
        trained = [p for p in self.trained if p.requires_grad]
        gradients = [_generic(origin, probe.weights) for origin in origins]
        coupled = [node.register_hook(_uncoupled) for node in walk.nodes if "BatchNorm" in node.name()]
        self.probe = probe
        outputs = [o.output for o in origins]
        found: Sequence[Tensor | None]
        try:
            with self._capture.sending_to(probe.take):
                if walk.is_checkpointed:
                    found = gradients_by_backward(walk, self._model, outputs, gradients, trained)
                else:
                    found = torch.autograd.grad(outputs, trained, gradients, retain_graph=True, allow_unused=True)
        finally:
            self.probe = None
            for handle in coupled:
                handle.remove()
        known = dict(zip(trained, found, strict=True))
        return [known.get(p) for p in self.trained]

    def _take_routes(self, walk: Walk, plan: Plan, origins: Sequence[Origin], of_pass: Pass) -> list[Any]:
        """Watch the nodes of a plan in the backward pass that is to come."""
        handles = []
        for route in plan.routes:
            call = RouteCall(route, self.trained, of_pass.count)
            handles.append(walk.nodes[route.node].register_prehook(partial(self._on_node, call, of_pass)))
        if plan.slow and origins:
            self._take_slowly(plan.slow, origins, of_pass)
        return handles

    def _on_node(self, call: RouteCall, of_pass: Pass, gradients: Sequence[Tensor | None]) -> None:
        given = next((g for g in gradients if g is not None), None)
        if given is not None:
            node = torch._C._current_autograd_node()
            self._capture.on_route(partial(call.rows, node, gradients), call.blocks, of_pass, given)

    def _take_slowly(self, blocks: frozenset[int], origins: Sequence[Origin], of_pass: Pass) -> None:
        """One backward pass a sample, from the gradients at the outputs, for what nothing else can split."""
        new = sorted(blocks - self._told)
        if new:
            self._told |= set(new)
            _LOG.warning("recorded by one backward pass a sample, which is slow: %s", ", ".join(self._names[b] for b in new[:5]))
        trained = [self.trained[block] for block in sorted(blocks)]

        def on_gradients(gradients: Sequence[Tensor | None]) -> None:
            used = [(o, g) for o, g in zip(origins, gradients, strict=True) if g is not None]
            if not used:
                return
            rows = partial(self._slow_rows, sorted(blocks), trained, used, of_pass.count)
            self._capture.on_route(rows, blocks, of_pass, used[0][1])

        if len(origins) == 1:
            origins[0].output.register_hook(lambda gradient: on_gradients([gradient]))  # type: ignore[no-untyped-call]
        else:
            torch.autograd.graph.register_multi_grad_hook([o.output for o in origins], on_gradients)

    @staticmethod
    def _slow_rows(
        blocks: Sequence[int], trained: Sequence[nn.Parameter], used: Sequence[tuple[Origin, Tensor]], batch: int
    ) -> list[tuple[int, Contribution]]:
        rows: list[list[Tensor]] = [[] for _ in blocks]
        for sample in range(batch):
            alone = [origin.order.only(gradient, batch, sample) for origin, gradient in used]
            try:
                found = torch.autograd.grad([o.output for o, _ in used], trained, alone, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise LayerError(
                    f"a parameter of shape {tuple(trained[0].shape)} cannot be split by sample: the outputs of the model that "
                    f"the loss "
                    f"uses depend on each other ({str(error).splitlines()[0][:80]}). Freeze it, or let the model return one of them"
                ) from error
            for of_block, parameter, gradient in zip(rows, trained, found, strict=True):
                of_block.append(torch.zeros_like(parameter).flatten() if gradient is None else gradient.detach().flatten())
        return [(block, torch.stack(of_block)) for block, of_block in zip(blocks, rows, strict=True)]


def _mixes(name: str) -> LayerError:
    return LayerError(
        f"the output of one sample alone depends on other rows of {name}: the model mixes the samples of a batch "
        f"there, and no row is a "
        f"sample's own. Leave the mixing out while recording, or freeze {name}"
    )


def _origins(outputs: Sequence[Tensor], batch: int) -> list[Origin]:
    """The outputs that keep the samples apart."""
    found = []
    for output in outputs:
        dims = [dim for dim in range(output.dim()) if output.shape[dim] == batch]
        if dims or (output.dim() and output.shape[0] and output.shape[0] % batch == 0):
            dim = 0 if output.shape[0] % batch == 0 and output.shape[0] else dims[0]
            found.append(Origin(output, SampleOrder(dim)))
    return found


def _generic(origin: Origin, weights: Tensor) -> Tensor:
    """A gradient at an output that is generic within each sample, times the weight of the sample."""
    gradient = torch.zeros_like(origin.output)
    # in half precision, sums over positions must not overflow
    scale = 1.0 if gradient.dtype in _LIMIT else 2.0**-6
    by_sample = origin.order.split_view(gradient, len(weights))
    by_sample[:] = (scale * weights).to(gradient).reshape(-1, *[1] * (by_sample.dim() - 1))
    generator = torch.Generator().manual_seed(0)
    for dim, size in enumerate(by_sample.shape[1:], 1):
        factors = torch.rand(size, generator=generator).add_(0.5) * torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(
            1
        )
        by_sample.mul_(factors.to(gradient).reshape([size if d == dim else 1 for d in range(by_sample.dim())]))
    return gradient


def _uncoupled(at_inputs: Sequence[Tensor | None], at_outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """What a batch normalisation hands on to samples whose own outputs have no gradient is left out of a probe."""
    gradient, at_input = at_outputs[0], at_inputs[0]
    if gradient is None or at_input is None or gradient.dim() < 2 or len(gradient) != len(at_input):
        return None
    own = (gradient != 0).flatten(1).any(1).reshape(-1, *[1] * (at_input.dim() - 1))
    return (at_input * own, *at_inputs[1:])


def _sizes(rows: Sequence[tuple[int, Contribution]], of_pass: Pass) -> Tensor:
    """Upper bounds of the norms of a block's rows, by sample of the pass, shape (B,), float64."""
    sizes = torch.zeros(of_pass.count, dtype=torch.float64)
    for first, value in rows:
        bounds = bounds_of(value).double().cpu()
        sizes[first - of_pass.first :][: len(bounds)] += bounds
    return sizes


def _missing(rows: Sequence[tuple[int, Contribution]], total: Tensor | None, parameter: nn.Parameter) -> tuple[float, float]:
    """Norm of the difference between what rows sum to and torch's gradient, and of the gradient.

    Both are multiplied by one random vector, so that no row is written out (Freivalds, see `hydra_pipe.maths.books`).
    """
    outputs = len(parameter) if parameter.dim() else 1
    probe = torch.randn(parameter.numel() // max(outputs, 1), generator=torch.Generator().manual_seed(0)).to(parameter)
    wanted = torch.zeros_like(parameter) if total is None else total.detach()
    difference = wanted.reshape(outputs, -1) @ probe
    size = float(torch.linalg.vector_norm(difference))
    for _, value in rows:
        if isinstance(value, TokenRows):
            difference = difference - value.sum_times(probe.to(value.values)).to(probe)
        elif not isinstance(value, Factors) or value.given_right is None:
            of_rows = value.left.sum((0, 1)) if isinstance(value, Factors) else rows_of(value).sum(0)
            difference = difference - of_rows.reshape(outputs, -1).to(probe) @ probe
        else:
            times = value.right_times(probe.to(value.left)[None])
            difference = difference - (value.left.flatten(0, 1).T @ times.flatten()).to(probe)
    return float(torch.linalg.vector_norm(difference)), size
