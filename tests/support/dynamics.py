"""Made-up dynamics of a training, with wrong labels that are known."""

from dataclasses import replace

import numpy as np

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.types import I64


def made(
    n: int = 400, classes: int = 4, noise: float = 0.15, epochs: int = 6, seed: int = 0
) -> tuple[Dynamics, I64]:
    """Blobs that a network separates better from epoch to epoch, and begins to memorise at the end.

    Returns:
        The dynamics; the true labels, shape (n,).
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    wrong = rng.choice(n, round(noise * n), replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + rng.integers(1, classes, len(wrong))) % classes
    places = 3 * np.eye(classes)[truth]
    logits = np.empty((epochs, n, classes), np.float32)
    inputs = np.empty((epochs, n, classes + 2), np.float16)
    for epoch in range(epochs):
        learnt = min(1.0, epoch / 2)
        memorised = max(0.0, (epoch - 3) / 4)
        own = memorised * np.eye(classes)[labels]
        logits[epoch] = learnt * places + 2 * own + rng.normal(0, 0.7, (n, classes))
        noise_of_inputs = rng.normal(0, 1, (n, classes + 2))
        inputs[epoch] = np.pad(learnt * places, ((0, 0), (0, 2))) + noise_of_inputs
    return Dynamics(labels, logits, inputs), truth


def permuted(dynamics: Dynamics, order: I64) -> Dynamics:
    """The same visits with samples in another order."""
    assert dynamics.inputs is not None
    assert isinstance(dynamics.logits, np.ndarray)
    return replace(
        dynamics,
        labels=dynamics.labels[order],
        logits=dynamics.logits[:, order],
        inputs=dynamics.inputs[:, order],
    )


def renamed(dynamics: Dynamics, names: I64) -> Dynamics:
    """The same visits with class k called names[k]."""
    assert isinstance(dynamics.logits, np.ndarray)
    logits = dynamics.logits[:, :, np.argsort(names)]
    return replace(dynamics, labels=names[dynamics.labels], logits=logits)


def made_of_many(
    n: int, classes: int, noise: float = 0.1, epochs: int = 3, seed: int = 0
) -> tuple[Dynamics, I64]:
    """Blobs of many classes, with the eight largest logits that a recording keeps of each visit.

    Returns:
        The dynamics; the true labels, shape (n,).
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    wrong = rng.choice(n, round(noise * n), replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + rng.integers(1, classes, len(wrong))) % classes
    # the true class and seven that follow it in a random order of the classes
    kept = ((truth[:, None] + np.arange(8) * (classes // 8)) % classes).astype(np.int32)
    largest = np.empty((epochs, n, 8), np.float16)
    own = np.empty((epochs, n), np.float16)
    centres = rng.normal(0, 1, (classes, 32))
    inputs = np.empty((epochs, n, 32), np.float16)
    for epoch in range(epochs):
        largest[epoch] = rng.normal(0, 1, (n, 8))
        largest[epoch, :, 0] += 4 * (epoch + 1)
        at = kept == labels[:, None]
        own[epoch] = np.where(at.any(axis=1), (largest[epoch] * at).sum(axis=1), -2)
        inputs[epoch] = centres[truth] + rng.normal(0, 0.5, (n, 32))
    log_sum = np.log(np.exp(largest.astype(np.float64)).sum(axis=2) + classes * np.exp(-2.0))
    top = TopLogits(own, largest, np.stack([kept] * epochs), log_sum, classes)
    return Dynamics(labels, top, inputs), truth
