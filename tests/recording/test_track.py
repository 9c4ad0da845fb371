"""`Recorder.track`: a loop that is left as it is gives the rows of one that names its samples."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pipelines import conv_net, cross_entropy, images
from support.recordings import arrays, assert_same_arrays, assert_same_weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.errors import DataError, GradientMismatchError, LayerError, RecordError, UsageError

N_SAMPLES = 22
IMAGES, TARGETS = images(N_SAMPLES, 1).tensors
# each sample knows its number, which only the loops that name them look at
TRAIN = TensorDataset(IMAGES, TARGETS, torch.arange(N_SAMPLES))


class Dropping(nn.Module):
    """Draws from the generator that the loader draws from too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.net(x), 0.2, self.training)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def tracking(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **options: object
) -> Recorder:
    return Recorder(
        model,
        optimizer,
        run,
        n_samples=N_SAMPLES,
        **({"encoding": "exact", "dtype": "float32"} | options),
    )


def groups_of(loader: Iterator, size: int) -> Iterator[list]:
    waiting = []
    for batch in loader:
        waiting.append(batch)
        if len(waiting) == size:
            yield waiting
            waiting = []


def named_loop(
    recorder: Recorder | None, model, optimizer, loader, accumulate: int, epochs: int
) -> None:
    """The slow twin: every step collects its batches first and names their samples; None: not
    recorded at all.
    """
    for _ in range(epochs):
        for batches in groups_of(loader, accumulate):

            def body(batches=batches) -> None:
                for x, y, _ in batches:
                    (cross_entropy(model(x), y).sum() / 16).backward()
                optimizer.step()
                optimizer.zero_grad()

            if recorder is None:
                body()
            else:
                with recorder.step(torch.cat([batch[2] for batch in batches])):
                    body()


def tracked_loop(model, optimizer, loader, accumulate: int, epochs: int) -> None:
    for _ in range(epochs):
        for k, (x, y, *_) in enumerate(loader, 1):
            (cross_entropy(model(x), y).sum() / 16).backward()
            if k % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()  # what is left over is thrown away, as the other loop does


LOADERS: dict[str, Callable[[], dict[str, object]]] = {
    "in order": lambda: {"batch_size": 8},
    "shuffled": lambda: {"batch_size": 8, "shuffle": True},
    "own generator": lambda: {
        "batch_size": 8,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(5),
    },
    "two workers": lambda: {"batch_size": 8, "shuffle": True, "num_workers": 2},
    "persistent": lambda: {
        "batch_size": 8,
        "shuffle": True,
        "num_workers": 2,
        "persistent_workers": True,
        "prefetch_factor": 3,
    },
    "batch sampler": lambda: {
        "batch_sampler": [range(14, 22), [1, *range(0, 14, 2)], torch.arange(3, 14, 2)]
    },
    "distributed": lambda: {
        "batch_size": 8,
        "sampler": DistributedSampler(TRAIN, num_replicas=1, rank=0, seed=3),
    },
    "whole batches": lambda: {
        "batch_size": None,
        "sampler": BatchSampler(SequentialSampler(TRAIN), 7, True),
    },
    "last dropped": lambda: {"batch_size": 7, "shuffle": True, "drop_last": True},
}


@pytest.mark.parametrize("options", list(LOADERS))
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rows_and_weights_are_those_of_a_loop_that_names_its_samples(
    tmp_path: Path, options: str, accumulate: int
) -> None:
    def run(loop: str) -> nn.Module:
        model = Dropping()
        optimizer = sgd(model)
        loader: DataLoader = DataLoader(TRAIN, **LOADERS[options]())
        torch.manual_seed(7)
        if loop == "plain":
            tracked_loop(model, optimizer, loader, accumulate, 3)
            return model
        recorder = tracking(tmp_path / loop, model, optimizer)
        if loop == "tracked":
            tracked_loop(model, optimizer, recorder.track(loader), accumulate, 3)
        else:
            named_loop(recorder, model, optimizer, loader, accumulate, 3)
        recorder.close()
        return model

    plain, tracked = run("plain"), run("tracked")
    assert_same_weights(plain, tracked)
    # the twin reads a group of batches ahead, between which the model draws random numbers
    if accumulate == 1:
        assert_same_weights(run("named"), tracked)
        assert_same_arrays(tmp_path / "named", tmp_path / "tracked")


@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_step(
    tmp_path: Path, build, workers: int, accumulate: int
) -> None:
    for loop in ("named", "tracked"):
        model = conv_net()
        optimizer = build(model)
        loader = DataLoader(TRAIN, batch_size=8, shuffle=True, num_workers=workers)
        torch.manual_seed(7)
        recorder = tracking(tmp_path / loop, model, optimizer)
        if loop == "named":
            named_loop(recorder, model, optimizer, loader, accumulate, 3)
        else:
            tracked_loop(model, optimizer, recorder.track(loader), accumulate, 3)
        recorder.close()
    assert_same_arrays(tmp_path / "named", tmp_path / "tracked")
    assert (
        arrays(tmp_path / "tracked")["steps/n_rows"].tolist() == [22 if accumulate == 3 else 16] * 3
    )


def test_losses_that_are_added_up_before_one_backward_pass_are_one_step(tmp_path: Path) -> None:
    for loop in ("named", "tracked"):
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / loop, model, optimizer)
        loader = DataLoader(TRAIN, batch_size=6, drop_last=True)
        if loop == "named":
            named_loop(recorder, model, optimizer, loader, 3, 2)
        else:
            for _ in range(2):
                losses = [
                    cross_entropy(model(x), y).sum() / 16 for x, y, _ in recorder.track(loader)
                ]
                sum(losses).backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()
    ours, others = arrays(tmp_path / "tracked"), arrays(tmp_path / "named")
    assert ours["sample"].tolist() == others["sample"].tolist() == [*range(18)] * 2
    np.testing.assert_allclose(ours["gradient"], others["gradient"], atol=1e-6)


def test_a_batch_may_go_through_the_model_in_parts(tmp_path: Path) -> None:
    for loop in ("whole", "parts"):
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / loop, model, optimizer)
        for k, (x, y, _) in enumerate(
            recorder.track(DataLoader(TRAIN, batch_size=8, drop_last=True))
        ):
            for part in (slice(0, 3), slice(3, 8)) if loop == "parts" else (slice(0, 8),):
                (cross_entropy(model(x[part]), y[part]).sum() / 16).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()
    assert arrays(tmp_path / "parts")["sample"].tolist() == [*range(16)]
    np.testing.assert_allclose(
        arrays(tmp_path / "parts")["scale"], arrays(tmp_path / "whole")["scale"], rtol=1e-4
    )


def facts_of(run: Path) -> dict[str, object]:
    return hydra_pipe.open_run(run).info()["stages"]["record"]["facts"]


@pytest.mark.parametrize(
    "clear", ["before the forward pass", "before the backward pass", "after the step"]
)
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("build", [sgd, adamw])
def test_a_step_that_a_gradient_scaler_leaves_out_is_not_taken_for_accumulation(
    tmp_path: Path, clear: str, to_none: bool, build
) -> None:
    model = mlp()
    optimizer = build(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loader = recorder.track(DataLoader(TRAIN, batch_size=2))
    for k, (x, y, _) in enumerate(loader):
        if clear == "before the forward pass":
            optimizer.zero_grad(set_to_none=to_none)
        loss = cross_entropy(model(x), y).mean() * (float("inf") if k in (0, 3, 4, 10) else 1.0)
        if clear == "before the backward pass":
            optimizer.zero_grad(set_to_none=to_none)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if clear == "after the step":
            optimizer.zero_grad(set_to_none=to_none)
    recorder.close()
    # nothing comes after the last one that could tell whether it was skipped or is only unfinished
    assert (facts_of(tmp_path / "run")["n_steps"], facts_of(tmp_path / "run")["n_skipped"]) == (
        7,
        3,
    )
    expected = [i for k in (1, 2, 5, 6, 7, 8, 9) for i in (2 * k, 2 * k + 1)]
    assert arrays(tmp_path / "run")["sample"].tolist() == expected
    assert arrays(tmp_path / "run")["steps/n_rows"].tolist() == [2] * 7


def test_accumulated_batches_whose_step_is_left_out_are_one_skipped_step(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    for k, (x, y, _) in enumerate(recorder.track(DataLoader(TRAIN, batch_size=2))):
        cross_entropy(model(x), y).mean().backward()
        if k % 3 == 2:
            if k != 5:
                optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    assert arrays(tmp_path / "run")["sample"].tolist() == [*range(6), *range(12, 18)]
    assert recorder.n_skipped == 1


def test_a_batch_whose_loss_is_not_wanted_is_left_out(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    for k, (x, y, _) in enumerate(recorder.track(DataLoader(TRAIN, batch_size=2))):
        loss = cross_entropy(model(x), y).mean()
        if k in (0, 3, 4):
            continue
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()
    assert arrays(tmp_path / "run")["sample"].tolist() == [
        i for i in range(22) if i // 2 not in (0, 3, 4)
    ]
    assert recorder.n_skipped == 0  # no gradient was thrown away


def test_a_batch_without_any_loss_left_counts_among_the_accumulated(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    for k, (x, y, _) in enumerate(recorder.track(DataLoader(TRAIN, batch_size=11))):
        (cross_entropy(model(x), y).mean() * k).backward()
    optimizer.step()
    recorder.close()
    assert arrays(tmp_path / "run")["steps/n_rows"].tolist() == [22]
    assert recorder.n_skipped == 0


@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_in_the_loop_is_not_recorded(tmp_path: Path, gradients: bool) -> None:
    def loop(run: Path, evaluate: bool) -> None:
        model = conv_net()
        optimizer = sgd(model)
        recorder = tracking(run, model, optimizer)
        loader = recorder.track(DataLoader(TRAIN, batch_size=8))
        for _ in range(2):
            for x, y, _ in loader:
                if evaluate:
                    model.eval()
                    with torch.no_grad():
                        model(IMAGES)
                    model.train()
                cross_entropy(model(x), y).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if evaluate:  # nothing is watched after the step, so gradients may be on
                    model.eval()
                    with torch.set_grad_enabled(gradients):
                        cross_entropy(model(IMAGES[:5]), TARGETS[:5]).mean()
                    model.train()
            if evaluate:  # over the tracked loader itself, and a look at its first batch
                model.eval()
                with torch.no_grad():
                    for x, *_ in loader:
                        model(x)
                model.train()
                next(iter(loader))
        recorder.close()

    loop(tmp_path / "plain", False)
    loop(tmp_path / "eval_mode", True)
    assert_same_arrays(tmp_path / "plain", tmp_path / "eval_mode")
    assert facts_of(tmp_path / "eval_mode")["n_skipped"] == 0


@pytest.mark.parametrize("where", ["between", "before the pass", "in mid-accumulation"])
def test_test_gradients_may_be_taken_anywhere_in_the_loop(tmp_path: Path, where: str) -> None:
    def loop(run: Path, tests: bool) -> nn.Module:
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(run, model, optimizer)
        loader = recorder.track(DataLoader(TRAIN, batch_size=4, shuffle=True))
        torch.manual_seed(3)
        for k, (x, y, _) in enumerate(loader):
            if tests and k == 3 and where == "before the pass":
                recorder.record_test(DataLoader(TRAIN, batch_size=5), cross_entropy)
            (cross_entropy(model(x), y).mean() / 2).backward()
            if tests and k == 2 and where == "in mid-accumulation":
                recorder.record_test(loader, cross_entropy)
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
            if tests and k == 3 and where == "between":
                recorder.record_test(DataLoader(TRAIN, batch_size=5), cross_entropy)
        recorder.close()
        return model

    assert_same_weights(loop(tmp_path / "without", False), loop(tmp_path / "with", True))
    with_tests = arrays(tmp_path / "with")
    for name, values in arrays(tmp_path / "without").items():
        assert values.tobytes() == with_tests[name].tobytes(), name
    assert any(name.startswith("test/") for name in with_tests)


def test_the_loaders_attributes_are_still_there(tmp_path: Path) -> None:
    model = mlp()
    recorder = tracking(tmp_path / "run", model, sgd(model))
    sampler = DistributedSampler(TRAIN, num_replicas=2, rank=1)
    plain = DataLoader(TRAIN, batch_size=8, sampler=sampler)
    loader = recorder.track(plain)
    assert (len(loader), loader.batch_size, loader.dataset) == (len(plain), 8, TRAIN)
    assert loader.sampler is sampler
    loader.sampler.set_epoch(4)
    assert sampler.epoch == 4
    assert [b[2].tolist() for b in plain] == [[*sampler][:8], [*sampler][8:]]
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        loader.colour  # noqa: B018


def test_each_of_two_ranks_names_samples_by_their_index_in_the_whole_set(tmp_path: Path) -> None:
    seen = []
    for rank in range(2):
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / str(rank), model, optimizer)
        loader = recorder.track(
            DataLoader(TRAIN, batch_size=8, sampler=DistributedSampler(TRAIN, 2, rank))
        )
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for x, y, ids in loader:
                seen += ids.tolist()
                cross_entropy(model(x), y).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()
        assert arrays(tmp_path / str(rank))["sample"].tolist() == seen
        assert sorted(seen) != [*range(N_SAMPLES)]
        seen = []


def test_an_epoch_that_is_left_early_does_not_shift_the_next(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    loader = recorder.track(DataLoader(TRAIN, batch_size=4, shuffle=True, num_workers=2))
    seen = []
    for _ in range(3):
        for k, (x, y, ids) in enumerate(loader):
            seen += ids.tolist()
            cross_entropy(model(x), y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if k == 1:
                break
    recorder.close()
    assert arrays(tmp_path / "run")["sample"].tolist() == seen
    assert len(seen) == 24
    assert multiprocessing.active_children() == []


def test_a_recurrent_net_is_accumulated_and_dropped_like_any_other(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out, weights = self.attend(x.squeeze(1), x.squeeze(1), x.squeeze(1))
            return self.head(out.mean(1)) + weights.mean(1)[:, :4]

    torch.manual_seed(0)
    model = Recurrent()
    optimizer = sgd(model)
    recorder = tracking(tmp_path / "run", model, optimizer)
    for k, (x, y, _) in enumerate(recorder.track(DataLoader(TRAIN, batch_size=2))):
        cross_entropy(model(x), y).mean().backward()
        if k % 2:
            if k != 3:
                optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    assert arrays(tmp_path / "run")["sample"].tolist() == [0, 1, 2, 3, *range(8, 20)]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class TestWhatCannotBeTracked:
    @pytest.mark.parametrize(
        ("loader", "error", "message"),
        [
            (
                lambda: [1, 2],
                UsageError,
                r"only a torch\.utils\.data\.DataLoader can be tracked, not a list",
            ),
            (lambda: DataLoader(Stream()), RecordError, "Stream is an IterableDataset"),
            (
                lambda: DataLoader(TRAIN, num_workers=2, in_order=False),
                RecordError,
                "in_order=False",
            ),
            (
                lambda: DataLoader(images(21, 0)),
                DataError,
                "dataset has 21 samples, the recorder's n_samples is 22",
            ),
            (lambda: DataLoader(Endless(), sampler=range(3)), DataError, "Endless has no length"),
        ],
    )
    def test_loaders(self, tmp_path: Path, loader, error, message: str) -> None:
        model = mlp()
        with pytest.raises(error, match=message):
            tracking(tmp_path / "run", model, sgd(model)).track(loader())

    def test_workers_that_run_already(self, tmp_path: Path) -> None:
        loader = DataLoader(TRAIN, num_workers=1, persistent_workers=True)
        next(iter(loader))
        model = mlp()
        with pytest.raises(RecordError, match="persistent workers are running already"):
            tracking(tmp_path / "run", model, sgd(model)).track(loader)

    def test_a_loader_that_draws_more_than_it_gives(self, tmp_path: Path) -> None:
        class Skipping(DataLoader):
            def __iter__(self) -> Iterator:
                batches = super().__iter__()
                next(batches)
                return batches

        model = mlp()
        loader = tracking(tmp_path / "run", model, sgd(model)).track(Skipping(TRAIN))
        with pytest.raises(
            RecordError, match="Skipping gave one batch when its sampler had drawn 2"
        ):
            next(iter(loader))

    def test_a_closed_recorder(self, tmp_path: Path) -> None:
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / "run", model, optimizer)
        loader = recorder.track(DataLoader(TRAIN, batch_size=11))
        tracked_loop(model, optimizer, loader, 1, 1)
        recorder.close()
        with pytest.raises(RecordError, match="this recorder is closed"):
            recorder.track(DataLoader(TRAIN))
        tracked_loop(model, optimizer, loader, 1, 1)  # training may go on


class TestLoopsThatGoWrong:
    @staticmethod
    def start(
        tmp_path: Path, **options: object
    ) -> tuple[nn.Module, torch.optim.Optimizer, Recorder, object]:
        model = mlp()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / "run", model, optimizer)
        return (
            model,
            optimizer,
            recorder,
            recorder.track(DataLoader(TRAIN, **({"batch_size": 8} | options))),
        )

    def test_a_second_step_on_one_batch(self, tmp_path: Path) -> None:
        model, optimizer, _, loader = self.start(tmp_path)
        x, y, _ = next(iter(loader))
        cross_entropy(model(x), y).mean().backward()
        optimizer.step()
        with pytest.raises(
            RecordError, match=r"optimizer\.step\(\) at step 1 has no batch from a loader"
        ):
            optimizer.step()

    def test_a_batch_of_which_samples_are_left_out(self, tmp_path: Path) -> None:
        model, optimizer, _, loader = self.start(tmp_path)
        x, y, _ = next(iter(loader))
        cross_entropy(model(x[:5]), y[:5]).mean().backward()
        with pytest.raises(
            RecordError,
            match="the tracked loader gave a batch of 8 samples, and the passes at step 0 took 5",
        ):
            optimizer.step()
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("later", [False, True])
    def test_a_loop_that_draws_ahead(self, tmp_path: Path, later: bool) -> None:
        model, optimizer, _, loader = self.start(tmp_path, batch_size=4)
        batches = iter(loader)
        if later:
            x, y, _ = next(batches)
            cross_entropy(model(x), y).mean().backward()
            optimizer.step()
        next(batches)
        with pytest.raises(RecordError, match=f"at step {int(later)} the next batch came before"):
            next(batches)

    def test_step_and_track_in_one(self, tmp_path: Path) -> None:
        _, _, recorder, loader = self.start(tmp_path)
        _, _, ids = next(iter(loader))
        with (
            pytest.raises(
                RecordError,
                match=(
                    r"recorder\.step\(\) is in step 0, which a batch of the tracked loader has "
                    r"begun"
                ),
            ),
            recorder.step(ids),
        ):
            pass

    def test_track_within_step(self, tmp_path: Path) -> None:
        _, _, recorder, loader = self.start(tmp_path)
        with (
            pytest.raises(
                RecordError,
                match=r"a loader or next_batch\(\) names a batch inside of recorder\.step\(\)",
            ),
            recorder.step([1]),
        ):
            next(iter(loader))

    def test_ids_that_do_not_exist(self, tmp_path: Path) -> None:
        *_, loader = self.start(tmp_path, sampler=[3, -1], batch_size=2)
        with pytest.raises(RecordError, match="sample id -1 is not among the 22 training samples"):
            next(iter(loader))

    def test_a_gradient_that_hooks_do_not_see_marks_the_run_as_failed(self, tmp_path: Path) -> None:
        model, optimizer, recorder, loader = self.start(tmp_path)
        for k, (x, y, _) in enumerate(loader):
            loss = cross_entropy(model(x), y).mean()
            (loss + model[1].weight.square().sum() * (k > 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(GradientMismatchError, match="at step 2"):
            recorder.close()
        assert facts_of(tmp_path / "run")["n_steps"] == 2

    def test_a_model_that_mixes_samples_is_told_at_its_first_batch(self, tmp_path: Path) -> None:
        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(64, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.layer(x.flatten(1))
                return hidden - hidden.mean(0)

        model = Mixing()
        optimizer = sgd(model)
        recorder = tracking(tmp_path / "run", model, optimizer)
        with pytest.raises(LayerError, match="the model mixes the samples"):
            tracked_loop(model, optimizer, recorder.track(DataLoader(TRAIN, batch_size=8)), 1, 1)


def test_the_curvature_of_tracked_batches_is_that_of_named_samples_and_dropped_ones_leave_none(
    tmp_path: Path,
) -> None:
    def train(run: Path, *, tracked: bool) -> np.ndarray:
        model, dataset = mlp(), images(24, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = Recorder(model, optimizer, run, n_samples=24, encoding="exact", dtype="float32")
        loader = DataLoader(dataset, batch_size=4)
        batches = recorder.track(loader) if tracked else loader
        for k, (inputs, targets) in enumerate(batches):
            if tracked:
                optimizer.zero_grad() if k % 2 == 0 else None
                (cross_entropy(model(inputs), targets).sum() / 8).backward()
                if k in (0, 1):
                    optimizer.zero_grad()  # thrown away
                elif k % 2 == 1:
                    optimizer.step()
            elif k > 1 and k % 2 == 0:
                both = torch.cat([inputs, dataset.tensors[0][4 * k + 4 : 4 * k + 8]])
                targets = torch.cat([targets, dataset.tensors[1][4 * k + 4 : 4 * k + 8]])
                with recorder.step(range(4 * k, 4 * k + 8)):
                    cross_entropy(model(both), targets).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        recorder.close()
        return hydra_pipe.open_run(run).gradients.curvature(slice(None))

    one, two = train(tmp_path / "one", tracked=False), train(tmp_path / "two", tracked=True)
    assert one.shape == (16,)
    np.testing.assert_allclose(one, two, rtol=1e-4)
