"""Rules of nodes of the autograd graph against their slow twin: the node's own backward, one sample
at a time.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.per_sample import node_rules
from hydra_pipe.per_sample.factors import rows_of
from hydra_pipe.per_sample.node_call import NodeCall
from hydra_pipe.per_sample.nodes import slow_gradients_by_sample
from hydra_pipe.per_sample.orders import FIRST, SampleOrder, order_of

BATCH = 3
Output = Tensor | tuple[Tensor, ...]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(random(*shape, seed=1))


def lstm(**options: object) -> Output:
    torch.manual_seed(0)
    # oneDNN has no other dtype
    output, (hidden, cell) = nn.LSTM(8, 6, **options)(random(7, BATCH, 8).float())
    return output, hidden, cell


X = random(BATCH, 5, 8)
CASES: dict[str, tuple[str, Callable[[], Output]]] = {
    "linear, five positions": (
        "AddmmBackward0",
        lambda: nn.Linear(8, 7).double()(X.reshape(-1, 8)),
    ),
    "linear without a bias": ("MmBackward0", lambda: F.linear(X, parameter(7, 8))),
    "a parameter on the left": ("MmBackward0", lambda: parameter(4, 8) @ X[:, 0].T),
    "added": ("AddBackward0", lambda: torch.add(X, parameter(1, 5, 8), alpha=2)),
    "subtracted": ("SubBackward0", lambda: X - parameter(8)),
    "multiplied": ("MulBackward0", lambda: X * parameter(8)),
    "multiplied by a scalar": ("MulBackward0", lambda: parameter() * X),
    "divided": ("DivBackward0", lambda: parameter(5, 1) / (X**2 + 1)),
    "expanded": ("ExpandBackward0", lambda: parameter(1, 5, 8).expand(BATCH, -1, -1) + 0),
    "looked up": (
        "EmbeddingBackward0",
        lambda: F.embedding(torch.arange(12).reshape(BATCH, 4) % 5, parameter(6, 4), padding_idx=2),
    ),
    "convolution, two pictures a sample": (
        "ConvolutionBackward0",
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1).double()(
            random(2 * BATCH, 4, 7, 7)
        ),
    ),
    "transposed convolution": (
        "ConvolutionBackward0",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2).double()(random(BATCH, 4, 5, 5)),
    ),
    "batch norm": (
        "NativeBatchNormBackward0",
        lambda: nn.BatchNorm2d(4).double()(random(2 * BATCH, 4, 5, 5)),
    ),
    "batch norm in eval mode": (
        "NativeBatchNormBackward0",
        lambda: nn.BatchNorm2d(4).double().eval()(random(BATCH, 4, 5, 5)),
    ),
    "group norm": (
        "NativeGroupNormBackward0",
        lambda: nn.GroupNorm(2, 4).double()(random(BATCH, 4, 5, 5)),
    ),
    "layer norm": ("NativeLayerNormBackward0", lambda: nn.LayerNorm(8).double()(X)),
    "PReLU": ("PreluKernelBackward0", lambda: nn.PReLU(5).double()(X)),
    "LSTM": ("MkldnnRnnLayerBackward0", lstm),
    "LSTM, both ways": ("MkldnnRnnLayerBackward0", lambda: lstm(bidirectional=True)),
    "LSTM, two layers": ("MkldnnRnnLayerBackward0", lambda: lstm(num_layers=2)),
    "LSTM without biases": ("MkldnnRnnLayerBackward0", lambda: lstm(bias=False)),
}


def order(gradient: Tensor) -> SampleOrder:
    return next(
        (SampleOrder(dim) for dim in range(gradient.dim()) if gradient.shape[dim] == BATCH), FIRST
    )


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_the_rows_of_the_nodes_own_backward(name: str) -> None:
    kind, make = CASES[name]
    made = make()
    outputs = made if isinstance(made, tuple) else (made,)
    compared: list[int] = []

    def hook(gradients: Sequence[Tensor | None]) -> None:
        node = torch._C._current_autograd_node()
        shapes = {
            slot: tuple(
                below.variable.shape
                if hasattr(below, "variable")
                else below._input_metadata[output].shape
            )
            for slot, (below, output) in enumerate(node.next_functions)
            if below is not None
        }
        call = NodeCall(
            node, gradients, [None if g is None else order(g) for g in gradients], BATCH, shapes
        )
        slow = slow_gradients_by_sample(call, shapes)
        for slot, value in node_rules.RULES[kind](call).items():
            rows = rows_of(value)
            torch.testing.assert_close(
                rows,
                slow[slot].to(rows.dtype),
                rtol=1e-5 if rows.dtype == torch.float32 else 1e-10,
                atol=1e-5,
            )
            compared.append(slot)

    waiting, seen = [x.grad_fn for x in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == kind:
            node.register_prehook(hook)
        waiting += [below for below, _ in node.next_functions]
    torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
    assert compared


@pytest.mark.parametrize(
    "wanted", [SampleOrder(dim, major) for dim in (0, 1) for major in (True, False)]
)
def test_an_order_is_found_from_the_gradient_of_one_sample(wanted: SampleOrder) -> None:
    values = random(6, 4) + 10
    for sample in range(2):
        alone = wanted.only(values, 2, sample)
        assert order_of(alone, 2, sample, wanted) == wanted
        assert torch.equal(wanted.split(alone, 2)[sample], wanted.split(values, 2)[sample])
        assert not wanted.split(alone, 2)[1 - sample].any()
    assert order_of(values, 2, 0, wanted) is None
