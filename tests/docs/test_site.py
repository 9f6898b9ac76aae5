"""The site of docs/: built without warnings, whole in itself, its formulas shown, its search at work."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.accessibility import PHONE, contrast_faults, keyboard_faults, width_faults
from tests.marks import rotated_after

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--config-file",
            ROOT / "mkdocs.yml",
            "--site-dir",
            folder,
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.stderr[-3000:]}\n(mkdocs comes with pip install -e '.[docs]')"
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pages(site: Path) -> list[str]:
    """Addresses of all pages but the reference's, of which there are many of one kind."""
    found = sorted(str(path.parent.relative_to(site)) for path in site.rglob("index.html"))
    return [name for name in found if not name.startswith("api/")] + ["api/reward", "api/callbacks"]


@pytest.mark.parametrize(
    ("dark", "part"),
    rotated_after(0, [(dark, slice(start, None, 4)) for dark in (False, True) for start in range(4)]),
    ids=[f"{tone} {part} of 4" for tone in ("light", "dark") for part in range(1, 5)],
)
def test_pages_fetch_nothing_and_can_be_read_on_a_phone(
    browser_page, site: Path, address: str, dark: bool, part: slice
) -> None:
    names, faults = pages(site), {}
    assert {".", "tutorial", "data", "alignment", "methods/lpo", "changelog", "contributing"} <= set(names)
    page = browser_page(address, width=PHONE, dark=dark)
    for name in names[part]:
        page.goto(f"{address}/{name}/")
        assert page.locator("h1").first.inner_text().strip(), name
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"), name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the window"
        text = page.locator("main").inner_text()
        assert not re.search(r"\\\(|\$\$|:(class|func|math):`|^\s*\.\. [\w-]+::", text, re.MULTILINE), name
        if told := contrast_faults(page) + width_faults(page):
            faults[name] = told
    assert faults == {}


@pytest.mark.parametrize("width", [PHONE, 1300])
@pytest.mark.parametrize("name", ["monitoring", "methods/lpo"])
def test_all_is_reached_by_keyboard(browser_page, address: str, name: str, width: int) -> None:
    assert keyboard_faults(browser_page(f"{address}/{name}/", width=width)) == []


def test_the_menu_of_a_narrow_screen_opens_by_keyboard(browser_page, address: str) -> None:
    page = browser_page(address, width=PHONE)
    page.get_by_role("button", name="Menu").focus()
    page.keyboard.press("Enter")
    page.locator(".md-sidebar--primary").get_by_role("link", name="Tutorial").wait_for()


@pytest.mark.parametrize(("name", "at_least"), [("methods/lpo", 9), ("methods/dina_lrm", 5), ("api/reward", 8)])
def test_formulas_are_drawn(browser_page, address: str, name: str, at_least: int) -> None:
    page = browser_page(f"{address}/{name}/")
    boxes = page.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width)")
    assert len(boxes) >= at_least and min(boxes) > 3
    assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")


def test_search_finds_a_class(browser_page, address: str) -> None:
    page = browser_page(address)
    page.locator("input[name=query]").click()
    page.locator("input[name=query]").press_sequentially("ThurstoneLoss")  # the page looks when a key is released
    page.locator(".md-search-result__item a").first.wait_for()
    assert "Thurstone" in page.locator(".md-search-result__item").first.inner_text()
