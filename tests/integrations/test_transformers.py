"""Recording under `transformers.Trainer`: nothing changes in training, and the run is that of a plain loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from small_trainers import classifier, language_model, padded, texts, trainer
from torch import nn
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.integrations.transformers import HydraCallback
from hydra_pipe.store import names

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step.*:UserWarning")

MODELS: dict[str, Callable[[], nn.Module]] = {"language model": language_model, "classifier": classifier}
EXACT: dict[str, Any] = {"encoding": "exact", "dtype": "float32"}


class Witness(TrainerCallback):
    """Notes the random state in which each step begins."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.states.append(torch.get_rng_state())


class StoppedError(Exception):
    pass


class Killer(TrainerCallback):
    """Ends a training in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def arrays(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every array of the recording; those by row and by step by their last name."""
    store = zarr.open_group(run / names.GRADIENTS, mode="r")
    return {name: np.asarray(found[:]) for name, found in store.members(max_depth=None) if isinstance(found, zarr.Array)}


def assert_same_run(run: Path, other: Path) -> None:
    """All arrays of two recordings, bit for bit."""
    one, two = arrays(run), arrays(other)
    assert sorted(one) == sorted(two)
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


def steps_of(run: Path) -> list[np.ndarray[Any, Any]]:
    """The sample ids of each step."""
    found = arrays(run)
    return [found[names.SAMPLE][found[names.STEP] == step] for step in range(found[names.STEP].max() + 1)]


def plain_recording(run: Path, model: nn.Module, train: Any, tests: Any, out: Path, of: Path, states: list[torch.Tensor]) -> None:
    """The training that `of` recorded, in a loop that names its samples, from the random states that its steps began with."""
    made = trainer(out, model, train)
    args, optimizer = made.args, made.create_optimizer()
    steps = steps_of(of)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_steps), len(steps))
    labels = None if isinstance(train[0]["labels"], list) else [sample["labels"] for sample in train]
    recorder = Recorder(model, optimizer, run, len(train), sample_labels=labels, **EXACT)
    model.train()
    for ids, state in zip(steps, states, strict=True):
        torch.set_rng_state(state)
        batches = [padded([train[i] for i in part]) for part in np.split(ids, range(3, len(ids), 3))]
        causal = batches[0]["labels"].dim() > 1
        items = sum((batch["labels"][:, 1:] != -100).sum() if causal else torch.tensor(len(batch["labels"])) for batch in batches)
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
        recorder.record_test([(batch, batch["labels"]) for batch in alone], lambda output, _: output.loss.reshape(1))
    recorder.close()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_weights_are_those_without_it_and_the_run_is_that_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    causal = kind == "language model"
    train, tests = texts(32, 0, causal=causal), texts(5, 1, causal=causal)
    plain, recorded, looped = (MODELS[kind]() for _ in range(3))
    trainer(tmp_path / "plain", plain, train).train()
    witness = Witness()
    trainer(tmp_path / "out", recorded, train, [HydraCallback(tmp_path / "run", tests, **EXACT), witness]).train()
    assert_same_weights(plain, recorded)
    hooks = [hook for module in recorded.modules() for hook in (module._forward_hooks, module._forward_pre_hooks)]
    assert not any(hooks)

    found = arrays(tmp_path / "run")
    for epoch in range(2):  # 32 samples, 12 a step, 3 steps an epoch
        own = (found[names.STEP] >= 3 * epoch) & (found[names.STEP] < 3 * epoch + 3)
        assert sorted(found[names.SAMPLE][own]) == list(range(32))
    assert np.isfinite(found[names.CURVATURE]).all()
    assert found[f"{names.STEPS}/{names.IMBALANCE}"].max() < 0.02  # in bfloat16

    plain_recording(tmp_path / "loop", looped, train, tests, tmp_path / "other", tmp_path / "run", witness.states)
    assert_same_weights(recorded, looped)
    assert_same_run(tmp_path / "run", tmp_path / "loop")
    relevances = []
    for run in (tmp_path / "run", tmp_path / "loop"):
        hydra_pipe.reduce(run)
        relevances.append(np.asarray(hydra_pipe.open_run(run).relevance("hydra")))
    np.testing.assert_array_equal(*relevances)
    assert np.abs(relevances[0]).max() > 0


def record(tmp_path: Path, name: str, train: Any, *others: TrainerCallback, resume: Path | None = None, **options: Any) -> nn.Module:
    """A classifier trained and recorded; its trainer's own files are in `name`-out."""
    model = classifier()
    callback = HydraCallback(tmp_path / name, texts(5, 1, causal=False), **EXACT)
    made = trainer(tmp_path / f"{name}-out", model, train, [callback, *others], **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


@pytest.mark.parametrize(("stop", "options"), [(4, {}), (5, {"save_steps": 2, "optim": "adamw_torch"})], ids=["epoch", "middle"])
def test_a_training_that_was_stopped_goes_on_from_the_trainers_checkpoint(
    tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    train = texts(32, 0, causal=False)
    whole = record(tmp_path, "whole", train, **options)
    with pytest.raises(StoppedError):
        record(tmp_path, "run", train, Killer(stop), **options)
    assert "record" not in [s for s, found in hydra_pipe.open_run(tmp_path / "run").info()["stages"].items() if found == "complete"]
    last = tmp_path / "run-out" / f"checkpoint-{options.get('save_steps', 3) * (stop // options.get('save_steps', 3))}"
    resumed = record(tmp_path, "run", train, resume=last, **options)
    assert_same_weights(whole, resumed)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_workers_evaluation_and_the_best_model_do_not_disturb(tmp_path: Path) -> None:
    train, others = texts(32, 0, causal=False), texts(9, 2, causal=False)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "dataloader_num_workers": 2}
    models = {}
    for name, best in (("plain", False), ("last", False), ("best", True)):
        models[name] = classifier()
        callbacks = [] if name == "plain" else [HydraCallback(tmp_path / name, texts(5, 1, causal=False), **EXACT)]
        made = trainer(tmp_path / f"{name}-out", models[name], train, callbacks, others, load_best_model_at_end=best, **options)
        made.train()
    assert_same_weights(models["plain"], models["last"])
    # of the last step's parameters, whatever the trainer puts into the model afterwards
    assert_same_run(tmp_path / "last", tmp_path / "best")
