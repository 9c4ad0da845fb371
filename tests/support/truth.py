"""Relevance as the plain loops have it, and as a run stores it."""

from pathlib import Path

import numpy as np
import torch
import zarr
from oracles import hessian_free_relevance, in_float64, one_by_one_gradients, record_by_loop

from hydra_pipe import Pipeline
from hydra_pipe.training.batches import epoch_order


def read_relevance(run: Path, method: str = "hydra") -> np.ndarray:
    return zarr.open_array(run / "relevance.zarr" / method, mode="r")[:]


def batches_of(pipeline: Pipeline) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    inputs, targets = pipeline.train.tensors
    inputs = inputs.double()
    return [
        (ids, inputs[ids], targets[ids])
        for epoch in range(pipeline.epochs)
        for ids in epoch_order(pipeline, epoch)
    ]


def oracle_relevance(pipeline: Pipeline) -> np.ndarray:
    """Relevance of `pipeline`, which must be new, by float64 loops."""
    model = in_float64(pipeline.model)
    names = dict(zip(pipeline.model.parameters(), model.parameters(), strict=True))
    groups = [
        g | {"params": [names[p] for p in g["params"]]} for g in pipeline.optimizer.param_groups
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = None
    if pipeline.scheduler is not None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, pipeline.scheduler.T_max)
    steps = record_by_loop(
        model, optimizer, pipeline.loss, batches_of(pipeline), scheduler, pipeline.max_grad_norm
    )
    inputs, targets = pipeline.test.tensors
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    tests = one_by_one_gradients(model, pipeline.loss, inputs.double(), targets, trained)
    return hessian_free_relevance(steps, tests, len(pipeline.train))
