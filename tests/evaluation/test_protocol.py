"""The protocol of the field: a small share dropped, queries without their samples, brittleness."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluated import files_of, put
from support.pipelines import cross_entropy, images
from support.smooth import TESTS, N, net
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.cli.app import app
from hydra_pipe.errors import DataError, NonFiniteError, RunError
from hydra_pipe.evaluation import qld, subset
from hydra_pipe.evaluation.bisection import Bisection, Order, Trainings, sizes_up_to
from hydra_pipe.evaluation.lds import _SEED, half
from hydra_pipe.evaluation.qld import RANDOM_DRAWS, measured
from hydra_pipe.evaluation.queries import Query
from hydra_pipe.evaluation.subsets import n_dropped, random_order, random_weights
from hydra_pipe.progress import Progress, Task
from hydra_pipe.retraining import campaign
from hydra_pipe.retraining.retrainer import HIT, LOSS, Retrainer
from hydra_pipe.store.data.relevance import ResultColumns

# A hundredth of the 60 samples of `net` is one, a twentieth is three.
DROP, DROPPED = 0.05, 3


def without(*left_out: Any, build: Any = net) -> np.ndarray:
    """Loss and hit of each test after training without each of these arrays of ids."""
    weights = np.ones((len(left_out), len(build().train)), np.float32)
    for row, ids in zip(weights, left_out, strict=True):
        row[ids] = 0.0
    return Retrainer(build(), Progress(), "weights").train(weights, Task())


def faults_of(run: Path) -> list[str]:
    """Places of the faults in the evaluations of a run. Relevance that is made up has no seal."""
    return [f.where for f in hydra_pipe.verify(run) if f.where.startswith("evaluation")]


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_share_is_rounded_and_a_half_keeps_the_subsets_of_the_default() -> None:
    assert [n_dropped(share, n) for share, n in ((0.01, 60), (0.05, 60), (0.07, 100))] == [1, 3, 7]
    for n in (10, 11):
        np.testing.assert_array_equal(
            half(3, n), random_weights(3, n, n_dropped(0.5, n), _SEED), "the default drops a half"
        )
        assert half(3, n).sum() == n // 2


def test_a_half_that_is_asked_for_is_the_half_of_the_default(case: tuple[str, Path]) -> None:
    assert hydra_pipe.evaluate(*case, "lds", retrainings=10, methods="hydra").is_new
    again = hydra_pipe.evaluate(*case, "lds", retrainings=10, methods="hydra", drop=0.5)
    assert not again.is_new


def test_lds_scores_what_dropping_a_small_share_does(case: tuple[str, Path]) -> None:
    kept = np.stack([random_weights(i, N, DROPPED, _SEED) for i in range(12)])
    np.testing.assert_array_equal((kept == 0).sum(axis=1), DROPPED)
    losses = Retrainer(net(), Progress(), "weights").train(kept, Task())[:, LOSS]
    put(case[1], "right", -np.linalg.pinv(kept.astype(np.float64)) @ losses)
    found = hydra_pipe.evaluate(*case, "lds", retrainings=12, drop=DROP)
    scores = {row["method"]: row["lds"] for row in found.rows}
    assert scores["right"] > 0.99 > scores["hydra"]
    assert found.summary["drop"] == DROP
    assert found.summary["left_out"] == DROPPED
    assert found.summary["spread"] == pytest.approx(np.median(losses.std(axis=0, ddof=1)), rel=1e-3)
    says = " ".join(found.summary["says"])
    assert f"without {DROPPED} of {N} samples at random" in says
    assert "noise of training: unknown with one seed" in says
    with pytest.raises(RunError, match="was run with drop"):
        hydra_pipe.evaluate(*case, "lds", retrainings=12)


def test_lds_tells_how_much_of_the_spread_is_noise_of_training(case: tuple[str, Path]) -> None:
    """The same share, from the losses by a loop over seeds and subsets."""
    found = hydra_pipe.evaluate(*case, "lds", retrainings=10, seeds=3, drop=DROP)
    pieces = sorted((case[1] / "evaluation" / "lds" / "retrained").glob("*.npy"))
    losses = np.concatenate([np.load(piece) for piece in pieces])[:, LOSS].reshape(3, 10, TESTS)
    own, others = [], []
    for j in range(TESTS):
        table, noise = losses[:, :, j], 0.0
        for s in range(3):
            for i in range(10):
                noise += (table[s, i] - table[s].mean() - table[:, i].mean() + table.mean()) ** 2
        noise /= 2 * 9
        own.append(min(1.0, noise / table[0].var(ddof=1)))
        others.append(min(1.0, noise / 2 / table[1:].mean(axis=0).var(ddof=1)))
    assert found.summary["noise"] == pytest.approx(np.mean(own))
    assert found.summary["noise_other_seeds"] == pytest.approx(np.mean(others))
    assert 0.0 < found.summary["noise_low"] < found.summary["noise"] < found.summary["noise_high"]
    assert f"{np.mean(own):.0%} of the variance" in " ".join(found.summary["says"])


def test_qld_is_what_leaving_out_the_samples_of_a_query_does(case: tuple[str, Path]) -> None:
    values = np.random.default_rng(0).normal(size=(N, TESTS))
    put(case[1], "made-up", values)
    put(case[1], "opposite", -values)
    found = hydra_pipe.evaluate(*case, "qld", drop=DROP, tests="2-4,7", methods="made-up,opposite")
    queries = [2, 3, 4, 7]
    whole = without([])[0, LOSS]
    draws = [random_order(N, qld._SEED, d)[:DROPPED] for d in range(1, 1 + RANDOM_DRAWS)]
    random = without(*draws)[:, LOSS].mean(axis=0) - whole
    rows = {row["method"]: row for row in found.rows}
    assert found.summary["queries"] == queries
    for side, sign in (("helpful", -1), ("harmful", 1)):
        changes = []
        for j in queries:
            first = sorted(range(N), key=lambda i: sign * values[i, j])[:DROPPED]
            changes.append(without(first)[0, LOSS, j] - whole[j])
        row = rows["made-up"]
        assert row[side] == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-6)
        assert row[f"{side}_over_random"] == pytest.approx(
            np.mean(changes - random[queries]), rel=1e-3, abs=1e-6
        )
        assert row[f"{side}_low"] < row[side] < row[f"{side}_high"]
        assert found.summary["changes"]["made-up"][side] == pytest.approx(
            changes, rel=1e-2, abs=1e-6
        )
    for side, other in (("helpful", "harmful"), ("harmful", "helpful")):
        assert rows["made-up"][side] == pytest.approx(rows["opposite"][other], rel=1e-3, abs=1e-6)
    assert found.summary["changes"]["(random)"] == pytest.approx(
        random[queries], rel=1e-2, abs=1e-6
    )


def test_qld_tells_the_truth_from_its_negative_and_ranks_it_first(case: tuple[str, Path]) -> None:
    """Leave-one-out is the relevance that this evaluation looks for, if three samples add up."""
    losses = without([], *([i] for i in range(N)))[:, LOSS]
    put(case[1], "truth", losses[1:] - losses[0])
    put(case[1], "wrong", losses[0] - losses[1:])
    arguments = ["evaluate", *map(str, case), "qld", "--drop", str(DROP), "--methods"]
    result = CliRunner().invoke(app, [*arguments, "truth,wrong"])
    assert result.exit_code == 0, result.output
    assert "as many at random" in result.output
    found = hydra_pipe.evaluate(*case, "qld", drop=DROP, methods="truth,wrong")
    assert not found.is_new
    truth, wrong = found.rows
    assert (truth["method"], wrong["method"]) == ("truth", "wrong")
    assert truth["helpful_over_random_low"] > 0.0 > truth["harmful_over_random_high"]
    assert wrong["harmful_over_random_low"] > 0.0 > wrong["helpful_over_random_high"]
    assert b"<svg" in (case[1] / "evaluation" / "qld" / "plot.svg").read_bytes()
    assert found.summary["queries"] == list(range(TESTS)), "there are fewer than 20"
    assert faults_of(case[1]) == []


def test_qld_asks_about_groups_by_results_of_each_test_and_of_the_group(
    case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra_pipe.reduce(case[1], by="mean", method="hydra")
    hydra_pipe.reduce(case[1], by="label", method="hydra")
    by_mean = hydra_pipe.evaluate(*case, "qld", by="mean", drop=DROP)
    rows = {row["method"]: row for row in by_mean.rows}
    assert set(rows) == {"hydra", "hydra-fisher", "hydra-mean"}
    assert rows["hydra-mean"]["helpful"] == pytest.approx(rows["hydra"]["helpful"], rel=1e-4)
    mean = np.asarray(hydra_pipe.open_run(case[1]).relevance("hydra-mean"))[:, 0]
    losses = without([], np.argsort(mean)[:DROPPED])[:, LOSS].mean(axis=1)
    assert rows["hydra-mean"]["harmful"] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert math.isnan(rows["hydra"]["helpful_low"]), "one query has no interval"
    by_label = hydra_pipe.evaluate(*case, "qld", by="label", drop=DROP, overwrite=True)
    labels = net().test.tensors[1].numpy()
    assert by_label.summary["queries"] == np.unique(labels).tolist()
    rows = {row["method"]: row for row in by_label.rows}
    assert set(rows) == {"hydra", "hydra-fisher", "hydra-by-label"}
    assert rows["hydra-by-label"]["harmful"] == pytest.approx(rows["hydra"]["harmful"], rel=1e-4)


def test_results_of_some_test_samples_are_scored_where_they_have_all_queries(
    case: tuple[str, Path],
) -> None:
    values = np.random.default_rng(0).normal(size=(N, TESTS))
    put(case[1], "whole", values)
    put(case[1], "some", values[:, [2, 3, 7, 9]], ResultColumns(((2, 4), (7, 8), (9, 10))))
    options: dict[str, Any] = {"tests": "3,9"}
    for kind in ("qld", "subset"):
        found = hydra_pipe.evaluate(*case, kind, methods="some,whole", **options)
        first, second = ({**row, "method": ""} for row in found.rows[:2])
        assert first == second
    with pytest.raises(RunError, match=r"hydra-pipe reduce .* --method some --tests 3-4 first"):
        hydra_pipe.evaluate(*case, "qld", methods="some", tests="3-4", overwrite=True)


def test_qld_of_several_seeds_is_the_mean_over_their_trainings(case: tuple[str, Path]) -> None:
    values = np.random.default_rng(0).normal(size=(N, TESTS))
    put(case[1], "made-up", values)
    options: dict[str, Any] = {"drop": DROP, "tests": "5-6", "methods": "made-up"}
    found = hydra_pipe.evaluate(*case, "qld", seeds=2, **options)
    row = found.rows[0]
    changes, random = [], []
    for seed in (0, 1):
        start = {name: p.detach() for name, p in net(seed=seed).model.named_parameters()}
        weights = np.ones((1 + RANDOM_DRAWS, N), np.float32)
        for draw in range(1, 1 + RANDOM_DRAWS):
            order = random_order(N, qld._SEED, seed * RANDOM_DRAWS + draw)
            weights[draw, order[:DROPPED]] = 0.0
        losses = Retrainer(net(), Progress(), "weights").train(
            weights, Task(), seed=seed, start=start
        )[:, LOSS, 5:7]
        random.append(losses[1:].mean(axis=0) - losses[0])
        for j in (5, 6):
            weights = np.ones((2, N), np.float32)
            weights[1, np.argsort(-values[:, j])[:DROPPED]] = 0.0
            losses = Retrainer(net(), Progress(), "weights").train(
                weights, Task(), seed=seed, start=start
            )[:, LOSS, j]
            changes.append(losses[1] - losses[0])
    assert row["helpful"] == pytest.approx(np.mean(changes), rel=1e-3)
    assert row["helpful_over_random"] == pytest.approx(np.mean(changes) - np.mean(random), rel=1e-3)
    assert found.summary["changes"]["(random)"] == pytest.approx(np.mean(random, axis=0), rel=1e-2)


def test_retrainings_that_diverge_take_their_queries_and_draws_with_them() -> None:
    """Two queries, one method: query 1 is lost to its own retraining, draw 0 to another."""
    rng = np.random.default_rng(0)
    losses = rng.random((1, 1 + RANDOM_DRAWS + 4, 2))
    losses[0, 1] = np.nan
    losses[0, 1 + RANDOM_DRAWS + 2] = np.inf
    found = measured(losses, 1)
    assert found.kept.tolist() == [True, False]
    assert found.diverged == 2
    assert found.random.shape == (RANDOM_DRAWS - 1, 1, 1)
    np.testing.assert_allclose(found.random[:, 0, 0], losses[0, 2:11, 0] - losses[0, 0, 0])
    helpful, harmful = losses[0, 11:13, 0] - losses[0, 0, 0]
    np.testing.assert_allclose(found.sides[0, :, 0, 0], [helpful, harmful])
    losses[0, :, 1] = np.inf
    assert measured(losses, 1).random.shape == (RANDOM_DRAWS - 1, 1, 1), "query 1 is lost alone"
    losses[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="too unstable"):
        measured(losses, 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 12, 30, 31, 500])
def test_sizes_ascend_to_the_limit_and_bisection_finds_each_of_them(limit: int) -> None:
    sizes = sizes_up_to(limit)
    assert (np.diff(sizes) > 0).all()
    assert 1 <= sizes[0] <= sizes[-1] == limit
    n = len(sizes)
    answers = np.arange(n + 1)  # the last one: none of the sizes
    found = Bisection(n, answers.shape)
    for _ in range(n.bit_length()):
        found.halve(found.middle >= answers, 0)
    np.testing.assert_array_equal(found.high, answers)


def test_a_retraining_that_diverged_flips_nothing_and_one_retraining_answers_all_that_ask() -> None:
    own = Order(np.array([[4, 2, 0], [1, 3, 5]]), np.array([0, 1]))
    drawn = Order(np.array([[5, 4, 3]]), np.array([0, 0]))
    sizes, places = np.array([1, 3]), np.array([[0, 1], [1, 1]])
    trainings = Trainings.of([own, drawn], sizes, places)
    assert [ids.tolist() for ids in trainings.left_out] == [[4], [1, 3, 5], [5, 4, 3]]
    outcome = np.zeros((3, 2, 9))
    outcome[1, LOSS] = np.nan
    outcome[2, HIT, 7] = 1.0
    queries = [Query(test, np.array([test])) for test in (6, 7)]
    assert trainings.flipped(outcome, queries).tolist() == [[True, False], [True, False]]
    assert trainings.diverged(outcome) == 1


COPIES, FEATURES, SAMPLES, RIGHT = (1, 4, 10), 8, 64, 3


def copies() -> Pipeline:
    """A linear model of one-hot inputs. Test j has the feature of COPIES[j] samples of class 1.

    Weights of a feature that no sample has stay as they are, and say class 0. So the prediction
    for test j flips when all its copies are gone, and not before. The last test has a feature
    that nobody has, and is wrong.
    """
    features = np.repeat(np.arange(RIGHT), COPIES)
    features = np.r_[features, np.full(SAMPLES - len(features), RIGHT)]
    order = np.random.default_rng(3).permutation(SAMPLES)
    inputs = torch.eye(FEATURES)[features[order]]
    labels = torch.from_numpy(np.where(features[order] < RIGHT, 1, 0))
    model = nn.Linear(FEATURES, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0] = 0.01
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=5.0),
        loss=cross_entropy,
        train=TensorDataset(inputs, labels),
        test=TensorDataset(torch.eye(FEATURES)[[0, 1, 2, 7]], torch.ones(4, dtype=torch.int64)),
        batch_size=16,
        epochs=3,
    )


def first_of(sizes: np.ndarray, needed: int) -> int | None:
    return next((int(size) for size in sizes if size >= needed), None)


def test_subset_finds_the_samples_that_a_prediction_hangs_on(tmp_path: Path) -> None:
    run, said = tmp_path / "run", Said()
    hydra_pipe.record(copies(), run)
    for method in ("hydra", "hydra-fisher"):
        hydra_pipe.reduce(run, method=method)
    put(run, "upside-down", -np.asarray(hydra_pipe.open_run(run).relevance("hydra")))
    found = hydra_pipe.evaluate(copies(), run, "subset", progress=said)
    sizes = sizes_up_to(n_dropped(0.2, SAMPLES))
    assert found.summary["sizes"] == sizes.tolist()
    assert found.summary["queries"] == [0, 1, 2], "the last is predicted wrong"
    expected = [first_of(sizes, copies) for copies in COPIES]
    smallest = found.summary["smallest"]
    assert smallest["hydra"] == smallest["hydra-fisher"] == expected
    assert smallest["upside-down"] == [None] * RIGHT
    # a random order needs as many samples as come up to the last copy
    inputs = copies().train.tensors[0].argmax(dim=1).numpy()
    for draw, own in enumerate(smallest["(random)"]):
        order = random_order(SAMPLES, subset._SEED, draw)
        last = [1 + np.flatnonzero(inputs[order] == j).max() for j in range(RIGHT)]
        assert own == [first_of(sizes, needed) for needed in last]
    rows = {row["method"]: row for row in found.rows}
    assert [row["method"] for row in found.rows][-2:] == ["upside-down", "(random)"]
    assert rows["hydra"]["flipped"] == 1.0
    assert rows["hydra"]["median"] == expected[1]
    assert rows["upside-down"]["median"] is None
    assert rows["upside-down"]["flipped"] == 0.0
    assert rows["(random)"]["beats_random"] is None
    drawn = np.array([[s or np.inf for s in own] for own in smallest["(random)"]])
    assert rows["hydra"]["beats_random"] == pytest.approx(
        np.mean((expected < drawn) + 0.5 * (expected == drawn))
    )
    assert "1 predictions are wrong" in " ".join(found.summary["says"])
    n_rounds = len(sizes).bit_length()
    at_most = n_rounds * 3 * 3 + 3 * (1 + 2 + 3)
    said_first = [line for line in said.lines if "at most, in" in line]
    assert said_first[0].startswith(f"{at_most} retrainings at most, in {n_rounds} rounds")
    assert said.lines.index(said_first[0]) < said.lines.index(f"round 1 of {n_rounds}")


def test_subset_flips_at_the_size_that_it_names_and_not_at_the_one_before(
    case: tuple[str, Path],
) -> None:
    values = np.random.default_rng(1).normal(size=(N, TESTS))
    labels, tested = (getattr(net(), name).tensors[1].numpy() for name in ("train", "test"))
    values += 3.0 * (labels[:, None] == tested)  # without its class a prediction flips at last
    put(case[1], "made-up", values)
    result = CliRunner().invoke(
        app,
        ["evaluate", *map(str, case), "subset", "--drop=0.4", "--tests=0-9", "--methods=made-up"],
    )
    assert result.exit_code == 0, result.output
    place = case[1] / "evaluation" / "subset"
    summary = json.loads((place / "summary.json").read_text())
    sizes, queries = summary["sizes"], summary["queries"]
    assert queries == [j for j in range(10) if without([])[0, HIT, j] == 1.0]
    assert sizes[-1] == 24
    smallest = summary["smallest"]["made-up"]
    assert any(size is not None for size in smallest)
    for j, size in zip(queries, smallest, strict=True):
        order = np.argsort(-values[:, j], kind="stable")
        hits = without(*(order[:tried] for tried in sizes))[:, HIT, j]
        place_of = len(sizes) if size is None else sizes.index(size)
        assert size is None or hits[place_of] == 0.0
        assert place_of == 0 or hits[place_of - 1] == 1.0
    assert b"<svg" in (place / "plot.svg").read_bytes()
    assert sorted(p.name for p in place.glob("round-*")) == [
        "round-1",
        "round-2",
        "round-3",
        "round-4",
    ]
    assert faults_of(case[1]) == []


def test_all_that_was_trained_is_kept_when_a_relevance_comes_later(
    case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tests": "0-2", "methods": "hydra"}
    for kind in ("qld", "subset"):
        hydra_pipe.evaluate(*case, kind, **options)
        (case[1] / "evaluation" / kind / "table.parquet").unlink()
    before = files_of(case[1] / "evaluation")
    monkeypatch.setattr(campaign, "Retrainer", None)
    for kind in ("qld", "subset"):
        assert hydra_pipe.evaluate(*case, kind, **options).is_new
    after = files_of(case[1] / "evaluation")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2


def test_commands_of_a_repair_have_the_options_of_the_protocol(case: tuple[str, Path]) -> None:
    hydra_pipe.evaluate(*case, "subset", drop=0.1, tests="1,4", methods="hydra")
    hydra_pipe.evaluate(*case, "qld", by="mean", methods="hydra")
    for kind in ("subset", "qld"):
        (case[1] / "evaluation" / kind / "summary.json").write_bytes(b"")
    told = {fault.where: fault.consequence for fault in hydra_pipe.verify(case[1])}
    assert (
        "subset --set lr=0.1 --set seed=0 --drop 0.1 --tests 1,4"
        in told["evaluation/subset/summary.json"]
    )
    assert (
        "qld --set lr=0.1 --set seed=0 --seeds 1 --drop 0.01 --by mean"
        in told["evaluation/qld/summary.json"]
    )


def text() -> Pipeline:
    """Sentences of six words, of which the first tells the class."""
    torch.manual_seed(0)
    words = torch.randint(0, 12, (48, 6), generator=torch.Generator().manual_seed(4))
    model = nn.Sequential(nn.Embedding(12, 5), nn.Flatten(), nn.Linear(30, 3))
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        loss=cross_entropy,
        train=TensorDataset(words[:40], words[:40, 0] % 3),
        test=TensorDataset(words[40:], words[40:, 0] % 3),
        batch_size=10,
        epochs=8,
    )


def numbers() -> Pipeline:
    """A regression on the columns of a table."""
    torch.manual_seed(0)
    model, data = nn.Linear(4, 1), images(30, 1, size=2)
    inputs = data.tensors[0].flatten(1)
    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        loss=lambda output, target: (output[:, 0] - target) ** 2,
        train=TensorDataset(inputs[:24], inputs[:24].sum(dim=1)),
        test=TensorDataset(inputs[24:], inputs[24:].sum(dim=1)),
        batch_size=8,
        epochs=3,
    )


def test_one_sample_is_left_out_of_few_unless_a_share_is_given(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(numbers(), run)
    hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.evaluate(numbers(), run, "qld").summary["left_out"] == 1


def test_text_and_numbers_are_evaluated_alike(tmp_path: Path) -> None:
    for build in (text, numbers):
        run = tmp_path / build.__name__
        hydra_pipe.record(build(), run)
        hydra_pipe.reduce(run)
        row = hydra_pipe.evaluate(build(), run, "qld", drop=0.1).rows[0]
        assert row["helpful_over_random"] > row["harmful_over_random"]
    found = hydra_pipe.evaluate(text(), tmp_path / "text", "subset", drop=0.5)
    assert found.rows[0]["flipped"] > 0.0
    with pytest.raises(DataError, match="not classes"):
        hydra_pipe.evaluate(numbers(), tmp_path / "numbers", "subset")


def test_subset_of_predictions_that_are_all_wrong_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(copies(), run)
    hydra_pipe.reduce(run, method="hydra")
    with pytest.raises(RunError, match="none of the 1 test samples is predicted right"):
        hydra_pipe.evaluate(copies(), run, "subset", tests="3")
