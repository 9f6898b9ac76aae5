"""Pictures of a benchmark's report for README and docs, taken in Chromium.

After ``make demo``, in the root of a checkout::

    REWARD=demo/dina_lrm_tiny latentreward benchmark demo/report --config configs/benchmark/tiny.yaml
    python docs/screenshots.py demo/report/report.html docs/images
"""

import sys
from pathlib import Path

from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.browser import chromium, opened_pages

WIDTH = 1180


def main(report: str, folder: str) -> None:
    """Write ``benchmark_levels.png`` and ``benchmark_pairs.png``."""
    with opened_pages(chromium() or sys.exit("no chromium on PATH; try: apt-get install chromium")) as pages:
        page = pages(report, width=WIDTH)
        levels = page.locator("section", has=page.locator("h2", has_text="Accuracy by noise level"))
        levels.locator("img").first.screenshot(path=Path(folder) / "benchmark_levels.png")
        first_row(page, Path(folder) / "benchmark_pairs.png")


def first_row(page: Page, path: Path) -> None:
    """The first pairs on which models disagree, as many as stand beside each other."""
    page.evaluate("scrollTo(0, 0)")
    boxes = [card.bounding_box() for card in page.locator("article.card").all()]
    row = [box for box in boxes if box and boxes[0] and box["y"] == boxes[0]["y"]]
    left, top = row[0]["x"], row[0]["y"]
    right, height = row[-1]["x"] + row[-1]["width"], max(box["height"] for box in row)
    page.screenshot(path=path, full_page=True, clip={"x": left, "y": top, "width": right - left, "height": height})


if __name__ == "__main__":
    main(*sys.argv[1:])
