"""Make the pictures of the documentation from a real run of the demo pipeline.

python docs/images/make.py        # needs the extra dev, and Debian's chromium
"""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import hydra_pipe
from hydra_pipe.rewinding.picture import write_picture

HERE = Path(__file__).parent
PIPELINE = HERE.parents[1] / "pipelines" / "digits.py"
WIDTH = 1000  # CSS pixels
MARGIN = 12  # CSS pixels above and below what is shown
COLOURS = 64  # of a picture: more are not seen


def demo_report(run: Path) -> Path:
    """Record the demo's pipeline into `run`, reduce the recording, and write the report page."""
    hydra_pipe.record(f"{PIPELINE}", run, settings={"noise": 0.1, "lr": 0.2})
    hydra_pipe.reduce(run)
    hydra_pipe.report(run)
    return run / "report.html"


def spikes() -> Image.Image:
    """The picture that the page about `rewind` writes, from its own training."""
    text = (HERE.parent / "rewind.md").read_text()
    training = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        exec(compile(training, "rewind.md", "exec"), {})
        found = hydra_pipe.open_run("runs/mine").spikes()
        write_picture("spikes.png", found, "runs/mine")
        return Image.open("spikes.png").convert("RGB")


def picture(page: Page, first: str, last: str) -> Image.Image:
    """The page from the top of element `first` to the bottom of element `last`, as CSS selectors
    name them.
    """
    top, bottom = page.locator(first).first.bounding_box(), page.locator(last).first.bounding_box()
    if top is None or bottom is None:
        raise LookupError(f"the report page has no {first} or no {last}")
    start = top["y"] - MARGIN
    height = bottom["y"] + bottom["height"] + MARGIN - start
    png = page.screenshot(
        full_page=True, clip={"x": 0, "y": start, "width": WIDTH, "height": height}
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        report = demo_report(Path(scratch) / "digits")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        # Fields and buttons appear with JavaScript only, and show nothing in a picture.
        context = browser.new_context(
            viewport={"width": WIDTH, "height": 800}, java_script_enabled=False
        )
        page = context.new_page()
        page.goto(report.as_uri())
        pictures = {
            "labels": picture(page, "#labels h2", "#labels ol > :nth-child(6)"),
            "prediction": picture(page, "#tests h2", "#tests article"),
        }
        browser.close()
    pictures["spikes"] = spikes()
    for name, image in pictures.items():
        few = image.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")
        few.save(HERE / f"{name}.webp", lossless=True, method=6)


if __name__ == "__main__":
    main()
