"""A training of two epochs on 26 samples: convolutions, a Linear that is factored, and norms."""

from conftest import conv_pipeline

from hydra_pipe import Pipeline


def pipeline() -> Pipeline:
    return conv_pipeline(epochs=2)
