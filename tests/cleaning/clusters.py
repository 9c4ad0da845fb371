"""A training on three clusters, recorded in a loop of its own, with wrong labels that are known."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hydra_pipe import Recorder

N, K, N_WRONG = 300, 3, 30
NAMES = np.array(["ant", "bee", "cat"])


def made(
    path: Path,
    *,
    labels: str = "numbers",
    changing: bool = False,
    unseen: int = 0,
    tests: bool = False,
) -> np.ndarray:
    """A recorded training on three clusters; returns the ids of the wrong labels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, K, N)
    x = torch.from_numpy(rng.normal(size=(N, 6)) + 2.5 * np.eye(K, 6)[truth]).float()
    wrong = rng.choice(N, N_WRONG, replace=False)
    given = truth.copy()
    given[wrong] = (truth[wrong] + 1) % K
    y = torch.from_numpy(given)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    named: Any = {"numbers": given, "names": NAMES[given].tolist(), "none": None}[labels]
    with Recorder(model, optimizer, path, N + unseen, sample_labels=None) as recorder:
        for epoch in range(6):
            for ids in np.split(rng.permutation(N), 10):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    target = (y[ids] + int(changing and epoch == 5)) % K
                    F.cross_entropy(model(x[ids]), target).backward()
                    optimizer.step()
        if tests:
            recorder.record_test([(x[:4], y[:4])], F.cross_entropy)
        if named is not None:
            recorder.label_samples([*named, *[named[0]] * unseen])
    return np.sort(wrong)
