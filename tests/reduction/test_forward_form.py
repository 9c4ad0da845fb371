"""Method `hydra-fisher` against the paper's forward form, which carries every sample's perturbation
through training.
"""

from pathlib import Path

import numpy as np
import torch
from oracles import forward_relevance, in_float64, one_by_one_gradients, record_by_loop
from support.compare import relative_error
from support.pipelines import cross_entropy, images
from torch import Tensor, nn

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.maths.fisher import FORMS, Form, saturation
from hydra_pipe.training.batches import epoch_order

RATE, MOMENTUM = 0.1, 0.8


def build() -> Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=0.02)
    data = {"train": images(18, 1, 4), "test": images(5, 2, 4)}
    return Pipeline(
        model=model, optimizer=optimizer, loss=cross_entropy, batch_size=6, epochs=3, **data
    )  # type: ignore[arg-type]


def test_the_sweep_is_the_transpose_of_the_forward_form(tmp_path: Path) -> None:
    hydra_pipe.record(build(), tmp_path, encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path, method="hydra-fisher")
    store = hydra_pipe.open_run(tmp_path).gradients
    rho = torch.from_numpy(store.curvature(slice(None)).astype(np.float64))
    pipeline = build()
    model = in_float64(pipeline.model)
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=0.02)
    x, y = pipeline.train.tensors
    order = [ids for epoch in range(pipeline.epochs) for ids in epoch_order(pipeline, epoch)]
    steps = record_by_loop(
        model, optimizer, cross_entropy, [(ids, x[ids].double(), y[ids]) for ids in order]
    )
    tests = one_by_one_gradients(
        model, cross_entropy, pipeline.test.tensors[0].double(), pipeline.test.tensors[1], names
    )

    def of(form: Form) -> np.ndarray:
        kappa = saturation(RATE, MOMENTUM, 0.0, nesterov=False, factor=form.factor)
        weight = rho.clamp(form.least, form.most)

        def curvature(t: int, moved: Tensor) -> Tensor:
            rows = torch.stack(
                [torch.cat([row[n].flatten() for n in names]) for row in steps[t].rows]
            )
            own = rows * (len(rows) * weight[6 * t : 6 * t + 6]).sqrt()[:, None]
            inner = torch.linalg.inv(torch.eye(len(own), dtype=torch.float64) + kappa * own @ own.T)
            return moved @ own.T @ inner @ own

        return forward_relevance(steps, tests, len(x), curvature)

    expected = np.sum([form.share * of(form) for form in FORMS], axis=0)
    assert (
        relative_error(
            np.asarray(hydra_pipe.open_run(tmp_path).relevance("hydra-fisher")), expected
        )
        < 1e-4
    )
    free = forward_relevance(steps, tests, len(x), lambda _, moved: torch.zeros_like(moved))
    assert relative_error(free, expected) > 0.1
