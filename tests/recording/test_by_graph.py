"""Parameters that no layer rule splits, and modules that keep their samples elsewhere: rows come
from the graph, and are right.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import rows_in_context
from support.recordings import decoded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from hydra_pipe import Recorder

BATCH, TIME, WIDTH, CLASSES = 4, 5, 6, 3


class Wrapped(nn.Module):
    """A body, and a head over the mean of all dimensions but the first and the last."""

    def __init__(self, body: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden.flatten(1, -2).mean(1) if hidden.dim() > 2 else hidden)


class Scaled(nn.Module):
    """Owns a vector, with `inner` inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.inner(x) + x


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.t


class ClassToken(nn.Module):
    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Parameter(torch.randn(1, TIME + 1, WIDTH)),
        )
        self.drop, self.repeat = nn.Dropout(0.3), repeat

    def forward(self, x: Tensor) -> Tensor:
        token = (
            self.token.repeat(len(x), 1, 1) if self.repeat else self.token.expand(len(x), -1, -1)
        )
        return self.drop(torch.cat([token, x], 1) + self.places).tanh()


class Positions(nn.Module):
    """Looks positions up once for all samples: shape (T,) or (1, T)."""

    def __init__(self, leading: bool, table: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.leading = table or nn.Embedding(TIME, WIDTH), leading

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(TIME)
        return (x + self.table(places[None] if self.leading else places)).tanh()


class Offset(nn.Embedding):
    def forward(self, places: Tensor, past: int = 0) -> Tensor:
        return super().forward(places + past)


class BatchNormAct(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).relu()


class Prototypes(nn.Module):
    """A table of which every sample uses all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) @ self.table(torch.arange(WIDTH)[None]).flatten(0, 1).T


class Cell(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(TIME):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class OneByOne(nn.Module):
    def __init__(self, chunk: int = 1) -> None:
        super().__init__()
        self.mix, self.chunk = nn.Linear(WIDTH, WIDTH), chunk

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mix(part).tanh().mean(1) for part in x.split(self.chunk)])


class Windows(nn.Module):
    """The positions of each sample beside those of the next, as Swin's windows are."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.mix, self.norm, self.time_first = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            time_first,
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = (x.transpose(0, 1) if self.time_first else x).flatten(0, 1)
        hidden = self.norm(self.mix(flat).tanh())
        return (
            hidden.unflatten(0, (TIME, -1)).transpose(0, 1)
            if self.time_first
            else hidden.unflatten(0, (-1, TIME))
        )


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.scale = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Parameter(torch.rand(WIDTH)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.mix(x.transpose(0, 1))) * self.scale).transpose(0, 1)


class Functional(nn.Module):
    """Uses a module's parameters beside the module, and parameters in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.listed = nn.ParameterList([torch.randn(WIDTH, WIDTH)])
        self.named = nn.ParameterDict({"shift": torch.randn(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + F.linear(x.tanh(), self.a.weight) @ self.listed[0] + self.named["shift"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu_())


class Holder(nn.Module):
    """Holds its child's bias as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Hooked(nn.Module):
    """A user's own hook changes the output of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.a.register_forward_hook(lambda _, __, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh()


class Permuted(nn.Module):
    """Permutes the samples, and undoes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(len(x))
        return self.a(x[order]).tanh()[order.argsort()]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, torch.arange(TIME, TIME - len(x), -1), batch_first=True
        )
        return self.net(packed)[1][0]


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(WIDTH, WIDTH, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


class Experts(nn.Module):
    """Sends each position to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        flat, result = x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], x.shape[2])
        for k, expert in enumerate(self.experts):
            chosen = (flat[:, 0] > 0).long() == k
            result[chosen] = expert(flat[chosen]).tanh()
        return result.unflatten(0, x.shape[:2])


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.gamma = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.drop, self.reentrant = nn.Dropout(0.2), reentrant

    def part(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x * self.gamma, use_reentrant=self.reentrant)


class Checkpointed(nn.Module):
    """A module that is recomputed, with dropout before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(lambda v: self.inner(self.drop(v)), x, use_reentrant=False)
        return found[0] if isinstance(found, tuple) else found


class Unbatched(nn.Module):
    """Calls a module on each sample alone, without a dimension for samples."""

    def __init__(self, inner: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        self.inner, self.first = inner, first

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stack([self.inner(v[0] if self.first else v) for v in x])
        return found if found.dim() == 2 else found.flatten(1)[:, :WIDTH].tanh()


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def pruned() -> nn.Module:
    layer = nn.Linear(WIDTH, BATCH)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.Linear(BATCH, WIDTH))


BODIES: dict[str, Callable[[], nn.Module]] = {
    "a vector, dropout inside": lambda: Scaled(nn.Dropout(0.4)),
    "a scalar": Temperature,
    "class token, dropout behind": ClassToken,
    "class token, repeated": lambda: ClassToken(repeat=True),
    "positions (T,)": lambda: Positions(leading=False),
    "positions (1, T)": lambda: Positions(leading=True),
    "positions, subclass": lambda: Positions(leading=True, table=Offset(TIME, WIDTH)),
    "a table for all": Prototypes,
    "LSTM cell": lambda: Cell("LSTMCell"),
    "GRU cell": lambda: Cell("GRUCell"),
    "one by one": OneByOne,
    "in chunks": lambda: OneByOne(3),
    "windows": lambda: Windows(time_first=False),
    "windows, time first": lambda: Windows(time_first=True),
    "time first": TimeFirst,
    "functional": Functional,
    "twice": Twice,
    "two owners": Holder,
    "a hook that changes the output": Hooked,
    "packed": Packed,
    "LSTM, dropout": lambda: Recurrent("LSTM", num_layers=2, dropout=0.3),
    "GRU, dropout": lambda: Recurrent("GRU", num_layers=2, dropout=0.3),
    "encoder layer, dropout": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True),
    "encoder layer, time first": lambda: Swapped(nn.TransformerEncoderLayer(WIDTH, 2, 8)),
    "experts": Experts,
    "recomputed": lambda: Recomputed(reentrant=False),
    "spectral norm": spectral,
    "pruned, as wide as the batch": pruned,
    "PReLU": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU()),
    "bilinear": lambda: Both(),
    "permuted": Permuted,
    "recomputed, a vector": lambda: Checkpointed(Scaled(nn.Linear(WIDTH, WIDTH))),
    "recomputed, positions": lambda: Checkpointed(Positions(leading=True)),
    "recomputed, functional": lambda: Checkpointed(Functional()),
    "recomputed, GRU": lambda: Checkpointed(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "recomputed, encoder layer": lambda: Checkpointed(
        nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    ),
    "recomputed, weight norm": lambda: Checkpointed(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    ),
    # as many outputs as samples, and other numbers
    "Linear of a vector": lambda: Unbatched(nn.Linear(WIDTH, WIDTH), first=True),
    "Linear of a vector, as wide as the batch": lambda: nn.Sequential(
        Unbatched(nn.Linear(WIDTH, BATCH), first=True), nn.Linear(BATCH, WIDTH)
    ),
    "Linear of a matrix": lambda: Unbatched(nn.Linear(WIDTH, WIDTH)),
    "LayerNorm of a vector": lambda: Unbatched(nn.LayerNorm(WIDTH), first=True),
    "LayerNorm of a matrix": lambda: Unbatched(nn.LayerNorm((TIME, WIDTH))),
    "InstanceNorm of a sample": lambda: Unbatched(nn.InstanceNorm1d(TIME, affine=True)),
    "convolution of a sample": lambda: Unbatched(nn.Conv1d(TIME, BATCH, 3)),
    "convolution of a sample, one output": lambda: Unbatched(nn.Conv1d(TIME, 1, 3, padding=1)),
    "transposed convolution of a sample": lambda: Unbatched(nn.ConvTranspose1d(TIME, 2, 3)),
}


class Swapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.tanh())


def data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, TIME, WIDTH, generator=generator), torch.randint(
        0, CLASSES, (n,), generator=generator
    )


def recorded(tmp_path: Path, build: Callable[[], nn.Module], batch: int = BATCH) -> None:
    """Rows are those in context, and training is that without recording."""
    x, y = data(batch)
    weights = []
    for record in (False, True):
        torch.manual_seed(0)
        model = Wrapped(build())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        recorder = (
            Recorder(
                model,
                optimizer,
                tmp_path / "run",
                n_samples=batch,
                encoding="exact",
                dtype="float32",
            )
            if record
            else None
        )
        state = torch.get_rng_state()
        for _ in range(3):
            if recorder is not None:
                recorder.next_batch(range(batch))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert recorder is not None
    recorder.record_test([(x, y)], F.cross_entropy)
    recorder.close()
    assert all(map(torch.equal, *weights))
    torch.manual_seed(0)
    model = Wrapped(build())
    torch.set_rng_state(state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    truth = rows_in_context(
        model, lambda output: F.cross_entropy(output, y, reduction="none") / batch, x
    )
    found = decoded(tmp_path / "run", slice(0, batch))
    assert set(found) == set(before)
    for name, rows in found.items():
        torch.testing.assert_close(
            torch.from_numpy(rows).float(),
            truth[name],
            atol=1e-6,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", BODIES)
def test_rows_are_each_samples_own_and_training_is_not_changed(tmp_path: Path, name: str) -> None:
    recorded(tmp_path, BODIES[name])


@pytest.mark.parametrize(
    "name", ["a scalar", "positions (T,)", "LSTM cell", "class token, dropout behind", "functional"]
)
def test_a_batch_of_one_is_all_that_samples(tmp_path: Path, name: str) -> None:
    recorded(tmp_path, BODIES[name], batch=1)


def test_positions_as_many_as_the_batch_are_shared(tmp_path: Path) -> None:
    recorded(tmp_path, BODIES["positions (T,)"], batch=TIME)
