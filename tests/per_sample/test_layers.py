"""Layer rules against one backward pass a sample, in float64."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import one_by_one_gradients
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample import registry
from hydra_pipe.per_sample.conv import conv_rule
from hydra_pipe.per_sample.factors import Contribution, Factors, rows_of
from hydra_pipe.per_sample.linear import conv1d_of_transformers_rule, linear_rule
from hydra_pipe.per_sample.registry import Rule, register_layer_rule, rule_for

Rows = Mapping[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def written_out(contributions: Mapping[str, Contribution]) -> Rows:
    return {name: rows_of(c) for name, c in contributions.items()}


class Called(nn.Module):
    """Calls `inner` with the columns of one input matrix, so that the slow twin can feed modules of
    any signature.
    """

    def __init__(self, inner: nn.Module, widths: list[int], keywords: list[str]) -> None:
        super().__init__()
        self.inner, self.widths, self.keywords = inner, widths, keywords

    def arguments(self, inputs: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        parts = inputs.split(self.widths, dim=1)
        n = len(parts) - len(self.keywords)
        return parts[:n], dict(zip(self.keywords, parts[n:], strict=True))

    def forward(self, inputs: Tensor) -> Tensor:
        args, kwargs = self.arguments(inputs)
        return self.inner(*args, **kwargs)


def assert_rows_are_batch_of_one_gradients(
    module: nn.Module, inputs: Tensor, model: Called | None = None, rule: Rule | None = None
) -> None:
    """What the rule for `module`, or another, yields equals one backward pass for each sample."""
    module.double()
    args, kwargs = model.arguments(inputs) if model else ((inputs,), {})
    grad_output = random(*module(*args, **kwargs).shape, seed=1)
    names = own_names(module)
    with torch.no_grad():
        found = written_out((rule or rule_for(module))(module, args, kwargs, grad_output, names))
    prefix = "inner." if model else ""
    truth = one_by_one_gradients(
        model or module,
        lambda output, g: output * g,
        inputs,
        grad_output,
        [prefix + name for name in names],
    )
    assert sorted(found) == sorted(names)
    for name in names:
        expected = torch.stack([row[prefix + name].flatten() for row in truth])
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered rules, put back afterwards."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    positions=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
)
def test_linear_rows_are_batch_of_one_gradients(
    batch: int, positions: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias=bias)
    assert rule_for(module) is linear_rule
    assert_rows_are_batch_of_one_gradients(module, random(batch, *positions, inputs))


def test_a_linear_of_one_position_is_given_as_one_outer_product_whose_factor_the_bias_shares() -> (
    None
):
    module = nn.Linear(3, 2).double()
    inputs, grad_output = random(4, 3), random(4, 2, seed=1)
    found = linear_rule(module, (inputs,), {}, grad_output, ["weight", "bias"])
    weight, bias = found["weight"], found["bias"]
    assert isinstance(weight, Factors)
    assert isinstance(bias, Factors)
    assert weight.n_positions == 1
    # the encoder knows a weight's bias by the identity of this tensor
    assert bias.left is weight.left
    assert bias.right is None
    assert weight.right is not None
    assert weight.right.data_ptr() == inputs.data_ptr()


def test_a_linear_whose_input_and_gradient_are_not_contiguous_has_the_same_rows() -> None:
    module = nn.Linear(3, 2).double()
    inputs, grad_output = random(3, 5, 4).transpose(0, 2), random(2, 5, 4, seed=1).transpose(0, 2)
    found = written_out(linear_rule(module, (inputs,), {}, grad_output, ["weight", "bias"]))
    expected = written_out(
        linear_rule(
            module, (inputs.contiguous(),), {}, grad_output.contiguous(), ["weight", "bias"]
        )
    )
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows)


class Conv1D(nn.Module):
    """Stands in for the one of transformers, which is known by these two names."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(inputs, outputs, seed=4))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(
            *x.shape[:-1], -1
        )


class SubclassedConv1D(Conv1D):
    pass


@settings(max_examples=40, deadline=None)
@given(
    module_type=st.sampled_from([Conv1D, SubclassedConv1D]),
    batch=st.integers(1, 4),
    positions=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
)
def test_rows_of_transformers_conv1d_are_batch_of_one_gradients(
    module_type: type[Conv1D], batch: int, positions: list[int], inputs: int, outputs: int
) -> None:
    module = module_type(outputs, inputs)
    assert rule_for(module) is conv1d_of_transformers_rule
    assert_rows_are_batch_of_one_gradients(module, random(batch, *positions, inputs))


def test_a_rule_known_by_its_types_name_is_a_rule_like_others() -> None:
    with pytest.raises(LayerError, match=r"Conv1D.*conv1d_of_transformers_rule.*my_rule"):
        register_layer_rule(Conv1D, my_rule)
    module = Conv1D(3, 2)
    module.gain = nn.Parameter(torch.ones(3))
    assert rule_for(module) is None


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor]:
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(
        st.one_of(
            st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same")
        )
    )
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    torch.manual_seed(0)
    module = nn.Conv2d(
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 2)),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    )
    inputs = random(
        draw(st.integers(1, 3)),
        module.in_channels,
        draw(st.integers(5, 7)),
        draw(st.integers(5, 7)),
    )
    return module, inputs


# said of even kernels, where torch has to pad one side more than the other
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_conv2d_rows_are_batch_of_one_gradients(convolution: tuple[nn.Conv2d, Tensor]) -> None:
    module, inputs = convolution
    assert rule_for(module) is conv_rule
    assert_rows_are_batch_of_one_gradients(module, inputs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    "strided",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, :, ::2, 1:], id="sliced"),
        pytest.param(lambda x: x[:1, :, :, :1].expand(3, -1, -1, 6), id="expanded"),
    ],
)
def test_conv2d_takes_inputs_that_are_not_contiguous(
    strided: Any, padding: int, groups: int
) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(2, 4, 3, padding=padding, groups=groups)
    inputs = strided(random(3, 2, 8, 8))
    assert not inputs.is_contiguous()
    assert_rows_are_batch_of_one_gradients(module, inputs)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_takes_output_gradients_that_are_not_contiguous(groups: int) -> None:
    module = nn.Conv2d(2, 4, 3, groups=groups).double()
    inputs, grad_output = random(3, 2, 6, 6), random(3, 4, 4, 4, seed=1)
    expected = written_out(conv_rule(module, (inputs,), {}, grad_output, ["weight", "bias"]))
    for changed in (
        grad_output.to(memory_format=torch.channels_last),
        grad_output.mT.contiguous().mT,
    ):
        found = written_out(conv_rule(module, (inputs,), {}, changed, ["weight", "bias"]))
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows)


class Scaled(nn.Module):
    """A parameter of its own, a child with others, and an order of arithmetic that no registered
    rule knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(random(3))
        self.shift = nn.Parameter(random(2, 3, seed=2))
        self.child = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.child(inputs) * self.gain) @ self.shift.T + self.gain.pow(2).sum()


class Gated(nn.Module):
    """Two inputs and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(4, 3))

    def forward(self, inputs: Tensor, gate: Tensor | None = None, *, power: int = 1) -> Tensor:
        output = inputs @ self.weight.T
        return output if gate is None else output * gate.sigmoid() ** power


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 4),
    positions=st.integers(1, 5),
    outputs=st.integers(1, 4),
    inputs=st.one_of(st.none(), st.integers(1, 4)),
    seed=st.integers(0, 100),
)
def test_the_norms_of_factors_are_no_less_than_those_of_their_rows_and_equal_for_one_position(
    batch: int, positions: int, outputs: int, inputs: int | None, seed: int
) -> None:
    right = None if inputs is None else random(batch, positions, inputs, seed=seed + 1)
    factors = Factors(random(batch, positions, outputs, seed=seed), right)
    truth, bound = factors.rows().norm(dim=1), factors.norms()
    assert bool((bound >= truth * (1 - 1e-12)).all())
    if positions == 1:
        torch.testing.assert_close(bound, truth)
    # and of what the rows are sums of, which may cancel
    terms = [
        Factors(factors.left[:, p : p + 1], None if right is None else right[:, p : p + 1])
        for p in range(positions)
    ]
    assert bool((bound >= sum(term.rows().norm(dim=1) for term in terms) * (1 - 1e-12)).all())


@pytest.mark.parametrize(
    "module", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)], ids=lambda m: type(m).__name__
)
def test_only_the_wanted_parameters_are_split(module: nn.Module) -> None:
    module.double()
    inputs = random(2, 4, 5, 5) if isinstance(module, nn.Conv2d) else random(2, 4)
    grad_output = random(*module(inputs).shape, seed=1)
    names = own_names(module)
    every = written_out(rule_for(module)(module, (inputs,), {}, grad_output, names))
    for name in names:
        found = written_out(rule_for(module)(module, (inputs,), {}, grad_output, [name]))
        assert list(found) == [name]
        torch.testing.assert_close(found[name], every[name])


@pytest.mark.parametrize(
    "module", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)], ids=lambda m: type(m).__name__
)
def test_the_wanted_names_may_be_any_collection(module: nn.Module) -> None:
    module.double()
    inputs = random(2, 4, 5, 5) if isinstance(module, nn.Conv2d) else random(2, 4)
    grad_output = random(*module(inputs).shape, seed=1)
    names = own_names(module)
    assert sorted(rule_for(module)(module, (inputs,), {}, grad_output, frozenset(names))) == sorted(
        names
    )


@pytest.mark.parametrize("rule", [linear_rule, conv_rule])
def test_a_registered_rule_takes_its_input_by_keyword(rule: Rule) -> None:
    module: nn.Module = nn.Linear(4, 3) if rule is linear_rule else nn.Conv2d(4, 3, 2, padding=1)
    inputs = random(2, 4) if rule is linear_rule else random(2, 4, 3, 3)
    grad_output = random(*module.double()(inputs).shape, seed=1)
    expected = written_out(rule(module, (inputs,), {}, grad_output, ["weight", "bias"]))
    found = written_out(rule(module, (), {"input": inputs}, grad_output, ["weight", "bias"]))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=0, atol=0)


def test_a_linear_with_parameters_of_its_own_is_not_taken_for_a_linear() -> None:
    module = nn.Linear(4, 3)
    module.gain = nn.Parameter(torch.ones(3))
    assert rule_for(module) is None


def my_rule(*_: Any) -> dict[str, Contribution]:
    return {}


@pytest.mark.usefixtures("own_registry")
def test_a_second_rule_for_a_type_is_refused_and_both_are_named() -> None:
    with pytest.raises(LayerError, match=r"Linear.*linear_rule.*my_rule"):
        register_layer_rule(nn.Linear, my_rule)
    assert rule_for(nn.Linear(2, 2)) is linear_rule


@pytest.mark.usefixtures("own_registry")
def test_a_rule_that_is_registered_is_used_for_its_type_and_for_no_other() -> None:
    register_layer_rule(Scaled, my_rule)
    assert rule_for(Scaled()) is my_rule
    assert rule_for(Gated()) is None


class Halved(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) / 2


class Named(nn.Linear):
    def extra_repr(self) -> str:
        return "a name, and the forward of its parent"


class HalvedAgain(Halved):
    pass


@pytest.mark.parametrize(
    ("module", "rule"),
    [(Halved(3, 2), None), (HalvedAgain(3, 2), None), (Named(3, 2), linear_rule)],
)
def test_a_subclass_has_its_parents_rule_only_while_it_keeps_its_forward(
    module: nn.Module, rule: Rule | None
) -> None:
    assert rule_for(module) is rule
    if rule is not None:
        assert_rows_are_batch_of_one_gradients(module, random(4, 3))


@pytest.mark.usefixtures("own_registry")
def test_the_nearest_type_with_a_rule_decides() -> None:
    register_layer_rule(Halved, my_rule)
    assert rule_for(Halved(2, 2)) is my_rule
    assert rule_for(HalvedAgain(2, 2)) is my_rule


CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dims=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    batch=st.integers(1, 3),
)
def test_convolutions_of_every_dimension_and_their_transposes(
    data: st.DataObject, dims: int, groups: int, bias: bool, batch: int
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    transposed = data.draw(st.booleans())
    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 2), sizes(1, 2), sizes(0, 2)
    options = {
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "groups": groups,
        "bias": bias,
    }
    if transposed:
        options["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        options["padding_mode"] = data.draw(st.sampled_from(["zeros", "circular", "replicate"]))
    module = CONVOLUTIONS[dims][transposed](2 * groups, 2 * groups, kernel, **options)
    inputs = random(batch, 2 * groups, *sizes(5, 7))
    assert_rows_are_batch_of_one_gradients(module, inputs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    lead=st.lists(st.integers(1, 3), max_size=2),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    bias=st.booleans(),
    root=st.booleans(),
)
def test_norms_over_the_last_dimensions(
    batch: int, lead: list[int], shape: list[int], bias: bool, root: bool
) -> None:
    module = nn.RMSNorm(shape, eps=1e-5) if root else nn.LayerNorm(shape, bias=bias)
    nn.init.normal_(module.weight)
    assert_rows_are_batch_of_one_gradients(module, random(batch, *lead, *shape))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["GroupNorm", "InstanceNorm", "InstanceNorm in eval mode", "BatchNorm in eval mode"]
)
def test_norms_by_channel(kind: str, dims: int) -> None:
    inputs = random(4, 6, *[3, 2, 4][:dims])
    if kind == "GroupNorm":
        module = nn.GroupNorm(3, 6)
    else:
        tracked = {"track_running_stats": True} if "eval" in kind else {}
        module = getattr(nn, f"{kind.split()[0]}{dims}d")(6, affine=True, **tracked).double()
    nn.init.normal_(module.weight)
    if "eval" in kind:
        module(random(5, 6, *[3, 2, 4][:dims], seed=3))
        module.eval()
    assert_rows_are_batch_of_one_gradients(module, inputs)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_shares_of_a_batch_norm_in_training_sum_to_the_gradient_and_belong_to_their_sample(
    dims: int,
) -> None:
    """What goes through a sample's own normalised activations, with the statistics of the whole
    batch.
    """
    module = getattr(nn, f"BatchNorm{max(dims, 1)}d")(3).double()
    nn.init.normal_(module.weight)
    inputs, grad_output = random(5, 3, *[2] * dims), random(5, 3, *[2] * dims, seed=1)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        found = written_out(
            rule_for(module)(module, (inputs,), {}, grad_output, ["weight", "bias"])
        )
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    (module(inputs) * grad_output).sum().backward()
    torch.testing.assert_close(found["weight"].sum(0), module.weight.grad)
    torch.testing.assert_close(found["bias"].sum(0), module.bias.grad)
    normed = (module(inputs) - module.bias.reshape(1, 3, *[1] * dims)) / module.weight.reshape(
        1, 3, *[1] * dims
    )
    expected = (normed * grad_output).reshape(5, 3, -1).sum(2)
    torch.testing.assert_close(found["weight"], expected.detach())


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *product(("sum", "mean"), ("rows", "offsets", "last offset", "empty bag")),
        ("sum", "weights"),  # torch takes weights in sums only
    ],
)
def test_each_token_of_a_bag_gets_the_bags_gradient(
    mode: str, padding: int | None, form: str
) -> None:
    module = nn.EmbeddingBag(
        7, 3, mode=mode, padding_idx=padding, include_last_offset=form == "last offset"
    ).double()
    flat = torch.tensor([1, 2, 2, 5, 6, 1, 0, 2, 2, 3, 4, 1])
    ends = {"offsets": [0, 5, 6], "last offset": [0, 5, 6, 12], "empty bag": [0, 5, 5, 9]}.get(form)
    args: tuple[torch.Tensor, ...] = (flat.reshape(3, 4),)
    kwargs: dict[str, torch.Tensor] = {}
    if ends is not None:
        args = (flat, torch.tensor(ends))
    elif form == "weights":
        kwargs = {"per_sample_weights": random(3, 4, seed=2)}
    output = module(*args, **kwargs)
    grad_output = random(*output.shape, seed=1)
    with torch.no_grad():
        found = written_out(rule_for(module)(module, args, kwargs, grad_output, ["weight"]))
    for bag, row in enumerate(found["weight"]):
        (wanted,) = torch.autograd.grad(
            (output[bag] * grad_output[bag]).sum(), [module.weight], retain_graph=True
        )
        torch.testing.assert_close(row.reshape(7, 3), wanted)


def test_a_bag_of_maxima_is_left_to_the_graph() -> None:
    module = nn.EmbeddingBag(7, 3, mode="max")
    with pytest.raises(LayerError, match="has no rule of its own"):
        rule_for(module)(module, (torch.zeros(2, 3).long(),), {}, torch.ones(2, 3), ["weight"])


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_that_count_across_samples_are_refused(options: dict[str, bool]) -> None:
    module = nn.Embedding(4, 2, **options)
    with pytest.raises(LayerError, match="scale_grad_by_freq or sparse=True cannot be recorded"):
        rule_for(module)(
            module, (torch.zeros(3, dtype=torch.long),), {}, torch.ones(3, 2), ["weight"]
        )


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_the_norms_of_factors_in_half_precision_neither_overflow_nor_vanish(size: float) -> None:
    left, right = (
        torch.full((2, 3, 4), size, dtype=torch.float16),
        torch.full((2, 3, 5), 300.0, dtype=torch.float16),
    )
    expected = left.double().norm(dim=(1, 2)) * right.double().norm(dim=(1, 2))
    torch.testing.assert_close(Factors(left, right).norms().double(), expected, rtol=1e-3, atol=0.0)
