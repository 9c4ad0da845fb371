"""A training of two epochs on 26 samples, of which three labels are wrong: convolutions, a Linear
that is factored, and norms.
"""

from support.pipelines import conv_pipeline, images
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline


def pipeline() -> Pipeline:
    return _training(0)


def second() -> Pipeline:
    """The same training from another seed, to be combined with the first."""
    return _training(1)


def _training(seed: int) -> Pipeline:
    labels = images(26, 1).tensors[1].tolist()
    return conv_pipeline(
        epochs=2,
        seed=seed,
        true_labels=[
            (label + 1) % 4 if i in (3, 8, 21) else label for i, label in enumerate(labels)
        ],
    )


def mistakes() -> TensorDataset:
    """New inputs, for a probe: as many as there are tests."""
    return images(7, 3)
