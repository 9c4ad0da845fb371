"""On a CUDA device: the same rows as on the processor, training unchanged, nothing read before it
is there.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.pipelines import conv_pipeline, cross_entropy, mlp_pipeline
from support.recordings import decoded
from torch import nn
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline, Recorder
from hydra_pipe.plan import chunking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device; run `pytest -m gpu` where there is one",
    ),
]


def on_gpu(pipeline: Pipeline) -> Pipeline:
    """`pipeline` with its model and data there, and full precision in its products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline.model.cuda()
    for name in ("train", "test"):
        setattr(pipeline, name, TensorDataset(*(t.cuda() for t in getattr(pipeline, name).tensors)))
    return pipeline


def zeros() -> nn.Module:
    """A network whose operators are all deterministic there; padding by reflection is not."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 4)),
    )


class Text(nn.Module):
    """Tokens, a recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cells = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(self.table(x))[0].mean(1))


@pytest.mark.parametrize("build", [mlp_pipeline, conv_pipeline])
@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_rows_are_those_of_the_processor(
    tmp_path: Path, build, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # several shards, so that buffers are used again
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 16)
    hydra_pipe.record(build(), tmp_path / "cpu", encoding="exact", dtype=dtype)
    hydra_pipe.record(on_gpu(build()), tmp_path / "gpu", encoding="exact", dtype=dtype)
    rows, others = decoded(tmp_path / "cpu"), decoded(tmp_path / "gpu")
    for name in rows:
        np.testing.assert_allclose(
            rows[name],
            others[name],
            atol=(2e-2 if dtype == "int8" else 2e-3) * np.abs(rows[name]).max(),
        )


@pytest.mark.parametrize("encoding", ["exact", "projected"])
def test_weights_are_those_of_training_without_recording_bit_for_bit(
    tmp_path: Path, encoding: str
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        recorded, plain = (on_gpu(conv_pipeline(model=model)) for model in (zeros(), zeros()))
        for pipeline in (recorded, plain):
            pipeline.optimizer = torch.optim.SGD(pipeline.model.parameters(), lr=0.1, momentum=0.9)
            pipeline.scheduler = None
        hydra_pipe.record(recorded, tmp_path / "run", encoding=encoding, dim=64)
        hydra_pipe.train(plain)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_float16_autocast_with_a_scaler_balances_its_books(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
    inputs, targets = (t.cuda() for t in mlp_pipeline().train.tensors)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=len(inputs))
    for step in range(20):
        ids = np.arange(step * 8, step * 8 + 8) % len(inputs)
        with recorder.step(ids):
            with torch.autocast("cuda", torch.float16):
                loss = cross_entropy(model(inputs[ids]), targets[ids]).mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    recorder.close()
    facts = hydra_pipe.open_run(tmp_path / "run").info()["stages"]["record"]["facts"]
    assert facts["n_steps"] + facts["n_skipped"] == 20
    assert facts["n_steps"] > 10


def test_fused_adamw_accumulates_text_in_bfloat16_and_takes_test_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Text().cuda()
    x, y = torch.randint(0, 50, (64, 12)).cuda(), (torch.arange(64) % 4).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=64)
    for step in range(24):
        ids = np.arange(step * 16, step * 16 + 16) % 64
        with recorder.step(ids):
            for part in (ids[:8], ids[8:]):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = cross_entropy(model(x[part]), y[part]).sum() / 16
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.record_test([(x[:8], y[:8])], cross_entropy)
    recorder.close()
    for method in ("hydra", "hydra-fisher"):
        hydra_pipe.reduce(tmp_path / "run", method=method)
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_no_step_waits_for_the_device_between_flushes(tmp_path: Path) -> None:
    model = zeros().cuda()
    x, y = torch.randn(8, 1, 8, 8).cuda(), (torch.arange(8) % 4).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recorder = Recorder(model, optimizer, tmp_path / "run", n_samples=8)
    try:
        for step in range(12):
            # probes go through the first step, which is checked at once
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < 12 else "default")
            with recorder.step(np.arange(8)):
                cross_entropy(model(x), y).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.close()
