"""Reports as people meet them: in a browser, by mouse and by keyboard, on a desk and on a phone, in
the light and in the dark.
"""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import ROOT
from support.pipelines import conv_pipeline

import hydra_pipe

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium: apt-get install chromium"
)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SHIPPED: dict[str, dict[str, Any]] = {
    "digits.py": {"epochs": 2, "noise": 0.1, "lr": 0.2},
    "fashion_mnist.py": {"data": "fashion-mnist", "n_train": 320, "n_test": 14, "epochs": 1},
    "shakespeare.py": {
        "data": "text",
        "n_train": 64,
        "n_test": 8,
        "epochs": 1,
        "layers": 2,
        "width": 32,
        "context": 64,
    },
    "adult.py": {"data": "tabular", "n_train": 500, "n_test": 14, "epochs": 1},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(
    browser: Any, file: Path, viewport: dict[str, int], scheme: str = "light"
) -> Iterator[Any]:
    """The page, from the disk.

    Afterwards nothing may have been said on the console, or asked of anyone.
    """
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    outside = [
        url
        for url in asked
        if url.partition("#")[0] != file.as_uri() and not url.startswith(("data:", "about:"))
    ]
    context.close()
    assert said == []
    assert outside == []
    assert asked


def check_looks(page: Any) -> None:
    """No fault that axe knows, and nothing wider than the screen."""
    options = {"resultTypes": ["violations"]}  # of the others, one each is described
    faults = axe_api.Axe().run(page, options=options).response["violations"]
    assert [(f["id"], [node["html"][:200] for node in f["nodes"][:3]]) for f in faults] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def shown(page: Any, part: str) -> list[str]:
    """Ids of what a list shows, in its order."""
    return page.eval_on_selector_all(
        f"#{part} [data-item]", "all => all.filter(e => e.checkVisibility()).map(e => e.dataset.id)"
    )


def show_all(page: Any, part: str, first: int) -> None:
    """The list begins with `first` items, and has more on asking, until all are there."""
    more = page.locator(f"#{part} [data-more]")
    n = len(shown(page, part))
    assert n == min(first, page.locator(f"#{part} [data-item]").count())
    while more.is_visible():
        more.click()
        assert n < len(shown(page, part)) <= n + first
        n = len(shown(page, part))
    assert n == page.locator(f"#{part} [data-item]").count()


def use_every_control(page: Any) -> None:
    for part, first in (("tests", 6), ("harmful", 12)):
        if part == "harmful" and not page.locator("#harmful").count():
            continue
        form = page.locator(f"#{part} form.controls")
        if form.count():
            show_all(page, part, first)
        before = shown(page, part)
        if part == "harmful" and not before:  # which `check_download` holds against the tables
            assert page.locator("#harmful .note").is_visible()
            continue
        assert before
        field, sort = form.locator("[name=search]"), form.locator("[name=sort]")
        field.fill(before[-1])
        assert before[-1] in shown(page, part)
        field.fill("no such id")
        assert shown(page, part) == []
        assert page.locator(f"#{part} .empty").is_visible()
        form.locator("button[type=reset]").click()
        page.wait_for_function("part => document.querySelector(`#${part} .empty`).hidden", arg=part)
        assert shown(page, part) == before
        for name in ("label", "outcome"):
            select = form.locator(f"[name={name}]")
            for value in (
                select.locator("option").evaluate_all("all => all.map(o => o.value)")[1:3]
                if select.count()
                else []
            ):
                select.select_option(value)
                kept = page.eval_on_selector_all(
                    f"#{part} [data-item]",
                    f"all => all.filter(e => e.checkVisibility()).map(e => e.dataset.{name})",
                )
                assert set(kept) <= {value}
                assert f"{len(kept)} of {len(before)}" in form.locator(".count").inner_text()
            if select.count():
                select.select_option("")
        sort.select_option("id")
        assert shown(page, part) == sorted(before, key=int)
        sort.select_option("order")
        assert shown(page, part) == before
    sort = page.locator("#tests [name=sort]")
    sort.select_option("-loss")
    losses = page.eval_on_selector_all(
        "#tests [data-item]", "all => all.map(e => Number(e.dataset.loss))"
    )
    assert losses == sorted(losses, reverse=True)
    sort.select_option("order")
    if not page.locator("#tests li[data-train]").count():  # without relevance
        return
    link = page.locator("#tests a[data-find]").first
    train = link.get_attribute("data-find")
    link.click()
    touched = {
        item.get_attribute("data-id")
        for item in page.locator("#tests .card").all()
        if item.locator(f"li[data-train='{train}']").count()
    }
    assert set(shown(page, "tests")) == touched | ({train} & touched)
    assert page.locator(f"#tests li[data-hit][data-train='{train}']").first.is_visible()
    page.locator("#tests button[type=reset]").click()


def check_download(page: Any, run: Path, tmp_path: Path) -> None:
    table = (
        pq.read_table(run / "rankings/method=hydra-fisher/samples.parquet")
        .sort_by("rank")
        .to_pydict()
    )
    harmful = [
        i for i, total in zip(table["train_id"], table["relevance_sum"], strict=True) if total < 0
    ]
    link = page.get_by_role("link", name="ids as CSV")
    assert link.count() == bool(harmful)
    if not harmful:
        return
    with page.expect_download() as waiting:
        link.click()
    waiting.value.save_as(tmp_path / "ids.csv")
    with open(tmp_path / "ids.csv", newline="") as file:
        found = [int(row["train_id"]) for row in csv.DictReader(file)]
    assert found == harmful[: len(found)]
    assert len(found) == min(60, len(harmful))


def check_keyboard(page: Any, file: Path) -> None:
    """The tabulator alone reaches the link that skips, then the controls of the page."""
    # A new visit: otherwise the tabulator goes on from what was clicked last.
    page.goto("about:blank")
    page.goto(file.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    if page.locator("[data-doubt]").count():
        assert page.evaluate("document.activeElement.matches('[data-doubt]')")
        page.locator("#tests [name=search]").focus()
    met = {page.evaluate("document.activeElement.name")}
    for _ in range(7):
        page.keyboard.press("Tab")
        met.add(
            page.evaluate(
                "document.activeElement.name || document.activeElement.type || "
                "document.activeElement.tagName"
            )
        )
    assert {"search", "sort", "reset"} <= met
    details = page.locator("#recorded > details").last
    details.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert details.get_attribute("open") is not None


def decisions_of(page: Any, place: Path) -> list[list[str]]:
    """Rows of the downloaded decisions, below their header."""
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download decisions as CSV").click()
    assert waiting.value.suggested_filename == "decisions.csv"
    waiting.value.save_as(place)
    with open(place, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["sample", "decision", "label"]
    return rows


def check_decisions(page: Any, run: Path, tmp_path: Path) -> None:
    """Labels are kept, corrected and dropped by keyboard and by mouse, decisions outlive a reload,
    and `clean` takes them.
    """
    items = page.locator("[data-doubt]")
    ids = items.evaluate_all("all => all.map(e => e.dataset.id)")
    suggested = items.evaluate_all("all => all.map(e => e.dataset.class)")
    assert len(ids) > 12
    assert page.locator("[data-doubt]:visible").count() == 12
    assert not page.get_by_role("link", name="Download decisions as CSV").is_visible()
    items.first.focus()
    for key in ("2", "j", "k", "1", "3", "ArrowUp", "0", "3", "o"):
        page.keyboard.press(key)
    # The last key went to the fourth sample's list of other labels.
    assert page.evaluate("document.activeElement.closest('[data-doubt]').dataset.id") == ids[3]
    other = next(str(n) for n in range(10) if str(n) != suggested[3])
    items.nth(3).locator("select").select_option(other)
    items.nth(4).get_by_role("button", name="Keep").click()
    items.nth(5).get_by_role("button", name="Drop").click()
    items.nth(5).get_by_role("button", name="Drop").click()  # taken back
    expected = [
        [ids[0], "relabel", suggested[0]],
        [ids[1], "keep", ""],
        [ids[2], "drop", ""],
        [ids[3], "relabel", other],
        [ids[4], "keep", ""],
    ]
    assert decisions_of(page, tmp_path / "decisions.csv") == expected
    decided = hydra_pipe.clean(run, decisions=tmp_path / "decisions.csv").drop.to_pylist()
    found = {row["train_id"]: row for row in decided if row["decided"]}
    assert {i: (row["action"], row["suggested_class"]) for i, row in found.items()} == {
        int(ids[0]): ("relabel", int(suggested[0])),
        int(ids[2]): ("drop", found[int(ids[2])]["suggested_class"]),
        int(ids[3]): ("relabel", int(other)),
    }
    page.reload()
    assert decisions_of(page, tmp_path / "again.csv") == expected
    assert "5 decided: 2 kept, 2 relabelled, 1 dropped" in page.inner_text("#labels .decided")
    pressed = page.locator("[data-doubt] [aria-pressed=true]")
    assert pressed.evaluate_all("all => all.map(e => e.dataset.decision)") == [
        "relabel",
        "keep",
        "drop",
        "keep",
    ]
    items.nth(11).focus()
    page.keyboard.press("j")  # brings the next ones
    assert page.locator("[data-doubt]:visible").count() == 24
    assert page.evaluate("document.activeElement.dataset.id") == ids[12]
    page.get_by_role("button", name="Forget all").click()
    assert page.evaluate("localStorage.length") == 0
    check_looks(page)


def check_map(page: Any) -> None:
    """A point that is tapped, or walked to, shows its sample: those that look wrong first."""
    plane = page.locator("#map .plane")
    plane.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        assert "looks wrong" in page.inner_text("#map .picked")
    seen = page.inner_text("#map .picked")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#map .picked") != seen
    plane.locator("svg").click(position={"x": 5, "y": 5})
    assert page.inner_text("#map .picked").startswith("Sample #")
    assert page.locator("#map .here").is_visible()


def check_print(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("form.controls").first.is_visible()
    assert page.locator("article.card").first.is_visible()


@pytest.mark.parametrize(
    "pipeline",
    [
        pytest.param(name, marks=[pytest.mark.data] if "data" in options else [])
        for name, options in SHIPPED.items()
    ],
)
def test_reports_of_shipped_pipelines(
    pipeline: str, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = dict(SHIPPED[pipeline])
    if "data" in settings:
        settings["data"] = request.getfixturevalue("shared_data") / settings["data"]
    run = tmp_path / "run"
    hydra_pipe.record(
        str(ROOT / "pipelines" / pipeline),
        run,
        settings=[f"{name}={value}" for name, value in settings.items()],
    )
    hydra_pipe.reduce(run)
    hydra_pipe.export(run)
    hydra_pipe.report(run, top=2)  # axe looks at every element
    file = run / "report.html"
    assert file.stat().st_size < 10_000_000
    with opened(browser, file, DESK) as page:
        assert "by id and label only" not in page.inner_text("main")
        check_looks(page)
        use_every_control(page)
        check_download(page, run, tmp_path)
        check_keyboard(page, file)
        if pipeline == "digits.py":
            check_decisions(page, run, tmp_path)
            check_map(page)
        check_print(page)
    with opened(browser, file, PHONE, "dark") as page:
        check_looks(page)
        if page.locator("[data-doubt]").count():
            end = page.locator("#labels").evaluate("e => e.getBoundingClientRect().bottom")
            assert end <= 6 * PHONE["height"]


HOSTILE = [
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 2</script>",
    '"><img src=x onerror="window.broken = 3">',
    "' autofocus onfocus='window.broken = 4",
    "</style></title></textarea><svg onload=window.broken=5>",
    "\u202eright to left\u202c \u05d0\u05d1\u05d2 {{ 7 * 7 }} {% raw %} &amp; &lt;b&gt;",
    "x" * 10_000,
    "many words " * 1000,
]


def test_whatever_data_say_stays_text_and_in_its_place(browser: Any, tmp_path: Path) -> None:
    labels = [HOSTILE[i % len(HOSTILE)] for i in range(26)]
    texts = {"train": iter(range(10**6)), "shown": []}

    def render(_: object) -> object:
        text = HOSTILE[next(texts["train"]) % len(HOSTILE)]
        texts["shown"].append(text)
        return text if len(texts["shown"]) % 2 else {text: text, "<b>": "</dl>"}

    def pipeline() -> hydra_pipe.Pipeline:
        return conv_pipeline(sample_labels=labels, test_labels=labels[:7], render=render)

    run = tmp_path / "<img src=x onerror=alert(1)>"
    hydra_pipe.record(pipeline(), run)
    hydra_pipe.reduce(run)
    hydra_pipe.report(run, pipeline=pipeline())
    for viewport, scheme in ((DESK, "dark"), (PHONE, "light")):
        with opened(browser, run / "report.html", viewport, scheme) as page:
            assert page.evaluate("window.broken") is None
            assert page.locator("script").count() == 1
            assert page.locator("style").count() == 1
            assert page.locator("img").count() == 0
            check_looks(page)
            every = page.evaluate("document.body.textContent")
            for text in HOSTILE:
                assert text in every  # whole, and as it is
            long = page.locator("article details.long", has_text="xxx").first
            excerpt = long.locator("summary bdi").inner_text()
            assert 0 < len(excerpt) <= 400
            assert long.locator("summary .cut").is_visible()
            long.locator("summary").focus()
            page.keyboard.press("Enter")
            assert len(long.locator(".whole").inner_text()) == 10_000
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            if viewport is PHONE:
                use_every_control(page)
