"""Picture of a benchmark's report for README and docs, taken in Chromium.

After ``make demo``, in the root of a checkout::

    REWARD=demo/dina_lrm_tiny latentreward benchmark demo/report --config configs/benchmark/tiny.yaml
    python docs/screenshots.py demo/report/report.html docs/images
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.browser import chromium, opened_pages

WIDTH = 1180


def main(report: str, folder: str) -> None:
    """Write ``benchmark_levels.png``."""
    with opened_pages(chromium() or sys.exit("no chromium on PATH; try: apt-get install chromium")) as pages:
        page = pages(report, width=WIDTH)
        levels = page.locator("section", has=page.locator("h2", has_text="Accuracy by noise level"))
        levels.locator("img").first.screenshot(path=Path(folder) / "benchmark_levels.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
