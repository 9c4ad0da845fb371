"""A small pipeline with wrong labels that are known."""

from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline
from support.pipelines import images, mlp_pipeline

N, TESTS = 60, 24


def small(seed: int = 0) -> Pipeline:
    """12 of 60 labels are wrong."""
    train = images(N, 1)
    labels = train.tensors[1].clone()
    labels[:12] = (labels[:12] + 1) % 4
    return mlp_pipeline(
        seed=seed,
        train=TensorDataset(train.tensors[0], labels),
        test=images(TESTS, 2),
        true_labels=train.tensors[1].tolist(),
    )
