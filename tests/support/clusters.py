"""A pipeline whose classes are clusters of points, with wrong labels and doubled samples."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline

N, TESTS, K, N_WRONG = 240, 30, 3, 24
NAMES = np.array(["ant", "bee", "cat"])
# Two training samples of the same content and of other labels, two of the same label, and a
# training sample with the test sample that is the same.
DIFFERING, SAME, ACROSS = (100, 101), (110, 111), (120, 0)


def truth_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """True classes and given ones, shape (N,)."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, K, N)
    truth[list(DIFFERING)] = 0
    truth[list(SAME)] = 1
    given = truth.copy()
    wrong = rng.choice(100, N_WRONG, replace=False)
    given[wrong] = (truth[wrong] + 1) % K
    given[DIFFERING[1]] = 2
    return truth, given


def clusters(epochs: int = 8, **changes: object) -> Pipeline:
    """Points around three corners, a tenth of them called by the next corner's name."""
    truth, given = truth_and_labels()
    rng = np.random.default_rng(1)
    of_tests = rng.integers(0, K, TESTS)
    points, tests = (
        rng.normal(size=(len(own), 6)) + 2.5 * np.eye(K, 6)[own] for own in (truth, of_tests)
    )
    for one, other in (DIFFERING, SAME):
        points[other] = points[one]
    tests[ACROSS[1]], of_tests[ACROSS[1]] = points[ACROSS[0]], truth[ACROSS[0]]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    fields: dict[str, object] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        "loss": lambda output, target: F.cross_entropy(output, target, reduction="none"),
        "train": TensorDataset(torch.tensor(points).float(), torch.tensor(given)),
        "test": TensorDataset(torch.tensor(tests).float(), torch.tensor(of_tests)),
        "batch_size": 24,
        "epochs": epochs,
        "sample_labels": NAMES[given].tolist(),
        "test_labels": NAMES[of_tests].tolist(),
    }
    return Pipeline(**(fields | changes))
