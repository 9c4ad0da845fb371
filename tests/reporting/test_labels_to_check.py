"""The head of a report: labels that look wrong, held against plain loops over the recording."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.clusters import ACROSS, DIFFERING, NAMES, SAME, N, clusters, truth_and_labels
from support.pipelines import mlp_pipeline
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.reporting.counting import class_counts, confusion
from hydra_pipe.reporting.findings import Classes
from hydra_pipe.reporting.labels import JudgedLabels, judged_labels
from hydra_pipe.reporting.scatter import principal_components
from hydra_pipe.reporting.source import ReportSource
from hydra_pipe.reporting.tables import class_table
from hydra_pipe.reporting.words import about_labels, hardly_learnt, labels_title
from hydra_pipe.store import names
from hydra_pipe.store.data.recording import open_gradients
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import CLEAN, REPORT

PAGE = "report-dynamics.html"


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("clusters") / "run"
    hydra_pipe.record(clusters(), run)
    return run


@pytest.fixture
def run(recorded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded_once, tmp_path / "run"))


def judged(run: Path) -> JudgedLabels:
    source = ReportSource.open(RunDirectory.open(run), "dynamics")
    return judged_labels(source, 2**40, Progress())


class Doubts(HTMLParser):
    """Ids of the labels to check, with their suggested classes, and anchors of sections."""

    def __init__(self, run: Path, page: str = PAGE) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []
        self.parts: list[str] = []
        self.html = (run / page).read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "data-doubt" in given:
            self.found.append((int(given["data-id"] or ""), int(given["data-class"] or "")))
        if tag == "section" and given.get("id"):
            self.parts.append(str(given["id"]))


def test_the_page_begins_with_the_labels_that_clean_proposes(run: Path) -> None:
    assert hydra_pipe.report(run, pipeline=clusters())
    page = Doubts(run)
    assert page.parts[0] == "labels"
    drop = hydra_pipe.clean(run).drop
    classes = [NAMES.tolist().index(name) for name in drop["suggested_label"].to_pylist()]
    assert page.found == list(zip(drop["train_id"].to_pylist(), classes, strict=True))
    truth, given = truth_and_labels()
    ids = np.array([sample for sample, _ in page.found])
    assert (truth[ids] != given[ids]).mean() > 0.8
    assert [truth[sample] == k for sample, k in page.found].count(True) > 0.8 * len(ids)
    assert re.search(rf"About \d+ of {N} labels look wrong, most [^<]* taken for", page.html)


def test_every_class_has_its_number_in_the_decisions(run: Path) -> None:
    hydra_pipe.report(run)
    choices = re.findall(r'<option value="(\d)">(\w+)</option>', Doubts(run).html)
    assert choices[:3] == [("0", "ant"), ("1", "bee"), ("2", "cat")]


def test_a_report_needs_no_relevance_and_says_what_it_would_add(run: Path) -> None:
    assert hydra_pipe.report(run, pipeline=clusters())
    assert not hydra_pipe.report(run, pipeline=clusters())
    page = Doubts(run)
    assert page.parts == [
        *("labels", "summary", "tests", "confusion", "map", "alike", "charts", "recorded")
    ]
    assert f"hydra-pipe reduce {run}" in page.html
    assert '<p class="hurts">' not in page.html
    directory, stage = RunDirectory.open(run), REPORT.of("dynamics")
    assert [source.fact for source in stage.sources(directory.stages[stage])] == ["of_record"]
    assert hydra_pipe.verify(run) == []
    hydra_pipe.reduce(run)
    assert hydra_pipe.report(run)
    assert (run / "report.html").exists()
    assert hydra_pipe.report(run, method="dynamics", overwrite=True)
    assert f"hydra-pipe report {run} --method hydra" in Doubts(run).html


def test_a_proposal_of_clean_comes_onto_the_page_with_its_cut(run: Path) -> None:
    hydra_pipe.report(run)
    n = len(Doubts(run).found)
    drop = hydra_pipe.clean(run, lowest=n + 5).drop
    assert hydra_pipe.report(run)
    assert [sample for sample, _ in Doubts(run).found] == drop["train_id"].to_pylist()
    assert not hydra_pipe.report(run)
    # A proposal that cannot be read is made anew.
    table = run / CLEAN.of("dynamics").area / "drop.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    hydra_pipe.report(run, overwrite=True)
    assert len(Doubts(run).found) == n


def test_decisions_leave_the_queue_as_it_was_proposed(run: Path, tmp_path: Path) -> None:
    hydra_pipe.report(run)
    before = Doubts(run).found
    file = tmp_path / "decisions.csv"
    (first, k), (second, _) = before[:2]
    file.write_text(f"sample,decision,label\n{first},relabel,{k}\n{second},keep,\n0,drop,\n")
    hydra_pipe.clean(run, decisions=file)
    assert hydra_pipe.report(run)
    assert Doubts(run).found == before


def test_confidence_over_training_is_the_softmax_of_each_visits_logits(run: Path) -> None:
    found = judged(run)
    gradients = open_gradients(RunDirectory.open(run))
    rows = slice(0, gradients.rows.n_rows)
    samples, logits = gradients.samples(rows), gradients.row_dynamics(names.LOGITS, rows)
    for doubt in found.doubts:
        own = logits[samples == doubt.id].astype(np.float64)  # one process: rows are in order
        for row, mine, other in zip(own, doubt.confidence, doubt.suggested_confidence, strict=True):
            chances = np.exp(row) / np.exp(row).sum()
            assert mine == pytest.approx(chances[doubt.given], abs=1e-9)
            assert other == pytest.approx(chances[doubt.suggested], abs=1e-9)
    last = [int(logits[samples == sample][-1].argmax()) for sample in range(N)]
    assert found.predicted.tolist() == last


def test_the_tests_that_a_wrong_label_hurts_are_those_of_the_lowest_relevance(run: Path) -> None:
    hydra_pipe.reduce(run)
    hydra_pipe.report(run, pipeline=clusters())
    page = Doubts(run, "report.html")
    relevance = np.asarray(hydra_pipe.open_run(run).relevance())
    items = re.split(r"<li class=\"doubt\"", page.html)[1:]
    assert len(items) == len(page.found)
    for (sample, _), item in zip(page.found, items, strict=True):
        (line,) = re.findall(r'<p class="hurts">(.*?)</p>', item)
        order = np.argsort(relevance[sample], kind="stable")[:3]
        assert [int(n) for n in re.findall(r"test (\d+)", line)] == [
            test for test in order if relevance[sample, test] < 0
        ]
        for test in re.findall(r'href="#test-(\d+)"', line):
            assert f'id="test-{test}"' in page.html


def test_confusions_and_counts_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(-1, 4, 200)
    found = confusion(labels, predicted, ["a", "b", "c", "d"])
    for i in range(4):
        for j in range(4):
            assert found.counts[i, j] == sum(
                a == i and b == j for a, b in zip(labels, predicted, strict=True)
            )
    known = predicted >= 0
    assert (found.n_right, found.n_samples) == ((labels == predicted).sum(), known.sum())
    many = confusion(np.arange(40), np.arange(40), [str(i) for i in range(40)])
    assert (len(many.classes), many.n_classes, many.n_right) == (24, 40, 40)
    doubted = rng.random(200) < 0.3
    for i, count in enumerate(class_counts(labels, doubted, ["a", "b", "c", "d"], found)):
        assert (count.n_train, count.n_doubted) == (
            (labels == i).sum(),
            (doubted & (labels == i)).sum(),
        )
        assert (count.n_test, count.n_right) == (
            (known & (labels == i)).sum(),
            (labels == predicted)[labels == i].sum(),
        )


def test_predictions_on_the_page_have_the_confidence_of_the_final_model(run: Path) -> None:
    hydra_pipe.report(run, pipeline=clusters())
    trained = clusters()
    hydra_pipe.train(trained)
    with torch.no_grad():
        chances = trained.model(trained.test.tensors[0]).softmax(1).max(1).values
    html = Doubts(run).html
    cards = re.findall(r'id="test-(\d+)".*?<dt>confidence</dt><dd>(\d+)%', html, re.DOTALL)
    assert cards
    for test, percent in cards:
        assert int(percent) == pytest.approx(100 * float(chances[int(test)]), abs=0.51)


def test_the_map_has_the_principal_components_of_the_features(run: Path) -> None:
    points = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8)
    places, explained = principal_components(points)
    centred = points - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in range(2):
        expected = left[:, axis] * values[axis]
        assert np.allclose(places[:, axis], expected) or np.allclose(places[:, axis], -expected)
    assert explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    found = judged(run)
    assert found.scatter is not None
    assert sorted(found.ids[found.scatter.rows].tolist()) == list(range(N))
    hydra_pipe.report(run)
    every = re.findall(r'data-ids="([\d ]+)" d="M', Doubts(run).html)
    shown = [int(i) for ids in every for i in ids.split()]
    assert sorted(shown) == list(range(N))
    ringed = re.findall(r'class="points c-\w+ doubted"[^>]*data-ids="([\d ]+)"', Doubts(run).html)
    assert {int(i) for ids in ringed for i in ids.split()} == set(found.proposed.tolist())


def test_inputs_that_are_the_same_are_shown_those_with_other_labels_first(run: Path) -> None:
    hydra_pipe.report(run, pipeline=clusters())
    pairs = re.findall(r'<li class="pair">(.*?)</li>', Doubts(run).html, re.DOTALL)
    ids = [tuple(map(int, re.findall(r"#(\d+)</span>", pair))) for pair in pairs]
    assert ids[0] == DIFFERING
    assert "labels differ" in pairs[0]
    assert {SAME, ACROSS} <= set(ids)
    assert "training and test" in pairs[ids.index(ACROSS)]
    assert "labels differ" not in pairs[ids.index(SAME)]


def test_a_run_without_classes_says_so_and_begins_as_before(tmp_path: Path) -> None:
    x = torch.randn(20, 1, 8, 8)
    data = TensorDataset(x, torch.randn(20, 4))
    pipeline = mlp_pipeline(
        train=data, test=data, loss=lambda output, target: ((output - target) ** 2).mean(1)
    )
    hydra_pipe.record(pipeline, tmp_path / "run")
    hydra_pipe.reduce(tmp_path / "run")
    hydra_pipe.report(tmp_path / "run", pipeline=pipeline)
    page = Doubts(tmp_path / "run", "report.html")
    assert page.parts[0] == "summary"
    assert page.found == []
    assert "No labels to check: " in page.html


def test_too_small_a_budget_leaves_the_labels_out_and_says_so(run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--memory", "1MiB"])
    assert (done.exit_code, Doubts(run).found) == (0, [])
    assert "No labels to check: judging 240 labels needs" in Doubts(run).html


def test_relevance_that_is_not_there_is_asked_for(run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.stdout == f"{run}: reported; open {run}/{PAGE}\n"
    asked = CliRunner().invoke(app, ["report", str(run), "--method", "hydra"])
    assert asked.exit_code == 1
    assert "reduce hydra has not been run" in asked.stderr
    with pytest.raises(UsageError, match="only relevance is about a probe"):
        hydra_pipe.report(run, method="dynamics", probe="wrong")


def made_up(n_proposed: int, most_often: tuple[int, int, int] | None) -> JudgedLabels:
    nothing = np.zeros(0, np.int64)
    return JudgedLabels(
        n_samples=1400,
        ids=nothing,
        labels=nothing,
        predicted=nothing,
        classes=[str(i) for i in range(10)],
        proposed=np.arange(n_proposed),
        doubts=[None] * min(n_proposed, 60),  # type: ignore[list-item]
        n_wrong=(140.4, 94.0, 165.0),
        most_often=most_often,
        warnings=[],
        scatter=None,
    )


def test_the_heading_names_what_is_most_often_confused() -> None:
    begin = "About 140 of 1,400 labels look wrong"
    assert labels_title(made_up(137, (9, 4, 80)), 12) == (
        f"{begin}, most of them 4 taken for 9: here are twelve"
    )
    assert labels_title(made_up(137, (9, 4, 20)), 12) == (
        f"{begin}, most often 4 taken for 9: here are twelve"
    )
    assert labels_title(made_up(137, (9, 4, 3)), 12) == f"{begin}: here are twelve"
    assert labels_title(made_up(1, None), 12) == f"{begin}: here is one"
    assert "None of 1,400 labels" in labels_title(made_up(0, None), 12)
    assert "The page has the first 60" in " ".join(about_labels(made_up(137, None)))
    assert len(about_labels(made_up(60, None))) == 1


def test_a_network_that_has_hardly_learnt_is_told() -> None:
    targets = [0] * 50 + [1] * 50
    right = np.zeros(100)
    right[:60] = 1
    (said,) = hardly_learnt(right, targets)
    assert "60% of the test samples right" in said
    assert "50%" in said
    right[:90] = 1
    assert hardly_learnt(right, targets) == []
    assert hardly_learnt(np.ones(3), [1, 1, 1]) == []


def test_colours_of_the_class_table_are_scaled_to_pairs_of_different_classes() -> None:
    means = np.array([[90.0, -2.0], [1.0, 80.0]])
    table = class_table(Classes(["a", "b"], ["a", "b"], means, 2, 2))
    shares = [[cell["share"] for cell in row] for _, row in table["rows"]]
    assert shares == [[1.0, 1.0], [0.5, 1.0]]
    alone = class_table(Classes(["a"], ["a"], np.array([[4.0]]), 1, 1))
    assert alone["rows"][0][1][0]["share"] == 1.0


def test_relabel_parquet_has_the_classes_of_the_page(run: Path) -> None:
    hydra_pipe.clean(run)
    hydra_pipe.report(run)
    table = pq.read_table(run / CLEAN.of("dynamics").area / "relabel.parquet").to_pylist()
    assert [(row["train_id"], row["suggested"]) for row in table] == [
        (sample, NAMES[k]) for sample, k in Doubts(run).found
    ]


def test_a_loop_of_ones_own_without_tests_has_its_labels_checked(tmp_path: Path) -> None:
    pipeline = clusters()
    x, y = pipeline.train.tensors
    with hydra_pipe.Recorder(pipeline.model, pipeline.optimizer, tmp_path / "run", N) as recorder:
        for epoch in range(4):
            order = np.random.default_rng(epoch).permutation(N)
            for ids in np.split(order, 8):
                with recorder.step(ids):
                    pipeline.optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(pipeline.model(x[ids]), y[ids]).backward()
                    pipeline.optimizer.step()
    shown = hydra_pipe.ShownSamples(x, x[:0])
    assert hydra_pipe.report(tmp_path / "run", samples=shown)
    page = Doubts(tmp_path / "run")
    assert page.parts == [*("labels", "summary", "confusion", "map", "alike", "charts", "recorded")]
    assert len(page.found) > 5
    assert 'class="pair"' in page.html


def test_groups_of_tests_that_a_label_hurts_are_linked(run: Path) -> None:
    hydra_pipe.reduce(run, by="label")
    hydra_pipe.report(run, method="hydra-fisher-by-label")
    html = Doubts(run, "report-hydra-fisher-by-label.html").html
    links = re.findall(r'<p class="hurts">[^\n]*?href="#([\w-]+)"', html)
    assert links
    for link in links:
        assert f'id="{link}"' in html
