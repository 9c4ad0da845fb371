"""Adapters of peft, and models of transformers that fold their batch: rows are each sample's own
gradient.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import rows_in_context
from support.recordings import decoded
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe import Recorder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert(kind: str = "BertForSequenceClassification", **options: Any) -> nn.Module:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, **options)
    return getattr(transformers, kind)(config)


def adapted(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(
        bert(num_labels=3), getattr(peft, kind)(task_type="SEQ_CLS", **options)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": adapted("LoraConfig", r=4, target_modules=["query", "value"], lora_dropout=0.1),
    "DoRA": adapted("LoraConfig", r=4, target_modules=["query", "value"], use_dora=True),
    "trainable tokens": adapted(
        "LoraConfig",
        r=4,
        target_modules=["query"],
        trainable_token_indices={"word_embeddings": [1, 2, 3]},
    ),
    "IA3": adapted("IA3Config", target_modules=["key", "value"], feedforward_modules=[]),
    "VeRA": adapted("VeraConfig", r=4, target_modules=["query", "value"]),
    "LoHa": adapted("LoHaConfig", r=4, target_modules=["query", "value"]),
    "AdaLoRA": adapted("AdaLoraConfig", init_r=4, target_modules=["query", "value"], total_step=10),
    "BOFT": adapted("BOFTConfig", boft_block_size=4, target_modules=["query"]),
    "prompt tuning": adapted("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": adapted("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    "multiple choice": lambda: bert("BertForMultipleChoice"),
}


class Called(nn.Module):
    """Logits of token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def made(name: str) -> Called:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft
        model = Called(MODELS[name]())
    for parameter in model.parameters():
        # adapters begin at zero, where half of their rows are
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_adapters_are_each_samples_own(tmp_path: Path, name: str) -> None:
    shape = (4, 2, 8) if name == "multiple choice" else (4, 8)
    x, y = (
        torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 1, 1, 0]),
    )
    model, twin = made(name), made(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recorder = Recorder(
        model, optimizer, tmp_path / "run", n_samples=4, encoding="exact", dtype="float32"
    )
    state = torch.get_rng_state()
    for _ in range(2):
        with recorder.step(range(4)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.record_test([(x, y)], F.cross_entropy)
    recorder.close()
    torch.set_rng_state(state)
    truth = rows_in_context(
        twin, lambda output: F.cross_entropy(output, y, reduction="none") / 4, x
    )
    found = decoded(tmp_path / "run", slice(0, 4))
    assert set(found) == set(truth)
    for parameter, rows in found.items():
        torch.testing.assert_close(
            torch.from_numpy(rows).float(), truth[parameter], rtol=1e-4, atol=1e-7
        )
