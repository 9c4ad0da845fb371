"""Recurrent modules and attention, inside real training."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import one_by_one_gradients
from support.pipelines import cross_entropy
from support.recordings import decoded
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.recording import collector
from hydra_pipe.recording.encodings import ENCODINGS

BATCH, LENGTH, WIDTH = 6, 5, 8


class Recurrent(nn.Module):
    """A recurrent module whose outputs and last hidden state both count."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(WIDTH, 7, **options)
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.net.batch_first:
            x = x.transpose(0, 1)
        output, hidden = self.net(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        pooled = output.mean(1 if self.net.batch_first else 0)
        return self.head(torch.cat([pooled, hidden.transpose(0, 1).flatten(1)], dim=1))


class Attending(nn.Module):
    def __init__(self, mask: str = "none", weights: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        self.head, self.mask, self.weights = nn.Linear(WIDTH, 4), mask, weights

    def forward(self, x: Tensor) -> Tensor:
        masks: dict[str, Tensor] = {}
        if self.mask == "causal":
            masks["attn_mask"] = torch.ones(LENGTH, LENGTH).triu(1).bool()
        elif self.mask == "padding":
            masks["key_padding_mask"] = (
                torch.zeros(len(x), LENGTH).index_fill(1, torch.tensor([4]), 1).bool()
            )
        elif self.mask == "each":
            masks["attn_mask"] = (
                torch.linspace(0, 1, 2 * len(x) * LENGTH**2).reshape(2 * len(x), LENGTH, LENGTH) * 0
            )
        q = x if self.attention.batch_first else x.transpose(0, 1)
        output, weights = self.attention(q, q, value=q, need_weights=self.weights, **masks)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        result = self.head(output.mean(1))
        return result if weights is None else result + weights.square().sum((1, 2)).unsqueeze(1)


class Split(nn.Module):
    """Owns parameters, takes a dictionary beside its input, and gives tensors in a nested
    structure, of which one is not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(WIDTH, 3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, more: dict[str, list[Tensor]]) -> dict[str, tuple[Tensor, ...]]:
        self.calls += 1
        hidden = x @ self.weight + self.offset
        return {
            "both": (hidden.tanh(), (more["x"][0] @ self.weight).sigmoid()),
            "unused": (hidden * 2,),
        }


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.head = Split(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.split(x.mean(1), more={"x": [x[:, 0]]})["both"]
        return self.head(torch.cat([one, other * one.detach()], dim=1))


MODELS = {
    "several outputs": Several,
    "LSTM": lambda: Recurrent("LSTM", batch_first=True),
    "LSTM, time first, two layers both ways": lambda: Recurrent(
        "LSTM", num_layers=2, bidirectional=True
    ),
    "LSTM with projection": lambda: Recurrent("LSTM", batch_first=True, proj_size=3),
    "GRU": lambda: Recurrent("GRU", batch_first=True, bias=False),
    "RNN": lambda: Recurrent("RNN"),
    "attention": lambda: Attending(batch_first=True),
    "attention, time first, causal": lambda: Attending("causal"),
    "attention, padding, weights": lambda: Attending("padding", weights=True, batch_first=True),
    "attention, a mask for each sample": lambda: Attending("each", batch_first=True, bias=False),
}


def pipeline(name: str) -> Pipeline:
    generator = torch.Generator().manual_seed(1)

    def dataset(n: int) -> TensorDataset:
        return TensorDataset(
            torch.randn(n, LENGTH, WIDTH, generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
        )

    torch.manual_seed(0)
    model = MODELS[name]()
    train, test = dataset(2 * BATCH), dataset(3)
    model(train.tensors[0][:2])  # gives the lazy layer its shape
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=cross_entropy,
        train=train,
        test=test,
        batch_size=BATCH,
        epochs=2,
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_batch_of_one_gradients_and_training_is_not_changed(
    tmp_path: Path, name: str
) -> None:
    recorded, plain = pipeline(name), pipeline(name)
    hydra_pipe.record(recorded, tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.train(plain)
    assert all(map(torch.equal, plain.model.parameters(), recorded.model.parameters()))
    new = pipeline(name)
    found = decoded(tmp_path / "run", slice(0, BATCH))
    samples = hydra_pipe.open_run(tmp_path / "run").gradients.samples(slice(0, BATCH))
    inputs, targets = new.train.tensors
    truth = one_by_one_gradients(
        new.model, cross_entropy, inputs[samples], targets[samples], list(found)
    )
    assert set(found) == {name for name, _ in new.model.named_parameters()}
    for parameter, rows in found.items():
        expected = np.stack([row[parameter].flatten().numpy() for row in truth]) / BATCH
        np.testing.assert_allclose(rows, expected, atol=1e-6, err_msg=parameter)


def test_a_parameter_that_is_used_where_samples_mix_is_refused(tmp_path: Path) -> None:
    class Mean(Split):
        def forward(self, x: Tensor, more: object) -> tuple[Tensor, Tensor]:
            hidden = x @ self.weight
            return hidden, hidden.mean(0)

    class Mixing(Several):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.head = Mean(), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden, mean = self.split(x[:, 0], more=None)
            return self.head(hidden - mean)

    built = pipeline("GRU")
    model = Mixing()
    built.model, built.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        hydra_pipe.HydraError, match=r"other rows of split\.weight: the model mixes the samples"
    ):
        hydra_pipe.record(built, tmp_path / "run")


def test_recording_holds_no_graph_after_a_step(tmp_path: Path) -> None:
    """Memory would grow with every step."""
    built = pipeline("LSTM")
    recorder = hydra_pipe.Recorder(
        built.model, built.optimizer, tmp_path / "run", n_samples=2 * BATCH
    )
    inputs, targets = (t[:BATCH] for t in built.train.tensors)
    alive = []
    for _ in range(3):
        with recorder.step(range(BATCH)):
            output = built.model(inputs)
            alive.append(weakref.ref(output))
            cross_entropy(output, targets).mean().backward()
            built.optimizer.step()
            built.optimizer.zero_grad()
        del output
    recorder.close()
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("encoding", ["exact", "projected"])
def test_time_steps_that_are_encoded_together_give_the_rows_of_each_alone(
    tmp_path: Path, encoding: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (
        torch.randn(BATCH, 40, WIDTH, generator=torch.Generator().manual_seed(0)),
        torch.arange(BATCH) % 4,
    )
    n_encoded = []

    def counted(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_and_count(*args: Any) -> Any:
            n_encoded[-1] += 1
            return reduce(*args)

        return reduce_and_count

    for of_encoding in ENCODINGS.values():
        monkeypatch.setattr(of_encoding, "reduce", counted(of_encoding.reduce))
    for most in (1, 32):
        monkeypatch.setattr(collector, "_MOST_HELD", most)
        n_encoded.append(0)
        torch.manual_seed(0)
        model = Recurrent("GRU", batch_first=True)
        model(x)  # gives the lazy layer its shape
        used = optimizer(model.parameters(), lr=0.01)
        options: Any = {"encoding": encoding, "dtype": "float32", "dim": 200}
        with Recorder(model, used, tmp_path / str(most), n_samples=BATCH, **options) as recorder:
            for _ in range(3):
                with recorder.step(range(BATCH)):
                    for part in (slice(0, 4), slice(4, BATCH)):  # accumulated
                        cross_entropy(model(x[part]), y[part]).sum().backward()
                    used.step()
                    used.zero_grad()
    assert n_encoded[1] < 0.6 * n_encoded[0]  # biases have rows of their own
    alone, together = (decoded(tmp_path / str(most)) for most in (1, 32))
    for name, rows in alone.items():
        np.testing.assert_allclose(
            together[name], rows, rtol=1e-3, atol=1e-4 * np.abs(rows).max(), err_msg=name
        )
