"""A training that takes memory: 200,000 parameters, and a data set of 150 MiB, of which some
samples are used.
"""

import torch
from support.pipelines import cross_entropy
from torch import nn
from torch.utils.data import Subset, TensorDataset

from hydra_pipe import Pipeline

N_SAMPLES, N_TRAIN, N_TEST = 50_000, 256, 150


def pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    data = TensorDataset(torch.rand(N_SAMPLES, 784), torch.randint(0, 10, (N_SAMPLES,)))
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        loss=cross_entropy,
        train=Subset(data, range(N_TRAIN)),
        test=Subset(data, range(N_TRAIN, N_TRAIN + N_TEST)),
        batch_size=64,
        epochs=1,
    )
