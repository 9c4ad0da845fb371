"""The benchmark of peers gives every script the same training, and its own side scores it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path in (PEERS, PEERS.parent, PEERS.parents[1] / "pipelines"):
        monkeypatch.syspath_prepend(str(path))
    yield
    for name in ("run", "subject", "with_hydra_pipe", "truth", "fashion_mnist", "shakespeare"):
        sys.modules.pop(name, None)


def test_a_peer_trains_as_the_runner_did_and_relevance_is_that_of_the_pipeline(
    scripts: None, tmp_path: Path
) -> None:
    import run
    import subject
    from with_hydra_pipe import OFFERS

    import hydra_pipe

    run.write_inputs(run.SUBJECTS["digits"], tmp_path, tmp_path / "inputs.npz")
    given = subject.Inputs.read("digits", tmp_path / "inputs.npz")
    (tmp_path / "store").mkdir()
    facts: dict = {}
    kept: list[dict[str, np.ndarray]] = []
    subject.measure(
        OFFERS["hydra"].make(given, tmp_path / "store"),
        facts,
        lambda found: kept.append(dict(found)),
    )
    assert [list(found) for found in kept] == [["score"], ["score", "later"]]
    found = kept[-1]
    assert {name: scores.shape for name, scores in found.items()} == {
        "score": (400, 100),
        "later": (400, 100),
    }
    assert set(facts["seconds"]) == {"plain", "capture", "plain again", "prepare", "score", "later"}
    assert facts["bytes"] > 0

    pipeline = run.digits(tmp_path)
    hydra_pipe.record(pipeline, tmp_path / "run")
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    whole = np.asarray(hydra_pipe.open_run(tmp_path / "run").relevance("hydra"))
    for state in (pipeline.model.state_dict(), given.model.state_dict()):
        torch.testing.assert_close(state, given.states[-1], atol=1e-5, rtol=1e-5)
    both = np.concatenate([found["score"], found["later"]], axis=1)
    np.testing.assert_allclose(both, whole, atol=1e-2 * np.abs(whole).max())
