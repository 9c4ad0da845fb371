"""Each line of docs/what-can-be-recorded.md: recorded rows are the samples' gradients, and a
refusal has the page's words.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rows import differences, gradients_of_losses, shares_of_outputs, stored_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import HydraError, RecordWarning
from hydra_pipe.integrations.refusals import refuse_training_arguments
from hydra_pipe.per_sample import registry
from hydra_pipe.recording import collectives

PAGE = Path(__file__).parents[1] / "docs" / "what-can-be-recorded.md"
# samples, positions of each, features, classes
B, T, D, C = 6, 5, 8, 3
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 1])
TOKENS = torch.randint(1, 11, (B, T), generator=torch.Generator().manual_seed(1))

# model -> what the loss is a sum of, one term for each sample, shape (B,)
Losses = Callable[[nn.Module], Tensor]
# what the loop does with the recorder
Loop = Callable[[Recorder, nn.Module, torch.optim.Optimizer], object]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Of(nn.Module):
    """Modules and parameters by name, and the forward pass that is given."""

    def __init__(self, forward: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        self.given = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.given(self, x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, C))


def classifier(body: nn.Module) -> nn.Module:
    """`body`, and a head over the mean of all dimensions but the first and the last."""
    return Of(
        lambda m, x: m.head(m.body(x).flatten(1, -2).mean(1)), body=body, head=nn.Linear(D, C)
    )


def classified(model: nn.Module, x: Tensor = X) -> Tensor:
    """The mean of cross-entropy."""
    return F.cross_entropy(model(x), Y, reduction="none") / B


def of_means(model: nn.Module) -> Tensor:
    """The mean of cross-entropy, each sample one vector."""
    return classified(model, X.mean(1))


def one_step(
    losses: Losses,
    recorder: Recorder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Sequence[int] = range(B),
) -> None:
    """The usual loop."""
    with recorder.step(ids):
        losses(model).sum().backward()
        optimizer.step()


def recorded(
    run: Path,
    build: Callable[[], nn.Module] = mlp,
    losses: Losses = of_means,
    loop: Loop | None = None,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    shares: bool = False,
    tolerance: float = 1e-4,
    **options: Any,
) -> None:
    """Record `loop`; the rows of its first step are the gradients of `losses` in one pass over the
    whole batch.

    Args:
        run: directory of the run.
        build: of the model.
        losses: see `Losses`.
        loop: see `Loop`; None: one step on the sum of `losses`.
        optimizer: of the model.
        shares: whether a row is the part of the gradient that goes through the sample's own part of
            a module's output.
        tolerance: see `rows.differences`.
        options: of the recorder.
    """
    torch.manual_seed(0)
    model = build()
    used = optimizer(model)
    state = torch.get_rng_state()
    with Recorder(
        model, used, run, **{"n_samples": B, "encoding": "exact", "dtype": "float32"} | options
    ) as recorder:
        torch.set_rng_state(state)
        (loop or partial(one_step, losses))(recorder, model, used)
    torch.manual_seed(0)
    model = build()
    torch.set_rng_state(state)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    truth = (
        shares_of_outputs(model, lambda: losses(model), B)
        if shares
        else gradients_of_losses(losses(model), trained)
    )
    samples, rows = stored_rows(run)
    assert sorted(samples) == list(range(len(truth)))
    assert set(rows[0]) == set(trained)
    assert max(differences(rows, [truth[k] for k in samples]).values()) < tolerance


def body(
    build: Callable[[], nn.Module], losses: Losses = classified, **options: Any
) -> Callable[[Path], None]:
    """A case of a model with a head, on samples of several positions."""
    return lambda run: recorded(run, lambda: classifier(build()), losses, **options)


def refused_model(
    build: Callable[[], nn.Module], optimizer: Callable[[nn.Module], Any] = sgd
) -> Callable[[Path], None]:
    """A case of what the recorder refuses to begin with."""

    def case(run: Path) -> None:
        model = build()
        Recorder(model, optimizer(model), run, n_samples=B)

    return case


def several(*cases: Callable[[Path], None]) -> Callable[[Path], None]:
    """All of some cases."""

    def case(run: Path) -> None:
        for number, each in enumerate(cases):
            each(run / str(number))

    return case


def with_kind(kind: type[nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(kind, *args, **options)


# layers


def convolution(n_dims: int, *, transposed: bool = False) -> Callable[[Path], None]:
    sizes = (4, 3, 2)[:n_dims]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{n_dims}d")
    x = torch.randn(B, 4, *sizes, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        return nn.Sequential(
            kind(4, 8, 3, padding=1, groups=2),
            nn.Flatten(2),
            Of(lambda m, h: m.head(h.mean(2)), head=nn.Linear(D, C)),
        )

    return lambda run: recorded(run, build, partial(classified, x=x))


def channels_last(norm: nn.Module) -> nn.Module:
    """A normalisation by channel, of features that come last."""
    return Of(
        lambda m, x: m.norm(m.mix(x).transpose(1, 2)).transpose(1, 2).tanh(),
        norm=norm,
        mix=nn.Linear(D, D),
    )


class BatchNormAct(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def of_tokens(build: Callable[[], nn.Module]) -> Callable[[Path], None]:
    return lambda run: recorded(
        run,
        lambda: classifier(build()),
        lambda m: F.cross_entropy(m(TOKENS), Y, reduction="none") / B,
    )


def recurrent(kind: type[nn.Module], **options: Any) -> nn.Module:
    return Of(lambda m, x: m.net(x)[0], net=kind(D, D, batch_first=True, **options))


def cell(kind: type[nn.Module]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(T):
            state = m.cell(x[:, t], state)
        return (state[0] if isinstance(state, tuple) else state)[:, None]

    return Of(forward, cell=kind(D, D))


def packed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 5, 4, 3, 2, 1])
        return m.net(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0][:, None]

    return Of(forward, net=nn.GRU(D, D, batch_first=True))


def attending() -> nn.Module:
    return Of(
        lambda m, x: m.net(x, x, x, need_weights=False)[0],
        net=nn.MultiheadAttention(D, 2, 0.2, batch_first=True),
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)


def pruned() -> nn.Module:
    layer = nn.Linear(D, D)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def doubled(
    module: nn.Module, args: Any, kwargs: Any, gradient: Tensor, wanted: Any
) -> dict[str, Tensor]:
    return {"gain": 2 * (args[0] * gradient).sum(1)}


def wrong_rule(run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._RULES, Gain, doubled)
        body(Gain)(run)


LAYERS: dict[str, Callable[[Path], object]] = {
    "`Linear`": body(with_kind(nn.Linear, D, D)),
    "`Conv1d`, `Conv2d`, `Conv3d`": several(*map(convolution, (1, 2, 3))),
    "`ConvTranspose1d` to `3d`": several(*(convolution(n, transposed=True) for n in (1, 2, 3))),
    "`LayerNorm`, `RMSNorm`": several(
        body(with_kind(nn.LayerNorm, D)), body(with_kind(nn.RMSNorm, D))
    ),
    "`GroupNorm`, `InstanceNorm`": several(
        body(lambda: channels_last(nn.GroupNorm(2, D))),
        body(lambda: channels_last(nn.InstanceNorm1d(D, affine=True))),
    ),
    "`BatchNorm` in training mode": body(lambda: channels_last(nn.BatchNorm1d(D)), shares=True),
    "`BatchNorm` in eval mode": body(lambda: channels_last(nn.BatchNorm1d(D).eval())),
    "A subclass of `BatchNorm`": body(lambda: channels_last(BatchNormAct(D)), shares=True),
    "`Embedding`": of_tokens(with_kind(nn.Embedding, 11, D, padding_idx=0)),
    "`EmbeddingBag`": of_tokens(
        lambda: Of(lambda m, x: m.bag(x)[:, None], bag=nn.EmbeddingBag(11, D))
    ),
    "`PReLU`, `Bilinear`": several(
        body(lambda: nn.Sequential(nn.Linear(D, D), nn.PReLU())),
        body(lambda: Of(lambda m, x: m.both(x, x.tanh()), both=nn.Bilinear(D, D, D))),
    ),
    "`LSTM`": body(lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.3, bidirectional=False)),
    "`GRU`, `RNN`": several(
        body(lambda: recurrent(nn.GRU, num_layers=2, dropout=0.3)), body(lambda: recurrent(nn.RNN))
    ),
    "`LSTMCell`, `GRUCell`": several(
        body(lambda: cell(nn.LSTMCell)), body(lambda: cell(nn.GRUCell))
    ),
    "Packed sequences": body(packed),
    "`MultiheadAttention`": body(attending),
    "`TransformerEncoderLayer`": body(encoder),
    "`weight_norm`, `spectral_norm`": several(
        body(lambda: parametrizations.weight_norm(nn.Linear(D, D))),
        body(lambda: parametrizations.spectral_norm(nn.Linear(D, D))),
    ),
    "Pruned weights": body(pruned),
    "A module of your own": body(Gain),
    "A layer rule that is wrong": wrong_rule,
    "`Embedding(sparse=True)`": refused_model(with_kind(nn.Embedding, 11, D, sparse=True)),
    "`Embedding(scale_grad_by_freq=True)`": refused_model(
        with_kind(nn.Embedding, 11, D, scale_grad_by_freq=True)
    ),
    "`SyncBatchNorm`": refused_model(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(channels_last(nn.BatchNorm1d(D)))
    ),
    "Lazy modules": refused_model(with_kind(nn.LazyLinear, C)),
}


# models


def positions(shape: str) -> nn.Module:
    places = {"(T,)": torch.arange(T), "(1, T)": torch.arange(T)[None]}[shape]
    return Of(lambda m, x: (x + m.table(places)).tanh(), table=nn.Embedding(T, D))


def as_many_positions_as_samples(run: Path) -> None:
    x = torch.randn(B, B, D, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        return classifier(
            Of(lambda m, x: (x + m.table(torch.arange(B))).tanh(), table=nn.Embedding(B, D))
        )

    recorded(run, build, partial(classified, x=x))


def class_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.drop(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.places).tanh()

    return Of(
        forward,
        token=nn.Parameter(torch.randn(1, 1, D)),
        places=nn.Parameter(torch.randn(1, T + 1, D)),
        drop=nn.Dropout(0.3),
    )


def layer_scale() -> nn.Module:
    return Of(
        lambda m, x: x + m.gamma * m.inner(x),
        gamma=nn.Parameter(torch.rand(D)),
        inner=nn.Dropout(0.4),
    )


def temperature() -> nn.Module:
    return Of(lambda m, x: x.tanh() * m.t, t=nn.Parameter(torch.tensor(1.5)))


def lists() -> nn.Module:
    return Of(
        lambda m, x: x @ m.listed[0] + m.named["shift"],
        listed=nn.ParameterList([torch.randn(D, D)]),
        named=nn.ParameterDict({"shift": torch.randn(D)}),
    )


def functional() -> nn.Module:
    return Of(lambda m, x: m.a(x).tanh() + F.linear(x, m.a.weight), a=nn.Linear(D, D))


def tied() -> nn.Module:
    model = Of(lambda m, x: m.out(m.into(x).tanh()), into=nn.Linear(D, D), out=nn.Linear(D, D))
    model.out.weight = model.into.weight
    return model


def again() -> nn.Module:
    return Of(lambda m, x: m.a(m.a(x).relu_()), a=nn.Linear(D, D))


def chunks(size: int) -> nn.Module:
    return Of(
        lambda m, x: torch.cat([m.a(part).tanh() for part in x.split(size)]), a=nn.Linear(D, D)
    )


def windows() -> nn.Module:
    return Of(
        lambda m, x: m.norm(m.a(x.flatten(0, 1)).tanh()).unflatten(0, (-1, T)),
        a=nn.Linear(D, D),
        norm=nn.LayerNorm(D),
    )


def views() -> nn.Module:
    return Of(
        lambda m, x: m.a(torch.cat([x, x.flip(1)])).tanh().unflatten(0, (2, -1)).mean(0),
        a=nn.Linear(D, D),
    )


def time_first() -> nn.Module:
    return Of(
        lambda m, x: m.norm(m.a(x.transpose(0, 1))).transpose(0, 1),
        a=nn.Linear(D, D),
        norm=nn.LayerNorm(D),
    )


def pooled(forward: Callable[[Any, Any], Any]) -> nn.Module:
    return Of(forward, body=nn.Linear(D, D), head=nn.Linear(D, C))


def of_graphs(run: Path) -> None:
    """One tensor has the nodes of all graphs, and each graph has another number of them."""
    for sizes in ([2, 4, 3, 1, 5, 4], [2, 4, 3, 1, 5, 3]):  # with 18 nodes in 6 graphs too
        graph = torch.repeat_interleave(torch.arange(B), torch.tensor(sizes))
        nodes = torch.randn(len(graph), D, generator=torch.Generator().manual_seed(0))

        def forward(m: Any, x: Tensor, graph: Tensor = graph) -> Tensor:
            return m.head(torch.zeros(B, D).index_add(0, graph, m.body(x).tanh()))

        build = partial(pooled, forward)
        recorded(run / str(len(graph)), build, partial(classified, x=nodes))


def experts() -> nn.Module:
    """Sends each position to one of two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        flat, result = x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], D)
        for k, expert in enumerate(m.experts):
            chosen = (flat[:, 0] > 0).long() == k
            result[chosen] = expert(flat[chosen]).tanh()
        return result.unflatten(0, x.shape[:2])

    return Of(forward, experts=nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]))


def two_outputs(run: Path) -> None:
    def build() -> nn.Module:
        return Of(
            lambda m, x: (h := m.a(x).tanh(), m.head(h)), a=nn.Linear(D, D), head=nn.Linear(D, C)
        )

    def losses(model: nn.Module) -> Tensor:
        features, logits = model(X.mean(1))
        return (F.cross_entropy(logits, Y, reduction="none") + features.square().sum(1)) / B

    recorded(run, build, losses)


def hooked() -> nn.Module:
    layer = nn.Linear(D, D)
    layer.register_forward_hook(lambda _, __, output: output * 2)
    return layer


def dropped_branch() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        keep = (torch.rand(len(x), 1, 1) < 0.5).float()
        return x + keep * m.a(x).tanh()

    return Of(forward, a=nn.Linear(D, D))


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D).requires_grad_(False), nn.Linear(D, D))


def recomputed(reentrant: bool) -> nn.Module:
    return Of(
        lambda m, x: checkpoint(
            lambda h: m.drop(m.a(h).tanh()), m.first(x), use_reentrant=reentrant
        ),
        first=nn.Linear(D, D),
        a=nn.Linear(D, D),
        drop=nn.Dropout(0.2),
    )


def permuted() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = torch.tensor([3, 0, 4, 1, 5, 2])
        return m.a(x[order]).tanh()[order.argsort()]

    return Of(forward, a=nn.Linear(D, D))


def batch_of_one(run: Path) -> None:
    def losses(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(X[:1]), Y[:1], reduction="none")

    recorded(run, lambda: classifier(class_token()), losses, partial(one_step, losses, ids=[0]))


def mixing() -> nn.Module:
    return Of(lambda m, x: m.b(m.a(x) - m.a(x).mean(0)), a=nn.Linear(D, D), b=nn.Linear(D, D))


def of_dtype(dtype: torch.dtype) -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype))  # type: ignore[index]
    return model


def shared() -> nn.Module:
    return mlp().share_memory()


MODELS: dict[str, Callable[[Path], object]] = {
    "Position embeddings, looked up once": several(
        body(lambda: positions("(T,)")), body(lambda: positions("(1, T)"))
    ),
    "As many positions as samples in the batch": as_many_positions_as_samples,
    "Class token, dropout behind it": body(class_token),
    "Layer scale, dropout inside": body(layer_scale),
    "A scalar parameter": body(temperature),
    "`ParameterList`, `ParameterDict`": body(lists),
    "A weight that a function uses": body(functional),
    "Tied weights": body(tied),
    "A module called several times": body(again),
    "Samples one by one": body(lambda: chunks(1)),
    "Samples in chunks": body(lambda: chunks(4)),
    "Windows, flattened positions": body(windows),
    "Several views of each sample": body(views),
    "Time before samples": body(time_first),
    "Experts": body(experts),
    "Graphs and point clouds of unlike sizes": of_graphs,
    "Several outputs": two_outputs,
    "A hook that changes an output": body(hooked),
    "Stochastic depth": body(dropped_branch),
    "Frozen parts": body(frozen),
    "Checkpointing": body(lambda: recomputed(reentrant=False)),
    "Reentrant checkpointing": body(lambda: recomputed(reentrant=True)),
    "Samples permuted and put back": body(permuted),
    "A batch of one": batch_of_one,
    "Samples that the model mixes": body(mixing),
    "Parameters on the meta device": refused_model(lambda: mlp().to("meta")),
    "Parameters in float8": refused_model(lambda: of_dtype(torch.float8_e4m3fn)),
    "Complex parameters": refused_model(lambda: of_dtype(torch.complex64)),
    "Parameters in shared memory": refused_model(shared),
}


# losses


def summed(model: nn.Module) -> Tensor:
    return of_means(model) * B


def weighted(model: nn.Module) -> Tensor:
    return of_means(model) * torch.linspace(0.5, 2, B)


def token_losses(model: nn.Module) -> Tensor:
    """Cross-entropy of each token, without padding, over their number in the batch."""
    targets = torch.where(torch.arange(T) < torch.arange(B)[:, None] % T + 1, TOKENS % C, -100)
    losses = F.cross_entropy(model(X).transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(1) / (targets != -100).sum()


def smoothed(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X.mean(1)), Y, reduction="none", label_smoothing=0.1) / B


def root_of_mean(model: nn.Module) -> Tensor:
    """The root of the mean of squares, in terms that have its gradient."""
    squares = (model(X.mean(1))[:, 0] - Y).square() / B
    return squares / (2 * squares.sum().sqrt().detach())


def loss_of(loss: Callable[[nn.Module], Tensor]) -> Loop:
    """A loop that trains on a loss which is given as a whole."""
    return partial(one_step, loss)


def in_batch_negatives(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X.mean(1)) @ model(X[:, 0]).T, torch.arange(B))


def ranking(model: nn.Module) -> Tensor:
    scores = model(X.mean(1))[:, 0]
    return (1 - scores[:, None] + scores[None]).relu().mean()


def of_own_outputs(model: nn.Module) -> Tensor:
    """Terms whose gradients are those of `in_batch_negatives` through each sample's own outputs."""
    ours, theirs = model(X.mean(1)), model(X[:, 0])
    gradients = torch.autograd.grad(
        F.cross_entropy(ours @ theirs.T, torch.arange(B)), [ours, theirs], retain_graph=True
    )
    return sum(
        (output * gradient).sum(1)
        for output, gradient in zip((ours, theirs), gradients, strict=True)
    )


def penalised(model: nn.Module) -> Tensor:
    return of_means(model).sum() + 0.05 * sum(p.square().sum() for p in model.parameters())


def unlabelled(model: nn.Module) -> Tensor:
    return of_means(model).sum() + model(X.mean(1).roll(1, 1)).square().mean()


def named_twice(run: Path) -> None:
    half = slice(0, B // 2), slice(B // 2, B)

    def losses(model: nn.Module) -> Tensor:
        ours, theirs = model(X.mean(1)[half[0]]), model(X.mean(1)[half[1]])
        return (
            torch.cat(
                [F.cross_entropy(ours, Y[half[0]], reduction="none"), theirs.square().mean(1)]
            )
            / B
        )

    recorded(
        run,
        mlp,
        losses,
        partial(one_step, losses, ids=torch.cat([torch.arange(B)[part] for part in half]).tolist()),
    )


def of_two_views(model: nn.Module) -> Tensor:
    """R-Drop: the loss of the first view, and the distance of the two views' predictions."""
    views = torch.cat([X.mean(1), 2 * X.mean(1)])
    ours, theirs = model(views).log_softmax(1).chunk(2)
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return (F.nll_loss(ours, Y, reduction="none") + apart) / B


def two_views(run: Path) -> None:
    """A sample's gradient is the sum of its two rows."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model)
    truth = gradients_of_losses(of_two_views(model), dict(model.named_parameters()))
    ids = torch.cat([torch.arange(B)] * 2)
    with (
        Recorder(model, optimizer, run, n_samples=B, encoding="exact", dtype="float32") as recorder,
        recorder.step(ids),
    ):
        of_two_views(model).sum().backward()
        optimizer.step()
    samples, rows = stored_rows(run)
    assert samples.tolist() == ids.tolist()
    found = [{n: rows[k][n] + rows[k + B][n] for n in rows[k]} for k in range(B)]
    assert max(differences(found, truth).values()) < 1e-4


def pairs(model: nn.Module) -> Tensor:
    return (model(X.mean(1)) - model(X[:, 0])).square().sum(1) / B


def triplets(model: nn.Module, margin: float = 5.0) -> Tensor:
    anchor, positive, negative = (model(X[:, t]) for t in range(3))
    return F.triplet_margin_loss(anchor, positive, negative, margin, reduction="none") / B


def few_triplets(model: nn.Module) -> Tensor:
    """Most of them without a loss."""
    return triplets(model, 0.05)


ORDER, WEIGHT = torch.tensor([2, 0, 1, 4, 5, 3]), 0.3


def shared_out(run: Path, mixture: Tensor) -> None:
    """Rows of a mixture, each the weight times the gradient of the mixture's loss."""

    def losses(model: nn.Module) -> Tensor:
        output = model(mixture.mean(1))
        ours, theirs = (F.cross_entropy(output, y, reduction="none") for y in (Y, Y[ORDER]))
        return (WEIGHT * ours + (1 - WEIGHT) * theirs) / B

    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model)
    truth = gradients_of_losses(losses(model), dict(model.named_parameters()))
    with (
        Recorder(model, optimizer, run, n_samples=B, encoding="exact", dtype="float32") as recorder,
        recorder.step(range(B)),
    ):
        recorder.mixed(ORDER, WEIGHT)
        losses(model).sum().backward()
        optimizer.step()
    samples, rows = stored_rows(run)
    assert len(samples) == 2 * B
    places = torch.cat([torch.arange(B), torch.arange(B)]).tolist()
    assert samples.tolist() == [*range(B), *ORDER.tolist()]
    shares = [
        {n: g * (WEIGHT if k < B else 1 - WEIGHT) for n, g in truth[place].items()}
        for k, place in enumerate(places)
    ]
    assert max(differences(rows, shares).values()) < 1e-4


def mixup(run: Path) -> None:
    shared_out(run, WEIGHT * X + (1 - WEIGHT) * X[ORDER])


def cutmix(run: Path) -> None:
    shared_out(run, torch.where(torch.arange(T)[:, None] < WEIGHT * T, X, X[ORDER]))


def distilled(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        wanted = mlp()(X.mean(1)).softmax(1)
    return F.kl_div(model(X.mean(1)).log_softmax(1), wanted, reduction="none").sum(1) / B


def gradient_penalty(model: nn.Module) -> Tensor:
    x = X.mean(1).clone().requires_grad_()
    output = model(x).tanh()
    (slope,) = torch.autograd.grad(output[:, 0].sum(), x, create_graph=True)
    return (F.cross_entropy(output, Y, reduction="none") + slope.norm(dim=1)) / B


class Balanced(nn.Module):
    """Experts beside a gate, whose mean over the batch is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(D, 4), nn.Linear(D, 4 * D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        self.shares = self.gate(x).softmax(1)
        of_experts = self.experts(x).reshape(len(x), 4, D)
        return self.head((of_experts * self.shares[:, :, None]).sum(1).tanh())


def balanced(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X.mean(1)), Y) + model.shares.mean(0).square().sum()


def of_own_shares(model: nn.Module) -> Tensor:
    """Terms whose gradients are those of `balanced` through each sample's own outputs."""
    output = model(X.mean(1))
    load = (2 * model.shares.mean(0).detach() * model.shares).sum(1)
    return (F.cross_entropy(output, Y, reduction="none") + load) / B


LOSSES: dict[str, Callable[[Path], object]] = {
    "A mean": lambda run: recorded(run, losses=of_means),
    "A sum": lambda run: recorded(run, losses=summed),
    "Weighted samples": lambda run: recorded(run, losses=weighted),
    "Cross-entropy of tokens, padding ignored": lambda run: recorded(run, losses=token_losses),
    "Label smoothing": lambda run: recorded(run, losses=smoothed),
    "A root of a mean": lambda run: recorded(
        run,
        losses=root_of_mean,
        loop=loss_of(lambda m: (m(X.mean(1))[:, 0] - Y).square().mean().sqrt()),
    ),
    "Distillation from a teacher": lambda run: recorded(run, losses=distilled),
    "Pairs and triplets": several(
        *(partial(recorded, losses=losses) for losses in (pairs, triplets, few_triplets))
    ),
    "A gradient penalty (WGAN-GP, R1)": lambda run: recorded(
        run, lambda: nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C)), gradient_penalty
    ),
    "Two views of each sample in one batch (R-Drop)": two_views,
    "Mixup": mixup,
    "Cutmix": cutmix,
    "A contrastive loss": lambda run: recorded(run, loop=loss_of(in_batch_negatives)),
    "A ranking, or distances between samples": lambda run: recorded(run, loop=loss_of(ranking)),
    "A contrastive loss, `allow_mixed_loss=True`": lambda run: recorded(
        run, losses=of_own_outputs, loop=loss_of(in_batch_negatives), allow_mixed_loss=True
    ),
    "A load balance of experts, kept by the model": lambda run: recorded(
        run, Balanced, of_own_shares, loss_of(balanced)
    ),
    "A penalty on the weights": lambda run: recorded(run, loop=loss_of(penalised)),
    "A second batch in the step": lambda run: recorded(run, loop=loss_of(unlabelled)),
    "A second batch, named too": named_twice,
}


# loops


def tracked(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x, y in recorder.track(DataLoader(TensorDataset(X.mean(1), Y), B, shuffle=True)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accumulated(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x, y in recorder.track(DataLoader(TensorDataset(X.mean(1), Y), 2)):
        (F.cross_entropy(model(x), y) / 3).backward()
    optimizer.step()


def losses_summed_first(
    recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    with recorder.step(range(B)):
        parts = [
            F.cross_entropy(model(x), y) / 3
            for x, y in zip(X.mean(1).split(2), Y.split(2), strict=True)
        ]
        torch.stack(parts).sum().backward()
        optimizer.step()


def closure(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        found = of_means(model).sum()
        found.backward()
        return found

    with recorder.step(range(B)):
        optimizer.step(loss)


def thrown_away(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for take in (True, False, True):
        with recorder.step(range(B)):
            of_means(model).sum().backward()
            if take:
                optimizer.step()
            optimizer.zero_grad()
    assert (recorder.n_steps, recorder.n_skipped) == (2, 1)


def attacked(model: nn.Module) -> Tensor:
    """Inputs moved against the loss; leaves gradients of the parameters."""
    x = X.mean(1).clone().requires_grad_()
    F.cross_entropy(model(x), Y).backward()
    model.zero_grad()
    assert x.grad is not None
    return (x + 0.1 * x.grad.sign()).detach()


def fgsm(run: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(range(B)):
            with recorder.paused():
                x = attacked(model)
            F.cross_entropy(model(x), Y).backward()
            optimizer.step()

    recorded(run, losses=lambda m: classified(m, attacked(m)), loop=loop)


def noisy(run: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model)
    with Recorder(
        model, optimizer, run, n_samples=B, encoding="exact", dtype="float32"
    ) as recorder:
        one_step(of_means, recorder, model, optimizer)
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        with recorder.paused():
            truth = gradients_of_losses(of_means(model), dict(model.named_parameters()))
        one_step(of_means, recorder, model, optimizer)
    samples, rows = stored_rows(run)
    second = zip(samples[B:], rows[B:], strict=True)
    assert all(max(differences([row], [truth[k]]).values()) < 1e-4 for k, row in second)


def sam(run: Path) -> None:
    def climb(model: nn.Module) -> list[Tensor]:
        of_means(model).sum().backward()
        moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), moves)
        model.zero_grad()
        return moves

    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(range(B)):
            with recorder.paused():
                moves = climb(model)
            of_means(model).sum().backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), moves)
            optimizer.step()

    def losses(model: nn.Module) -> Tensor:
        climb(model)
        return of_means(model)

    recorded(run, losses=losses, loop=loop)


def other_half(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = nn.Linear(4, D)
    with recorder.step(range(B)):
        of_means(model).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with recorder.paused():
        model(generator(torch.randn(B, 4))).square().mean().backward()
        optimizer.zero_grad()


def grad_cam(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with recorder.step(range(B)):
        with recorder.paused():
            features = model[:2](X.mean(1))  # type: ignore[index]
            torch.autograd.grad(model[2](features)[:, 0].sum(), features)  # type: ignore[index]
        of_means(model).sum().backward()
        optimizer.step()


def evaluation(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model(X.mean(1)[:2])
    one_step(of_means, recorder, model, optimizer)
    with torch.inference_mode():
        model(X.mean(1))


def clipped(run: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(range(B)):
            of_means(model).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()

    recorded(run, loop=loop)
    assert hydra_pipe.open_run(run).steps["gradient_scale"][0] < 0.1


def with_gradients(change: Callable[[nn.Module], object]) -> Loop:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(range(B)):
            of_means(model).sum().backward()
            change(model)
            optimizer.step()

    return loop


def add_noise(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad += torch.randn_like(parameter)


def scaled(run: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for overflow in (float("inf"), 1.0):
            with recorder.step(range(B)):
                scaler.scale(of_means(model).sum() * overflow).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert (recorder.n_steps, recorder.n_skipped) == (1, 1)

    # what the rows are before they are scaled down
    recorded(run, losses=lambda m: of_means(m) * 512, loop=loop)


def autocast(run: Path) -> None:
    def losses(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return of_means(model)

    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(range(B)), torch.autocast("cpu", torch.bfloat16):
            of_means(model).sum().backward()
            optimizer.step()

    recorded(run / "outside", losses=losses, tolerance=0.1)
    recorded(run / "inside", losses=losses, loop=loop, tolerance=0.1)


def sorting(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        xs, ys = zip(*sorted(samples, key=lambda pair: -float(pair[0].sum())), strict=True)
        return torch.stack(xs), torch.stack(ys)

    for x, y in recorder.track(DataLoader(TensorDataset(X.mean(1), Y), B, collate_fn=collate)):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def between(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A case of a loop that gives the model something else than the loader's batch."""
    images = torch.randn(B, 40, generator=torch.Generator().manual_seed(0))

    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, y in recorder.track(DataLoader(TensorDataset(images, Y), B)):
            F.cross_entropy(model(change(x)), y).backward()
            optimizer.step()

    return lambda run: recorded(run, lambda: nn.Linear(40, C), loop=loop)


def other_labels(run: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with recorder.step(ORDER):  # the batch is in another order
            of_means(model).sum().backward()
            optimizer.step()

    recorded(run, loop=loop, sample_labels=Y)


def averaged(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(2):
        one_step(of_means, recorder, model, optimizer)
        optimizer.zero_grad()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    recorder.record_test(TensorDataset(X.mean(1), Y), F.cross_entropy)


def resumed(run: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        one_step(of_means, recorder, model, optimizer)
        optimizer.zero_grad()
        state = recorder.state_dict()
        recorder.fail(RuntimeError("killed"))
        with Recorder(
            model, optimizer, run, n_samples=B, encoding="exact", dtype="float32"
        ) as another:
            another.load_state_dict(state)
            one_step(of_means, another, model, optimizer)

    recorded(run, loop=loop)
    assert hydra_pipe.open_run(run).info()["stages"]["record"]["facts"]["n_steps"] == 2


LOOPS: dict[str, Callable[[Path], object]] = {
    "`recorder.step(ids)`": recorded,
    "`recorder.track(loader)`": lambda run: recorded(run, loop=tracked),
    "Accumulation": lambda run: recorded(run, loop=accumulated),
    "Losses summed before one `backward()`": lambda run: recorded(run, loop=losses_summed_first),
    "`optimizer.step(closure)`": lambda run: recorded(run, loop=closure),
    "Gradients that the loop clears": lambda run: recorded(run, loop=thrown_away),
    "FGSM, PGD": fgsm,
    "Sharpness-aware minimisation": sam,
    "The other half of a GAN": lambda run: recorded(run, loop=other_half),
    "Grad-CAM, saliency maps": lambda run: recorded(run, loop=grad_cam),
    "Evaluation in between": lambda run: recorded(run, loop=evaluation),
    "`clip_grad_norm_`": clipped,
    "`clip_grad_value_`": lambda run: recorded(
        run, loop=with_gradients(lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01))
    ),
    "`.grad` changed by hand": lambda run: recorded(run, loop=with_gradients(add_noise)),
    "Noise added to the weights": noisy,
    "A gradient scaler": scaled,
    "Autocast": autocast,
    "A checkpoint, and another process": resumed,
    "A collate function that sorts": lambda run: recorded(run, loop=sorting),
    "A batch permuted before the model": between(lambda x: x[ORDER]),
    "A batch mixed before the model": between(lambda x: 0.3 * x + 0.7 * x[ORDER]),
    "Targets that are not the labels of the ids": other_labels,
    "An average or the best epoch at `record_test`": lambda run: recorded(run, loop=averaged),
}


# optimizers


def under(build: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Path], None]:
    """A case of an optimizer that is recorded and whose books are held."""

    def case(run: Path) -> None:
        model = mlp()
        optimizer = build(model.parameters(), lr=0.01, **options)
        with Recorder(model, optimizer, run, n_samples=B) as recorder:
            for _ in range(2):
                one_step(of_means, recorder, model, optimizer)
                optimizer.zero_grad()
        assert (
            hydra_pipe.open_run(run).info()["stages"]["record"]["facts"]["worst_imbalance"] < 1e-4
        )

    return case


def in_groups(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    one, *others = parameters
    return torch.optim.SGD(
        [{"params": [one], "lr": 10 * lr}, {"params": others, "weight_decay": 0.1}],
        lr=lr,
        momentum=0.9,
    )


def several_optimizers(model: nn.Module) -> Any:
    """Muon of the matrices, and AdamW of the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(others)]


def by_several(
    recorder: Recorder, model: nn.Module, optimizers: Any, *, among: slice, clears: bool = False
) -> None:
    with recorder.step(range(B)):
        of_means(model).sum().backward()
        for one in optimizers[among]:
            one.step()
            if clears:
                model.zero_grad()


def of_package(module: str, name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer as that package has it, which need not be there."""
    kind: Any = type(name, (torch.optim.Optimizer,), {"__module__": module})
    return lambda model: kind(model.parameters(), {})


def by_accelerate(run: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    recorded(run, optimizer=lambda model: accelerator.prepare(sgd(model)))


def by_fabric(run: Path) -> None:
    fabric = pytest.importorskip("lightning.fabric")
    own = fabric.Fabric(accelerator="cpu", devices=1)
    recorded(run, optimizer=lambda model: own.setup(model, sgd(model))[1])


class Mine(torch.optim.SGD):
    pass


OPTIMIZERS: dict[str, Callable[[Path], object]] = {
    "`SGD`": several(
        lambda run: recorded(
            run,
            optimizer=lambda m: torch.optim.SGD(
                m.parameters(), lr=0.1, momentum=0.9, nesterov=True
            ),
        ),
        under(torch.optim.SGD, momentum=0.9, dampening=0.1, weight_decay=0.1),
    ),
    "`Adam`, `AdamW`": several(under(torch.optim.Adam, weight_decay=0.1), under(torch.optim.AdamW)),
    "`fused=True`, `foreach=True`": several(
        under(torch.optim.AdamW, fused=True), under(torch.optim.SGD, foreach=True)
    ),
    "Parameter groups": under(in_groups),
    "`amsgrad=True`": under(torch.optim.Adam, amsgrad=True),
    "`NAdam`": several(
        under(torch.optim.NAdam, weight_decay=0.1),
        under(torch.optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "`RAdam`": under(torch.optim.RAdam),
    "`RAdam` with a beta2 of 2/3 or less": refused_model(
        mlp, lambda m: torch.optim.RAdam(m.parameters(), betas=(0.9, 2 / 3))
    ),
    "`RMSprop`": several(
        under(torch.optim.RMSprop), under(torch.optim.RMSprop, momentum=0.9, centered=True)
    ),
    "`Adagrad`": under(torch.optim.Adagrad, lr_decay=0.1),
    "`Adafactor`": under(torch.optim.Adafactor),
    "`Muon`": lambda run: recorded(
        run,
        build=lambda: nn.Sequential(nn.Linear(D, 16, bias=False), nn.Linear(16, C, bias=False)),
        optimizer=lambda m: torch.optim.Muon(m.parameters()),
    ),
    "`maximize=True`": several(
        under(torch.optim.SGD, momentum=0.9, maximize=True),
        lambda run: recorded(
            run,
            losses=lambda model: -of_means(model),
            optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.1, maximize=True),
        ),
    ),
    "`maximize=True` in some groups": refused_model(
        mlp,
        lambda m: torch.optim.SGD(
            [{"params": m[0].parameters(), "maximize": True}, {"params": m[2].parameters()}], lr=0.1
        ),
    ),
    "An optimizer that Accelerate or Fabric has wrapped": several(by_accelerate, by_fabric),
    "`Lion`": refused_model(mlp, of_package("lion_pytorch", "Lion")),
    "Schedule-free SGD and AdamW": refused_model(
        mlp, of_package("schedulefree.adamw_schedulefree", "AdamWScheduleFree")
    ),
    "8-bit optimizers of bitsandbytes": refused_model(
        mlp, of_package("bitsandbytes.optim.adamw", "AdamW8bit")
    ),
    "Optimizers of DeepSpeed": refused_model(
        mlp, of_package("deepspeed.ops.adam.fused_adam", "FusedAdam")
    ),
    "`LBFGS`": refused_model(mlp, lambda m: torch.optim.LBFGS(m.parameters())),
    "Other optimizers": refused_model(mlp, lambda m: torch.optim.Adadelta(m.parameters())),
    "A subclass of one that is known": refused_model(mlp, lambda m: Mine(m.parameters(), lr=0.1)),
    "Several optimizers": lambda run: recorded(
        run, loop=partial(by_several, among=slice(None)), optimizer=several_optimizers
    ),
    "Several optimizers, of which one leaves a step out": lambda run: recorded(
        run, loop=partial(by_several, among=slice(1)), optimizer=several_optimizers
    ),
    "Several optimizers, and gradients that change between their steps": lambda run: recorded(
        run, loop=partial(by_several, among=slice(None), clears=True), optimizer=several_optimizers
    ),
}


# trainers, processes, devices, compilers


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distributed(run: Path) -> None:
    with one_process():
        model = nn.parallel.DistributedDataParallel(mlp())
        optimizer = sgd(model)
        with Recorder(model, optimizer, run, n_samples=B) as recorder:
            one_step(of_means, recorder, model, optimizer)


def sharded(run: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel  # which takes long to import

    with one_process():
        refused_model(
            lambda: FullyShardedDataParallel(
                mlp(), use_orig_params=True, device_id=torch.device("cpu")
            )
        )(run)


def deepspeed() -> nn.Module:
    model = mlp()
    model[2].weight.ds_id = 3  # type: ignore[index,union-attr]
    return model


def on_two_gpus() -> nn.Module:
    model = nn.DataParallel(mlp())
    model.device_ids = [0, 1]
    return model


def unwrapped(run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "n_processes", lambda: 2)
        refused_model(mlp)(run)


class Elsewhere(nn.Parameter):
    device = property(lambda _: torch.device("cuda:1"))  # type: ignore[assignment]


def on_several_devices() -> nn.Module:
    model = mlp()
    model[2].weight = Elsewhere(model[2].weight.detach())  # type: ignore[index]
    return model


@contextmanager
def compiler() -> Iterator[Callable[[nn.Module], Any]]:
    torch._dynamo.reset()
    try:
        yield partial(torch.compile, backend="eager")
    finally:
        torch._dynamo.reset()


def compiled(run: Path, *, called: bool) -> None:
    with compiler() as compile_it:
        model = compile_it(mlp())
        if called:
            model(X.mean(1))
        optimizer = sgd(model)
        recorder = Recorder(model, optimizer, run, n_samples=B)
        one_step(of_means, recorder, model, optimizer)
        recorder.close()


PARALLEL: dict[str, Callable[[Path], object]] = {
    "`DistributedDataParallel`": distributed,
    "Several processes, the model not wrapped": unwrapped,
    "FSDP": sharded,
    "DeepSpeed ZeRO": refused_model(deepspeed),
    "`DataParallel` on several GPUs": refused_model(on_two_gpus),
    "Parameters on several devices": refused_model(on_several_devices),
    "`packing=True` of TRL": lambda _: refuse_training_arguments(SimpleNamespace(packing=True)),
    "`use_liger_kernel=True`": lambda _: refuse_training_arguments(
        SimpleNamespace(use_liger_kernel=True)
    ),
    "`torch.jit.script`, `torch.jit.trace`": refused_model(lambda: torch.jit.script(mlp())),
    "`torch.compile`, called later": partial(compiled, called=False),
    "`torch.compile`, called before": partial(compiled, called=True),
}

CASES = LAYERS | MODELS | LOSSES | LOOPS | OPTIMIZERS | PARALLEL


def lines() -> dict[str, str]:
    """What the page says happens, by the name in the first column of its tables."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    found = [
        (name, happens) for name, happens in rows if name != "---" and happens != "what happens"
    ]
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def test_every_line_of_the_page_has_a_case_and_every_case_a_line() -> None:
    assert lines().keys() == CASES.keys()


# what torch says of its own old ways,
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
# and to its compiler
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning", "ignore:FSDP is switching:UserWarning"
)
@pytest.mark.parametrize(("name", "happens"), lines().items(), ids=lines())
def test_what_the_page_says_is_so(
    name: str, happens: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, _, _ = happens.partition(":")
    said = re.search("“(.*?)”", happens)
    caplog.set_level(logging.WARNING, logger="hydra_pipe")
    expected: Any = {
        "refused": lambda: pytest.raises(HydraError),
        "recorded, with a warning": lambda: pytest.warns(RecordWarning),
    }.get(kind, nullcontext)()
    with expected as found:
        CASES[name](tmp_path / "run")
    if kind == "refused":
        assert said is not None
        assert said[1] in str(found.value)
    elif kind == "recorded, with a warning":
        assert said is not None
        assert said[1] in str(found[0].message)
    else:
        assert kind.startswith("recorded")
        assert ("one backward pass a sample" in caplog.text) == (
            "one backward pass a sample" in happens
        )
