"""What recording under transformers.Trainer costs, beside plain training, bergson's callback and
dattri-llm, on the same run.

    python benchmarks/trainer.py DATA [--models gpt2,bert] [--n 400] [--pairs 3] [--float32]
        [--bergson PYTHON] [--dattri-llm PYTHON]

DATA is the directory of the shared data sets; sentences of SST-2, a vocabulary of their 4,000
commonest words. One epoch of AdamW, 8 sentences a batch, 4 batches a step, bfloat16 autocast,
clipping, a cosine with warm-up. Each side is a process of its own, plain first in each pair, one
thread; seconds are the processor's in `trainer.train()`, the ratio is the median over the pairs.
Peers run in an interpreter that has them (benchmarks/peers/requirements) and transformers. "same
weights":
training was left as it was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

VOCABULARY, LENGTH, BATCH, ACCUMULATED = 4000, 48, 8, 4
SIDES = ("plain", "hydra-pipe", "bergson", "dattri-llm")


def sentences(data: Path, n: int) -> list[tuple[list[int], int]]:
    """Token ids and sentiment; 0 is padding, 1 an unknown word."""
    lines = (data / "text" / "sst2_train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(text.split(), int(label)) for label, text in (line.split("\t") for line in lines)]
    counts: dict[str, int] = {}
    for words, _ in pairs:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    known = {
        word: i + 2
        for i, word in enumerate(
            sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
        )
    }
    return [([known.get(word, 1) for word in words[:LENGTH]], label) for words, label in pairs[:n]]


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; what is not there has no label. Numbers that a peer gives the samples go through."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)

    def column(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*value, *[filler] * (length - len(value))] for value in values])

    ids = [row["input_ids"] for row in rows]
    causal = isinstance(rows[0]["labels"], list)
    labels = (
        column([row["labels"] for row in rows], -100)
        if causal
        else torch.tensor([row["labels"] for row in rows])
    )
    batch = {
        "input_ids": column(ids, 0),
        "attention_mask": column([[1] * len(own) for own in ids], 0),
        "labels": labels,
    }
    return batch | (
        {"_idx": torch.tensor([row["_idx"] for row in rows])} if "_idx" in rows[0] else {}
    )


def model_of(kind: str) -> Any:
    """Four layers of width 128, from a configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config)


def train(side: str, kind: str, data: Path, n: int, out: Path, *, float32: bool) -> dict[str, Any]:
    """Train once, as `side` does it. What it took and left."""
    import torch
    import transformers

    rows = [
        {"input_ids": ids, "labels": ids if kind == "gpt2" else label}
        for ids, label in sentences(data, n + 20)
    ]
    dataset: Any = rows[:n]
    model = model_of(kind)
    args = transformers.TrainingArguments(
        str(out / "trainer"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        num_train_epochs=1,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        bf16=not float32,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    store = out / "store"
    if side == "bergson":
        from datasets import Dataset

        dataset = Dataset.from_list(rows[:n])
    trainer = transformers.Trainer(model, args, train_dataset=dataset, data_collator=padded)
    around: Callable[[], Any] = trainer.train
    if side == "hydra-pipe":
        from hydra_pipe.integrations.transformers import HydraCallback

        trainer.add_callback(HydraCallback(store, rows[n:]))
    elif side == "bergson":
        from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection

        trainer = prepare_for_gradient_collection(trainer)
        trainer.add_callback(GradientCollectorCallback(store))
        around = trainer.train
    elif side == "dattri-llm":
        from dattri_llm import (
            REGISTER_ALL,
            GradientStorageManager,
            HookManager,
            HookManagerConfig,
            OffloadCallback,
        )

        offload = OffloadCallback(
            offload_interval=1,
            file_manager=GradientStorageManager(str(store)),
            recording_type="per_sample",
        )
        hooks = HookManager(
            model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[offload]
        )

        def around() -> None:
            with hooks.collect():
                trainer.train()
            hooks.remove()

    cpu, wall = time.process_time(), time.perf_counter()
    around()
    took = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    digest = sha256()
    for value in model.state_dict().values():
        digest.update(
            value.detach().contiguous().view(torch.uint8).numpy().tobytes()
            if value.dim()
            else bytes(str(value), "ascii")
        )
    n_bytes = (
        sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        if store.exists()
        else 0
    )
    return took | {
        "weights": digest.hexdigest(),
        "bytes_a_sample": n_bytes / n,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def of_process(python: str, side: str, kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """`train` in a process of its own; an error is what it said last."""
    with tempfile.TemporaryDirectory(dir=given.scratch) as out:
        command = [
            python,
            __file__,
            str(given.data),
            "--models",
            kind,
            "--n",
            str(given.n),
            "--side",
            side,
            "--out",
            out,
        ]
        command += ["--float32"] if given.float32 else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["nothing was said"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="gpt2,bert")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="no autocast")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--bergson", metavar="PYTHON")
    parser.add_argument("--dattri-llm", metavar="PYTHON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(
            json.dumps(
                train(
                    given.side, given.models, given.data, given.n, given.out, float32=given.float32
                )
            )
        )
        return
    pythons = {
        "hydra-pipe": sys.executable,
        "bergson": given.bergson,
        "dattri-llm": given.dattri_llm,
    }
    print(
        "| model | recorded by | over plain | processor seconds | bytes a sample | same weights |"
    )
    print("|---|---|---|---|---|---|")
    for kind in given.models.split(","):
        for side, python in pythons.items():
            if python is None:
                continue
            pairs = [
                (of_process(python, "plain", kind, given), of_process(python, side, kind, given))
                for _ in range(given.pairs)
            ]
            failed = next(
                (found["error"] for pair in pairs for found in pair if "error" in found), None
            )
            if failed is not None:
                print(f"| {kind} | {side} | failed: {failed} | | | |", flush=True)
                continue
            ratio = statistics.median(
                recorded["cpu_seconds"] / plain["cpu_seconds"] for plain, recorded in pairs
            )
            plain, recorded = pairs[0]
            seconds = f"{plain['cpu_seconds']:.1f} -> {recorded['cpu_seconds']:.1f}"
            same = (
                "yes"
                if all(plain["weights"] == recorded["weights"] for plain, recorded in pairs)
                else "no"
            )
            print(
                f"| {kind} | {side} | {ratio:.2f} | {seconds} | "
                f"{recorded['bytes_a_sample']:,.0f} | {same} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
