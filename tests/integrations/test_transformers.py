"""Recording under `transformers.Trainer`: nothing changes in training, and the run is that of a
plain loop.
"""

import html
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_trainers import (
    EXACT,
    VOCABULARY,
    Killer,
    StoppedError,
    arguments,
    classifier,
    language_model,
    padded,
    sst2,
    texts,
    trainer,
)
from support.recordings import arrays, assert_same_arrays, assert_same_weights, steps_of
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup
from two_processes import rows_of_two, samples_of_two

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import (
    DataError,
    HydraError,
    RecordError,
    RecordWarning,
    RunError,
    UsageError,
)
from hydra_pipe.integrations.transformers import HydraCallback
from hydra_pipe.store import names

pytestmark = [
    # in peft
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # in torch's compiler
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "language model": language_model,
    "classifier": classifier,
}


class Witness(TrainerCallback):
    """Notes the random state in which each step begins."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.states.append(torch.get_rng_state())


def plain_recording(
    run: Path,
    model: nn.Module,
    train: Any,
    tests: Any,
    out: Path,
    of: Path,
    states: list[torch.Tensor],
) -> None:
    """The training that `of` recorded, in a loop that names its samples, from the random states
    that its steps began with.
    """
    made = trainer(out, model, train)
    args, optimizer = made.args, made.create_optimizer()
    steps = steps_of(of)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_steps), len(steps))
    labels = (
        None if isinstance(train[0]["labels"], list) else [sample["labels"] for sample in train]
    )
    recorder = Recorder(model, optimizer, run, len(train), sample_labels=labels, **EXACT)
    model.train()
    for ids, state in zip(steps, states, strict=True):
        torch.set_rng_state(state)
        batches = [
            padded([train[i] for i in part]) for part in np.split(ids, range(3, len(ids), 3))
        ]
        causal = batches[0]["labels"].dim() > 1
        items = sum(
            (batch["labels"][:, 1:] != -100).sum() if causal else torch.tensor(len(batch["labels"]))
            for batch in batches
        )
        with recorder.step(ids) as note:
            losses = []
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch, num_items_in_batch=items).loss
                loss.backward()
                losses.append(loss.item())
            note.loss = sum(losses)
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    alone = [padded([sample]) for sample in tests]
    with torch.autocast("cpu", torch.bfloat16):  # as the trainer evaluates
        recorder.record_test(
            [(batch, batch["labels"]) for batch in alone], lambda output, _: output.loss.reshape(1)
        )
    recorder.close()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_weights_are_those_without_it_and_the_run_is_that_of_a_plain_loop(
    tmp_path: Path, kind: str
) -> None:
    causal = kind == "language model"
    train, tests = texts(32, 0, causal=causal), texts(5, 1, causal=causal)
    plain, recorded, looped = (MODELS[kind]() for _ in range(3))
    trainer(tmp_path / "plain", plain, train).train()
    witness = Witness()
    trainer(
        tmp_path / "out",
        recorded,
        train,
        [HydraCallback(tmp_path / "run", tests, **EXACT), witness],
    ).train()
    assert_same_weights(plain, recorded)
    hooks = [
        hook
        for module in recorded.modules()
        for hook in (module._forward_hooks, module._forward_pre_hooks)
    ]
    assert not any(hooks)

    found = arrays(tmp_path / "run")
    for epoch in range(2):  # 32 samples, 12 a step, 3 steps an epoch
        own = (found[names.STEP] >= 3 * epoch) & (found[names.STEP] < 3 * epoch + 3)
        assert sorted(found[names.SAMPLE][own]) == list(range(32))
    assert np.isfinite(found[names.CURVATURE]).all()
    assert found[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.02  # in bfloat16

    plain_recording(
        tmp_path / "loop",
        looped,
        train,
        tests,
        tmp_path / "other",
        tmp_path / "run",
        witness.states,
    )
    assert_same_weights(recorded, looped)
    assert_same_arrays(tmp_path / "run", tmp_path / "loop")
    relevances = []
    for run in (tmp_path / "run", tmp_path / "loop"):
        hydra_pipe.reduce(run, method="hydra")
        relevances.append(np.asarray(hydra_pipe.open_run(run).relevance("hydra")))
    np.testing.assert_array_equal(*relevances)
    assert np.abs(relevances[0]).max() > 0


def record(
    tmp_path: Path,
    name: str,
    train: Any,
    *others: TrainerCallback,
    resume: Path | None = None,
    **options: Any,
) -> nn.Module:
    """A classifier trained and recorded; its trainer's own files are in `name`-out."""
    model = classifier()
    callback = HydraCallback(tmp_path / name, texts(5, 1, causal=False), **EXACT)
    made = trainer(tmp_path / f"{name}-out", model, train, [callback, *others], **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


@pytest.mark.parametrize(
    ("stop", "options"),
    [(4, {}), (5, {"save_steps": 2, "optim": "adamw_torch"})],
    ids=["epoch", "middle"],
)
def test_a_training_that_was_stopped_goes_on_from_the_trainers_checkpoint(
    tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    train = texts(32, 0, causal=False)
    whole = record(tmp_path, "whole", train, **options)
    with pytest.raises(StoppedError):
        record(tmp_path, "run", train, Killer(stop), **options)
    assert "record" not in [
        s
        for s, found in hydra_pipe.open_run(tmp_path / "run").info()["stages"].items()
        if found == "complete"
    ]
    last = (
        tmp_path
        / "run-out"
        / f"checkpoint-{options.get('save_steps', 3) * (stop // options.get('save_steps', 3))}"
    )
    resumed = record(tmp_path, "run", train, resume=last, **options)
    assert_same_weights(whole, resumed)
    assert_same_arrays(tmp_path / "whole", tmp_path / "run")
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_workers_evaluation_and_the_best_model_do_not_disturb(tmp_path: Path) -> None:
    train, others = texts(32, 0, causal=False), texts(9, 2, causal=False)
    options = {"eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": 2}
    models = {}
    for name, best in (("plain", False), ("last", False), ("best", True)):
        models[name] = classifier()
        callbacks = (
            []
            if name == "plain"
            else [HydraCallback(tmp_path / name, texts(5, 1, causal=False), **EXACT)]
        )
        made = trainer(
            tmp_path / f"{name}-out",
            models[name],
            train,
            callbacks,
            others,
            load_best_model_at_end=best,
            **options,
        )
        made.train()
    assert_same_weights(models["plain"], models["last"])
    # of the last step's parameters, whatever the trainer puts into the model afterwards
    assert_same_arrays(tmp_path / "last", tmp_path / "best")


def test_two_processes_record_one_run_and_go_on_with_it(tmp_path: Path) -> None:
    rows = rows_of_two(
        "trainer_ranks.py", tmp_path, {"RANK": "RANK", "LOCAL_RANK": "RANK"}, WORLD_SIZE="2"
    )
    assert samples_of_two(rows) == sorted([*range(32)] * 2)  # each once an epoch
    assert rows[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.02


def test_adapters_are_recorded_without_loss(tmp_path: Path) -> None:
    train, tests = texts(32, 0, causal=True), texts(5, 1, causal=True)
    models = []
    for run in (None, tmp_path / "run"):
        lora = LoraConfig(
            r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        models.append(get_peft_model(language_model(), lora))
        callbacks = [] if run is None else [HydraCallback(run, tests, encoding="exact")]
        trainer(tmp_path / "out", models[-1], train, callbacks).train()
    assert_same_weights(*models)
    recording = hydra_pipe.open_run(tmp_path / "run").info()["recording"]
    # each layer: attention 16 to 48, feed-forward 16 to 64, of rank 2
    assert recording["features"] == recording["parameters"] == 2 * 2 * (16 + 48 + 16 + 64)
    assert all(block["exact"] and ".lora_" in block["name"] for block in recording["blocks"])
    assert arrays(tmp_path / "run")[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.02


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    def dataset(n: int, seed: int) -> Dataset:
        return Dataset.from_list(
            [row | {"sentence": f"text {i}"} for i, row in enumerate(texts(n, seed, causal=False))]
        )

    for name, train, tests in (
        ("lists", texts(32, 0, causal=False), texts(5, 1, causal=False)),
        ("datasets", dataset(32, 0), dataset(5, 1)),
    ):
        trainer(
            tmp_path / "out", classifier(), train, [HydraCallback(tmp_path / name, tests, **EXACT)]
        ).train()
    assert_same_arrays(tmp_path / "lists", tmp_path / "datasets")


class Augmented(list[Any]):
    """Samples that draw a random number each time."""

    def __getitem__(self, index: Any) -> Any:
        torch.rand(())
        return super().__getitem__(index)


def test_a_dataset_that_draws_random_numbers_draws_none_more(tmp_path: Path) -> None:
    train = Augmented(texts(32, 0, causal=False))
    plain = classifier()
    trainer(tmp_path / "plain", plain, train).train()
    assert_same_weights(plain, record(tmp_path, "run", train))
    assert arrays(tmp_path / "run")["labels/train"].tolist() == [
        sample["labels"] for sample in list(train)
    ]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(texts(32, 0, causal=False))


def bare(rows: list[Any]) -> Any:
    return tuple(padded(rows).values())


REFUSED: list[tuple[str, Callable[[Path], Any], type[HydraError], str]] = [
    ("no test samples", lambda run: HydraCallback(run, []), DataError, "test_dataset is empty"),
    (
        "restored",
        lambda run: HydraCallback(),
        UsageError,
        "Leave restore_callback_states_from_checkpoint at False",
    ),
    (
        "stream",
        lambda run: record(run, "run", Stream(), max_steps=4),
        RecordError,
        "Stream is an iterable dataset",
    ),
    (
        "compiled",
        lambda run: record(run, "run", texts(8, 0, causal=False), torch_compile=True),
        UsageError,
        "torch_compile hides",
    ),
    (
        "tuples",
        lambda run: record(run, "run", texts(8, 0, causal=False), collator=bare),
        DataError,
        "collator returned tuple",
    ),
    (
        "optimizer",
        lambda run: record(run, "run", texts(8, 0, causal=False), optim="adafactor"),
        HydraError,
        "transformers.optimization.Adafactor is not handled",
    ),
]


@pytest.mark.parametrize(
    ("case", "act", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, case: str, act: Callable[[Path], Any], error: type[HydraError], message: str
) -> None:
    with pytest.raises(error, match=message):
        act(tmp_path)


def test_a_checkpoint_without_a_recording_is_refused(tmp_path: Path) -> None:
    train = texts(32, 0, causal=False)
    with pytest.raises(StoppedError):
        trainer(tmp_path / "run-out", classifier(), train, [Killer(4)]).train()
    with pytest.raises(
        RecordError, match="the checkpoint of step 3 was made without HydraCallback"
    ):
        record(tmp_path, "run", train, resume=tmp_path / "run-out" / "checkpoint-3")


def test_a_finished_recording_is_kept(tmp_path: Path) -> None:
    record(tmp_path, "run", texts(32, 0, causal=False))
    with pytest.raises(RunError, match="is recorded already"):
        record(tmp_path, "run", texts(32, 0, causal=False))


def test_test_samples_without_labels_are_told(tmp_path: Path) -> None:
    tests = [{"input_ids": [5, 6]}]
    callback = HydraCallback(tmp_path / "run", tests)

    def unlabelled(rows: list[Any]) -> Any:
        return (
            padded(rows)
            if "labels" in rows[0]
            else {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
        )

    with pytest.raises(DataError, match="test sample 0 has no labels"):
        trainer(
            tmp_path / "out",
            classifier(),
            texts(8, 0, causal=False),
            [callback],
            collator=unlabelled,
        ).train()


@pytest.mark.data
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_sentences_of_sst2(tmp_path: Path, shared_data: Path, kind: str) -> None:
    """As above, with real sentences of many lengths."""
    causal = kind == "language model"
    train, tests, words = sst2(shared_data, 120, 6, causal=causal, vocabulary=200)
    of_words = {"language model": language_model, "classifier": classifier}[kind]
    plain, recorded = of_words(200), of_words(200)
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
    trainer(tmp_path / "plain", plain, train, **options).train()
    trainer(
        tmp_path / "out", recorded, train, [HydraCallback(tmp_path / "run", tests)], **options
    ).train()
    assert_same_weights(plain, recorded)
    found = arrays(tmp_path / "run")
    assert sorted(found[names.SAMPLE]) == list(range(120))
    assert found[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.02
    hydra_pipe.reduce(tmp_path / "run")
    assert (
        np.abs(np.asarray(hydra_pipe.open_run(tmp_path / "run").relevance())).min(axis=0).max() > 0
    )
    shown = hydra_pipe.ShownSamples(train, tests, lambda sample: words.decode(sample["input_ids"]))
    assert hydra_pipe.report(tmp_path / "run", samples=shown)
    page = html.unescape((tmp_path / "run" / names.REPORT).read_text(encoding="utf-8"))
    assert all(words.decode(sample["input_ids"]) in page for sample in tests)
    with pytest.raises(UsageError, match="not both"):
        hydra_pipe.report(tmp_path / "run", samples=shown, pipeline="pipelines/digits.py")


class Padded(nn.Module):
    """A classifier whose forward takes no labels and returns a tuple, or with labels the loss
    before its scores.
    """

    def __init__(self, *, takes_labels: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 2)
        if takes_labels:
            self.forward = self.with_labels  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        masked = self.embed(input_ids) * attention_mask[..., None]
        return (self.head(masked.sum(1)),)

    def with_labels(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> Any:
        scores = self.head((self.embed(input_ids) * attention_mask[..., None]).sum(1))
        return (
            (scores,) if labels is None else (nn.functional.cross_entropy(scores, labels), scores)
        )


class OwnLoss(Trainer):
    """Computes the loss itself, of a model that takes no labels."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs[0], labels)
        return (loss, outputs) if return_outputs else loss


def own(tmp_path: Path, model: nn.Module, callback: HydraCallback, kind: type[Trainer]) -> None:
    train = texts(32, 0, causal=False)
    args = arguments(tmp_path / "out", remove_unused_columns=False, bf16=False)
    kind(model, args, train_dataset=train, data_collator=padded, callbacks=[callback]).train()


def state_of(run: Path) -> str:
    return str(json.loads((run / names.MANIFEST).read_text())["stages"]["record"]["state"])


def test_a_model_that_returns_a_tuple_has_its_loss_first(tmp_path: Path) -> None:
    own(
        tmp_path,
        Padded(takes_labels=True),
        HydraCallback(tmp_path / "run", texts(5, 1, causal=False), **EXACT),
        Trainer,
    )
    assert hydra_pipe.reduce(tmp_path / "run", method="hydra")


def test_a_model_whose_forward_takes_no_labels_needs_a_test_loss(tmp_path: Path) -> None:
    tests = texts(5, 1, causal=False)
    with pytest.raises(
        DataError,
        match=r"Padded.forward takes no labels, and returns no loss: give HydraCallback.*test_loss",
    ):
        own(tmp_path, Padded(takes_labels=False), HydraCallback(tmp_path / "none", tests), OwnLoss)
    assert not (tmp_path / "none").exists()

    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output[0], labels, reduction="none")

    own(
        tmp_path,
        Padded(takes_labels=False),
        HydraCallback(tmp_path / "run", tests, test_loss=loss, **EXACT),
        OwnLoss,
    )
    assert hydra_pipe.reduce(tmp_path / "run", method="hydra")


TOO_LONG = {"input_ids": [5] * 99, "labels": 1}


def test_a_test_set_is_optional(tmp_path: Path) -> None:
    model = classifier()
    trainer(
        tmp_path / "out",
        model,
        texts(32, 0, causal=False),
        [HydraCallback(tmp_path / "run", **EXACT)],
    ).train()
    assert hydra_pipe.verify(tmp_path / "run") == []
    tests = [padded([sample]) for sample in texts(5, 1, causal=False)]

    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits, labels, reduction="none")

    hydra_pipe.probe(tmp_path / "run", tests, name="late", model=model, loss=loss)
    assert hydra_pipe.reduce(tmp_path / "run", probe="late", method="hydra")


SLIPS: list[tuple[str, Any, str]] = [
    ("too long", TOO_LONG, "the model raised at the first test samples, before training"),
    (
        "raw text",
        {"input_ids": "a film to see", "labels": 1},
        "the data collator raised at test sample 0",
    ),
    ("no labels", {"input_ids": [5, 6]}, "the data collator raised at test sample 0: KeyError"),
    (
        "a label that is none of the model's",
        {"input_ids": [5, 6], "labels": 99},
        "the model raised at the first",
    ),
]


@pytest.mark.parametrize(("case", "sample", "message"), SLIPS, ids=[case[0] for case in SLIPS])
def test_a_slip_in_the_test_samples_is_told_before_training_or_leaves_its_result(
    tmp_path: Path, case: str, sample: Any, message: str
) -> None:
    train, good = texts(32, 0, causal=False), texts(2, 1, causal=False)
    with pytest.raises(HydraError, match=message):
        trainer(
            tmp_path / "out",
            classifier(),
            train,
            [HydraCallback(tmp_path / "first", [sample, *good], **EXACT)],
        ).train()
    assert not (tmp_path / "first").exists()
    plain, model = classifier(), classifier()
    trainer(tmp_path / "plain", plain, train).train()
    callback = HydraCallback(tmp_path / "last", [*good, sample], test_labels=[0, 1, 0], **EXACT)
    with pytest.warns(RecordWarning, match="were not taken: .*hydra_pipe.probe"):
        assert trainer(tmp_path / "out", model, train, [callback]).train().global_step == 6
    assert_same_weights(plain, model)
    assert state_of(tmp_path / "last") == "complete"
    assert hydra_pipe.verify(tmp_path / "last") == []


class Interrupter(TrainerCallback):
    def on_substep_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_hooked(tmp_path: Path) -> None:
    model = classifier()
    made = trainer(
        tmp_path / "out",
        model,
        texts(32, 0, causal=False),
        [HydraCallback(tmp_path / "run", **EXACT), Interrupter()],
    )
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert not any(
        hook for part in model.modules() for hook in (part._forward_hooks, part._forward_pre_hooks)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**padded(texts(3, 0, causal=False))).loss.backward()
    optimizer.step()
