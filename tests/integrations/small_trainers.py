"""Small models of transformers, made-up and real texts for them, and a trainer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be looked up

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 60
EXACT: dict[str, Any] = {"encoding": "exact", "dtype": "float32"}
Sample = dict[str, Any]


def texts(n: int, seed: int, *, causal: bool) -> list[Sample]:
    """Token ids of several lengths, with their own next token or their parity for labels."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = draw.integers(5, VOCABULARY, draw.integers(3, 9)).tolist()
        rows.append({"input_ids": ids, "labels": ids if causal else sum(ids) % 2})
    return rows


def padded(rows: list[Sample]) -> dict[str, Tensor]:
    """A batch of texts; what is not there has no label."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Tensor:
        return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    )
    of_samples = isinstance(rows[0]["labels"], int)
    labels = torch.tensor([row["labels"] for row in rows]) if of_samples else column("labels", -100)
    return {"input_ids": column("input_ids", 0), "attention_mask": mask, "labels": labels}


def language_model(vocabulary: int = VOCABULARY) -> nn.Module:
    """GPT-2, reduced, with dropout."""
    torch.manual_seed(1)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, **special
    )
    model = GPT2LMHeadModel(config)
    # or the trainer counts the first token of each text, which nothing predicts, too
    model.loss_type = "ForCausalLM"
    return model


def classifier(vocabulary: int = VOCABULARY) -> nn.Module:
    """BERT, reduced, with dropout."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config)


def arguments(out: Path, **others: Any) -> TrainingArguments:
    """Accumulation 4, bfloat16, clipping, a cosine with warm-up, and a checkpoint every three
    steps.
    """
    options: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "bf16": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 3,
    }
    quiet = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(out), **options | quiet | others)


def trainer(
    out: Path,
    model: nn.Module,
    train: Any,
    callbacks: list[TrainerCallback] | None = None,
    evaluated: Any = None,
    **options: Any,
) -> Trainer:
    """Of `model`, ready to train."""
    collator = options.pop("collator", padded)
    args = arguments(out, **options)
    return Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=callbacks,
    )


class Words:
    """A vocabulary of the commonest words of some sentences, as no tokenizer may be downloaded.

    Args:
        sentences: to be read.
        size: words that are known; 0 is the padding and 1 any other word.
    """

    def __init__(self, sentences: list[str], size: int) -> None:
        words, counts = np.unique(" ".join(sentences).split(), return_counts=True)
        known = words[np.argsort(-counts, kind="stable")[: size - 2]].tolist()
        self.words = ["", "?", *known]
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, sentence: str) -> list[int]:
        return [self._ids.get(word, 1) for word in sentence.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def sst2(
    data: Path, n: int, n_tests: int, *, causal: bool, vocabulary: int
) -> tuple[list[Sample], list[Sample], Words]:
    """Sentences of SST-2, their own words or their sentiment for labels; some for training and some
    to test.
    """

    def read(name: str, most: int) -> list[tuple[str, int]]:
        lines = (data / "text" / name).read_text(encoding="utf-8").splitlines()[1 : most + 1]
        return [(sentence, int(label)) for label, sentence in (line.split("\t") for line in lines)]

    train, test = read("sst2_train.tsv", n), read("sst2_dev.tsv", n_tests)
    words = Words([sentence for sentence, _ in train], vocabulary)
    as_samples = [
        [
            {"input_ids": (ids := words.encode(s)[:48]), "labels": ids if causal else label}
            for s, label in rows
        ]
        for rows in (train, test)
    ]
    return as_samples[0], as_samples[1], words


class StoppedError(Exception):
    pass


class Killer(TrainerCallback):
    """Ends a training in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError
