"""The report of small runs: what is chosen, what is drawn, what is said, and when it is written."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.pipelines import conv_pipeline
from support.processes import killed_after
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import PipelineError, RunError, StoreError, UsageError
from hydra_pipe.loading import pipeline_of
from hydra_pipe.progress import Progress, Task
from hydra_pipe.reporting import gathering as gathering_module
from hydra_pipe.reporting import page as page_module
from hydra_pipe.reporting import run as run_module
from hydra_pipe.reporting.charts import distribution_chart, power_of_ten
from hydra_pipe.reporting.choice import interesting
from hydra_pipe.reporting.drawing import (
    MOST_CHARACTERS,
    Cells,
    Picture,
    Text,
    by_kind,
    rendered,
    visible,
)
from hydra_pipe.reporting.findings import MOST_HARMED, Distribution, Wanted, findings
from hydra_pipe.reporting.pieces import signed
from hydra_pipe.reporting.words import Circumstances, warnings
from hydra_pipe.store import names
from hydra_pipe.store.data.relevance import (
    ResultColumns,
    create_relevance,
    read_relevance,
    write_relevance,
)
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EVALUATE, EXPORT, RECORD, REDUCE, REPORT


class Saying(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory, recorded: Callable[..., Path]) -> Path:
    run = Path(shutil.copytree(recorded(), tmp_path_factory.mktemp("report") / "run"))
    hydra_pipe.reduce(run)
    return run


@pytest.fixture
def run(reduced: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reduced, tmp_path / "run"))


def text_of(run: Path, name: str = "report.html") -> str:
    return (run / name).read_text(encoding="utf-8")


class Cards(HTMLParser):
    """Ids of the test samples of a page, in order, and of the training samples beside each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[int, list[int]]] = []
        self.images = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "article":
            self.found.append((int(given["data-id"] or ""), []))
        if tag == "li" and "data-train" in given:
            self.found[-1][1].append(int(given["data-train"] or ""))
        self.images += tag == "img"


def test_sizes_of_relevance_are_marked_by_powers_of_ten() -> None:
    assert [power_of_ten(value) for value in (1e-12, 0.1, 1.0, 1e30)] == [
        *("10⁻¹²", "10⁻¹", "10⁰", "10³⁰")
    ]
    distribution = Distribution()
    distribution.add(np.array([3e-5, 2e-4, -3e-3, 2e-2], np.float32))
    drawn = distribution_chart(distribution)
    assert [mark for mark in ("10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹") if f">{mark}<" in drawn] == [
        *("10⁻⁴", "10⁻³", "10⁻²")
    ]


@given(
    losses=st.lists(st.floats(0, 10), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    count=st.integers(1, 30),
)
def test_wrong_ones_come_first_and_places_are_filled_once(
    losses: list[float], share: float, seed: int, count: int
) -> None:
    values = np.array(losses)
    wrong = np.random.default_rng(seed).random(len(values)) < share
    chosen = interesting(values, wrong, count)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(values))
    n_wrong = int(wrong[chosen].sum())
    assert wrong[chosen][:n_wrong].all()
    assert n_wrong >= min(int(wrong.sum()), count // 2)
    for part in (chosen[:n_wrong], chosen[n_wrong:]):
        assert (np.diff(values[part]) <= 0).all()
    if n_wrong:  # none that is wrong was passed over for one of a lower loss
        assert values[chosen[n_wrong - 1]] >= np.sort(values[wrong])[::-1][n_wrong - 1]


@given(seed=st.integers(0, 999), width=st.integers(1, 9))
def test_findings_are_those_of_the_whole_matrix_whatever_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.choice([-2.0, -0.5, 0.0, 0.25, 3.0], (15, 9)).astype(np.float32)
    train, test = (
        generator.choice(["cat", "dog", "eel"], 15).astype(object),
        generator.integers(0, 2, 9),
    )
    attributes = {names.METHOD: "hydra", names.SIGN: "s", names.UNIT: "u"}
    place = tmp_path_factory.mktemp("relevance") / "relevance.zarr"
    array = create_relevance(place, "hydra", attributes, 15, ResultColumns(((0, 9),)), 9, "0")
    write_relevance(array, 0, 0, values)
    found = findings(array, Wanted([4, 1], 3, [7, 2]), train, test, width, Task())
    np.testing.assert_allclose(
        found.sums, read_relevance(array, slice(None)).sum(axis=1, dtype=np.float64)
    )
    for column, (helpful, harmful) in zip([4, 1], found.sides, strict=True):
        best = sorted(
            (i for i in range(15) if values[i, column] > 0), key=lambda i: (-values[i, column], i)
        )[:3]
        worst = sorted(
            (i for i in range(15) if values[i, column] < 0), key=lambda i: (values[i, column], i)
        )[:3]
        assert (helpful.ids.tolist(), harmful.ids.tolist()) == (best, worst)
        assert (helpful.relevance > 0).all()
        assert (harmful.relevance < 0).all()
    for sample, harmed in zip([7, 2], found.harmed, strict=True):
        order = sorted(range(9), key=lambda j: (values[sample, j], j))[:MOST_HARMED]
        assert harmed == [j for j in order if values[sample, j] < 0]
    assert found.classes is not None
    for i, a in enumerate(found.classes.train):
        for j, b in enumerate(found.classes.test):
            assert found.classes.means[i, j] == pytest.approx(
                values[np.ix_(train == a, test == b)].mean(), abs=1e-6
            )
    d = found.distribution
    assert (d.helpful, d.harmful, d.zeros) == (
        (values > 0).sum(),
        (values < 0).sum(),
        (values == 0).sum(),
    )
    edges, up, down = d.bins()
    for low, n_up, n_down in zip(edges, up, down, strict=True):
        assert n_up == ((values >= low) & (values < 2 * low)).sum()
        assert n_down == ((-values >= low) & (-values < 2 * low)).sum()


def test_the_labels_that_most_samples_have_stand_for_all_where_they_are_many(
    tmp_path: Path,
) -> None:
    values = np.arange(60, dtype=np.float32)[:, None]
    train = np.array([0] * 30 + list(range(1, 31)))
    attributes = {names.METHOD: "hydra", names.SIGN: "s", names.UNIT: "u"}
    array = create_relevance(
        tmp_path / "relevance.zarr", "hydra", attributes, 60, ResultColumns(((0, 1),)), 1, "0"
    )
    write_relevance(array, 0, 0, values)
    found = findings(array, Wanted([], 3), train, np.array([5]), 1, Task()).classes
    assert found is not None
    assert (len(found.train), found.n_train) == (24, 31)
    assert (found.train[0], found.means[0, 0]) == (0, np.arange(30).mean())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.rand(1, 8, 8), Picture),
        (torch.randn(3, 200, 120), Picture),
        (torch.randint(0, 255, (3, 9, 9), dtype=torch.uint8), Picture),
        (torch.rand(8, 8, dtype=torch.bfloat16), Picture),
        ("a text", Text),
        (torch.tensor([3, 1, 2]), Text),
        (torch.rand(5), Cells),
        (torch.tensor(3.5), Text),
        (torch.rand(4, 5, 6), Text),
        (torch.randint(0, 9, (3, 4, 4)), Text),
        (object(), Text),
    ],
)
def test_inputs_are_drawn_by_their_kind(value: Any, kind: type) -> None:
    assert type(by_kind(value)) is kind


def test_pixels_are_those_of_the_input_or_stretched_to_what_is_visible() -> None:
    assert visible(np.array([[0.0, 0.5], [1.0, 0.2]])).tolist() == [[0, 128], [255, 51]]
    assert visible(np.array([[-2.0, 0.0], [2.0, np.nan]])).tolist() == [[0, 128], [255, 128]]
    assert visible(np.array([[7.0, 7.0]])).tolist() == [[128, 128]]
    assert visible(np.array([[1, 250]], np.uint8)).tolist() == [[1, 250]]


def test_a_small_picture_keeps_every_pixel_and_a_large_one_is_made_smaller() -> None:
    import base64
    import io

    def opened(picture: Any) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(picture.url.split(",")[1])))

    pixels = torch.rand(1, 8, 8)
    small = by_kind(pixels)
    np.testing.assert_array_equal(np.asarray(opened(small)), (pixels[0] * 255).round().byte())
    large = by_kind(torch.rand(3, 300, 400))
    assert opened(large).size == (128, 96)
    assert isinstance(large, Picture)
    assert (large.width, large.height) == (400, 300)


def test_render_may_return_images_texts_and_mappings_and_nothing_else() -> None:
    assert isinstance(rendered(np.zeros((4, 4, 3))), Picture)
    assert isinstance(rendered(Image.new("RGBA", (4, 4))), Picture)
    assert rendered({"age": 3.14159, 2: "x"}) == Cells((("age", "3.142"), ("2", "x")), 2)
    assert rendered("x" * 30_000) == Text("x" * MOST_CHARACTERS, 30_000)
    assert rendered("a\x00\ud800\u202eb") == Text("a\ufffd\ufffd\u202eb", 5)
    for wrong in (None, 3.5, torch.rand(5), [1, 2]):
        with pytest.raises(PipelineError, match="render returned"):
            rendered(wrong)
    with pytest.raises(
        PipelineError, match=r"the pipeline's render is int 3: it must be a function"
    ):
        conv_pipeline(render=3)


def test_values_are_aligned_and_signed() -> None:
    minus = "\N{MINUS SIGN}"
    assert [signed(v) for v in (0.0093, -0.5, 123.4, -9.16e-5, 1e7)] == [
        "+0.00930",
        f"{minus}0.500",
        "+123",
        f"{minus}9.16e{minus}5",
        "+1.00e7",
    ]


def test_a_run_without_a_known_pipeline_is_reported_by_ids_and_says_why(run: Path) -> None:
    progress = Saying()
    assert hydra_pipe.report(run, progress=progress)
    assert any(
        "by id and label only" in line and "from a Pipeline object" in line
        for line in progress.said
    )
    html = text_of(run)
    assert "Samples are shown by id and label only" in html
    cards = Cards(html)
    assert cards.images == 0
    relevance = np.asarray(hydra_pipe.open_run(run).relevance())
    assert {test for test, _ in cards.found} == set(range(relevance.shape[1]))
    for test, train in cards.found:
        column = relevance[:, test]
        order = np.argsort(-column, kind="stable").tolist()
        assert train == [
            *[i for i in order if column[i] > 0][:5],
            *[i for i in order[::-1] if column[i] < 0][:5],
        ]
    assert not hydra_pipe.report(run)


def test_a_pipeline_that_is_given_later_brings_pictures_and_predictions(run: Path) -> None:
    hydra_pipe.report(run, top=3)
    assert hydra_pipe.report(run, top=3, pipeline=conv_pipeline())
    html = text_of(run)
    cards = Cards(html)
    assert cards.images >= len(cards.found) * 7
    trained = conv_pipeline()
    hydra_pipe.train(trained)
    trained.model.eval()
    predicted = trained.model(trained.test.tensors[0]).argmax(1)
    wrong = (predicted != trained.test.tensors[1]).tolist()
    assert [wrong[test] for test, _ in cards.found] == sorted(wrong, reverse=True)
    assert html.count('class="badge wrong"') == sum(wrong)
    assert not hydra_pipe.report(run, top=3, pipeline=conv_pipeline())
    with pytest.raises(RunError, match="was run with top=3, now top=4"):
        hydra_pipe.report(run, top=4)


def test_the_chosen_tests_are_shown_and_others_are_refused(run: Path) -> None:
    hydra_pipe.reduce(run, tests="0-4", overwrite=True)
    hydra_pipe.report(run, tests="3,1")
    assert {test for test, _ in Cards(text_of(run)).found} == {1, 3}
    with pytest.raises(UsageError, match=r"no relevance for test sample 5, it was reduced for 0-4"):
        hydra_pipe.report(run, tests="4-5", overwrite=True)
    with pytest.raises(UsageError, match="not within the 7 test samples"):
        hydra_pipe.report(run, tests="7", overwrite=True)
    with pytest.raises(UsageError, match="give 1 or more"):
        hydra_pipe.report(run, top=0)
    with pytest.raises(UsageError, match="has no test samples"):
        hydra_pipe.report(run, method="self")


def test_means_have_a_page_of_their_own(run: Path) -> None:
    for by in ("label", "mean"):
        hydra_pipe.reduce(run, by=by)
    hydra_pipe.report(run, method="hydra-fisher-by-label")
    hydra_pipe.report(run, method="hydra-fisher-mean")
    assert "Groups of test samples" in text_of(run, "report-hydra-fisher-by-label.html")
    assert "all test samples" in text_of(run, "report-hydra-fisher-mean.html")
    assert hydra_pipe.verify(run) == []
    with pytest.raises(UsageError, match="has means over test samples"):
        hydra_pipe.report(run, method="hydra-fisher-mean", tests="0", overwrite=True)


def test_a_result_that_is_computed_anew_takes_its_page_with_it(run: Path) -> None:
    hydra_pipe.reduce(run, by="mean")
    for method in ("hydra-fisher", "hydra-fisher-mean"):
        hydra_pipe.report(run, method=method)
    hydra_pipe.reduce(run, overwrite=True)
    assert not (run / "report.html").exists()
    assert REPORT.of("hydra-fisher") not in RunDirectory.open(run).stages
    assert (run / "report-hydra-fisher-mean.html").exists()
    hydra_pipe.record(conv_pipeline(), run, overwrite=True)
    assert not list(run.glob("report*"))


def test_verify_finds_a_changed_page_and_repair_forgets_it(run: Path) -> None:
    hydra_pipe.export(run)
    hydra_pipe.report(run)
    assert hydra_pipe.verify(run) == []
    (run / "report.html").write_text("<p>other")
    (fault,) = hydra_pipe.verify(run)
    assert (fault.where, fault.stage) == ("report.html", REPORT.of("hydra-fisher"))
    assert "hydra-pipe report" in fault.what
    assert hydra_pipe.verify(run, repair=True) == []
    assert not (run / "report.html").exists()
    assert set(RunDirectory.open(run).stages) == {
        RECORD,
        REDUCE.of("hydra-fisher"),
        EXPORT.of("hydra-fisher"),
    }
    assert hydra_pipe.report(run)
    (run / "report.html").unlink()
    assert [fault.found for fault in hydra_pipe.verify(run)] == ["is missing"]


def test_a_page_of_another_relevance_is_stale_and_goes_with_a_damaged_one(run: Path) -> None:
    hydra_pipe.report(run)
    directory = RunDirectory.open(run)
    directory.stages[REPORT.of("hydra-fisher")].facts["of_reduce"] = "0" * 64
    directory.save(REPORT.of("hydra-fisher"))
    (fault,) = hydra_pipe.verify(run)
    assert "is stale" in fault.found
    hydra_pipe.report(run, overwrite=True)
    chunk = next(
        path for path in (run / "relevance.zarr/hydra-fisher/c").rglob("*") if path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert hydra_pipe.verify(run, repair=True) == []
    assert not (run / "report.html").exists()


def test_a_report_that_fails_leaves_the_page_that_was_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra_pipe.report(run)
    before = text_of(run)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gathering_module, "findings", fail)
    with pytest.raises(OSError, match="No space"):
        hydra_pipe.report(run, overwrite=True)
    assert text_of(run) == before
    assert RunDirectory.open(run).stages[REPORT.of("hydra-fisher")].state == "failed"
    monkeypatch.undo()
    assert hydra_pipe.report(run)
    assert text_of(run) == before  # the same bytes for the same run


def test_a_page_stays_below_its_size_and_says_what_it_leaves_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = conv_pipeline(render=lambda _: "word " * 2000)
    hydra_pipe.report(run, pipeline=pipeline)
    whole = len(text_of(run).encode())
    most = whole // 2
    original = page_module.page_of
    monkeypatch.setattr(page_module, "page_of", lambda content: original(content, most))
    progress = Saying()
    hydra_pipe.report(
        run,
        pipeline=conv_pipeline(render=lambda _: "word " * 2000),
        overwrite=True,
        progress=progress,
    )
    html = text_of(run)
    assert len(html.encode()) <= most
    assert 0 < len(Cards(html).found) < 7
    assert any("leaves out" in line for line in progress.said)
    assert "it leaves out" in html


def test_an_evaluation_that_was_made_since_comes_onto_the_page(run: Path) -> None:
    hydra_pipe.report(run)
    assert "has not been held against that" in text_of(run)
    _pretend_evaluation(run)
    assert hydra_pipe.report(run)
    assert "trust nobody" in text_of(run)
    assert not hydra_pipe.report(run)


def _pretend_evaluation(run: Path) -> None:
    place = run / "evaluation/smoothness"
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps({"says": ["trust nobody"]}))
    directory = RunDirectory.open(run)
    directory.begin(EVALUATE.of("smoothness"), {})
    directory.end(EVALUATE.of("smoothness"), "complete", checksums="0" * 64)


PIPELINE = """
import pathlib
pathlib.Path({mark!r}).touch()
from support.pipelines import conv_pipeline as pipeline  # as hydra_pipe users write it
"""


def test_a_pipeline_that_a_stranger_names_is_not_run(run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inside = run / "evil.py"
    inside.write_text(PIPELINE.format(mark=str(mark)))
    other = tmp_path / "other.py"
    other.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    victim = tmp_path / "victim"
    victim.mkdir()
    for spec, why in (
        (f"{inside}:pipeline", "lies in the run itself"),
        (f"{shutil.__file__}:rmtree", "is part of an installed package"),
        (f"{hydra_pipe.__path__[0]}/api.py:prune", "is part of an installed package"),
        (f"{other}:pipeline", "does not mention hydra_pipe"),
    ):
        directory = RunDirectory.open(run)
        directory.stages[RECORD].settings |= {"pipeline": spec, "set path": str(victim)}
        directory.save(RECORD)
        with pytest.raises(RunError, match=f"{why}. hydra-pipe does not run such a file unasked"):
            pipeline_of(RunDirectory.open(run), None, "")
        with pytest.raises(RunError, match=f"{why}. hydra-pipe does not run such a file unasked"):
            hydra_pipe.clean(run, lowest=3, retrain=True, method="hydra-fisher")
        hydra_pipe.report(run, overwrite=True)
        assert why in text_of(run)
    assert victim.exists()
    assert not mark.exists()


def test_what_render_raises_is_a_reason_and_no_end(run: Path) -> None:
    def render(_: object) -> str:
        raise ValueError("no picture of this one")

    hydra_pipe.report(run, pipeline=conv_pipeline(render=render))
    assert "render raised at train sample" in text_of(run)
    assert "no picture of this one" in text_of(run)
    assert Cards(text_of(run)).images == 0


def test_samples_of_other_data_are_told(run: Path) -> None:
    pipeline = conv_pipeline()
    pipeline.test.tensors = (pipeline.test.tensors[0].flip(0), pipeline.test.tensors[1])
    hydra_pipe.report(run, pipeline=pipeline)
    assert "apart from those that were recorded" in text_of(run)


def test_what_weakens_a_result_is_said() -> None:
    calm = {
        "method": "hydra",
        "rank": None,
        "up_to_step": None,
        "record": {},
        "reduce": {},
        "n_samples": 9,
        "n_rows": 9,
    }
    calm |= {"unvisited": 0, "projected": 0, "n_blocks": 4, "strange": 0}
    assert warnings(Circumstances(**calm)) == []
    for change, words in (
        ({"record": {"worst_imbalance": 0.02}}, "2.00% of a parameter's gradient"),
        ({"reduce": {"curvature_left": 0.2}}, "left 20% of the curvature"),
        ({"projected": 3}, "3 of 4 parameters were recorded by random projection"),
        ({"method": "influence", "record": {"n_curved_rows": 4}}, "Of 5 of 9 recorded gradients"),
        ({"up_to_step": 120}, "first 120 steps"),
        ({"method": "hydra-exact", "rank": 20}, "Only 20 directions"),
        ({"unvisited": 2}, "2 of 9 training samples were in no recorded step"),
        ({"strange": 1}, "not a number"),
    ):
        (said,) = warnings(Circumstances(**(calm | change)))
        assert words in said
    strange = {"record": {"worst_imbalance": "<b>"}, "reduce": {"curvature_left": None}}
    assert warnings(Circumstances(**(calm | strange))) == []


def test_an_own_loop_that_tells_no_loss_and_a_sample_that_was_never_met(
    tmp_path: Path, recorded: Callable[..., Path]
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(10, 3), torch.randint(0, 2, (10,))
    recorder = hydra_pipe.Recorder(model, optimizer, tmp_path / "run", n_samples=10)
    for ids in (range(4), range(4, 8)):
        with recorder.step(ids):
            torch.nn.functional.multi_margin_loss(
                model(x[ids.start : ids.stop]), y[ids.start : ids.stop]
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.record_test([(x, y)], torch.nn.functional.cross_entropy)
    recorder.close()
    hydra_pipe.reduce(tmp_path / "run")
    hydra_pipe.report(tmp_path / "run")
    html = text_of(tmp_path / "run")
    assert "did not tell its loss" in html
    assert "2 of 10 training samples were in no recorded step" in html
    assert "Labels of the training samples or of the test samples are not known" in html


def test_the_command_says_where_the_page_is_and_what_is_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--top", "2"])
    assert (done.exit_code, done.stdout) == (0, f"{run}: reported; open {run}/report.html\n")
    again = CliRunner().invoke(app, ["report", str(run), "--top", "2"])
    assert "already, nothing to do" in again.stdout
    tight = CliRunner().invoke(
        app, ["report", str(run), "--top", "2", "--overwrite", "--memory", "1MiB"]
    )
    assert tight.exit_code == 1
    assert "raise --memory to" in tight.stderr
    monkeypatch.setattr(run_module, "_NEEDED", ("matplotlib", "no_such_package"))
    lacking = CliRunner().invoke(app, ["report", str(run), "--overwrite"])
    assert lacking.exit_code == 2
    assert "pip install 'hydra-pipe[report]'" in lacking.stderr


def test_whatever_a_manifest_says_of_itself_stays_text(run: Path) -> None:
    directory = RunDirectory.open(run)
    odd = "<script>\x1b[2J\u202e" + "x" * 5000
    record, reduction = directory.stages[RECORD], directory.stages[REDUCE.of("hydra-fisher")]
    record.facts |= {"worst_imbalance": odd, "n_curved_rows": [], "final_sha256": {}, "stalls": odd}
    record.settings |= {"pipeline": 7, odd: [odd, {odd: None}], "epochs": odd}
    reduction.facts |= {"curvature_left": [odd], "seconds": odd}
    directory.versions |= {odd: odd}
    directory.save(RECORD, REDUCE.of("hydra-fisher"))
    hydra_pipe.report(run)
    html = text_of(run)
    assert html.count("<script>") == 1
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html


def test_fewer_labels_than_samples_are_told(run: Path) -> None:
    directory = RunDirectory.open(run)
    del directory.stages[RECORD].facts["labels"]
    directory.save(RECORD)
    metadata = run / "gradients.zarr/labels/train/zarr.json"
    data = json.loads(metadata.read_text())
    data["shape"] = [25]
    metadata.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="has 25 labels of 26 training samples"):
        hydra_pipe.report(run)


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_is_interrupted_while_it_is_cleared_is_cleared_of_its_reports_the_next_time(
    run: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a report is known by its stage only, unlike what is in a directory of
    hydra-pipe's own.
    """
    hydra_pipe.reduce(run, by="mean")
    hydra_pipe.report(run, method="hydra-fisher-mean")

    with monkeypatch.context() as patch:
        patch.setattr("hydra_pipe.store.run.manifest.remove", killed_after(after))
        with pytest.raises(InterruptedError):
            RunDirectory.open(run).clear()
    assert (run / "report-hydra-fisher-mean.html").exists() == (after == 0)
    RunDirectory.open(run).clear()
    assert not [path for path in run.rglob("*") if path.is_file()]
