"""A finished recording and relevance, made up, of any size."""

from pathlib import Path

import numpy as np

from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.data.relevance import (
    CHUNK_SAMPLES,
    ResultColumns,
    create_relevance,
    write_relevance,
)
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE


def made_run(path: Path, n_samples: int, n_tests: int, n_values: int | None = None) -> Path:
    """A run whose relevance is random, with labels of ten classes.

    Args:
        path: of the run.
        n_samples, n_tests: of the relevance.
        n_values: so few values, with ties between them; None: any.
    """
    run, generator = RunDirectory.create(path), np.random.default_rng(0)
    run.begin(RECORD, {"n_samples": n_samples})
    layout = Layout((Block("w", (1,), 0, "dense", (0, 1)),), 1, 0)
    writer = GradientsWriter(run.path / names.GRADIENTS, layout, "float16", 1, run.run_id)
    for rows, views in writer.rows.reserve(n_samples):
        views[names.GRADIENT][:] = views[names.SCALE][:] = 1
        views[names.SAMPLE][:] = np.arange(n_samples)[rows]
        views[names.STEP][:] = 0
    settings = {
        "learning_rate": 0.1,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "decoupled_decay": 0,
        "nesterov": 0,
    }
    rest = {
        "updated": 1,
        "momentum_started": 0,
        "step_factor": 1,
        names.GRADIENT_SCALE: 1,
        names.LOSS: 0,
        names.IMBALANCE: 0,
    }
    writer.append_step(settings | rest | {names.FIRST_ROW: 0, names.N_ROWS: n_samples})
    tests = writer.test_rows(1)
    for _, views in tests.reserve(n_tests):
        views[names.GRADIENT][:] = views[names.SCALE][:] = 1
        views[names.LOSS][:] = 0
    writer.flush_test(tests)
    labels = {names.TRAIN_LABELS: n_samples, names.TEST_LABELS: n_tests}
    for which, n in labels.items():
        writer.write_labels(which, generator.integers(0, 10, n))
    writer.close()
    run.end(
        RECORD,
        "complete",
        n_steps=1,
        n_rows=n_samples,
        n_tests=n_tests,
        labels=labels,
        checksums=seal(run, RECORD),
    )
    stage = REDUCE.of("hydra")
    run.begin(stage, {})
    words = {names.METHOD: "hydra", names.SIGN: names.SIGN_TEXT, names.UNIT: names.UNIT_TEXT}
    array = create_relevance(
        run.path / names.RELEVANCE,
        "hydra",
        words,
        n_samples,
        ResultColumns(((0, n_tests),)),
        n_tests,
        run.run_id,
    )
    for first in range(0, n_samples, CHUNK_SAMPLES):
        values = generator.standard_normal(
            (min(CHUNK_SAMPLES, n_samples - first), n_tests), np.float32
        )
        values = (
            values if n_values is None else np.sign(values) * np.ceil(np.abs(values) * n_values / 8)
        )
        write_relevance(array, first, 0, values)
    run.end(
        stage,
        "complete",
        n_tests=n_tests,
        n_columns=n_tests,
        checksums=seal(run, stage),
        **run.origin(stage),
    )
    return run.path
