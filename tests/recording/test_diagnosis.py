"""What cannot be recorded is named before training, and a block that is off the books with its
cause.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from hydra_pipe import Recorder
from hydra_pipe.errors import (
    GradientMismatchError,
    HydraError,
    LayerError,
    OptimizerError,
    RecordError,
    UsageError,
)
from hydra_pipe.integrations.refusals import refuse_training_arguments, unnamed_pass
from hydra_pipe.recording import checked_steps, collectives
from hydra_pipe.recording.explanations import Evidence, explain, penalty_of
from hydra_pipe.recording.refusals import refuse

N = 8
X, Y = torch.randn(N, 12, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3

# what torch says of its own old ways, and to its compiler, which looks at every tensor of the hooks
OLD_WAYS = (
    "ignore:.*:DeprecationWarning",
    "ignore:.*:FutureWarning",
    "ignore:The .grad attribute:UserWarning",
)
pytestmark = [pytest.mark.filterwarnings(of_torch) for of_torch in OLD_WAYS]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


class Net(nn.Module):
    """One of a class of its own: torch.compile treats torch's otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x).relu())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    run: Path,
    model: nn.Module,
    *,
    watched: nn.Module | None = None,
    optimizer: Any = None,
    loss: Callable[[], torch.Tensor] | None = None,
    before_step: Callable[[], object] | None = None,
    steps: int = 2,
    zero_grad: bool = True,
) -> None:
    """Record some steps of `model`; `watched` is what the recorder is given."""
    optimizer = optimizer or sgd(model)
    recorder = Recorder(model if watched is None else watched, optimizer, run, n_samples=N)
    try:
        for _ in range(steps):
            with recorder.step(torch.arange(N)):
                (F.cross_entropy(model(X), Y) if loss is None else loss()).backward()
                if before_step is not None:
                    before_step()
                optimizer.step()
                if zero_grad:
                    optimizer.zero_grad()
        recorder.close()
    finally:
        recorder.fail(RecordError("the test is over"))


def refusal(model: nn.Module, optimizer: Any = None) -> str:
    """What `Recorder(...)` says of it."""
    with pytest.raises(HydraError) as found:
        Recorder(
            model,
            optimizer if optimizer is not None else sgd(model),
            "/nowhere/at/all",
            n_samples=N,
        )
    assert isinstance(found.value, LayerError | OptimizerError)
    return str(found.value)


def meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def shared() -> nn.Module:
    model = mlp()
    model[2].share_memory()
    return model


def in_backward() -> nn.Module:
    model = mlp()
    # which warns when it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model[2].parameters(), {"lr": 0.1})
    return model


def of_dtype(dtype: torch.dtype) -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype))
    return model


def empty() -> nn.Module:
    model = mlp()
    model.extra = nn.Parameter(torch.empty(0))
    return model


class Wrapping(torch.Tensor):
    """A tensor that keeps its values in another form."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "Wrapping":
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, requires_grad=True
        )  # type: ignore[attr-defined]

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: args[0])  # type: ignore[assignment]


def wrapping() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(Wrapping(torch.zeros(16, 12)))
    return model


def embeddings(kind: type[nn.Module], **options: Any) -> nn.Module:
    return nn.Sequential(nn.Identity(), kind(9, 4, **options), nn.Linear(4, 3))


def on_two_gpus() -> nn.Module:
    model = nn.DataParallel(mlp())
    model.device_ids = [0, 1]
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (
        lambda: torch.jit.script(mlp()),
        r"the model .* torch\.jit\.script.*train the module that it was made of",
    ),
    "traced": (lambda: torch.jit.trace(mlp(), X), r"the model .* torch\.jit\.trace"),
    "scripted part": (
        lambda: nn.Sequential(mlp(), torch.jit.script(nn.Linear(3, 3))),
        r"^1 .* torch\.jit\.script",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LazyLinear(3)),
        r"parameter 1\.weight has no shape yet.*call the model once",
    ),
    "meta": (meta, r"parameter 0\.weight is on the meta device and has no values"),
    "shared": (
        shared,
        r"parameter 2\.weight is in memory shared with other processes.*copy\.deepcopy\(model\)",
    ),
    "in backward": (in_backward, r"parameter 2\.weight is updated within the backward pass"),
    "float8": (
        lambda: of_dtype(torch.float8_e4m3fn),
        r"parameter 0\.weight is torch\.float8_e4m3fn: train it in float32",
    ),
    "complex": (
        lambda: of_dtype(torch.complex64),
        r"parameter 0\.weight is torch\.complex64.*only dense real ones",
    ),
    "empty": (empty, r"parameter extra has no elements: freeze it"),
    "another form": (
        wrapping,
        r"parameter 0\.weight is a .*Wrapping, whose values are kept in another form",
    ),
    "sparse": (
        lambda: embeddings(nn.Embedding, sparse=True),
        r"^1 \(Embedding\) has sparse=True.*sparse=False",
    ),
    "sparse bag": (
        lambda: embeddings(nn.EmbeddingBag, sparse=True, mode="sum"),
        r"^1 \(EmbeddingBag\) has sparse=True",
    ),
    "frequency": (
        lambda: embeddings(nn.Embedding, scale_grad_by_freq=True),
        r"^1 \(Embedding\) has scale_grad_by_freq=True",
    ),
    "sync": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(12))),
        r"^0 \(SyncBatchNorm\).*BatchNorm",
    ),
    "two GPUs": (
        on_two_gpus,
        r"the model \(DataParallel\) copies the model to 2 GPUs.*DistributedDataParallel",
    ),
}


@pytest.mark.parametrize(("build", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_recorded_is_named_before_training(
    build: Callable[[], nn.Module], said: str
) -> None:
    assert re.search(said, refusal(build()))


def frozen(part: nn.Module) -> nn.Module:
    return part.requires_grad_(False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(torch.jit.script(frozen(nn.Linear(12, 12))), mlp()),
        lambda: nn.Sequential(
            nn.Linear(12, 12),
            nn.ModuleList([frozen(nn.Embedding(9, 4, sparse=True))]).append(mlp())[1],
        ),
        lambda: nn.Sequential(frozen(nn.SyncBatchNorm(12)).eval(), mlp()),
        lambda: nn.DataParallel(mlp()),
    ],
    ids=["scripted", "sparse", "sync", "DataParallel of one device"],
)
def test_what_is_frozen_or_does_nothing_is_let_through(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    model = build()
    train(tmp_path / "run", model)


def test_parameters_on_several_devices_are_named() -> None:
    class Elsewhere(nn.Parameter):
        device = property(lambda self: torch.device("cuda:1"))  # type: ignore[assignment]

    model = mlp()
    model[2].weight = Elsewhere(model[2].weight.detach())
    assert re.search(
        r"several devices \(0\.weight on cpu, 2\.weight on cuda:1\).*put the whole model on one",
        refusal(model),
    )


def test_cuda_graphs_are_named() -> None:
    def make_graphed_callables() -> Any:
        return lambda x: x

    model = Net()
    model.head.forward = make_graphed_callables()
    assert re.search(r"^head \(Linear\) runs as a CUDA graph", refusal(model))


# compiled code


@pytest.fixture
def compiler() -> Iterator[Any]:
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, backend="eager")
    torch._dynamo.reset()


def called(module: nn.Module) -> nn.Module:
    module(X)
    return module


def part_called(compiler: Any) -> nn.Module:
    return called(nn.Sequential(compiler(mlp()), nn.Identity()))


def in_place(compiler: Any) -> nn.Module:
    model = Net()
    model.compile(backend="eager")
    return called(model)


def forward_called(compiler: Any) -> nn.Module:
    class Compiled(Net):
        forward = compiler(Net.forward)

    return called(Compiled())


def wrapped_elsewhere(compiler: Any, model: nn.Module) -> nn.Module:
    model.of_loop = [compiler(model)]  # a list, so that it is no part of the model
    called(model.of_loop[0])
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda compiler: called(compiler(mlp())),
        lambda compiler: called(compiler(Net())),
        part_called,
        in_place,
        forward_called,
        lambda compiler: wrapped_elsewhere(compiler, Net()),
        lambda compiler: wrapped_elsewhere(compiler, mlp()),
    ],
    ids=[
        "given",
        "of another class",
        "part",
        "in place",
        "forward",
        "inner given",
        "inner of torch's class given",
    ],
)
def test_a_model_that_was_compiled_and_called_before_is_named_and_reset_is_a_way_out(
    tmp_path: Path, compiler: Any, build: Callable[[Any], nn.Module]
) -> None:
    model = build(compiler)
    assert re.search(
        r"compiled by torch\.compile and called before the Recorder.*torch\._dynamo\.reset\(\)",
        refusal(model),
    )
    torch._dynamo.reset()
    train(tmp_path / "run", getattr(model, "of_loop", [model])[0], watched=model)


def test_another_model_of_the_class_that_was_compiled_and_called_before_is_named(
    compiler: Any,
) -> None:
    called(compiler(Net()))
    model = Net()
    of_loop = compiler(model)  # with which the first one's code is shared
    assert re.search(r"the model \(Net\) was compiled", refusal(model))
    del of_loop


def test_a_model_that_is_compiled_first_when_the_recorder_is_there_is_recorded(
    tmp_path: Path, compiler: Any
) -> None:
    train(tmp_path / "given", compiler(Net()))
    torch._dynamo.reset()
    model = Net()
    train(tmp_path / "inner", compiler(model), watched=model)


def test_a_model_whose_copy_was_compiled_is_recorded(tmp_path: Path, compiler: Any) -> None:
    copy = compiler(Net())
    called(copy)
    train(tmp_path / "run", Net())


def test_a_compiled_training_step_is_the_first_cause_that_is_told(
    tmp_path: Path, compiler: Any
) -> None:
    model = mlp()
    loss = torch.compile(lambda: F.cross_entropy(model(X), Y), backend="eager")
    loss()
    with pytest.raises(
        GradientMismatchError,
        match=r"cause: \(1\) the loop calls it within a function that torch\.compile made",
    ):
        train(tmp_path / "run", model, loss=loss)


# sharded


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp(part: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(part, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2() -> nn.Module:
    model = mlp()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return model


def tensor_parallel() -> nn.Module:
    return parallelize_module(
        mlp(), dist.device_mesh.init_device_mesh("cpu", (1,)), {"2": ColwiseParallel()}
    )


def deepspeed_zero() -> nn.Module:
    model = mlp()
    model[2].weight.ds_id = 3  # type: ignore[assignment]
    return model


SHARDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP": (lambda: fsdp(mlp()), r"the model is sharded by FullyShardedDataParallel"),
    "FSDP of a part": (
        lambda: nn.Sequential(nn.Linear(12, 12), fsdp(mlp())),
        r"^1 is sharded by FullyShardedDataParallel",
    ),
    "FSDP2": (fsdp2, r"the model is sharded by fully_shard"),
    "tensor parallel": (tensor_parallel, r"parameter 2\.weight is sharded by .*tensor parallelism"),
    "DeepSpeed": (deepspeed_zero, r"parameter 2\.weight is sharded by DeepSpeed ZeRO"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "said"), SHARDED.values(), ids=SHARDED)
def test_a_sharded_model_is_named_in_one_process_too(
    group: None, build: Callable[[], nn.Module], said: str
) -> None:
    assert re.search(said + ".*DistributedDataParallel", refusal(build()))


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_of_several_processes_is_not_asked_to_be_wrapped(
    group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(collectives, "n_processes", lambda: 2)
    model = fsdp(mlp())
    with pytest.raises(RecordError, match="sharded by FullyShardedDataParallel"):
        Recorder(model, sgd(model), tmp_path / "run", n_samples=N)


# optimizers


class AdamW(torch.optim.AdamW):
    """A subclass that has the name of what it is of."""


class Namesake(torch.optim.Optimizer):
    """Another library's, by the name of torch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


Namesake.__module__, Namesake.__qualname__ = "bitsandbytes.optim.adamw", "AdamW"


class Lookahead(torch.optim.Optimizer):
    """A wrapper that changes the update."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


def zero_redundancy(model: nn.Module) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda m: AdamW(m.parameters()),
            r"test_diagnosis\.AdamW is not handled: it is a subclass of torch\.optim\.AdamW",
        ),
        (
            lambda m: Namesake(m.parameters()),
            r"bitsandbytes\.optim\.adamw\.AdamW is not handled: it is of "
            r'bitsandbytes.*"adamw_torch"',
        ),
        (
            lambda m: Lookahead(sgd(m)),
            r"Lookahead is not handled: it is a wrapper around torch\.optim\.SGD",
        ),
        (zero_redundancy, r"ZeroRedundancyOptimizer is not handled: it is sharded over processes"),
        (
            lambda m: [],
            r"list is not handled: it is no optimizer; give the optimizer of the model's",
        ),
        (
            lambda m: torch.optim.Adadelta(m.parameters()),
            r"torch\.optim\.Adadelta is not handled\. hydra-pipe knows .*torch\.optim\.Muon:",
        ),
    ],
    ids=["subclass", "namesake", "wrapper", "sharded", "none", "other"],
)
def test_an_optimizer_is_named_by_where_it_comes_from(
    group: None, build: Callable[[nn.Module], Any], said: str
) -> None:
    model = mlp()
    assert re.search(said, refusal(model, build(model)))


def accelerated(model: nn.Module) -> tuple[nn.Module, Any]:
    accelerate = pytest.importorskip("accelerate")
    # which an earlier trainer of the process, that accumulated, has left
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))


def of_fabric(model: nn.Module) -> tuple[nn.Module, Any]:
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu", devices=1).setup(
        model, torch.optim.AdamW(model.parameters())
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [accelerated, of_fabric])
def test_the_optimizer_within_a_trainers_wrapper_is_recorded(
    tmp_path: Path, wrap: Callable[..., tuple[nn.Module, Any]]
) -> None:
    model, optimizer = wrap(mlp())
    assert type(optimizer) is not torch.optim.AdamW
    train(tmp_path / "run", model, optimizer=optimizer)


# books that do not balance


def hidden(function: Callable[..., Any], name: str) -> nn.Module:
    """A model whose last module computes its weight from what is trained."""
    model = mlp()
    function(model[2], name)
    return model


@pytest.mark.parametrize(
    ("function", "name", "said"),
    [
        (
            nn.utils.weight_norm,
            "2.weight_g",
            r"weight of 2 is computed from weight_g by weight_norm.*remove_weight_norm\(module",
        ),
        (
            nn.utils.spectral_norm,
            "2.weight_orig",
            r"weight of 2 is computed from weight_orig by spectral_norm",
        ),
        (
            lambda module, name: prune.random_unstructured(module, name, 0.3),
            "2.weight_orig",
            r"weight of 2 is pruned \(RandomUnstructured\).*prune\.remove\(module, 'weight'\)",
        ),
        (
            parametrizations.spectral_norm,
            "2.parametrizations.weight.original",
            r"weight of 2 is parametrized \(SpectralNorm\).*remove_parametrizations\(module, "
            r"'weight'\)",
        ),
        (
            parametrizations.weight_norm,
            "2.parametrizations.weight.original0",
            r"weight of 2 is parametrized \(WeightNorm\)",
        ),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrized", "parametrized in two"],
)
def test_a_weight_that_is_computed_is_told_as_such(
    function: Callable[..., Any], name: str, said: str
) -> None:
    model = hidden(function, "weight")
    for has_rows in (True, False):
        found = explain(model, sgd(model), name, Evidence(has_rows=has_rows))
        assert re.search(said, found)
        assert "F.linear" not in found


def test_a_parameter_of_a_parametrization_is_told_as_such() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(3, 16))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.by

    model = mlp()
    nn.utils.parametrize.register_parametrization(model[2], "weight", Scale())
    assert re.search(
        r"weight of 2 is parametrized \(Scale\)",
        explain(model, None, "2.parametrizations.weight.0.by"),
    )


def hooked(model: nn.Module, register: str) -> nn.Module:
    def change(value: torch.Tensor) -> torch.Tensor | None:
        if register == "register_hook":
            return value * torch.linspace(1, 2, 16)
        assert value.grad is not None
        value.grad.mul_(torch.linspace(1, 2, 16))
        return None

    getattr(model[2].weight, register)(change)
    return model


def penalised(
    model: nn.Module, penalty: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    return lambda: (
        F.cross_entropy(model(X), Y) + 0.05 * sum(penalty(p).sum() for p in model.parameters())
    )


def functional_head(model: nn.Module, *, too: bool) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        inner = model[:2](X) if not too else model[1](model[0](X))
        output = F.linear(inner, model[2].weight, model[2].bias)
        return F.cross_entropy(output + model(X) if too else output, Y)

    return loss


def test_a_penalty_in_the_loss_is_told_as_such(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(
        GradientMismatchError,
        match=r"direction of an L2 penalty on .*: use the optimizer's weight_decay",
    ):
        train(tmp_path / "l2", model, loss=penalised(model, torch.square))
    model = mlp()
    with pytest.raises(
        GradientMismatchError, match=r"direction of an L1 penalty on .*: leave it out"
    ):
        train(tmp_path / "l1", model, loss=penalised(model, torch.abs))


@pytest.mark.parametrize(("encoding", "dim"), [("exact", 4096), ("projected", 64)])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_penalty_is_found_in_any_encoding(
    tmp_path: Path, encoding: Any, dim: int, optimizer: Any
) -> None:
    model = mlp()
    used = optimizer(model.parameters(), lr=0.01)
    recorder = Recorder(model, used, tmp_path / "run", n_samples=N, encoding=encoding, dim=dim)

    def take() -> None:
        with recorder.step(torch.arange(N)):
            penalised(model, torch.square)().backward()
            used.step()

    with pytest.raises(GradientMismatchError, match="L2 penalty"):
        take()


def test_a_hook_on_a_parameter_is_told_as_such(tmp_path: Path) -> None:
    register = "register_post_accumulate_grad_hook"
    with pytest.raises(GradientMismatchError, match=r"A hook on 2\.weight itself"):
        train(tmp_path / "run", hooked(mlp(), register))


def test_another_hook_of_the_optimizer_is_told_as_such(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)

    def noise(*_: Any) -> None:
        for parameter in model.parameters():
            parameter.grad.add_(torch.randn(parameter.shape))

    optimizer.register_step_pre_hook(noise)
    with pytest.raises(GradientMismatchError, match=r"Another hook of the optimizer"):
        train(tmp_path / "run", model, optimizer=optimizer)


def test_a_graph_of_functions_is_recorded(tmp_path: Path) -> None:
    train(tmp_path / "run", torch.export.export(mlp(), (X,)).module())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("head", r"2 \(Linear\) was not called, and its weight is used by a function"),
        ("head too", r"is used by a function too, beside 2 \(Linear\)"),
        (
            "clipped",
            r"cause: \(1\) the largest elements of the gradient are all of magnitude 0\.01, as "
            r"after clip_grad_value_",
        ),
        ("by hand", r"the loop changed \.grad by hand"),
        ("not cleared", r"earlier step is still there: call optimizer\.zero_grad\(\)"),
    ],
)
def test_causes_that_are_left_are_listed_with_a_way_out_each(
    tmp_path: Path, case: str, said: str
) -> None:
    model = mlp()

    def noise() -> None:
        model[2].weight.grad.add_(torch.randn(3, 16))

    options: dict[str, Any] = {
        "head": {"loss": functional_head(model, too=False)},
        "head too": {"loss": functional_head(model, too=True)},
        "clipped": {"before_step": lambda: nn.utils.clip_grad_value_(model.parameters(), 0.01)},
        "by hand": {"before_step": noise},
        "not cleared": {"zero_grad": False, "steps": 3},
    }[case]
    with pytest.raises(GradientMismatchError, match=said) as found:
        train(tmp_path / "run", model, **options)
    assert "penalty on" not in str(found.value)


def test_what_the_other_owner_of_a_tied_parameter_is_called_is_told() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    assert "it is also 1.weight" in explain(model, None, "0.weight", Evidence(has_rows=False))


@pytest.mark.parametrize(
    "holder", [nn.ParameterList([torch.ones(3)]), nn.ParameterDict({"0": torch.ones(3)})]
)
def test_a_list_of_parameters_is_told_as_such(holder: nn.Module) -> None:
    model = mlp()
    model.listed = holder
    assert f"listed.0 is in a {type(holder).__name__}, which is never called" in explain(
        model, None, "listed.0"
    )


def test_passes_beyond_the_batches_are_the_first_cause() -> None:
    found = explain(mlp(), None, "0.weight", Evidence(passes=2, batches=1))
    assert "(1) the model was called 2 times for 1 batches" in found
    assert "with recorder.paused():" in found


def test_test_gradients_are_not_laid_to_the_loop() -> None:
    found = explain(mlp(), None, "0.weight", Evidence(training=False))
    assert "zero_grad" not in found
    assert "paused" not in found


def test_few_features_prove_no_penalty() -> None:
    value = np.array([1.0, -1.0])
    assert penalty_of(value, value, np.sign(value)) is None
    value = np.arange(1.0, 10.0)
    assert penalty_of(-3 * value, value, np.sign(value)) == "L2"
    assert penalty_of(3 * np.ones(9), value, np.sign(value)) == "L1"
    assert penalty_of(np.zeros(9), value, np.sign(value)) is None


# half precision


def test_a_gradient_that_overflowed_where_no_share_did_is_told_as_such(tmp_path: Path) -> None:
    model = mlp()

    def overflow() -> None:
        model[2].weight.grad[0, 0] = torch.inf

    with pytest.raises(
        GradientMismatchError,
        match=(
            r"gradient of 2\.weight is not finite at step 0, and each sample's share "
            r"is.*GradScaler"
        ),
    ):
        train(tmp_path / "run", model, before_step=overflow)


@pytest.mark.parametrize(
    ("precision", "limit"), [("highest", 1e-4), ("high", 1e-3), ("medium", 1e-2)]
)
def test_products_of_fewer_bits_have_a_wider_limit(precision: str, limit: float) -> None:
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert checked_steps.imbalance_limit(torch.float32) == limit
        assert checked_steps.imbalance_limit(torch.float64) == 1e-6
    finally:
        torch.set_float32_matmul_precision(was)


# trainers


def arguments(
    kind: str = "TrainingArguments", home: str = "transformers.training_args", **options: Any
) -> Any:
    return type(kind, (SimpleNamespace,), {"__module__": home})(**options)


def trl(kind: str, **options: Any) -> Any:
    return arguments(kind, f"trl.trainer.{kind.lower()}", **options)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            arguments(use_liger_kernel=True),
            r"use_liger_kernel=True takes the loss from the weight of the "
            r"head.*use_liger_kernel=False",
        ),
        (
            arguments(parallelism_config=SimpleNamespace(tp_size=2)),
            r"parallelism_config has tp_size=2",
        ),
        (
            trl("SFTConfig", packing=True, loss_type="nll"),
            r"packing=True puts several samples into one sequence",
        ),
        (trl("SFTConfig", padding_free=True, loss_type="nll"), r"padding_free=True"),
        (trl("SFTConfig", loss_type=None), r'loss_type=None of SFTConfig.*loss_type="nll"'),
        (trl("SFTConfig", loss_type="chunked_nll"), r"loss_type='chunked_nll' of SFTConfig"),
        (
            trl("DPOConfig", loss_type="sigmoid"),
            r"the trainer of DPOConfig puts its batches together itself.*hydra_pipe\.Recorder",
        ),
        (trl("GRPOConfig"), r"the trainer of GRPOConfig"),
    ],
    ids=[
        "liger",
        "tensor parallel",
        "packing",
        "padding free",
        "chunked by default",
        "chunked",
        "DPO",
        "GRPO",
    ],
)
def test_options_of_trainers_that_hide_samples_are_named(args: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        refuse_training_arguments(args)


def test_options_of_trainers_that_hide_nothing_are_let_through(tmp_path: Path) -> None:
    refuse_training_arguments(trl("SFTConfig", packing=False, loss_type="nll"))
    transformers = pytest.importorskip("transformers")
    refuse_training_arguments(transformers.TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_pass_without_the_ids_of_its_batch_is_described() -> None:
    found = unnamed_pass(mlp(), {"input_ids": X, "attention_mask": X})
    assert "called Sequential with input_ids=, attention_mask=, without the sample ids" in found
    assert "next_batch" in found


def test_nothing_is_imported_to_ask_about_it() -> None:
    before = set(sys.modules)
    model = mlp()
    refuse(model, sgd(model), {p: (name, 0) for name, p in model.named_parameters()})
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"torch", "hydra_pipe"}
