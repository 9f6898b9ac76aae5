"""The gallery of scored images: best first, everything in one file, and any prompt or file name as text."""

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentreward.data.image_lists import ImageList, ListedImage
from latentreward.reward import edit_prompt
from latentreward.reward.scoring.image_lists import Gallery
from tests.accessibility import PHONE, faults

if TYPE_CHECKING:
    from tests.browser import Pages

HACK = "document.body.dataset.hacked = 1"
HOSTILE = (
    f"<script>{HACK}</script>",
    f'"><img src=x onerror="{HACK}">',
    f"' autofocus onfocus='{HACK}",
    f"</textarea></p></article><script>{HACK}</script>",
    "{{ 7 * 7 }} <!-- &amp; ]]>",
    "\u202eright to left\u202c שלום",
    "two\nlines and a tab\tin them",
    "a" * 10_000,
    "word " * 2_000,
    "",
)
NAMES = (
    "plain.png",
    "<script>alert(1)<script>.png",
    "\"quoted\" & 'single'.png",
    "javascript:alert(1).png",
    "two\nlines.png",
    "\u202egnp.gnipsdrawkcab.png",
    "100% #1?a=b.png",
    "sub folder/ünïcode 図.png",
    "x" * 200 + ".png",
    "-1.png",
)


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def table_of(scores: list[float | None], problems: list[str | None], calibrated: bool = True) -> pa.Table:
    z = [None if score is None or not calibrated else score / 2 for score in scores]
    quantiles = [None if score is None or not calibrated else 1 / (1 + np.exp(-score)) for score in scores]
    return pa.table(
        {
            "image": pa.array([""] * len(scores), pa.string()),
            "prompt": pa.array([""] * len(scores), pa.string()),
            "score": pa.array(scores, pa.float32()),
            "score_sigma_0.4": pa.array(scores, pa.float32()),
            "z_score": pa.array(z, pa.float32()),
            "quantile": pa.array(quantiles, pa.float32()),
            "width": pa.array([None if score is None else 90 for score in scores], pa.int32()),
            "height": pa.array([None if score is None else 60 for score in scores], pa.int32()),
            "problem": pa.array(problems, pa.string()),
        }
    )


def hostile_list(folder: Path) -> tuple[ImageList, pa.Table]:
    """Pictures whose prompts and names are all of the above; two more cannot be read."""
    rows = []
    for place, (name, prompt) in enumerate(zip(NAMES, HOSTILE, strict=True)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(place, *[(90, 60), (60, 90), (300, 20)][place % 3]).save(path)
        rows.append(ListedImage(name, prompt, str(path)))
    for name in (HOSTILE[0], "\u202eempty.png"):
        rows.append(ListedImage(name, HOSTILE[1], str(folder / "gone.png")))
    scores = [*np.linspace(-2, 3, len(NAMES)).tolist(), None, None]
    problems = [*[None] * len(NAMES), "missing file (<script>)", "empty image (0 bytes)"]
    return ImageList(f"pics{HOSTILE[0]}", tuple(rows)), table_of(scores, problems)


def found_in(page: str, pattern: str) -> list[str]:
    """Texts of a page as a browser shows them."""
    return [html.unescape(text) for text in re.findall(pattern, page, re.DOTALL)]


def prompts_of(page: str) -> list[str]:
    return found_in(page, r'<p class="prompt"[^>]*>(.*?)</p>')


def test_best_first_and_every_text_is_text(tmp_path: Path) -> None:
    listed, table = hostile_list(tmp_path / "pics")
    assert Gallery(tmp_path / "page" / "g.html", 500, threads=2, max_pixels=10**6).write(listed, table, "m") == 10
    page = (tmp_path / "page" / "g.html").read_text()
    assert prompts_of(page) == list(reversed(HOSTILE))
    assert page.count("<script") == 1 and not re.search(r"<[^>]* on\w+=", page)
    assert page.count('<img src="data:image/jpeg;base64,') == page.count("<img ") == 10
    for link, name in zip(found_in(page, r'class="name"><a href="([^"]*)"'), reversed(NAMES), strict=True):
        assert re.fullmatch(r"\.\./pics/[\w%./~-]+", link)
        assert ((tmp_path / "page") / unquote(link)).resolve() == (tmp_path / "pics" / name).resolve()
    assert "http" not in re.sub(r'http-equiv="Content', "", page)
    assert "2 without a score" in page


def test_of_many_the_best_and_the_worst_are_shown(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    rows = tuple(ListedImage(f"{place}.png", f"prompt {place}", str(tmp_path / "a.png")) for place in range(50))
    scores: list[float | None] = [float((7 * place) % 50) for place in range(50)]
    shown = Gallery(tmp_path / "g.html", 7, 2, 10**6).write(ImageList("l", rows), table_of(scores, [None] * 50), "m")
    page = (tmp_path / "g.html").read_text()
    expected = [49, 48, 47, 46, 2, 1, 0]
    assert shown == 7
    assert prompts_of(page) == [f"prompt {scores.index(score)}" for score in expected]
    assert re.findall(r'data-rank="(\d+)"', page) == ["1", "2", "3", "4", "48", "49", "50"]
    assert "Shown are the 4 best and the 3 worst; the table has all." in page


@pytest.mark.browser
def test_in_a_browser(tmp_path: Path, browser_page: "Pages") -> None:
    listed, table = hostile_list(tmp_path / "pics")
    Gallery(tmp_path / "g.html", 500, 2, 10**6).write(listed, table, "m")
    page = browser_page(tmp_path / "g.html")
    assert page.evaluate("document.body.dataset.hacked") is None
    assert page.title() == f"Scores of pics{HOSTILE[0]}"
    assert page.evaluate("[...document.images].map((image) => image.naturalWidth > 0)") == [True] * 10
    assert page.locator(".card .prompt").all_text_contents() == list(reversed(HOSTILE))
    assert page.evaluate("document.querySelectorAll('.unreadable tbody tr').length") == 2

    said = "getComputedStyle(document.querySelectorAll('.card .prompt')[{}], '::before').content"
    assert page.evaluate(said.format(0)) == '"(empty prompt)"'
    assert page.evaluate(said.format(1)) == "none"

    page.fill("#filter", "RIGHT left")
    assert page.locator(".card:visible .prompt").all_text_contents() == [HOSTILE[5]]
    assert page.inner_text("#count") == "1 shown"
    page.fill("#filter", "javascript:")
    assert page.locator(".card:visible").count() == 1
    page.fill("#filter", "")
    page.select_option("#order", "worst")
    assert page.locator(".card .prompt").all_text_contents() == list(HOSTILE)
    page.select_option("#order", "name")
    assert page.locator(".card .name bdi").first.text_content() in NAMES
    page.select_option("#order", "best")
    assert page.locator(".card .prompt").all_text_contents() == list(reversed(HOSTILE))

    for name in ("100% #1?a=b.png", "javascript:alert(1).png"):
        link = page.locator(".card .name a", has_text=name)
        address = link.evaluate("(link) => link.href")
        assert address.startswith("file:///")
        assert browser_page(address).evaluate("document.images[0].naturalWidth") > 0


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(tmp_path: Path, browser_page: "Pages", width: int, dark: bool) -> None:
    listed, table = hostile_list(tmp_path / "pics")
    Gallery(tmp_path / "g.html", 500, 2, 10**6).write(listed, table, "m")
    assert faults(browser_page(tmp_path / "g.html", width=width, dark=dark)) == []


def test_the_pictures_that_were_edited_stand_beside_the_edit(tmp_path: Path) -> None:
    for name in ("edit", "first", "second"):
        photo(len(name)).save(tmp_path / f"{name}.png")
    prompts = (
        "plain",
        *(
            edit_prompt("make it red", [tmp_path / f"{name}.png" for name in names])
            for names in (("first",), ("second", "first"), ("gone",))
        ),
    )
    rows = tuple(ListedImage("edit.png", prompt, str(tmp_path / "edit.png")) for prompt in prompts)
    Gallery(tmp_path / "g.html", 9, 1, 10**6).write(
        ImageList("l", rows), table_of([4.0, 3.0, 2.0, 1.0], [None] * 4), "m"
    )
    page = (tmp_path / "g.html").read_text()
    shown = found_in(page, r'<img src="([^"]*)"')
    edit, first, second = shown[0], shown[1], shown[3]
    assert shown == [edit, first, edit, second, first, edit, edit] and len({edit, first, second}) == 3
    assert page.count("→") == 3
