"""What a step holds in memory while its passes are made."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from hydra_pipe import Recorder

BATCH, N_BATCHES = 4, 6


class Keeping(nn.Linear):
    """A layer that tells which of its inputs are still in memory."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.seen: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(StorageWeakRef(x.untyped_storage()))
        return super().forward(x)

    def n_alive(self) -> int:
        return sum(not reference.expired() for reference in self.seen)


def test_of_accumulated_batches_one_at_most_is_held(tmp_path: Path) -> None:
    kept = Keeping()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), kept, nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    n_samples = BATCH * N_BATCHES
    with Recorder(
        model, optimizer, tmp_path / "run", n_samples=n_samples, encoding="projected", dim=60
    ) as recorder:
        for _ in range(2):
            for number in range(N_BATCHES):
                recorder.next_batch(range(number * BATCH, (number + 1) * BATCH))
                F.cross_entropy(
                    model(torch.randn(BATCH, 3)), torch.zeros(BATCH, dtype=torch.long)
                ).backward()
                assert kept.n_alive() <= 1
            optimizer.step()
            optimizer.zero_grad()
            assert kept.n_alive() == 0
    assert len(kept.seen) >= 2 * N_BATCHES
