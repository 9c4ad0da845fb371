"""Longer recordings from a real one: its steps again and again, as many epochs more, in a store of
its own.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import BLOCK_COLUMNS, GROUP_COLUMNS, STEP_COLUMNS, Gradients
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD


def stretch(source: Path, target: Path, times: int) -> None:
    """A run with the rows and the steps of `source` `times` over, and its test gradients and
    labels.
    """
    old = RunDirectory.open(source)
    store = Gradients(source / names.GRADIENTS)
    run = RunDirectory.create(target)
    run.begin(RECORD, old.stages[RECORD].settings)
    writer = GradientsWriter(
        target / names.GRADIENTS, store.layout, str(store.rows.dtype), store.n_groups, run.run_id
    )
    n_rows, n_steps = store.rows.n_rows, store.n_steps
    tables = {
        name: store.step_table(name) for name in (*STEP_COLUMNS, *GROUP_COLUMNS, *BLOCK_COLUMNS)
    }
    first, counts = store.rows_of_steps()
    for repeat in range(times):
        for piece in store.rows.stream((0, n_rows), 2048):
            values = {
                names.GRADIENT: piece.read(0, store.layout.n_features),
                names.SCALE: store.rows.scales(piece.rows),
                names.SAMPLE: store.samples(piece.rows),
                names.STEP: store.step_of_rows(piece.rows) + repeat * n_steps,
                names.CURVATURE: store.curvature(piece.rows),
            }
            _put(writer.rows, values)
        for step in range(n_steps):
            line: dict[str, Any] = {name: table[step] for name, table in tables.items()}
            if repeat:
                line["momentum_started"] = np.zeros_like(line["momentum_started"])
            writer.append_step(
                line
                | {
                    names.FIRST_ROW: int(first[step, 0]) + repeat * n_rows,
                    names.N_ROWS: int(counts[step, 0]),
                }
            )
    tests = store.test_rows(n_steps)
    table = writer.test_rows(n_steps * times)
    whole = slice(0, tests.n_rows)
    losses = store.test_losses(n_steps)
    features = tests.features(whole, slice(0, store.layout.n_features))
    _put(table, {names.GRADIENT: features, names.SCALE: tests.scales(whole), names.LOSS: losses})
    writer.flush_test(table)
    for which in (names.TRAIN_LABELS, names.TEST_LABELS):
        labels = store.labels(which)
        if labels is not None:
            writer.write_labels(which, labels)
    writer.close()
    facts = {
        "n_steps": n_steps * times,
        "n_rows": n_rows * times,
        "n_tests": tests.n_rows,
        "labels": {},
    }
    run.end(RECORD, "complete", **facts, checksums=seal(run, RECORD))


def _put(table: Any, values: dict[str, np.ndarray]) -> None:
    for rows, views in table.reserve(len(values[names.GRADIENT])):
        for name, found in values.items():
            views[name][:] = found[rows]
