"""The page to rate, in a browser: keys, undo, a narrow screen, and going on after the server has ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.taste.pairs import RATINGS
from tests.accessibility import PHONE, faults
from tests.apps.taste.folders import draw, rating_server

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
    from playwright.sync_api import expect

    with rating_server(folder) as server:
        page = browser_page(server.url)
        expect(page.locator("#count")).to_have_text("0 of 6 rated")
        expect(page.locator("#prompt")).to_have_text("<b>a cat</b> &amp; a dog")
        page.wait_for_load_state("networkidle")
        assert page.locator("#left").evaluate("picture => picture.naturalWidth") == 8
        for number, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown"], start=1):
            page.keyboard.press(key)
            expect(page.locator("#count")).to_have_text(f"{number} of 6 rated")
        assert labels(folder) == ["a", "b", "tie"]
        page.keyboard.press("u")
        expect(page.locator("#count")).to_have_text("2 of 6 rated")
        assert labels(folder) == ["a", "b"]
        page.close()
    with rating_server(folder) as server:
        page = browser_page(server.url, width=360, dark=True)
        expect(page.locator("#count")).to_have_text("2 of 6 rated")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        left, right = page.locator("#left").bounding_box(), page.locator("#right").bounding_box()
        assert left["y"] == right["y"] and right["x"] >= left["x"] + left["width"] and left["width"] > 120
        page.get_by_label("the right picture").click()
        expect(page.locator("#count")).to_have_text("3 of 6 rated")
        for number in (4, 5):
            page.get_by_role("button", name="Tie").click()
            expect(page.locator("#count")).to_have_text(f"{number} of 6 rated")
        page.get_by_role("button", name="Left ←").click()
        expect(page.locator("#count")).to_have_text("All 6 pairs are rated.")
        assert labels(folder) == ["a", "b", "b", "tie", "tie", "a"]
        assert page.get_by_role("button", name="Left ←").is_disabled()
        page.close()


@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(browser_page: Any, folder: Path, width: int, dark: bool) -> None:
    with rating_server(folder) as server:
        page = browser_page(server.url, width=width, dark=dark)
        page.locator("#left").wait_for()
        page.wait_for_load_state("networkidle")
        assert faults(page) == []
        page.close()
