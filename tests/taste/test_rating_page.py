"""The page to rate, in a browser: keys, undo, a narrow screen, and going on after the command has ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentreward.taste.pairs import RATINGS
from tests.serving.processes import forked_server
from tests.taste.folders import draw

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        draw(tmp_path / "mine" / f"{number}.png", number, "<b>a cat</b> &amp; a dog")
    return tmp_path / "mine"


def labels(folder: Path) -> list[str]:
    file = folder / RATINGS
    return [json.loads(line)["label"] for line in file.read_text().splitlines()] if file.is_file() else []


def test_pairs_are_rated_by_keys_and_go_on_later(browser_page: Any, folder: Path) -> None:
    with forked_server("taste", str(folder), "--rate", "--port=0") as server:
        page = browser_page(server.address)
        page.wait_for_function(
            "document.getElementById('left').complete && document.getElementById('left').naturalWidth"
        )
        assert page.text_content("#prompt") == "<b>a cat</b> &amp; a dog"
        for number, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown"], start=1):
            page.keyboard.press(key)
            page.wait_for_function(f"document.getElementById('count').textContent === '{number} of 6 rated'")
        assert labels(folder) == ["a", "b", "tie"]
        page.keyboard.press("u")
        page.wait_for_function("document.getElementById('count').textContent === '2 of 6 rated'")
        assert labels(folder) == ["a", "b"]
    with forked_server("taste", str(folder), "--rate", "--port=0") as server:
        page = browser_page(server.address, width=360, dark=True)
        page.wait_for_function("document.getElementById('count').textContent === '2 of 6 rated'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        left, right = page.locator("#left").bounding_box(), page.locator("#right").bounding_box()
        assert left["y"] == right["y"] and right["x"] >= left["x"] + left["width"] and left["width"] > 120
        page.get_by_label("the right picture").click()
        page.wait_for_function("document.getElementById('count').textContent === '3 of 6 rated'")
        for number in (4, 5):
            page.get_by_role("button", name="Tie").click()
            page.wait_for_function(f"document.getElementById('count').textContent === '{number} of 6 rated'")
        page.get_by_role("button", name="Left ←").click()
        page.wait_for_function("document.getElementById('count').textContent === 'All 6 pairs are rated.'")
        assert labels(folder) == ["a", "b", "b", "tie", "tie", "a"]
        assert page.get_by_role("button", name="Left ←").is_disabled()
