"""The code of docs/trainers.md runs as it stands there, on as many processes as it says; prepared
loaders name their samples.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support import ROOT
from support.pipelines import cross_entropy, images, mlp_pipeline
from support.recordings import arrays, assert_same_arrays
from torch.utils.data import DataLoader

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.store import names

BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "trainers.md").read_text(),
    flags=re.DOTALL | re.MULTILINE,
)
SCRIPTS = {
    block.splitlines()[0].removeprefix("# "): block for block in BLOCKS if block.startswith("# ")
}


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_module_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "lightning" in block)
    exec(compile(block, "trainers.md", "exec"), {})
    assert (
        arrays(tmp_path / "runs" / "lightning")[f"{names.STEPS}/{names.N_ROWS}"].tolist()
        == [40] * 15
    )


def test_sentences_are_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (block,) = (block for block in BLOCKS if "transformers" in block)
    exec(compile(block, "trainers.md", "exec"), {})
    assert len(arrays(tmp_path / "runs" / "bert")[names.SAMPLE]) == 2 * 96
    page = (tmp_path / "runs" / "bert" / "report.html").read_text()
    # the texts of the test samples
    assert len(re.findall(r"(?:(?:a|dull|film|,|moving|one|and|not|too|long) ){5}", page)) > 8


@pytest.mark.parametrize(("script", "steps"), [("accelerated.py", 15), ("distributed.py", 30)])
def test_two_processes_record_one_run(tmp_path: Path, script: str, steps: int) -> None:
    assert set(SCRIPTS) == {"accelerated.py", "distributed.py"}
    (tmp_path / script).write_text(SCRIPTS[script])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / script.removesuffix(".py")
    found = arrays(run)
    assert found[f"{names.STEPS}/{names.LOSS}"].shape[0] == steps
    ids = np.concatenate([found[f"rank/{rank}/{names.SAMPLE}"] for rank in range(2)])
    assert sorted(ids) == sorted([*range(200)] * 3)  # each once an epoch
    assert all(np.isfinite(found[f"rank/{rank}/{names.CURVATURE}"]).all() for rank in range(2))
    assert hydra_pipe.verify(run) == []
    hydra_pipe.reduce(run, method="hydra")
    assert np.asarray(hydra_pipe.open_run(run).relevance("hydra")).shape == (200, 100)


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, {"shuffle": True, "num_workers": 2}, {"drop_last": True}],
    ids=str,
)
def test_a_prepared_loader_names_its_samples(tmp_path: Path, options: dict[str, Any]) -> None:
    train = images(30, 1)
    weights = []
    for way in ("plain", "named", "tracked"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        pipeline = mlp_pipeline()
        numbered = torch.utils.data.TensorDataset(*train.tensors, torch.arange(30))
        torch.manual_seed(3)
        parts = accelerator.prepare(
            pipeline.model, pipeline.optimizer, DataLoader(numbered, 4, **options)
        )
        model, optimizer, loader = parts
        recorder = (
            Recorder(model, optimizer.optimizer, tmp_path / way, 30, dtype="float32")
            if way != "plain"
            else None
        )
        batches = recorder.track(loader) if way == "tracked" and recorder else loader
        for _ in range(2):
            for x, y, ids in batches:
                if way == "named" and recorder:
                    recorder.next_batch(ids)
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(x), y).mean())
                    optimizer.step()
                    optimizer.zero_grad()
        if recorder:
            recorder.close()
        weights.append([p.detach().clone() for p in model.parameters()])
    for others in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], others, strict=True))
    assert_same_arrays(tmp_path / "named", tmp_path / "tracked")
    assert len(arrays(tmp_path / "tracked")[names.SAMPLE]) == (56 if "drop_last" in options else 60)
