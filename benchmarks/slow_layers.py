"""What recording a layer costs: a recorded step against a plain one, in turn.

    python benchmarks/slow_layers.py

Processor seconds of a step on one core, float32, batches of 32, SGD, the default encoding.
docs/what-can-be-recorded.md has the numbers.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe import Recorder

BATCH, STEPS, ROUNDS = 32, 4, 9
MOST_STEPS, FEWEST_STEPS, N_WORDS = 50, 20, 30_000


class Classifier(nn.Module):
    """A head over the mean of what `body` makes of its input."""

    def __init__(
        self, body: nn.Module, width: int, run: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.body, self.head, self.run = body, nn.Linear(width, 10), run

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x) if self.run is None else self.run(self.body, x)
        return self.head(hidden.flatten(1, -2).mean(1) if hidden.dim() > 2 else hidden)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())


def first(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)[0]


def attend(body: nn.Module, x: Tensor) -> Tensor:
    return body(x, x, x, need_weights=False)[0]


def permute(body: nn.Module, x: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    return body(x[order])[order.argsort()]


def pack(body: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.linspace(MOST_STEPS, FEWEST_STEPS, len(x)).long()
    return body(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0]


def cells(body: nn.Module, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = body(x[:, t], state)
    assert state is not None
    return state[0]


def numbers(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear 256-256-256": (lambda: Classifier(perceptron(), 256), numbers(256)),
    "Embedding of 30,000 words, 64 wide, 32 tokens": (
        lambda: Classifier(nn.Embedding(N_WORDS, 64), 64),
        torch.randint(0, N_WORDS, (BATCH, 32)),
    ),
    "TransformerEncoderLayer, 128 wide, 64 positions": (
        lambda: Classifier(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 128),
        numbers(64, 128),
    ),
    "MultiheadAttention, 128 wide, 64 positions": (
        lambda: Classifier(nn.MultiheadAttention(128, 4, batch_first=True), 128, attend),
        numbers(64, 128),
    ),
    "LSTM, 64 to 128 wide, 50 steps": (
        lambda: Classifier(nn.LSTM(64, 128, batch_first=True), 128, first),
        numbers(MOST_STEPS, 64),
    ),
    "RNN, the same": (
        lambda: Classifier(nn.RNN(64, 128, batch_first=True), 128, first),
        numbers(MOST_STEPS, 64),
    ),
    "GRU, the same": (
        lambda: Classifier(nn.GRU(64, 128, batch_first=True), 128, first),
        numbers(MOST_STEPS, 64),
    ),
    "LSTMCell, called 50 times": (
        lambda: Classifier(nn.LSTMCell(64, 128), 128, cells),
        numbers(MOST_STEPS, 64),
    ),
    "GRU of packed sequences of 20 to 50 steps": (
        lambda: Classifier(nn.GRU(64, 128, batch_first=True), 128, pack),
        numbers(MOST_STEPS, 64),
    ),
    "Linear 256-256-256, samples permuted and put back": (
        lambda: Classifier(perceptron(), 256, permute),
        numbers(256),
    ),
}


def steps(build: Callable[[], nn.Module], x: Tensor, *, record: bool) -> Callable[[], None]:
    """A function that takes some steps."""
    torch.manual_seed(0)
    model, targets = build(), torch.arange(BATCH) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = (
        Recorder(model, optimizer, tempfile.mkdtemp() + "/run", n_samples=BATCH) if record else None
    )

    def take() -> None:
        for _ in range(STEPS):
            if recorder is not None:
                recorder.next_batch(range(BATCH))
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    return take


def main() -> None:
    torch.set_num_threads(1)
    for name, (build, x) in CASES.items():
        both = [steps(build, x, record=record) for record in (False, True)]
        seconds: tuple[list[float], list[float]] = [], []
        for number in range(ROUNDS + 1):
            for take, of_kind in zip(both, seconds, strict=True):
                start = time.process_time()
                take()
                if number:  # the first steps are probed, and find their encoding
                    of_kind.append((time.process_time() - start) / STEPS)
        plain, recorded = map(statistics.median, seconds)
        print(
            f"    {name:<50}{1e3 * plain:6.1f} ms {1e3 * recorded:6.0f} ms {recorded / plain:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
