"""Inputs of plans of sums."""

from dataclasses import replace

from hydra_pipe.plan.chunking import store_geometry
from hydra_pipe.plan.sums import (
    SumInput,
)


def given_of(**changes: int) -> SumInput:
    """LeNet-5 on 60,000 samples for 10 epochs, 1,000 test samples, 4 GiB, 2 workers; but for
    `changes`.
    """
    geometry = store_geometry(3390, 2)
    return replace(
        SumInput(
            n_rows=600_000,
            n_features=3390,
            n_folding=2572,
            n_samples=60_000,
            n_tests=1000,
            n_columns=1000,
            n_steps=9380,
            n_blocks=10,
            n_groups=1,
            item_bytes=2,
            test_item_bytes=2,
            shard_rows=geometry.shard_rows,
            chunk_rows=geometry.chunk_rows,
            chunk_features=geometry.chunk_features,
            memory_bytes=4 * 2**30,
            workers=2,
        ),
        **changes,
    )
