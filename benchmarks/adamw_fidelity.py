"""How well relevance under AdamW follows the exact hypergradient, by full autograd through the whole run.

    python benchmarks/adamw_fidelity.py

scikit-learn's 8x8 digits, 400 samples of which 40 are mislabelled, 100 test samples, an MLP 64-24-10 with tanh in float64, batch
40, AdamW 3e-3 with weight decay 1e-2. Prints Spearman's rank correlation of hydra's relevance with the exact derivative, mean
over tests, and the ratio of their norms.
"""

import tempfile

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.recording.trainer import _epoch_order

N, M, WRONG, RATE, DECAY, BETAS, EPS = 400, 100, 40, 3e-3, 1e-2, (0.9, 0.999), 1e-8


def make(epochs: int) -> Pipeline:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    inputs = torch.tensor(digits.data[order] / 16)
    targets = torch.tensor(digits.target[order])
    targets[:WRONG] = (targets[:WRONG] + torch.tensor(np.random.default_rng(1).integers(1, 10, WRONG))) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    return Pipeline(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPS),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        train=TensorDataset(inputs[:N], targets[:N]),
        test=TensorDataset(inputs[N : N + M], targets[N : N + M]),
        batch_size=40,
        epochs=epochs,
    )


def exact_relevance(pipeline: Pipeline) -> np.ndarray:
    """- d l_j(theta_T) / d w_i through every step of AdamW, second moment included."""
    inputs, targets = pipeline.train.tensors
    weight = torch.ones(N, dtype=torch.float64, requires_grad=True)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in pipeline.model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def losses(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return pipeline.loss(torch.func.functional_call(pipeline.model, values, (x,)), y)

    order = [ids for epoch in range(pipeline.epochs) for ids in _epoch_order(pipeline, epoch)]
    for t, ids in enumerate(order, start=1):
        loss = (weight[ids] * losses(parameters, inputs[ids], targets[ids])).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        for (name, p), g in zip(list(parameters.items()), gradients, strict=True):
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g**2
            # the tiny number keeps the derivative of the root finite where a gradient is exactly zero
            root = (second[name] / (1 - BETAS[1] ** t) + 1e-30).sqrt() + EPS
            parameters[name] = p * (1 - RATE * DECAY) - RATE / (1 - BETAS[0] ** t) * first[name] / root
    tests = losses(parameters, *pipeline.test.tensors)
    columns = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in tests]
    return -torch.stack(columns, dim=1).numpy()


def main() -> None:
    for epochs in (5, 15):
        exact = exact_relevance(make(epochs))
        with tempfile.TemporaryDirectory() as run:
            hydra_pipe.record(make(epochs), run, encoding="exact", dtype="float32")
            hydra_pipe.reduce(run)
            found = np.asarray(hydra_pipe.open_run(run).relevance())
        correlation = np.mean([spearmanr(found[:, j], exact[:, j]).statistic for j in range(M)])
        print(
            f"{epochs} epochs: Spearman {correlation:.3f}, norm {np.linalg.norm(found) / np.linalg.norm(exact):.2f} times the exact"
        )


if __name__ == "__main__":
    main()
